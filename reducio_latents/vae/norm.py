"""Group normalisation and the activation after it: most of what is not a convolution.

In eager mode it is memory traffic: some five passes over the data. On a GPU group_norm also turns
channels_last_3d into the default layout, and the next convolution turns it back. `fuse_norms` makes
two passes of it that keep the layout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32
EPS = 1e-6
CHANNELS_PER_GROUP = 4
"""Of the narrowest published level, 128 channels in 32 groups; see `ReducioVAE`."""


def norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return silu(group_norm(x)); x is (B, C, ...), statistics are per clip and group."""
    normed = F.group_norm(x, groups, weight, bias, eps)
    # In place only where nothing is recorded: autograd would keep a copy of `normed` for it.
    return F.silu(normed, inplace=not torch.is_grad_enabled())


def fusible_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return what `norm_silu` does, in operations that a compiler makes two kernels of: one for the
    statistics, in float32, and one for all the rest. Strides are those of x."""
    grouped = x.view(x.shape[0], groups, -1, *x.shape[2:])
    axes = list(range(2, grouped.ndim))
    variance, mean = torch.var_mean(grouped.float(), axes, correction=0, keepdim=True)
    normed = ((grouped - mean) * torch.rsqrt(variance + eps)).flatten(1, 2)
    per_channel = (-1, *[1] * (x.ndim - 2))
    return F.silu(normed * weight.view(per_channel) + bias.view(per_channel)).to(x.dtype)


def fuse_norms(network: nn.Module) -> None:
    """Have every NormSiLU run compiled, the rest of the network as it is: seconds to compile for a
    size of input, where the whole network takes minutes."""
    fused = torch.compile(fusible_norm_silu, dynamic=False)
    for module in network.modules():
        if isinstance(module, NormSiLU):
            module.function = fused


class Norm(nn.GroupNorm):
    """GroupNorm of 32 groups; of gcd(32, channels) where a narrow model has fewer channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(GROUPS, channels), channels, eps=EPS)


class NormSiLU(Norm):
    """Norm, then x * sigmoid(x)."""

    function = staticmethod(norm_silu)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.num_groups, self.weight, self.bias, self.eps)
