"""OmniTokenizer's VAE: patches, attention within frames, attention over time. arXiv 2406.09399.

State-dict keys are those of the published `imagenet_k600_vae.ckpt` and `imagenet_ucf_vae.ckpt`,
computed as the released code does with torch >= 2.1, its reading of tokens in an unusual order over
time included. What its training alone needs (discriminators, codebook, LPIPS) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reducio_latents.autoencoders.network import NetworkAutoencoder, build_network, own_network
from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.core.fetching import WeightsPlace
from reducio_latents.core.geometry import LatentGeometry
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError, GeometryError
from reducio_latents.vae.tiling import Tiling

TRAINING_KEYS = (
    "image_discriminator.",
    "video_discriminator.",
    "perceptual_model.",
    "codebook.",
)
ATTENTION_SCALE = 8.0
"""Queries and keys have unit length times learnt scales; their products are sharpened by this."""
ROPE_BASE = 10000.0
SPLIT_HEADS, JOIN_HEADS = "b n (heads d) -> b heads n d", "b heads n d -> b n (heads d)"
CUT_WINDOWS = "b (h y w x) c -> (b h w) (y x) c"
PATCHES = "b c (t f) (h y) (w x) -> b t h w (c f y x)"

TokenGrid = tuple[int, int, int, int]
"""B, t, h, w of the tokens."""


@dataclass(frozen=True, kw_only=True)
class OmniTokenizerConfig:
    """Sizes; the defaults are the published ones."""

    dim: int = 512
    heads: int = 8
    head_dim: int = 64
    latent_channels: int = 8
    patch_px: int = 8
    patch_frames: int = 4
    window: int = 8
    """Tokens of a window's side, for window attention."""
    encoder_blocks: str = "ttww"
    """Attention within frames, layer by layer: `t` over all tokens, `w` within windows."""
    decoder_blocks: str = "tttt"
    temporal_blocks: int = 4

    @property
    def geometry(self) -> LatentGeometry:
        return LatentGeometry(
            channels=self.latent_channels,
            temporal_stride=self.patch_frames,
            spatial_stride=self.patch_px,
            causal=True,
        )


class GainNorm(nn.Module):
    """Layer norm with a learnt gain; its bias is kept in the file and stays zero."""

    beta: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class GEGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * value


def feed_forward(dim: int) -> nn.Sequential:
    inner = int(4 * (2 / 3) * dim)
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, 2 * inner, bias=False),
        GEGLU(),
        nn.Identity(),  # dropout, in training
        nn.Linear(inner, dim, bias=False),
    )


class PositionGenerator(nn.Module):
    """A depth-wise convolution over the tokens of a clip, blind to later frames."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        # Over time, tokens come as (B H W) T and are read here as B T H W all the same: the
        # published weights were trained so.
        tokens = rearrange(x.reshape(*grid, -1), "b t h w c -> b c t h w")
        y = self.dsconv(F.pad(tokens, (1, 1, 1, 1, 2, 0)))
        found: Tensor = rearrange(y, "b c t h w -> b t h w c").reshape(x.shape)
        return found


class PositionBias(nn.Module):
    """Weights of a relative position bias that the released code computes with no more."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(inputs, dim)) for inputs in (2, dim)]
        self.net = nn.ModuleList([*layers, nn.Linear(dim, heads)])


class Attention(nn.Module):
    """Attention between all tokens of a frame, or between the frames of a place, causally."""

    def __init__(self, config: OmniTokenizerConfig, *, temporal: bool) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads, self.temporal = config.heads, temporal
        if temporal:
            self.spatial_rel_pos_bias = PositionBias(config.dim, config.heads)
        self.norm = GainNorm(config.dim)
        self.context_norm = GainNorm(config.dim)  # of cross-attention, which there is none of
        self.to_q = nn.Linear(config.dim, inner, bias=False)
        self.to_kv = nn.Linear(config.dim, 2 * inner, bias=False)
        self.q_scale = nn.Parameter(torch.ones(config.head_dim))
        self.k_scale = nn.Parameter(torch.ones(config.head_dim))
        self.to_out = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Keys and values are made of the tokens before the norm, queries after it.
        k, v = self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (
            rearrange(part, SPLIT_HEADS, heads=self.heads)
            for part in (self.to_q(self.norm(x)), k, v)
        )
        if not self.temporal:
            angles = _rope_angles(x.shape[1], q.shape[-1], x.device)
            q, k = _rotate(q, angles), _rotate(k, angles)
        q = F.normalize(q, dim=-1) * self.q_scale
        k = F.normalize(k, dim=-1) * self.k_scale
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.temporal, scale=ATTENTION_SCALE)
        out: Tensor = self.to_out(rearrange(y, JOIN_HEADS))
        return out


