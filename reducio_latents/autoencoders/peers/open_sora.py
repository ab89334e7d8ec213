"""Open-Sora 1.2's VAE: an image VAE for each frame, and a causal one over time upon its latents.

State-dict keys are those of the published `hpcai-tech/OpenSora-VAE-v1.2`. Its latents have 4
channels; the table of the Reducio paper says 16. Zheng et al., arXiv 2412.20404.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reducio_latents.autoencoders.network import NetworkAutoencoder, build_network, own_network
from reducio_latents.autoencoders.pretrained import import_class
from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.core.fetching import WeightsPlace
from reducio_latents.core.geometry import LatentGeometry
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError, GeometryError
from reducio_latents.vae.tiling import Tiling

LATENT_CHANNELS = 4
TIME_HALVED = (False, True, True)
"""After which of the first three levels time is halved."""
SPATIAL_SCALE = 0.18215
"""The frames' latents are multiplied by this, though the image VAE is SDXL's, made for 0.13025."""
SCALE, SHIFT = (3.85, 2.32, 2.33, 3.06), (-0.10, 0.34, 0.27, 0.98)
MAX_FRAMES = 16
"""The published code works through 17 frames at a time and pads clips at their start to a multiple
of 4. Here a clip is one such piece without padding, so that latents say how long it was."""
FRAMES_TOGETHER = 4


@dataclass(frozen=True, kw_only=True)
class OpenSoraConfig:
    """Sizes; the defaults are the published ones."""

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    res_blocks: int = 4
    image_widths: tuple[int, ...] = (128, 256, 512, 512)
    image_layers: int = 2


class CausalConv3d(nn.Module):
    """A convolution that sees no later frame; h and w keep their size."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - stride, 0)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride=(stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, self.padding))
        return y


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inputs)
        self.conv1 = CausalConv3d(inputs, outputs, bias=False)
        self.norm2 = nn.GroupNorm(32, outputs)
        self.conv2 = CausalConv3d(outputs, outputs, bias=False)
        self.conv3 = CausalConv3d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        y: Tensor = h + (x if self.conv3 is None else self.conv3(x))
        return y


def _blocks(count: int, inputs: int, outputs: int) -> nn.ModuleList:
    widths = [inputs] + [outputs] * count
    return nn.ModuleList(ResBlock(a, b) for a, b in pairwise(widths))


def _run(blocks: nn.Module, x: Tensor) -> Tensor:
    for block in blocks.children():
        x = block(x)
    return x


