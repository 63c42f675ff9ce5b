"""Checkpoints in and out: the reference's published format, torchvision's weights, ours; export to torchvision, timm, Detectron2."""

import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from evaluation_data import class_folders, fabricated_run, one_line
from scripts import run

import evaluate
import model
import utils

X = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trained_looking(network: torch.nn.Module) -> torch.nn.Module:
    """Running statistics and affine parameters as if trained, so that none of them can be mixed up unseen."""
    random = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for value in (
                module.running_mean,
                module.running_var,
                module.weight.data,
                module.bias.data,
            ):
                value.add_(0.2 * torch.rand(value.shape, generator=random))
    return network.eval()


def published(version: int, arch: str = "resnet50") -> tuple[dict, torch.nn.Module]:
    """A file as the reference's moco_v1_200ep and moco_v2_200ep are, by its documented keys, and the query encoder in it, made with torchvision alone."""
    encoders = {}
    for name in ("encoder_q", "encoder_k"):
        network = trained_looking(torchvision.models.get_model(arch, weights=None, num_classes=128))
        if version == 2:
            width = network.fc.in_features
            network.fc = torch.nn.Sequential(
                torch.nn.Linear(width, width), torch.nn.ReLU(), network.fc
            )
        encoders[name] = network
    state = {
        f"module.{name}.{key}": value
        for name, network in encoders.items()
        for key, value in network.state_dict().items()
    }
    state |= {
        "module.queue": torch.randn(128, 256),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    encoders["encoder_q"].fc = torch.nn.Identity()
    return {
        "epoch": 200,
        "arch": arch,
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
    }, encoders["encoder_q"]


def load(path: Path, *flags: str) -> evaluate.Subject:
    return evaluate.load_subject(
        evaluate.settled(utils.load_config("test", [f"--pretrained={path}", *flags]))
    )


def features(encoder: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return encoder.eval()(X)


# ------------------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "version, zipped", [(1, False), (2, True)]
)  # files of 2019 are of torch.save's older format
def test_published_files_are_read(version: int, zipped: bool, tmp_path: Path) -> None:
    content, network = published(version, "resnet50" if version == 2 else "resnet18")
    torch.save(content, tmp_path / "moco.pth.tar", _use_new_zipfile_serialization=zipped)
    subject = load(tmp_path / "moco.pth.tar")
    torch.testing.assert_close(features(subject.encoder), features(network), rtol=1e-5, atol=1e-6)
    assert (
        f"MoCo v{version} checkpoint: {content['arch']}, {'MLP' if version == 2 else 'linear'} head of width 128"
        in subject.found
    )
    assert (subject.crop, subject.mean, subject.record["epoch"], subject.stem) == (
        224,
        [0.485, 0.456, 0.406],
        200,
        "moco",
    )


@pytest.mark.parametrize(
    "arch, drop", [("resnet34", ()), ("resnext50_32x4d", ("fc.", "num_batches_tracked"))]
)
def test_torchvision_weights_are_read(arch: str, drop: tuple[str, ...], tmp_path: Path) -> None:
    network = trained_looking(torchvision.models.get_model(arch, weights=None))
    state = {
        key: value
        for key, value in network.state_dict().items()
        if not any(word in key for word in drop)
    }
    torch.save(state, tmp_path / "weights.pth", _use_new_zipfile_serialization=not drop)
    network.fc = torch.nn.Identity()
    subject = load(tmp_path / "weights.pth")
    torch.testing.assert_close(features(subject.encoder), features(network), rtol=1e-5, atol=1e-6)
    assert (
        f"ResNet weights: {arch}, {'no head' if drop else 'classifier of 1000 classes'}"
        in subject.found
    )


def small(mlp: bool = False, small_stem: bool = False) -> dict[str, torch.Tensor]:
    moco = model.MoCo("resnet18", 8, 16, mlp=mlp, small_stem=small_stem)
    return {f"module.{name}": value for name, value in moco.state_dict().items()}


def test_stem_and_head_are_known_by_their_shapes() -> None:
    for mlp in (False, True):
        for stem in (False, True):
            encoder, found = model.read_encoder(small(mlp, stem))
            assert (found.arch, found.feature_dim, found.mlp, found.small_stem) == (
                "resnet18",
                8,
                mlp,
                stem,
            )
            assert (
                encoder(torch.rand(2, 3, 32, 32)).shape == (2, 512)
                and isinstance(encoder.maxpool, torch.nn.Identity) == stem
            )


def test_every_architecture_is_told_from_the_others() -> None:
    shapes = [frozenset(model._shapes(arch).items()) for arch in model.ARCHS]
    assert len(set(shapes)) == len(model.ARCHS) >= 10


Q = "module.encoder_q."


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda s: s.pop(Q + "layer3.0.conv1.weight"),
            r"resnet18.*1 keys missing \(layer3.0.conv1.weight",
        ),
        (
            lambda s: s.update({Q + "layer9.weight": torch.zeros(1)}),
            r"1 unknown keys \(layer9.weight",
        ),
        (
            lambda s: s.update({Q + "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}),
            r"1 of another shape \(layer1.0.conv1.weight",
        ),
        (
            lambda s: s.update({Q + "conv1.weight": torch.zeros(64, 1, 7, 7)}),
            "first convolution is 64 x 1 x 7 x 7",
        ),
        (
            lambda s: s.update({Q + "conv1.weight": torch.zeros(64, 3, 5, 5)}),
            "first convolution is 64 x 3 x 5 x 5",
        ),
        (lambda s: [s.pop(Q + "fc.weight"), s.pop(Q + "fc.bias")], "head .* but missing"),
        (lambda s: s.update({Q + "fc.weight": torch.zeros(8, 99)}), "head .* fc.weight 8 x 99"),
        (lambda s: s.pop(Q + "fc.bias"), "head .* but fc.weight 8 x 512"),
        (lambda s: s.update({Q + "conv1.weight": 3}), "conv1.weight is no tensor"),
        (
            lambda s: s.update({Q + "layer1.0.extra.num_batches_tracked": torch.tensor(1)}),
            "do not fit a resnet18: .*extra",
        ),
        (lambda s: [s.pop(key) for key in list(s) if "conv1.weight" in key], "neither MoCo's keys"),
        (lambda s: s.clear(), "neither MoCo's keys .* its first is 'none'"),
        (lambda s: s.update({3: torch.zeros(1)}), "keys are not all names"),
        (lambda s: s.update({Q + "fc.weight": torch.tensor(1.0)}), "its head is neither"),
    ],
)
def test_a_partial_match_is_refused(change, words: str) -> None:
    state = small()
    change(state)
    with pytest.raises(ValueError, match=words):
        model.read_encoder(state)


