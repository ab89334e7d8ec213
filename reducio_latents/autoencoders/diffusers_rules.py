"""What each autoencoder of diffusers takes and gives: frames, strides, the scale of its latents.

The library itself pads, drops or repeats frames that do not fit, without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from reducio_latents.core.gaussian import check_final_rule
from reducio_latents.core.geometry import LatentGeometry
from reducio_latents.errors import WeightsError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What one class of diffusers takes and gives."""

    geometry: Callable[[Any], LatentGeometry]
    """Of a model."""
    frame_step: int = 0
    """Clips have frame_step * k + 1 frames; 0 where the geometry's own rule is enough."""
    framewise: bool = False
    """An image autoencoder, used on every frame alone."""
    tiles: bool = True
    """Whether the library can cut its frames."""


def _image(model: Any) -> LatentGeometry:
    halvings = len(model.config.block_out_channels) - 1
    return LatentGeometry(
        channels=model.config.latent_channels, temporal_stride=1, spatial_stride=2**halvings
    )


def _wan(model: Any) -> LatentGeometry:
    config = model.config
    return LatentGeometry(
        channels=config.z_dim,
        temporal_stride=2 ** sum(config.temperal_downsample),
        spatial_stride=2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1),
        causal=True,
    )


def _cogvideox(model: Any) -> LatentGeometry:
    return LatentGeometry(
        channels=model.config.latent_channels,
        temporal_stride=int(model.config.temporal_compression_ratio),
        spatial_stride=2 ** (len(model.config.block_out_channels) - 1),
        causal=True,
    )


def _as_declared(model: Any) -> LatentGeometry:
    declared = model.config if "temporal_compression_ratio" in model.config else model
    return LatentGeometry(
        channels=model.config.latent_channels,
        temporal_stride=int(
            declared.temporal_compression_ratio or model.temporal_compression_ratio
        ),
        spatial_stride=int(declared.spatial_compression_ratio or model.spatial_compression_ratio),
        causal=True,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "AutoencoderKL": Architecture(geometry=_image, framewise=True),
    "AutoencoderKLWan": Architecture(geometry=_wan),
    "AutoencoderKLLTXVideo": Architecture(geometry=_as_declared),
    # It works through 8 frames at a time: 5 frames give 2 steps, and 2 steps decode to 8 frames.
    "AutoencoderKLCogVideoX": Architecture(geometry=_cogvideox, frame_step=8),
    "AutoencoderKLHunyuanVideo": Architecture(geometry=_as_declared),
    "AutoencoderKLMochi": Architecture(geometry=_as_declared),
    "AutoencoderKLCosmos": Architecture(geometry=_as_declared, tiles=False),
}


def final_rule_of(model: Any) -> dict[str, Any]:
    """Return the rule by which the model's own pipelines scale its latents."""
    config = model.config
    scale = float(config.get("scaling_factor") or 1.0)
    shift: Any = float(config.get("shift_factor") or 0.0)
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if means is None and "latents_mean" in dict(model.named_buffers()):
        means, stds = model.latents_mean.tolist(), model.latents_std.tolist()
    factor: Any = scale
    if means is not None and stds is not None:
        channels = int(config.get("latent_channels") or config.get("z_dim"))
        shift = _per_channel(means, channels)
        factor = (scale / torch.tensor(_per_channel(stds, channels), dtype=torch.float64)).tolist()
    rule = {"rule": "scale_shift", "scale": factor, "shift": shift}
    check_final_rule(rule)
    return rule


def _per_channel(values: Any, channels: int) -> list[Any]:
    """Return one value a channel, or, of a longer list, one a channel and latent step."""
    flat = [float(value) for value in values]
    steps, rest = divmod(len(flat), channels)
    if rest or not steps:
        raise WeightsError(f"the config has {len(flat)} latent means for {channels} channels.")
    if steps == 1:
        return flat
    return [flat[start : start + steps] for start in range(0, len(flat), steps)]


def latent_steps(rule: Mapping[str, Any]) -> int | None:
    """Return for how many latent steps a rule has values, or None for any."""
    shift = rule["shift"]
    by_step = isinstance(shift, list) and shift and isinstance(shift[0], list)
    return len(shift[0]) if by_step else None
