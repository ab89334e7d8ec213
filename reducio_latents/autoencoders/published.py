"""Image and video autoencoders of diffusers by the names they are known by, published sizes only.

They are the baselines of the Reducio paper's table that diffusers has the architecture of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reducio_latents.autoencoders.diffusers import (
    DIFFUSERS,
    adapt,
    load_diffusers,
)
from reducio_latents.autoencoders.network import HINT, NetworkAutoencoder, random_seed, untrained
from reducio_latents.autoencoders.pretrained import describe_config, import_class
from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.core.fetching import WeightsPlace
from reducio_latents.errors import WeightsError


@dataclass(frozen=True)
class Published:
    """What tells one model of an architecture from the others."""

    architecture: str
    """Its class in diffusers."""
    sizes: Mapping[str, Any]
    """Of its config; the class's defaults are the published ones otherwise."""
    place: str
    """Where its weights are."""


def _image(scale: float) -> dict[str, Any]:
    levels = 4
    return {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": scale,
    }


def _cosmos(spatial: int) -> dict[str, Any]:
    return {
        "latent_channels": 16,
        "spatial_compression_ratio": spatial,
        "temporal_compression_ratio": 8,
    }


PUBLISHED: dict[str, Published] = {
    "sd21-vae": Published("AutoencoderKL", _image(0.18215), "folder vae of Stable Diffusion 2.1"),
    "sdxl-vae": Published("AutoencoderKL", _image(0.13025), "stabilityai/sdxl-vae"),
    "cosmos-cv8x8x8": Published(
        "AutoencoderKLCosmos", _cosmos(8), "nvidia/Cosmos-1.0-Tokenizer-CV8x8x8, folder vae"
    ),
    "cosmos-cv8x16x16": Published(
        "AutoencoderKLCosmos",
        _cosmos(16),
        "nvidia/Cosmos-0.1-Tokenizer-CV8x16x16, converted to diffusers",
    ),
}


def load_published(
    name: str, weights: WeightsPlace | None, options: LoadOptions
) -> NetworkAutoencoder:
    """Load a model of `PUBLISHED` from a folder, a file or a Hub name in its place; or, with
    `:random[:SEED]` after the name, make it untrained.

    Raises WeightsError for weights of other sizes, and where none are given.
    """
    key, _, rest = name.partition(":")
    wanted = PUBLISHED[key]
    if rest:
        return _untrained(key, random_seed(name, rest, weights), options)
    if weights is None:
        raise WeightsError(
            f"{key} needs its weights ({wanted.place}): {key}=DIR, in diffusers' format. {HINT}"
        )
    loaded = load_diffusers(f"{DIFFUSERS}:{wanted.architecture}", weights, options)
    for size, value in wanted.sizes.items():
        found = loaded.config["model"].get(size, value)
        if _plain(found) != _plain(value):
            raise WeightsError(
                f"{weights} is not {key}: its {size} is {found}, not {_plain(value)}. "
                f"Evaluate it under its own name: {DIFFUSERS}:{weights}."
            )
    loaded.name = key
    return loaded


def _untrained(key: str, seed: int, options: LoadOptions) -> NetworkAutoencoder:
    wanted = PUBLISHED[key]
    model_class = import_class("diffusers", wanted.architecture)
    model = untrained(lambda: model_class(**wanted.sizes), seed)
    made = adapt(model, describe_config(model.config), options)
    made.name = f"{key}:random:{seed}"
    return made


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