class TemporalEncoder(nn.Module):
    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = CausalConv3d(LATENT_CHANNELS, widths[0], bias=False)
        self.block_res_blocks = nn.ModuleList(
            _blocks(config.res_blocks, before, width)
            for before, width in pairwise([widths[0], *widths])
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, stride=2) if halved else nn.Identity()
            for width, halved in zip(widths, TIME_HALVED, strict=False)
        )
        self.res_blocks = _blocks(config.res_blocks, widths[-1], widths[-1])
        self.norm1 = nn.GroupNorm(32, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * LATENT_CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            h = _run(blocks, h)
            if level < len(self.conv_blocks):
                h = self.conv_blocks[level](h)
        h = _run(self.res_blocks, h)
        moments: Tensor = self.conv2(F.silu(self.norm1(h)))
        return moments


class TemporalDecoder(nn.Module):
    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv1 = CausalConv3d(LATENT_CHANNELS, widths[-1])
        self.res_blocks = _blocks(config.res_blocks, widths[-1], widths[-1])
        self.block_res_blocks = nn.ModuleList(
            _blocks(config.res_blocks, above, width)
            for width, above in zip(widths, [*widths[1:], widths[-1]], strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width) if halved else nn.Identity()
            for width, halved in zip(widths[1:], TIME_HALVED, strict=True)
        )
        self.norm1 = nn.GroupNorm(32, widths[0])
        self.conv_out = CausalConv3d(widths[0], LATENT_CHANNELS)

    def forward(self, z: Tensor) -> Tensor:
        h = _run(self.res_blocks, self.conv1(z))
        for level in reversed(range(len(self.block_res_blocks))):
            h = _run(self.block_res_blocks[level], h)
            if level > 0:
                h = self.conv_blocks[level - 1](h)
                h = _channels_to_time(h) if TIME_HALVED[level - 1] else h
        x: Tensor = self.conv_out(F.silu(self.norm1(h)))
        return x


def _channels_to_time(x: Tensor) -> Tensor:
    """Have neighbouring channels become neighbouring frames."""
    return rearrange(x, "b (c two) t h w -> b c (t two) h w", two=2)


class TemporalVAE(nn.Module):
    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        self.encoder = TemporalEncoder(config)
        self.quant_conv = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.post_quant_conv = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = TemporalDecoder(config)


class OpenSoraVAE(nn.Module):
    """Both VAEs. The frames' latents are the image posteriors' means, not samples of them."""

    geometry = LatentGeometry(channels=LATENT_CHANNELS, temporal_stride=4, spatial_stride=8)
    scale: Tensor
    shift: Tensor

    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        self.spatial_vae = nn.ModuleDict({"module": _image_vae(config)})
        self.temporal_vae = TemporalVAE(config)
        for name, values in (("scale", SCALE), ("shift", SHIFT)):
            self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1, 1))

    def encode(self, video_BCTHW: Tensor) -> Posterior:
        frames = rearrange(video_BCTHW, "b c t h w -> (b t) c h w")
        encode: Any = self.spatial_vae["module"].encode
        means = [encode(part).latent_dist.mode() for part in torch.split(frames, FRAMES_TOGETHER)]
        images = rearrange(
            torch.cat(means) * SPATIAL_SCALE, "(b t) d h w -> b d t h w", b=len(video_BCTHW)
        )
        moments = self.temporal_vae.quant_conv(self.temporal_vae.encoder(images))
        return Posterior.of_moments(moments.float()).clamped()

    def decode(self, z_BDthw: Tensor) -> Tensor:
        images = self.temporal_vae.decoder(self.temporal_vae.post_quant_conv(z_BDthw))
        frames = rearrange(images, "b d t h w -> (b t) d h w") / SPATIAL_SCALE
        decode: Any = self.spatial_vae["module"].decode
        pixels = [decode(part).sample for part in torch.split(frames, FRAMES_TOGETHER)]
        video: Tensor = rearrange(torch.cat(pixels), "(b t) c h w -> b c t h w", b=len(z_BDthw))
        return video

    def tile(self, tiling: Tiling | None) -> None:
        raise ConfigError("Open-Sora's VAE cannot be tiled. Use tiling=None.")

    def check_clip(self, frames: int, height: int, width: int) -> None:
        self.geometry.latent_shape(frames, height, width)
        if frames > MAX_FRAMES:
            raise GeometryError(
                f"the clip has {frames} frames, but Open-Sora's VAE is used on {MAX_FRAMES} at "
                "most here. Cut the video into shorter clips."
            )


def _image_vae(config: OpenSoraConfig) -> nn.Module:
    levels = len(config.image_widths)
    model: nn.Module = import_class("diffusers", "AutoencoderKL")(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.image_widths,
        layers_per_block=config.image_layers,
        latent_channels=LATENT_CHANNELS,
    )
    return model


def load_open_sora(
    name: str,
    weights: WeightsPlace | None,
    options: LoadOptions,
    config: OpenSoraConfig | None = None,
) -> NetworkAutoencoder:
    """Load `open-sora-1.2` from its published file, or make `open-sora-1.2:random[:SEED]`."""
    model = build_network(lambda: OpenSoraVAE(config or OpenSoraConfig()), name, weights)
    scale, shift = (buffer.flatten().tolist() for buffer in (model.scale, model.shift))
    rule = {"rule": "scale_shift", "scale": [1 / value for value in scale], "shift": shift}
    parts = ("spatial_vae.module", "temporal_vae")
    halves = [f"{p}.encoder" for p in parts], [f"{p}.decoder" for p in parts]
    return own_network(name, model, options, halves=halves, final_rule=rule)
