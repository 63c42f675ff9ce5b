"""What a run survives: signals, kills, full disks, a second run in its folder, numbers gone wrong, broken data. Real scripts, mostly as processes."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from data import write_folders
from PIL import Image
from scripts import assert_last_line_is_error, assert_one_line_error, free_ports, run

import parallel
import train
import utils
from utils import UserError

ROOT = Path(train.__file__).parent
TRAIN = [sys.executable, "train.py"]
STEPS = 20  # 4 epochs of 5
RUN = [
    "--arch=resnet18",
    "--crop=16",
    "--resize=16",
    "--feature_dim=8",
    "--num_keys=48",
    "--batch_size=16",
    "--bn_groups=2",
    "--shuffle_bn",
    "--log_every=5",
    "--max_epoch=4",
    "--save_weight_epoch=100",
    "--num_workers=0",
    "--device=cpu",
    "--precision=fp32",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 classes x 20 images: 5 steps of 16 an epoch."""
    root = tmp_path_factory.mktemp("data")
    write_folders(root, classes=4, train=20, test=1, size=20)
    return root


def flags(data: Path, out: Path, *more: str) -> list[str]:
    return [f"--dataset_root={data}", f"--output_root={out}", *RUN, *more]


def home(out: Path) -> Path:
    return out / "IMAGENET-64" / "v1"


def last(out: Path) -> Path:
    return home(out) / "checkpoints" / "last.pth.tar"


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    done = run("train", *flags(data, out))
    assert done.returncode == 0, done.stderr
    return out


def assert_same(out: Path, whole: Path) -> None:
    """Bit for bit: weights of both encoders, queue, pointer, optimizer; and the log, but for the speed."""
    ours, theirs = utils.load_checkpoint(last(out)), utils.load_checkpoint(last(whole))
    assert (
        ours["step"] == theirs["step"] == STEPS
        and ours["state_dict"].keys() == theirs["state_dict"].keys()
    )
    assert all(
        torch.equal(value, theirs["state_dict"][name]) for name, value in ours["state_dict"].items()
    )
    for i, state in theirs["optimizer"]["state"].items():
        assert torch.equal(
            ours["optimizer"]["state"][i]["momentum_buffer"], state["momentum_buffer"]
        )
    logs = [utils.read_csv(home(folder) / "log.csv", train.LOG_COLUMNS) for folder in (out, whole)]
    assert logs[0]["step"] == [5, 10, 15, 20]
    assert all(logs[0][name] == logs[1][name] for name in ("epoch", "loss", "contrast_top1", "lr"))


