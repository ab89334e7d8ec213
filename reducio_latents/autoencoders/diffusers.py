"""Autoencoders of diffusers behind the `Autoencoder` protocol: `diffusers:DIR_OR_NAME`, and by the
names they are known by the baselines of the Reducio paper's table that diffusers has."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from reducio_latents.autoencoders.diffusers_rules import (
    AUTOENCODERS,
    REFUSED,
    ModelRules,
    assumed_rules,
    colour_channels,
    decoded_pixels,
    final_rule_of,
    in_words,
    latent_steps,
    ltx_strides,
    moments_of,
    unfit,
)
from reducio_latents.autoencoders.network import HINT, NetworkAutoencoder, random_seed, untrained
from reducio_latents.autoencoders.pretrained import (
    describe_config,
    find_model,
    import_class,
    load_strictly,
    read_config,
    renamed,
)
from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.core.fetching import WeightsPlace
from reducio_latents.core.libraries import import_library
from reducio_latents.core.values import Posterior
from reducio_latents.core.weight_files import load_tensors, open_tensor_file
from reducio_latents.errors import ConfigError, GeometryError, WeightsError
from reducio_latents.vae.tiling import Tiling

LDM_PREFIX = "first_stage_model."
"""Before every key of the VAE in a whole Stable Diffusion checkpoint."""

_RENAMED = (
    (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"coder\.norm_out\.", r"coder.conv_norm_out."),
)
_LEVEL = re.compile(r"decoder\.up_blocks\.(\d+)\.")


def is_ldm_vae(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of the LDM codebase."""
    return any(re.search(r"(^|\.)encoder\.(down\.0\.block|mid\.block_1)\.", key) for key in tensors)


