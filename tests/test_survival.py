"""What a run survives: signals, kills, a second run in its folder, numbers gone wrong."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from scripts import assert_last_line_is_error, assert_one_line_error, free_ports, run
from survival import (
    ROOT,
    STEPS,
    TRAIN,
    assert_same,
    children,
    flags,
    home,
    last,
    rows,
    run_whole,
    started,
    wait,
    workers,
    write_data,
)

import utils
from run import checkpoints
from run.log import COLUMNS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_whole(data, tmp_path_factory.mktemp("whole"))


# SIGTERM: test_train_resume.py; with torchrun: test_parallel*.py
@pytest.mark.parametrize(
    "number, status", [(signal.SIGUSR1, 138), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_the_resumed_run_is_the_same(
    number: int, status: int, data: Path, whole: Path, tmp_path: Path
) -> None:
    """Sent to the whole group of processes, as a terminal does: workers take no notice."""
    with started(*TRAIN, *flags(data, tmp_path, "--num_workers=2")) as process:
        wait(process, lambda: rows(tmp_path) >= 1)
        for worker in children(process):  # so that the run comes to wait for them
            os.kill(worker, signal.SIGSTOP)
        time.sleep(0.5)
        os.killpg(process.pid, number)
        os.killpg(process.pid, signal.SIGCONT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in out, out
    step = checkpoints.load(last(tmp_path))["step"]
    assert f"stopped by signal {int(number)} after step {step}: saved" in out.splitlines()[-1]
    assert 5 <= step < STEPS
    assert run("train", *flags(data, tmp_path, "--resume")).returncode == 0
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("moment", ["training", "kNN", "first queue"])
def test_a_signal_ends_a_run_that_waits_for_data(
    moment: str, data: Path, whole: Path, tmp_path: Path
) -> None:
    """The workers hang, as on a file system that has gone; nothing that was trained is lost."""
    more = ["--knn_every=1", "--knn_images=10", "--log_every=1"] if moment == "kNN" else []
    command = flags(data, tmp_path, "--num_workers=2", *more)
    with started(*TRAIN, *command) as process:
        if moment == "training":
            wait(process, lambda: rows(tmp_path) >= 1)
        else:
            wait(process, lambda: len(workers(process)) == 2)
        for worker in workers(process):
            os.kill(worker, signal.SIGSTOP)
        time.sleep(2.0)
        process.terminate()
        out, _ = process.communicate(timeout=50)
    assert process.returncode == 143 and "Traceback" not in out, out
    if moment != "training":
        assert "stopped by signal 15 before the first step" in out, out
        return
    assert f"after step {checkpoints.load(last(tmp_path))['step']}: saved" in out, out
    assert run("train", *flags(data, tmp_path, "--resume")).returncode == 0
    assert_same(tmp_path, whole)


def test_one_run_in_a_folder(data: Path, tmp_path: Path) -> None:
    """A second one is told who is there, and changes nothing."""
    command = flags(data, tmp_path, "--num_workers=2", "--save_every_minutes=0")
    with started(*TRAIN, *command) as process:
        wait(process, last(tmp_path).exists)
        stop_workers(process, tmp_path)
        last(tmp_path).write_bytes(b"a checkpoint that is being written: nobody looks at it")
        files = [path for path in home(tmp_path).rglob("*") if path.is_file()]
        before = {path: path.read_bytes() for path in files}
        for how in ("--resume", "--overwrite"):
            done = run("train", *flags(data, tmp_path, how))
            who = f"in use by process {process.pid} on "
            assert_one_line_error(done, who, "another --exp_version")
        files = [path for path in home(tmp_path).rglob("*") if path.is_file()]
        assert {path: path.read_bytes() for path in files} == before


def test_workers_that_outlive_their_run_hold_nothing(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    command = flags(data, tmp_path, "--num_workers=2", "--save_every_minutes=0")
    with started(*TRAIN, *command) as process:
        wait(process, last(tmp_path).exists)
        workers = stop_workers(process, tmp_path)
        process.kill()
        process.wait()
        assert all(Path(f"/proc/{worker}").exists() for worker in workers)
        again = run("train", *flags(data, tmp_path, "--resume"))
        assert again.returncode == 0 and "resumed after step" in again.stdout, again.stderr
        assert all(Path(f"/proc/{worker}").exists() for worker in workers)
    assert_same(tmp_path, whole)


def test_a_second_ctrl_c_quits_at_once() -> None:
    """Even a process that would never come to the end of its step."""
    code = "import run.signals as s, time; s.StopSignal(); print('up', flush=True)"
    with started(sys.executable, "-c", f"{code}\nwhile True: time.sleep(1)") as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        assert process.poll() is None, "the first one waits for the step"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130


def stop_workers(process: subprocess.Popen, out: Path) -> list[int]:
    """Halt a run in the middle of a step, with no save under way."""
    workers = children(process)
    assert len(workers) >= 2
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    time.sleep(1.0)
    wait(process, lambda: not list(home(out).rglob("*.tmp")))
    return workers


def test_killed_inside_a_save_and_at_random(data: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL twice; the end is as if nothing had been. benchmarks/soak.py does it more often."""
    command = flags(data, tmp_path, "--save_every_minutes=0", "--resume")
    half = home(tmp_path) / "checkpoints"
    for moment in ("in a save", "at random"):
        with started(*TRAIN, *command) as process:
            wait(process, lambda: rows(tmp_path) >= 1)
            if moment == "in a save":
                wait(process, lambda: list(half.glob(".last.pth.tar.*.tmp")))
            else:
                time.sleep(random.uniform(0, 1))
            process.kill()
            process.wait()
        if moment == "in a save":
            assert list(half.glob(".last.pth.tar.*.tmp")), "half a file lies there"
        assert checkpoints.load(last(tmp_path))["step"] >= 1
        utils.read_csv(home(tmp_path) / "log.csv", COLUMNS)
    assert run("train", *command).returncode == 0
    assert_same(tmp_path, whole)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_flipped_bit_is_noticed(data: Path, whole: Path, tmp_path: Path) -> None:
    """torch.load would take it: the checksums of the archive tell."""
    command = flags(data, tmp_path, "--save_weight_epoch=1")
    assert run("train", *command, "--max_epoch=2").returncode == 0
    content = bytearray(last(tmp_path).read_bytes())
    content[len(content) // 2] ^= 1
    last(tmp_path).write_bytes(content)
    torch.load(last(tmp_path), weights_only=True)
    done = run("train", *command, "--resume")
    assert done.returncode == 0 and "checksum" in done.stderr, done.stderr
    assert "going on from epoch_0001" in done.stderr  # the last one is epoch 2's file
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_stops_before_a_save(
    precision: str, data: Path, tmp_path: Path
) -> None:
    """The rate of a sound checkpoint is raised in its file: one step with it ruins the weights."""
    base = flags(data, tmp_path, f"--precision={precision}")
    assert run("train", *base, "--max_epoch=1").returncode == 0
    content = torch.load(last(tmp_path), weights_only=True)
    content["config"]["lr"] = 1e38
    torch.save(content, last(tmp_path))
    before, good = last(tmp_path).read_bytes(), f"the last good checkpoint is {last(tmp_path)}"
    base += ["--resume", "--lr=1e38"]
    done = run("train", *base)
    assert_last_line_is_error(done, f"the loss of step 7 was not finite: {good}")
    done = run("train", *base, "--save_every_minutes=0")  # a save follows the ruinous step
    assert_last_line_is_error(done, f"step 6 encoder_q.conv1.weight is not finite: {good}")
    assert last(tmp_path).read_bytes() == before


# -------------------------------------------------------------------------------- on a cluster

STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scontrol": '[ "$1" = show ] && echo localhost || echo "$@" >> requeued',
    "scancel": "for c in $(cat /proc/$PPID/task/$PPID/children); do\n"
    '[ $c = $$ ] || kill -s "${{1#--signal=}}" $c; done',
    "torchrun": "exec {python} -m torch.distributed.run "
    '"${{@/--nproc_per_node=8/--nproc_per_node=2}}"',
    "python": 'exec {python} "$@"',
}


