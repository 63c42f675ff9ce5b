"""Linear evaluation: ours (features once, all learning rates and trials at once) against the original's protocol, which runs the encoder in every epoch.

    python benchmarks/evaluate.py ROOT/fashion-mnist --pretrained output/FASHION-MNIST/small/checkpoints/last.pth.tar

Frozen ResNet of the checkpoint (without one: untrained), 5,000 training and 8,000 test images, 100 epochs. The original's protocol: each epoch passes the training
images, randomly cropped (area 0.2 to 1) and flipped, and all test images through the encoder; SGD with momentum 0.9, lr 10, x 0.2 every 20 epochs.
Both use the same encoder in the same precision on the same views' size; ours is `evaluate.linear_evaluation` with three trials and its choice among six rates.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import augment
import evaluate
import parallel
import utils

TRAIN, TEST, BATCH = 5000, 8000, 250


def original(encoder: torch.nn.Module, train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], subject: evaluate.Subject,
             device: torch.device, epochs: int, seed: int) -> float:
    """Top-1 in percent after the last epoch."""
    recipe = augment.recipe("v1", subject.crop, jitter_p=0.0, grayscale=0.0, mean=tuple(subject.mean), std=tuple(subject.std))
    random, hits = torch.Generator().manual_seed(seed), 0
    width = encoder(augment.normalize(train[0][:2].to(device), subject.mean, subject.std)).shape[1]
    torch.manual_seed(seed)
    linear = torch.nn.Linear(width, int(train[1].max()) + 1).to(device)
    optimizer = torch.optim.SGD(linear.parameters(), lr=10, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.2)
    for _ in utils.progress(range(epochs), "the original's protocol"):
        for rows in torch.randperm(len(train[0]), generator=random).split(BATCH):
            views = augment.augment(train[0][rows].to(device), augment.draw(torch.ones(len(rows)), recipe, random), recipe)
            loss = F.cross_entropy(linear(encoder(views)), train[1][rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            hits = sum(int((linear(encoder(augment.normalize(images.to(device), subject.mean, subject.std))).argmax(1).cpu() == labels).sum())
                       for images, labels in zip(test[0].split(BATCH), test[1].split(BATCH)))
    return 100 * hits / len(test[0])


def ours(subject: evaluate.Subject, data: dict[str, object], cfg: SimpleNamespace, launch: parallel.OneDevice, epochs: int, seed: int) -> float:
    views, labels = evaluate.dataset_features(data["train"], cfg, subject, launch, "fp32", mirror=True)
    test_features, test_labels = evaluate.dataset_features(data["test"], cfg, subject, launch, "fp32", mirror=False)
    return evaluate.linear_evaluation(views.to(launch.device), labels, test_features, test_labels, epochs=epochs, lrs=cfg.linear_lrs, trials=3, seed=seed)["linear_top1"]


def first(dataset: object, count: int) -> object:
    """The first images of a data set."""
    dataset.images, dataset.labels = dataset.images[:count], dataset.labels[:count]
    return dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--pretrained")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    import dataloader
    cfg = utils.load_config("test", [f"--dataset_root={args.root}", *([f"--pretrained={args.pretrained}"] if args.pretrained else
                                                                      ["--encoder=random", "--arch=resnet18", "--crop=32", "--encoder_exp_version=none"])])
    launch, subject = parallel.launch(args.device), evaluate.load_subject(cfg)
    subject.encoder.to(device=launch.device, memory_format=torch.channels_last).requires_grad_(False).eval()
    data = {split: first(dataloader.open_dataset(args.root, split, view="center", resize="auto", crop=subject.crop), count)
            for split, count in (("train", TRAIN), ("test", TEST))}
    stored = {split: (lambda batch: (batch.images, batch.labels))(dataset.fetch(torch.arange(len(dataset)))) for split, dataset in data.items()}
    made_by = utils.provenance()
    print(f"commit {made_by['commit']}, torch {made_by['torch']}, {launch.name}, {subject.record['arch']} at {subject.crop} px, {args.epochs} epochs, {TRAIN:,} + {TEST:,} images\n")
    print("| seed | original's protocol: seconds, top-1 | ours: seconds, top-1 | ratio | points |\n| --- | --- | --- | --- | --- |")
    ratios = []
    for seed in range(args.repeats):
        start = time.perf_counter()
        b = ours(subject, data, cfg, launch, args.epochs, seed)
        middle = time.perf_counter()
        a = original(subject.encoder, stored["train"], stored["test"], subject, launch.device, args.epochs, seed)
        end = time.perf_counter()
        ratios.append((end - middle) / (middle - start))
        print(f"| {seed} | {end - middle:.0f}, {a:.2f} | {middle - start:.1f}, {b:.2f} | {ratios[-1]:.1f} | {b - a:+.2f} |", flush=True)
    print(f"\nmedian ratio {statistics.median(ratios):.1f}")


if __name__ == "__main__":
    main()