def _rope_angles(tokens: int, head_dim: int, device: torch.device) -> Tensor:
    """Return (tokens, head_dim / 2) angles, those of column and row in turn; square frames."""
    side = round(tokens**0.5)
    place = torch.arange(tokens, device=device)
    rates = ROPE_BASE ** -(torch.arange(0, head_dim, 4, device=device).float() / head_dim)
    columns, rows = (torch.outer(p.float(), rates) for p in (place % side, place // side))
    return torch.stack([columns, rows], dim=-1).flatten(1)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its angle."""
    a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cosine, sine = angles.cos(), angles.sin()
    turned = torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class WindowAttention(nn.Module):
    """Attention within windows of a frame, with a learnt bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        side = config.window
        self.heads, self.side = config.heads, side
        self.norm = GainNorm(config.dim)
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * side - 1) ** 2, config.heads)
        )
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        place = torch.stack([rows, columns]).flatten(1)
        apart = place[:, :, None] - place[:, None, :] + side - 1
        self.register_buffer("relative_position_index", apart[0] * (2 * side - 1) + apart[1])
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        count = round(x.shape[1] ** 0.5) // self.side  # windows along each side
        sizes = {"h": count, "w": count, "y": self.side, "x": self.side}
        parts = self.qkv(rearrange(self.norm(x), CUT_WINDOWS, **sizes)).chunk(3, dim=-1)
        q, k, v = (rearrange(part, SPLIT_HEADS, heads=self.heads) for part in parts)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = self.proj(rearrange(y, JOIN_HEADS))
        found: Tensor = rearrange(y, " -> ".join(reversed(CUT_WINDOWS.split(" -> "))), **sizes)
        return found


