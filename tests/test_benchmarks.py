"""Each script of benchmarks/ explains itself, knows the flags of the pages, and runs on little."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import FOLDER, NAMES, load
from miniature import write_fashion_mnist
from pages import read, shell_words
from PIL import Image
from scripts import Done, run

import utils
from data import shapes


def table(output: str, header: str) -> list[list[str]]:
    """The cells of the rows below a header in Markdown."""
    lines = output.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {header}")) + 2
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append(line.strip("| ").split(" | "))
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_a_script_explains_the_flags_that_the_pages_give_it(
    name: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        load(name).main(["--help"])
    help = capsys.readouterr().out
    assert stop.value.code == 0 and f"python benchmarks/{name}.py" in help
    for text in shell_words():
        if f"benchmarks/{name}.py" in text:
            own = text.partition(f"benchmarks/{name}.py")[2].partition(" -- ")[0]
            for flag in re.findall(r"--\w+", own):
                assert flag in help, text


STEP = ["--side=16", "--batch=4", "--groups", "1", "2", "--repeats=1", "--device=cpu"]


def test_step_compares_all_candidates(capsys: pytest.CaptureFixture) -> None:
    load("step").main([*STEP, "--arch=resnet18", "--keys=16"])
    rows = table(capsys.readouterr().out, "job")
    names = [row[1] for row in rows]
    assert names[:3] == ["plain", "ours G 1", "ours G 2"]
    assert rows[0][2] == "1.00" and rows[1][3] == "1.00"


def test_step_grows_with_the_queue_and_has_a_limit(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = load("step")
    step.main([*STEP, "--arch=resnet18", "--keys", "16", "32"])
    assert [row[0] for row in table(capsys.readouterr().out, "resnet18")] == ["16", "32"]
    monkeypatch.setitem(step.PROBES, "cpu", (64, 2**12))
    step.main([*STEP, "--arch=resnet18", "--keys=16", "--limit"])
    out = capsys.readouterr().out
    assert "G operations, at" in out and "GB/s" in out


def test_the_pages_have_the_bytes_that_scaling_computes(capsys: pytest.CaptureFixture) -> None:
    load("scaling").main(["--bytes"])
    computed = table(capsys.readouterr().out, "GPUs")
    assert len(computed) == 4 and computed == table(read(FOLDER / "README.md"), "GPUs")


def test_scaling_measures_a_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = load("scaling")
    little = ["--batch_size=1000", "--crop=8", "--resize=8", "--num_keys=16", "--log_every=1"]
    monkeypatch.setattr(scaling, "FLAGS", [*scaling.FLAGS, *little])
    assert scaling.images_per_second([], 1, tmp_path) > 0


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


def test_the_input_path(
    photos: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, threads = load("data"), torch.get_num_threads()
    monkeypatch.setattr(data, "SIDES", (96, 128))
    monkeypatch.setattr(data, "STORES", (250, 500))
    data.main([str(photos), "--images=64", "--repeats=1"])
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    speeds = {row[0]: float(row[1]) for row in table(out, "two v1 views")}
    assert {"plain", "ours, files", "ours, packed"} <= speeds.keys() and speeds["plain"] == 1
    errors = [[float(cell) for cell in row[3:]] for row in table(out, "`--resize`")]
    assert len(errors) == 2 and errors[0][0] > errors[1][0] > 0  # a larger store loses less
    assert [row[0] for row in table(out, "packed images")] == ["250", "500"]


def test_protocols_and_knn(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fashion_mnist(tmp_path / "data", train=80, test=20)
    flags = ["--arch=resnet18", "--crop=16", "--num_keys=16", "--batch_size=16", "--bn_groups=1"]
    places = [f"--dataset_root={tmp_path / 'data'}", f"--output_root={tmp_path}"]
    done = run("train", *places, *flags, "--max_epoch=1", "--num_workers=0", "--device=cpu")
    assert done.returncode == 0, done.stderr
    evaluate = load("evaluate")
    monkeypatch.setattr(evaluate, "BANK", 300)
    monkeypatch.setattr(evaluate, "QUERIES", 50)
    checkpoint = tmp_path / "IMAGENET-64" / "v1" / "checkpoints" / "last.pth.tar"
    evaluate.main(
        [
            str(tmp_path / "data"),
            f"--pretrained={checkpoint}",
            "--seeds=0",
            "--epochs=1",
            "--fraction=0.5",
            "--device=cpu",
        ]
    )
    out = capsys.readouterr().out
    names = [row[1] for row in table(out, "seed")]
    assert names == ["cached", "original, lr 10", "original, lr 0.3", "reference, lr 30"]
    assert "kNN, 50 against 300, 512 wide" in out


def test_gpu_compares_devices(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison itself, of the CPU with the CPU; its runs are made in this process."""
    gpu, started = load("gpu"), []
    real = subprocess.run

    def in_process(command: list[str], **options: object) -> Done | subprocess.CompletedProcess:
        if "train.py" not in command:
            return real(command, **options)
        place = command.index("train.py")
        started.append(command[1:place])
        return run("train", *command[place + 1 :])

    little = ["--crop=8", "--resize=8", "--batch_size=20", "--num_keys=20", "--bn_groups=5"]
    monkeypatch.setattr(subprocess, "run", in_process)
    monkeypatch.setattr(shapes, "COUNT", {"pretrain": 40, "train": 40, "test": 10})
    monkeypatch.setattr(gpu, "FLAGS", [*gpu.FLAGS, *little])
    monkeypatch.setattr(gpu, "ONE_STEP", ["--precision=fp32", "--batch_size=21", "--bn_groups=1"])
    monkeypatch.setattr(gpu, "DEMO", ["--max_epoch=1"])
    monkeypatch.setattr(gpu, "DEMO_LOSS", 100)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--device=cpu"])
    rows = table(capsys.readouterr().out, "check")
    assert not stop.value.code and [row[3] for row in rows] == ["ok"] * 4
    assert [*gpu.TORCHRUN, "--nproc_per_node=1"] in started and started.count([]) == 5
    checks = gpu.Checks(Path(), "--device=cpu")
    checks.check("not a number", float("nan"), 1)
    assert checks.failed


