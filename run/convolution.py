"""Convolutions with outputs of a few pixels, as in the last stages of encoders at small crops."""

import torch
import torch.nn as nn
import torch.nn.functional as F

MOST_PIXELS = {1: 16, 3: 4}  # of an output on a CPU, by the kernel's side; measured with oneDNN


class SmallConv2d(nn.Conv2d):
    """A convolution that computes an output of a few pixels as one matrix product.

    It leaves out the kernel's taps that meet only padding: in a ResNet's last stage at 32 px they
    are eight of nine. On a CPU the product is up to seven times as fast; on other devices only an
    output of one pixel is computed so. For one pixel of bf16 with stride 2, torch 2.14 may leave
    the gradient of those taps uninitialised. The result is nn.Conv2d's.
    """

    @classmethod
    def replacing(cls, conv: nn.Conv2d) -> "SmallConv2d":
        """This kind of convolution with the very parameters of `conv`; draws no random number."""
        shape = conv.in_channels, conv.out_channels, conv.kernel_size
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        new = cls(*shape, *geometry, bias=conv.bias is not None, device="meta")
        new.weight, new.bias = conv.weight, conv.bias
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, C, H, W)
        sides = zip(x.shape[2:], self.kernel_size, self.stride, self.padding, strict=True)
        (h, top, rows), (w, left, columns) = (_overlap(*side) for side in sides)
        is_fast = x.device.type in ("cpu", "meta") and self.groups == 1  # meta: run/memory.py
        most = MOST_PIXELS.get(max(self.kernel_size), 1) if is_fast else 1
        if min(h, w) < 1 or h * w > most:
            return super().forward(x)
        # channels last, where taps and their gradients lie in memory as the weight does
        taps = self.weight.permute(0, 2, 3, 1)[:, rows, columns]
        kh, kw = taps.shape[1:3]
        (sh, sw), (H, W) = self.stride, x.shape[2:]
        bottom, right = (h - 1) * sh + kh - top - H, (w - 1) * sw + kw - left - W
        if any(padding := (left, right, top, bottom)):
            x = F.pad(x, padding)
        if self.groups > 1:
            return F.conv2d(x, taps.permute(0, 3, 1, 2), self.bias, groups=self.groups)
        x = x.permute(0, 2, 3, 1)
        if h * w > 1:  # the patch of each output pixel
            down = [slice(i, i + (h - 1) * sh + 1, sh) for i in range(kh)]
            along = [slice(j, j + (w - 1) * sw + 1, sw) for j in range(kw)]
            patches = [x[:, row, column] for row in down for column in along]
            x = torch.cat(patches, dim=3).flatten(0, 2)
        out = F.linear(x.flatten(1), taps.flatten(1), self.bias)
        return out.view(-1, h, w, self.out_channels).permute(0, 3, 1, 2)


def _overlap(size: int, kernel: int, stride: int, padding: int) -> tuple[int, int, slice]:
    """Of one side: outputs, the padding before what is read, and the taps that touch the image."""
    outputs = (size + 2 * padding - kernel) // stride + 1
    first = max(0, padding - (outputs - 1) * stride)
    return outputs, padding - first, slice(first, min(kernel, size + padding))


def replace_convolutions(encoder: nn.Module) -> None:
    """Put `SmallConv2d` in the place of each plain convolution, padded with zeros."""
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and _is_plain(child):
                setattr(parent, name, SmallConv2d.replacing(child))


def _is_plain(conv: nn.Conv2d) -> bool:
    by_number = isinstance(conv.padding, tuple) and conv.padding_mode == "zeros"
    return by_number and conv.dilation == (1, 1)