def test_settings_that_contradict_the_weights_are_refused(tmp_path: Path) -> None:
    path = fabricated_run(tmp_path, "v1", epochs=(1,)) / "checkpoints" / "last.pth.tar"
    content = utils.load_checkpoint(path)
    for name, value in (("feature_dim", 16), ("mlp", True), ("small_stem", True)):
        utils.save_checkpoint(
            tmp_path / "odd.pth.tar", content | {"config": content["config"] | {name: value}}
        )
        with pytest.raises(utils.UserError, match=f"its {name} is {value} by its settings"):
            load(tmp_path / "odd.pth.tar")
    utils.save_checkpoint(tmp_path / "odd.pth.tar", content | {"arch": "resnet34"})
    with pytest.raises(utils.UserError, match="its arch is resnet34"):
        load(tmp_path / "odd.pth.tar")
    with pytest.raises(utils.UserError, match="those of a resnet18, not of a resnet50"):
        load(path, "--arch=resnet50")


def test_settings_that_are_not_ours_are_not_taken_for_ours(tmp_path: Path) -> None:
    content = published(1, "resnet18")[0]
    for config in ({"crop": "random", "mean": 3}, {"lr": 1}, {"crop": 32, "mean": [0.5]}):
        torch.save(content | {"config": config}, tmp_path / "odd.pth.tar")
        assert load(tmp_path / "odd.pth.tar").crop == 224
        assert (
            run(
                "export",
                tmp_path / "odd.pth.tar",
                tmp_path / "out.pth",
                "--format=timm",
                "--overwrite",
            ).returncode
            == 0
        )
    utils.save_checkpoint(tmp_path / "odd.pth.tar", content | {"images": "many"})
    assert one_line(
        run(
            "test", f"--pretrained={tmp_path}/odd.pth.tar", "--dataset_root=shapes", "--device=cpu"
        ),
        "its images cannot be what they are",
    )


