"""The decoder: final latents and the content image's feature maps to a clip."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reducio_latents.vae.blocks import Middle, ResidualBlock, Upsample, conv
from reducio_latents.vae.config import (
    CHANNEL_MULTIPLIERS,
    CONTENT_MULTIPLIERS,
    FRAMES,
    IMAGE_CHANNELS,
    ReducioVAEConfig,
)
from reducio_latents.vae.content import ContentMaps
from reducio_latents.vae.norm import NormSiLU

HEAD_CHANNELS = 64


def time_sinusoid(steps: int, channels: int) -> Tensor:
    """Return (1, steps, 1, channels): sine on even channels, cosine on odd ones.

    The angle is position / 10000^(2 * floor(j / 2) / channels), after Vaswani et al. (2017).
    """
    j = np.arange(channels)
    angle = np.arange(steps)[:, None] / 10000.0 ** (2 * (j // 2) / channels)
    table = np.where(j % 2 == 0, np.sin(angle), np.cos(angle))
    return torch.from_numpy(table.astype(np.float32))[None, :, None, :]


class CrossAttention(nn.Module):
    """Queries from video tokens, keys and values from content tokens, heads of 64 channels."""

    def __init__(self, channels: int, content_channels: int) -> None:
        super().__init__()
        inner = max(1, channels // HEAD_CHANNELS) * HEAD_CHANNELS
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(content_channels, inner, bias=False)
        self.to_v = nn.Linear(content_channels, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, channels))

    def forward(self, tokens_BNC: Tensor, content_BMC: Tensor) -> Tensor:
        q, k, v = (
            rearrange(projected, "b n (heads c) -> b heads n c", c=HEAD_CHANNELS)
            for projected in (self.to_q(tokens_BNC), self.to_k(content_BMC), self.to_v(content_BMC))
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.to_out(rearrange(attended, "b heads n c -> b n (heads c)"))
        return out


class ContentFusion(nn.Module):
    """Add time to a video feature map, then what its positions find in a content map."""

    pos_embed: Tensor

    def __init__(self, channels: int, content_channels: int, steps: int) -> None:
        super().__init__()
        self.register_buffer("pos_embed", time_sinusoid(steps, channels))
        self.attn = CrossAttention(channels, content_channels)
        self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, x_BCTHW: Tensor, content_BCHW: Tensor) -> Tensor:
        time = rearrange(self.pos_embed.to(x_BCTHW.dtype), "1 t 1 c -> 1 c t 1 1")
        x = x_BCTHW + time
        tokens = rearrange(x, "b c t h w -> b (t h w) c")
        found = self.attn(self.norm(tokens), rearrange(content_BCHW, "b c h w -> b (h w) c"))
        # x comes first, so the sum has its memory format and not the tokens'.
        _, _, t, h, w = x.shape
        out: Tensor = x + rearrange(found, "b (t h w) c -> b c t h w", t=t, h=h, w=w)
        return out


class DecoderMiddle(Middle):
    """`Middle`, with the content's coarsest map fused in before the self-attention."""

    def __init__(self, channels: int, content_channels: int, steps: int) -> None:
        super().__init__(3, channels)
        self.fuse = nn.ModuleList([ContentFusion(channels, content_channels, steps)])

    def forward(self, x: Tensor, content: Tensor) -> Tensor:  # type: ignore[override]
        x = self.fuse[0](self.block_1(x), content)
        out: Tensor = self.block_2(self.attn_1(x))
        return out


class UpLevel(nn.Module):
    """Two residual blocks, a content fusion where the level has one, two more, an up-sampling."""

    def __init__(
        self, channels_in: int, channels_out: int, fuse: nn.Module | None, upsample: nn.Module
    ) -> None:
        super().__init__()
        self.block_1 = nn.Sequential(
            ResidualBlock(3, channels_in, channels_out),
            ResidualBlock(3, channels_out, channels_out),
        )
        self.fuse = nn.ModuleList([] if fuse is None else [fuse])
        self.block_2 = nn.Sequential(
            ResidualBlock(3, channels_out, channels_out),
            ResidualBlock(3, channels_out, channels_out),
        )
        self.upsample = upsample

    def forward(self, x: Tensor, content: Tensor | None) -> Tensor:
        x = self.block_1(x)
        for fuse in self.fuse:
            x = fuse(x, content)
        out: Tensor = self.upsample(self.block_2(x))
        return out


class Decoder(nn.Module):
    """(B, D, t, h, w) after `post_quant_conv`, and content maps -> (B, 3, T, H, W), not clamped."""

    def __init__(self, config: ReducioVAEConfig) -> None:
        super().__init__()
        channels = [config.decoder_width * multiplier for multiplier in CHANNEL_MULTIPLIERS]
        content = [config.content_width * multiplier for multiplier in CONTENT_MULTIPLIERS]
        top = len(channels) - 1
        self.conv_in = conv(3, config.latent_channels, channels[top], 3)
        self.mid = DecoderMiddle(channels[top], content[-1], config.latent_frames)
        self.up = nn.ModuleList()
        for i, width in enumerate(channels):
            fuse = ContentFusion(width, content[i], FRAMES) if i in (2, 3) else None
            # Space grows at every level but the last; time at the first ones, from the top.
            factors = (2 if i > top - config.temporal_halvings else 1, 2, 2)
            upsample = Upsample(width, factors) if i > 0 else nn.Identity()
            self.up.append(UpLevel(channels[min(i + 1, top)], width, fuse, upsample))
        self.norm_out = NormSiLU(channels[0])
        self.conv_out = conv(3, channels[0], IMAGE_CHANNELS, 3)

    def forward(self, z_BDthw: Tensor, maps: ContentMaps) -> Tensor:
        content = {3: maps.level_3, 2: maps.level_2}
        x = self.mid(self.conv_in(z_BDthw), maps.middle)
        for i in reversed(range(len(self.up))):
            x = self.up[i](x, content.get(i))
        video: Tensor = self.conv_out(self.norm_out(x))
        return video
