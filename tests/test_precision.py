"""Precision by what the hardware computes in; fp16 with its scaled loss."""

import copy
from pathlib import Path

import pytest
import torch
from scripts import run
from training import assert_same_run, pretrain, state

from run import compute
from utils import UserError

CUDA = torch.device("cuda:0")


@pytest.mark.parametrize(
    "capability, auto", [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 6), "bf16")]
)
def test_auto_is_what_a_gpu_computes_in(
    capability: tuple[int, int], auto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert compute.pick_precision("auto", CUDA) == auto
    assert compute.pick_precision("fp16", CUDA) == "fp16"
    if auto == "bf16":
        assert compute.pick_precision("bf16", CUDA) == "bf16"
    else:
        with pytest.raises(UserError, match=rf"bf16 needs .* has {capability[0]}\..*use {auto}"):
            compute.pick_precision("bf16", CUDA)


def test_mps_has_no_fp16_here() -> None:
    with pytest.raises(UserError, match="fp16 .* mps: use fp32"):
        compute.pick_precision("fp16", torch.device("mps"))


@pytest.mark.parametrize(
    "built, capability, runs",
    [
        (["sm_75", "sm_80", "sm_90a"], (6, 1), False),
        (["sm_75", "sm_80", "sm_90a"], (7, 0), False),
        (["sm_75", "sm_80", "sm_90a"], (8, 6), True),
        (["sm_75", "sm_80", "sm_90a"], (9, 0), True),
        (["sm_75", "sm_80"], (9, 0), False),
        (["sm_75", "compute_80"], (9, 0), True),
        (["sm_100", "sm_120"], (12, 0), True),
        (["gfx90a"], (9, 0), True),  # of another maker
    ],
)
def test_a_gpu_that_pytorch_is_not_built_for_is_refused(
    built: list[str], capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "TITAN Xp")
    if runs:
        assert compute.pick_device("cuda") == torch.device("cuda")
    else:
        version = ".".join(map(str, capability))
        with pytest.raises(UserError, match=f"no kernels for GPU 0 .TITAN Xp, .* {version}"):
            compute.pick_device("cuda")


def overflowing() -> tuple[torch.nn.Linear, torch.optim.SGD, compute.Scaler]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, fused=True)
    return layer, optimizer, compute.Scaler("fp16", torch.device("cpu"), optimizer)


def one_step(layer: torch.nn.Linear, optimizer: torch.optim.SGD, scaler: compute.Scaler, x) -> None:
    optimizer.zero_grad()
    scaler.scale(layer(torch.full((4, 3), x)).sum()).backward()
    scaler.step(optimizer)


def test_a_step_that_overflows_is_skipped_counted_and_saved() -> None:
    layer, optimizer, scaler = overflowing()
    start = layer.weight.clone()
    one_step(layer, optimizer, scaler, 1e38)  # the first: no momentum yet
    assert torch.equal(layer.weight, start) and scaler.skipped == 1
    one_step(layer, optimizer, scaler, 1.0)
    assert torch.allclose(layer.weight, start - 0.1 * 4) and scaler.skipped == 1
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["scaler"]["skipped"] == 1 and saved["scaler"]["scale"] == 2.0**15

    twin, again, other = overflowing()
    twin.load_state_dict(layer.state_dict())
    again.load_state_dict(saved)
    assert other.skipped == 1 and other.get_scale() == 2.0**15
    for x in (1e38, 2.0):
        one_step(layer, optimizer, scaler, x)
        one_step(twin, again, other, x)
    assert torch.equal(layer.weight, twin.weight) and other.skipped == scaler.skipped == 2
    assert other.state_dict() == scaler.state_dict()


def test_other_precisions_are_not_scaled() -> None:
    layer, optimizer, _ = overflowing()
    for precision in ("fp32", "bf16", "fp64"):
        scaler = compute.Scaler(precision, torch.device("cpu"), optimizer)
        loss = layer(torch.ones(4, 3)).sum()
        assert scaler.scale(loss) is loss


def test_a_run_in_fp16_says_what_it_skips_and_resumes_exactly(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = torch.amp.GradScaler.__init__
    monkeypatch.setattr(  # so high that the first steps overflow
        torch.amp.GradScaler,
        "__init__",
        lambda self, *args, **kwargs: scale(self, *args, init_scale=2.0**40, **kwargs),
    )
    flags = ["--precision=fp16", "--arch=timm:test_resnet", "--save_weight_epoch=1"]
    whole = pretrain(folders, tmp_path / "whole", *flags, "--max_epoch=4")
    assert whole.returncode == 0, whole.stderr
    assert "fp16: gradients overflowed, 2 steps were skipped (2 in all)" in whole.stdout
    assert "(4 in all)" in whole.stdout
    parts = tmp_path / "parts"
    for epochs in (2, 4):
        done = pretrain(folders, parts, *flags, f"--max_epoch={epochs}", "--resume")
        assert done.returncode == 0, done.stderr
    one, two = state(tmp_path / "whole"), state(parts)
    assert_same_run(one, two)
    assert one["optimizer"]["scaler"] == two["optimizer"]["scaler"]
    assert one["optimizer"]["scaler"]["skipped"] > 5
    rows = [line for line in done.stdout.splitlines() if line.startswith("fp16: ")]
    assert rows[-1] == [line for line in whole.stdout.splitlines() if line.startswith("fp16: ")][-1]


def test_finetuning_in_fp16_is_refused() -> None:
    done = run("test", "--dataset_root=shapes", "--finetune", "--precision=fp16", "--device=cpu")
    assert done.returncode == 2 and "--finetune does not work with --precision fp16" in done.stderr