def test_a_foreign_file_is_evaluated(tmp_path: Path) -> None:
    class_folders(tmp_path / "data", seed=0)
    torch.save(published(2, "resnet18")[0], tmp_path / "moco_v2.pth.tar")
    done = run(
        "test",
        f"--pretrained={tmp_path}/moco_v2.pth.tar",
        f"--dataset_root={tmp_path}/data",
        f"--encoder_output_root={tmp_path}/output",
        "--crop=32",
        "--linear_epochs=2",
        "--trials=1",
        "--linear_lrs",
        "0.1",
        "--num_workers=0",
        "--device=cpu",
        "--knn_k=5",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "MoCo v2 checkpoint: resnet18, MLP head of width 128; it does not say its settings: crop 32 px"
        in done.stdout
    )
    assert (tmp_path / "output" / "eval" / "moco_v2" / "result.json").exists()


# -------------------------------------------------------------------------------------------------- what others look for in ours


def our_checkpoint(folder: Path, arch: str = "resnet18") -> tuple[Path, torch.nn.Module]:
    """A checkpoint of ours with statistics as if trained, and its backbone."""
    moco = model.MoCo(arch, 8, 16)
    trained_looking(moco.encoder_q)
    state = {f"module.{name}": value for name, value in moco.state_dict().items()}
    path = folder / "last.pth.tar"
    utils.save_checkpoint(
        path,
        {
            "epoch": 1,
            "step": 10,
            "arch": arch,
            "state_dict": state,
            "config": {"crop": 64, "arch": arch},
        },
    )
    return path, model.backbone(moco.encoder_q)


