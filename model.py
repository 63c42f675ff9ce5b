"""Momentum Contrast: encoders, grouped batch norm, queue, momentum update, contrastive loss.

He et al. 2019, "Momentum Contrast for Unsupervised Visual Representation Learning" (arXiv:1911.05722), Algorithm 1;
v2: Chen et al. 2020 (arXiv:2003.04297). Letters as in the paper: q query, k key, K queue size, m momentum,
T temperature, N batch, C feature dimension. Nothing here knows of files, arguments, seeds or devices.
"""

import contextlib
import copy
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import parallel

ARCHS = sorted(n for n in torchvision.models.list_models(module=torchvision.models) if n.startswith(("resnet", "resnext", "wide_resnet")))


class GroupBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are those of each of `num_groups` contiguous groups of the batch (paper, section 3.3).

    It behaves as `num_groups` devices would, each with ordinary batch norm on its part; groups follow `torch.chunk`. The buffers
    are those of one plain batch norm and take one update a step, with the mean over the groups, so the weights load
    into any ResNet. With one group, or in eval mode, it is `nn.BatchNorm2d`.
    """

    def __init__(self, num_features: int, num_groups: int = 1, **kwargs) -> None:
        super().__init__(num_features, **kwargs)
        self.num_groups = num_groups
        self.replicas: list[list[torch.Tensor]] = []       # what nn.DataParallel's copies of this module leave behind
        self.left_behind: list[torch.Tensor] | None = None  # in such a copy: its part of that

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> the same
        if not self.training or (self.num_groups == 1 and self.left_behind is None):
            return super().forward(x)
        groups = x.chunk(self.num_groups)
        mean = torch.zeros(len(groups), self.num_features, dtype=self.running_mean.dtype, device=x.device)
        var = torch.zeros_like(mean)  # with momentum 1 each row becomes its group's own statistics
        x = torch.cat([F.batch_norm(group, mean[g], var[g], self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
                       for g, group in enumerate(groups)])
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
        (h, w), (kh, kw), (ph, pw), (sh, sw) = x.shape[2:], self.kernel_size, self.padding, self.stride
        one_pixel = (h + 2 * ph - kh) // sh == 0 and (w + 2 * pw - kw) // sw == 0
        if not one_pixel or h + ph > kh or w + pw > kw or self.groups != 1:
            return super().forward(x)
        taps = self.weight[:, :, ph:ph + h, pw:pw + w]
        return F.linear(x.flatten(1), taps.flatten(1), self.bias)[:, :, None, None]


def build_encoder(arch: str, feature_dim: int = 128, mlp: bool = False, bn_groups: int = 1) -> nn.Module:
    """A torchvision ResNet, (N, 3, H, W) -> (N, feature_dim), not yet normalised; `mlp` puts v2's Linear-ReLU-Linear at its end.

    Raises ValueError for an architecture that is not one of `ARCHS`.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch {arch!r} is not known: choose one of {', '.join(ARCHS)}")
    encoder = torchvision.models.get_model(
        arch, weights=None, num_classes=feature_dim, norm_layer=partial(GroupBatchNorm2d, num_groups=bn_groups))
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


def encoder_from_state(arch: str, state_dict: dict[str, torch.Tensor], feature_dim: int = 128, mlp: bool = False) -> nn.Module:
    """The query encoder out of a MoCo `state_dict` (keys `module.encoder_q.*`), strictly.

    Raises ValueError where architecture, head or keys do not fit.
    """
    prefix = "module.encoder_q."
    weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if not weights:
        raise ValueError(f"the state_dict has no keys {prefix}*: it is not a MoCo checkpoint")
    encoder = build_encoder(arch, feature_dim, mlp)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"the weights do not fit {arch} with {'an MLP' if mlp else 'a linear'} head of width {feature_dim}: {reason}") from None
    return encoder


def contrastive_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """InfoNCE (paper, equation 1) of logits (N, 1+K): the mean of -log softmax at the labels, a scalar."""
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def contrast_hits(logits: torch.Tensor) -> torch.Tensor:
    """How many of N positives (column 0 of logits (N, 1+K)) are strictly above all their negatives: a scalar on the device."""
    return (logits[:, 0] > logits[:, 1:].amax(dim=1)).sum()


class MoCo(nn.Module):
    """Query encoder, momentum key encoder and a queue of keys (paper, section 3; Algorithm 1).

    Args: `arch` a torchvision ResNet; `feature_dim` C; `num_keys` K; `momentum` m in [0, 1]; `temperature` T;
    `bn_groups` groups of the batch with batch-norm statistics of their own; `mlp` v2's head.
    Buffers: `queue` (C, K), unit columns; `queue_ptr` (1,), the oldest column. Raises ValueError for an unknown `arch`.
    """

    def __init__(self, arch: str = "resnet50", feature_dim: int = 128, num_keys: int = 65536, momentum: float = 0.999,
                 temperature: float = 0.07, bn_groups: int = 1, mlp: bool = False) -> None:
        super().__init__()
        self.K, self.m, self.T = num_keys, momentum, temperature
        self.encoder_q = build_encoder(arch, feature_dim, mlp, bn_groups)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(feature_dim, num_keys), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.launch = parallel.OneDevice()  # how a batch is spread; `launch.attach(moco, ...)` puts another here

    def forward(self, im_q: torch.Tensor, im_k: torch.Tensor,
                shuffle: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step of Algorithm 1 up to the logits: views (N, 3, H, W) twice -> logits (N, 1+K), labels (N,), keys (N, C).

        `shuffle` is a permutation of the batch under which the keys meet their batch-norm groups (section 3.3), or None.
        The key encoder moves by one momentum update; call `enqueue(keys)` after the optimizer step. On several processes the
        views, logits and labels are those of this process, `shuffle` and the keys those of the global batch.
        """
        q = unit(self.launch.encode(self.encoder_q, im_q))                # queries: N x C
        with torch.no_grad():
            self.update_key_encoder()
            keys = self.encode_keys(im_k, shuffle)                        # keys: N x C
            k = keys[self.launch.rows()]
        with torch.autocast(q.device.type, enabled=False):
            scaled = q / self.T                                           # the logits, N x (1+K), are much larger
            l_pos = (scaled * k).sum(dim=1, keepdim=True)                 # positive logits: N x 1
            l_neg = scaled @ self.queue                                   # negative logits: N x K
            logits = torch.cat([l_pos, l_neg], dim=1)                     # N x (1+K)
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)  # the positives are the 0-th
        return logits, labels, keys

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """k = m k + (1 - m) q for every parameter (paper, equation 2), in one fused call; m = 0 copies exactly."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1.0 - self.m)

    @torch.no_grad()
    def encode_keys(self, im_k: torch.Tensor, shuffle: torch.Tensor | None = None) -> torch.Tensor:
        """Unit keys (N, C) of key views (N, 3, H, W), in the order of the views, whatever the permutation `shuffle`."""
        if shuffle is None:
            return self.launch.gather(unit(self.launch.encode(self.encoder_k, im_k)))
        keys = self.launch.gather(unit(self.launch.encode(self.encoder_k, self.launch.shuffle(im_k, shuffle))))
        return parallel.unshuffle(keys, shuffle)

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Put keys (N, C) in place of the oldest columns, as if one after the other: any N, any K, wrapping."""
        n = len(keys)
        index = (self.queue_ptr + torch.arange(max(0, n - self.K), n, device=keys.device)) % self.K
        self.queue.index_copy_(1, index, keys[-self.K:].T.to(self.queue.dtype))
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