@pytest.mark.parametrize("launcher", ["torchrun", "python"])
def test_the_scripts_for_slurm_save_and_requeue(
    launcher: str, data: Path, whole: Path, tmp_path: Path
) -> None:
    """The documented text, told that its time is nearly up; then once more, to the end.

    No cluster: srun and scontrol are stood in for.
    """
    write_job(launcher, data, tmp_path)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "OMP_NUM_THREADS": "1",
    }
    how = {"cwd": tmp_path, "env": environment}
    with started("bash", "job.sh", **how) as job:
        wait(job, lambda: rows(tmp_path) >= 1)
        # B:USR1 is for the shell, USR1 for what srun started
        os.kill(job.pid if launcher == "torchrun" else children(job)[0], signal.SIGUSR1)
        out, _ = job.communicate(timeout=60)
    assert "saved; continue with --resume" in out, out
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    step = checkpoints.load(last(tmp_path))["step"]
    again = subprocess.run(["bash", "job.sh"], **how, capture_output=True, text=True, timeout=100)
    assert f"resumed after step {step}" in again.stdout and 5 <= step < STEPS, again.stderr
    assert checkpoints.load(last(tmp_path))["step"] == STEPS
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    if launcher == "python":
        assert_same(tmp_path, whole)


def write_job(launcher: str, data: Path, folder: Path) -> None:
    """job.sh as documented, but with a small run and commands that stand in for Slurm's."""
    text = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    scripts = [part.partition("\n```")[0] for part in text.split("```sh\n#!/bin/bash\n")[1:]]
    text = next(script for script in scripts if f" {launcher} " in script)
    documented = "--dataset_root=ROOT/ILSVRC/Data/CLS-LOC/train --shuffle_bn"
    assert f" {documented} --resume" in text
    text = text.replace(documented, " ".join(flags(data, folder)))
    text = text.replace(":29500", f":{free_ports(1)[0]}")
    text = text.replace("train.py", str(ROOT / "train.py"))
    (folder / "job.sh").write_text(text)
    for name, content in STAND_INS.items():
        path = folder / name
        path.write_text("#!/bin/bash\n" + content.format(python=sys.executable) + "\n")
        path.chmod(0o755)
