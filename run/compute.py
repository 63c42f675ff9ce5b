"""What a run computes on and in: device, precision, compiled encoders."""

import contextlib
import importlib.util
import re
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from utils import UserError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
HAS_TRITON = importlib.util.find_spec("triton") is not None  # as in PyTorch's CUDA builds


def pick_device(name: str = "auto") -> torch.device:
    """The device named, or for `auto` the first of cuda, mps and cpu that is there.

    Raises UserError if the device is not known, not there, or one that this PyTorch is not for.
    """
    gpus, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps") or (device.type == "cpu" and device.index):
        raise UserError(f"--device {name!r} is not known: use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        seen = f"PyTorch sees {gpus} CUDA devices"
        raise UserError(f"--device {name!r} is not available, {seen}: use another, or cpu")
    if device.type == "mps" and not has_mps:
        raise UserError("--device 'mps' is not available on this machine: use cpu")
    if device.type == "cuda":
        for index in range(gpus) if device.index is None else [device.index]:
            check_kernels(index)
    return device


def check_kernels(index: int) -> None:
    """UserError for a GPU that PyTorch was not built for; opens nothing on it."""
    built = torch.cuda.get_arch_list()  # such as sm_80, which runs on 8.6, too, and compute_120
    kinds = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name) for name in built]
    versions = [(kind[1], (int(kind[2]), int(kind[3]))) for kind in kinds if kind]
    if not versions:  # of another maker
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says the same in many lines
        own = torch.cuda.get_device_capability(index)
    for kind, version in versions:
        if version <= own and (kind == "compute" or version[0] == own[0]):
            return
    gpu = f"GPU {index} ({torch.cuda.get_device_name(index)}, compute capability {own[0]}.{own[1]})"
    raise UserError(
        f"PyTorch {torch.__version__} has no kernels for {gpu}, only for {', '.join(built)}: "
        "install another build (docs/devices.md), hide it by CUDA_VISIBLE_DEVICES, "
        "or use --device cpu"
    )


def set_backends(tune: bool) -> None:
    """How GPUs compute in every script: convolutions of float32 in TF32, products in float32.

    `tune` lets cuDNN seek the fastest kernel for each shape, once in each thread.
    """
    torch.backends.cudnn.benchmark = tune
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def pick_precision(name: str, device: torch.device) -> str:
    """`fp32`, `bf16`, `fp16` or `fp64`; `auto` is bf16 where the hardware computes in it.

    Emulation does not count: `auto` is fp16 on a GPU that is fast in that alone (Volta, Turing),
    else fp32. Raises UserError for what a device does not compute in.
    """
    if name in ("fp64", "fp16") and device.type == "mps":
        raise UserError(f"--precision {name} does not exist on mps: use fp32")
    if device.type == "cuda" and name in ("auto", "bf16"):
        capability = torch.cuda.get_device_capability(device)
        fast = "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
        if name == "bf16" != fast:
            has = f"this GPU has {capability[0]}.{capability[1]}"
            raise UserError(f"--precision bf16 needs compute capability 8.0, {has}: use {fast}")
        return fast
    if name != "auto":
        return name
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if device.type == "cpu" and has_bf16() else "fp32"


def precision_dtype(precision: str) -> torch.dtype:
    """The type of weights and views: float64 for fp64, else float32 (the others are autocast's)."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which encoders run forward."""
    if dtype := AUTOCAST.get(precision):
        return torch.autocast(device.type, dtype=dtype)
    return contextlib.nullcontext()


class Scaler(torch.amp.GradScaler):
    """Scales the loss, or small gradients would vanish in fp16; with others it does nothing.

    A step whose gradients overflow is left out, and the scale halves: `skipped` counts them, on
    the device. Scale and count are saved in the optimizer's state.
    """

    def __init__(
        self, precision: str, device: torch.device, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(device.type, enabled=precision == "fp16")
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._one = torch.ones((), device=device)
        if self.is_enabled():
            optimizer.register_state_dict_post_hook(self._save)
            optimizer.register_load_state_dict_pre_hook(self._load)
            for group in optimizer.param_groups:
                if group.get("momentum"):  # fused SGD would leave them undefined at a skipped step
                    for parameter in group["params"]:
                        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, unless gradients overflowed; sets the scale of the next one."""
        super().step(optimizer)
        if self.is_enabled():
            before = self.scale(self._one)
            self.update()
            self.skipped += self.scale(self._one) < before

    def _save(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        state["scaler"] = {**self.state_dict(), "skipped": int(self.skipped)}

    def _load(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        self.load_state_dict(state["scaler"])
        self.skipped.fill_(state["scaler"]["skipped"])


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type in which autocast computes on a device here and now; None if it is off."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def free_memory(device: torch.device) -> int:
    """The bytes of a GPU that nobody uses, with those that PyTorch keeps for later."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def has_kernels(device: torch.device) -> bool:
    """Whether run/kernels.py runs on a device: on GPUs for which Triton compiles."""
    if device.type != "cuda" or not HAS_TRITON:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)


def compile_encoder(encoder: nn.Module, example: Tensor, precision: str) -> str | None:
    """Let torch.compile make an encoder's kernels, and try them on an example (N, 3, H, W).

    Names and weights stay. Returns None, or why it failed; then the encoder runs as before.
    """
    encoder.compile(dynamic=False)
    try:
        with _trial(encoder), autocast(precision, example.device):
            out = encoder(example)
            if out.requires_grad:
                out.float().sum().backward()
    except Exception as error:  # a missing compiler, a kernel that cannot be made: there are many
        encoder._compiled_call_impl = None
        return _in_short(error)


def graph_encoder(encoder: nn.Module, example: Tensor, precision: str) -> str | None:
    """Record an encoder's kernels as CUDA graphs: one launch forward, and one backward.

    They hold for one backward pass a forward pass, in training, on inputs such as the example
    (N, 3, H, W). Else as `compile_encoder`, whose kernels they can be.
    """
    # gradients of the recorded kernels come on the stream of the recording, for which PyTorch waits
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
    dtype = AUTOCAST.get(precision)
    recording = torch.autocast("cuda", dtype=dtype, enabled=bool(dtype), cache_enabled=False)
    stream = torch.cuda.current_stream()
    try:
        with _trial(encoder), recording:
            # the graphs read their input from the example's memory, so each encoder has its own
            torch.cuda.make_graphed_callables(encoder, (example.clone(),))
    except Exception as error:  # an encoder that waits for the GPU, too little memory, ...
        torch.cuda.set_stream(stream)  # a recording that fails leaves its own
        return _in_short(error.__context__ or error)
    encoder._compiled_call_impl = None  # it would compile the graphs' launch


@contextlib.contextmanager
def _trial(encoder: nn.Module) -> Iterator[None]:
    """With gradients if the encoder is trained; it leaves no trace in its state."""
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    try:
        with torch.set_grad_enabled(any(p.requires_grad for p in encoder.parameters())):
            yield
    finally:
        encoder.zero_grad(set_to_none=True)
        encoder.load_state_dict(state)


def _in_short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
