"""Evaluation of a frozen encoder: pooled features once per image and view, a kNN vote, a linear classifier.

`evaluate_subject` runs all of it on one encoder and leaves the result in the run's folder; the parts stand alone above it.
"""

import contextlib
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

import augment
import dataloader
import model
import parallel
import utils

SAME_MEASURE = ("dataset", "train_images", "test_images", "arch", "crop", "asked_resize", "precision", "protocol", "linear_epochs", "linear_lrs",
                "linear_batch_size", "linear_mirror", "asked_knn_k", "knn_temperature", "knn_weighted", "seed")
BLOCK = 1 << 24  # numbers in the largest temporary matrix: 64 MB of float32


# ----------------------------------------------------------------------------------------------------------------------- features

@contextlib.contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; the modes as they were after. RuntimeError if a parameter or buffer changed by one bit."""
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
    changed = [name for name, value in encoder.state_dict().items() if not torch.equal(_bits(value), _bits(before[name]))]
    if changed:
        raise RuntimeError(f"the frozen encoder changed while its features were read: {', '.join(changed[:3])} ({len(changed)} tensors)")


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1).view(torch.uint8)  # NaN equals itself here


def extract_features(encoder: nn.Module, batches: Iterable[dataloader.Batch], mean: Sequence[float], std: Sequence[float],
                     launch: parallel.OneDevice, mirror: bool = False, precision: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """Features float32 (n, D) and labels (n,), on the CPU, of batches of images; `mirror` gives (2, n, D): the images, then mirrored.

    `encoder`, on the devices of `launch`, maps (N, 3, H, W) to (N, D). It is used in eval mode and must come out unchanged, bit for bit (RuntimeError).
    """
    dtype = next(encoder.parameters()).dtype
    features, labels = [], []
    with frozen(encoder):
        for batch in batches:
            images = augment.normalize(batch.images.to(launch.device, non_blocking=True), mean, std, dtype=dtype)
            views = [images, images.flip(-1)] if mirror else [images]
            with parallel.autocast(precision, launch.device):
                out = torch.stack([launch.encode(encoder, view) for view in views])  # (1 or 2, N, D)
            features.append(out.float().cpu())
            labels.append(batch.labels.cpu())
    stacked = torch.cat(features, dim=1)
    return (stacked if mirror else stacked[0]), torch.cat(labels)


# ---------------------------------------------------------------------------------------------------------------------------- kNN

@torch.no_grad()
def knn_hits(train_features: torch.Tensor, train_labels: torch.Tensor, test_features: torch.Tensor, test_labels: torch.Tensor,
             k: int = 200, temperature: float = 0.07, weighted: bool = True) -> int:
    """How many test images a vote of the k nearest training features by cosine gets right, on the device of `train_features` (n, D).

    A neighbour of similarity s has weight exp(s / temperature) (Wu et al. 2018, arXiv:1805.01978, section 3.4), or 1 if not `weighted`;
    a draw goes to the lower class. Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k {k} must be from 1 to the number of training images, {len(train_features)}")
    device, classes = train_features.device, int(train_labels.max()) + 1
    bank, bank_labels = F.normalize(train_features, dim=1), train_labels.to(device)
    hits = 0
    for rows in torch.arange(len(test_features)).split(max(1, BLOCK // len(bank))):
        queries = F.normalize(test_features[rows].to(device), dim=1)
        similarity, nearest = (queries @ bank.T).topk(k, dim=1)
        # dividing all weights of a row by the largest changes no vote and cannot overflow
        weights = torch.exp((similarity - similarity[:, :1]) / temperature) if weighted else torch.ones_like(similarity)
        votes = weights.new_zeros(len(rows), classes).scatter_add_(1, bank_labels[nearest], weights)
        hits += int((votes.argmax(dim=1).cpu() == test_labels[rows]).sum())
    return hits


# -------------------------------------------------------------------------------------------------------------- linear classifier

def standardisation(views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (D,) of features (V, n, D); a feature that is constant has deviation 1."""
    flat = views.flatten(0, 1)
    blocks = flat.split(4096)  # a row of ones times a block is its sum, much faster than a reduction over the first dimension
    mean = sum((block.new_ones(len(block)) @ block).double() for block in blocks) / len(flat)
    std = (sum((block.new_ones(len(block)) @ (block - mean.to(block)).square()).double() for block in blocks) / len(flat)).sqrt()
    return mean.to(flat), torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std)).to(flat)


def train_linear(views: torch.Tensor, labels: torch.Tensor, test_features: torch.Tensor, test_labels: torch.Tensor, *,
                 lrs: Sequence[float], trials: Sequence[int], epochs: int, seed: int = 0, batch_size: int = 256,
                 rows: torch.Tensor | None = None, momentum: float = 0.9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax regression on standardised features, for all T trials and L learning rates at once, by SGD with a cosine schedule.

    `views` (V, n, D) are the training features; `rows` restricts the training to some of the n images. An epoch meets each image once, in
    one of its views drawn at random: the cost of one view with the variety of all. A trial is a number that names its first weights
    and its order, so a classifier does not depend on what is trained beside it. The last, incomplete batch of an epoch is dropped.
    Returns weights (T, L, C, D) and biases (T, L, C) for features as they are, not standardised, and top-1 in percent on the test
    features (m, D) after each epoch (T, L, epochs).
    """
    num_views, n, width = views.shape
    T, L, C, device = len(trials), len(lrs), int(labels.max()) + 1, views.device
    rows = torch.arange(n) if rows is None else rows.cpu()
    batch = min(batch_size, len(rows))
    steps = len(rows) // batch
    flat, labels, test_features, test_labels = views.reshape(-1, width), labels.to(device), test_features.to(device), test_labels.to(device)
    mean, std = standardisation(views)
    inverse = 1 / std
    first = torch.stack([torch.randn(width, C, generator=utils.generator(seed, "linear weights", t)) for t in trials])
    weight = 0.01 * first.repeat(1, 1, L).to(flat)                             # T x D x LC
    bias = torch.zeros(T, 1, L * C).to(flat)                                   # T x 1 x LC
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    rates = torch.tensor(lrs, dtype=torch.float64).repeat_interleave(C).to(flat)  # LC
    accuracy = torch.zeros(T, L, epochs, dtype=torch.float64)
    for epoch in utils.progress(range(epochs), f"linear classifier ({T * L} at once)"):
        order = torch.stack([_epoch_order(rows, n, num_views, seed, t, epoch) for t in trials]).to(device)
        for step in range(steps):
            now = order[:, step * batch:(step + 1) * batch].reshape(-1)
            x = flat.index_select(0, now).sub_(mean).mul_(inverse).view(T, batch, width)
            error = torch.baddbmm(bias, x, weight).view(T, batch, L, C).softmax(dim=-1)
            target = labels[now % n].view(T, batch, 1, 1).expand(T, batch, L, 1)
            error.scatter_add_(3, target, torch.full_like(error[..., :1], -1.0))  # gradient of the cross-entropy: softmax - one-hot
            error = error.view(T, batch, L * C) / batch
            weight_velocity = torch.baddbmm(weight_velocity, x.mT, error, beta=momentum)
            bias_velocity = momentum * bias_velocity + error.sum(dim=1, keepdim=True)
            rate = rates * 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (epochs * steps)))
            weight.sub_(rate * weight_velocity)
            bias.sub_(rate * bias_velocity)
        plain = _plain(weight, bias, mean, std, L)
        accuracy[..., epoch] = _top1(*plain, test_features, test_labels)
    return *plain, accuracy


def _epoch_order(rows: torch.Tensor, n: int, num_views: int, seed: int, trial: int, epoch: int) -> torch.Tensor:
    """The order of an epoch, as rows of the flattened views (V n, D): one view of each image."""
    random = utils.generator(seed, f"linear order {trial}", epoch)
    shuffled = rows[torch.randperm(len(rows), generator=random)]
    return shuffled + n * torch.randint(num_views, (len(rows),), generator=random)


def _plain(weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, L: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (T, L, C, D) and biases (T, L, C) for raw features: the standardisation moved into the classifier."""
    T, D, _ = weight.shape
    scaled = weight.double() / std.double()[:, None]
    shifted = bias[:, 0].double() - mean.double() @ scaled
    return scaled.view(T, D, L, -1).permute(0, 2, 3, 1).to(weight.dtype).contiguous(), shifted.view(T, L, -1).to(weight.dtype)


def _top1(weight: torch.Tensor, bias: torch.Tensor, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Top-1 in percent (T, L) of classifiers (T, L, C, D) on features (m, D), in blocks."""
    T, L, C, D = weight.shape
    stacked, hits = weight.view(-1, D).T, torch.zeros(T, L, dtype=torch.long, device=features.device)
    for part in torch.arange(len(features), device=features.device).split(max(1, BLOCK // (T * L * C))):
        logits = torch.addmm(bias.view(-1), features[part], stacked).view(-1, T, L, C)
        hits += (logits.argmax(dim=-1) == labels[part, None, None]).sum(dim=0)
    return 100.0 * hits.cpu().double() / len(features)


def held_out(labels: torch.Tensor, fraction: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices to train on and to choose on, stratified: `fraction` of each class, at least one image; a class of one image stays in training."""
    labels = labels.cpu()
    kept, held = [], []
    for c in labels.unique():
        members = (labels == c).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held.append(members[:count])
        kept.append(members[count:])
    return torch.cat(kept), torch.cat(held)


def linear_evaluation(views: torch.Tensor, labels: torch.Tensor, test_features: torch.Tensor, test_labels: torch.Tensor, *, epochs: int,
                      lrs: Sequence[float], trials: int, seed: int = 0, batch_size: int = 256) -> dict[str, Any]:
    """Top-1 of a linear classifier on frozen features at the last epoch; the test split decides nothing.

    `views` (V, n, D) or (n, D) are training features, `test_features` (m, D). The learning rate is the one with the highest accuracy on a
    stratified tenth of the training split that the classifiers did not see; then `trials` classifiers are fitted on all of it.
    Returns linear_top1 (mean over trials, percent), linear_top1_std (sample deviation), trials (top-1 of each), learning_rate, heldout_top1
    (of each learning rate), accuracy (trials, epochs), weight (trials, C, D) and bias (trials, C) for the features as they are.
    Raises UserError if there is a choice to make and no class has two images.
    """
    views = views if views.dim() == 3 else views[None]
    options = {"epochs": epochs, "seed": seed, "batch_size": batch_size}
    heldout: dict[str, float] = {}
    best = float(lrs[0])
    if len(lrs) > 1:
        kept, held = held_out(labels, 0.1, utils.generator(seed, "linear held out"))
        if not len(held):
            raise utils.UserError(f"{len(labels)} training images, one for each class, leave none to choose a learning rate on: give one --linear_lrs")
        _, _, chosen = train_linear(views, labels, views[0, held.to(views.device)], labels[held], lrs=lrs, trials=[0], rows=kept, **options)
        heldout = {f"{lr:g}": round(float(top1), 4) for lr, top1 in zip(lrs, chosen[0, :, -1])}
        best = float(lrs[int(chosen[0, :, -1].argmax())])
    weight, bias, accuracy = train_linear(views, labels, test_features, test_labels, lrs=[best], trials=range(trials), **options)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise utils.UserError(f"the linear classifier diverged at learning rate {best:g}: give smaller --linear_lrs")
    last = [float(top1) for top1 in accuracy[:, 0, -1]]
    return {"linear_top1": statistics.fmean(last), "linear_top1_std": statistics.stdev(last) if trials > 1 else 0.0, "trials": last,
            "learning_rate": best, "heldout_top1": heldout, "accuracy": accuracy[:, 0], "weight": weight[:, 0].cpu(), "bias": bias[:, 0].cpu()}


# -------------------------------------------------------------------------------------------------------- one encoder, start to end

@dataclass
class Subject:
    """An encoder to evaluate, and where its results go: `home`/`stem`; `foreign`: a file outside of the run."""
    encoder: nn.Module
    home: Path
    stem: str
    foreign: bool
    crop: int
    mean: list[float]
    std: list[float]
    record: dict[str, Any]  # what result.json says of it: encoder, arch, checkpoint, epoch, step


def load_subject(cfg: SimpleNamespace) -> Subject:
    """The encoder that the configuration names: a run's checkpoint, a file (`pretrained`), or an untrained one (`encoder` random).

    Raises UserError if the checkpoint does not exist or does not fit, or if `arch` contradicts it.
    """
    run = utils.run_folder(cfg.encoder_output_root, cfg.encoder_dataset_name, cfg.encoder_exp_version)
    home, untrained, path = run / "eval", cfg.encoder == "random", None
    if cfg.pretrained is not None:
        if untrained or cfg.load_pretrained_epoch is not None:
            other = "--encoder random" if untrained else f"--load_pretrained_epoch {cfg.load_pretrained_epoch}"
            raise utils.UserError(f"--pretrained {cfg.pretrained!r} and {other} contradict each other: give one")
        path, home = Path(cfg.pretrained), Path(cfg.encoder_output_root) / "eval"
    elif untrained and cfg.load_pretrained_epoch is not None:
        raise utils.UserError(f"--encoder random and --load_pretrained_epoch {cfg.load_pretrained_epoch} contradict each other: give one")
    elif not untrained or any(run.glob("checkpoints/*.pth.tar")):
        path = utils.checkpoint_path(run, cfg.load_pretrained_epoch)
    checkpoint = utils.load_checkpoint(path) if path else {}
    # training's defaults serve an untrained encoder that has no run
    config = {name: key.default for name, key in utils.config_keys("train").items()} | (checkpoint.get("config") or {"seed": cfg.seed})
    arch = checkpoint.get("arch") or (config["arch"] if cfg.arch == "auto" else cfg.arch)
    if cfg.arch not in ("auto", arch):
        raise utils.UserError(f"--arch {cfg.arch} contradicts checkpoint {str(path)!r}, which is a {arch}: leave --arch out")
    epoch = None if untrained else checkpoint.get("epoch")
    if untrained:
        encoder, stem = untrained_encoder(arch, config), "random"
    else:
        encoder = utils.checked(model.encoder_from_state, arch, checkpoint["state_dict"], config["feature_dim"], config["mlp"])
        stem = re.sub(r"(\.(pth|pt|tar))+$", "", path.name) if epoch is None or cfg.pretrained is not None else f"epoch_{epoch:04d}"
    record = {"encoder": cfg.encoder, "arch": arch, "checkpoint": None if untrained else str(path), "epoch": epoch,
              "step": None if untrained else checkpoint.get("step")}
    return Subject(encoder=model.backbone(encoder), home=home, stem=stem, foreign=cfg.pretrained is not None,
                   crop=config["crop"] if cfg.crop == "auto" else cfg.crop, mean=config["mean"], std=config["std"], record=record)


def untrained_encoder(arch: str, config: dict[str, Any]) -> nn.Module:
    """The encoder that a run of this configuration starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(utils.generator(config["seed"], "weights").initial_seed())
        return utils.checked(model.build_encoder, arch, config["feature_dim"], config["mlp"])


def data_name(root: str) -> str:
    """The name of a data set in results: its kind, or the folder's name if it is one of class folders. UserError if there is no data."""
    kind = dataloader.detect(root)
    return re.sub(r"[^\w.]+", "_", Path(root).resolve().name) or kind if kind in ("folders", "classes") else kind


def data_path(root: str) -> str:
    """The place of a data set, the same from wherever it is named."""
    return root if root == "shapes" else str(Path(root).resolve())


def result_folder(subject: Subject, dataset: str, protocol: str) -> Path:
    """`home`/`stem`, or `home`/`stem`-DATASET-PROTOCOL if the former holds the result of another data set or protocol.

    Raises UserError if that holds the result of another file of the same name (`pretrained`).
    """
    folder = subject.home / subject.stem
    taken = read_result(folder)
    if taken and (taken.get("dataset"), taken.get("protocol")) != (dataset, protocol):
        folder = subject.home / f"{subject.stem}-{dataset}-{protocol}"
        taken = read_result(folder)
    old, new = (taken or {}).get("checkpoint"), subject.record["checkpoint"]
    if subject.foreign and old and Path(old).resolve() != Path(new).resolve():
        raise utils.UserError(f"{str(folder)!r} holds the result of {old!r}, not of {new!r}: remove it, or choose another --encoder_output_root")
    return folder


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result.json of a folder, or None where there is none that is whole."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return result if isinstance(result, dict) and {*SAME_MEASURE, "linear_top1", "knn_top1", "trials", "encoder", "epoch"} <= result.keys() else None
    except (OSError, ValueError):
        return None


def settings(cfg: SimpleNamespace, subject: Subject) -> dict[str, Any]:
    """What makes a result: how it is measured, apart from the data set, and the encoder."""
    names = ("protocol", "linear_epochs", "linear_lrs", "linear_batch_size", "linear_mirror", "knn_temperature", "knn_weighted", "precision", "seed")
    return {name: getattr(cfg, name) for name in names} | {"asked_knn_k": cfg.knn_k, "asked_resize": cfg.resize, "crop": subject.crop} | subject.record


def same_measure(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results, of whatever encoders, were measured in the same way on the same data."""
    return all(a[name] == b[name] for name in SAME_MEASURE)


def evaluate_subject(cfg: SimpleNamespace, subject: Subject, launch: parallel.OneDevice) -> tuple[Path, dict[str, Any], torch.Tensor]:
    """kNN and linear accuracy of an encoder on `cfg.dataset_root`, left in its result folder by the first process.

    On several devices each encodes its share of the images, every image once, and votes for its share of the test images; the linear
    classifiers, which take seconds, are trained by every process alike. Returns the folder, what result.json holds, and the linear
    accuracy (trials, epochs). Raises UserError for unfit data or settings.
    """
    start = time.monotonic()
    if cfg.dataset_root is None:
        raise utils.UserError("--dataset_root is missing: give labelled images, or the word shapes for the built-in data set")
    if cfg.download and launch.processes > 1:
        raise utils.UserError("--download is for one process: fetch the data with plain python first")
    device, first = launch.device, launch.rank == 0
    precision = utils.checked(parallel.pick_precision, cfg.precision, device)
    train, test = (dataloader.open_dataset(cfg.dataset_root, split, view="center", resize=cfg.resize, crop=subject.crop, download=cfg.download)
                   for split in ("train", "test"))
    if min(len(train), len(test)) < launch.processes ** 2:
        raise utils.UserError(f"{min(len(train), len(test))} images are too few for {launch.processes} processes: evaluate with plain python")
    folder = result_folder(subject, data_name(cfg.dataset_root), cfg.protocol)
    k = min(cfg.knn_k, len(train))
    if first:
        check_writable(folder, "--encoder_output_root")
    if first and k < cfg.knn_k:
        print(f"warning: --knn_k {cfg.knn_k} is more than the {len(train)} training images: k = {k}", file=sys.stderr)
    if first:
        print(f"note     {launch.note}\n" * bool(launch.note) + f"data     {train.name}: {len(train):,} training and {len(test):,} test images, {len(train.classes)} classes, "
              f"shorter side {train.resize} px, crop {subject.crop} px ({launch.name}, {precision})", flush=True)
    subject.encoder.to(device=device, dtype=parallel.precision_dtype(precision), memory_format=torch.channels_last)
    launch.wrap(subject.encoder.requires_grad_(False))
    views, labels = dataset_features(train, cfg, subject, launch, precision, mirror=cfg.linear_mirror)
    test_features, test_labels = dataset_features(test, cfg, subject, launch, precision, mirror=False)
    views = (views if cfg.linear_mirror else views[None]).to(launch.float64_device)
    own = launch.rows(len(test))
    hits = knn_hits(views[0], labels, test_features[own], test_labels[own], k=k, temperature=cfg.knn_temperature, weighted=cfg.knn_weighted)
    knn = 100.0 * int(launch.total(torch.tensor(hits, device=device))) / len(test)
    linear = linear_evaluation(views, labels, test_features, test_labels, epochs=cfg.linear_epochs, lrs=cfg.linear_lrs,
                               trials=cfg.trials, seed=cfg.seed, batch_size=cfg.linear_batch_size)
    scores = {name: linear[name] for name in ("linear_top1", "linear_top1_std", "trials", "learning_rate", "heldout_top1")}
    result = {"linear_top1": scores.pop("linear_top1"), "knn_top1": knn, **scores, "knn_k": k, "dataset": data_name(cfg.dataset_root),
              "dataset_root": data_path(cfg.dataset_root),
              "train_images": len(train), "test_images": len(test), "classes": len(train.classes), "resize": train.resize,
              **settings(cfg, subject), "seconds": round(time.monotonic() - start, 1), "provenance": utils.provenance()}
    if first:
        save_results(folder, result, linear, train.classes)
    return folder, result, linear["accuracy"]


def check_writable(folder: Path, flag: str) -> None:
    """UserError now, before the work, if the folder that a flag names could not be made or written; leaves nothing behind."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise utils.UserError(f"{str(folder)!r} cannot be written: {error.strerror}: choose another {flag}") from None


def dataset_features(dataset: Any, cfg: SimpleNamespace, subject: Subject, launch: parallel.OneDevice, precision: str,
                     mirror: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`extract_features` of a whole data set in its order, on all devices; UserError if the features are not finite."""
    own = torch.arange(len(dataset))[launch.rows(len(dataset))]
    order = list(own.split(cfg.eval_batch_size))
    loader = dataloader.iterate(dataset, order, num_workers=cfg.num_workers, failures=dataloader.Failures(len(dataset)))
    batches = utils.progress(loader, "features", total=len(order))
    features, labels = extract_features(subject.encoder, batches, subject.mean, subject.std, launch, mirror=mirror, precision=precision)
    features = launch.gather(features.movedim(-2, 0), len(dataset)).movedim(0, -2)
    if not features.isfinite().all():
        raise utils.UserError(f"the features of {subject.record['checkpoint']} are not finite: its training diverged; choose an earlier epoch")
    return features, launch.gather(labels, len(dataset))


def save_results(folder: Path, result: dict[str, Any], linear: dict[str, Any], classes: list[str]) -> None:
    """accuracy.csv, linear.pth.tar, and result.json last: where it stands, the others are complete."""
    (folder / "result.json").unlink(missing_ok=True)
    rows = [(epoch, trial, f"{top1:.4f}") for trial, curve in enumerate(linear["accuracy"].tolist(), 1) for epoch, top1 in enumerate(curve, 1)]
    utils.write_csv(folder / "accuracy.csv", ["epoch", "trial", "top1"], rows)
    classifier = {"weight": linear["weight"], "bias": linear["bias"], "classes": list(classes)}  # (trials, C, D), (trials, C)
    classifier |= {name: result[name] for name in ("arch", "checkpoint", "epoch", "dataset", "learning_rate")}
    utils.atomic_write(folder / "linear.pth.tar", lambda file: torch.save(classifier, file))
    utils.write_json(folder / "result.json", result)
