"""Half precision, reckoned beside what a CPU's own kernels make of it.

Which kernels a CPU has decides how far bfloat16 lands from float32, so no constant bounds it. What
must hold is that kernels are about as good as rounding alone: the same layers in float32, every
weight and every result of which is rounded.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)

SLACK = 3.0
"""How much worse than rounding alone kernels may be: they also round what lies within a layer."""


def rounding(model: ModelT, dtype: torch.dtype = torch.bfloat16) -> ModelT:
    """Return a copy that computes in float32, and rounds its weights and results to `dtype`."""
    rounded = copy.deepcopy(model).float()
    for tensor in [*rounded.parameters(), *rounded.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype).float()

    def round_result(_: nn.Module, __: Any, result: Any) -> Any:
        is_number = isinstance(result, Tensor) and result.is_floating_point()
        return result.to(dtype).float() if is_number else result

    for module in rounded.modules():
        module.register_forward_hook(round_result)
    return rounded


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return how far numbers are from others, in the 2-norm, relative."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def assert_as_near(found: Tensor, exact: Tensor, rounded: Tensor) -> None:
    """Check that lower precision is there, and is as near as rounding alone lets it be."""
    assert 0 < distance(found, exact) < SLACK * distance(rounded, exact)
