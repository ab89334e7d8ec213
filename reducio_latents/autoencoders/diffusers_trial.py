"""A class of diffusers that is not in the table, tried on small clips: what it takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reducio_latents.autoencoders.diffusers_rules import (
    ClipKind,
    ModelRules,
    decoded_pixels,
    moments_of,
)
from reducio_latents.core.libraries import first_line
from reducio_latents.errors import ConfigError

TRIED_SIDES = (64, 128, 256)
"""Of the pictures that it is tried on, until one is taken."""
TRIED_FRAMES = 16


@torch.inference_mode()
def assumed_rules(model: Any) -> tuple[ModelRules, dict[str, Any]]:
    """Return the rules that a model keeps to on small clips, and the same as JSON.

    Final latents are taken to be (z - shift) * scale, by what its config says. Raises ConfigError
    for a model whose latents and frames do not come out in a plain ratio.
    """
    model.eval()
    problem = "the shapes do not agree"
    for side in TRIED_SIDES:
        for trial in (_video, _pictures):
            try:
                found = trial(model, side)
            # Whatever foreign code says of an input of this shape, the next one is tried.
            except Exception as err:
                problem = first_line(err)
                continue
            if found is not None:
                return found, {
                    "frames": found.frames,
                    "strides": list(found.strides(model)),
                    "channels": found.channels,
                }
    raise ConfigError(
        f"{type(model).__name__} does not encode and decode small clips in plain ratios "
        f"({problem}). It cannot be used by its config alone."
    )


def in_words(assumed: Mapping[str, Any]) -> str:
    step, side = assumed["strides"]
    frames = {
        "each": "pictures, so a clip's frames one by one",
        "causal": f"clips of {step}k+1 frames",
        "whole": f"clips of {step}k frames",
    }[assumed["frames"]]
    return (
        f"{frames}, {side} px a latent cell, {assumed['channels']} latent channels, and final "
        "latents scaled and shifted as its config says"
    )


def _video(model: Any, side: int) -> ModelRules | None:
    for frames in (TRIED_FRAMES + 1, TRIED_FRAMES):
        z = moments_of(model.encode(torch.zeros(1, 3, frames, side, side))).mean
        steps = z.shape[2] - frames % 2
        # Libraries drop or pad frames that do not fit: only what comes back whole did fit.
        comes_back = decoded_pixels(model.decode(z)).shape == (1, 3, frames, side, side)
        if comes_back and steps > 0 and not TRIED_FRAMES % steps and not side % z.shape[3]:
            return _rules("causal" if frames % 2 else "whole", TRIED_FRAMES // steps, side, z)
    return None


def _pictures(model: Any, side: int) -> ModelRules | None:
    z = moments_of(model.encode(torch.zeros(1, 3, side, side))).mean
    comes_back = decoded_pixels(model.decode(z)).shape == (1, 3, side, side)
    return _rules("each", 1, side, z) if comes_back and not side % z.shape[2] else None


def _rules(frames: ClipKind, step: int, side: int, z: Tensor) -> ModelRules:
    strides = step, side // z.shape[-2]
    return ModelRules(
        strides=lambda _: strides, channels=z.shape[1], frames=frames, counts_both=True
    )
