"""Autoencoders of diffusers behind the `Autoencoder` protocol: `diffusers:DIR_OR_NAME`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reducio_latents.autoencoders.diffusers_rules import (
    ARCHITECTURES,
    final_rule_of,
    latent_steps,
)
from reducio_latents.autoencoders.ldm_keys import is_ldm_vae, to_diffusers_keys
from reducio_latents.autoencoders.placing import lay_out, precision_of
from reducio_latents.autoencoders.pretrained import (
    check_keys,
    describe_config,
    digest_of,
    find_model,
    import_class,
    load_strictly,
    quiet,
    read_config,
)
from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.core.devices import usable_device
from reducio_latents.core.gaussian import final_latents, undo_final_rule
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError, GeometryError, WeightsError
from reducio_latents.vae.tiling import Tiling
from reducio_latents.vae.weight_files import open_tensor_file

PREFIX = "diffusers"
NO_NOISE_LOGVAR = -30.0
"""Of an autoencoder that is no distribution: exp(-15) is below the spacing of float16."""
FRAMES_AT_ONCE = 32
"""Frames that an image autoencoder sees together; bounds memory, and part of the low bits."""


class DiffusersAutoencoder:
    """An autoencoder of diffusers on one device, for inference."""

    needs_content = False

    def __init__(
        self, model: Any, config: Mapping[str, Any], weights_sha256: str, options: LoadOptions
    ) -> None:
        self.architecture = type(model).__name__
        self.name = f"{PREFIX}:{self.architecture}"
        self.rules = ARCHITECTURES[self.architecture]
        self.geometry = self.rules.geometry(model)
        self.final_rule = final_rule_of(model)
        self.weights_sha256 = weights_sha256
        self.tiling = None if options.tiling == "auto" else options.tiling
        self.model = model
        self._options = options
        self.described = describe_config(config)
        self._set_tiling()

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = next(iter(self.model.parameters()))
        return weight

    @property
    def fingerprint(self) -> str:
        identity = {
            "architecture": self.architecture,
            "model": self.described,
            "weights_sha256": self.weights_sha256,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def config(self) -> dict[str, Any]:
        tiling = self.tiling
        return {
            "architecture": self.architecture,
            "model": self.described,
            "fingerprint": self.fingerprint,
            "weights_sha256": self.weights_sha256,
            "tiling": tiling and {"tile_px": tiling.tile_px, "overlap": tiling.overlap},
            "precision": self.precision,
        }

    @property
    def precision(self) -> dict[str, Any]:
        return precision_of(self.device, self.dtype, self._options)

    def with_dtype(self, dtype: torch.dtype) -> DiffusersAutoencoder:
        """Return a copy that computes in another precision."""
        twin = deepcopy(self)
        with quiet():
            twin.model.to(dtype)
        twin._options = replace(self._options, dtype=dtype)
        return twin

    def check_clip(self, frames: int, height: int, width: int) -> None:
        step = self.rules.frame_step
        if step and (frames - 1) % step:
            usable = max(0, frames - 1) // step * step + 1
            raise GeometryError(
                f"frames is {frames}, but {self.architecture} needs {step}k+1. Use clips of "
                f"{usable} or {usable + step} frames."
            )
        steps = self.geometry.latent_shape(frames, height, width)[1]
        limit = latent_steps(self.final_rule)
        if limit is not None and steps > limit:
            usable = 1 + (limit - 1) * self.geometry.temporal_stride
            raise GeometryError(
                f"frames is {frames}, but {self.architecture} has the scale of {limit} latent "
                f"steps only. Use clips of at most {usable} frames."
            )

    @torch.inference_mode()
    def encode(self, video_BCTHW: Tensor) -> Posterior:
        """Return the posterior, float32, moments as the library gives them.

        Raises GeometryError for a size that does not fit.
        """
        _, _, frames, height, width = video_BCTHW.shape
        self.check_clip(frames, height, width)
        video = video_BCTHW.to(self.device, self.dtype, non_blocking=True).contiguous()
        if self.rules.framewise:
            mean, logvar = self._encode_frames(video)
        else:
            mean, logvar = _moments(self.model.encode(video).latent_dist)
        wanted = (len(video), *self.geometry.latent_shape(frames, height, width))
        if tuple(mean.shape) != wanted:
            raise GeometryError(
                f"{self.architecture} gave latents {tuple(mean.shape)} for {frames} frames of "
                f"{height}x{width}, not {wanted}. Its config and its weights disagree."
            )
        return Posterior(mean, logvar)

    def _encode_frames(self, video: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(video)
        frames = video.transpose(1, 2).flatten(0, 1)
        parts = [_moments(self.model.encode(part).latent_dist) for part in _chunks(frames)]
        mean, logvar = (torch.cat(list(found)) for found in zip(*parts, strict=True))
        return _as_clips(mean, batch), _as_clips(logvar, batch)

    def final_latents(self, posterior: Posterior, noise: Tensor | None = None) -> Tensor:
        return final_latents(posterior, noise, self.final_rule)

    @torch.inference_mode()
    def decode(self, latents: Tensor, content_image: Tensor | None = None) -> Tensor:
        """Return the video of final latents, float32; a content image is not needed or used."""
        z = undo_final_rule(self.final_rule, latents.to(self.device)).to(self.dtype)
        steps = z.shape[2]
        if self.rules.framewise:
            frames = z.transpose(1, 2).flatten(0, 1)
            video = torch.cat([self.model.decode(part).sample for part in _chunks(frames)])
            video = _as_clips(video, len(z))
        else:
            video = self.model.decode(z, **self._decode_settings(len(z))).sample
        frames_wanted = self.geometry.temporal_stride * (steps - 1) + 1
        if video.shape[2] != frames_wanted:
            raise GeometryError(
                f"{self.architecture} decoded {steps} latent steps to {video.shape[2]} frames, not "
                f"{frames_wanted}. Give latents of {self.geometry.temporal_stride}k+1 frames."
            )
        found: Tensor = video.float()
        return found

    def _decode_settings(self, batch: int) -> dict[str, Tensor]:
        if not self.model.config.get("timestep_conditioning", False):
            return {}
        # A decoder that also removes noise: at time 0 it is given none.
        return {"temb": torch.zeros(batch, device=self.device, dtype=self.dtype)}

    def _set_tiling(self) -> None:
        tiling = self.tiling
        if tiling is None:
            return
        if not self.rules.tiles:
            raise ConfigError(
                f"{self.architecture} cannot be tiled by diffusers. Use tiling=None, or another "
                "model for frames that do not fit into memory whole."
            )
        assert isinstance(tiling, Tiling)
        length = round(tiling.tile_px * (1 + tiling.overlap))
        if self.rules.framewise:
            self.model.enable_tiling()
            self.model.tile_sample_min_size = length
            self.model.tile_latent_min_size = length // self.geometry.spatial_stride
            self.model.tile_overlap_factor = 1 - tiling.tile_px / length
        elif self.architecture == "AutoencoderKLCogVideoX":
            share = 1 - tiling.tile_px / length
            self.model.enable_tiling(length, length, share, share)
        else:
            self.model.enable_tiling(
                tile_sample_min_height=length,
                tile_sample_min_width=length,
                tile_sample_stride_height=tiling.tile_px,
                tile_sample_stride_width=tiling.tile_px,
            )


def load_diffusers(name: str, weights: Path | None, options: LoadOptions) -> DiffusersAutoencoder:
    """Load `diffusers:` and a folder, a file or a Hub name; or `diffusers:CLASS` with its weights.

    Raises ConfigError for a name that leads nowhere or a class that is not known, WeightsError for
    weights that do not fit their config in every key.
    """
    wanted = name.partition(":")[2]
    if wanted in ARCHITECTURES:
        if weights is None:
            raise WeightsError(f"{name} needs its weights: give the folder that holds them.")
        wanted, expected = str(weights), wanted
    elif weights is not None:
        raise ConfigError(f"{name} names its own weights; leave out {weights}.")
    else:
        expected = ""
    if not wanted:
        raise ConfigError(f"write {PREFIX}:DIR or {PREFIX}:OWNER/NAME, as diffusers:models/wan.")
    place = find_model(wanted, part="vae")
    folder = place.parent if place.is_file() else place
    config = read_config(folder)
    architecture = str(config.get("_class_name"))
    if architecture not in ARCHITECTURES or expected not in ("", architecture):
        known = expected or f"one of {', '.join(ARCHITECTURES)}"
        raise ConfigError(f"{folder} holds {architecture}, not {known}. Give another folder.")
    model_class = import_class("diffusers", architecture)
    if place.is_file():
        model = _from_file(model_class, config, place)
    else:
        model = load_strictly(model_class.from_pretrained, folder, torch_dtype=torch.float32)
    return prepare(model, config, options)


def _from_file(model_class: Any, config: Mapping[str, Any], path: Path) -> nn.Module:
    """Load one file of weights, under diffusers' own keys or under those of the LDM codebase."""
    file = open_tensor_file(path)
    tensors = {key: file.read(key).float() for key in file.shapes}
    if is_ldm_vae(tensors):
        tensors = to_diffusers_keys(tensors)
    model: nn.Module = model_class.from_config(dict(config))
    own = model.state_dict()
    mismatched = [
        key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape
    ]
    check_keys(
        f"{path} ({model_class.__name__})",
        missing=own.keys() - tensors.keys(),
        unexpected=tensors.keys() - own.keys(),
        mismatched=mismatched,
    )
    model.load_state_dict(tensors, strict=True)
    return model


