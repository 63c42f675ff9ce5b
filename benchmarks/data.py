"""The input path: images per second and core from JPEG files to two normalised views, ours against torchvision's transforms per image.

    python benchmarks/data.py PHOTOS             a folder of photographs (any JPEG or PNG files below it); 5 minutes
    python benchmarks/data.py PHOTOS --growth    only: the packed store with 10 thousand, 100 thousand, 1 million images
    python benchmarks/data.py PHOTOS --detail    only: what is lost in views from a store of 96, 112, 128 px

From the photographs 500 x 375 JPEGs of quality 96 are cut into a temporary folder, as ImageNet's are. Everything runs in one process on one thread,
alternating; medians. `plain` is what the reference does: decode with Pillow, then RandomResizedCrop, RandomGrayscale, ColorJitter, flip, ToTensor
and Normalize of torchvision for each view, collated. `lightly` is its MoCoV1Transform, where lightly is installed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import augment
import dataloader
import utils

WIDTH, HEIGHT, CROP, BATCH, IMAGENET = 500, 375, 64, 64, 1_281_167


def write_jpegs(photos: Path, folder: Path, count: int) -> None:
    """Cut `count` images from all photographs below a folder, in turn: half of the picture's height, at random places."""
    sources = [
        path
        for path in sorted(photos.rglob("*"))
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.is_symlink()
    ]
    if not sources:
        sys.exit(f"error: no JPEG or PNG files below {str(photos)!r}: name a folder of photographs")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, path in enumerate(sources):
        image = Image.open(path).convert("RGB")
        for i in range(number, count, len(sources)):
            height = min(image.height, image.width * HEIGHT / WIDTH) * rng.uniform(0.4, 1)
            left, top = (
                rng.uniform(0, image.width - height * WIDTH / HEIGHT),
                rng.uniform(0, image.height - height),
            )
            box = (left, top, left + height * WIDTH / HEIGHT, top + height)
            image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box=box).save(
                folder / f"{i:05}.jpg", quality=96
            )


def plain(paths: list[str]) -> Callable[[list[int]], None]:
    one = T.Compose(
        [
            T.RandomResizedCrop(CROP, scale=(0.2, 1.0)),
            T.RandomGrayscale(p=0.2),
            T.ColorJitter(0.4, 0.4, 0.4, 0.4),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD),
        ]
    )

    def batch(indices: list[int]) -> None:
        views = []
        for i in indices:
            with open(paths[i], "rb") as file:
                image = Image.open(file).convert("RGB")
            views.append((one(image), one(image)))
        [torch.stack(view) for view in zip(*views)]

    return batch


def lightly(paths: list[str]) -> Callable[[list[int]], None] | None:
    try:
        from lightly.transforms import MoCoV1Transform
    except ImportError:
        return None
    transform = MoCoV1Transform(input_size=CROP)
    return lambda indices: (
        [
            torch.stack(view)
            for view in zip(*(transform(Image.open(paths[i]).convert("RGB")) for i in indices))
        ]
        and None
    )


def ours(dataset: dataloader.FolderImages | dataloader.PackedImages) -> Callable[[list[int]], None]:
    recipe, generator = augment.recipe("v1", CROP), torch.Generator()

    def batch(indices: list[int]) -> None:
        got = dataset.fetch(torch.tensor(indices))
        for _ in range(2):
            augment.augment(got.images, augment.draw(got.aspect, recipe, generator), recipe)

    return batch


