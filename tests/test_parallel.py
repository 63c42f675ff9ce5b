"""One algorithm on any number of devices: the same trajectory, in float64 to 1e-9, as one process gives."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from data import write_folders
from scripts import Done, free_ports, run

import dataloader
import evaluate
import model
import parallel
import train
import utils

ROOT = Path(train.__file__).parent
IMAGES, STEPS = 52, 6  # 2 epochs of 3 steps of 14 to 16 images: a queue of 40 keys wraps twice
BASE = [
    "--arch=resnet18",
    "--crop=33",
    "--resize=33",
    "--feature_dim=8",
    "--num_keys=40",
    "--max_epoch=2",
    "--save_weight_epoch=9",
    "--num_workers=0",
    "--device=cpu",
    "--precision=fp64",
    "--lr=0.003",
    "--temperature=0.2",
]
# name: flags, and the numbers of processes that give the same curve
JOBS = {
    "v1 shuffled": (
        ["--batch_size=16", "--bn_groups=4", "--shuffle_bn", "--log_every=1"],
        (4,),
    ),  # and over 4, then 2, in the resumed run
    "v2 plain": (
        ["--batch_size=16", "--bn_groups=4", "--mlp", "--aug_plus", "--cosine", "--log_every=1"],
        (2, 4),
    ),
    "v2 shuffled, uneven over 4": (
        ["--batch_size=14", "--bn_groups=4", "--shuffle_bn", "--mlp", "--log_every=1"],
        (4,),
    ),  # 4, 4, 4, 2
    "v1 shuffled, uneven over 2": (
        ["--batch_size=15", "--bn_groups=2", "--shuffle_bn", "--log_every=1"],
        (2,),
    ),  # 8, 7
    "v1 random queue": (
        [
            "--batch_size=16",
            "--bn_groups=2",
            "--shuffle_bn",
            "--queue_init=random",
            "--log_every=5",
        ],
        (2,),
    ),
    "symmetric, with kNN": (
        [
            "--batch_size=16",
            "--bn_groups=4",
            "--shuffle_bn",
            "--symmetric",
            "--knn_every=1",
            "--max_epoch=1",
            "--log_every=1",
        ],
        (2,),
    ),
    "broken images": (
        [
            "--batch_size=100",
            "--bn_groups=2",
            "--shuffle_bn",
            "--queue_init=random",
            "--max_epoch=1",
            "--log_every=1",
            "--crop=16",
            "--resize=16",
        ],
        (2,),
    ),
    "float32, one step": (
        [
            "--batch_size=16",
            "--bn_groups=4",
            "--shuffle_bn",
            "--precision=fp32",
            "--max_epoch=1",
            "--num_keys=16",
            "--log_every=1",
        ],
        (2, 4),
    ),
    "bfloat16, one step": (
        [
            "--batch_size=16",
            "--bn_groups=4",
            "--shuffle_bn",
            "--precision=bf16",
            "--max_epoch=1",
            "--num_keys=16",
            "--log_every=1",
        ],
        (2,),
    ),
}
TOLERANCE = {"float32, one step": 1e-4, "bfloat16, one step": 2e-2}  # the others, in float64: 1e-9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Class folders of 52 images, and for the one step of 24, both with a test split; and 200 of which the first that each of two processes reads are broken."""
    root = tmp_path_factory.mktemp("data")
    write_folders(root / "large", classes=4, train=IMAGES // 4, test=8, size=16)
    write_folders(root / "small", classes=4, train=6, test=2, size=16)
    write_folders(root / "broken", classes=4, train=50, test=1, size=16)
    first = dataloader.epoch_batches(200, 100, seed=0, epoch=0)[0]
    for index in first[[0, 50]].tolist():
        (root / "broken" / "train" / f"class{index // 50}" / f"{index % 50:03}.png").write_bytes(
            b"no image"
        )
    return {
        name: root / ("small" if "one step" in name else "broken" if "broken" in name else "large")
        for name in [*JOBS, "large"]
    }


def flags_of(name: str, data: dict[str, Path], out: Path, *more: str) -> list[str]:
    return [
        *BASE,
        *JOBS[name][0],
        f"--dataset_root={data[name]}",
        f"--output_root={out / name.replace(' ', '_').replace(',', '')}",
        *more,
    ]


def on_processes(count: int, commands: list[list[str]]) -> list[tuple[str, list[dict[str, int]]]]:
    """Run commands ([script, flag, ...]) as `count` processes; what each process printed, and its calls of collectives for each command."""
    jobs = json.dumps(
        [[port, *command] for port, command in zip(free_ports(len(commands)), commands)]
    )
    environment = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "tests/ranks.py", jobs],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    results = []
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert "Warning" not in err, err
        results.append(
            (
                out,
                [
                    json.loads(line.removeprefix("CALLS "))
                    for line in out.splitlines()
                    if line.startswith("CALLS ")
                ],
            )
        )
    return results


