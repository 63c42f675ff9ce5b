"""Momentum Contrast: the method, and nothing else.

He et al. 2019, "Momentum Contrast for Unsupervised Visual Representation Learning"
(arXiv:1911.05722), Algorithm 1; v2: Chen et al. 2020 (arXiv:2003.04297). Letters as in the paper:
q query, k key, K queue size, m momentum, T temperature, N batch, C feature dimension.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

import encoders
from run import compute


class MoCo(nn.Module):
    """A query encoder, a momentum key encoder, and a queue of keys (section 3, Algorithm 1).

    Args: `encoder` a name that `encoders.build_encoder` knows, a module, or a function that makes
    one: (N, 3, H, W) -> (N, C); `feature_dim` C; `num_keys` K; `momentum` m in [0, 1];
    `temperature` T; `bn_groups` the groups of the batch with batch-norm statistics of their own;
    what else `build_encoder` takes for a name: `mlp` (v2's head), `small_stem`, `crop`.
    Buffers: `queue` (C, K), unit columns; `queue_ptr` (1,), the oldest column.
    """

    def __init__(
        self,
        encoder: str | nn.Module | Callable[[], nn.Module] = "resnet50",
        feature_dim: int = 128,
        num_keys: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        bn_groups: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.K, self.m, self.T = num_keys, momentum, temperature
        if isinstance(encoder, str):
            encoder = encoders.build_encoder(encoder, feature_dim, **options)
        elif not isinstance(encoder, nn.Module):
            encoder = encoder()
        self.encoder_q = group_batch_norms(encoder, bn_groups)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(feature_dim, num_keys), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.connect(
            encode_q=self.encoder_q.__call__,
            encode_k=self.encoder_k.__call__,
            shuffle=shuffle,
            gather=lambda keys: keys,
            rows=slice(None),
        )

    def connect(
        self,
        *,
        encode_q: Callable[[torch.Tensor], torch.Tensor],
        encode_k: Callable[[torch.Tensor], torch.Tensor],
        shuffle: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        gather: Callable[[torch.Tensor], torch.Tensor],
        rows: slice,
    ) -> None:
        """Say how the work is spread, which on one device it is not (parallel.py).

        encode_q, encode_k: this process's views -> outputs, on all its devices.
        shuffle: this process's key views, a permutation of the global batch -> its permuted views.
        gather: this process's keys -> the keys of the global batch, of which `rows` are its own.
        """
        self.encode_q, self.encode_k = encode_q, encode_k
        self.shuffle, self.gather, self.rows = shuffle, gather, rows

    def forward(
        self,
        im_q: torch.Tensor,
        im_k: torch.Tensor,
        shuffle: torch.Tensor | None = None,
        update: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Algorithm 1 up to the logits: views (N, 3, H, W) twice -> logits, labels, keys.

        `shuffle` is a permutation of the batch under which the keys meet their batch-norm groups
        (section 3.3), or None. The key encoder takes a momentum update unless `update` is false,
        as in the second half of a symmetric step. Call `enqueue(keys)` after the optimizer step:
        the backward pass needs the queue as it was.
        With several processes, views, logits and labels are those of this process; `shuffle` and
        keys are those of the global batch.
        """
        q = unit(self.encode_q(im_q))  # queries: N x C
        with torch.no_grad():
            if update:
                self.update_key_encoder()
            keys = self.encode_keys(im_k, shuffle)  # keys: N x C
            k = keys[self.rows]
        with torch.autocast(q.device.type, enabled=False):
            scaled = q / self.T  # not the logits, which are much larger
            l_pos = (scaled * k).sum(dim=1, keepdim=True)  # positive logits: N x 1
            l_neg = scaled @ self.queue  # negative logits: N x K
            logits = torch.cat([l_pos, l_neg], dim=1)  # N x (1+K)
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return logits, labels, keys  # label 0: the positive is column 0

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """k = m k + (1 - m) q for all parameters at once (equation 2); m = 0 copies exactly."""
        params_k, params_q = self.encoder_k.parameters(), self.encoder_q.parameters()
        torch._foreach_lerp_(list(params_k), list(params_q), 1.0 - self.m)

    @torch.no_grad()
    def encode_keys(self, im_k: torch.Tensor, shuffle: torch.Tensor | None = None) -> torch.Tensor:
        """Unit keys (N, C) of key views (N, 3, H, W), in the order of the views."""
        if shuffle is None:
            return self.gather(unit(self.encode_k(im_k)))
        keys = self.gather(unit(self.encode_k(self.shuffle(im_k, shuffle))))
        return unshuffle(keys, shuffle)

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Put keys (N, C) in place of the oldest columns, one after the other: any N, any K."""
        n = len(keys)
        newest = torch.arange(max(0, n - self.K), n, device=keys.device)
        columns = (self.queue_ptr + newest) % self.K
        self.queue.index_copy_(1, columns, keys[-self.K :].T.to(self.queue.dtype))
        self.queue_ptr.add_(n).remainder_(self.K)

    @torch.no_grad()
    def fill_queue(self, im_k: torch.Tensor) -> None:
        """Enqueue the keys of views (N, 3, H, W), leaving the running statistics as they were."""
        buffers = list(self.encoder_k.buffers())
        saved = [buffer.clone() for buffer in buffers]
        self.enqueue(self.encode_keys(im_k))
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)


def contrastive_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """InfoNCE (equation 1) of logits (N, 1+K): the mean of -log softmax at the labels, a scalar."""
    return F.cross_entropy(logits, labels)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of (N, C) at unit length, in float32 at least."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


def shuffle(x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Row i of the result is row permutation[i] of x (N, ...)."""
    return x[to_device(permutation, x.device)]


def unshuffle(x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """The inverse of `shuffle`: row permutation[i] of the result is row i of x (N, ...)."""
    return torch.empty_like(x).index_copy_(0, to_device(permutation, x.device), x)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on a device; the host waits for the copy unless that is a CUDA device."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class GroupBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of each of `num_groups` groups of the batch (section 3.3).

    It does what `num_groups` devices would, each with ordinary batch norm on its part; the groups
    are those of `torch.chunk`. The buffers are those of one batch norm and take one update a step,
    with the mean over the groups, so the weights load into any ResNet. With one group, or in eval
    mode, it is `nn.BatchNorm2d`.
    """

    def __init__(self, num_features: int, num_groups: int = 1, **options) -> None:
        super().__init__(num_features, **options)
        self.num_groups = num_groups
        # Where set, it takes the statistics (2, groups, C) in place of `update_running`.
        self.defer: Callable[[torch.Tensor], None] | None = None

    @classmethod
    def replacing(cls, norm: nn.BatchNorm2d, num_groups: int) -> "GroupBatchNorm2d":
        """This kind of batch norm in place of another, with its weights and statistics."""
        options = {name: getattr(norm, name) for name in ("eps", "momentum", "affine")}
        new = cls(norm.num_features, num_groups, **options)
        new.load_state_dict(norm.state_dict())
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> the same
        if not self.training or (self.num_groups == 1 and self.defer is None):
            return super().forward(x)
        if self.affine and compute.has_kernels(x.device):
            return self.forward_at_once(x)
        groups = x.chunk(self.num_groups)
        mean = self.running_mean.new_zeros(len(groups), self.num_features)
        var = torch.zeros_like(mean)
        # with momentum 1, batch_norm writes a group's own statistics into its row
        out = [
            F.batch_norm(group, m, v, self.weight, self.bias, True, 1.0, self.eps)
            for group, m, v in zip(groups, mean, var, strict=True)
        ]
        (self.defer or self.update_running)(torch.stack([mean, var]))
        return torch.cat(out) if len(out) > 1 else out[0]

    def forward_at_once(self, x: torch.Tensor) -> torch.Tensor:
        """All groups in two kernels; without them it is a loop, which a CPU does faster."""
        from run.kernels import GroupBatchNorm

        running = self.running_mean, self.running_var, self.num_batches_tracked
        running = running if self.defer is None else None
        out, statistics = GroupBatchNorm.apply(
            x, self.weight, self.bias, running, self.num_groups, self.momentum, self.eps
        )
        if self.defer is not None:
            self.defer(statistics[:2])
        return out

    @torch.no_grad()
    def update_running(self, statistics: torch.Tensor) -> None:
        """Move the running statistics to the mean of those of all groups, (2, groups, C)."""
        mean, var = statistics.mean(dim=1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        self.num_batches_tracked.add_(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}"


class GroupBatchNormAct2d(GroupBatchNorm2d):
    """timm's batch norm with an activation."""

    @classmethod
    def replacing(cls, norm: nn.BatchNorm2d, num_groups: int) -> "GroupBatchNorm2d":
        new = super().replacing(norm, num_groups)
        new.drop, new.act = norm.drop, norm.act
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, C, H, W) -> the same
        return self.act(self.drop(super().forward(x)))


def group_batch_norms(encoder: nn.Module, num_groups: int) -> nn.Module:
    """The encoder, with each of its batch norms in `num_groups` groups; changed in place."""
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                kind = GroupBatchNormAct2d if hasattr(child, "act") else GroupBatchNorm2d
                setattr(parent, name, kind.replacing(child, num_groups))
    return encoder
