"""Patch discriminators: a logit for each patch of a clip (3-D) or of a frame (2-D).

The 3-D one has the published keys, `loss.discriminator.main.*`; the 2-D one is that of Isola et al.
(arXiv 1611.07004), seen frame by frame, for those who want sharper frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Layer = tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Filters, kernel, stride, padding of one convolution."""

LAYERS_3D: tuple[Layer, ...] = (
    (64, (4, 4, 4), (2, 2, 2), (1, 1, 1)),
    (128, (4, 4, 4), (2, 2, 2), (1, 1, 1)),
    (256, (3, 4, 4), (2, 2, 2), (1, 1, 1)),
    (512, (1, 4, 4), (1, 1, 1), (0, 1, 1)),
    (1, (1, 4, 4), (1, 1, 1), (0, 1, 1)),
)
LAYERS_2D: tuple[Layer, ...] = tuple(
    (filters, (4, 4), (stride, stride), (1, 1))
    for filters, stride in ((64, 2), (128, 2), (256, 2), (512, 1), (1, 1))
)
LEAK = 0.2


class BatchNorm(_BatchNorm):
    """Batch normalisation over the clips of all ranks where `sync`, else over this rank's own.

    torch's SyncBatchNorm does the same on GPUs alone; this one also runs under gloo.
    """

    def __init__(self, channels: int, sync: bool) -> None:
        super().__init__(channels)
        self.sync = sync

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim in (4, 5)

    def forward(self, input: Tensor) -> Tensor:
        if not (
            self.sync and self.training and dist.is_initialized() and dist.get_world_size() > 1
        ):
            out: Tensor = super().forward(input)
            return out
        with torch.autocast(input.device.type, enabled=False):
            return self._across_ranks(input.float())

    def _across_ranks(self, x: Tensor) -> Tensor:
        over = [0, *range(2, x.ndim)]
        count = x.new_full((1,), x.numel() / x.shape[1])
        total = _sum_over_ranks(torch.cat([x.sum(over), count]))
        count = total[-1].detach()
        shape = (1, -1, *(1,) * (x.ndim - 2))
        centred = x - (total[:-1] / count).reshape(shape)
        variance = _sum_over_ranks(centred.square().sum(over)) / count
        self._track(total[:-1] / count, variance * count / (count - 1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        out: Tensor = centred * scale.reshape(shape) + self.bias.reshape(shape)
        return out

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked += 1


class PatchDiscriminator(nn.Module):
    """(B, 3, T, H, W), or (B, 3, H, W) -> one logit per patch. Weights start at N(0, 0.02)."""

    def __init__(self, layers: Sequence[Layer], *, sync_batchnorm: bool) -> None:
        super().__init__()
        self.main = nn.Sequential()
        channels = 3
        for i, (filters, kernel, stride, padding) in enumerate(layers):
            outermost = i in (0, len(layers) - 1)  # no norm, so a bias
            make = nn.Conv3d if len(kernel) == 3 else nn.Conv2d
            conv = make(channels, filters, kernel, stride, padding, bias=outermost)  # type: ignore[arg-type]
            self.main.append(conv)
            if not outermost:
                self.main.append(BatchNorm(filters, sync_batchnorm))
            if i < len(layers) - 1:
                self.main.append(nn.LeakyReLU(LEAK))
            channels = filters
        self.apply(_initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.main(pixels)
        return logits


class Discriminators(nn.ModuleDict):
    """The discriminators that a run has, by name: `3d`, `2d`, both or none."""

    def __init__(self, names: Sequence[str], *, sync_batchnorm: bool) -> None:
        super().__init__(
            {
                name: PatchDiscriminator(
                    LAYERS_3D if name == "3d" else LAYERS_2D, sync_batchnorm=sync_batchnorm
                )
                for name in names
            }
        )

    def logits(self, video_BCTHW: Tensor) -> list[Tensor]:
        """Return the logits of each discriminator; the 2-D one sees the frames as a batch."""
        return [
            net(video_BCTHW if name == "3d" else video_BCTHW.transpose(1, 2).flatten(0, 1))
            for name, net in self.items()
        ]

    def forward(self, real_BCTHW: Tensor, fake_BCTHW: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the logits of real and of fake clips, seen in separate passes."""
        return self.logits(real_BCTHW), self.logits(fake_BCTHW)


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks; each rank's loss depends on all inputs, so gradients are summed as well."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


def _sum_over_ranks(x: Tensor) -> Tensor:
    out: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, BatchNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
