"""Encoders: the weights that a seed gives, and what any file of weights is found to be."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torchvision
from miniature import write_folders
from scripts import run
from weight_files import features, look_trained, our_checkpoint, published, small_state

import config
import encoders
from run import checkpoints
from run.convolution import SmallConv2d
from utils import UserError

Q = "module.encoder_q."


def checksum(encoder: nn.Module) -> float:
    """A number that changes with every weight, and with the order of the weights."""
    total = 0.0
    for place, value in enumerate(encoder.state_dict().values(), 1):
        ramp = torch.linspace(1, 2, value.numel(), dtype=torch.float64)
        total += place * float(value.double().flatten() @ ramp)
    return total


# ------------------------------------------------------------------------------- untrained


@pytest.mark.parametrize(
    "arch, mlp, small_stem, weights, next_number",
    [  # by the code before encoders.py, of commit edc0f1c
        ("resnet18", False, False, 1198989.418350675, 0.41053903102874756),
        ("resnet18", True, False, 1198602.131900221, 0.014697015285491943),
        ("resnet18", False, True, 1198997.4024594543, 0.5123815536499023),
        ("resnet18", True, True, 1198655.3279625326, 0.720636248588562),
        ("resnet50", True, False, 17354794.502762888, 0.09756016731262207),
        ("resnext50_32x4d", False, False, 22183169.840334576, 0.568233847618103),
    ],
)
def test_a_seed_gives_the_same_weights_as_ever(
    arch: str, mlp: bool, small_stem: bool, weights: float, next_number: float
):
    torch.manual_seed(3)
    encoder = encoders.build_encoder(arch, 8, mlp=mlp, small_stem=small_stem)
    assert torch.rand(1).item() == next_number, "it drew other random numbers"
    assert checksum(encoder) == pytest.approx(weights, rel=1e-9)


@pytest.mark.parametrize(
    "mlp, small_stem, weights", [(True, True, 1200034.840019597), (False, False, 1198671.980040326)]
)
def test_the_encoder_that_a_run_starts_from(mlp: bool, small_stem: bool, weights: float):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    values = {"arch": "resnet18", "seed": 5, "feature_dim": 8, "mlp": mlp, "crop": 32}
    settings = config.from_values(config.TrainSettings, {**values, "small_stem": small_stem})
    encoder = encoders.build_untrained(settings)
    assert checksum(encoder) == pytest.approx(weights, rel=1e-9)
    assert torch.equal(torch.rand(1), expected), "it must leave the global generator alone"


def test_names_and_shapes_are_torchvision_s():
    ours = encoders.build_encoder("resnet50", 8).state_dict()
    plain = torchvision.models.get_model("resnet50", num_classes=8).state_dict()
    assert [(n, v.shape) for n, v in ours.items()] == [(n, v.shape) for n, v in plain.items()]


@pytest.mark.parametrize("arch, count", [("resnet18", 20), ("timm:test_efficientnet", 17)])
def test_every_convolution_is_replaced(arch: str, count: int):
    encoder = encoders.build_encoder(arch, 8, small_stem=arch == "resnet18")
    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == count
    assert all(type(c) is SmallConv2d and c.weight.is_leaf for c in convolutions)
    assert arch != "resnet18" or isinstance(encoder.maxpool, nn.Identity)


@pytest.mark.parametrize(
    "size, k, s, p",
    [
        *[(1, 3, 1, 1), (2, 3, 2, 1), (1, 1, 1, 0), (3, 3, 1, 0), (2, 3, 1, 1)],
        *[(4, 3, 2, 1), (3, 3, 2, 1), (2, 7, 2, 3), (1, 7, 2, 3)],
        *[(2, 3, 1, 2), (4, 1, 1, 0), (8, 1, 2, 0), (2, 1, 1, 1), (7, 3, 4, 0), (5, 3, 4, 1)],
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_of_a_few_pixels_is_the_convolution(
    size: int, k: int, s: int, p: int, groups: int
):
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, k, s, p, groups=groups).double()
    ours = SmallConv2d(4, 6, k, s, p, groups=groups).double()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(5, 4, size, size, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(inputs[0]), plain(inputs[1])]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("groups", [1, 2, 32])
@pytest.mark.parametrize("k, s", [(3, 2), (5, 2), (7, 2), (3, 1)])
def test_gradients_in_bfloat16_are_those_of_the_weights(k: int, s: int, groups: int):
    """Of one-pixel inputs, too, whatever the memory held before."""
    torch.manual_seed(0)
    conv = SmallConv2d(32, 32, k, s, k // 2, groups=groups, bias=False)
    conv.to(memory_format=torch.channels_last)
    x = torch.randn(125, 32, 1, 1, dtype=torch.bfloat16)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        rubbish = [torch.full((size,), math.nan) for size in (10**3, 10**4, 10**5, 10**6)]
        del rubbish
        conv.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            conv(x.to(dtype)).float().square().sum().backward()
        gradients.append(conv.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "size, k, s, p",
    [((4, 2), (3, 1), (2, 1), (1, 0)), ((1, 3), (3, 3), (1, 2), (1, 0)), ((2, 5), 3, (2, 4), 1)],
)
def test_sides_are_not_mixed_up(size: tuple, k: int | tuple, s: tuple, p: int | tuple, groups: int):
    ours = SmallConv2d(4, 6, k, s, p, groups=groups).double()
    x = torch.randn(5, 4, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), nn.Conv2d.forward(ours, x))


def test_an_image_smaller_than_the_kernel_is_an_error():
    with pytest.raises(RuntimeError, match="greater than actual input size"):
        SmallConv2d(4, 6, 3)(torch.zeros(1, 4, 1, 1))


def test_a_replacement_shares_the_parameters():
    plain = nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=True)
    ours = SmallConv2d.replacing(plain)
    assert ours.weight is plain.weight and ours.bias is plain.bias
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(ours(x), plain(x))


def test_mlp_head_is_linear_relu_linear():
    head = encoders.build_encoder("resnet18", 16, mlp=True).fc
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert head[0].weight.shape == (512, 512) and head[2].weight.shape == (16, 512)


def test_unknown_architecture_is_refused():
    with pytest.raises(UserError, match="vgg16"):
        encoders.build_encoder("vgg16")


@pytest.mark.parametrize("arch, width", [("resnet18", 512), ("wide_resnet50_2", 2048)])
def test_without_head_an_encoder_gives_pooled_features(arch: str, width: int):
    encoder = encoders.remove_head(encoders.build_encoder(arch)).eval()
    assert encoder(torch.rand(1, 3, 32, 32)).shape == (1, width)


# ----------------------------------------------------------------------------- from a file


@pytest.mark.parametrize(
    "version, arch, zipped", [(1, "resnet18", False), (2, "resnet50", True)]
)  # files of 2019 are of torch.save's older format
def test_published_files_are_read(version: int, arch: str, zipped: bool, tmp_path: Path):
    content, network = published(version, arch)
    torch.save(content, tmp_path / "moco.pth.tar", _use_new_zipfile_serialization=zipped)
    loaded = encoders.load(tmp_path / "moco.pth.tar")
    torch.testing.assert_close(features(loaded.encoder), features(network), rtol=1e-9, atol=1e-9)
    head = "MLP" if version == 2 else "linear"
    kind = f"MoCo v{version} checkpoint: {arch}, {head} head of width 128"
    assert loaded.description == kind
    assert (loaded.arch, loaded.feature_dim, loaded.mlp) == (arch, 128, version == 2)
    assert loaded.settings is None and loaded.checkpoint["epoch"] == 200


@pytest.mark.parametrize(
    "arch, left_out, head",
    [
        ("resnet34", (), "linear head of width 1000"),
        ("resnext50_32x4d", ("fc.", "num_batches_tracked"), "no head"),
    ],
)
def test_torchvision_weights_are_read(arch: str, left_out: tuple, head: str, tmp_path: Path):
    network = look_trained(torchvision.models.get_model(arch, weights=None))
    state = network.state_dict()
    for name in list(state):
        if any(word in name for word in left_out):
            del state[name]
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=not left_out)
    loaded = encoders.load(tmp_path / "w.pth")
    plain = encoders.remove_head(network)
    torch.testing.assert_close(features(loaded.encoder), features(plain), rtol=1e-9, atol=1e-9)
    assert loaded.description == f"ResNet weights: {arch}, {head}"
    assert loaded.feature_dim == (None if left_out else 1000)


def write(path: Path, state: dict, **content) -> Path:
    torch.save({"state_dict": state, **content}, path)
    return path


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("stem", [False, True])
def test_stem_and_head_are_known_by_their_shapes(mlp: bool, stem: bool, tmp_path: Path):
    state = small_state(mlp=mlp, small_stem=stem)
    loaded = encoders.load(write(tmp_path / "m.pth", state))
    known = (loaded.arch, loaded.feature_dim, loaded.mlp, loaded.small_stem)
    assert known == ("resnet18", 8, mlp, stem)
    assert ("small stem" in loaded.description) == stem
    assert loaded.encoder(torch.rand(2, 3, 32, 32)).shape == (2, 512)
    assert isinstance(loaded.encoder.maxpool, nn.Identity) == stem


def test_every_architecture_is_told_from_the_others():
    assert len(encoders.ARCHS) >= 10 and "resnet50" in encoders.ARCHS
    for arch in encoders.ARCHS:
        same = [a for a in encoders.ARCHS if not encoders.shapes_of(a) ^ encoders.shapes_of(arch)]
        assert same == [arch]


@pytest.mark.parametrize(
    "left_out, new, words",
    [
        (["layer3.0.conv1.weight"], {}, r"resnet18: Missing .*layer3.0.conv1.weight"),
        ([], {"layer9.weight": torch.zeros(1)}, "Unexpected .*layer9.weight"),
        ([], {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, "layer1.0.conv1.weight"),
        ([], {"conv1.weight": torch.zeros(64, 3, 5, 5)}, r"conv1.weight.*\[64, 3, 5, 5\]"),
        (["fc.weight", "fc.bias"], {}, "Missing .*fc.weight"),
        ([], {"fc.weight": torch.zeros(8, 99)}, r"fc.weight.*\[8, 99\]"),
        (["fc.bias"], {}, "fc.bias"),
        ([], {"bn1.weight": 3}, "Missing .*bn1.weight"),
        ([], {"layer1.0.extra.num_batches_tracked": torch.tensor(1)}, "Unexpected .*extra"),
        ([], {"fc.weight": torch.tensor(1.0)}, "fc.weight"),
    ],
)
def test_a_partial_match_is_refused(left_out: list, new: dict, words: str, tmp_path: Path):
    state = small_state() | {Q + name: value for name, value in new.items()}
    for name in left_out:
        del state[Q + name]
    with pytest.raises(UserError, match=words) as refused:
        encoders.load(write(tmp_path / "m.pth", state))
    assert "m.pth' cannot be used: its weights are not those of a" in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    "state, first",
    [
        ({}, "none"),
        ({"head.weight": torch.zeros(3)}, "head.weight"),
        ({Q + "conv1.weight": 3}, Q + "conv1.weight"),
        ({3: 4}, "3"),
    ],
)
def test_what_is_no_resnet_is_refused(state: dict, first: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"neither MoCo's weights .* its first is '?{first}"):
        encoders.load(write(tmp_path / "m.pth", state))


def test_settings_of_ours_are_read_and_must_agree_with_the_weights(tmp_path: Path):
    our_checkpoint(tmp_path / "last.pth.tar")
    loaded = encoders.load(tmp_path / "last.pth.tar", "resnet18")
    assert (loaded.settings.crop, loaded.settings.num_keys) == (64, 16)
    content = loaded.checkpoint
    odd = tmp_path / "odd.pth.tar"
    changes = {"feature_dim": 16, "mlp": True, "small_stem": True, "arch": "resnet34"}
    for name, value in changes.items():
        checkpoints.save(odd, content | {"config": content["config"] | {name: value}})
        with pytest.raises(UserError, match=f"its {name} is {value} by its settings"):
            encoders.load(odd)
    with pytest.raises(UserError, match="those of a resnet18, not of a resnet50"):
        encoders.load(tmp_path / "last.pth.tar", "resnet50")
    checkpoints.save(odd, content | {"config": content["config"] | {"batch_size": 0}})
    with pytest.raises(UserError, match="has settings that are not valid: --batch_size"):
        encoders.load(odd)


@pytest.mark.parametrize("other", [{"crop": "random"}, {"lr": 1}, {"crop": 32, "mean": [0.5]}])
def test_settings_that_are_not_ours_are_not_taken_for_ours(other: dict, tmp_path: Path):
    path = write(tmp_path / "odd.pth.tar", small_state(), config=other, epoch=3)
    assert encoders.load(path).settings is None


def test_a_foreign_file_is_evaluated(tmp_path: Path):
    write_folders(tmp_path / "data")
    torch.save(published(2, "resnet18")[0], tmp_path / "moco_v2.pth.tar")
    done = run(
        "test",
        f"--pretrained={tmp_path}/moco_v2.pth.tar",
        f"--dataset_root={tmp_path}/data",
        f"--encoder_output_root={tmp_path}/output",
        *["--crop=32", "--linear_epochs=2", "--trials=1", "--linear_lrs", "0.1"],
        *["--num_workers=0", "--device=cpu", "--knn_k=5"],
    )
    assert done.returncode == 0, done.stderr
    assert "MoCo v2 checkpoint: resnet18, MLP head of width 128" in done.stdout
    assert "crop 32 px" in done.stdout
    assert (tmp_path / "output" / "eval" / "moco_v2" / "result.json").exists()
