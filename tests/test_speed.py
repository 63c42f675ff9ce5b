"""What makes a step fast changes no result: compilation, CUDA graphs, bfloat16 in a tolerance."""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from scripts import run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import utils
from model import GroupBatchNorm2d, MoCo, contrastive_loss
from run import checkpoints, compute

CPU = torch.device("cpu")


def small(trained: bool = True) -> nn.Module:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        GroupBatchNorm2d(8, num_groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )
    return encoder.double().train().requires_grad_(trained)


def test_a_compiled_encoder_is_the_same_encoder() -> None:
    plain, compiled, x = small(), small(), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    assert compute.compile_encoder(compiled, torch.zeros_like(x), "fp64") is None
    assert compiled._compiled_call_impl is not None
    for name, value in plain.state_dict().items():
        assert torch.equal(value, compiled.state_dict()[name]), "the trial left no trace"
    assert all(parameter.grad is None for parameter in compiled.parameters())
    for encoder in (plain, compiled):
        encoder(x).square().sum().backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=0, atol=1e-10)
    for name, value in plain.state_dict().items():  # the running statistics, too
        assert torch.allclose(
            value.double(), compiled.state_dict()[name].double(), rtol=0, atol=1e-12
        ), name


class RecordedGraph:
    """A CUDA graph for tensors on the CPU: what was recorded runs again, in the same memory."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, before in self.calls:
            now = function(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph, **options) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.graph.calls.append((function, args, kwargs or {}, out))
        return out


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name, value in (
        (torch.cuda, "CUDAGraph", RecordedGraph),
        (torch.cuda, "graph", Recording),
        (torch.cuda, "Stream", lambda: None),
        (torch.cuda, "stream", contextlib.nullcontext),
        (torch.cuda, "synchronize", lambda: None),
        (torch.cuda, "current_stream", lambda: "own stream"),
        (torch.cuda.graphs, "graph_pool_handle", lambda: None),
    ):
        monkeypatch.setattr(place, name, value)


@pytest.mark.parametrize("way", ["plain", "compiled"])
def test_encoders_as_graphs_train_to_the_same_numbers(graphs: None, way: str) -> None:
    """Weights, statistics and queue after five steps, with evaluation in between."""
    ends, generator = [], torch.Generator().manual_seed(0)
    views = torch.randn(5, 2, 8, 3, 8, 8, dtype=torch.float64, generator=generator)
    for as_graph in (False, True):
        torch.manual_seed(0)
        moco = MoCo(small(), feature_dim=4, num_keys=16, momentum=0.9, bn_groups=2).double()
        optimizer = torch.optim.SGD(moco.encoder_q.parameters(), lr=0.1, momentum=0.9)
        example = torch.zeros_like(views[0, 0])
        for encoder in (moco.train().encoder_q, moco.encoder_k):
            if way == "compiled":
                assert compute.compile_encoder(encoder, example, "fp64") is None
            if as_graph:
                assert compute.graph_encoder(encoder, example, "fp64") is None
        for im_q, im_k in views:
            logits, labels, keys = moco(im_q, im_k, shuffle=torch.arange(8).flip(0))
            optimizer.zero_grad(set_to_none=True)
            contrastive_loss(logits, labels).backward()
            optimizer.step()
            moco.enqueue(keys)
            moco.eval().encoder_q(im_q[:3])  # of another size
            moco.train()
        ends.append(moco.state_dict())
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], rtol=0, atol=1e-12), name


@pytest.mark.parametrize("trained", [True, False])
def test_a_graph_that_cannot_be_recorded_leaves_the_encoder_as_it_was(
    graphs: None, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(module: nn.Module, inputs: tuple, out: torch.Tensor) -> None:
        if torch.utils._python_dispatch._get_current_dispatch_mode():
            raise RuntimeError("operation not permitted\nwhile recording")

    leave, streams = Recording.__exit__, []

    def fail(self, *args) -> None:
        leave(self, *args)
        raise RuntimeError("the recording was broken off")  # PyTorch says this then

    encoder, x = small(trained), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    encoder[0].register_forward_hook(wait)
    monkeypatch.setattr(Recording, "__exit__", fail)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    reason = compute.graph_encoder(encoder, x, "fp64")
    assert reason == "RuntimeError: operation not permitted while recording"
    assert streams == ["own stream"]
    assert torch.equal(encoder(x), small(trained)(x))


@pytest.mark.parametrize("trained", [True, False])
def test_a_compile_that_fails_leaves_the_encoder_as_it_was(
    monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
    def broken(self, *args, **kwargs):
        raise RuntimeError("no compiler\nhere")

    encoder, x = small(trained), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda self, **how: setattr(self, "_compiled_call_impl", broken.__get__(self)),
    )
    reason = compute.compile_encoder(encoder, torch.zeros_like(x), "fp64")
    assert reason == "RuntimeError: no compiler here"
    assert torch.equal(encoder(x), small(trained)(x))


def test_train_goes_on_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said once, and the run is the one without --compile."""
    monkeypatch.setattr(compute, "compile_encoder", lambda *args: "RuntimeError: no compiler")
    flags = [
        "--dataset_root=shapes",
        "--arch=resnet18",
        "--crop=16",
        "--num_keys=64",
        "--batch_size=1000",
        "--bn_groups=2",
        "--max_epoch=1",
        "--device=cpu",
        "--precision=fp32",
        "--log_every=1",
    ]
    ends = []
    for name in ("--compile", "--no-compile"):
        done = run("train", *flags, f"--output_root={tmp_path / name}", name)
        assert done.returncode == 0 and done.stderr.count(
            "--compile failed for encoder_q, going on without it there: RuntimeError: no compiler"
        ) == (name == "--compile"), done.stderr
        ends.append(
            checkpoints.load(tmp_path / name / "IMAGENET-64/v1/checkpoints/last.pth.tar")[
                "state_dict"
            ]
        )
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    log = utils.read_csv(tmp_path / "--compile/IMAGENET-64/v1/log.csv")
    assert all(0 <= percent <= 100 for percent in log["data_wait_percent"]) and all(
        mb > 100 for mb in log["peak_memory_mb"]
    )
    last = [line for line in done.stdout.splitlines() if line.startswith("time: ")][0]
    shares = [int(part.split()[-2]) for part in last.split(", ")]
    assert (
        all(
            name in last
            for name in ("data", "augmentation", "forward and backward", "update", "other")
        )
        and abs(sum(shares) - 100) <= 3
    )