def to_diffusers_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE's tensors under diffusers' keys; what is not the VAE's is left out.

    There the decoder's levels count from its input, here from its output, and an attention's
    projections are matrices there, convolutions of 1x1 here.
    """
    whole = any(key.startswith(LDM_PREFIX) for key in tensors)
    own = {
        key.removeprefix(LDM_PREFIX): tensor
        for key, tensor in tensors.items()
        if not whole or key.startswith(LDM_PREFIX)
    }
    found = {renamed(key, _RENAMED): tensor for key, tensor in own.items()}
    levels = 1 + max((int(m[1]) for key in found if (m := _LEVEL.match(key))), default=0)

    def turned(level: re.Match[str]) -> str:
        return f"decoder.up_blocks.{levels - 1 - int(level[1])}."

    return {
        _LEVEL.sub(turned, key): tensor.flatten(1)
        if ".attentions." in key and tensor.ndim == 4
        else tensor
        for key, tensor in found.items()
    }


log = logging.getLogger(__name__)

DIFFUSERS = "diffusers"
WHOLE_CLIPS = ("causal", "whole")
FRAMES_AT_ONCE = 32
"""Frames that an image autoencoder sees together; bounds memory, and part of the low bits."""


class DiffusersNetwork:
    """An autoencoder of diffusers, used by the rules for its class."""

    def __init__(self, model: Any, rules: ModelRules) -> None:
        self.model, self.rules = model, rules
        self.architecture = type(model).__name__
        self.geometry = rules.geometry(model)
        self.final_rule = final_rule_of(model, rules)
        self.patch, self.lead = rules.patch(model), rules.lead(model)
        self.opaque = colour_channels(model) == 4
        if rules.strides is ltx_strides:  # its tiles go by attributes, which may be wrong
            strides = ltx_strides(model)
            model.temporal_compression_ratio, model.spatial_compression_ratio = strides
        if rules.always_tiled:
            model.enable_tiling()

    def check_clip(self, frames: int, height: int, width: int) -> None:
        steps = self.geometry.latent_shape(frames, height, width)[1]
        self.rules.check_sides(self.model, height, width)
        limit = latent_steps(self.final_rule)
        if limit is not None and steps > limit:
            usable = 1 + (limit - 1) * self.geometry.temporal_stride
            raise GeometryError(
                f"frames is {frames}, but {self.architecture} has the scale of {limit} latent "
                f"steps only. Use clips of at most {usable} frames."
            )

    def encode(self, video_BCTHW: Tensor) -> Posterior:
        """Return moments as the library gives them, float32."""
        rules, video = self.rules, video_BCTHW.contiguous()
        if rules.pixels is not None:
            scale, shift = (video.new_tensor(value).view(-1, 1, 1, 1) for value in rules.pixels)
            video = video * scale + shift
        if self.opaque:
            video = torch.cat([video, torch.ones_like(video[:, :1])], dim=1)
        if self.lead:
            video = torch.cat([video[:, :, :1].expand(-1, -1, self.lead, -1, -1), video], dim=2)
        found = []
        for part in self._parts(video, split=True):
            self._forget()
            found.append(moments_of(self.model.encode(part)))
        mean, logvar = (self._joined(x, len(video)) for x in zip(*found, strict=True))
        if rules.certain:
            return Posterior.certain(self._patched(mean))
        return Posterior(self._patched(mean), self._patched(logvar))

    def _parts(self, x: Tensor, *, split: bool) -> Sequence[Tensor]:
        """Cut clips (B, C, T, H, W) into what the library takes at once."""
        rules = self.rules
        if rules.frames in WHOLE_CLIPS:
            return torch.split(x, 1) if rules.alone else [x]
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        parts = torch.split(frames, FRAMES_AT_ONCE if split else x.shape[2])
        return [part[:, :, None] if rules.frames == "each_as_clip" else part for part in parts]

    def _joined(self, parts: Sequence[Tensor], clips: int) -> Tensor:
        """Undo `_parts`."""
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if self.rules.frames == "each_as_clip":
            whole = whole[:, :, 0]
        if self.rules.frames in WHOLE_CLIPS:
            return whole
        return rearrange(whole, "(b t) d h w -> b d t h w", b=clips)

    def _patched(self, z: Tensor) -> Tensor:
        return rearrange(z, "b d t (h p) (w q) -> b (d p q) t h w", p=self.patch, q=self.patch)

    def _forget(self) -> None:
        """Drop what a call that failed half way has left for the next chunk."""
        if hasattr(self.model, "_clear_conv_cache"):
            self.model._clear_conv_cache()

    def decode(self, z_BDthw: Tensor) -> Tensor:
        rules, (batch, _, steps, _, _), z = self.rules, z_BDthw.shape, z_BDthw
        z = rearrange(z, "b (d p q) t h w -> b d t (h p) (w q)", p=self.patch, q=self.patch)
        parts = self._parts(z, split=not rules.decodes_clips)
        video = self._joined([self._pixels(part) for part in parts], batch)
        wanted = self.geometry.frames_of(steps)
        if video.shape[2] != wanted:
            raise GeometryError(
                f"{self.architecture} decoded {steps} latent steps to {video.shape[2]} frames, but "
                "no clip that it encodes has both. Give latents as it makes them."
            )
        if self.opaque:
            video = video[:, :3]
        if rules.pixels is not None:
            video = video.float()
            scale, shift = (video.new_tensor(value).view(-1, 1, 1, 1) for value in rules.pixels)
            video = (video - shift) / scale
        return video

    def _pixels(self, part: Tensor) -> Tensor:
        self._forget()
        pixels = decoded_pixels(self.model.decode(part, **self.rules.settings(self.model, part)))
        return pixels.movedim(1, 2) if self.rules.frames_first else pixels

    def tile(self, tiling: Tiling | None) -> None:
        """Have frames cut into tiles; None: not even as the library does by itself."""
        model, rules = self.model, self.rules
        if not rules.tiles or not hasattr(model, "use_tiling"):
            raise ConfigError(
                f"{self.architecture} cannot be tiled by diffusers. Use tiling=None, or another "
                "model for frames that do not fit into memory whole."
            )
        if tiling is None:
            model.disable_tiling()
            return
        length = round(tiling.tile_px * (1 + tiling.overlap))
        share = 1 - tiling.tile_px / length
        if int(length * (1 - share)) < tiling.tile_px:  # as the library steps from tile to tile
            share = math.nextafter(share, 0.0)
        cells = length * self.patch // self.geometry.spatial_stride
        known: dict[str, float] = {
            "tile_sample_min_size": length,
            "tile_latent_min_size": cells,
            "tile_overlap_factor": share,
        }
        for side in ("height", "width"):
            known[f"tile_sample_min_{side}"] = length
            known[f"tile_latent_min_{side}"] = cells
            known[f"tile_sample_stride_{side}"] = tiling.tile_px
            known[f"tile_sample_min_overlap_{side}"] = length - tiling.tile_px
            known[f"tile_overlap_factor_{side}"] = share
        asked = known.keys() & signature(model.enable_tiling).parameters
        model.enable_tiling(**{name: known[name] for name in asked})
        for name in known.keys() - asked:
            if hasattr(model, name):
                setattr(model, name, known[name])


def load_diffusers(
    name: str, weights: WeightsPlace | None, options: LoadOptions
) -> NetworkAutoencoder:
    """Load `diffusers:` and a folder, a file or a Hub name; or `diffusers:CLASS` with its weights.

    Raises ConfigError for a name that leads nowhere or a class that is not known, WeightsError for
    weights that do not fit their config in every key.
    """
    wanted = name.partition(":")[2]
    expected = ""
    if wanted in AUTOENCODERS or (wanted.isidentifier() and (weights or wanted in REFUSED)):
        _require_usable(wanted, "", options)
        if weights is None:
            raise WeightsError(
                f"{name} needs its weights: give the folder that holds them, as --weights."
            )
        wanted, expected = str(weights).removeprefix("diffusers:"), wanted
    elif weights is not None:
        raise ConfigError(f"{name} names its own weights; leave out {weights}.")
    if not wanted:
        raise ConfigError("write diffusers:DIR or diffusers:OWNER/NAME, as diffusers:models/wan.")
    place = find_model(wanted, part="vae")
    folder = place.parent if place.is_file() else place
    config = read_config(folder)
    architecture = str(config.get("_class_name"))
    if expected not in ("", architecture):
        raise ConfigError(f"{folder} holds {architecture}, not {expected}. Give another folder.")
    model_class = _require_usable(architecture, str(folder), options)
    if place.is_file():
        model = _from_file(model_class, config, place)
    else:
        model = load_strictly(model_class.from_pretrained, folder, torch_dtype=torch.float32)
    return adapt(model, config, options)


def _require_usable(architecture: str, where: str, options: LoadOptions) -> Any:
    """Return a class of diffusers, if it may be used here; raise ConfigError, and say why not."""
    named = f"{where} holds {architecture}, which" if where else architecture
    if architecture in REFUSED:
        raise ConfigError(f"{named} {REFUSED[architecture]}.")
    library = import_library("diffusers")
    found = None
    if architecture.isidentifier() and hasattr(library, architecture):
        found = import_class("diffusers", architecture)
    if architecture in AUTOENCODERS and found is not None:
        return found
    if architecture in AUTOENCODERS:
        raise ConfigError(
            f"{named} is newer than diffusers {library.__version__}, which does not have it. "
            "Update it: pip install -U diffusers."
        )
    is_model = isinstance(found, type) and issubclass(found, nn.Module)
    if not is_model or not callable(getattr(found, "decode", None)):
        raise ConfigError(
            f"{named} is no autoencoder of diffusers "
            f"{library.__version__}. Give a folder of one, such as "
            f"{', '.join(sorted(AUTOENCODERS)[:4])}."
        )
    if not callable(getattr(found, "encode", None)):
        raise ConfigError(f"{named} cannot encode: it only decodes.")
    if not options.trust_config:
        raise ConfigError(
            f"{named} is not known here. To have its rules taken from its config and a trial, add "
            "--trust-config."
        )
    return found


def _from_file(model_class: Any, config: Mapping[str, Any], path: Path) -> nn.Module:
    """Load one file of weights, under diffusers' own keys or under those of the LDM codebase."""
    file = open_tensor_file(path)
    tensors = {key: file.read(key).float() for key in file.shapes}
    if is_ldm_vae(tensors):
        tensors = to_diffusers_keys(tensors)
    model: nn.Module = model_class.from_config(dict(config))
    load_tensors(model, tensors, f"{path} ({model_class.__name__})")
    return model


