"""--init: a run that starts from the weights of a file."""

import json
from pathlib import Path

import pytest
import timm
import torch
from miniature import write_folders
from scripts import assert_one_line_error, run

import encoders
from run import checkpoints

TRAIN = ["--arch=timm:test_resnet", "--crop=32", "--resize=32", "--num_workers=0", "--device=cpu"]
TRAIN += ["--feature_dim=8", "--num_keys=16", "--batch_size=8", "--bn_groups=2", "--max_epoch=1"]
TEST = ["--linear_epochs=1", "--linear_lrs=0.1", "--knn_k=3", "--trials=1"]
TEST += ["--num_workers=0", "--device=cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and a run whose weights others start from."""
    root = tmp_path_factory.mktemp("init")
    write_folders(root / "data", classes=2, train=12, test=6, size=32)
    done = train(root, "first", "--seed=5")
    assert done.returncode == 0, done.stderr
    return root


def train(place: Path, version: str, *flags: str):
    where = [f"--dataset_root={place}/data", f"--output_root={place}", f"--exp_version={version}"]
    return run("train", *where, *TRAIN, *flags)


def file_of(place: Path, version: str, name: str = "last") -> Path:
    return place / "IMAGENET-64" / version / "checkpoints" / f"{name}.pth.tar"


@pytest.mark.parametrize("width, head", [(8, "and its head"), (6, "but not its head")])
def test_both_encoders_start_from_the_file(place: Path, width: int, head: str) -> None:
    first, version = file_of(place, "first"), f"from-{width}"
    flags = [f"--init={first}", f"--feature_dim={width}", "--lr=0", "--momentum=1"]
    done = train(place, version, *flags)
    assert done.returncode == 0, done.stderr
    assert f"init: {first}, MoCo v1 checkpoint: timm:test_resnet" in done.stdout
    assert head in done.stdout
    given = checkpoints.load(first)["state_dict"]
    start = checkpoints.load(file_of(place, version, "epoch_0000"))["state_dict"]
    for name, value in given.items():
        if "encoder_q" in name and (width == 8 or ".fc." not in name):
            assert torch.equal(start[name], value), name
            assert torch.equal(start[name.replace("encoder_q", "encoder_k")], value), name


def test_what_a_run_started_from_is_measured_when_the_file_is_gone(place: Path) -> None:
    file = file_of(place, "first").rename(place / "gone.pth.tar")
    done = train(place, "second", f"--init={file}", "--max_epoch=2", "--knn_every=2", "--cosine")
    assert done.returncode == 0, done.stderr
    expected = encoders.load(file).encoder
    file.rename(file_of(place, "first"))
    found = encoders.load(file_of(place, "second", "epoch_0000")).encoder
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(found.eval()(x), expected.eval()(x))
    where = [f"--dataset_root={place}/data", f"--encoder_output_root={place}", *TEST]
    where += ["--encoder_exp_version=second"]
    random = run("test", *where, "--encoder=random")
    assert random.returncode == 0, random.stderr
    assert f"the run started from {file}, not from random weights" in random.stdout
    done = run("test", *where)
    assert done.returncode == 0 and "untrained" in done.stdout
    result = json.loads((place / "IMAGENET-64/second/eval/random/result.json").read_text())
    assert result["first_weights"]["init"] == str(file)
    # the run's own checkpoint wins
    done = train(place, "second", f"--init={file}", "--max_epoch=2", "--cosine", "--resume")
    assert done.returncode == 0 and "init:" not in done.stdout, done.stderr
    done = train(place, "second", "--max_epoch=2", "--cosine", "--resume")
    assert_one_line_error(done, "init", "go back to them")


@pytest.mark.parametrize(
    "prefix, other",
    [
        ("", None),
        ("module.", None),
        ("backbone.", "projector."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("student.backbone.", "teacher.backbone."),
    ],
)
@pytest.mark.parametrize("arch", ["timm:test_resnet", "resnet18"])
def test_weights_of_other_tools_are_read(
    arch: str, prefix: str, other: str | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = encoders.remove_head(encoders.build_encoder(arch))
    state = {prefix + name: value for name, value in network.state_dict().items()}
    if other is not None:
        state |= {other + name: torch.zeros_like(v) for name, v in network.state_dict().items()}
        state |= {"projector.0.weight": torch.zeros(3, 3)}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    if other == "projector.":
        with pytest.raises(encoders.UserError, match="several encoders"):
            encoders.load(tmp_path / "w.pth", arch)
        state = {name: value for name, value in state.items() if not name.startswith(other)}
        torch.save(state, tmp_path / "w.pth")
    loaded = encoders.load(tmp_path / "w.pth", arch)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.encoder.eval()(x), network.eval()(x))


def test_a_file_that_does_not_fit_is_one_line_before_any_work(place: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    for flags, words in (
        ([f"--init={tmp_path}/none.pth"], ["cannot be read"]),
        ([f"--init={tmp_path}/vit.pth"], ["cannot be used"]),
        ([f"--init={file_of(place, 'first')}", "--arch=resnet18"], ["not of a resnet18"]),
    ):
        done = train(place, "odd", *flags)
        assert_one_line_error(done, *words)
        assert not (place / "IMAGENET-64" / "odd").exists()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("arch", ["resnet18", "timm:test_resnet"])
def test_weights_fit_other_channels(arch: str, channels: int) -> None:
    """An image of equal channels gives what it gave; the other weights are the same ones."""
    encoder = encoders.build_encoder(arch, 8).double().eval()
    other = encoders.build_encoder(arch, 8, channels=channels).double().eval()
    fitted = encoders.fit_channels(encoder.state_dict(), channels)
    other.load_state_dict(fitted)
    grey = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    outputs = encoder(grey.expand(-1, 3, -1, -1)), other(grey.expand(-1, channels, -1, -1))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)
    same = encoder.state_dict()
    changed = [name for name in same if not torch.equal(fitted[name], same[name])]
    assert len(changed) == (channels != 3)