def test_the_curve_in_bfloat16_is_that_in_float32_within_three_percent(tmp_path: Path) -> None:
    """An epoch of the built-in images: each row of the log, and the whole run within 1 %."""
    curves = []
    for precision in ("fp32", "bf16"):
        done = run(
            "train",
            "--dataset_root=shapes",
            f"--output_root={tmp_path}",
            f"--exp_version={precision}",
            f"--precision={precision}",
            "--arch=timm:test_resnet",
            "--crop=16",
            "--num_keys=256",
            "--batch_size=125",
            "--bn_groups=4",
            "--shuffle_bn",
            "--temperature=0.2",
            "--lr=0.01",
            "--max_epoch=1",
            "--log_every=8",
            "--device=cpu",
        )
        assert done.returncode == 0, done.stderr
        curves.append(
            torch.tensor(utils.read_csv(tmp_path / "IMAGENET-64" / precision / "log.csv")["loss"])
        )
    assert len(curves[0]) == 5 and not torch.equal(*curves)
    assert (curves[1] / curves[0] - 1).abs().max() < 0.03 and abs(
        curves[1].mean() / curves[0].mean() - 1
    ) < 0.01


def test_auto_is_not_fooled_by_emulated_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True
    )  # true of Turing and Volta, too, by emulation
    for capability, expected in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device=None, c=capability: c
        )
        assert compute.pick_precision("auto", cuda) == expected
    for native, expected in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda n=native: n)
        assert compute.pick_precision("auto", CPU) == expected
    assert compute.pick_precision("auto", torch.device("mps")) == "fp32"
