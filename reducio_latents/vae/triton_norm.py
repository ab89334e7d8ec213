"""Group normalisation with the channels last, and the SiLU after it, in Triton.

Every pass reads and writes whole rows of channels: x is taken as (B, N, C), N positions.

Forward. Each piece of PIECE rows of a clip gives, for each channel, a mean m_pc and a sum s_pc of
squares about it, merged tile by tile as Chan, Golub and LeVeque (1983) do: a mean far from zero
costs no digits. Over pieces and channels of a group, with n_p rows in a piece, n = N C / groups:
    mean = sum n_p m_pc / n,    var = (sum s_pc + n_p (m_pc - mean)^2) / n
    xhat = (x - mean) / sqrt(var + eps),    z = xhat * weight + bias,    y = z * sigmoid(z)
Backward. With dz = dy * sigmoid(z) * (1 + z * (1 - sigmoid(z))), the pieces give sums of dz and of
dz * xhat for each channel, which are the gradients of bias and weight, and with g = dz * weight:

    dx = (g - mean(g) - xhat * mean(g * xhat)) / sqrt(var + eps),    means over the group
Statistics are float32 whatever x is. Blocks have fixed sizes, nothing is tuned, no sum depends on
which program ends first: the same input gives the same bits at every start.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

PIECE = 512  # rows that one program reads
TILE = 8192  # values that it holds at a time
WIDEST = 512  # channels of a program; wider inputs are cut
# Whether Triton fuses by default depends on its version, and the bits with it.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _tile(start, N, C, ROWS: constexpr, COLS: constexpr):
    """Return where a tile of this program lies, which of it is there, and its channels."""
    n, c = start + tl.arange(0, ROWS), tl.program_id(2) * COLS + tl.arange(0, COLS)
    where = (tl.program_id(1).to(tl.int64) * N + n[:, None]) * C + c[None, :]
    return where, (n < N)[:, None] & (c < C)[None, :], c


@triton.jit
def _moments(x, sums, N, C, PIECE: constexpr, ROWS: constexpr, COLS: constexpr):
    """Write each channel's mean over a piece, and its sum of squares about that."""
    piece = tl.program_id(0)
    mean, square = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    end = tl.minimum((piece + 1) * PIECE, N)
    for start in range(piece * PIECE, end, ROWS):
        where, there, _ = _tile(start, N, C, ROWS, COLS)
        values = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
        before, rows = 1.0 * (start - piece * PIECE), 1.0 * tl.minimum(end - start, ROWS)
        tile_mean = tl.sum(values, axis=0) / rows
        apart = tl.where(there, values - tile_mean[None, :], 0.0)
        shift = tile_mean - mean
        mean += shift * (rows / (before + rows))
        square += tl.sum(apart * apart, axis=0) + shift * shift * (before * rows / (before + rows))
    _store(sums, mean, square, C, COLS)


@triton.jit
def _store(sums, first, second, C, COLS: constexpr):
    """Write two numbers a channel for this program's piece: `sums` is (B, pieces, 2, C)."""
    c = tl.program_id(2) * COLS + tl.arange(0, COLS)
    to = sums + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 2 * C + c
    tl.store(to, first, mask=c < C)
    tl.store(to + C, second, mask=c < C)


@triton.jit
def _part(sums, start, N, C, PIECES, CG, PIECE: constexpr, PARTS: constexpr, WIDTH: constexpr):
    """Return means and squares of a group in some pieces, their rows, and which are there."""
    p, c = start + tl.arange(0, PARTS), tl.arange(0, WIDTH)
    there = (p < PIECES)[:, None] & (c < CG)[None, :]
    row = (tl.program_id(1) * PIECES + p[:, None]) * 2 * C + tl.program_id(0) * CG + c[None, :]
    rows = tl.minimum(N - p * PIECE, PIECE).to(tl.float32)[:, None]
    return tl.load(sums + row, there, 0.0), tl.load(sums + row + C, there, 0.0), rows, there


@triton.jit
def _statistics(
    sums, stats, N, C, PIECES, CG, eps, PIECE: constexpr, PARTS: constexpr, WIDTH: constexpr
):
    """Write a group's mean and 1 / sqrt(var + eps)."""
    count, mean, square = 1.0 * N * CG, 0.0, 0.0
    for start in range(0, PIECES, PARTS):
        means, _, rows, _ = _part(sums, start, N, C, PIECES, CG, PIECE, PARTS, WIDTH)
        mean += tl.sum(means * (rows / count))
    for start in range(0, PIECES, PARTS):
        means, squares, rows, there = _part(sums, start, N, C, PIECES, CG, PIECE, PARTS, WIDTH)
        apart = tl.where(there, means - mean, 0.0)
        square += tl.sum(squares + rows * apart * apart)
    to = stats + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(to, mean)
    tl.store(to + 1, 1 / tl.sqrt(square / count + eps))