@contextlib.contextmanager
def started(*command: str, **how: object) -> Iterator[subprocess.Popen]:
    """A command as a process, at the head of a group of its own, which is gone at the end."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **{"cwd": ROOT, **how},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait(process: subprocess.Popen, ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, (
            process.communicate()[0] if process.poll() is not None else "it hangs"
        )
        time.sleep(0.005)


def children(process: subprocess.Popen) -> list[int]:
    return list(
        map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    )


def rows(out: Path) -> int:
    log = home(out) / "log.csv"
    return max(0, log.read_bytes().count(b"\n") - 1) if log.exists() else 0


# ------------------------------------------------------------------------------------------------------------- stopped and killed


@pytest.mark.parametrize(
    "number, status", [(signal.SIGUSR1, 138), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)  # SIGTERM: test_train.py, torchrun: test_parallel.py
def test_a_signal_saves_and_the_resumed_run_is_the_same(
    number: int, status: int, data: Path, whole: Path, tmp_path: Path
) -> None:
    """Sent to the whole group of processes, as a terminal does with Ctrl-C: workers take no notice."""
    with started(*TRAIN, *flags(data, tmp_path, "--num_workers=2")) as process:
        wait(process, lambda: rows(tmp_path) >= 1)
        for worker in children(process):  # so that the run comes to wait for them
            os.kill(worker, signal.SIGSTOP)
        time.sleep(0.5)
        os.killpg(process.pid, number)
        os.killpg(process.pid, signal.SIGCONT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in out, out
    step = utils.load_checkpoint(last(tmp_path))["step"]
    assert (
        f"stopped by signal {int(number)} after step {step}: saved" in out.splitlines()[-1]
        and 5 <= step < STEPS
    )
    assert run("train", *flags(data, tmp_path, "--resume")).returncode == 0
    assert_same(tmp_path, whole)


def test_one_run_in_a_folder_and_orphaned_workers_hold_nothing(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    with started(
        *TRAIN, *flags(data, tmp_path, "--num_workers=2", "--save_every_minutes=0")
    ) as process:
        wait(process, last(tmp_path).exists)
        workers = children(process)
        assert len(workers) >= 2
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)  # the run comes to a halt in the midst of a step
        time.sleep(1.0)
        wait(
            process, lambda: not list(home(tmp_path).rglob("*.tmp"))
        )  # of a save that a slow disk keeps waiting
        sound = last(tmp_path).read_bytes()
        last(tmp_path).write_bytes(b"a checkpoint that is being written: nobody looks at it")
        before = {path: path.read_bytes() for path in home(tmp_path).rglob("*") if path.is_file()}
        for how in ("--resume", "--overwrite"):
            assert_one_line_error(
                run("train", *flags(data, tmp_path, how)),
                f"in use by process {process.pid} on ",
                "another --exp_version",
            )
        assert {
            path: path.read_bytes() for path in home(tmp_path).rglob("*") if path.is_file()
        } == before
        last(tmp_path).write_bytes(sound)
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        assert process.poll() is None, "the first Ctrl-C waits for the step"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130, "the second one quits at once"
        assert all(Path(f"/proc/{worker}").exists() for worker in workers)
        again = run("train", *flags(data, tmp_path, "--resume"))
        assert again.returncode == 0 and "resumed after step" in again.stdout, again.stderr
        assert all(Path(f"/proc/{worker}").exists() for worker in workers), (
            "they outlived their run, and the next one began"
        )
    assert_same(tmp_path, whole)


def test_killed_inside_a_save_and_at_random(data: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL twice, then the same as if nothing had been: benchmarks/soak.py does it more often."""
    command = flags(data, tmp_path, "--save_every_minutes=0", "--resume")
    for moment in ("in a save", "at random"):
        with started(*TRAIN, *command) as process:
            wait(process, lambda: rows(tmp_path) >= 1)
            if moment == "in a save":
                wait(process, lambda: list(home(tmp_path).glob("checkpoints/.last.pth.tar.*.tmp")))
            else:
                time.sleep(random.uniform(0, 1))
            process.kill()
            process.wait()
        if moment == "in a save":
            assert list(home(tmp_path).glob("checkpoints/.last.pth.tar.*.tmp")), (
                "half a file lies there"
            )
        assert utils.load_checkpoint(last(tmp_path))["step"] >= 1
        utils.read_csv(home(tmp_path) / "log.csv", train.LOG_COLUMNS)
    assert run("train", *command).returncode == 0
    assert_same(tmp_path, whole)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_flipped_bit_is_noticed(data: Path, whole: Path, tmp_path: Path) -> None:
    """torch.load would take it: the checksums of the archive tell."""
    assert (
        run("train", *flags(data, tmp_path, "--max_epoch=2", "--save_weight_epoch=2")).returncode
        == 0
    )
    content = bytearray(last(tmp_path).read_bytes())
    content[len(content) // 2] ^= 1
    last(tmp_path).write_bytes(content)
    torch.load(last(tmp_path), weights_only=True)
    done = run("train", *flags(data, tmp_path, "--resume", "--save_weight_epoch=2"))
    assert (
        done.returncode == 0
        and "checksum" in done.stderr
        and "going on from epoch_0002" in done.stderr
    ), done.stderr
    assert_same(tmp_path, whole)


# ---------------------------------------------------------------------------------------------------------- disks that do not take it


class SmallDisk:
    """A file system of 480 MB (a checkpoint of the test has 134), or where none may be mounted, a limit to the size of files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.limits = folder, resource.getrlimit(resource.RLIMIT_FSIZE)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=480m", "none", folder], capture_output=True
        )
        self.mounted = mounted.returncode == 0

    def fill(self, leave: int) -> None:
        if self.mounted:
            stat = os.statvfs(self.folder)
            with open(self.folder / "filler", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - leave)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (leave, self.limits[1]))

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    def close(self) -> None:
        self.free()
        if self.mounted:
            subprocess.run(["umount", "-l", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = SmallDisk(folder)
    yield disk
    disk.close()


def test_a_full_disk_is_tried_again(
    data: Path, whole: Path, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the run waits for its second try, somebody makes room."""
    pauses = []
    monkeypatch.setattr(utils.time, "sleep", lambda seconds: (pauses.append(seconds), disk.free()))
    assert run("train", *flags(data, disk.folder, "--max_epoch=1")).returncode == 0
    (home(disk.folder) / "checkpoints/epoch_0001.pth.tar").unlink()
    disk.fill(leave=2**20)
    done = run("train", *flags(data, disk.folder, "--resume"))
    assert done.returncode == 0 and pauses == [utils.Saver.RETRY_S], done.stderr
    assert (
        done.stderr.count("cannot be written: ") == 1
        and "last good checkpoint is of step 5" in done.stderr
    )
    assert_same(disk.folder, whole)


def test_a_disk_that_stays_full_ends_the_run_and_loses_nothing(
    data: Path, whole: Path, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("train", *flags(data, disk.folder, "--max_epoch=1")).returncode == 0
    (home(disk.folder) / "checkpoints/epoch_0001.pth.tar").unlink()
    before = last(disk.folder).read_bytes()
    disk.fill(leave=2**20)
    done = run("train", *flags(data, disk.folder, "--resume", "--save_every_minutes=0"))
    assert_last_line_is_error(
        done, "twice in a row; the last good checkpoint is of step 5: make room"
    )
    assert (
        done.stderr.count("the next try comes in") == 1 and "next try comes in 0 s" in done.stderr
    ), "it went on after the first failure, to the next save"
    assert last(disk.folder).read_bytes() == before and not list(disk.folder.rglob("*.tmp"))
    disk.free()
    assert run("train", *flags(data, disk.folder, "--resume")).returncode == 0
    assert_same(disk.folder, whole)


def test_rows_of_the_log_wait_for_room(disk: SmallDisk, capsys: pytest.CaptureFixture) -> None:
    lines = utils.Lines(disk.folder / "log")
    lines.append("one")
    disk.fill(leave=0 if disk.mounted else 6)
    long = ["two " * 2000, "three"]
    for line in long:
        lines.append(line)
    assert (disk.folder / "log").read_bytes().startswith(
        b"one\n"
    ) and capsys.readouterr().err.count("warning") == 1
    with pytest.raises(UserError, match="log' cannot be written"):
        lines.flush(to_disk=True)
    disk.free()
    lines.append("four")
    assert (disk.folder / "log").read_text().splitlines() == ["one", *long, "four"]


def test_a_disk_that_takes_nothing_is_one_line(data: Path) -> None:
    assert_one_line_error(
        run("train", *flags(data, Path("/proc/output"))),
        "'/proc/output/IMAGENET-64/v1' cannot be written",
        "--output_root",
    )


@pytest.mark.parametrize("how", ["full disk", "closed pipe"])
def test_messages_that_go_nowhere_do_not_end_the_run(
    how: str, data: Path, whole: Path, tmp_path: Path
) -> None:
    """The terminal's log lies on a disk that is full, or its reader has gone."""
    out = open("/dev/full", "w") if how == "full disk" else subprocess.PIPE
    process = subprocess.Popen([*TRAIN, *flags(data, tmp_path)], cwd=ROOT, stdout=out, stderr=out)
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()
    assert process.wait(timeout=100) == 0
    assert_same(tmp_path, whole)


# ------------------------------------------------------------------------------------------------------------- numbers gone wrong


def test_the_meter_names_the_first_step_that_was_not_finite(tmp_path: Path) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        meter = train.Meter(parallel.OneDevice(), torch.float32)
        for step, loss in enumerate([1.0, 2.0, bad, 3.0, float("nan")], start=41):
            meter.add(torch.tensor(loss), torch.tensor(0.0), torch.tensor(1.0), 16)
            if step < 43:
                assert meter.read(step, tmp_path)["loss"] == pytest.approx(
                    1.0 if step == 41 else 1.5
                )
        again = train.Meter(parallel.OneDevice(), torch.float32)
        for m in (meter, again):
            with pytest.raises(
                UserError, match="the loss of step 43 was not finite: there is no checkpoint yet"
            ):
                m.read(45, tmp_path)
            again.load_state_dict(
                meter.state_dict() | {"steps": 2, "sums": torch.tensor([3.0, 0.0])}
            )  # two sound steps, then it went on
            for loss in (bad, 3.0, 3.0):
                again.add(torch.tensor(loss), torch.tensor(0.0), torch.tensor(1.0), 16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_stops_before_a_save(
    precision: str, data: Path, tmp_path: Path
) -> None:
    """The rate of a sound checkpoint is raised in its file; the first step with it ruins the weights, the second shows it."""
    base = flags(data, tmp_path, f"--precision={precision}")
    assert run("train", *base, "--max_epoch=1").returncode == 0
    content = torch.load(last(tmp_path), weights_only=True)
    content["config"]["lr"] = 1e38
    torch.save(content, last(tmp_path))
    before = last(tmp_path).read_bytes()
    done = run("train", *base, "--resume", "--lr=1e38")
    assert_last_line_is_error(
        done, f"the loss of step 7 was not finite: the last good checkpoint is {last(tmp_path)}"
    )
    done = run(
        "train", *base, "--resume", "--lr=1e38", "--save_every_minutes=0"
    )  # a save right after the ruinous step, whose loss was fine
    assert_last_line_is_error(
        done, "after step 6 encoder_q.conv1.weight is not finite: the last good checkpoint is"
    )
    assert last(tmp_path).read_bytes() == before


# -------------------------------------------------------------------------------------------------------------------- broken data


def test_broken_files_are_replaced_and_listed_and_odd_ones_are_used(tmp_path: Path) -> None:
    write_folders(tmp_path / "data", classes=2, train=500, test=1, size=8)
    folder = tmp_path / "data" / "train" / "class0"
    sound = (folder / "000.png").read_bytes()
    broken = {
        "leer.png": b"",
        "truncated.png": sound[:-40],
        "text.jpg": b"no image",
        "\u732b.jpg": b"\xff\xd8\xff",
        "\u043a\u043e\u0442\nb.png": sound[:20],
        os.fsdecode(b"\xe9\xff.png"): b"x",
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    Image.new("1", (20_000, 20_000)).save(
        folder / "bomb.png"
    )  # 400 million pixels in a file of 50 kB
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "round").symlink_to(folder)
    names = {*broken, "bomb.png", "loop.png", "pipe.png"}
    for i, (name, image) in enumerate(
        {
            "1x1.png": Image.new("RGB", (1, 1), "red"),
            "1x10000.png": Image.new("L", (1, 10_000)),
            "10000x1.jpg": Image.new("CMYK", (10_000, 1)),
            "wide.bmp": Image.new("1", (300, 2)),
        }.items()
    ):
        image.save(folder / name)
    Image.new("RGB", (9, 9)).save(folder / "a.jpeg", "PNG")
    Image.new("RGB", (9, 9)).save(folder / "b.png", "JPEG")
    base = flags(
        tmp_path / "data", tmp_path / "out", "--max_epoch=1", "--batch_size=100", "--num_workers=2"
    )
    done = run("train", *base)
    assert done.returncode == 0, done.stderr
    listed = (home(tmp_path / "out") / "unreadable.txt").read_bytes().rstrip(b"\n").split(b"\n")
    met = {os.fsdecode(line).replace("\\n", "\n") for line in listed}
    assert (
        len(met) == len(listed) and met <= {str(folder / name) for name in names} and len(met) >= 8
    ), met  # the last, incomplete batch is not read
    assert done.stderr.count("cannot be read as an image") == len(met)
    again = run("train", *base, "--max_epoch=2", "--resume")
    assert again.returncode == 0, again.stderr
    after = (home(tmp_path / "out") / "unreadable.txt").read_bytes().rstrip(b"\n").split(b"\n")
    assert {os.fsdecode(line).replace("\\n", "\n") for line in after} == {
        str(folder / name) for name in names
    } and len(set(after)) == len(after)
    for i in range(20, 25):
        (folder / f"{i:03}.png").write_bytes(b"gone bad")  # now more than 1 %
    many = run("train", *base, "--max_epoch=4", "--resume")
    assert_last_line_is_error(many, "of 1015 images (1.")


def test_files_that_vanish_during_the_run(data: Path, tmp_path: Path) -> None:
    write_folders(tmp_path / "data", classes=1, train=200, test=1, size=8)
    with started(
        *TRAIN, *flags(tmp_path / "data", tmp_path / "out", "--max_epoch=40", "--num_workers=1")
    ) as process:
        wait(process, lambda: rows(tmp_path / "out") >= 2)
        gone = [tmp_path / "data/train/class0" / name for name in ("007.png", "130.png")]
        for path in gone:
            path.unlink()
        unreadable = home(tmp_path / "out") / "unreadable.txt"
        wait(process, lambda: unreadable.exists() and unreadable.read_text().count("\n") == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert sorted(unreadable.read_text().split()) == list(map(str, gone))


# ---------------------------------------------------------------------------------------------------------------------- on a cluster

STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scontrol": '[ "$1" = show ] && echo localhost || echo "$@" >> requeued',
    "scancel": 'for c in $(cat /proc/$PPID/task/$PPID/children); do [ $c = $$ ] || kill -s "${{1#--signal=}}" $c; done',
    "torchrun": 'exec {python} -m torch.distributed.run "${{@/--nproc_per_node=8/--nproc_per_node=2}}"',
    "python": 'exec {python} "$@"',
}


@pytest.mark.parametrize("number", [0, 1])  # torchrun; plain python
def test_the_scripts_for_slurm_save_and_requeue(
    number: int, data: Path, whole: Path, tmp_path: Path
) -> None:
    """The README's own text, told that its time is nearly up; then once more, to the end. No cluster: srun and scontrol are stood in for."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("    #!/bin/bash\n")[number + 1]
    text = "\n".join(line[4:] for line in text[: text.index("\n\n")].splitlines())
    assert " --dataset_root=ROOT/ILSVRC/Data/CLS-LOC/train --shuffle_bn --resume" in text
    text = text.replace(
        "--dataset_root=ROOT/ILSVRC/Data/CLS-LOC/train --shuffle_bn",
        " ".join(flags(data, tmp_path)),
    ).replace(":29500", f":{free_ports(1)[0]}")
    (tmp_path / "job.sh").write_text(text.replace("train.py", str(ROOT / "train.py")))
    for name, content in STAND_INS.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + content.format(python=sys.executable) + "\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "OMP_NUM_THREADS": "1",
    }
    with started("bash", "job.sh", cwd=tmp_path, env=environment) as job:
        wait(job, lambda: rows(tmp_path) >= 1)
        os.kill(
            job.pid if number == 0 else children(job)[0], signal.SIGUSR1
        )  # B:USR1 is for the shell, USR1 for what srun started
        out, _ = job.communicate(timeout=60)
    assert (
        "saved; continue with --resume" in out
        and (tmp_path / "requeued").read_text() == "requeue 17\n"
    ), out
    step = utils.load_checkpoint(last(tmp_path))["step"]
    again = subprocess.run(
        ["bash", "job.sh"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert f"resumed after step {step}" in again.stdout and 5 <= step < STEPS, again.stderr
    assert (
        utils.load_checkpoint(last(tmp_path))["step"] == STEPS
        and (tmp_path / "requeued").read_text() == "requeue 17\n"
    )
    if number == 1:
        assert_same(tmp_path, whole)
