"""The video encoder: a clip to the moments of its latents."""

from __future__ import annotations

from torch import Tensor, nn

from reducio_latents.vae.blocks import Middle, conv, down_levels
from reducio_latents.vae.config import CHANNEL_MULTIPLIERS, IMAGE_CHANNELS, ReducioVAEConfig
from reducio_latents.vae.norm import NormSiLU


class VideoEncoder(nn.Module):
    """(B, 3, T, H, W) -> (B, 2D, T/temporal_stride, H/32, W/32), before `quant_conv`."""

    def __init__(self, config: ReducioVAEConfig) -> None:
        super().__init__()
        channels = [config.width * multiplier for multiplier in CHANNEL_MULTIPLIERS]
        n_down = len(channels) - 1
        # Space is halved five times, time only at the last of them.
        strides = [
            (2 if level >= n_down - config.temporal_halvings else 1, 2, 2)
            for level in range(n_down)
        ]
        self.conv_in = conv(3, IMAGE_CHANNELS, channels[0], 3)
        self.down = down_levels(channels, strides, dims=3)
        self.mid = Middle(3, channels[-1])
        self.norm_out = NormSiLU(channels[-1])
        self.conv_out = conv(3, channels[-1], 2 * config.latent_channels, 3)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        x = self.conv_in(video_BCTHW)
        for level in self.down:
            _, x = level(x)
        x = self.mid(x)
        moments: Tensor = self.conv_out(self.norm_out(x))
        return moments
