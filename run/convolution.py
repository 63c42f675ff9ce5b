"""Convolutions of maps of one pixel, as the last stages of encoders have them at small crops."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class OverlapConv2d(nn.Conv2d):
    """A convolution that, for an output of one pixel, skips the kernel taps that meet only padding.

    In a ResNet's last stage at 32 px these are eight of nine, and some CPUs compute the weight
    gradient ten times slower than that of a matrix product. In bf16 with stride 2, torch 2.14 may
    leave the gradient of those taps uninitialised. The result is that of nn.Conv2d.
    """

    @classmethod
    def replacing(cls, conv: nn.Conv2d) -> "OverlapConv2d":
        """This kind of convolution with the very parameters of `conv`; draws no random number."""
        shape = conv.in_channels, conv.out_channels, conv.kernel_size
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        new = cls(*shape, *geometry, bias=conv.bias is not None, device="meta")
        new.weight, new.bias = conv.weight, conv.bias
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, C, H, W)
        h, w = x.shape[2:]
        (kh, kw), (ph, pw), (sh, sw) = self.kernel_size, self.padding, self.stride
        one_pixel = (h + 2 * ph - kh) // sh == 0 and (w + 2 * pw - kw) // sw == 0
        if not one_pixel or h + ph > kh or w + pw > kw:
            return super().forward(x)
        taps = self.weight[:, :, ph : ph + h, pw : pw + w]  # those that touch the input
        if self.groups > 1:
            return F.conv2d(x, taps, self.bias, groups=self.groups)
        return F.linear(x.flatten(1), taps.flatten(1), self.bias)[:, :, None, None]


def replace_convolutions(encoder: nn.Module) -> None:
    """Put `OverlapConv2d` in the place of each plain convolution, padded with zeros."""
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and _is_plain(child):
                setattr(parent, name, OverlapConv2d.replacing(child))


def _is_plain(conv: nn.Conv2d) -> bool:
    by_number = isinstance(conv.padding, tuple) and conv.padding_mode == "zeros"
    return by_number and conv.dilation == (1, 1)
