"""Exported encoders in torchvision, timm and Detectron2's format, and what others find in ours."""

import os
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from scripts import Done, run
from weight_files import features, our_checkpoint, published, small_state

import encoders


def one_line(done: Done, words: str) -> bool:
    """Whether a script stopped with one line that holds these words."""
    lines = done.stderr.strip().splitlines()
    return done.returncode == 2 and len(lines) == 1 and words in lines[0]


def follow(stdout: str) -> torch.nn.Module:
    """The encoder that the lines which export.py prints load."""
    scope = {"torch": torch, "timm": timm, "torchvision": torchvision}
    exec("\n".join(line.strip() for line in stdout.splitlines()[2:]), scope)
    return scope["encoder"]


def test_the_reference_s_linear_evaluation_takes_ours(tmp_path: Path) -> None:
    """Its script keeps encoder_q but the head, and allows only the classifier to be missing."""
    ours = our_checkpoint(tmp_path / "last.pth.tar")
    checkpoint = torch.load(tmp_path / "last.pth.tar", map_location="cpu", weights_only=True)
    prefix, state = "module.encoder_q", {}
    for name, value in checkpoint["state_dict"].items():
        if name.startswith(prefix) and not name.startswith(prefix + ".fc"):
            state[name[len(prefix) + 1 :]] = value
    network = torchvision.models.__dict__[checkpoint["arch"]]()
    message = network.load_state_dict(state, strict=False)
    assert set(message.missing_keys) == {"fc.weight", "fc.bias"} and not message.unexpected_keys
    plain = encoders.remove_head(network)
    torch.testing.assert_close(features(plain), features(ours), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["torchvision", "timm"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_exported_weights_load_strictly_and_agree(form: str, arch: str, tmp_path: Path) -> None:
    path, out = tmp_path / "last.pth.tar", tmp_path / "out.pth"
    ours = our_checkpoint(path, arch)
    done = run("export", path, out, "--format", form)
    assert done.returncode == 0, done.stderr
    assert f"MoCo v1 checkpoint: {arch}, linear head of width 8" in done.stdout
    assert "over [0.229, 0.224, 0.225]; trained on views of 64 px" in done.stdout
    expected = features(ours)
    assert (features(follow(done.stdout)) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert set(torch.load(out, weights_only=True)) == set(ours.state_dict())
    back = encoders.load(out)
    torch.testing.assert_close(features(back.encoder), expected, rtol=0, atol=0)


def test_an_exported_small_stem_loads_as_it_says(tmp_path: Path) -> None:
    path = tmp_path / "small.pth.tar"
    torch.save({"arch": "resnet18", "state_dict": small_state(small_stem=True)}, path)
    ours = encoders.load(path).encoder
    for form in ("torchvision", "timm"):
        done = run("export", path, tmp_path / f"{form}.pth", f"--format={form}")
        loaded = follow(done.stdout)
        torch.testing.assert_close(features(loaded), features(ours), rtol=1e-5, atol=1e-6)
        assert "trained on views" not in done.stdout, "the file does not say it"
    assert one_line(run("export", path, tmp_path / "out.pkl", "--format=detectron2"), "small stem")
    assert not (tmp_path / "out.pkl").exists()


def test_a_foreign_checkpoint_is_exported(tmp_path: Path) -> None:
    content, network = published(2, "resnet18")
    torch.save(content | {"config": {"crop": "random", "mean": 3}}, tmp_path / "moco.pth.tar")
    done = run("export", tmp_path / "moco.pth.tar", tmp_path / "out.pth", "--format=timm")
    assert done.returncode == 0, done.stderr
    loaded = follow(done.stdout)
    torch.testing.assert_close(features(loaded), features(network), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arch, depths, convolutions", [("resnet18", [2, 2, 2, 2], 2), ("resnet50", [3, 4, 6, 3], 3)]
)
def test_detectron2_s_names(arch: str, depths: list, convolutions: int, tmp_path: Path) -> None:
    """Its ResNet has stem.conv1, res2.0.conv1 to res5, norms within convolutions, shortcuts."""
    path, out = tmp_path / "last.pth.tar", tmp_path / "R.pkl"
    ours = our_checkpoint(path, arch)
    done = run("export", path, out, "--format=detectron2")
    assert done.returncode == 0, done.stderr
    content = pickle.loads(out.read_bytes())
    assert content["matching_heuristics"] is True
    where = ["stem.conv1"]
    for stage, depth in enumerate(depths, start=2):
        for block in range(depth):
            where += [f"res{stage}.{block}.conv{i + 1}" for i in range(convolutions)]
        if stage > 2 or arch == "resnet50":
            where.append(f"res{stage}.0.shortcut")
    ends = ["weight", *(f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var"))]
    assert set(content["model"]) == {f"{place}.{end}" for place in where for end in ends}
    same = {
        "res4.0.shortcut.norm.running_var": "layer3.0.downsample.1.running_var",
        "res3.1.conv2.norm.bias": "layer2.1.bn2.bias",
        "stem.conv1.norm.weight": "bn1.weight",
        "res5.0.conv1.weight": "layer4.0.conv1.weight",
    }
    for theirs, name in same.items():
        assert torch.equal(torch.from_numpy(content["model"][theirs]), ours.state_dict()[name])
    assert f"DEPTH {arch[6:]} " in done.stdout
    assert ("RES2_OUT_CHANNELS 64" in done.stdout) == (arch == "resnet18")
    assert "PIXEL_MEAN [123.675, 116.28, 103.53]" in done.stdout


@pytest.mark.parametrize(
    "arch, words",
    [
        ("resnext50_32x4d", "DEPTH 50 .*NUM_GROUPS 32  MODEL.RESNETS.WIDTH_PER_GROUP 4"),
        ("wide_resnet50_2", "DEPTH 50 .*WIDTH_PER_GROUP 128"),
    ],
)
def test_detectron2_s_settings_of_other_resnets(arch: str, words: str, tmp_path: Path) -> None:
    torch.save(encoders.build_encoder(arch).state_dict(), tmp_path / "weights.pth")
    done = run("export", tmp_path / "weights.pth", tmp_path / "R.pkl", "--format=detectron2")
    assert done.returncode == 0, done.stderr
    assert re.search(words, done.stdout)


def test_what_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    path, there, out = tmp_path / "last.pth.tar", tmp_path / "there.pth", tmp_path / "out.pth"
    our_checkpoint(path)
    there.write_text("mine")
    assert one_line(run("export", path, there, "--format=timm"), "is there already")
    assert there.read_text() == "mine"
    os.mkfifo(tmp_path / "pipe")
    done = run("export", path, tmp_path / "pipe", "--format=timm", "--overwrite")
    assert one_line(done, "it is a pipe") and (tmp_path / "pipe").is_fifo()
    (tmp_path / "pipe").unlink()
    assert one_line(run("export", path, out, "--format=onnx"), "onnx")
    assert one_line(run("export", path, out), "--format")
    assert one_line(run("export", tmp_path / "none.pth", out, "--format=timm"), "none.pth")
    assert one_line(run("export", path, there / "below", "--format=timm"), "cannot be written")
    torch.save({"head.weight": torch.zeros(3)}, tmp_path / "other.pth")
    assert one_line(run("export", tmp_path / "other.pth", out, "--format=timm"), "head.weight")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pth.tar", "other.pth", "there.pth"]
    assert run("export", path, there, "--format=timm", "--overwrite").returncode == 0
    assert there.stat().st_size > 1e6
