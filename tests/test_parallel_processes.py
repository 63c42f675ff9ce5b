"""Several processes: the same trajectory, in float64 to 1e-9, as one process gives."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launches import (
    JOBS,
    STEPS,
    TOLERANCE,
    assert_same_curve,
    flags_of,
    on_processes,
    replicas,
    run_of,
)
from scripts import free_ports, run
from torch.multiprocessing import spawn

import model
import parallel


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_follow_the_curve_of_one(
    count: int, launch_data: dict[str, Path], alone: Callable[[str], Path], tmp_path: Path
) -> None:
    names = [name for name, (_, counts) in JOBS.items() if count in counts]
    results = on_processes(
        count, [["train", *flags_of(name, launch_data, tmp_path)] for name in names]
    )
    for name in names:
        assert_same_curve(alone(name), run_of(name, tmp_path), TOLERANCE.get(name, 1e-9))
        if "broken" in name:  # the first process writes what any of them found
            found = [
                sorted((folder / "unreadable.txt").read_text().splitlines())
                for folder in (alone(name), run_of(name, tmp_path))
            ]
            assert len(found[0]) == 2 and found[0] == found[1]
    for rank, (out, calls) in enumerate(results):
        spoken = [line for line in out.splitlines() if not line.startswith("CALLS")]
        assert bool(spoken) == (rank == 0)  # the first one speaks
        if count == 2:
            steps, seen = STEPS, calls[names.index("v1 random queue")]
            gathers = sum(seen.get(name, 0) for name in ("all_gather_single", "all_gather"))
            # two collectives a step; beside them agreeing and summing at two log steps, summing at
            # the one save (meter, meter, statistics), and five comparisons at the start
            assert (
                seen["all_to_all_single"] == gathers == steps
                and "broadcast" not in seen
                and seen["all_reduce"] <= 2 * 2 + 3 + 4
            )
            assert "all_to_all_single" not in calls[names.index("v2 plain")]  # nothing to shuffle


def test_a_run_goes_on_with_other_processes(
    launch_data: dict[str, Path], alone: Callable[[str], Path], tmp_path: Path
) -> None:
    """Four processes, then one, then two, each from the other's checkpoint: the curve of one."""
    name = "v1 shuffled"
    flags = flags_of(name, launch_data, tmp_path, "--bn_groups=auto", "--resume")
    on_processes(4, [["train", *flags, "--max_epoch=1"]])  # auto: four groups on four processes
    done = run(
        "train", *flags, "--max_epoch=1"
    )  # nothing left to do, on one device, where auto would be eight
    assert done.returncode == 0 and "bn_groups=4" in done.stdout, done.stderr
    on_processes(2, [["train", *flags]])
    assert_same_curve(alone(name), run_of(name, tmp_path), 1e-9)


def test_evaluation_on_two_devices_counts_every_image_once(
    launch_data: dict[str, Path], alone: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = alone("v1 shuffled").parents[1]
    flags = [
        f"--dataset_root={launch_data['large']}",
        f"--encoder_output_root={home}",
        "--device=cpu",
        "--num_workers=0",
        "--linear_epochs=3",
        "--trials=2",
        "--precision=fp64",
        "--knn_k=7",
        "--eval_batch_size=5",
    ]
    result = home / "IMAGENET-64/v1/eval/epoch_0002/result.json"
    on_processes(2, [["test", *flags]])
    two = json.loads(result.read_text())
    assert run("test", *flags).returncode == 0
    one = json.loads(result.read_text())
    monkeypatch.setattr(
        parallel,
        "open_launch",
        lambda _: replicas(),
    )
    done = run("test", *flags)
    assert done.returncode == 0 and "torchrun" in done.stdout, done.stderr
    copies = json.loads(result.read_text())
    for name in ("knn_top1", "trials", "heldout_top1", "train_images", "test_images"):
        assert one[name] == two[name] == copies[name], name


def test_protocols_on_two_processes_are_those_on_one(
    launch_data: dict[str, Path], alone: Callable[[str], Path]
) -> None:
    home = alone("v1 shuffled").parents[1]
    flags = [
        f"--dataset_root={launch_data['large']}",
        f"--encoder_output_root={home}",
        "--device=cpu",
        "--num_workers=0",
        "--precision=fp64",
        "--knn_k=3",
        "--eval_batch_size=5",
    ]
    jobs = {
        "original": [
            "--protocol=original",
            "--linear_epochs=2",
            "--linear_lrs",
            "0.01",
            "--linear_batch_size=9",
        ],  # 5 and 4 of the 9
        "cached-50percent": [
            "--linear_views=2",
            "--train_fraction=0.5",
            "--linear_epochs=3",
            "--trials=2",
        ],
    }

    def results() -> dict[str, tuple[dict, dict]]:
        folders = {kind: home / f"IMAGENET-64/v1/eval/epoch_0002-large-{kind}" for kind in jobs}
        return {
            kind: (
                json.loads((folder / "result.json").read_text()),
                torch.load(folder / "linear.pth.tar", weights_only=True),
            )
            for kind, folder in folders.items()
        }

    on_processes(2, [["test", *flags, *more] for more in jobs.values()])
    two = results()
    for more in jobs.values():
        assert run("test", *flags, *more).returncode == 0
    one = results()
    for kind in jobs:
        for name in (
            "knn_top1",
            "trials",
            "per_class_top1",
            "heldout_top1",
            "linear_top1",
            "train_images",
        ):
            assert one[kind][0][name] == two[kind][0][name], (kind, name)
        torch.testing.assert_close(
            one[kind][1]["weight"], two[kind][1]["weight"], rtol=1e-4, atol=1e-6
        )  # features are kept in float32


def test_the_identity_for_a_permutation_is_plain_batch_norm(
    launch_data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M3 with the identity is M2."""
    name = "v1 shuffled"
    plain, identity = (
        flags_of(name, launch_data, tmp_path / part) for part in ("plain", "identity")
    )
    assert run("train", *plain, "--no-shuffle_bn").returncode == 0
    for module, name_of_it in ((parallel, "shuffle"), (model, "unshuffle")):
        move = getattr(module, name_of_it)
        in_order = functools.partial(lambda move, x, order: move(x, order.sort().values), move)
        monkeypatch.setattr(module, name_of_it, in_order)
    assert run("train", *identity).returncode == 0
    assert_same_curve(run_of(name, tmp_path / "plain"), run_of(name, tmp_path / "identity"), 1e-12)


def gather_in_blocks(rank: int, port: int, n: int) -> None:
    """One of three processes: its rows of n, sent two rows at a time, come back as all rows."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    parallel.BLOCK = 6
    rows = torch.arange(float(3 * n)).view(n, 3)
    with parallel.Processes(torch.device("cpu")) as launch:
        assert torch.equal(launch.gather(rows[launch.rows(n)], n), rows)


@pytest.mark.parametrize("n", [2, 9, 10])  # fewer than processes, equal parts, unequal parts
def test_rows_are_gathered_in_blocks(n: int) -> None:
    spawn(gather_in_blocks, (free_ports(1)[0], n), nprocs=3)