class Transformer(nn.Module):
    """Layers of position generator, attention and feed-forward; `blocks` says which attention."""

    def __init__(self, config: OmniTokenizerConfig, blocks: str, *, temporal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for block in blocks:
            layer = {"1": WindowAttention(config), "3": feed_forward(config.dim)}
            if block == "t":
                layer["0"] = PositionGenerator(config.dim)
                layer["1"] = Attention(config, temporal=temporal)
            self.layers.append(nn.ModuleDict(layer))
        self.norm_out = GainNorm(config.dim)

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            if "0" in layer:
                x = layer["0"](x, grid) + x
            x = layer["1"](x) + x
            x = layer["3"](x) + x
        found: Tensor = self.norm_out(x)
        return found


class OmniEncoder(nn.Module):
    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        self.patch = (config.patch_frames, config.patch_px)
        pixels = 3 * config.patch_px**2
        self.to_patch_emb_first_frame = _patch_embedding(pixels, config.dim)
        self.to_patch_emb = _patch_embedding(pixels * config.patch_frames, config.dim)
        blocks = config.encoder_blocks
        self.enc_spatial_transformer = Transformer(config, blocks, temporal=False)
        over_time = "t" * config.temporal_blocks
        self.enc_temporal_transformer = Transformer(config, over_time, temporal=True)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Return tokens (B, t, h, w, dim)."""
        frames, side = self.patch
        first = _embed(self.to_patch_emb_first_frame, _cut(video_BCTHW[:, :, :1], 1, side))
        rest = _embed(self.to_patch_emb, _cut(video_BCTHW[:, :, 1:], frames, side))
        tokens = torch.cat([first, rest], dim=1)
        _, t, h, w = grid = tokens.shape[:4]
        x = rearrange(tokens, "b t h w c -> (b t) (h w) c")
        x = self.enc_spatial_transformer(x, grid)
        x = rearrange(x, "(b t) n c -> (b n) t c", t=t)
        x = self.enc_temporal_transformer(x, grid)
        found: Tensor = rearrange(x, "(b h w) t c -> b t h w c", h=h, w=w)
        return found


class OmniDecoder(nn.Module):
    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        self.patch = (config.patch_frames, config.patch_px)
        pixels = 3 * config.patch_px**2
        over_time = "t" * config.temporal_blocks
        blocks = config.decoder_blocks
        self.dec_spatial_transformer = Transformer(config, blocks, temporal=False)
        self.dec_temporal_transformer = Transformer(config, over_time, temporal=True)
        self.to_pixels_first_frame = nn.Sequential(nn.Linear(config.dim, pixels))
        self.to_pixels = nn.Sequential(nn.Linear(config.dim, pixels * config.patch_frames))

    def forward(self, tokens_BthwD: Tensor) -> Tensor:
        batch, t, h, _ = grid = tokens_BthwD.shape[:4]
        x = rearrange(tokens_BthwD, "b t h w c -> (b h w) t c")
        x = self.dec_temporal_transformer(x, grid)
        x = rearrange(x, "(b n) t c -> (b t) n c", b=batch)
        x = self.dec_spatial_transformer(x, grid)
        tokens = rearrange(x, "(b t) (h w) c -> b t h w c", t=t, h=h)
        frames, side = self.patch
        first = _paste(self.to_pixels_first_frame(tokens[:, :1]), 1, side)
        return torch.cat([first, _paste(self.to_pixels(tokens[:, 1:]), frames, side)], dim=2)


def _patch_embedding(pixels: int, dim: int) -> nn.ModuleDict:
    layers = {"1": nn.LayerNorm(pixels), "2": nn.Linear(pixels, dim), "3": nn.LayerNorm(dim)}
    return nn.ModuleDict(layers)


def _embed(layers: nn.ModuleDict, patches: Tensor) -> Tensor:
    for layer in layers.values():
        patches = layer(patches)
    return patches


def _cut(video_BCTHW: Tensor, frames: int, side: int) -> Tensor:
    """Return patches (B, t, h, w, C * frames * side * side)."""
    return rearrange(video_BCTHW, PATCHES, f=frames, y=side, x=side)


def _paste(patches_BthwP: Tensor, frames: int, side: int) -> Tensor:
    """Undo `_cut`."""
    shape = "b t h w (c f y x) -> b c (t f) (h y) (w x)"
    return rearrange(patches_BthwP, shape, c=3, f=frames, y=side, x=side)


class OmniTokenizerVAE(nn.Module):
    """Takes pixels in [-1, 1]; the published code has them in [-0.5, 0.5]."""

    def __init__(self, config: OmniTokenizerConfig) -> None:
        super().__init__()
        self.geometry, self.step_px = config.geometry, config.patch_px * config.window
        self.encoder = OmniEncoder(config)
        self.decoder = OmniDecoder(config)
        self.pre_vq_conv = nn.ModuleDict({"1": nn.Linear(config.dim, 2 * config.latent_channels)})
        self.post_vq_conv = nn.ModuleDict({"1": nn.Linear(config.latent_channels, config.dim)})

    def encode(self, video_BCTHW: Tensor) -> Posterior:
        tokens = self.pre_vq_conv["1"](self.encoder(video_BCTHW / 2))
        return Posterior.of_moments(rearrange(tokens, "b t h w d -> b d t h w").float()).clamped()

    def decode(self, z_BDthw: Tensor) -> Tensor:
        tokens = self.post_vq_conv["1"](rearrange(z_BDthw, "b d t h w -> b t h w d"))
        video: Tensor = self.decoder(tokens) * 2
        return video

    def tile(self, tiling: Tiling | None) -> None:
        raise ConfigError("OmniTokenizer cannot be tiled. Use tiling=None.")

    def check_clip(self, frames: int, height: int, width: int) -> None:
        self.geometry.latent_shape(frames, height, width)
        if height != width or height % self.step_px:
            usable = max(self.step_px, min(height, width) // self.step_px * self.step_px)
            raise GeometryError(
                f"frames are {height}x{width}, but OmniTokenizer takes square ones, the side a "
                f"multiple of {self.step_px}. Use {usable} px."
            )


def load_omnitokenizer(
    name: str,
    weights: WeightsPlace | None,
    options: LoadOptions,
    config: OmniTokenizerConfig | None = None,
) -> NetworkAutoencoder:
    """Load `omnitokenizer` from a published VAE file, or make `omnitokenizer:random[:SEED]`."""
    sizes = config or OmniTokenizerConfig()
    model = build_network(lambda: OmniTokenizerVAE(sizes), name, weights, ignored=TRAINING_KEYS)
    rule = {"rule": "scale_shift", "scale": 1.0, "shift": 0.0}  # its latents are not scaled
    halves = (["encoder"], ["decoder"])
    return own_network(name, model, options, halves=halves, final_rule=rule)
