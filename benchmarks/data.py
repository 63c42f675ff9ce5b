"""The input path: images per second, from JPEG files to two normalised views, on one core.

    python benchmarks/data.py PHOTOS             all of it, in 5 minutes
    python benchmarks/data.py PHOTOS --growth    only: packed stores of up to 1 million images
    python benchmarks/data.py PHOTOS --cold      only: a store that no memory holds
    python benchmarks/data.py PHOTOS --detail    only: what is lost in views from a packed store

PHOTOS is a folder with photographs, JPEG or PNG, anywhere below it. From them 500 x 375 JPEGs of
quality 96 are cut into a temporary folder, as ImageNet's are. Everything runs in one process on
one thread, alternating; medians. `plain` is what the reference does: decode with Pillow, then
RandomResizedCrop, RandomGrayscale, ColorJitter, flip, ToTensor and Normalize of torchvision for
each view, collated. `lightly` is its MoCoV1Transform, where lightly is installed.
"""

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
from common import alternate, build_parser, print_header, print_row, ratio
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import augment
import dataloader
import utils
from data import store
from data.base import Dataset, Size
from data.failures import Failures

WIDTH, HEIGHT, CROP, BATCH, IMAGENET = 500, 375, 64, 64, 1_281_167
SIDES = (96, 112, 128, 192)  # of the stores whose detail is compared
STORES = (10_000, 100_000, 1_000_000)  # images in those that grow


def write_jpegs(photos: Path, folder: Path, count: int) -> None:
    """Cut `count` images out of all photographs below a folder, in turn, at random places."""
    endings = (".jpg", ".jpeg", ".png")
    files = (path for path in sorted(photos.rglob("*")) if not path.is_symlink())
    sources = [path for path in files if path.suffix.lower() in endings]
    if not sources:
        raise utils.UserError(f"no JPEG or PNG files below {str(photos)!r}: name another folder")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, path in enumerate(sources):
        image = Image.open(path).convert("RGB")
        for i in range(number, count, len(sources)):
            height = min(image.height, image.width * HEIGHT / WIDTH) * rng.uniform(0.4, 1)
            width = height * WIDTH / HEIGHT
            left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
            box = (left, top, left + width, top + height)
            cut = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box=box)
            cut.save(folder / f"{i:05}.jpg", quality=96)


# ------------------------------------------------- candidates: indices of a batch -> two views

Candidate = Callable[[list[int]], object]


def plain(paths: list[str]) -> Candidate:
    transform = T.Compose(
        [
            T.RandomResizedCrop(CROP, scale=(0.2, 1.0)),
            T.RandomGrayscale(p=0.2),
            T.ColorJitter(0.4, 0.4, 0.4, 0.4),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD),
        ]
    )

    def make_views(indices: list[int]) -> list[torch.Tensor]:
        pairs = []
        for i in indices:
            with open(paths[i], "rb") as file:
                image = Image.open(file).convert("RGB")
            pairs.append((transform(image), transform(image)))
        return [torch.stack(views) for views in zip(*pairs, strict=True)]

    return make_views


def lightly(paths: list[str]) -> Candidate | None:
    try:
        from lightly.transforms import MoCoV1Transform
    except ImportError:
        return None
    transform = MoCoV1Transform(input_size=CROP)

    def make_views(indices: list[int]) -> list[torch.Tensor]:
        pairs = [transform(Image.open(paths[i]).convert("RGB")) for i in indices]
        return [torch.stack(views) for views in zip(*pairs, strict=True)]

    return make_views


def ours(dataset: Dataset) -> Candidate:
    recipe, generator = augment.recipe("v1", CROP), torch.Generator()

    def make_views(indices: list[int]) -> list[torch.Tensor]:
        batch = dataset.fetch(torch.tensor(indices))
        params = [augment.draw(batch.aspect, recipe, generator) for _ in range(2)]
        return [augment.augment(batch.images, each, recipe) for each in params]

    return make_views


def compare(candidates: dict[str, Candidate], images: int, repeats: int) -> None:
    """Images per second of each candidate; all see the same batches."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    batches = [batch.tolist() for batch in order.split(BATCH) if len(batch) == BATCH]

    def on_batches(make_views: Candidate) -> Callable[[], object]:
        endless = itertools.cycle(batches)
        return lambda: make_views(next(endless))

    runs = {name: on_batches(candidate) for name, candidate in candidates.items()}
    times = alternate(runs, repeats, warm_up=1)
    print_header("two v1 views of 64 px from 500 x 375 JPEGs, one thread", "plain = 1", "images/s")
    for name, own in times.items():
        speed = ratio(times["plain"], own)
        print_row(name, f"{speed:.2f}", f"{BATCH / statistics.median(own):,.0f}")


# ------------------------------------------------------------------- what a packed store loses


def detail(folder: Path, images: int) -> None:
    """Crops from a store against those from the decoded file, before any colour operation."""
    print()
    print_header(
        "`--resize`", "bytes an image", "ImageNet", "mean", "worst image's mean", "worst pixel"
    )
    for side in SIDES:
        errors = list(errors_of_views(folder, side, images))
        means = [float(error.mean()) for error in errors]
        size = 3 * side * side
        print_row(
            str(side),
            f"{size:,}",
            f"{IMAGENET * size / 1e9:.1f} GB",
            f"{statistics.fmean(means):.2f}",
            f"{max(means):.2f}",
            f"{max(float(error.max()) for error in errors):.0f}",
        )


def errors_of_views(folder: Path, side: int, images: int) -> Iterator[torch.Tensor]:
    """The error of a view of each image if it is stored at `side` px, in 255ths."""
    recipe = augment.recipe("v1", CROP, grayscale=0.0, jitter_p=0.0, mean=(0, 0, 0), std=(1, 1, 1))
    dataset = dataloader.open_dataset(str(folder), "pretrain", fit="square", resize=side, crop=CROP)
    for i in range(min(images, len(dataset))):
        stored = dataset.fetch(torch.tensor([i]))
        decoded = np.array(Image.open(dataset.paths[i]).convert("RGB"))
        whole = torch.from_numpy(decoded).permute(2, 0, 1)[None]
        params = augment.draw(stored.aspect, recipe, utils.generator(0, "detail", i))
        views = [augment.augment(source, params, recipe) for source in (stored.images, whole)]
        yield 255 * (views[0] - views[1]).abs()


# ----------------------------------------------------------------------- stores that grow


def write_store(folder: Path, images: int, side: int = 32) -> Dataset:
    """A packed store of random pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rng.integers(0, 256, (images, side, side, 3), dtype=np.uint8).tofile(folder / "images.u8")
    rows = np.zeros(images, store.ROW)
    rows["aspect"], rows["readable"] = 1, True
    rows.tofile(folder / "rows")
    about = {"format": store.VERSION, "source": "", "resize": side, "images": images}
    about |= {"name": "random", "classes": ["a"], "unreadable": []}
    utils.write_json(folder / "store.json", about)
    return store.open_packed(folder, Size("square", side, side))


