"""What a batch takes of memory: counted, and said before the work."""

from pathlib import Path

import pytest
import torch
from evaluation_data import class_folders, fabricated_run
from scripts import assert_one_line_error, run
from torch import nn
from training import pretrain

import encoders
from run import memory
from utils import UserError


def test_a_small_encoder_has_its_closed_form() -> None:
    """The image for the convolution, its output for batch norm, ReLU's output."""
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    kept, layer = memory.image_bytes(layers, 3, [10, 20], "fp32")
    outputs = 8 * 200 * 4
    assert kept == pytest.approx(3 * 200 * 4 + 2 * outputs, abs=1) and layer == 2 * outputs
    assert memory.image_bytes(layers, 3, [10, 20], "bf16")[1] == outputs
    assert all(not v.is_meta and v.grad is None for v in layers.parameters())
    assert not nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "timm:test_vit", "timm:test_convnext"])
def test_it_is_what_autograd_keeps_on_a_cpu(arch: str) -> None:
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    crop = 160 if arch == "timm:test_vit" else 32
    encoder, totals = encoders.build_encoder(arch, crop=crop), []
    for n in (2, 6):
        kept: dict[int, torch.Tensor] = {}

        def keep(value: torch.Tensor, kept: dict = kept) -> torch.Tensor:
            kept[value.untyped_storage().data_ptr()] = value
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            encoder(torch.zeros(n, 3, crop, crop))
        totals.append(sum(value.untyped_storage().nbytes() for value in kept.values()))
    counted, _ = memory.image_bytes(encoder, 3, crop, "fp32")
    assert counted == pytest.approx((totals[1] - totals[0]) / 4, rel=0.2 if "vit" in arch else 0.01)


def test_what_does_not_fit_is_one_line_before_any_work(tmp_path: Path) -> None:
    class_folders(tmp_path / "data", seed=0, per_class=40)
    done = pretrain(tmp_path / "data", tmp_path / "out", "--crop=4096", "--resize=4096")
    assert_one_line_error(done, "--batch_size 16 of resnet18 at --crop 4096 px", "smaller")
    assert not (tmp_path / "out").exists()
    fabricated_run(tmp_path / "out", "v1", epochs=(1,))
    flags = [f"--encoder_output_root={tmp_path / 'out'}", f"--dataset_root={tmp_path / 'data'}"]
    done = run("test", *flags, "--crop=4096", "--resize=4096", "--device=cpu", "--knn_k=5")
    assert_one_line_error(done, "a batch of 120 images at --crop 4096 px", "--eval_batch_size")


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, limit = torch.device("cpu"), tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMIT", limit)
    machine = memory.memory_of(cpu)
    limit.write_text("max\n")
    assert memory.memory_of(cpu) == machine > 1e8
    limit.write_text("50000000\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.memory_of(cpu) == 25e6
    memory.check_memory(30e6, cpu, "it", "less")
    with pytest.raises(UserError, match="it takes 1 GB .* this machine has 0 GB: less"):
        memory.check_memory(1e9, cpu, "it", "less")
