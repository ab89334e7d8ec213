"""DiT (Peebles and Xie 2023) over motion latents, conditioned on a still image and on text.

Shape letters: B batch, D latent channels, t h w grid of latents, C width, L text tokens; N tokens,
t * h * w over the patch's area.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reducio_latents.errors import ConfigError

MLP_RATIO = 4
STEM_WIDTH = 32
TIME_FEATURES = 256
MAX_PERIOD = 10_000.0


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of the network."""

    latent_channels: int
    width: int = 384
    depth: int = 8
    heads: int = 6
    patch: int = 1
    """Latents a side that one token covers; in time a token covers one."""
    content_channels: int = 0
    """Channels of the content that conditions it: 3 of an image; 0 for none."""
    content_stride: int = 1
    """Pixels of the content a side for each latent."""
    text_width: int = 0
    """Of the text's token vectors; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("latent_channels", "width", "depth", "heads", "patch", "content_stride"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}.")
        if self.width % 16 or self.width % self.heads:
            raise ConfigError(
                f"width is {self.width}; it must be a multiple of 16, which the position embedding "
                f"needs, and of heads, which is {self.heads}."
            )


class Conditions(NamedTuple):
    """What a sample is made to agree with."""

    content: Tensor | None
    """(B, channels, H, W): an image in [-1, 1], or final latents of one."""
    text: Tensor | None
    """(B, L, width of the text's vectors)."""
    text_mask: Tensor | None
    """bool (B, L), True where there is a token."""
    keep: Tensor
    """bool (B,), False for samples that are to be made without any condition."""

    def without(self) -> Conditions:
        """Return the same with every condition left out."""
        return self._replace(keep=torch.zeros_like(self.keep))

    def to(self, device: torch.device) -> Conditions:
        """Return the same on a device."""
        return Conditions(*(None if v is None else v.to(device) for v in self))  # type: ignore[arg-type]

    def repeat(self, times: int) -> Conditions:
        """Return those of one sample, (1, ...), for several, (times, ...)."""
        wide = (None if v is None else v.expand(times, *v.shape[1:]) for v in self)
        return Conditions(*wide)  # type: ignore[arg-type]


class DiT(nn.Module):
    """Predict the velocity of noised latents, for grids of any size."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch_values = config.width, config.latent_channels * config.patch**2
        self.embed = nn.Linear(patch_values, width)
        self.time = TimeEmbedding(width)
        self.content = self.text = None
        if config.content_channels:
            stride = config.content_stride * config.patch
            self.content = ContentStem(config.content_channels, stride, width)
            self.no_content = nn.Parameter(torch.zeros(width))
        if config.text_width:
            self.text = nn.Linear(config.text_width, width)
            self.no_text = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch_values)
        self._initialise()

    def _initialise(self) -> None:
        """Let each block begin as the identity, the prediction as 0: adaLN-Zero, section 3.2."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.modulation, self.out):
            nn.init.zeros_(linear.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.modulation.weight)
            if block.cross is not None:
                nn.init.zeros_(block.cross.out.weight)

    def forward(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Return the velocity, of the shape of x (B, D, t, h, w), at each sample's time (B,)."""
        patch = self.config.patch
        t, h, w = self._grid(x)
        tokens = rearrange(x, "b d t (h p) (w q) -> b (t h w) (d p q)", p=patch, q=patch)
        tokens = self.embed(tokens) + position_embedding(t, h, w, self.config.width, x.device)
        tokens = self._add_content(tokens, conditions, (t, h, w))
        text, mask = self._text_tokens(conditions)
        about = F.silu(self.time(time))
        for block in self.blocks:
            tokens = block(tokens, about, text, mask)
        shift, scale = self.modulation(about)[:, None].chunk(2, dim=2)
        tokens = self.out(modulate(self.norm(tokens), shift, scale))
        v: Tensor = rearrange(
            tokens, "b (t h w) (d p q) -> b d t (h p) (w q)", t=t, h=h, w=w, p=patch, q=patch
        )
        return v

    def _grid(self, x: Tensor) -> tuple[int, int, int]:
        """Return how many tokens there are along t, h, w."""
        t, h, w = x.shape[2:]
        patch = self.config.patch
        if h % patch or w % patch:
            raise ConfigError(f"latents of {h}x{w} have no whole patches of {patch}. Use patch 1.")
        return t, h // patch, w // patch

    def _add_content(
        self, tokens: Tensor, conditions: Conditions, grid: tuple[int, int, int]
    ) -> Tensor:
        """Add what the still image shows at a place to that place's tokens of all times."""
        if self.content is None:
            return tokens
        t, h, w = grid
        assert conditions.content is not None
        seen = rearrange(self.content(conditions.content), "b c h w -> b (h w) c")
        if seen.shape[1] != h * w:
            raise ConfigError(
                f"content of {tuple(conditions.content.shape[2:])} gives {seen.shape[1]} tokens, "
                f"the latents have {h}x{w}. Train on buckets of one stride."
            )
        seen = torch.where(conditions.keep[:, None, None], seen, self.no_content.to(seen.dtype))
        return tokens + seen.repeat(1, t, 1)

    def _text_tokens(self, conditions: Conditions) -> tuple[Tensor | None, Tensor | None]:
        """Return tokens (B, 1 + L, C) and their mask; the first stands for "no text"."""
        if self.text is None:
            return None, None
        assert conditions.text is not None
        assert conditions.text_mask is not None
        tokens = self.text(conditions.text.to(self.text.weight.dtype))
        first = self.no_text.to(tokens.dtype).expand(len(tokens), 1, -1)
        # Always attended to, so that a sample without text has something to attend to.
        shown = torch.ones_like(conditions.keep)[:, None]
        mask = torch.cat([shown, conditions.text_mask & conditions.keep[:, None]], dim=1)
        return torch.cat([first, tokens], dim=1), mask[:, None, None]


class Block(nn.Module):
    """Self-attention and MLP behind adaLN-Zero, with cross-attention to text between them."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, config.heads)
        self.cross = Attention(width, config.heads) if config.text_width else None
        self.norm_cross = nn.LayerNorm(width, eps=1e-6) if config.text_width else None
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_RATIO * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(MLP_RATIO * width, width),
        )

    def forward(self, x: Tensor, about: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(about)[:, None].chunk(6, 2)
        y = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1 * self.attention(y, y)
        if self.cross is not None and self.norm_cross is not None:
            assert text is not None
            x = x + self.cross(self.norm_cross(x), text, mask)
        out: Tensor = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return out


class Attention(nn.Module):
    """Multi-head attention; queries and keys are normalised (Esser et al. 2024, section 5.3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.query_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.key_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, N, C), each token of x (B, N, C) having looked at the context (B, M, C)."""
        query = rearrange(self.query(x), "b n (k d) -> b k n d", k=self.heads)
        key, value = rearrange(
            self.key_value(context), "b m (s k d) -> s b k m d", s=2, k=self.heads
        )
        query = self.query_norm(query.float()).to(value.dtype)
        key = self.key_norm(key.float()).to(value.dtype)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.out(rearrange(found, "b k n d -> b n (k d)"))
        return out


class ContentStem(nn.Module):
    """Convolutions from a still image to one token for each place of the latent grid."""

    def __init__(self, channels: int, stride: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        made = min(STEM_WIDTH, width)
        while stride % 2 == 0:
            layers += [nn.Conv2d(channels, made, 3, stride=2, padding=1), nn.GroupNorm(1, made)]
            layers.append(nn.SiLU())
            channels, made, stride = made, min(2 * made, width), stride // 2
        kernel = stride if stride > 1 else 3
        layers.append(nn.Conv2d(channels, width, kernel, stride=stride, padding=(stride == 1) * 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, content: Tensor) -> Tensor:
        """Return (B, C, H / stride, W / stride)."""
        out: Tensor = self.layers(content)
        return out


class TimeEmbedding(nn.Module):
    """The time in [0, 1] as sines of many frequencies, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, time: Tensor) -> Tensor:
        # Frequencies are those of diffusion's thousand steps.
        out: Tensor = self.layers(sines(1000 * time, TIME_FEATURES))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def sines(position: Tensor, features: int) -> Tensor:
    """Return sines and cosines (..., features) of positions (...). Vaswani et al. (2017), 3.5."""
    half = features // 2
    exponent = torch.arange(half, device=position.device, dtype=torch.float32) / half
    angle = position[..., None].float() * torch.exp(-math.log(MAX_PERIOD) * exponent)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def position_embedding(t: int, h: int, w: int, width: int, device: torch.device) -> Tensor:
    """Return (t * h * w, width): a quarter of the features tells the time, the rest row, column."""
    of_time, of_side = width // 4, 3 * width // 8
    steps, rows, columns = (torch.arange(n, device=device) for n in (t, h, w))
    parts = [
        sines(steps, of_time)[:, None, None].expand(t, h, w, -1),
        sines(rows, of_side)[None, :, None].expand(t, h, w, -1),
        sines(columns, of_side)[None, None].expand(t, h, w, -1),
    ]
    return torch.cat(parts, dim=-1).flatten(0, 2)
