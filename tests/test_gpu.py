"""The scripts on a pretended GPU: every tensor is where it must be, and no step waits for it."""

from pathlib import Path

import pytest
import torch
from pretended import PretendedGPU, gpu  # noqa: F401
from scripts import run
from training import pretrain

import model
from evaluation.features import Features

# Functions in which numbers may leave the device, and weights go to it: not in a step.
MAY_WAIT = {"build_model", "__post_init__", "top1", "read_means", "write_row", "save"}


def train(data: Path, out: Path, *flags: str) -> None:
    done = pretrain(data, out, "--device=cuda", "--arch=timm:test_resnet", "--shuffle_bn", *flags)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision=auto", "--knn_every=1", "--max_epoch=2"],
        ["--precision=fp16", "--symmetric", "--mlp", "--aug_plus", "--max_epoch=1"],
        ["--precision=fp32", "--optimizer=adamw", "--bn_groups=1", "--max_epoch=1"],
    ],
)
def test_a_step_and_the_first_queue_wait_for_nothing(
    flags: list[str],
    folders: Path,
    tmp_path: Path,
    gpu: PretendedGPU,  # noqa: F811
) -> None:
    with gpu:
        train(folders, tmp_path, *flags)
    assert any("read_means" in stack for stack in gpu.waits)
    for stack in gpu.waits:
        assert MAY_WAIT & set(stack), stack
    for stack in gpu.pageable:
        assert MAY_WAIT & set(stack), stack


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--device=cuda", "--symmetric"], "does not work with --symmetric: leave one out"),
        (["--device=cpu"], "needs a GPU"),
    ],
)
def test_what_no_cuda_graph_can_hold_is_said(
    flags: list[str],
    words: str,
    folders: Path,
    tmp_path: Path,
    gpu: PretendedGPU,  # noqa: F811
) -> None:
    with gpu:
        done = pretrain(folders, tmp_path, "--cuda_graph", *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("how", ["item", "nonzero", "mask", "other device"])
def test_a_step_that_waits_is_seen(
    how: str,
    folders: Path,
    tmp_path: Path,
    gpu: PretendedGPU,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults = {
        "item": lambda x: x.mean().item(),
        "nonzero": torch.nonzero,
        "mask": lambda x: x[x > 0],
        "other device": lambda x: x[:, 0] * torch.ones(len(x)),
    }
    plain = model.contrastive_loss

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        faults[how](logits.detach())
        return plain(logits, labels)

    monkeypatch.setattr(model, "contrastive_loss", loss)
    with gpu:
        if how == "item":
            train(folders, tmp_path, "--max_epoch=1")
            assert any(stack[-1] == "<lambda>" and not MAY_WAIT & set(stack) for stack in gpu.waits)
        else:
            with pytest.raises(
                (RuntimeError, torch._subclasses.fake_tensor.DynamicOutputShapeException)
            ):
                train(folders, tmp_path, "--max_epoch=1")


def test_evaluation(folders: Path, tmp_path: Path, gpu: PretendedGPU) -> None:  # noqa: F811
    """Features, kNN and the linear classifiers of an untrained encoder."""
    with gpu:
        done = run(
            "test",
            f"--dataset_root={folders}",
            f"--encoder_output_root={tmp_path}",
            "--encoder=random",
            "--arch=timm:test_resnet",
            "--crop=16",
            "--num_workers=0",
            "--device=cuda",
            "--precision=auto",
            "--linear_epochs=1",
        )
    assert done.returncode == 0, done.stderr
    names = {name for stack in gpu.waits for name in stack}
    assert {"dataset_features", "knn_hits", "train_linear"} <= names


@pytest.mark.parametrize("views, copies", [(1, 3), (2, 4)])
def test_features_go_to_a_gpu_that_has_the_memory_for_knn(
    views: int,
    copies: int,
    gpu: PretendedGPU,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = Features(torch.ones(views, 1000, 64), torch.zeros(1000, dtype=torch.long))
    enough = copies * 1000 * 64 * 4 + 2**29
    for free, where in ((enough, "cuda"), (enough - 1, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2**40))
        with gpu:
            moved = features.to_device(torch.device("cuda:0"))
        assert moved.views.device.type == where
