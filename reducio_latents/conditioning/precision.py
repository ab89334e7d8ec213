"""How few bits a frozen encoder may compute in: chosen by measuring it against float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor

from reducio_latents.errors import ConfigError

EncoderT = TypeVar("EncoderT")

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_LIMIT = 0.02
"""Relative error above which `auto` stays with float32. bfloat16 has 8 bits, 2**-9 = 0.002 a step;
a sound encoder of tens of layers ends below 0.01."""


class FrozenEncoder:
    """A model that is not trained, on one device."""

    model: Any
    dtype: torch.dtype
    identity: Mapping[str, Any]
    """All that changes numbers but the precision, as JSON."""

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def config(self) -> dict[str, Any]:
        """All that changes numbers, as JSON."""
        precision = {"dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type}
        return {**self.identity, "precision": precision}


def settle(
    model: EncoderT,
    wanted: str,
    cast: Callable[[EncoderT, torch.dtype], EncoderT],
    probe: Callable[[EncoderT], Tensor],
    *,
    needs_float32: bool = False,
) -> tuple[EncoderT, torch.dtype, float | None]:
    """Return the float32 `model` in the precision `wanted`, its dtype, and its error.

    The error is relative (2-norm), of `probe` against float32; None where nothing was lowered.
    `auto` takes bfloat16 unless the model says that it needs float32, or the error is above
    `AUTO_LIMIT`. `cast` returns a copy. Raises ConfigError for a precision in which the model gives
    NaN or infinity.
    """
    if wanted == "float32" or (wanted == "auto" and needs_float32):
        return model, torch.float32, None
    dtype = torch.bfloat16 if wanted == "auto" else TORCH_DTYPES[wanted]
    exact = probe(model).float()
    lowered = cast(model, dtype)
    error = relative_error(probe(lowered), exact)
    if error <= AUTO_LIMIT or (wanted != "auto" and error < float("inf")):
        return lowered, dtype, error
    if wanted == "auto":
        return model, torch.float32, None
    raise ConfigError(f"this model gives NaN or infinity in {wanted}. Use bfloat16 or float32.")


def place_encoder(
    model: torch.nn.Module,
    wanted: str,
    device: torch.device,
    probe: Callable[[torch.nn.Module], Tensor],
) -> tuple[torch.nn.Module, torch.dtype, float | None]:
    """Return the float32 `model` on `device`, as `settle` does.

    One that does not fit there in float32 goes there lowered, and its error stays unknown.
    """
    try:
        return settle(model.to(device), wanted, lambda m, to: deepcopy(m).to(to), probe)
    except torch.OutOfMemoryError as err:
        if wanted == "float32":
            raise ConfigError(
                f"{type(model).__name__} does not fit on {device} in float32. Use bfloat16."
            ) from err
    dtype = torch.bfloat16 if wanted == "auto" else TORCH_DTYPES[wanted]
    return model.to("cpu").to(dtype).to(device), dtype, None


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return |found - exact| / |exact|, 2-norms; infinity where `found` is not finite."""
    if not torch.isfinite(found).all():
        return float("inf")
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def probe_pixels(side_px: int = 256) -> Tensor:
    """Return two pictures to measure on, (2, 3, side, side) in [-1, 1]: a ramp, and noise on it."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-0.9, 0.9, side_px)
    smooth = torch.stack(
        [ramp.expand(side_px, -1), ramp[:, None].expand(-1, side_px), -ramp.expand(side_px, -1)]
    )
    noise = torch.randn(3, side_px, side_px, generator=generator)
    return torch.stack([smooth, (smooth + 0.3 * noise).clamp(-1, 1)])
