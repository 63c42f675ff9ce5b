"""Images that are not three channels of 8 bits: bands, deep values, transparency, rectangles."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import open_center, open_square, pixels, smooth, write_class, write_folders
from PIL import Image
from scripts import assert_one_line_error, run
from torchvision.transforms.v2 import functional as TF

import dataloader
from data.base import Pixels
from run import checkpoints
from utils import UserError

TINY = "--arch=resnet18 --crop=16 --feature_dim=8 --num_keys=16 --batch_size=8 --bn_groups=2"
TINY += " --log_every=2 --device=cpu --num_workers=0 --max_epoch=1"


def fetch(root: Path, *, resize: int = 32, fit: str = "square", crop: object = 16, **changes):
    """The images of a folder, decoded with some settings."""
    dataset = dataloader.open_dataset(
        str(root), "pretrain", fit=fit, resize=resize, crop=crop, pixels=Pixels(**changes)
    )
    batch = dataset.fetch(torch.arange(len(dataset)))
    assert not batch.failed
    return batch.images


def write_bands(path: Path, values: np.ndarray) -> None:
    import tifffile

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")


def write_deep_png(path: Path, values: np.ndarray) -> None:
    """An RGB PNG of 16 bits, which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width, _ = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize("name", ["a.npy", "first.npy", "a.tif"])
@pytest.mark.parametrize("bands", [2, 4, 13])
def test_every_band_arrives(tmp_path: Path, name: str, bands: int) -> None:
    values = pixels(0, 32, 32, bands)
    stored = values.transpose(2, 0, 1) if name == "first.npy" else values
    write_bands(tmp_path / "one" / name, stored)
    images = fetch(tmp_path, channels=bands)
    assert torch.equal(images[0], torch.from_numpy(values.transpose(2, 0, 1).copy()))


@pytest.mark.parametrize("name, bands", [("a.npy", 13), ("a.tif", 13), ("a.tif", 4), ("a.npy", 2)])
def test_a_band_is_never_dropped(tmp_path: Path, name: str, bands: int) -> None:
    write_bands(tmp_path / "one" / name, pixels(0, 32, 32, bands))
    with pytest.raises(UserError, match=f"has {bands} bands .* give --channels {bands}"):
        fetch(tmp_path)
    with pytest.raises(UserError, match="give --channels"):
        fetch(tmp_path, channels=5)


def test_one_band_stands_for_three_and_colours_become_grey(tmp_path: Path) -> None:
    colour = smooth(32, 32)
    write_class(tmp_path / "grey", ("a.png", colour.convert("L")))
    write_class(tmp_path / "colour", ("a.png", colour))
    grey = np.array(colour.convert("L"))
    assert torch.equal(fetch(tmp_path / "grey")[0], torch.from_numpy(grey).expand(3, 32, 32))
    assert torch.equal(fetch(tmp_path / "colour", channels=1)[0, 0], torch.from_numpy(grey))


