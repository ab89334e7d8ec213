"""The content encoder: the centre frame to feature maps that the decoder attends to."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from reducio_latents.vae.blocks import Middle, conv, down_levels
from reducio_latents.vae.config import CONTENT_MULTIPLIERS, IMAGE_CHANNELS, ReducioVAEConfig
from reducio_latents.vae.norm import NormSiLU


class ContentMaps(NamedTuple):
    """The feature maps that the decoder uses, each (B, 4 * content_width, H/s, W/s).

    The levels of stride 1 and 2 are features too, but nothing attends to them: they are not kept.
    """

    level_2: Tensor
    """Stride 4."""
    level_3: Tensor
    """Stride 8."""
    middle: Tensor
    """Stride 8, after self-attention."""


class ContentEncoder(nn.Module):
    """(B, 3, H, W) -> ContentMaps."""

    def __init__(self, config: ReducioVAEConfig) -> None:
        super().__init__()
        channels = [config.content_width * multiplier for multiplier in CONTENT_MULTIPLIERS]
        self.conv_in = conv(2, IMAGE_CHANNELS, channels[0], 3)
        self.down = down_levels(channels, [(2, 2)] * (len(channels) - 1), dims=2)
        self.mid = Middle(2, channels[-1])
        self.norm_out = NormSiLU(channels[-1])
        # Published checkpoints hold these two, but no output depends on them. Without gradients
        # they do not stop a distributed trainer that waits for the gradient of every parameter.
        self.mid.block_2.requires_grad_(False)
        self.norm_out.requires_grad_(False)

    def forward(self, image_BCHW: Tensor) -> ContentMaps:
        x = self.conv_in(image_BCHW)
        features = x
        for level in self.down:
            before, (features, x) = features, level(x)
        middle = self.mid.attn_1(self.mid.block_1(x))
        return ContentMaps(level_2=before, level_3=features, middle=middle)
