"""Which launch it is, how it splits a batch, and nn.DataParallel by a stand-in."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from launches import (
    TOLERANCE,
    assert_same_curve,
    flags_of,
    process,
    replicas,
    run_of,
)
from scripts import run

import parallel
import utils
from model import GroupBatchNorm2d
from run import splits


@pytest.mark.parametrize(
    "name, devices",
    [
        ("v1 shuffled", 2),
        ("v2 plain", 4),
        ("v2 shuffled, uneven over 4", 4),
        ("v1 shuffled, uneven over 2", 2),
        ("float32, one step", 2),
        ("bfloat16, one step", 2),
    ],
)
def test_data_parallel_follows_the_curve_of_one_device(
    name: str,
    devices: int,
    launch_data: dict[str, Path],
    alone: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = alone(name)
    monkeypatch.setattr(
        parallel,
        "open_launch",
        lambda _: replicas(devices),
    )
    done = run("train", *flags_of(name, launch_data, tmp_path))
    assert done.returncode == 0 and done.stdout.count("torchrun") == 1, done.stderr
    assert_same_curve(expected, run_of(name, tmp_path), TOLERANCE.get(name, 1e-9))


def test_the_stand_in_loses_statistics_as_data_parallel_does() -> None:
    """Plain batch norm keeps the first replica's statistics; ours takes the mean of all."""
    x = (
        torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        * torch.arange(1, 13)[:, None, None, None]
    )
    plain, grouped = nn.BatchNorm2d(3), GroupBatchNorm2d(3, num_groups=1)
    whole = copy.deepcopy(grouped)
    whole.num_groups = 2
    for module in (plain, grouped):
        replicas().wrap(module)(x)
    whole(x)
    assert torch.allclose(plain.running_mean, 0.1 * x[:6].mean(dim=(0, 2, 3)))
    assert torch.allclose(grouped.running_mean, 0.1 * x.mean(dim=(0, 2, 3)))
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, grouped.get_buffer(name)), name


def test_launches_by_environment_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert type(parallel.open_launch("cpu")) is parallel.OneDevice
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    assert (
        type(parallel.open_launch("auto")) is parallel.Replicas
        and parallel.open_launch("cuda").devices == 6
    )
    assert (
        type(parallel.open_launch("cuda:1"))
        is type(parallel.open_launch("cpu"))
        is parallel.OneDevice
    )
    environment = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch = parallel.open_launch("auto")
    assert (
        type(launch) is parallel.Processes
        and launch.device == torch.device("cuda:1")
        and (launch.rank, launch.devices) == (3, 8)
    )
    with pytest.raises(utils.UserError, match="cuda:0.*torchrun"):
        parallel.open_launch("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "6")
    with pytest.raises(utils.UserError, match="more processes .*--nproc_per_node=6"):
        parallel.open_launch("auto")


@pytest.mark.parametrize(
    "name, chosen", [("cuda", []), ("cuda:1", [torch.device("cuda:1")]), ("cpu", [])]
)
def test_one_gpu_needs_no_number(
    name: str, chosen: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch refuses to choose plain cuda; cuda:1 is chosen, or pinning would open GPU 0."""
    found: list[torch.device] = []

    def set_device(device: torch.device) -> None:
        torch.cuda._utils._get_device_index(device)  # raises as torch.cuda.set_device does
        found.append(device)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with parallel.OneDevice(torch.device(name)):
        assert found == chosen


def test_kernels_are_tuned_only_in_threads_that_stay() -> None:
    """cuDNN keeps what it finds in each thread, and nn.DataParallel starts new ones each time."""
    for launch, tuned in ((parallel.OneDevice(), True), (replicas(2), False)):
        with launch:
            assert torch.backends.cudnn.benchmark is tuned
            assert torch.backends.cudnn.conv.fp32_precision == "tf32"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"


class Untrained:
    """Stands for a MoCo without a parameter to train."""

    encoder_q = encoder_k = nn.Identity()

    def connect(self, **how: object) -> None:
        assert how["encode_q"](3) == 3


@pytest.mark.parametrize(
    "n, count, groups, sizes",
    [
        (256, 6, 6, [43] * 5 + [41]),
        (256, 8, 8, [32] * 8),
        (256, 2, 6, [129, 127]),
        (10, 6, None, [2] * 5 + [0]),
        (3, 4, None, [1, 1, 1, 0]),
    ],
)
def test_rows_are_shares_without_gap_or_overlap(
    n: int, count: int, groups: int | None, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With groups: of a batch in training; without: in evaluation."""
    rows, weights = [], []
    for rank in range(count):
        launch = process(rank, count, monkeypatch)
        own = launch.rows(n)
        if groups:
            launch.attach(Untrained(), n, groups)
            own = launch.batch_rows
            weights.append(launch.loss_weight)
        rows.append(list(range(n)[own]))
    assert [len(part) for part in rows] == sizes and sum(rows, []) == list(range(n))
    if groups:  # the mean weight is 1
        assert weights == pytest.approx([size * count / n for size in sizes])


@pytest.mark.parametrize(
    "groups, batch, devices, expected",
    [
        ("auto", 256, 6, 6),
        (8, 256, 4, 8),
        (6, 256, 2, 6),
        (6, 256, 3, "--bn_groups 3,"),
        (4, 256, 8, "--bn_groups 8"),
        (9, 256, 6, "--bn_groups 6"),
        ("auto", 8, 6, "larger batch"),
        (64, 256, 8, 64),
    ],
)
def test_groups_and_processes(
    groups: int | str,
    batch: int,
    devices: int,
    expected: int | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six groups of 256 are 43 x 5 + 41. Two devices find 43 + 43 + 43 and 43 + 43 + 41 by
    torch.chunk; three would make 42 + 42 of the last 43 + 41."""
    launch = process(0, devices, monkeypatch)
    if isinstance(expected, int):
        assert splits.resolve_bn_groups(groups, batch, launch) == expected
        found = [
            chunk
            for share in splits.shares(batch, devices, expected)
            for chunk in splits.chunks(share, expected // devices)
        ]
        assert found == splits.chunks(batch, expected)
        return
    with pytest.raises(utils.UserError, match=f"each of {devices} devices.*{expected}"):
        splits.resolve_bn_groups(groups, batch, launch)


@pytest.mark.parametrize("batch", range(2, 80))
def test_auto_keeps_four_images_a_group(batch: int) -> None:
    """On one device: the most groups up to eight that do; fewer images are one group."""
    groups = splits.resolve_bn_groups("auto", batch, parallel.open_launch("cpu"))
    able = [g for g in range(1, 9) if len(s := splits.chunks(batch, g)) == g and min(s) >= 4]
    assert groups == max(able, default=1)


def test_data_parallel_scatters_by_its_own_rule() -> None:
    """256 over 2 GPUs is 128 + 128, which does not hold three of the six groups each."""
    launch = replicas()
    assert splits.resolve_bn_groups(8, 256, launch) == 8
    with pytest.raises(utils.UserError, match="--bn_groups 4 or 8"):
        splits.resolve_bn_groups(6, 256, launch)


def test_threads_of_data_parallel_compute_in_the_type_of_autocast() -> None:
    """nn.DataParallel turns autocast on in its threads, in whatever type is theirs."""
    layer = nn.Conv2d(3, 4, 1)
    encode = replicas().wrap(layer)
    x = torch.randn(4, 3, 2, 2)
    assert encode(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encode(x).dtype == torch.bfloat16


def test_a_mac_and_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    process(0, 2, monkeypatch)
    with pytest.raises(utils.UserError, match="not run on mps"):
        parallel.open_launch("mps")