@pytest.fixture(scope="module")
def alone(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a job by one process on one device; each is run once."""
    out, done = tmp_path_factory.mktemp("alone"), {}

    def get(name: str) -> Path:
        if name not in done:
            done[name] = run("train", *flags_of(name, data, out))
            assert done[name].returncode == 0, done[name].stderr
            for copy_of_last in run_of(name, out).glob("checkpoints/epoch_*"):
                copy_of_last.unlink()  # 270 MB each
        return run_of(name, out)

    return get


def run_of(name: str, out: Path) -> Path:
    return out / name.replace(" ", "_").replace(",", "") / "IMAGENET-64" / "v1"


def assert_same_curve(one: Path, other: Path, tolerance: float) -> None:
    """Loss of each row, both encoders with their running statistics, queue, pointer, momentum buffers: relative to each tensor's largest value."""
    logs = [utils.read_csv(folder / "log.csv") for folder in (one, other)]
    assert logs[0]["step"] == logs[1]["step"] and len(logs[0]["step"]) > 0
    for column in (
        "loss",
        "contrast_top1",
        "lr",
        "alignment",
        "uniformity",
        "effective_rank",
        "knn_top1",
    ):
        assert logs[0][column] == pytest.approx(
            logs[1][column], rel=max(tolerance, 1e-9), nan_ok=True
        ), column
    ends = [
        utils.load_checkpoint(folder / "checkpoints" / "last.pth.tar") for folder in (one, other)
    ]
    assert ends[0]["step"] == ends[1]["step"] == logs[0]["step"][-1]
    states = [
        end["state_dict"]
        | {f"momentum.{i}": s["momentum_buffer"] for i, s in end["optimizer"]["state"].items()}
        for end in ends
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert value.shape == states[1][name].shape and value.dtype == states[1][name].dtype, name
        worst = (value.double() - states[1][name].double()).abs().max().item()
        assert worst <= tolerance * max(value.double().abs().max().item(), 1e-3), (name, worst)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_follow_the_curve_of_one(
    count: int, data: dict[str, Path], alone: Callable[[str], Path], tmp_path: Path
) -> None:
    names = [name for name, (_, counts) in JOBS.items() if count in counts]
    results = on_processes(count, [["train", *flags_of(name, data, tmp_path)] for name in names])
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
            gathers = sum(
                seen.get(name, 0) for name in ("all_gather_single", "all_gather_into_tensor")
            )
            # two collectives a step; agreeing and summing at two log steps, summing at the one save (meter, meter, statistics), the start
            # and beside them: three comparisons at the start
            assert (
                seen["all_to_all_single"] == gathers == steps
                and "broadcast" not in seen
                and seen["all_reduce"] <= 2 * 2 + 3 + 3
            )
            assert "all_to_all_single" not in calls[names.index("v2 plain")]  # nothing to shuffle


def test_a_run_goes_on_with_other_processes(
    data: dict[str, Path], alone: Callable[[str], Path], tmp_path: Path
) -> None:
    """Four processes, then one, then two, each from the other's checkpoint: the curve of one."""
    name = "v1 shuffled"
    flags = flags_of(name, data, tmp_path, "--bn_groups=auto", "--resume")
    on_processes(4, [["train", *flags, "--max_epoch=1"]])  # auto: four groups on four processes
    done = run(
        "train", *flags, "--max_epoch=1"
    )  # nothing left to do, on one device, where auto would be eight
    assert done.returncode == 0 and "bn_groups=4" in done.stdout, done.stderr
    on_processes(2, [["train", *flags]])
    assert_same_curve(alone(name), run_of(name, tmp_path), 1e-9)


def test_evaluation_on_two_devices_counts_every_image_once(
    data: dict[str, Path], alone: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = alone("v1 shuffled").parents[1]
    flags = [
        f"--dataset_root={data['large']}",
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
        "launch",
        lambda _: parallel.Replicas(
            torch.device("cpu"), 2, lambda module: DataParallelOnCpu(module, 2)
        ),
    )
    done = run("test", *flags)
    assert done.returncode == 0 and "torchrun" in done.stdout, done.stderr
    replicas = json.loads(result.read_text())
    for name in ("knn_top1", "trials", "heldout_top1", "train_images", "test_images"):
        assert one[name] == two[name] == replicas[name], name


def test_protocols_on_two_processes_are_those_on_one(
    data: dict[str, Path], alone: Callable[[str], Path]
) -> None:
    home = alone("v1 shuffled").parents[1]
    flags = [
        f"--dataset_root={data['large']}",
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
            "--linear_views=4",
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


def test_batches_that_are_too_small_for_the_processes_are_refused() -> None:
    cfg = evaluate.settled(
        utils.load_config("test", ["--protocol=original", "--linear_batch_size=3"])
    )
    with pytest.raises(utils.UserError, match="batches of 3 images are too few for 2 processes"):
        evaluate.check_sizes(
            cfg, None, torch.arange(52) % 4, torch.arange(52), None, 32, processes=2
        )


def test_the_identity_for_a_permutation_is_plain_batch_norm(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M3 with the identity is M2."""
    name = "v1 shuffled"
    plain, identity = (flags_of(name, data, tmp_path / part) for part in ("plain", "identity"))
    assert run("train", *plain, "--no-shuffle_bn").returncode == 0
    for function in (parallel.shuffle, parallel.unshuffle):
        monkeypatch.setattr(
            parallel,
            function.__name__,
            lambda x, permutation, function=function: function(x, torch.arange(len(permutation))),
        )
    assert run("train", *identity).returncode == 0
    assert_same_curve(run_of(name, tmp_path / "plain"), run_of(name, tmp_path / "identity"), 1e-12)


# -------------------------------------------------------------------------------------------------------------- nn.DataParallel


class DataParallelOnCpu:
    """What `nn.DataParallel` does, on the CPU: chunks, replicas, threads, a gather. The first replica's buffers are the module's own, those
    of the others are copies that are thrown away."""

    def __init__(self, module: nn.Module, devices: int) -> None:
        self.module, self.devices = module, devices

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        chunks = x.chunk(self.devices)
        replicas = self.replicate(len(chunks))
        outputs: list = [None] * len(chunks)
        grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

        def work(i: int) -> None:
            with (
                torch.set_grad_enabled(grad),
                torch.autocast("cpu", dtype=torch.float16, enabled=autocast),
            ):  # a thread's own type
                outputs[i] = replicas[i](chunks[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in reversed(range(len(chunks)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.cat(outputs)

    def replicate(self, count: int) -> list[nn.Module]:
        modules = list(self.module.modules())
        places = {module: i for i, module in enumerate(modules)}
        copies = [
            [module._replicate_for_data_parallel() for _ in range(count)] for module in modules
        ]
        for module, replicas in zip(modules, copies):
            for r, replica in enumerate(replicas):
                for key, child in module._modules.items():
                    setattr(replica, key, copies[places[child]][r])
                for key, parameter in module._parameters.items():
                    setattr(replica, key, None if parameter is None else parameter.clone())
                for key, buffer in module._buffers.items():
                    setattr(replica, key, buffer if r == 0 else buffer.clone())
        return copies[0]


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
    data: dict[str, Path],
    alone: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = alone(name)
    monkeypatch.setattr(
        parallel,
        "launch",
        lambda _: parallel.Replicas(
            torch.device("cpu"), devices, lambda module: DataParallelOnCpu(module, devices)
        ),
    )
    done = run("train", *flags_of(name, data, tmp_path))
    assert done.returncode == 0 and done.stdout.count("torchrun") == 1, done.stderr
    assert_same_curve(expected, run_of(name, tmp_path), TOLERANCE.get(name, 1e-9))


def test_the_stand_in_loses_statistics_as_data_parallel_does() -> None:
    """Plain batch norm keeps the first replica's statistics; ours takes one update with the mean of all."""
    x = (
        torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        * torch.arange(1, 13)[:, None, None, None]
    )
    plain, grouped = nn.BatchNorm2d(3), model.GroupBatchNorm2d(3, num_groups=1)
    whole = copy.deepcopy(grouped)
    whole.num_groups = 2
    for module in (plain, grouped):
        launch = parallel.Replicas(
            torch.device("cpu"), 2, lambda module: DataParallelOnCpu(module, 2)
        )
        launch.wrap(module)
        launch.encode(module, x)
    whole(x)
    assert torch.allclose(plain.running_mean, 0.1 * x[:6].mean(dim=(0, 2, 3)))
    assert torch.allclose(grouped.running_mean, 0.1 * x.mean(dim=(0, 2, 3)))
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, grouped.get_buffer(name)), name


# ---------------------------------------------------------------------------------------------------------- launches and errors


def test_launches_by_environment_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert type(parallel.launch("cpu")) is parallel.OneDevice
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    assert (
        type(parallel.launch("auto")) is parallel.Replicas and parallel.launch("cuda").devices == 6
    )
    assert type(parallel.launch("cuda:1")) is type(parallel.launch("cpu")) is parallel.OneDevice
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    launch = parallel.launch("auto")
    assert (
        type(launch) is parallel.Processes
        and launch.device == torch.device("cuda:1")
        and (launch.rank, launch.devices) == (3, 8)
    )
    with pytest.raises(ValueError, match="cuda:0.*torchrun"):
        parallel.launch("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "6")
    with pytest.raises(ValueError, match="more processes .*--nproc_per_node=6"):
        parallel.launch("auto")


@pytest.mark.parametrize(
    "name, chosen", [("cuda", []), ("cuda:1", [torch.device("cuda:1")]), ("cpu", [])]
)
def test_one_gpu_needs_no_number(
    name: str, chosen: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch refuses to choose plain cuda, which is the current GPU as it is; cuda:1 is chosen, or pinned memory would open GPU 0."""
    found: list[torch.device] = []

    def set_device(device: torch.device) -> None:
        torch.cuda._utils._get_device_index(device)  # raises as torch.cuda.set_device does
        found.append(device)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with parallel.OneDevice(torch.device(name)):
        assert found == chosen


def process(rank: int, count: int, monkeypatch: pytest.MonkeyPatch) -> parallel.Processes:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))
    return parallel.Processes(torch.device("cpu"))


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
        launch.batch_size, launch.bn_groups = n if groups else 0, groups or 0
        rows.append(list(range(n)[launch.rows(0 if groups else n)]))
        weights.append(launch.weight() if groups else sizes[rank] * count / n)
    assert [len(part) for part in rows] == sizes and sum(rows, []) == list(range(n))
    assert weights == pytest.approx([size * count / n for size in sizes])  # their mean is 1


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
    """Six groups of 256 are 43 x 5 + 41: two devices find 43 + 43 + 43 and 43 + 43 + 41 by torch.chunk, three would make 42 + 42 of the last 43 + 41."""
    launch = process(0, devices, monkeypatch)
    if isinstance(expected, int):
        assert parallel.resolve_bn_groups(groups, batch, launch) == expected
        found = [
            chunk
            for share in parallel.shares(batch, devices, expected)
            for chunk in parallel.chunks(share, expected // devices)
        ]
        assert found == parallel.chunks(batch, expected)
        return
    with pytest.raises(ValueError, match=f"each of {devices} devices.*{expected}"):
        parallel.resolve_bn_groups(groups, batch, launch)


def test_data_parallel_scatters_by_its_own_rule() -> None:
    """256 over 2 GPUs is 128 + 128, which does not hold three of the six groups each."""
    launch = parallel.Replicas(torch.device("cpu"), 2, lambda module: DataParallelOnCpu(module, 2))
    assert parallel.resolve_bn_groups(8, 256, launch) == 8
    with pytest.raises(ValueError, match="--bn_groups 4 or 8"):
        parallel.resolve_bn_groups(6, 256, launch)


def test_threads_of_data_parallel_compute_in_the_type_of_autocast() -> None:
    """nn.DataParallel turns autocast on in its threads, in whatever type is theirs."""
    layer = nn.Conv2d(3, 4, 1)
    launch = parallel.Replicas(torch.device("cpu"), 2, lambda module: DataParallelOnCpu(module, 2))
    launch.wrap(layer)
    x = torch.randn(4, 3, 2, 2)
    assert launch.encode(layer, x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert launch.encode(layer, x).dtype == torch.bfloat16


def test_a_mac_and_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    process(0, 2, monkeypatch)
    with pytest.raises(ValueError, match="not on mps"):
        parallel.launch("mps")


def torchrun(*flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={free_ports(1)[0]}",
            "train.py",
            *flags,
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_says_an_error_of_all_processes_once(
    data: dict[str, Path], tmp_path: Path
) -> None:
    process = torchrun(*flags_of("v1 shuffled", data, tmp_path), "--bn_groups=3")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "--bn_groups 2 or 4" in lines[0], err
    assert not (tmp_path / "v1_shuffled").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_torchrun_ends_when_a_process_dies_and_saves_when_it_is_told_to_stop(
    number: int, data: dict[str, Path], tmp_path: Path
) -> None:
    """SIGKILL to one process ends the job; SIGTERM to torchrun, which passes it on, saves first."""
    process = torchrun(*flags_of("v1 shuffled", data, tmp_path), "--max_epoch=1000")
    log = run_of("v1 shuffled", tmp_path) / "log.csv"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]) if number == signal.SIGKILL else process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    if number == signal.SIGKILL:
        assert (
            "error: another process of this launch has ended" in err
            and err.count("Traceback") == err.count("<frozen runpy>") // 2
        ), err  # torchrun's own
    if number == signal.SIGTERM:
        assert "stopped by signal 15" in out, (out, err)
        assert utils.load_checkpoint(log.with_name("checkpoints") / "last.pth.tar")["step"] >= 3


@pytest.mark.parametrize(
    "difference, part", [(["--lr=0.1"], "settings"), (["--dataset_root={small}"], "data set")]
)
def test_processes_that_see_different_things_stop_before_the_first_step(
    difference: list[str], part: str, data: dict[str, Path], tmp_path: Path
) -> None:
    """The second process is started with other flags, as on a machine with another copy of the data."""
    port, flags = str(free_ports(1)[0]), flags_of("v1 shuffled", data, tmp_path, "--num_keys=16")
    started = []
    for rank, more in enumerate(
        ([], [flag.format(small=data["float32, one step"]) for flag in difference])
    ):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "train.py", *flags, *more],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for rank, process in enumerate(started):
        _, err = process.communicate(timeout=120)
        assert (
            process.returncode == 2
            and f"error: {'process 1: ' * rank}the processes do not see the same {part}" in err
        ), err