def is_of_pictures(autoencoder: NetworkAutoencoder) -> bool:
    """Whether an autoencoder of diffusers sees each frame by itself."""
    network = autoencoder.network
    return isinstance(network, DiffusersNetwork) and network.rules.frames not in WHOLE_CLIPS


def adapt(model: nn.Module, config: Mapping[str, Any], options: LoadOptions) -> NetworkAutoencoder:
    """Put a loaded model to work as `options` say."""
    architecture = type(model).__name__
    described = {"architecture": architecture, "model": describe_config(config)}
    rules = AUTOENCODERS.get(architecture)
    if rules is None:
        rules, assumed = assumed_rules(model)
        described["assumed"] = assumed
        log.warning("%s is not known here: assumed %s.", architecture, in_words(assumed))
    if why := unfit(model, rules):
        raise ConfigError(f"{architecture} of this config {why}.")
    network = DiffusersNetwork(model, rules)
    made = NetworkAutoencoder(
        f"{DIFFUSERS}:{architecture}",
        network,
        model,
        options,
        halves=(("encoder",), (rules.decoder,)),
        final_rule=network.final_rule,
        identity=described,
        described=described,
        own_tiling=rules.own_tiling,
    )
    for half in ("encoder", "decoder") if rules.counts_both else ():
        if getattr(model, half) is None:
            setattr(model, half, nn.Module())
    return made


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
    return {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
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
        seed = random_seed(name, rest, weights)
        model_class = import_class("diffusers", wanted.architecture)
        model = untrained(lambda: model_class(**wanted.sizes), seed)
        made = adapt(model, describe_config(model.config), options)
        made.name = f"{key}:random:{seed}"
        return made
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


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