def read_through(dataset: Dataset, images: int, epochs: Iterator[int]) -> None:
    """Two views of `images` images: whole epochs of batches of 250, their order included."""
    recipe, generator = augment.recipe("v1", 32), torch.Generator()
    for epoch in itertools.islice(epochs, images // len(dataset)):
        order = dataloader.epoch_batches(len(dataset), 250, 0, epoch)
        for batch in dataloader.iterate(
            dataset, order, num_workers=0, failures=Failures(len(dataset))
        ):
            for _ in range(2):
                params = augment.draw(batch.aspect, recipe, generator)
                augment.augment(batch.images, params, recipe)


def growth(folder: Path, repeats: int) -> None:
    images = max(STORES)
    runs = {}
    for count in STORES:
        dataset, epochs = write_store(folder / str(count), count), itertools.count()
        runs[f"{count:,}"] = lambda d=dataset, e=epochs: read_through(d, images, e)
    times = alternate(runs, repeats)
    first = next(iter(times))
    print()
    print_header("packed images (32 px)", f"time for {images:,} images, {first} = 1", "images/s")
    for name, own in times.items():
        speed = images / statistics.median(own)
        print_row(name, f"{ratio(own, times[first]):.3f}", f"{speed:,.0f}")


def cold(folder: Path, repeats: int, images: int = 4096) -> None:
    """Images from a disk whose cache has none of them, as from a store larger than the memory."""
    if not Path("/proc/self/io").exists():
        raise utils.UserError("--cold needs Linux, which counts what it reads")
    count, side = 100_000, 74
    write_store(folder / "cold", count, side)
    times: dict[str, list[float]] = {"advice": [], "plain": []}
    read = dict.fromkeys(times, 0)
    for repeat in range(repeats):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(repeat))[:images]
        for name in sorted(times, reverse=bool(repeat % 2)):
            os.sync()
            with open(folder / "cold" / "images.u8", "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            store.HAS_ADVICE = name == "advice"
            dataset = store.open_packed(folder / "cold", Size("square", side, side))
            before, start = bytes_read(), time.perf_counter()
            for batch in order.split(256):
                dataset.fetch(batch)
            times[name].append(time.perf_counter() - start)
            read[name] += bytes_read() - before
            del dataset  # or its map would hold the cache
    if not min(read.values()):
        raise utils.UserError(f"{str(folder)!r} is in memory: set TMPDIR to a folder on a disk")
    print_header("a cold store", "speed, plain = 1", "images/s", "bytes read, of those needed")
    for name, own in times.items():
        over = read[name] / (repeats * images * 3 * side**2)
        speed = images / statistics.median(own)
        print_row(name, f"{ratio(times['plain'], own):.1f}", f"{speed:,.0f}", f"{over:.1f}")


def bytes_read() -> int:
    """What this process has made Linux read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def main(argv: list[str]) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--detail", action="store_true")
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    made_by, cpu = utils.provenance(), torch.backends.cpu.get_cpu_capability()
    print(f"commit {made_by['commit']}, torch {made_by['torch']}, {cpu}; medians\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.cold:
            return cold(folder, repeats=5)
        if not args.growth:
            write_jpegs(args.photos, folder / "data" / "a", args.images)
        if not (args.growth or args.detail):
            root = str(folder / "data")
            files = dataloader.open_dataset(
                root, "pretrain", fit="square", resize="auto", crop=CROP
            )
            paths = [files.paths[i] for i in range(len(files))]
            size = statistics.fmean(Path(path).stat().st_size for path in paths)
            print(f"{len(paths)} JPEGs, {size / 1e3:.0f} kB on average\n")
            packed = store.pack(files, root, "auto", num_workers=2)
            candidates = {"plain": plain(paths), "lightly": lightly(paths)}
            candidates |= {"ours, files": ours(files), "ours, packed": ours(packed)}
            candidates = {name: each for name, each in candidates.items() if each}
            compare(candidates, len(paths), args.repeats)
        if not args.growth:
            detail(folder / "data", images=256)
        if not args.detail:
            growth(folder, repeats=3)


if __name__ == "__main__":
    utils.guard(main)