@triton.jit
def _of_group(pairs, c, C, CG):
    """Return both numbers of each channel's group: `pairs` is (B, groups, 2)."""
    at = pairs + (tl.program_id(1) * (C // CG) + c // CG) * 2
    return tl.load(at, c < C, 0.0)[None, :], tl.load(at + 1, c < C, 0.0)[None, :]


@triton.jit
def _normed(x, stats, weight, bias, where, there, c, C, CG):
    """Return xhat, z, the weights and 1 / std of a tile."""
    mean, rstd = _of_group(stats, c, C, CG)
    w = tl.load(weight + c, c < C, 0.0).to(tl.float32)[None, :]
    b = tl.load(bias + c, c < C, 0.0).to(tl.float32)[None, :]
    xhat = (tl.load(x + where, there, 0.0).to(tl.float32) - mean) * rstd
    return xhat, xhat * w + b, w, rstd


@triton.jit
def _apply(
    x, stats, weight, bias, N, C, CG, y,
    SILU: constexpr, PIECE: constexpr, ROWS: constexpr, COLS: constexpr,
):  # fmt: skip
    first = tl.program_id(0) * PIECE
    for start in range(first, tl.minimum(first + PIECE, N), ROWS):
        where, there, c = _tile(start, N, C, ROWS, COLS)
        _, z, _, _ = _normed(x, stats, weight, bias, where, there, c, C, CG)
        if SILU:
            z = z / (1 + tl.exp(-z))
        tl.store(y + where, z.to(y.dtype.element_ty), mask=there)


@triton.jit
def _slopes(
    x, stats, weight, bias, N, C, CG, dy, sums, means, dx,
    SUMS: constexpr, SILU: constexpr, PIECE: constexpr, ROWS: constexpr, COLS: constexpr,
):  # fmt: skip
    """Write each channel's sums of dz and dz * xhat over a piece; or dx, given their means."""
    plain, along = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    first = tl.program_id(0) * PIECE
    for start in range(first, tl.minimum(first + PIECE, N), ROWS):
        where, there, c = _tile(start, N, C, ROWS, COLS)
        xhat, z, w, rstd = _normed(x, stats, weight, bias, where, there, c, C, CG)
        dz = tl.load(dy + where, there, 0.0).to(tl.float32)
        if SILU:
            sigmoid = 1 / (1 + tl.exp(-z))
            dz = dz * sigmoid * (1 + z * (1 - sigmoid))
        if SUMS:
            plain += tl.sum(dz, axis=0)
            along += tl.sum(dz * xhat, axis=0)
        else:
            mean, mean_along = _of_group(means, c, C, CG)
            slope = (dz * w - mean - xhat * mean_along) * rstd
            tl.store(dx + where, slope.to(dx.dtype.element_ty), mask=there)
    if SUMS:
        _store(sums, plain, along, C, COLS)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
    ) -> Tensor:
        rows = x.movedim(1, -1).contiguous()
        B, C, N, CG = len(x), x.shape[1], rows[0].numel() // x.shape[1], x.shape[1] // groups
        cols, width = min(triton.next_power_of_2(C), WIDEST), triton.next_power_of_2(CG)
        grid = (pieces, _, _) = (triton.cdiv(N, PIECE), B, triton.cdiv(C, cols))
        blocks = {"PIECE": PIECE, "ROWS": min(TILE // cols, PIECE), "COLS": cols, **LAUNCH}
        parts = {"PIECE": PIECE, "PARTS": max(1, 2048 // width), "WIDTH": width, **LAUNCH}
        sums = x.new_empty(B, pieces, 2, C, dtype=torch.float32)
        stats, y = sums.new_empty(B, groups, 2), torch.empty_like(rows)
        with torch.cuda.device_of(x):
            _moments[grid](rows, sums, N, C, **blocks)
            _statistics[(groups, B)](sums, stats, N, C, pieces, CG, eps, **parts)
            _apply[grid](rows, stats, weight, bias, N, C, CG, y, SILU=silu, **blocks)
        ctx.save_for_backward(rows, stats, weight, bias)
        ctx.how = (N, C, CG), grid, {"SILU": silu, **blocks}
        return y.movedim(-1, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        (N, C, CG), grid, blocks = ctx.how
        rows, stats, weight, _ = ctx.saved_tensors
        slopes, dx = dy.movedim(1, -1).contiguous(), torch.empty_like(rows)
        sums = stats.new_empty(grid[1], grid[0], 2, C)
        given = (*ctx.saved_tensors, N, C, CG, slopes, sums)
        with torch.cuda.device_of(rows):
            _slopes[grid](*given, stats, dx, SUMS=True, **blocks)
            of_clips = sums.sum(1)  # (B, 2, C)
            means = (of_clips * weight).unflatten(2, (-1, CG)).sum(-1).mT / (N * CG)
            _slopes[grid](*given, means.float().contiguous(), dx, SUMS=False, **blocks)
        d_bias, d_weight = of_clips.sum(0).to(weight.dtype)
        return dx.movedim(-1, 1), None, d_weight, d_bias, None, None


def triton_group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool
) -> Tensor:
    """Return group_norm of x (B, C, ...), then SiLU if wanted, in x's dtype, channels last.
    x is float32, bfloat16 or float16; another layout is copied first. Gradients have none."""
    return _GroupNorm.apply(x, groups, weight, bias, eps, silu)  # type: ignore[no-any-return]
