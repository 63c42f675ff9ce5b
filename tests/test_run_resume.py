"""What goes into a checkpoint, what it is compared with, and how it comes back."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import config
from config import TrainSettings
from model import MoCo
from parallel import OneDevice
from run import checkpoints, resume
from run.meters import Meter
from utils import UserError

IMAGES, STEPS_PER_EPOCH = 85, 5
QUEUE, PTR = "module.queue", "module.queue_ptr"


@pytest.fixture(scope="module")
def settings() -> TrainSettings:
    values = {"arch": "resnet18", "feature_dim": 8, "num_keys": 48, "batch_size": 16}
    return config.from_values(TrainSettings, values | {"max_epoch": 4, "bn_groups": 2})


Parts = tuple[MoCo, torch.optim.Optimizer, Meter]


def make_parts(seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    moco = MoCo("resnet18", 8, 48, bn_groups=2)
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), 0.03, 0.9, fused=True)
    return moco, optimizer, Meter(OneDevice(), torch.float32, batch_size=16, temperature=0.07)


def take_step(moco: MoCo, optimizer: torch.optim.Optimizer, meter: Meter) -> None:
    torch.manual_seed(1)
    logits, labels, keys = moco(torch.randn(16, 3, 16, 16), torch.randn(16, 3, 16, 16))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    moco.enqueue(keys)
    meter.add(loss, logits, len(keys))


def snapshot(settings: TrainSettings, parts: Parts, folder: Path, step: int = 7) -> dict[str, Any]:
    moco, optimizer, meter = parts
    return resume.snapshot(settings, step, moco.state_dict(), optimizer, meter, IMAGES, folder)


@pytest.fixture(scope="module")
def parts() -> Parts:
    parts = make_parts()
    take_step(*parts)
    return parts


@pytest.fixture
def content(settings: TrainSettings, parts: Parts, tmp_path: Path) -> dict[str, Any]:
    return snapshot(settings, parts, tmp_path)


def test_a_snapshot_has_the_names_that_others_read(content: dict, settings: TrainSettings) -> None:
    assert (content["epoch"], content["step"], content["arch"]) == (1, 7, "resnet18")
    names = set(content["state_dict"])
    assert {"module.queue", "module.queue_ptr", "module.encoder_k.fc.bias"} <= names
    assert content["config"] == dataclasses.asdict(settings) and content["images"] == IMAGES
    assert {"optimizer", "meter", "provenance"} <= set(content)


def test_a_restored_run_takes_the_same_steps(
    content: dict, parts: Parts, settings: TrainSettings, tmp_path: Path
) -> None:
    path, again = tmp_path / "last.pth.tar", make_parts(seed=5)
    content["optimizer"]["param_groups"][0] |= {"fused": False, "maximize": True}
    checkpoints.save(path, content)
    assert resume.restore(checkpoints.load(path), *again) == 7
    assert all(group["fused"] for group in again[1].param_groups), "a matter of the device"
    first = make_parts()
    take_step(*first)
    for run in (first, again):
        take_step(*run)
    ours, theirs = (snapshot(settings, run, tmp_path, step=8) for run in (again, first))
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    for i, state in theirs["optimizer"]["state"].items():
        momentum = ours["optimizer"]["state"][i]["momentum_buffer"]
        assert torch.equal(momentum, state["momentum_buffer"])
    assert torch.equal(ours["meter"]["sums"], theirs["meter"]["sums"])
    assert ours["meter"]["images"] == theirs["meter"]["images"] == 32


def buffer(content: dict, value: Any) -> None:
    """Another momentum buffer for the first convolution, (64, 3, 7, 7)."""
    content["optimizer"]["state"][0]["momentum_buffer"] = value


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["state_dict"].popitem(),
        lambda content: content["optimizer"].clear(),
        lambda content: content["meter"].clear(),
        lambda content: content["meter"].update(sums=3),
        lambda content: content.update(optimizer=[]),
        lambda content: buffer(content, torch.zeros(3)),
        lambda content: buffer(content, torch.zeros(())),
        lambda content: buffer(content, None),
        lambda content: buffer(content, "text"),
        lambda content: buffer(content, 3.0),
        lambda content: buffer(content, torch.zeros(64, 3, 7, 7).to_sparse()),
        lambda content: buffer(content, torch.full((64, 3, 7, 7), math.inf)),
        lambda content: buffer(content, torch.zeros(64, 3, 7, 7, dtype=torch.int64)),
        lambda content: content["optimizer"]["state"].pop(5),
        lambda content: content["optimizer"]["state"].update({5: {}}),
        lambda content: content["optimizer"]["state"].update({99: {}}),
        lambda content: content["optimizer"]["state"][5].update(exp_avg=torch.zeros(64)),
        lambda content: content["optimizer"]["param_groups"][0]["params"].pop(),
        lambda content: content["optimizer"]["param_groups"].append({"params": []}),
        lambda content: content["state_dict"].update({PTR: torch.tensor([48])}),
        lambda content: content["state_dict"].update({PTR: torch.tensor([-1])}),
        lambda content: content["state_dict"].update({QUEUE: torch.full((8, 48), math.nan)}),
        lambda content: content["state_dict"].update({QUEUE: None}),
        lambda content: content["meter"].update(sums=torch.zeros(4)),
        lambda content: content["meter"].update(sums=torch.full((3,), math.nan)),
        lambda content: content["meter"].update(steps=-1),
        lambda content: content["meter"].update(steps=1.5),
        lambda content: content["meter"].update(images=10**30),
        lambda content: content["meter"].update(seconds=math.nan),
        lambda content: content["meter"].update(seconds="long"),
    ],
)
def test_a_state_that_does_not_fit_is_one_line(content: dict, damage: Callable) -> None:
    damage(content)
    with pytest.raises(UserError, match="the checkpoint does not fit its own settings") as error:
        resume.restore(content, *make_parts())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("step", torch.tensor(-1.0)),
        ("step", torch.zeros(2)),
        ("step", torch.tensor(math.nan)),
        ("exp_avg", torch.zeros(1)),
        ("exp_avg_sq", None),
    ],
)
def test_the_state_of_adamw_is_checked_alike(name: str, value: Any) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = optimizer.state_dict()
    found = resume.check_optimizer(content, optimizer)
    assert found["state"].keys() == content["state"].keys()
    content["state"][1] |= {name: value}
    with pytest.raises(ValueError, match="optimizer"):
        resume.check_optimizer(content, optimizer)


def test_a_weight_that_is_not_finite_is_not_saved(settings: TrainSettings, tmp_path: Path) -> None:
    parts = make_parts()
    with torch.no_grad():
        parts[0].encoder_q.layer1[0].conv1.weight[0, 0, 0, 0] = float("nan")
    message = "after step 7 encoder_q.layer1.0.conv1.weight is not finite: there is no checkpoint"
    with pytest.raises(UserError, match=message):
        snapshot(settings, parts, tmp_path)


def refusal(content: dict, settings: TrainSettings, images: int = IMAGES, **changes: Any) -> str:
    """What `check` says of a run that goes on with some settings changed."""
    try:
        resume.check(content, Path("last"), dataclasses.replace(settings, **changes), images)
    except UserError as error:
        return str(error)
    return ""


def test_other_settings_are_refused_and_all_of_them_listed(
    content: dict, settings: TrainSettings
) -> None:
    assert refusal(content, settings) == ""
    message = refusal(content, settings, images=90, lr=0.5, mlp=True, schedule=[3])
    for change in ("lr 0.03 -> 0.5", "mlp False -> True", "images 85 -> 90"):
        assert change in message
    assert "schedule [120, 160] -> [3]; " in message
    assert message.startswith("--resume with other settings than those of last: ")


def test_what_the_training_does_not_depend_on_may_change(
    content: dict, settings: TrainSettings
) -> None:
    free = {"output_root": "x", "dataset_root": "y", "exp_version": "z", "num_workers": 0}
    free |= {"log_every": 3, "save_weight_epoch": 2, "save_every_minutes": 1.5, "knn_every": 1}
    free |= {"device": "cuda", "compile": True, "pack": "auto", "tensorboard": True}
    assert refusal(content, settings, **free, resume=True, max_epoch=9) == ""
    assert "cosine False -> True" in refusal(content, settings, cosine=True)
    content["config"]["cosine"] = True
    settings = dataclasses.replace(settings, cosine=True)
    assert "the cosine of last was made for 4 epochs" in refusal(content, settings, max_epoch=9)


def test_settings_newer_than_the_checkpoint_had_their_defaults(
    content: dict, settings: TrainSettings
) -> None:
    for name in ("small_stem", "symmetric", "knn_images"):
        del content["config"][name]
    content["config"]["of a later version"] = 3
    assert refusal(content, settings) == ""
    assert "small_stem False -> True" in refusal(content, settings, small_stem=True)


def test_a_run_past_its_end_or_without_its_parts_is_refused(
    content: dict, settings: TrainSettings
) -> None:
    assert "--max_epoch 1 ends at step 5, but 'last' is already at step 7" in refusal(
        content, settings, max_epoch=1
    )
    content["step"] = 4 * STEPS_PER_EPOCH
    assert refusal(content, settings) == ""
    del content["meter"], content["optimizer"]
    assert "cannot be continued: it has no optimizer, meter" in refusal(content, settings)
