"""Features of any images: whose rows they are, which images are near, and what they show."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from miniature import write_folders
from scripts import assert_one_line_error, run
from weight_files import our_checkpoint

import encoders
from data.base import Size
from data.folders import FolderImages

FLAGS = ["--crop=32", "--num_workers=0", "--device=cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, labelled images, and 120 images in a tree without any order, one broken."""
    root = tmp_path_factory.mktemp("features")
    our_checkpoint(root / "last.pth.tar")
    write_folders(root / "data", classes=2, train=60, test=8, size=40)
    tree = root / "tree"
    (tree / "a, b" / "deep").mkdir(parents=True)
    for i, path in enumerate(sorted((root / "data" / "train").rglob("*.png"))):
        folder = (tree, tree / "a, b", tree / "a, b" / "deep")[i % 3]
        shutil.copy(path, folder / f"{i}.png")
    os.rename(tree / "0.png", os.fsencode(tree) + b"/caf\xe9.png")
    (tree / "3.png").write_bytes(b"no image")
    return root


def export(place: Path, out: Path, *flags: str):
    return run("export", place / "last.pth.tar", out, *FLAGS, *flags)


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(f"{out}.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_features_are_those_of_a_plain_loop(place: Path, tmp_path: Path) -> None:
    done = export(place, tmp_path / "f.npy", f"--features={place}/tree", "--batch_size=50")
    assert done.returncode == 0, done.stderr
    assert "3.png' cannot be read as an image: it is left out" in done.stderr
    found, rows = np.load(tmp_path / "f.npy"), rows_of(tmp_path / "f")
    assert found.dtype == np.float32 and found.shape == (119, 512) and len(rows) == 119
    assert [int(row["row"]) for row in rows] == list(range(119))
    paths = [row["path"] for row in rows]
    files = {str(path) for path in (place / "tree").rglob("*.png")}
    assert set(paths) == files - {str(place / "tree" / "3.png")}
    loaded = encoders.load(place / "last.pth.tar")
    images = FolderImages(paths, [-1] * 119, [], Size("center", "auto", 32))
    pixels = images.fetch(torch.arange(119)).images / 255
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (loaded.settings.mean, loaded.settings.std)
    )
    with torch.no_grad():
        expected = loaded.encoder.eval()((pixels - mean) / std)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_the_nearest_images_are_shown(place: Path, tmp_path: Path) -> None:
    query = place / "tree" / "a, b" / "1.png"
    flags = [f"--features={place}/tree", f"--nearest={query}"]
    done = export(place, tmp_path / "f", *flags)
    assert done.returncode == 0, done.stderr
    shown = [line.split("    ") for line in done.stdout.splitlines()[-10:]]
    unit = F.normalize(torch.from_numpy(np.load(tmp_path / "f.npy")), dim=1)
    paths = [row["path"] for row in rows_of(tmp_path / "f")]
    cosines = unit @ unit[paths.index(str(query))]
    assert shown[0] == ["1.000", str(query)]
    assert [c for c, _ in shown] == [f"{c:.3f}" for c in cosines.topk(10).values.tolist()]
    assert_one_line_error(export(place, tmp_path / "f", *flags), "--overwrite")
    done = export(place, tmp_path / "one", f"--features={query}")
    assert done.returncode == 0 and np.load(tmp_path / "one.npy").shape == (1, 512)


@pytest.mark.parametrize("finetune", [False, True])
def test_a_classifier_names_the_classes(finetune: bool, place: Path, tmp_path: Path) -> None:
    more = ["--finetune", "--linear_batch_size=16"] if finetune else []
    done = run(
        "test",
        f"--pretrained={place}/last.pth.tar",
        f"--dataset_root={place}/data",
        f"--encoder_output_root={tmp_path}",
        *FLAGS,
        *["--linear_epochs=1", "--linear_lrs=0.1", "--trials=1", "--knn_k=5"],
        *more,
    )
    assert done.returncode == 0, done.stderr
    (linear,) = tmp_path.rglob("linear.pth.tar")
    content = torch.load(linear, weights_only=True)
    checkpoint = linear if finetune else place / "last.pth.tar"
    flags = [f"--features={place}/tree", f"--predict={linear}"]
    done = run("export", checkpoint, tmp_path / "p", *FLAGS, *flags)
    assert done.returncode == 0, done.stderr
    features = torch.from_numpy(np.load(tmp_path / "p.npy"))
    logits = features @ content["weight"][0].T + content["bias"][0]
    expected = logits.softmax(dim=1).max(dim=1)
    rows = rows_of(tmp_path / "p")
    assert [row["class"] for row in rows] == [content["classes"][i] for i in expected.indices]
    assert [float(row["probability"]) for row in rows] == pytest.approx(
        expected.values.tolist(), abs=1e-4
    )
    if finetune:
        done = run("export", linear, tmp_path / "e.pth", "--format=timm")
        assert done.returncode == 0, done.stderr
        state = torch.load(tmp_path / "e.pth", weights_only=True)
        assert all(torch.equal(v, content["encoders"][0][name]) for name, v in state.items())


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--format TOOL", "--features IMAGES"]),
        (["--format=timm", "--features=x"], ["one of the two"]),
        (["--format=timm", "--nearest=x.png"], ["need --features"]),
        (["--features=nowhere"], ["'nowhere' has no images"]),
    ],
)
def test_bad_flags_are_one_line(
    flags: list[str], words: list[str], place: Path, tmp_path: Path
) -> None:
    assert_one_line_error(export(place, tmp_path / "x", *flags), *words)
    assert not list(tmp_path.iterdir())


def test_a_classifier_of_another_width_is_refused(place: Path, tmp_path: Path) -> None:
    content = {"weight": torch.zeros(1, 2, 7), "bias": torch.zeros(1, 2), "classes": ["a", "b"]}
    torch.save(content, tmp_path / "linear.pth.tar")
    flags = [f"--features={place}/tree", f"--predict={tmp_path}/linear.pth.tar"]
    assert_one_line_error(export(place, tmp_path / "x", *flags), "width 7, not 512")
    flags[1] = f"--predict={place}/last.pth.tar"
    assert_one_line_error(export(place, tmp_path / "x", *flags), "no linear.pth.tar")
