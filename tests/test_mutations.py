"""Every file that the scripts read, changed at random: they go on, or say what is wrong."""

import random
import shutil
import signal
from pathlib import Path

import pytest
from evaluation_data import class_folders
from mutations import mutate
from scripts import run
from training import TINY

CASES = 4  # of each file and reader, drawn from seeds
LIMIT_S = 300
RUN = "output/IMAGENET-64/v1"
LAST = f"{RUN}/checkpoints/last.pth.tar"
QUICK = ["--linear_epochs=2", "--linear_lrs=0.1", "--trials=2", "--knn_k=5", "--num_workers=0"]
QUICK += ["--device=cpu", "--encoder_output_root=output", "--dataset_root=data"]
TRAIN = ["train", "--dataset_root=data", *TINY, "--output_root=output"]
RESUME = [*TRAIN, "--max_epoch=3", "--knn_every=1", "--knn_images=10", "--pack=pack", "--resume"]
DRAW = ["visualize", *QUICK, "--result_path=img", "--report", "--figures", "loss", "accuracy"]
REDRAW = ["visualize", "--redraw", "--result_path=img", "--report"]
PREDICT = ["export", LAST, "x", "--features=data/test", "--num_workers=0", "--device=cpu"]
NEW = ["--output_root=new", "--max_epoch=1"]
READERS = [
    (LAST, RESUME),
    (LAST, ["test", *QUICK]),
    (LAST, ["export", LAST, "x.pth", "--format=torchvision"]),
    (LAST, [*TRAIN, *NEW, f"--init={LAST}"]),
    (f"{RUN}/log.csv", RESUME),
    (f"{RUN}/log.csv", DRAW),
    (f"{RUN}/config.yaml", DRAW),
    (f"{RUN}/config.yaml", [*TRAIN, f"--config={RUN}/config.yaml", *NEW]),
    (f"{RUN}/eval/epoch_0002/result.json", DRAW),
    (f"{RUN}/eval/random/result.json", ["test", *QUICK]),
    (f"{RUN}/eval/epoch_0002/accuracy.csv", DRAW),
    (f"{RUN}/eval/epoch_0002/confusion.csv", DRAW),
    (f"{RUN}/eval/epoch_0002/linear.pth.tar", [*PREDICT, "--predict"]),
    ("pack/store.json", [*TRAIN, *NEW, "--pack=pack"]),
    ("pack/rows", [*TRAIN, *NEW, "--dataset_root=pack"]),
    ("img/data/*.json", REDRAW),
    ("img/data/*.npz", REDRAW),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, and what the scripts make of it: output/, pack/ and img/; `whole` beside it."""
    place = tmp_path_factory.mktemp("mutations") / "place"
    place.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        class_folders(Path("data"), seed=0, per_class=40)
        train = ["--max_epoch=2", "--knn_every=1", "--knn_images=10", "--pack=pack"]
        for command in ([*TRAIN, *train], ["test", *QUICK], [*DRAW, "views", "filters"]):
            done = run(*command)
            assert done.returncode == 0, done.stderr
    shutil.copytree(place, place.with_name("whole"))
    return place


@pytest.mark.parametrize("number", range(len(READERS)))
def test_a_changed_file_is_one_line_or_harmless(
    number: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern, command = READERS[number]
    if command[-1] == "--predict":
        command = [*command, pattern]
    for seed in range(CASES):
        draw = random.Random(f"{number} {seed}")
        shutil.rmtree(place)
        shutil.copytree(place.with_name("whole"), place)
        monkeypatch.chdir(place)
        path = draw.choice(sorted(place.glob(pattern)))
        case = f"{command[0]} {path.name} {seed}: {mutate(path, draw)}"
        print(case)  # what a traceback is of
        signal.alarm(LIMIT_S)  # ends a test that hangs
        done = run(*command)
        signal.alarm(0)
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, (case, done)
        if done.returncode == 2:
            assert done.stderr.splitlines()[-1].startswith("error: "), (case, done)
