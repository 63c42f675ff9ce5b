"""benchmarks/claims.py on miniature data: all of it once, and nothing twice."""

import json
import subprocess
import sys
from pathlib import Path

from data import write_fashion_mnist
from evaluation_data import ROOT


def claims(place: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "claims.py"), str(place / "data"), f"--output_root={place}/output", f"--result_path={place}/img", "--device=cpu", *flags]
    tiny = ["--num_keys=16", "--batch_size=20", "--bn_groups=2", "--max_epoch=2", "--save_weight_epoch=1", "--log_every=1"]
    return subprocess.run([*command, "--seeds", "3", "--versions", "M0", "M3", "--lanes=2", "--", *tiny], capture_output=True, text=True, timeout=300)


def test_the_experiment_runs_through_and_is_not_run_twice(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "data", train=40, test=20)
    done = claims(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = tmp_path / "output" / "FASHION-MNIST"
    results = {path: path.read_text() for path in runs.glob("*/eval/*/result.json")}
    assert {str(path.parent.relative_to(runs)) for path in results} == {"M0-seed3/eval/epoch_0002", "M3-seed3/eval/epoch_0001", "M3-seed3/eval/epoch_0002", "M3-seed3/eval/random"}
    configs = [(runs / f"{version}-seed3" / "config.yaml").read_text().splitlines() for version in ("M0", "M3")]
    assert {line.split(":")[0] for line in set(configs[0]) ^ set(configs[1])} == {"exp_version", "momentum"}  # equal but for that
    assert len(list((tmp_path / "img").glob("*.png"))) >= 6 and json.loads((tmp_path / "img/data/versions.json").read_text())["untrained"]
    logs = [path.read_text() for path in sorted(runs.glob("*/log.csv"))]

    (runs / "M3-seed3/eval/random/result.json").unlink()
    done = claims(tmp_path)
    assert done.returncode == 0 and "1 of them done" in done.stdout and (runs / "M3-seed3/eval/random/result.json").exists(), done.stderr
    assert [path.read_text() for path in sorted(runs.glob("*/log.csv"))] == logs
    assert (runs / "M0-seed3/eval/epoch_0002/result.json").read_text() == results[runs / "M0-seed3/eval/epoch_0002/result.json"]


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    done = claims(tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "is no folder" in lines[0], done.stderr
