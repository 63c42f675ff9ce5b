"""The GPU's kernels compute what the loop over batch-norm groups does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from run import compute

needs_triton = pytest.mark.skipif(not compute.HAS_TRITON, reason="Triton is not installed")
LIMITS = {"float32": 1e-4, "bfloat16": 0.07, "float16": 0.01}  # the others, in float64: 1e-12


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, float]]:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreted.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
def test_kernels_agree_with_the_loop_over_groups(differences: dict[str, dict[str, float]]) -> None:
    assert len(differences) == 8
    for case, found in differences.items():
        assert set(found) >= {"y", "dx", "dweight", "dbias", "running_mean", "running_var"}
        assert found.pop("num_batches_tracked") == 0, case
        for name, difference in found.items():
            assert difference <= LIMITS.get(case, 1e-12), (case, name, difference)


def test_kernels_are_for_gpus_that_triton_compiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "HAS_TRITON", True)
    for capability, expected in (((6, 1), False), ((7, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert compute.has_kernels(torch.device("cuda:0")) is expected
    assert not any(compute.has_kernels(torch.device(name)) for name in ("cpu", "mps"))
    monkeypatch.setattr(compute, "HAS_TRITON", False)
    assert not compute.has_kernels(torch.device("cuda:0"))


@needs_triton
def test_a_group_of_one_value_a_channel_is_refused() -> None:
    from run import kernels

    with pytest.raises(ValueError, match="one value a channel"):
        kernels._plan(torch.zeros(5, 3, 1, 1), 2 + 1)
