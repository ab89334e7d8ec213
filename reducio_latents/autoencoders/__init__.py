"""Autoencoders by name, all behind one protocol."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import cast

import torch

from reducio_latents.autoencoders.protocol import Autoencoder, LoadOptions, TilingChoice
from reducio_latents.core.choices import Compile
from reducio_latents.core.fetching import WeightsPlace
from reducio_latents.errors import ConfigError
from reducio_latents.vae.model import Parts

__all__ = ["LOADERS", "Autoencoder", "LoadOptions", "load_autoencoder", "weights_place"]

Loader = Callable[[str, WeightsPlace | None, LoadOptions], Autoencoder]

LOADERS: dict[str, str] = {
    "reducio-ft4-fs32": "reducio_latents.autoencoders.reducio:load_preset",
    "reducio-ft2-fs32": "reducio_latents.autoencoders.reducio:load_preset",
    "reducio": "reducio_latents.autoencoders.reducio:load_any_width",
    "reducio-tiny-ft4-fs32": "reducio_latents.autoencoders.reducio:load_bundled",
    "reducio-random": "reducio_latents.autoencoders.reducio:load_random",
    "diffusers": "reducio_latents.autoencoders.diffusers:load_diffusers",
    "sd21-vae": "reducio_latents.autoencoders.diffusers:load_published",
    "sdxl-vae": "reducio_latents.autoencoders.diffusers:load_published",
    "cosmos-cv8x8x8": "reducio_latents.autoencoders.diffusers:load_published",
    "cosmos-cv8x16x16": "reducio_latents.autoencoders.diffusers:load_published",
    "open-sora-1.2": "reducio_latents.autoencoders.peers.open_sora:load_open_sora",
    "omnitokenizer": "reducio_latents.autoencoders.peers.omnitokenizer:load_omnitokenizer",
    "repeat-content": "reducio_latents.autoencoders.baselines:load_baseline",
    "bicubic-32x": "reducio_latents.autoencoders.baselines:load_baseline",
}
"""The part of a name before its first colon -> where the `Loader` of the whole name is. Imported
when asked for, so that one model's libraries are not needed for another."""


def takes_pictures(name: str) -> bool:
    """Whether a model of that name may take clips of one frame; told without loading it."""
    return not name.startswith(("reducio", "open-sora"))


def weights_place(name: str, weights: WeightsPlace | None) -> str | None:
    """Return where the weights of a model are, for a store to remember: an absolute path, or a name
    of the Hub; None for a model without, or one that brings them.
    """
    kind, _, rest = name.partition(":")
    place = os.fspath(weights) if weights is not None else rest if kind == "diffusers" else ""
    path = Path(place).expanduser()
    return (str(path.absolute()) if path.exists() else place) if place else None


def load_autoencoder(
    name: str,
    weights: WeightsPlace | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tiling: TilingChoice = "auto",
    parts: Parts = "all",
    compile: Compile = "none",
    memory_format: torch.memory_format = torch.contiguous_format,
    trust_config: bool = False,
) -> Autoencoder:
    """Return the autoencoder of that name, ready to encode and decode; `LoadOptions` says the rest.

    Names: `reducio-ft4-fs32` and `reducio-ft2-fs32`, the published sizes; `reducio`, sizes read off
    the weights; `reducio-tiny-ft4-fs32`, a small trained one that comes with the package where it
    was bundled; `reducio-random:WIDTH[:ft2|ft4][:SEED]`, untrained, for trying things out;
    `diffusers:DIR` or `diffusers:OWNER/NAME`, autoencoders of other makers, weights included;
    `sd21-vae`, `sdxl-vae`, `cosmos-cv8x8x8`, `cosmos-cv8x16x16`, `open-sora-1.2` and
    `omnitokenizer`, from their published files or, with `:random[:SEED]` after the name, untrained;
    `repeat-content` and `bicubic-32x`, floors to compare with, without weights.
    weights: a .ckpt or .safetensors file, or the directory that import-checkpoint made; or on the
    Hugging Face Hub `hf://OWNER/NAME[@REVISION][/FILE]`, as which `OWNER/NAME` counts if it is no
    path here. Without, the published sizes get the published weights, fetched on first use.

    Raises ConfigError for an unknown name, option or device; WeightsError for weights that
    are missing, damaged or of another model.
    """
    key = name.partition(":")[0]
    if key not in LOADERS:
        close = get_close_matches(key, LOADERS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(LOADERS)}."
        raise ConfigError(f"there is no autoencoder {name!r}; {hint}")
    options = LoadOptions(
        device=device,
        dtype=dtype,
        tiling=tiling,
        parts=parts,
        compile=compile,
        memory_format=memory_format,
        trust_config=trust_config,
    )
    module, _, function = LOADERS[key].partition(":")
    loader = cast(Loader, getattr(import_module(module), function))
    return loader(name, weights, options)
