"""What the three networks are built of, in 2-D for images and in 3-D for video."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reducio_latents.vae.norm import Norm, NormSiLU

HEADS = 8
"""Of self-attention."""


def conv(dims: int, channels_in: int, channels_out: int, kernel: int) -> nn.Module:
    """Return a convolution over `dims` axes that keeps their sizes."""
    make = nn.Conv3d if dims == 3 else nn.Conv2d
    return make(channels_in, channels_out, kernel, padding=kernel // 2)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 shortcut where channels change."""

    def __init__(self, dims: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = NormSiLU(channels_in)
        self.conv1 = conv(dims, channels_in, channels_out, 3)
        self.norm2 = NormSiLU(channels_out)
        self.conv2 = conv(dims, channels_out, channels_out, 3)
        self.nin_shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.nin_shortcut = conv(dims, channels_in, channels_out, 1)

    def forward(self, x: Tensor, pads: Sequence[int] = ()) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        out: Tensor = padded_sum(self.nin_shortcut(x), h, pads)
        return out


def padded_sum(x: Tensor, y: Tensor, pads: Sequence[int]) -> Tensor:
    """Return x + y, (B, C, ...), padded as by `pad_ends`.

    Where nothing is recorded or compiled the sum is written where it stays, and not copied there.
    """
    if not any(pads):
        return x + y
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return pad_ends(x + y, pads)
    size = [*x.shape[:2], *(n + pad for n, pad in zip(x.shape[2:], pads, strict=True))]
    last = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
    layout = last if x.is_contiguous(memory_format=last) else torch.contiguous_format
    dtype = torch.result_type(x, y)
    padded = torch.empty(size, dtype=dtype, device=x.device, memory_format=layout)
    for axis, pad in enumerate(pads, 2):
        if pad:
            padded.narrow(axis, x.shape[axis], pad).zero_()
    torch.add(x, y, out=unpadded(padded, pads))
    return padded


def pad_ends(x: Tensor, pads: Sequence[int]) -> Tensor:
    """Return x with so many zeros at the end of each axis after the channels."""
    return F.pad(x, [end for pad in reversed(pads) for end in (0, pad)])


def unpadded(padded: Tensor, pads: Sequence[int]) -> Tensor:
    """Return a view without the zeros of `pad_ends`."""
    for axis, pad in enumerate(pads, 2):
        padded = padded.narrow(axis, 0, padded.shape[axis] - pad)
    return padded


class SelfAttention(nn.Module):
    """x plus attention of every position to every other, 8 heads."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.q = conv(dims, channels, channels, 1)
        self.k = conv(dims, channels, channels, 1)
        self.v = conv(dims, channels, channels, 1)
        self.proj_out = conv(dims, channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            rearrange(part(h), "b (heads c) ... -> b heads (...) c", heads=HEADS)
            for part in (self.q, self.k, self.v)
        )
        if q.stride(-1) != 1:  # a token's channels lie side by side, as kernels want them, in
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # channels_last alone
        h = F.scaled_dot_product_attention(q, k, v)
        h = rearrange(h, "b heads n c -> b (heads c) n").reshape(x.shape)
        out: Tensor = x + self.proj_out(h)
        return out


class Middle(nn.Module):
    """Residual block, self-attention, residual block, at the coarsest level."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(dims, channels, channels)
        self.attn_1 = SelfAttention(dims, channels)
        self.block_2 = ResidualBlock(dims, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Downsample(nn.Module):
    """Strided convolution: stride 2 on the axes that are halved, 1 and kernel 1 on the others."""

    def __init__(self, channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        make = nn.Conv3d if len(stride) == 3 else nn.Conv2d
        kernel = tuple(3 if s == 2 else 1 for s in stride)
        self.conv = make(channels, channels, kernel, stride=tuple(stride))  # type: ignore[arg-type]
        self.pads = [s - 1 for s in stride]
        """A zero at the end of each halved axis."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(pad_ends(x, self.pads))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour growth of (t, h, w) by `factors`, then a 3x3x3 convolution."""

    def __init__(self, channels: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = [float(factor) for factor in factors]
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=self.factors, mode="nearest"))
        return out


class DownLevel(nn.Module):
    """Two residual blocks, then what leads to the next level: returns (features, next input)."""

    def __init__(
        self, channels_in: int, channels_out: int, dims: int, stride: Sequence[int] | None
    ) -> None:
        super().__init__()
        self.block = nn.Sequential(
            ResidualBlock(dims, channels_in, channels_out),
            ResidualBlock(dims, channels_out, channels_out),
        )
        self.downsample: nn.Module = nn.Identity()
        if stride is not None:
            self.downsample = Downsample(channels_out, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, down = self.block[0](x), self.downsample
        if not isinstance(down, Downsample):
            x = self.block[1](x)
            return x, x
        padded = self.block[1](x, down.pads)
        return unpadded(padded, down.pads), down.conv(padded)


def down_levels(
    channels: Sequence[int], strides: Sequence[Sequence[int]], dims: int
) -> nn.ModuleList:
    """Return one DownLevel for each of `channels`; `strides` lie between them."""
    levels = nn.ModuleList()
    previous = channels[0]
    for i, width in enumerate(channels):
        stride = strides[i] if i < len(strides) else None
        levels.append(DownLevel(previous, width, dims, stride))
        previous = width
    return levels