def prepare(model: Any, config: Mapping[str, Any], options: LoadOptions) -> DiffusersAutoencoder:
    """Put a loaded model to work as `options` say."""
    digest = digest_of(model)  # of float32 weights, so that it does not depend on the precision
    model.eval().requires_grad_(False)
    if options.parts == "encoder":
        model.decoder = None
    elif options.parts == "decoder":
        model.encoder = None
    with quiet():
        model.to(usable_device(options.device), options.dtype)
    lay_out(model, options)
    if options.compiles_whole(PREFIX):
        for network in (model.encoder, model.decoder):
            if network is not None:
                network.compile(dynamic=False)
    return DiffusersAutoencoder(model, config, digest, options)


def _moments(distribution: Any) -> tuple[Tensor, Tensor]:
    if hasattr(distribution, "mean"):
        return distribution.mean.float(), distribution.logvar.float()
    latents = distribution.mode().float()
    return latents, torch.full_like(latents, NO_NOISE_LOGVAR)


def _chunks(frames: Tensor) -> tuple[Tensor, ...]:
    return torch.split(frames, FRAMES_AT_ONCE)


def _as_clips(frames: Tensor, batch: int) -> Tensor:
    """(B * T, D, h, w) -> (B, D, T, h, w)."""
    return frames.reshape(batch, -1, *frames.shape[1:]).transpose(1, 2)
