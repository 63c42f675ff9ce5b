"""Every command of the README, with the flags of a small run appended, on miniature data in the official formats."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from data import write_cifar10, write_fashion_mnist, write_folders, write_stl10
from scripts import run

import utils

ROOT = Path(utils.__file__).parent
SMALL = {
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
    "test": ["--linear_epochs=2", "--trials=1", "--num_workers=0", "--device=cpu"],
    "export": ["--overwrite"],
    "visualize": ["--linear_epochs=2", "--trials=1", "--num_workers=0", "--device=cpu"],
}


def commands() -> list[str]:
    """The commands in the README's code blocks and tables: `python SCRIPT.py ...`, with the flags of continued lines."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(
        r"(?:CUDA_VISIBLE_DEVICES=\S+ )?(?:python|torchrun --standalone --nproc_per_node=\d) (?:train|test|visualize|export)\.py[^`\n|#]*",
        text,
    )
    return list(
        dict.fromkeys(
            " ".join(command.split())
            for command in found
            if "--help" not in command and not command.rstrip().endswith(" ...")
        )
    )


def test_the_readme_has_the_commands_of_the_original():
    assert "@@" not in (ROOT / "README.md").read_text(encoding="utf-8") + (
        ROOT / "benchmarks" / "README.md"
    ).read_text(encoding="utf-8")  # unfilled
    text = "\n".join(commands())
    for part in (
        "train.py --dataset_root=ROOT/ILSVRC/Data/CLS-LOC/train --shuffle_bn",
        "--exp_version=M0 --momentum=0 --shuffle_bn",
        "test.py --dataset_root=ROOT/STL-10 --load_pretrained_epoch=100",
        "--multiple_encoder_exp_version M1 M2 M3",
    ):
        assert part in text, part
    assert (
        len(commands()) >= 10 and sum(command.startswith("torchrun") for command in commands()) == 2
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that the README names, in miniature; results of one command serve the next."""
    place = tmp_path_factory.mktemp("readme")
    write_folders(place / "ROOT/ILSVRC/Data/CLS-LOC", classes=2, train=24, test=4, size=16)
    write_stl10(place / "ROOT/STL-10", train=30, test=10, unlabeled=48)
    (place / "ROOT/STL-10/stl10_binary/fold_indices.txt").write_text(
        "".join(" ".join(map(str, range(i, i + 20))) + "\n" for i in range(10))
    )
    write_cifar10(place / "ROOT/cifar-10", per_batch=8)
    write_folders(place / "LABELLED", classes=2, train=24, test=4, size=16)
    (place / "IMAGES").symlink_to(place / "LABELLED" / "train")
    write_fashion_mnist(place / "ROOT/fashion-mnist", train=48, test=20)
    return place


def torchrun(script: Path, *flags: str) -> subprocess.CompletedProcess:
    """On two processes, however many the README names."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_each_command_works(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    order = {"train": 0, "test": 1, "export": 2, "visualize": 3}
    for command in sorted(commands(), key=lambda c: order[re.search(r"(\w+)\.py", c)[1]]):
        words = [
            word
            for word in shlex.split(command)
            if not word.startswith(("CUDA_VISIBLE_DEVICES", "--standalone", "--nproc_per_node"))
        ]
        script, flags = (
            words[1].removesuffix(".py"),
            [w.replace("=...", "=ROOT/ILSVRC/Data/CLS-LOC/train") for w in words[2:]],
        )
        flags += [
            flag for flag in SMALL[script] if not ("--folds" in flags and "trials" in flag)
        ] + (["--overwrite"] if script == "train" and "--resume" not in flags else [])
        flags += (
            ["--batch_size=500"] if script == "train" and "demo" in command else []
        )  # 5,000 images
        flags += (
            ["--crop=28", "--resize=28"] if script == "train" and "fashion" in command else []
        )  # whole pixels need the images' own size
        done = run(script, *flags) if words[0] == "python" else torchrun(ROOT / words[1], *flags)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        for last in place.glob(
            "output/*/*/checkpoints/last.pth.tar"
        ):  # the epochs that the README names
            for epoch in (20, 40, 60, 100):
                if not (copy := last.with_name(f"epoch_{epoch:04d}.pth.tar")).exists():
                    os.link(last, copy)
    for folder, names in (
        ("img", {"loss.png", "accr_model_compare.png"}),
        (
            "output/IMAGENET-64/figures",
            {"loss.png", "accr_model_compare.png", "accr_epoch_compare.png"},
        ),
    ):
        assert names <= {p.name for p in (place / folder).iterdir()}
