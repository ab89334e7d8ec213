"""Reducio-VAE behind the `Autoencoder` protocol."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from reducio_latents.autoencoders.checkpoint import (
    ARCHITECTURE,
    check_description,
    reducio_fingerprint,
)
from reducio_latents.autoencoders.protocol import Autoencoder, LoadOptions
from reducio_latents.core.devices import usable_device
from reducio_latents.core.fetching import WeightsPlace, find_weights
from reducio_latents.core.values import Posterior
from reducio_latents.core.weight_files import StateDict
from reducio_latents.errors import ConfigError, WeightsError
from reducio_latents.vae.config import ReducioVAEConfig
from reducio_latents.vae.model import FINAL_RULE, PARTS, ReducioVAE
from reducio_latents.vae.norm import fuse_norms
from reducio_latents.vae.tiling import Tiling
from reducio_latents.vae.weights import (
    check_config,
    infer_config,
    load_vae,
    open_state_dict,
    random_state_dict,
)

PUBLISHED_SIZES = {
    "reducio-ft4-fs32": ReducioVAEConfig(temporal_stride=4),
    "reducio-ft2-fs32": ReducioVAEConfig(temporal_stride=2),
}
PUBLISHED_TILING = Tiling(tile_px=256, overlap=0.25)
"""The published extraction cuts every frame; one of at most 256 px a side is a single tile."""
COMPILED = {"encoder_3d", "encoder_2d", "decoder"}
PUBLISHED_AT = "microsoft/Reducio-VAE"
"""Repository of the published weights on the Hub."""
WEIGHTS_PAGE = f"https://huggingface.co/{PUBLISHED_AT}"


class ReducioAutoencoder(Autoencoder):
    """A ReducioVAE on one device, for inference."""

    needs_content = True
    final_rule = FINAL_RULE
    model: ReducioVAE

    def __init__(
        self, name: str, model: ReducioVAE, weights_sha256: str, options: LoadOptions
    ) -> None:
        self.name, self.model, self.weights_sha256 = name, model, weights_sha256
        self.geometry, self.check_clip = model.config.geometry, model.config.check_clip
        self.fingerprint = reducio_fingerprint(model.config, weights_sha256)
        self.tiling = PUBLISHED_TILING if options.tiling == "auto" else options.tiling
        self.device, self.dtype, self.options = model.device, model.dtype, options
        self.described = {"architecture": ARCHITECTURE, **asdict(model.config)}
        random = name.startswith("reducio-random")
        self.remarks = {"random_weights": random, "final_rule": self.final_rule}

    @torch.inference_mode()
    def encode(self, video_BCTHW: Tensor) -> Posterior:
        """Return the posterior, float32; moved to this device first where it is not there.

        Raises GeometryError or PixelError for input that the model does not take.
        """
        return self.model.encode(self._to_device(video_BCTHW), self.tiling)

    @torch.inference_mode()
    def decode(self, latents: Tensor, content_image: Tensor | None = None) -> Tensor:
        """Return the video of final latents and the clip's content image, (B, 3, H, W) in [-1, 1].

        Raises ConfigError without a content image, else as `encode`.
        """
        if content_image is None:
            raise ConfigError(
                f"{self.name} decodes with the clip's content image, its centre frame; give it too."
            )
        return self.model.decode(
            self._to_device(latents), self._to_device(content_image), self.tiling
        )

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)


def load_preset(
    name: str, weights: WeightsPlace | None, options: LoadOptions
) -> ReducioAutoencoder:
    """Load weights that must have the published sizes of `name`; None: the published ones."""
    if name not in PUBLISHED_SIZES:
        raise ConfigError(f"there is no autoencoder {name!r}; {name.partition(':')[0]} takes no :.")
    file = f"{name}-attn23.ckpt"
    try:
        path = find_weights(weights or f"hf://{PUBLISHED_AT}/{file}", usual=[file])
    except WeightsError as err:
        if weights is not None:
            raise
        raise WeightsError(
            f"{name} needs its weights: {err} With --weights {file}, say. To try things without "
            "weights, use the model reducio-random:32."
        ) from err
    state = open_state_dict(path)
    other = {"reducio-ft4-fs32": "reducio-ft2-fs32", "reducio-ft2-fs32": "reducio-ft4-fs32"}[name]
    found = infer_config(state.shapes, state.where)
    hint = f"use the model {other}" if found == PUBLISHED_SIZES[other] else "use the model reducio"
    try:
        check_config(found, PUBLISHED_SIZES[name], state.where)
    except WeightsError as err:
        raise WeightsError(f"{err} These are not weights of {name}; {hint}.") from None
    return _load(name, state, path, options)


def load_any_width(
    name: str, weights: WeightsPlace | None, options: LoadOptions
) -> ReducioAutoencoder:
    """Load a Reducio-VAE of any widths and either stride; both are read off the weights.

    One of published sizes gets its published name: the name is part of what a store records.
    """
    if name != "reducio":
        raise ConfigError(f"there is no autoencoder {name!r}; did you mean 'reducio'?")
    if weights is None:
        raise WeightsError(
            "reducio needs weights: give the path of a .ckpt or .safetensors file, of a folder "
            f"made by import-checkpoint, or hf://OWNER/NAME. The published ones are at "
            f"{WEIGHTS_PAGE}."
        )
    path = find_weights(weights)
    state = open_state_dict(path)
    found = infer_config(state.shapes, state.where)
    name = next((preset for preset, config in PUBLISHED_SIZES.items() if config == found), name)
    return _load(name, state, path, options)


def load_random(
    name: str, weights: WeightsPlace | None, options: LoadOptions
) -> ReducioAutoencoder:
    """Make an untrained model, `reducio-random:WIDTH[:ft2|ft4][:SEED]`; its pictures are noise."""
    match = re.fullmatch(r"reducio-random:(\d+)(?::ft([24]))?(?::(\d+))?", name)
    if match is None:
        raise ConfigError(
            f"{name!r} is not a model of random weights; write "
            "reducio-random:WIDTH[:ft2|ft4][:SEED], as reducio-random:32:ft2:7."
        )
    if weights is not None:
        raise ConfigError(f"{name} takes no weights; to load {weights}, use the model reducio.")
    width, stride, seed = int(match[1]), int(match[2] or 4), int(match[3] or 0)
    if seed >= 2**32:
        raise ConfigError(f"{name}: the seed must be below 2**32.")
    config = ReducioVAEConfig(
        temporal_stride=stride, width=width, content_width=width, decoder_width=width
    )
    canonical = f"reducio-random:{width}:ft{stride}:{seed}"
    return _load(canonical, random_state_dict(config, seed), None, options)


def _load(
    name: str, state: StateDict, weights: Path | None, options: LoadOptions
) -> ReducioAutoencoder:
    device = usable_device(options.device)
    model, sha256 = load_vae(state, options.parts, device=device, dtype=options.dtype)
    if weights is not None:
        check_description(weights, model.config, sha256)
    model.eval().requires_grad_(False)
    model.lay_out(options.memory_format)
    if options.compile == "norms":
        fuse_norms(model)
    if options.compile == "all":
        for network in COMPILED & PARTS[options.parts]:
            getattr(model, network).compile(dynamic=False)
    return ReducioAutoencoder(name, model, sha256, options)


BUNDLED = Path(__file__).with_name("bundled")


def load_bundled(
    name: str, weights: WeightsPlace | None, options: LoadOptions
) -> ReducioAutoencoder:
    """Load a model that comes with the package; WeightsError where this build has none."""
    if ":" in name:
        raise ConfigError(f"there is no autoencoder {name!r}; {name.partition(':')[0]} takes no :.")
    if weights is not None:
        raise ConfigError(
            f"{name} brings its own weights; to load {weights}, use the model reducio."
        )
    folder = BUNDLED / name
    if not folder.is_dir():
        raise WeightsError(
            f"{name} is not bundled in this build: there is no {folder}. Train it, "
            "`python tools/train_tiny.py VIDEOS --out DIR`, and use the model reducio with the "
            f"weights DIR/{name}, or copy that folder there. To try things without weights, use "
            "the model reducio-random:32."
        )
    model = load_any_width("reducio", folder, options)
    model.name = name
    return model
