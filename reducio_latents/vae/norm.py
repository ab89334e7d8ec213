"""Group normalisation and the activation after it: most of what is not a convolution.

In eager mode it is memory traffic: some five passes over the data. On a GPU group_norm also turns
channels_last_3d into the default layout, and the next convolution turns it back. `triton_norm`
reads twice, writes once and keeps the layout; elsewhere torch computes.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger(__name__)

_problems: list[str] = []
"""Why Triton's kernel is not used any more in this process."""

GROUPS = 32
EPS = 1e-6
CHANNELS_PER_GROUP = 4
"""Of the narrowest published level, 128 channels in 32 groups; see `ReducioVAE`."""


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool
) -> Tensor:
    """Return group_norm of x (B, C, ...), statistics per clip and group, then SiLU if wanted.

    `triton_norm` computes where `takes_triton`, torch elsewhere; and torch from then on if Triton
    cannot be imported or built, which a warning says once.
    """
    if takes_triton(x):
        try:
            from reducio_latents.vae import triton_norm

            return triton_norm.triton_group_norm(x, groups, weight, bias, eps, silu=silu)
        except torch.OutOfMemoryError:
            raise
        except Exception as err:  # Triton raises anything: no C compiler, an unknown GPU, ...
            _problems.append(f"{type(err).__name__}: {str(err).strip().partition(chr(10))[0]}")
            log.warning("norms are torch's, which are slower, for Triton fails: %s", _problems[-1])
    normed = F.group_norm(x, groups, weight, bias, eps)
    # In place only where nothing is recorded: autograd would keep a copy of `normed` for it.
    return F.silu(normed, inplace=not torch.is_grad_enabled()) if silu else normed


def norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return silu(group_norm(x))."""
    return group_norm(x, groups, weight, bias, eps, silu=True)


def takes_triton(x: Tensor) -> bool:
    """Whether `triton_norm` is for x: on a GPU, channels last, of its dtypes, and nothing else
    compiles it."""
    if _problems or not x.is_cuda or torch.compiler.is_compiling() or x.dtype == torch.float64:
        return False
    return x.movedim(1, -1).is_contiguous()


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

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu=False)


class NormSiLU(Norm):
    """Norm, then x * sigmoid(x)."""

    function = staticmethod(norm_silu)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.num_groups, self.weight, self.bias, self.eps)