def test_the_reference_s_linear_evaluation_takes_ours(tmp_path: Path) -> None:
    """What its script does: keep `module.encoder_q.*` but the head, load it non-strictly, and ask that only the classifier is missing."""
    path, ours = our_checkpoint(tmp_path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    prefix = "module.encoder_q"
    state = {
        key[len(prefix) + 1 :]: value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(prefix) and not key.startswith(f"{prefix}.fc")
    }
    network = torchvision.models.__dict__[checkpoint["arch"]]()
    message = network.load_state_dict(state, strict=False)
    assert set(message.missing_keys) == {"fc.weight", "fc.bias"} and not message.unexpected_keys
    network.fc = torch.nn.Identity()
    torch.testing.assert_close(features(network), features(ours), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["torchvision", "timm"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_exported_weights_load_strictly_and_agree(form: str, arch: str, tmp_path: Path) -> None:
    path, ours = our_checkpoint(tmp_path, arch)
    done = run("export", path, tmp_path / "out.pth", "--format", form)
    assert (
        done.returncode == 0
        and f"MoCo v1 checkpoint: {arch}, linear head of width 8" in done.stdout
    ), done.stderr
    scope = {"torch": torch, "timm": timm, "torchvision": torchvision}
    exec(
        "\n".join(
            line
            for line in done.stdout.splitlines()
            if "encoder" in line and "=" in line or "load_state_dict" in line
        ).replace("         ", ""),
        scope,
    )  # the lines it prints
    assert (features(scope["encoder"]) - features(ours)).abs().max() < 1e-6 * features(
        ours
    ).abs().max()
    assert set(torch.load(tmp_path / "out.pth", weights_only=True)) == set(ours.state_dict())
    torch.testing.assert_close(
        features(load(tmp_path / "out.pth").encoder), features(ours), rtol=0, atol=0
    )  # and back


def test_an_exported_small_stem_loads_as_it_says(tmp_path: Path) -> None:
    utils.save_checkpoint(
        tmp_path / "small.pth.tar",
        {"epoch": 1, "arch": "resnet18", "state_dict": small(small_stem=True)},
    )
    done = run("export", tmp_path / "small.pth.tar", tmp_path / "out.pth", "--format=timm")
    scope = {"torch": torch, "timm": timm}
    exec(
        "\n".join(
            line.strip() for line in done.stdout.splitlines() if line.strip().startswith("encoder")
        ),
        scope,
    )
    ours = load(tmp_path / "small.pth.tar").encoder
    torch.testing.assert_close(features(scope["encoder"]), features(ours), rtol=1e-5, atol=1e-6)
    assert one_line(
        run("export", tmp_path / "small.pth.tar", tmp_path / "out.pkl", "--format=detectron2"),
        "small stem",
    )


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_detectron2_s_names(arch: str, tmp_path: Path) -> None:
    """Its ResNet's parameters: stem.conv1, res2.0.conv1 ... res5, norms within convolutions, shortcuts; and nothing is lost or mixed up."""
    path, ours = our_checkpoint(tmp_path, arch)
    assert run("export", path, tmp_path / "R.pkl", "--format=detectron2").returncode == 0
    content = pickle.loads((tmp_path / "R.pkl").read_bytes())
    assert content["matching_heuristics"] is True
    names = set(content["model"])
    depths, convs = ([2, 2, 2, 2], 2) if arch == "resnet18" else ([3, 4, 6, 3], 3)
    where = ["stem.conv1"] + [
        f"res{stage}.{block}.conv{i}"
        for stage, depth in enumerate(depths, 2)
        for block in range(depth)
        for i in range(1, convs + 1)
    ]
    where += [
        f"res{stage}.0.shortcut" for stage in ((3, 4, 5) if arch == "resnet18" else (2, 3, 4, 5))
    ]
    printed = run("export", path, tmp_path / "R.pkl", "--format=detectron2", "--overwrite").stdout
    assert (
        f"DEPTH {arch[6:]} " in printed
        and ("RES2_OUT_CHANNELS 64" in printed) == (arch == "resnet18")
        and "PIXEL_MEAN [123.675, 116.28, 103.53]" in printed
    )
    assert names == {
        f"{conv}.{end}"
        for conv in where
        for end in ("weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    }
    state = ours.state_dict()
    assert torch.equal(
        torch.from_numpy(content["model"]["res4.0.shortcut.norm.running_var"]),
        state["layer3.0.downsample.1.running_var"],
    )
    assert torch.equal(
        torch.from_numpy(content["model"]["res3.1.conv2.norm.bias"]), state["layer2.1.bn2.bias"]
    )
    assert torch.equal(
        torch.from_numpy(content["model"]["stem.conv1.norm.weight"]), state["bn1.weight"]
    )


def test_what_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    path, _ = our_checkpoint(tmp_path)
    (tmp_path / "there.pth").write_text("mine")
    assert (
        one_line(run("export", path, tmp_path / "there.pth", "--format=timm"), "is there already")
        and (tmp_path / "there.pth").read_text() == "mine"
    )
    assert one_line(run("export", path, tmp_path / "out.pth", "--format=onnx"), "onnx")
    assert one_line(
        run("export", tmp_path / "none.pth", tmp_path / "out.pth", "--format=timm"), "none.pth"
    )
    assert one_line(
        run("export", path, tmp_path / "there.pth" / "below", "--format=timm"), "cannot be written"
    )
    torch.save({"head.weight": torch.zeros(3)}, tmp_path / "other.pth")
    assert one_line(
        run("export", tmp_path / "other.pth", tmp_path / "out.pth", "--format=timm"), "head.weight"
    )
    assert not re.search("out", " ".join(p.name for p in tmp_path.iterdir()))