def test_soak_finds_a_resumed_run_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    soak = load("soak")
    little = ["--crop=8", "--resize=8", "--num_keys=16", "--max_epoch=2", "--num_workers=0"]
    monkeypatch.setattr(soak, "FLAGS", [*soak.FLAGS, *little])
    write_images = soak.write_images
    monkeypatch.setattr(soak, "write_images", lambda folder: write_images(folder, n=64))
    with pytest.raises(SystemExit) as stop:
        soak.main(["--kills=1", "--seed=0", f"--out={tmp_path / 'soak'}"])
    out = capsys.readouterr().out
    assert not stop.value.code and "1 of 1 runs that were killed end bit-identical" in out
    assert sys.modules[soak.__name__] is soak and (tmp_path / "soak" / "result.json").exists()


def test_launches_are_counted_in_the_phase_in_which_they_were_made() -> None:
    launches = load("launches")
    table = launches.tally(
        [
            ("query forward", 0.0, 10.0),
            ("cudaLaunchKernel", 1.0, 2.0),
            ("cuLaunchKernelEx", 2.0, 3.0),
            ("aten::relu", 2.0, 3.0),
            ("backward", 11.0, 20.0),
            ("cudaMemcpyAsync", 12.0, 13.0),
            ("cudaStreamSynchronize", 21.0, 22.0),
            ("Memcpy HtoD (Pageable -> Device)", 15.0, 16.0),
            ("void a_kernel()", 4.0, 5.0),
        ]
    )
    assert table["query forward"]["launches"] == 2
    assert table["backward"]["copies"] == 1
    assert +table["all else"] == {"waits": 1, "pageable": 1}


def test_launches_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(utils.UserError, match="no GPU here"):
        load("launches").main([])
