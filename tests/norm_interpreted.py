"""The norm by hand has float64's numbers: `test_norm_triton` runs this by Triton's
interpreter: with TRITON_INTERPRET=1, which Triton must see when it is imported first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.vae import norm
from reducio_latents.vae.blocks import ResidualBlock
from reducio_latents.vae.triton_norm import triton_group_norm

CASES = [  # (B, C, ...), groups, mean, dtype, silu
    ((2, 32, 2, 5, 7), 4, 0.0, torch.float32, True),
    ((2, 8, 2, 5, 7), 8, 0.0, torch.bfloat16, False),
    ((1, 6, 3, 13, 25), 2, 0.0, torch.float32, True),  # a piece of rows, and a part of one
    ((1, 6, 3, 13, 25), 1, 2.0, torch.bfloat16, True),
    ((2, 24, 9, 11), 3, 1000.0, torch.float32, True),
    ((1, 640, 2, 3), 2, -3.0, torch.float16, False),  # more channels than a program holds
    ((1, 8, 1, 1), 1, 0.0, torch.float32, False),
]


def errors(found: Any, exact: Any) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def run(function: Any, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    """Return y, and the gradients of x, weight and bias."""
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    y = function(x, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy.to(y.dtype))]


@pytest.mark.parametrize(("shape", "groups", "mean", "dtype", "silu"), CASES)
def test_values_and_gradients_are_float64s_to_rounding(
    shape: tuple[int, ...], groups: int, mean: float, dtype: torch.dtype, silu: bool
) -> None:
    torch.manual_seed(0)
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    exact_x = torch.randn(shape, dtype=torch.float64) + mean
    weight, bias = torch.randn(2, shape[1])
    dy = torch.randn(shape)

    def by_torch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.group_norm(x, groups, w, b, 1e-6)
        return F.silu(y) if silu else y

    def by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        found: Tensor = triton_group_norm(x, groups, w, b, 1e-6, silu=silu)
        return found

    x = exact_x.to(dtype).contiguous(memory_format=last)
    exact = run(by_torch, *(t.double() for t in (x, weight, bias, dy)))
    found = run(by_hand, x, weight, bias, dy.to(dtype))
    assert found[0].dtype == dtype
    assert found[0].movedim(1, -1).is_contiguous()
    # Beside float32's rounding of the input there is that of the mean, and of the results.
    room = 2e-6 + 4 * abs(mean) * torch.finfo(torch.float32).eps
    rounding = 0.0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert all(error < room + rounding for error in errors(found, exact))


def test_any_layout_gives_the_same_bits_and_so_does_a_second_time() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 8, 3, 14, 15), torch.randn(8), torch.randn(8)
    every_second = torch.randn(1, 8, 3, 14, 30)[..., ::2].copy_(x)
    layouts = [x, x, x.contiguous(memory_format=torch.channels_last_3d), every_second]
    found = [triton_group_norm(t, 2, weight, bias, 1e-6, silu=True) for t in layouts]
    assert all(torch.equal(other, found[0]) for other in found)


def test_blocks_use_it_for_each_of_their_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(3, 8, 16)
    x = torch.randn(1, 8, 2, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    expected = block(x)
    seen: list[torch.Size] = []

    def takes(x: Tensor) -> bool:
        seen.append(x.shape)
        return True

    monkeypatch.setattr(norm, "takes_triton", takes)
    torch.testing.assert_close(block(x), expected)
    assert [shape[1] for shape in seen] == [8, 16]