def compare(candidates: dict[str, Callable[[list[int]], None]], n: int, repeats: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).split(BATCH)
    for repeat in range(repeats + 1):  # the first warms up
        for name, batch in candidates.items():
            start = time.perf_counter()
            batch(order[repeat % (n // BATCH)].tolist())
            if repeat:
                times[name].append(time.perf_counter() - start)
    print(
        "| two v1 views of 64 px from 500 x 375 JPEGs, one thread | plain = 1 | images/s |\n| --- | --- | --- |"
    )
    for name, own in times.items():
        speed = statistics.median(p / t for p, t in zip(times["plain"], own))
        print(f"| {name} | {speed:.2f} | {BATCH / statistics.median(own):,.0f} |", flush=True)


def detail(paths: list[str]) -> None:
    """Crops from a store against the same crops from the decoded file, before any colour operation, in 255ths."""
    recipe = augment.recipe("v1", CROP, grayscale=0.0, jitter_p=0.0, mean=(0, 0, 0), std=(1, 1, 1))
    print(
        f"\n| --resize | bytes an image | ImageNet ({IMAGENET:,}) | error of the views: mean, worst image's mean, worst pixel (of 255) |\n| --- | --- | --- | --- |"
    )
    for side in (96, 112, 128, 192):
        dataset, errors = (
            dataloader.FolderImages("x", paths, [0] * len(paths), ["a"], "square", side, CROP),
            [],
        )
        for i, path in enumerate(paths[:256]):
            stored = dataset.fetch(torch.tensor([i]))
            whole = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[
                None
            ]
            params = augment.draw(stored.aspect, recipe, utils.generator(0, "detail", i))
            a, b = (augment.augment(images, params, recipe) for images in (stored.images, whole))
            errors.append(255 * (a - b).abs())
        means = [float(error.mean()) for error in errors]
        print(
            f"| {side} | {side * side * 3:,} | {IMAGENET * side * side * 3 / 1e9:.1f} GB | {statistics.fmean(means):.2f}, {max(means):.2f}, {max(float(e.max()) for e in errors):.0f} |"
        )


def growth(folder: Path, repeats: int) -> None:
    """Two views of batches of 256 from stores of 32 px, from the start of an epoch on, its order included."""
    recipe, generator, stores = augment.recipe("v1", 32), torch.Generator(), {}
    for n in (10_000, 100_000, 1_000_000):
        place = folder / str(n)
        place.mkdir()
        np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8).tofile(
            place / "images.u8"
        )
        rows = np.zeros(n, dataloader.STORE_ROWS)
        rows["aspect"], rows["readable"] = 1, True
        rows.tofile(place / "rows")
        stores[n] = dataloader.PackedImages(
            place, {"name": "x", "classes": ["a"], "resize": 32, "images": n, "unreadable": []}
        )

    def one_epoch(store: dataloader.PackedImages, epoch: int) -> Iterator[dataloader.Batch]:
        """Whole epochs, as many as make a million images: the order of each is drawn once."""
        for e in range(10**6 // len(store)):
            yield from dataloader.iterate(
                store,
                dataloader.epoch_batches(len(store), 250, 0, epoch + e),
                num_workers=0,
                failures=dataloader.Failures(10),
            )

    times: dict[int, list[float]] = {n: [] for n in stores}
    for repeat in range(repeats):
        for n, store in stores.items():
            start = time.perf_counter()
            for batch in one_epoch(store, 1000 * repeat):
                augment.augment(batch.images, augment.draw(batch.aspect, recipe, generator), recipe)
            times[n].append(time.perf_counter() - start)
    print(
        "\n| packed images (32 px) | time for a million images, 10 thousand = 1 | images/s |\n| --- | --- | --- |"
    )
    for n, own in times.items():
        ratio = statistics.median(t / first for t, first in zip(own, times[10_000]))
        print(f"| {n:,} | {ratio:.3f} | {10**6 / statistics.median(own):,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--detail", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    made_by = utils.provenance()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(
            f"commit {made_by['commit']}, torch {made_by['torch']}, {torch.backends.cpu.get_cpu_capability()}; medians of {args.repeats}\n"
        )
        if not args.growth:
            write_jpegs(args.photos, folder / "data" / "a", args.images)
            dataset = dataloader.open_dataset(
                str(folder / "data"), "pretrain", view="square", resize="auto", crop=CROP
            )
            paths = [dataset.paths[i] for i in range(len(dataset))]
            print(
                f"{len(paths)} JPEGs, {statistics.fmean(Path(path).stat().st_size for path in paths) / 1e3:.0f} kB on average\n"
            )
        if not (args.growth or args.detail):
            store = dataloader.packed(dataset, str(folder / "data"), "auto", 2)
            candidates = {
                "plain": plain(paths),
                "lightly": lightly(paths),
                "ours, files": ours(dataset),
                "ours, packed": ours(store),
            }
            compare(
                {name: batch for name, batch in candidates.items() if batch},
                len(paths),
                args.repeats,
            )
        if not args.growth:
            detail(paths)
        if not args.detail:
            growth(folder, 3)


if __name__ == "__main__":
    main()
