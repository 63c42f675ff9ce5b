"""Encoders of timm: built, trained, read back, and given to timm again."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from launches import assert_same_curve, on_processes
from miniature import write_folders
from scripts import assert_one_line_error, run

import encoders
import model
import utils
from run import checkpoints

MODELS = ["test_convnext", "test_vit", "test_efficientnet", "test_resnet"]
FLAGS = ["--crop=32", "--resize=32", "--num_workers=0", "--device=cpu"]
TRAIN = [*FLAGS, "--feature_dim=8", "--num_keys=16", "--batch_size=8", "--bn_groups=2"]
TRAIN += ["--shuffle_bn", "--max_epoch=2", "--log_every=1", "--lr=0.003", "--temperature=0.2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("timm")
    write_folders(root, classes=2, train=12, test=6, size=32)
    return root


def timm_encoder(name: str) -> nn.Module:
    size = {"img_size": 32} if encoders.has_fixed_size(f"timm:{name}") else {}
    return timm.create_model(name, num_classes=0, **size)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_of_one_and_of_two_processes_and_its_encoder_in_timm(
    name: str, data: Path, tmp_path: Path
) -> None:
    flags = [f"--dataset_root={data}", f"--arch=timm:{name}", *TRAIN, "--mlp", "--precision=fp64"]
    flags += ["--knn_every=2", f"--knn_root={data}"]
    one, two = (tmp_path / part / "IMAGENET-64" / "v1" for part in ("one", "two"))
    done = run("train", *flags, f"--output_root={tmp_path}/one")
    assert done.returncode == 0, done.stderr
    on_processes(2, [["train", *flags, f"--output_root={tmp_path}/two"]])
    assert_same_curve(one, two, 1e-9)
    without_norms = name in ("test_convnext", "test_vit")
    assert ("have no effect" in done.stderr) == without_norms

    # resumed, evaluated, exported
    done = run("train", *flags, f"--output_root={tmp_path}/one", "--resume", "--max_epoch=3")
    assert done.returncode == 0, done.stderr
    test = [f"--dataset_root={data}", f"--encoder_output_root={tmp_path}/one", *FLAGS[2:]]
    test += ["--linear_epochs=1", "--linear_lrs=0.1", "--knn_k=3", "--trials=1"]
    for more in ([], ["--encoder=random"]):
        done = run("test", *test, *more)
        assert done.returncode == 0, done.stderr
    file = one / "checkpoints" / "last.pth.tar"
    done = run("export", str(file), str(tmp_path / "out.pth"), "--format=timm")
    assert done.returncode == 0, done.stderr
    encoder = timm_encoder(name).double()
    encoder.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True))
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    ours = encoders.load(file).encoder.double()
    torch.testing.assert_close(encoder.eval()(x), ours.eval()(x), rtol=1e-6, atol=1e-6)
    assert_one_line_error(
        run("export", str(file), str(tmp_path / "o.pth"), "--format=torchvision"), "--format timm"
    )


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_every_batch_norm_is_grouped(name: str) -> None:
    """In train mode each group gives what the plain model gives for it alone."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=8).double().train()
    grouped = model.MoCo(f"timm:{name}", 8, 16, bn_groups=2).encoder_q.double().train()
    grouped.load_state_dict(plain.state_dict())
    x = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    parts = [plain(part) for part in x.chunk(2)]
    torch.testing.assert_close(grouped(x), torch.cat(parts), rtol=1e-10, atol=1e-12)


def test_moco_takes_a_module_or_a_function_that_makes_one() -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 8, 8)
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(180, 4)
    )
    for encoder in (make, make()):
        moco = model.MoCo(encoder, feature_dim=4, num_keys=8, bn_groups=2)
        assert isinstance(moco.encoder_q[1], model.GroupBatchNorm2d)
        logits, labels, keys = moco(images, images)
        assert logits.shape == (4, 9) and keys.shape == (4, 4) and not labels.any()
        model.contrastive_loss(logits, labels).backward()


def test_weights_of_timm_are_evaluated_at_their_size(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=1000)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    loaded = encoders.load(tmp_path / "vit.pth", "timm:test_vit")
    assert (loaded.feature_dim, loaded.mlp, loaded.settings) == (1000, False, None)
    x = torch.rand(2, 3, 160, 160)
    network.reset_classifier(0)
    torch.testing.assert_close(loaded.encoder.eval()(x), network.eval()(x))
    flags = [f"--pretrained={tmp_path}/vit.pth", "--arch=timm:test_vit", f"--dataset_root={data}"]
    flags += [f"--encoder_output_root={tmp_path}", "--linear_epochs=1", "--linear_lrs=0.1"]
    flags += ["--num_workers=0", "--device=cpu", "--knn_k=3", "--trials=1"]
    done = run("test", *flags)
    assert done.returncode == 0 and "crop 160" in done.stdout, done.stderr
    assert_one_line_error(run("test", *flags, "--crop=64"), "takes no other size")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--arch=timm:test_vitt"], ["did you mean timm:test_vit"]),
        (["--arch=timm:test_vit", "--small_stem"], ["--small_stem is for torchvision's"]),
        (["--arch=timm:test_vit", "--crop=24"], ["images of 24 px"]),
        (["--arch=vgg16"], ["timm:NAME"]),
    ],
)
def test_what_timm_cannot_build_is_one_line(
    flags: list[str], words: list[str], data: Path, tmp_path: Path
) -> None:
    done = run("train", f"--dataset_root={data}", f"--output_root={tmp_path}/o", *TRAIN, *flags)
    assert_one_line_error(done, *words)
    assert not (tmp_path / "o").exists()


def test_adamw_with_warmup_is_resumed_exactly(data: Path, tmp_path: Path) -> None:
    flags = [f"--dataset_root={data}", "--arch=timm:test_vit", *TRAIN, "--optimizer=adamw"]
    flags += ["--warmup_epochs=1", "--cosine", "--weight_decay=0.1", "--save_weight_epoch=1"]
    flags += ["--precision=fp32"]
    done = run("train", *flags, f"--output_root={tmp_path}/whole")
    assert done.returncode == 0, done.stderr
    whole, part = (tmp_path / name / "IMAGENET-64" / "v1" for name in ("whole", "part"))
    log = utils.read_csv(whole / "log.csv")
    assert log["lr"][:3] == pytest.approx([0.0, 0.001, 0.002])  # 3 steps an epoch
    assert log["lr"][3] == pytest.approx(0.003)
    (part / "checkpoints").mkdir(parents=True)
    checkpoints.save(
        part / "checkpoints" / "last.pth.tar",
        checkpoints.load(whole / "checkpoints" / "epoch_0001.pth.tar"),
    )
    done = run("train", *flags, f"--output_root={tmp_path}/part", "--resume")
    assert done.returncode == 0, done.stderr
    states = [checkpoints.load(f / "checkpoints" / "last.pth.tar") for f in (whole, part)]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    decays = [group["weight_decay"] for group in states[0]["optimizer"]["param_groups"]]
    assert decays == [0.1, 0.0]