@pytest.mark.parametrize("mode, ending", [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp")])
@pytest.mark.parametrize("background", [0, 255, 90])
def test_transparency_shows_the_background(
    tmp_path: Path, mode: str, ending: str, background: int
) -> None:
    planes = [pixels(i, 32, 32) for i in range(len(mode))]
    image = Image.merge(mode, [Image.fromarray(plane) for plane in planes])
    write_class(tmp_path, (f"a.{ending}", image), lossless=True, exact=True)
    *colours, alpha = (plane.astype(float) for plane in planes)
    mixed = [(alpha * colour + (255 - alpha) * background) / 255 for colour in colours]
    expected = np.stack(mixed if len(mixed) == 3 else mixed * 3)
    found = fetch(tmp_path, background=background)[0].numpy()
    assert np.abs(found - expected).max() <= 1


def test_a_transparent_palette_shows_the_background(tmp_path: Path) -> None:
    image = smooth(32, 32).convert("P")
    write_class(tmp_path, ("a.png", image), transparency=bytes(256))
    assert (fetch(tmp_path, background=200) == 200).all()


@pytest.mark.parametrize("kind", ["grey.png", "grey.tif", "colour.png", "colour.tif", "grey.npy"])
@pytest.mark.parametrize("bits", [12, 16])
def test_values_of_more_than_8_bits_keep_their_range(
    tmp_path: Path, kind: str, bits: int, capsys: pytest.CaptureFixture
) -> None:
    """The range is that of the bits of the images looked at, and is told."""
    top = 2**bits - 1
    values = np.linspace(0, top, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint16)
    values = values if kind.startswith("colour") else values[..., 0]
    path = tmp_path / "one" / kind
    if kind == "colour.png":
        write_deep_png(path, values)
    elif kind.endswith((".npy", "colour.tif")):
        write_bands(path, values)
    else:
        write_class(tmp_path, (kind, Image.fromarray(values)))
    expected = values / top * 255
    expected = expected.transpose(2, 0, 1) if values.ndim == 3 else expected
    assert np.abs(fetch(tmp_path)[0].numpy() - expected).max() <= 0.51
    assert f"from 0 to {top} are taken" in capsys.readouterr().out
    found = fetch(tmp_path, value_range=(top / 2, top))[0].numpy()
    assert np.abs(found - (2 * expected - 255).clip(0)).max() <= 0.51
    assert "taken" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "low, high, taken", [(-1000, 3000, (-1000, 3000)), (0, 1, (0, 1)), (0, 200, (0, 255))]
)
def test_floating_point_values(tmp_path: Path, low: float, high: float, taken: tuple) -> None:
    values = np.linspace(low, high, 32 * 32).reshape(32, 32).astype(np.float32)
    values[0, 1] = np.nan
    write_bands(tmp_path / "one" / "a.npy", values)
    expected = (np.nan_to_num(values) - taken[0]) / (taken[1] - taken[0]) * 255
    assert np.abs(fetch(tmp_path)[0].numpy() - expected).max() <= 0.51


def test_a_folder_is_not_enlarged(tmp_path: Path) -> None:
    """32 px files are known as such; of many sizes the largest counts."""
    write_class(tmp_path / "small", *((f"{i}.jpg", smooth(32, 32)) for i in range(3)))
    many = [("a.png", smooth(20, 50)), ("b.png", smooth(40, 30))]
    write_class(tmp_path / "many", *many)
    for folder, square, center in (("small", 32, 32), ("many", 50, 30)):
        for crop in (24, 32, 64):
            dataset = open_square(tmp_path / folder, resize="auto", crop=crop)
            assert dataset.resize == min(2 * crop, square)
            dataset = open_center(tmp_path / folder, "pretrain", resize="auto", crop=crop)
            assert dataset.resize == max(crop, min(round(8 / 7 * crop), center))


@pytest.mark.parametrize("crop", [[16, 32], [30, 10]])
@pytest.mark.parametrize("size", [(64, 48), (40, 70)])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("margin", [0, 4])
def test_a_rectangular_centre_crop(
    tmp_path: Path, crop: list[int], size: tuple[int, int], orientation: int, margin: int
) -> None:
    """The largest rectangle of that shape, less the margin; of photographs that lie, too."""
    image, exif = smooth(*size), Image.Exif()
    exif[0x0112] = orientation
    write_class(tmp_path, ("a.png", image), exif=exif)
    upright = image.rotate(-90, expand=True) if orientation == 6 else image
    (height, width), (w, h) = crop, upright.size
    half = min(h / height, w / width) * min(crop) / (min(crop) + margin) / 2
    box = (w / 2 - half * width, h / 2 - half * height, w / 2 + half * width, h / 2 + half * height)
    expected = upright.resize((width, height), Image.Resampling.BILINEAR, box=box)
    found = fetch(tmp_path, fit="center", resize=min(crop) + margin, crop=crop)[0]
    assert (found.int() - TF.pil_to_tensor(expected).int()).abs().max() <= 1


def test_a_run_on_four_bands(tmp_path: Path) -> None:
    """From the error that names the flags, to features: each tool takes the channels it finds."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for label in range(2):
            for i in range(count):
                values = random.integers(0, 100 + 100 * label, (24, 24, 4), dtype=np.uint8)
                write_bands(tmp_path / "data" / split / f"class{label}" / f"{i}.npy", values)
    root, out = f"--dataset_root={tmp_path / 'data'}", f"--output_root={tmp_path / 'out'}"
    flags = [root, out, "--knn_every=1", "--vflip=0.5", "--rotate90=0.5", *TINY.split()]
    assert_one_line_error(run("train", *flags), "give --channels 4")
    refused = run("train", *flags, "--channels=4")
    assert_one_line_error(refused, "--channels 4 needs 4 values of --mean and of --std")
    proposed = refused.stderr.split("are: ")[1].split()
    mean, std = np.split(np.array([w for w in proposed if w[0] != "-"], float), 2)
    assert np.abs(mean - 0.29).max() < 0.03 and mean.shape == std.shape == (4,)
    flags += ["--channels=4", *proposed]
    done = run("train", *flags)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "IMAGENET-64" / "v1"
    again = run("train", *flags, "--init", str(folder / "checkpoints" / "last.pth.tar"),
                "--exp_version=again")  # fmt: skip
    assert again.returncode == 0, again.stderr
    where = [root, f"--encoder_output_root={tmp_path / 'out'}", "--device=cpu", "--num_workers=0"]
    for script in ("test", "visualize"):
        done = run(script, *where)
        assert done.returncode == 0, done.stderr
    last = folder / "checkpoints" / "last.pth.tar"
    done = run("export", str(last), str(tmp_path / "f"), f"--features={tmp_path / 'data'}")
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "f.npy").shape == (52, 512)


def test_a_run_packed_from_deep_images_says_its_range(tmp_path: Path) -> None:
    """The range is resolved once, and stands in the checkpoint and in the store."""
    write_folders(tmp_path / "data", classes=2, train=16, test=4, size=20)
    for path in (tmp_path / "data").rglob("*.png"):
        grey = np.asarray(Image.open(path).convert("L"), np.uint16)
        Image.fromarray(grey * 16).save(path)
    flags = [f"--output_root={tmp_path / 'out'}", *TINY.split(), "--crop", "16", "12"]
    first = run("train", f"--dataset_root={tmp_path / 'data'}", "--pack=auto", *flags)
    assert first.returncode == 0 and "from 0 to 4095 are taken" in first.stdout, first.stderr
    (packed,) = tmp_path.glob("*.pack")
    second = run("train", f"--dataset_root={packed}", "--exp_version=store", *flags)
    assert second.returncode == 0, second.stderr
    ends = []
    for version in ("v1", "store"):
        folder = tmp_path / "out" / "IMAGENET-64" / version
        ends.append(checkpoints.load(folder / "checkpoints" / "last.pth.tar"))
    assert [end["config"]["value_range"] for end in ends] == [[0.0, 4095.0]] * 2
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name])
    other = run("train", f"--dataset_root={packed}", "--value_range", "0", "100", *flags)
    assert_one_line_error(other, "was made with --value_range")
    other = run("train", f"--dataset_root={packed}", "--value_range", "7", "7", *flags)
    assert_one_line_error(other, "--value_range 7.0 7.0: black and white must differ")
