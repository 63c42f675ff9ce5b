"""benchmarks/claims.py on miniature data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench import FOLDER, load
from evaluation_data import class_folders, fabricated_run
from miniature import write_fashion_mnist
from scripts import run

from utils import UserError

TINY = [
    "--num_keys=16",
    "--batch_size=20",
    "--bn_groups=2",
    "--max_epoch=2",
    "--save_weight_epoch=1",
    "--log_every=1",
]


def claims(
    place: Path, *flags: str, more: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    own = ["--output_root=output", "--result_path=img", "--device=cpu", "--lanes=2"]
    own += ["--seeds", "3", "--versions", "M0", "M3"]
    return subprocess.run(
        [sys.executable, FOLDER / "claims.py", "data", *own, *flags, "--", *TINY, *(more or [])],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_experiment_runs_through_and_another_does_not_pass_for_it(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "data", train=40, test=20)
    done = claims(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = tmp_path / "output" / "CIFAR-10"
    results = {path: path.read_text() for path in runs.glob("*/eval/*/result.json")}
    assert {str(path.parent.relative_to(runs)) for path in results} == {
        "M0-seed3/eval/epoch_0002",
        "M3-seed3/eval/epoch_0001",
        "M3-seed3/eval/epoch_0002",
        "M3-seed3/eval/random",
    }
    configs = [
        (runs / f"{version}-seed3" / "config.yaml").read_text().splitlines()
        for version in ("M0", "M3")
    ]
    differences = {line.split(":")[0] for line in set(configs[0]) ^ set(configs[1])}
    assert differences == {"exp_version", "momentum"}
    assert len(list((tmp_path / "img").glob("*.png"))) >= 6
    assert json.loads((tmp_path / "img/data/versions.json").read_text())["untrained"]
    logs = [path.read_text() for path in sorted(runs.glob("*/log.csv"))]

    done = claims(tmp_path, more=["--lr=0.5"])  # another experiment is not this one
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "--resume with other settings" in last, done.stderr
    assert "lr 0.03 -> 0.5" in last
    assert [path.read_text() for path in sorted(runs.glob("*/log.csv"))] == logs
    assert {path: path.read_text() for path in runs.glob("*/eval/*/result.json")} == results


def test_untrained_encoders_are_measured_once_on_whatever_data(tmp_path: Path) -> None:
    for data in ("data", "other"):
        class_folders(tmp_path / data, seed=0, per_class=4)
    fabricated_run(tmp_path / "output", "v1", epochs=(3,))
    folder, has_baseline = tmp_path / "output/IMAGENET-64/v1", load("claims").has_baseline
    flags = ["--linear_epochs=1", "--knn_k=5", "--num_workers=0", "--device=cpu"]
    for data in ("data", "other"):
        root = str(tmp_path / data)
        places = [f"--encoder_output_root={tmp_path}/output", f"--dataset_root={root}"]
        assert not has_baseline(folder, root, 3)
        done = run("test", *flags, *places)
        assert done.returncode == 0, done.stderr
        assert has_baseline(folder, root, 3)


def test_what_is_wrong_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion_mnist(tmp_path / "data", train=40, test=20)
    monkeypatch.chdir(tmp_path)
    main = load("claims").main
    more = (["--preset", "mocov2"], ["--momentum=0.5"], ["--no-shuffle_bn"], ["--seed", "3"])
    wrong = [(["data", "--", *words], f"{words[0].split('=')[0]} after --") for words in more]
    wrong += [(["nowhere"], "'nowhere' is not a folder")]
    wrong += [(["data", "--lanes=0"], "--lanes 0 must be 1 or more")]
    for flags, words in wrong:
        with pytest.raises(UserError) as error:
            main(flags)
        assert words in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
