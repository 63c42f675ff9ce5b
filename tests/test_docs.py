"""README.md and docs/: commands run on miniature data, links lead somewhere, pages are short."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from miniature import write_cifar10, write_fashion_mnist, write_folders, write_stl10
from pages import (
    PAGES,
    ROOT,
    SCRIPTS,
    Command,
    anchors,
    commands,
    line_of,
    links,
    prose,
    read,
    shell_words,
)
from scripts import run
from weight_files import our_checkpoint

import config
from data import shapes

LONGEST_FILE, LONGEST_LINE, LARGEST_README = 350, 100, 10_000
SETTINGS = {
    "train": config.TrainSettings,
    "test": config.TestSettings,
    "visualize": config.VisualizeSettings,
    "export": config.ExportSettings,
}
EVALUATION = ["--linear_epochs=2", "--trials=1", "--num_workers=0", "--device=cpu"]
SMALL = {  # appended to every command
    "train": [
        "--arch=resnet18",
        "--crop=16",
        "--resize=16",
        "--feature_dim=8",
        "--num_keys=32",
        "--batch_size=16",
        "--max_epoch=1",
        "--bn_groups=2",
        "--num_workers=0",
        "--device=cpu",
    ],
    "test": EVALUATION,
    "visualize": EVALUATION,
    "export": ["--overwrite"],
}
OF_THE_ORIGINAL = (
    "train.py --dataset_root=ROOT/ILSVRC/Data/CLS-LOC/train --shuffle_bn",
    "--exp_version=M0 --momentum=0 --shuffle_bn",
    "--exp_version=M1 --momentum=0.9 --shuffle_bn",
    "--exp_version=M2 --momentum=0.999",
    "--exp_version=M3 --momentum=0.999 --shuffle_bn",
    "test.py --dataset_root=ROOT/STL-10 --load_pretrained_epoch=100",
    "visualize.py --dataset_root=ROOT/STL-10 --multiple_encoder_exp_version M1 M2 M3",
)


# ------------------------------------------------------------------------------------ pages


def test_no_file_and_no_line_is_too_long() -> None:
    assert len(read(ROOT / "README.md").encode()) <= LARGEST_README
    folders = ("", "data", "evaluation", "figures", "run", "tests", "benchmarks", "docs")
    for folder in folders:
        for path in (*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*.md")):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert len(lines) <= LONGEST_FILE, path
            wide = [number for number, line in enumerate(lines, 1) if len(line) > LONGEST_LINE]
            assert not wide, f"{path}, lines {wide}"


def test_links_lead_to_files_and_headings() -> None:
    for link in links():
        assert link.path.exists(), f"{link.page.name}: {link.target}"
        if link.anchor and link.path.suffix == ".md":
            assert link.anchor in anchors(link.path), f"{link.page.name}: {link.target}"


def test_linked_lines_hold_what_the_link_names() -> None:
    """[`name`](file.py#L12): line 12 defines it. After a change: python tests/pages.py."""
    numbered = [link for link in links() if link.anchor and link.path.suffix == ".py"]
    assert len(numbered) >= 30
    for link in numbered:
        line = line_of(link.text.strip("`"), link.path)
        assert link.anchor == f"L{line}", f"{link.page.name}: {link.text} is in line {line}"


def test_all_pages_are_linked_and_nothing_is_left_to_fill_in() -> None:
    linked = {link.path for link in links()}
    assert {*ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"} <= linked
    assert all("@@" not in read(page) and "TODO" not in read(page) for page in PAGES)


def test_figures_shown_are_there() -> None:
    shown = [(p, name) for p in PAGES for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", read(p))]
    assert len(shown) >= 8
    for page, name in shown:
        assert (page.parent / name).exists(), f"{page.name}: {name}"


def test_flags_that_the_pages_name_exist() -> None:
    """In text, too; those of benchmarks are in their own help."""
    known = {name for cls in SETTINGS.values() for name in config.names_of(cls)}
    known |= {"preset", "config", "help", "encoder_"}  # --encoder_: the beginning of three
    known |= {name.removeprefix("no-") for name in known}
    of_others = {"standalone", "nproc_per_node", "nnodes", "signal", "requeue", "nodes"}
    for page in PAGES[:-1]:
        for name in re.findall(r"`--([a-z0-9_-]+)", prose(page)):
            assert name.removeprefix("no-") in known | of_others, f"{page.name}: --{name}"


def test_make_has_the_targets_that_the_pages_name() -> None:
    targets = set(re.findall(r"^(\w+):", read(ROOT / "Makefile"), flags=re.MULTILINE))
    named = {m[1] for text in shell_words() if (m := re.match(r"make (\w+)", text))}
    assert {"demo", "test", "claims", "figures"} <= named <= targets


# --------------------------------------------------------------------------------- commands


def test_the_commands_of_the_original_are_there() -> None:
    text = "\n".join(command.text for command in commands())
    for part in OF_THE_ORIGINAL:
        assert part in text, part


def run_of(command: Command) -> str:
    """The name of the data set whose runs a command makes, evaluates, draws or exports."""
    if command.script == "export":
        return command.flags[0].split("/")[1]
    settings = config.parse(SETTINGS[command.script], list(command.flags))
    return settings.dataset_name if command.script == "train" else settings.encoder_dataset_name


def distinct(name: str, torchrun: bool) -> list[Command]:
    """The commands on a data set's runs, without those that come to the same settings."""
    found: dict[str, Command] = {}
    for command in sorted(commands(), key=lambda command: SCRIPTS.index(command.script)):
        if command.torchrun == torchrun and run_of(command) == name:
            flags = [*command.flags, *SMALL[command.script]]
            settings = config.parse(SETTINGS[command.script], flags)
            if command.script == "train":
                settings = dataclasses.replace(settings, resume=False)
            found.setdefault(str(settings), command)
    return list(found.values())


def make_data(place: Path) -> None:
    """The folders that the pages name, in miniature."""
    write_folders(place / "ROOT/ILSVRC/Data/CLS-LOC", classes=2, train=24, test=4, size=16)
    write_stl10(place / "ROOT/STL-10", train=30, test=10, unlabeled=48)
    folds = "".join(" ".join(map(str, range(i, i + 20))) + "\n" for i in range(10))
    (place / "ROOT/STL-10/stl10_binary/fold_indices.txt").write_text(folds)
    write_cifar10(place / "ROOT/cifar-10", per_batch=8)
    write_folders(place / "LABELLED", classes=2, train=24, test=4, size=16)
    (place / "IMAGES").symlink_to(place / "LABELLED" / "train")
    (place / "PICTURE.png").symlink_to(place / "IMAGES" / "class0" / "000.png")
    write_fashion_mnist(place / "ROOT/fashion-mnist", train=48, test=20)


def execute(command: Command) -> None:
    flags = [*command.flags, *SMALL[command.script]]
    if "--folds" in flags:
        flags = [flag for flag in flags if not flag.startswith("--trials")]
    if command.script == "train":
        if "--resume" not in flags:
            flags.append("--overwrite")
        if "fashion_parity" in flags:  # whole pixels need the images' own size
            flags += ["--crop=28", "--resize=28"]
    if command.torchrun:  # on two processes, however many the page names
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        words = [sys.executable, *launch, str(ROOT / f"{command.script}.py"), *flags]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    else:
        done = run(command.script, *flags)
    assert done.returncode == 0, f"{command.text}\n{done.stderr}"


@pytest.mark.parametrize("name", sorted({run_of(command) for command in commands()}))
def test_each_command_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they need each other: what one leaves serves the next."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "COUNT", {"pretrain": 80, "train": 80, "test": 20})
    make_data(tmp_path)
    for command in distinct(name, torchrun=False):
        execute(command)
        for last in Path("output").glob("*/*/checkpoints/last.pth.tar"):
            for epoch in (20, 40, 60, 100):  # those that the pages name
                copy = last.with_name(f"epoch_{epoch:04d}.pth.tar")
                if not copy.exists():
                    os.link(last, copy)
        for result in Path("output").glob("*/*/eval/epoch_000?"):
            if not (named := result.with_name("epoch_0100")).exists():
                named.symlink_to(result.name)
    assert list(Path("output").glob(f"{name}/*/checkpoints/last.pth.tar"))
    drawn = {path.name for path in Path(f"output/{name}/figures").glob("*.png")}
    if name in ("IMAGENET-64", "MINE"):
        assert {"loss.png", "accr_model_compare.png", "views.png"} <= drawn
    if name == "IMAGENET-64":
        assert "accr_epoch_compare.png" in drawn
    assert not Path("img").exists()


def test_the_commands_of_torchrun_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path)
    found = distinct("IMAGENET-64", torchrun=True)
    assert [command.script for command in found] == ["train", "test"]
    for command in found:
        execute(command)


def test_the_lines_of_python_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "COUNT", {"pretrain": 128, "train": 128, "test": 20})
    our_checkpoint(tmp_path / "output/MINE/a/checkpoints/last.pth.tar")
    load, train = re.findall(r"```python\n(.*?)```", read(ROOT / "docs/python.md"), flags=re.DOTALL)
    names: dict = {}
    exec(load, names)
    assert names["features"].shape == (8, 512)
    exec(train, names)
    assert names["step"] == 1 and names["loss"].isfinite()
    assert int(names["moco"].queue_ptr) == 128
