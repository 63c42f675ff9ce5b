"""benchmarks/claims.py on miniature data."""

import json
import subprocess
import sys
from pathlib import Path

from data import write_fashion_mnist
from evaluation_data import ROOT, class_folders, fabricated_run
from scripts import run


def claims(place: Path, *flags: str, more: list[str] | None = None) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "claims.py"),
        "data",
        "--output_root=output",
        "--result_path=img",
        "--device=cpu",
    ]
    tiny = [
        "--num_keys=16",
        "--batch_size=20",
        "--bn_groups=2",
        "--max_epoch=2",
        "--save_weight_epoch=1",
        "--log_every=1",
    ]
    return subprocess.run(
        [
            *command,
            "--seeds",
            "3",
            "--versions",
            "M0",
            "M3",
            "--lanes=2",
            *flags,
            "--",
            *tiny,
            *(more or []),
        ],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_experiment_runs_through_and_another_does_not_pass_for_it(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "data", train=40, test=20)
    done = claims(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = tmp_path / "output" / "FASHION-MNIST"
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
    assert {line.split(":")[0] for line in set(configs[0]) ^ set(configs[1])} == {
        "exp_version",
        "momentum",
    }  # equal but for that
    assert (
        len(list((tmp_path / "img").glob("*.png"))) >= 6
        and json.loads((tmp_path / "img/data/versions.json").read_text())["untrained"]
    )
    logs = [path.read_text() for path in sorted(runs.glob("*/log.csv"))]

    done = claims(tmp_path, more=["--lr=0.5"])  # another experiment is not this one
    assert (
        done.returncode == 2
        and "--resume with other settings" in done.stderr.splitlines()[-1]
        and "lr 0.03 -> 0.5" in done.stderr.splitlines()[-1]
    ), done.stderr
    assert [path.read_text() for path in sorted(runs.glob("*/log.csv"))] == logs and {
        path: path.read_text() for path in runs.glob("*/eval/*/result.json")
    } == results


def test_untrained_encoders_are_measured_once_on_whatever_data(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import claims as driver

    for data in ("data", "other"):
        class_folders(tmp_path / data, seed=0, per_class=4)
    fabricated_run(tmp_path / "output", "v1", epochs=(3,))
    run_folder, flags = (
        tmp_path / "output/IMAGENET-64/v1",
        [
            f"--encoder_output_root={tmp_path}/output",
            "--linear_epochs=1",
            "--knn_k=5",
            "--num_workers=0",
            "--device=cpu",
        ],
    )

    def left(data: str) -> bool:
        return bool(driver.untrained_command(run_folder, str(tmp_path / data), 3, ["test.py"]))

    for data in ("data", "other"):
        for encoder in ("trained", "random"):
            assert left(data)
            assert (
                run(
                    "test", *flags, f"--dataset_root={tmp_path / data}", f"--encoder={encoder}"
                ).returncode
                == 0
            )
        assert not left(data)


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "there" / "data", train=40, test=20)
    for more in (["--preset", "mocov2"], ["--momentum=0.5"], ["--no-shuffle_bn"], ["--seed", "3"]):
        done = claims(tmp_path / "there", more=more)
        assert (
            done.returncode == 2
            and len(done.stderr.strip().splitlines()) == 1
            and f"{more[0].split('=')[0]} after --" in done.stderr
        ), done.stderr
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["data"]
    for flags, words in (
        ([], "'data' is no folder"),
        (["--lanes=0"], "--lanes 0 must be 1 or more"),
    ):
        done = claims(tmp_path, *flags)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr
