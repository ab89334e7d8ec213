"""Autoencoders of diffusers behind the `Autoencoder` protocol: `diffusers:DIR_OR_NAME`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from reducio_latents.autoencoders.diffusers_rules import (
    ARCHITECTURES,
    final_rule_of,
    latent_steps,
)
from reducio_latents.autoencoders.ldm_keys import is_ldm_vae, to_diffusers_keys
from reducio_latents.autoencoders.network import NetworkAutoencoder
from reducio_latents.autoencoders.pretrained import (
    describe_config,
    find_model,
    import_class,
    load_strictly,
    load_tensors,
    read_config,
)
from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.core.fetching import WeightsPlace
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError, GeometryError, WeightsError
from reducio_latents.vae.tiling import Tiling
from reducio_latents.vae.weight_files import open_tensor_file

DIFFUSERS = "diffusers"
FRAMES_AT_ONCE = 32
"""Frames that an image autoencoder sees together; bounds memory, and part of the low bits."""


class DiffusersNetwork:
    """An autoencoder of diffusers, its frames one by one where it is one of images."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.architecture = type(model).__name__
        self.rules = ARCHITECTURES[self.architecture]
        self.geometry = self.rules.geometry(model)
        self.final_rule = final_rule_of(model)

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

    def encode(self, video_BCTHW: Tensor) -> Posterior:
        """Return moments as the library gives them, float32."""
        video = video_BCTHW.contiguous()
        if not self.rules.framewise:
            return _moments(self.model.encode(video).latent_dist)
        frames = rearrange(video, "b c t h w -> (b t) c h w")
        parts = [
            _moments(self.model.encode(part).latent_dist)
            for part in torch.split(frames, FRAMES_AT_ONCE)
        ]
        clips = "(b t) d h w -> b d t h w"
        mean, logvar = (
            rearrange(torch.cat(x), clips, b=len(video)) for x in zip(*parts, strict=True)
        )
        return Posterior(mean, logvar)

    def decode(self, z_BDthw: Tensor) -> Tensor:
        batch, _, steps, _, _ = z_BDthw.shape
        if self.rules.framewise:
            frames = rearrange(z_BDthw, "b d t h w -> (b t) d h w")
            pixels = torch.cat(
                [self.model.decode(part).sample for part in torch.split(frames, FRAMES_AT_ONCE)]
            )
            video: Tensor = rearrange(pixels, "(b t) c h w -> b c t h w", b=batch)
        else:
            settings = {}
            if self.model.config.get("timestep_conditioning", False):
                # A decoder that also removes noise: at time 0 it is given none.
                settings["temb"] = z_BDthw.new_zeros(batch)
            video = self.model.decode(z_BDthw, **settings).sample
        wanted = self.geometry.temporal_stride * (steps - 1) + 1
        if video.shape[2] != wanted:
            raise GeometryError(
                f"{self.architecture} decoded {steps} latent steps to {video.shape[2]} frames, not "
                f"{wanted}. Give latents of {self.geometry.temporal_stride}k+1 frames."
            )
        return video

    def tile(self, tiling: Tiling) -> None:
        if not self.rules.tiles:
            raise ConfigError(
                f"{self.architecture} cannot be tiled by diffusers. Use tiling=None, or another "
                "model for frames that do not fit into memory whole."
            )
        length = round(tiling.tile_px * (1 + tiling.overlap))
        share = 1 - tiling.tile_px / length
        if self.rules.framewise:
            self.model.enable_tiling()
            self.model.tile_sample_min_size = length
            self.model.tile_latent_min_size = length // self.geometry.spatial_stride
            self.model.tile_overlap_factor = share
        elif self.architecture == "AutoencoderKLCogVideoX":
            self.model.enable_tiling(length, length, share, share)
        else:
            self.model.enable_tiling(
                tile_sample_min_height=length,
                tile_sample_min_width=length,
                tile_sample_stride_height=tiling.tile_px,
                tile_sample_stride_width=tiling.tile_px,
            )


def load_diffusers(
    name: str, weights: WeightsPlace | None, options: LoadOptions
) -> NetworkAutoencoder:
    """Load `diffusers:` and a folder, a file or a Hub name; or `diffusers:CLASS` with its weights.

    Raises ConfigError for a name that leads nowhere or a class that is not known, WeightsError for
    weights that do not fit their config in every key.
    """
    wanted = name.partition(":")[2]
    if wanted in ARCHITECTURES:
        if weights is None:
            raise WeightsError(
                f"{name} needs its weights: give the folder that holds them, as --weights."
            )
        wanted, expected = str(weights), wanted
    elif weights is not None:
        raise ConfigError(f"{name} names its own weights; leave out {weights}.")
    else:
        expected = ""
    if not wanted:
        raise ConfigError("write diffusers:DIR or diffusers:OWNER/NAME, as diffusers:models/wan.")
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
    return adapt(model, config, options)


def _from_file(model_class: Any, config: Mapping[str, Any], path: Path) -> nn.Module:
    """Load one file of weights, under diffusers' own keys or under those of the LDM codebase."""
    file = open_tensor_file(path)
    tensors = {key: file.read(key).float() for key in file.shapes}
    if is_ldm_vae(tensors):
        tensors = to_diffusers_keys(tensors)
    model: nn.Module = model_class.from_config(dict(config))
    load_tensors(model, tensors, f"{path} ({model_class.__name__})")
    return model


def adapt(model: nn.Module, config: Mapping[str, Any], options: LoadOptions) -> NetworkAutoencoder:
    """Put a loaded model to work as `options` say."""
    network = DiffusersNetwork(model)
    described = {"architecture": network.architecture, "model": describe_config(config)}
    return NetworkAutoencoder(
        f"{DIFFUSERS}:{network.architecture}",
        network,
        model,
        options,
        halves=(("encoder",), ("decoder",)),
        final_rule=network.final_rule,
        identity=described,
        described=described,
    )


def _moments(distribution: Any) -> Posterior:
    if hasattr(distribution, "mean"):
        return Posterior(distribution.mean.float(), distribution.logvar.float())
    return Posterior.certain(distribution.mode().float())
