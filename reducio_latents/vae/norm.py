"""Group normalisation and the activation after it: most of what is not a convolution.

In eager mode it is memory traffic; a fused kernel can take the place of `norm_silu`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32
EPS = 1e-6


def norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return silu(group_norm(x)); x is (B, C, ...), statistics are per clip and group."""
    normed = F.group_norm(x, groups, weight, bias, eps)
    # In place only where nothing is recorded: autograd would keep a copy of `normed` for it.
    return F.silu(normed, inplace=not torch.is_grad_enabled())


class Norm(nn.GroupNorm):
    """GroupNorm of 32 groups; of gcd(32, channels) where a narrow model has fewer channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(GROUPS, channels), channels, eps=EPS)


class NormSiLU(Norm):
    """Norm, then x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)
