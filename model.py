"""Momentum Contrast: encoders, grouped batch norm, queue, momentum update, contrastive loss.

He et al. 2019, "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv:1911.05722), Algorithm 1;
v2: Chen et al. 2020 (arXiv:2003.04297). Letters as in the paper: q query, k key, K queue size, m momentum,
T temperature, N batch, C feature dimension. Nothing here knows of files, arguments, seeds or devices.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import parallel

ARCHS = sorted(
    n
    for n in torchvision.models.list_models(module=torchvision.models)
    if n.startswith(("resnet", "resnext", "wide_resnet"))
)


class GroupBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are those of each of `num_groups` contiguous groups of the batch (paper, section 3.3).

    It behaves as `num_groups` devices would, each with ordinary batch norm on its part; groups follow `torch.chunk`. The buffers
    are those of one plain batch norm and take one update a step, with the mean over the groups, so the weights load
    into any ResNet. With one group, or in eval mode, it is `nn.BatchNorm2d`.
    """

    def __init__(self, num_features: int, num_groups: int = 1, **kwargs) -> None:
        super().__init__(num_features, **kwargs)
        self.num_groups = num_groups
        self.replicas: list[
            list[torch.Tensor]
        ] = []  # what nn.DataParallel's copies of this module leave behind
        self.left_behind: list[torch.Tensor] | None = None  # in such a copy: its part of that

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> the same
        if not self.training or (self.num_groups == 1 and self.left_behind is None):
            return super().forward(x)
        groups = x.chunk(self.num_groups)
        mean = torch.zeros(
            len(groups), self.num_features, dtype=self.running_mean.dtype, device=x.device
        )
        var = torch.zeros_like(mean)  # with momentum 1 each row becomes its group's own statistics
        x = torch.cat(
            [
                F.batch_norm(
                    group,
                    mean[g],
                    var[g],
                    self.weight,
                    self.bias,
                    training=True,
                    momentum=1.0,
                    eps=self.eps,
                )
                for g, group in enumerate(groups)
            ]
        )
        statistics = torch.stack([mean, var])  # 2 x groups x C
        if self.left_behind is None:
            self._update(statistics)
        else:
            self.left_behind.append(statistics)
        return x

    @torch.no_grad()
    def _update(self, statistics: torch.Tensor) -> None:
        mean, var = statistics.mean(dim=1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        if self.momentum:
            self.num_batches_tracked.add_(1)

    def _replicate_for_data_parallel(self) -> "GroupBatchNorm2d":
        """nn.DataParallel throws the buffers of its copies away, so these leave their statistics with the module that they copy."""
        replica = super()._replicate_for_data_parallel()
        replica.left_behind = []
        self.replicas.append(replica.left_behind)
        return replica

    def take_statistics_of_replicas(self) -> None:
        """One update of the running statistics, with the groups of all copies, in the order of the devices."""
        statistics = [part.to(self.running_mean.device) for left in self.replicas for part in left]
        self.replicas.clear()
        if statistics:
            self._update(torch.cat(statistics, dim=1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}"


class OverlapConv2d(nn.Conv2d):
    """A convolution that, where its output is one pixel, multiplies only the kernel taps that touch the input.

    A ResNet's last stage at 32 px convolves 1 x 1 maps with 3 x 3 kernels: eight taps of nine meet padding alone, and some
    CPUs compute the weight gradient of such maps ten times slower than a matrix product. Same result, same parameters.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, C, H, W)
        (h, w), (kh, kw), (ph, pw), (sh, sw) = (
            x.shape[2:],
            self.kernel_size,
            self.padding,
            self.stride,
        )
        one_pixel = (h + 2 * ph - kh) // sh == 0 and (w + 2 * pw - kw) // sw == 0
        if not one_pixel or h + ph > kh or w + pw > kw or self.groups != 1:
            return super().forward(x)
        taps = self.weight[:, :, ph : ph + h, pw : pw + w]
        return F.linear(x.flatten(1), taps.flatten(1), self.bias)[:, :, None, None]


def build_encoder(
    arch: str,
    feature_dim: int = 128,
    mlp: bool = False,
    bn_groups: int = 1,
    small_stem: bool = False,
) -> nn.Module:
    """A torchvision ResNet, (N, 3, H, W) -> (N, feature_dim), not yet normalised; `mlp` puts v2's Linear-ReLU-Linear at its end.

    `small_stem`, for images up to 64 px: a 3 x 3 first convolution of stride 1 and no max pool, as usual on CIFAR.
    Raises ValueError for an architecture that is not one of `ARCHS`.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch {arch!r} is not known: choose one of {', '.join(ARCHS)}")
    encoder = torchvision.models.get_model(
        arch,
        weights=None,
        num_classes=feature_dim,
        norm_layer=partial(GroupBatchNorm2d, num_groups=bn_groups),
    )
    if small_stem:
        encoder.conv1 = nn.Conv2d(
            3, encoder.conv1.out_channels, kernel_size=3, padding=1, bias=False
        )
        nn.init.kaiming_normal_(
            encoder.conv1.weight, mode="fan_out", nonlinearity="relu"
        )  # as torchvision's
        encoder.maxpool = nn.Identity()
    if mlp:
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    for module in encoder.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = OverlapConv2d  # adds a forward, no state
    return encoder


def backbone(encoder: nn.Module) -> nn.Module:
    """The encoder without its head, in place: (N, 3, H, W) -> pooled features (N, D)."""
    encoder.fc = nn.Identity()
    return encoder


def contrastive_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """InfoNCE (paper, equation 1) of logits (N, 1+K): the mean of -log softmax at the labels, a scalar."""
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def contrast_hits(logits: torch.Tensor) -> torch.Tensor:
    """How many of N positives (column 0 of logits (N, 1+K)) are strictly above all their negatives: a scalar on the device."""
    return (logits[:, 0] > logits[:, 1:].amax(dim=1)).sum()


# -------------------------------------------------------------------------------------- what shows a collapse (arXiv:2005.10242)


def alignment(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean squared distance of a query and its own key, |q - k|^2 = 2 - 2 q.k, from logits (N, 1+K): a scalar, 0 (the same) to 4."""
    return 2 - 2 * temperature * logits.detach()[:, 0].mean()


@torch.no_grad()
def uniformity(keys: torch.Tensor) -> torch.Tensor:
    """log of the mean of exp(-2 |x - y|^2) over pairs of unit keys (N, C), N >= 2 (Wang and Isola 2020, section 4): a scalar.

    0 where all keys are one point; about -3.9 where they are spread evenly over the sphere in 128 dimensions.
    """
    similarity = (keys @ keys.T)[
        tuple(torch.triu_indices(len(keys), len(keys), offset=1, device=keys.device))
    ]
    return (-2 * (2 - 2 * similarity)).exp().mean().log()


@torch.no_grad()
def effective_rank(queue: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of the normalised singular values of a matrix of keys (C, K) (Roy and Vetterli 2007): a scalar, 1 (collapsed) to C."""
    gram = (
        queue.double() @ queue.double().T if queue.device.type != "mps" else queue @ queue.T
    )  # C x C, K is much larger
    singular = torch.linalg.eigvalsh(gram.cpu()).clamp_min(0).sqrt()
    p = singular / singular.sum()
    return torch.special.entr(p).sum().exp()


class MoCo(nn.Module):
    """Query encoder, momentum key encoder and a queue of keys (paper, section 3; Algorithm 1).

    Args: `arch` a torchvision ResNet; `feature_dim` C; `num_keys` K; `momentum` m in [0, 1]; `temperature` T;
    `bn_groups` groups of the batch with batch-norm statistics of their own; `mlp` v2's head; `small_stem` as `build_encoder`.
    Buffers: `queue` (C, K), unit columns; `queue_ptr` (1,), the oldest column. Raises ValueError for an unknown `arch`.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        feature_dim: int = 128,
        num_keys: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        bn_groups: int = 1,
        mlp: bool = False,
        small_stem: bool = False,
    ) -> None:
        super().__init__()
        self.K, self.m, self.T = num_keys, momentum, temperature
        self.encoder_q = build_encoder(arch, feature_dim, mlp, bn_groups, small_stem)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(feature_dim, num_keys), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.launch = (
            parallel.OneDevice()
        )  # how a batch is spread; `launch.attach(moco, ...)` puts another here

    def forward(
        self,
        im_q: torch.Tensor,
        im_k: torch.Tensor,
        shuffle: torch.Tensor | None = None,
        update: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step of Algorithm 1 up to the logits: views (N, 3, H, W) twice -> logits (N, 1+K), labels (N,), keys (N, C).

        `shuffle` is a permutation of the batch under which the keys meet their batch-norm groups (section 3.3), or None.
        The key encoder moves by one momentum update, unless `update` is false (the second call of a symmetric step, with the views
        exchanged); call `enqueue(keys)` after the optimizer step. On several processes the
        views, logits and labels are those of this process, `shuffle` and the keys those of the global batch.
        """
        q = unit(self.launch.encode(self.encoder_q, im_q))  # queries: N x C
        with torch.no_grad():
            if update:
                self.update_key_encoder()
            keys = self.encode_keys(im_k, shuffle)  # keys: N x C
            k = keys[self.launch.rows()]
        with torch.autocast(q.device.type, enabled=False):
            scaled = q / self.T  # the logits, N x (1+K), are much larger
            l_pos = (scaled * k).sum(dim=1, keepdim=True)  # positive logits: N x 1
            l_neg = scaled @ self.queue  # negative logits: N x K
            logits = torch.cat([l_pos, l_neg], dim=1)  # N x (1+K)
        labels = torch.zeros(
            len(logits), dtype=torch.long, device=logits.device
        )  # the positives are the 0-th
        return logits, labels, keys

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """k = m k + (1 - m) q for every parameter (paper, equation 2), in one fused call; m = 0 copies exactly."""
        torch._foreach_lerp_(
            list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1.0 - self.m
        )

    @torch.no_grad()
    def encode_keys(self, im_k: torch.Tensor, shuffle: torch.Tensor | None = None) -> torch.Tensor:
        """Unit keys (N, C) of key views (N, 3, H, W), in the order of the views, whatever the permutation `shuffle`."""
        if shuffle is None:
            return self.launch.gather(unit(self.launch.encode(self.encoder_k, im_k)))
        keys = self.launch.gather(
            unit(self.launch.encode(self.encoder_k, self.launch.shuffle(im_k, shuffle)))
        )
        return parallel.unshuffle(keys, shuffle)

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Put keys (N, C) in place of the oldest columns, as if one after the other: any N, any K, wrapping."""
        n = len(keys)
        index = (self.queue_ptr + torch.arange(max(0, n - self.K), n, device=keys.device)) % self.K
        self.queue.index_copy_(1, index, keys[-self.K :].T.to(self.queue.dtype))
        self.queue_ptr.add_(n).remainder_(self.K)

    @torch.no_grad()
    def fill_queue(self, im_k: torch.Tensor) -> None:
        """Enqueue the keys of views (N, 3, H, W) as training would compute them, leaving the running statistics as they were."""
        with frozen_statistics(self.encoder_k):
            self.enqueue(self.encode_keys(im_k))


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of (N, C) at unit length, in float32 at least."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


@contextlib.contextmanager
def frozen_statistics(encoder: nn.Module) -> Iterator[None]:
    """Batch norm still normalises with the batch's statistics here, but the buffers end as they began."""
    saved = [buffer.clone() for buffer in encoder.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(encoder.buffers(), saved):
            buffer.copy_(value)


# --------------------------------------------------------------------------------------------------- encoders out of files


@dataclass(frozen=True)
class Found:
    """What a state_dict turned out to be: its `kind` and `head` in words; `feature_dim` is the head's width (0: no head)."""

    kind: str
    arch: str
    head: str
    feature_dim: int
    mlp: bool
    small_stem: bool

    def __str__(self) -> str:
        return f"{self.kind}: {self.arch}{', small stem' * self.small_stem}, {self.head}"


def read_encoder(
    state_dict: dict[str, torch.Tensor], arch: str | None = None
) -> tuple[nn.Module, Found]:
    """The query encoder without its head, (N, 3, H, W) -> pooled features (N, D), strictly out of a `state_dict`, and what that is.

    Takes MoCo checkpoints, ours and the reference's (`module.encoder_q.*`, heads of v1 and v2), and torchvision ResNets (`conv1.weight`, ..., with
    or without `fc`); architecture, head and stem are known by the shapes. `arch`, if given, must be the one. Raises ValueError, in one line, for anything
    that is not completely one of these.
    """
    if not all(isinstance(key, str) for key in state_dict):
        raise ValueError("its keys are not all names")
    prefix = next(
        (
            p
            for p in ("module.encoder_q.", "encoder_q.", "module.", "")
            if p + "conv1.weight" in state_dict
        ),
        None,
    )
    if prefix is None:
        raise ValueError(
            f"it has neither MoCo's keys (module.encoder_q.conv1.weight, ...) nor a ResNet's (conv1.weight, ...); its first is {next(iter(state_dict), 'none')!r}"
        )
    weights = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    wrong = [key for key, value in weights.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise ValueError(f"{prefix}{wrong[0]} is no tensor")
    body = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    arch = _arch_of(body, arch)
    stem = tuple(body["conv1.weight"].shape)
    if stem not in ((64, 3, 7, 7), (64, 3, 3, 3)):
        raise ValueError(
            f"its first convolution is {' x '.join(map(str, stem))}, neither a ResNet's 64 x 3 x 7 x 7 nor the small stem's 64 x 3 x 3 x 3"
        )
    encoder = backbone(build_encoder(arch, small_stem=stem[2] == 3))
    try:
        encoder.load_state_dict(body)
    except RuntimeError as error:  # a counter too many, or in another shape
        raise ValueError(
            f"its weights do not fit a {arch}: {' '.join(str(error).split())[:160]}"
        ) from None
    is_moco = prefix.endswith("encoder_q.")
    head, width, mlp = _head_of(
        {key: value for key, value in weights.items() if key.startswith("fc.")},
        body_width(arch),
        is_moco,
    )
    kind = f"MoCo v{2 if mlp else 1} checkpoint" if is_moco else "ResNet weights"
    return encoder, Found(kind, arch, head, width, mlp, stem[2] == 3)


@functools.cache
def _shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a ResNet's state, without stem and head, and without counters, which old files lack."""
    with torch.device("meta"):
        state = torchvision.models.get_model(arch, weights=None).state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if _of_body(key)}


def _of_body(key: str) -> bool:
    return (
        not key.startswith("fc.")
        and key != "conv1.weight"
        and not key.endswith("num_batches_tracked")
    )


def body_width(arch: str) -> int:
    """D, the width of the pooled features."""
    return max(shape[0] for key, shape in _shapes(arch).items() if key.startswith("layer4"))


def _arch_of(body: dict[str, torch.Tensor], asked: str | None) -> str:
    """The architecture whose state this is; ValueError if it is none of them, or another than the one that was asked for."""
    found = {key: tuple(value.shape) for key, value in body.items() if _of_body(key)}
    for arch in ([asked] if asked in ARCHS else []) + ARCHS:
        if _shapes(arch) == found:
            if asked is not None and arch != asked:
                raise ValueError(f"its weights are those of a {arch}, not of a {asked}")
            return arch
    near = (
        asked
        if asked in ARCHS
        else max(ARCHS, key=lambda arch: len(_shapes(arch).items() & found.items()))
    )
    known = _shapes(near)
    parts = [
        (f"{len(keys)} {what} ({sorted(keys)[0]}{', ...' * (len(keys) > 1)})")
        for what, keys in (
            ("keys missing", known.keys() - found.keys()),
            ("unknown keys", found.keys() - known.keys()),
            (
                "of another shape",
                {key for key in known.keys() & found.keys() if known[key] != found[key]},
            ),
        )
        if keys
    ]
    raise ValueError(f"its weights are not all of a {near}'s and nothing else: {', '.join(parts)}")


def _head_of(head: dict[str, torch.Tensor], width: int, is_moco: bool) -> tuple[str, int, bool]:
    """A head in words, its output's width (0: none), and whether it is v2's; ValueError if it is none that is known."""
    shapes = {key: tuple(value.shape) for key, value in head.items()}
    if not head and not is_moco:
        return "no head", 0, False
    last = "fc.2" if "fc.2.weight" in head else "fc"
    out = (shapes.get(f"{last}.weight") or (0,))[0]
    expected = {f"{last}.weight": (out, width), f"{last}.bias": (out,)} | (
        {"fc.0.weight": (width, width), "fc.0.bias": (width,)} if last == "fc.2" else {}
    )
    if shapes != expected:
        there = (
            ", ".join(f"{key} {' x '.join(map(str, shape))}" for key, shape in shapes.items())
            or "missing"
        )
        raise ValueError(
            f"its head is neither a linear layer nor Linear-ReLU-Linear on {width} features, but {there}"
        )
    words = (
        f"classifier of {out} classes"
        if not is_moco
        else f"{'MLP' if last == 'fc.2' else 'linear'} head of width {out}"
    )
    return words, out, last == "fc.2"
