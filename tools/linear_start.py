"""A start for small models of differences: the best linear code, by least squares, then by descent.

From random weights most of a short training goes into passing a signal through five halvings and
back. Here the residual branches and the attention begin at zero, so that what is left of both
networks is linear but for two normalisations, and can be computed:

1. the encoder's down-samplings are principal components of what lies under them, level by level;
2. the decoder's up-samplings are regressions on the encoder's maps of the same stride;
3. what lies between the maps of stride 8, a hundredth of the work for a clip, is trained, first
   linear and then whole, with the content image;
4. the decoder's last up-samplings are fitted to what it gives by then.

Clips are weighted by the inverse of how much moves in them: a share of each clip's error counts.
Everything is computed on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from reducio_latents.core.gaussian import kl_to_unit_normal
from reducio_latents.core.values import Posterior
from reducio_latents.train.state import update_average
from reducio_latents.vae import ReducioVAE
from reducio_latents.vae.blocks import ResidualBlock, SelfAttention
from reducio_latents.vae.content import ContentMaps
from reducio_latents.vae.decoder import ContentFusion
from reducio_latents.vae.model import centre_image
from reducio_latents.video.pixels import to_unit

Tell = Callable[[str], None]

COARSE = 3
"""The level of stride 8: from here on down the descent takes place."""
SMALL = 0.05
"""Of the usual initial weights, for channels that the linear code does not use."""
SCALE = 16.0
"""Makes differences, a few hundredths on average, about as large as what a residual branch gives:
else a branch's first steps drown them."""
STILL = 1e-3 * SCALE**2
"""Mean squared difference, scaled, below which clips count alike: they hardly move."""
TINY = 3e-6 * SCALE**2
"""The same for maps, where the error is compared with what there is."""
CODE_OFFSET, MAP_OFFSET = 4.0, 8.0
"""A normalisation divides by the spread of a clip, and so hides how much of it moves. Constants of
both signs, many times what is to be coded, make that spread nearly the same for every clip."""
START_LOGVAR = -6.0


@dataclass(frozen=True)
class Descent:
    """How the coarse half is trained: Adam, warm-up, cosine."""

    steps: int
    lr: float
    batch_size: int = 8
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.99)
    kl_weight: float = 3e-6
    max_grad_norm: float = 1.0
    ema_decay: float = 0.995


def linear_start(
    vae: ReducioVAE,
    clips_NTHWC: Tensor,
    *,
    fitted: int,
    linear: Descent,
    whole: Descent,
    tell: Tell = print,
) -> None:
    """Give `vae`, a model of differences on the CPU, weights to train from.

    clips are uint8 RGB (N, 16, H, W, 3); least squares take the first `fitted` of them.
    """
    with torch.no_grad():
        vae.difference_scale.fill_(SCALE)
        _silence(vae)
        few = _Clips(vae, clips_NTHWC[:fitted])
        _fit_encoder(vae, few, tell)
        _fit_latents(vae, few)
        coarse = [_linear_latents(vae, few.encoded(x)[-1]) for x, _ in few]
        _fit_upsamplings(vae, few, coarse, range(5, COARSE, -1), tell)
        del coarse
    data = _coarse_maps(vae, clips_NTHWC)
    _descend(vae, data, linear, whole_network=False, tell=tell)
    was, found = vae.state_dict(), _explained(vae, few)
    was = {key: tensor.clone() for key, tensor in was.items()}
    _descend(vae, data, whole, whole_network=True, tell=tell)
    now = _explained(vae, few)
    tell(f"explained by the linear code {found:.4f}, by the whole network {now:.4f}")
    if now < found:
        vae.load_state_dict(was)
    with torch.no_grad():
        coarse = [
            _coarse(vae, few.encoded(x)[COARSE], image, None, whole_network=True)[0]
            for x, image in few
        ]
        _fit_upsamplings(vae, few, coarse, range(COARSE, 0, -1), tell)
        _fit_pixels(vae, few, coarse, tell)


class _Clips:
    """Differences (B, 3, T, H, W) and content images, a few clips at a time."""

    def __init__(self, vae: ReducioVAE, clips_NTHWC: Tensor, batch_size: int = 4) -> None:
        self.vae, self.clips, self.batch_size = vae, clips_NTHWC, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for clips in self.clips.split(self.batch_size):  # type: ignore[no-untyped-call]
            video = to_unit(clips)
            image = centre_image(video)
            yield (video - image.unsqueeze(2)) * self.vae.difference_scale, image

    def encoded(self, differences: Tensor, levels: int = 6) -> list[Tensor]:
        """Return the input of each of the encoder's first `levels` levels, without its blocks."""
        x = self.vae.encoder_3d.conv_in(differences)
        maps = [x]
        network: Any = self.vae.encoder_3d
        for level in list(network.down)[: levels - 1]:
            x = level.downsample(_shortcut(level.block, x))
            maps.append(x)
        return maps


def _weights(differences: Tensor) -> Tensor:
    """(B,): what a clip counts."""
    return 1 / (differences.square().flatten(1).mean(1) + STILL)


def _silence(vae: ReducioVAE) -> None:
    """Begin with residual branches and attention that give nothing."""
    for module in vae.modules():
        last: nn.Module | None = None
        if isinstance(module, ResidualBlock):
            last = module.conv2
        elif isinstance(module, SelfAttention):
            last = module.proj_out
        elif isinstance(module, ContentFusion):
            last = module.attn.to_out[0]
        if last is not None:
            for parameter in last.parameters():
                parameter.zero_()


def _pass_on(conv: nn.Module) -> None:
    """Make a convolution give its input channels, as far as it has outputs; others are small."""
    if isinstance(conv, nn.Identity):
        return
    weight, bias = conv.get_parameter("weight"), conv.get_parameter("bias")
    weight.mul_(SMALL)
    bias.zero_()
    count = min(weight.shape[:2])
    weight[:count] = 0
    centre = tuple(size // 2 for size in weight.shape[2:])
    for i in range(count):
        weight[(i, i, *centre)] = 1


def _shortcut(blocks: nn.Module, x: Tensor) -> Tensor:
    """What residual blocks give whose branches give nothing."""
    out: Tensor = blocks.get_submodule("0.nin_shortcut")(x)
    return out


def _time(fusion: nn.Module) -> Tensor:
    """(1, C, T, 1, 1): what a content fusion adds to every position."""
    return fusion.get_buffer("pos_embed").permute(0, 3, 1, 2)[..., None]


def _signs(count: int) -> Tensor:
    return torch.tensor([1.0, -1.0]).repeat((count + 1) // 2)[:count]


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _fit_encoder(vae: ReducioVAE, clips: _Clips, tell: Tell) -> None:
    """Make every down-sampling the principal components of the cells that it joins."""
    encoder: Any = vae.encoder_3d
    # Luminance and two of colour: a rotation, nearly, so that small channels beside them stay so.
    colours = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
    _pass_on(encoder.conv_in)
    encoder.conv_in.weight[:3, :, 1, 1, 1] = F.normalize(colours, dim=1)
    levels = list(encoder.down)
    for i, level in enumerate(levels):
        _pass_on(level.block[0].nin_shortcut)
        if i == len(levels) - 1:
            break
        conv = level.downsample.conv
        steps = 2 if conv.kernel_size[0] == 3 else 1
        covariance = torch.zeros((), dtype=torch.float64)
        for x, _ in clips:
            below = _shortcut(level.block, clips.encoded(x, i + 1)[-1])
            cells = rearrange(
                below, "b c (t a) (h p) (w q) -> b (t h w) (c a p q)", a=steps, p=2, q=2
            )
            covariance = (
                covariance + torch.einsum("bnp,bnq,b->pq", cells, cells, _weights(x)).double()
            )
        energy, vectors = torch.linalg.eigh(covariance)
        count = min(conv.out_channels, len(energy))
        vectors = vectors.flip(1)[:, :count].float()
        vectors = vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)
        conv.weight.zero_()
        conv.bias.zero_()
        # Halved, so that what is alike in the cells keeps its size.
        conv.weight[:count, :, :steps, :2, :2] = (
            rearrange(vectors, "(c a p q) o -> o c a p q", a=steps, p=2, q=2) / 2
        )
        kept = float(energy[-count:].sum() / energy.sum())
        tell(f"encoder level {i}: {count} of {len(energy)} components keep {kept:.4f}")


def _fit_latents(vae: ReducioVAE, clips: _Clips) -> None:
    """Make the first components the latents' means, and the decoder begin with the latents."""
    encoder: Any = vae.encoder_3d
    quant: Any = vae.quant_conv
    latents = vae.config.latent_channels
    total = weight = torch.zeros(())
    for x, _ in clips:
        top = _shortcut(encoder.down[-1].block, clips.encoded(x)[-1])
        total = total + (top.square().mean((2, 3, 4)) * _weights(x)[:, None]).sum(0)
        weight = weight + _weights(x).sum()
    spread = (total / weight).sqrt()
    spread = spread.clamp(min=1e-3 * float(spread.max()))  # few clips have fewer components
    spread[latents:] = spread[latents - 1]
    signs = _signs(len(spread))
    last = encoder.down[-2].downsample.conv
    last.weight /= spread.view(-1, 1, 1, 1, 1)
    last.bias.copy_(MAP_OFFSET * signs)
    _nearly_linear(encoder.norm_out, gain=MAP_OFFSET / 2)
    fit = Regression()
    for x, _ in clips:
        top = _shortcut(encoder.down[-1].block, clips.encoded(x)[-1])
        codes = _tokens(top[:, :latents]) - MAP_OFFSET * signs[:latents]
        fit.add(_tokens(encoder.norm_out(top)), codes + CODE_OFFSET * _signs(latents), _weights(x))
    slopes, constants, _ = fit.solve()
    out = encoder.conv_out
    out.weight.mul_(SMALL)
    out.weight[:latents] = 0
    out.weight[:latents, :, 1, 1, 1] = slopes.T
    out.bias[:latents] = constants
    _pass_on(quant)
    quant.weight[latents:] *= SMALL
    quant.bias[latents:] = START_LOGVAR
    _pass_on(vae.post_quant_conv)
    _pass_on(vae.decoder.conv_in)


def _nearly_linear(norm: nn.Module, gain: float) -> None:
    """Have a NormSiLU whose input has offsets of both signs work where SiLU is nearly a line."""
    weight, bias = norm.get_parameter("weight"), norm.get_parameter("bias")
    weight.fill_(gain)
    bias.copy_(3 - gain * _signs(len(bias)))


def _linear_latents(vae: ReducioVAE, top: Tensor) -> Tensor:
    """What the decoder has before its first level, of the encoder's last input, all linear."""
    encoder: Any = vae.encoder_3d
    decoder: Any = vae.decoder
    top = _shortcut(encoder.down[-1].block, top)
    moments = vae.quant_conv(encoder.conv_out(encoder.norm_out(top)))
    latents = vae.final_latents(Posterior.of_moments(moments.float()).clamped())
    x: Tensor = decoder.conv_in(vae.post_quant_conv(latents)) + _time(decoder.mid.fuse[0])
    return x


def _fit_upsamplings(
    vae: ReducioVAE, clips: _Clips, starts: list[Tensor], levels: range, tell: Tell
) -> None:
    """Fit the up-samplings of `levels`, from the top, to the encoder's maps of their strides.

    starts: of each batch of clips, what goes into the first of these levels; at `COARSE`, what
    comes out of its blocks, less its time.
    """
    decoder: Any = vae.decoder
    for level in levels:
        conv = decoder.up[level].upsample.conv
        _pass_on(decoder.up[level - 1].block_1[0].nin_shortcut)
        fit = Regression()
        for (x, _), start in zip(clips, starts, strict=True):
            target = _resized(clips.encoded(x, level)[-1], conv.out_channels)
            seen, at = _neighbourhoods(_before(vae, start, levels[0], level), 3000)
            fit.add(seen, _tokens(target)[:, at], _weights(x))
        tell(f"decoder level {level}: {_set(conv, fit):.4f} of the map below is explained")


def _fit_pixels(vae: ReducioVAE, clips: _Clips, starts: list[Tensor], tell: Tell) -> None:
    """Fit the decoder's last convolution to the differences themselves."""
    decoder: Any = vae.decoder
    bias = decoder.up[0].block_1[0].nin_shortcut.bias
    bias.copy_(1.2 * SCALE * _signs(len(bias)))
    _nearly_linear(decoder.norm_out, gain=2.0)
    fit = Regression()
    for (x, _), start in zip(clips, starts, strict=True):
        seen, at = _neighbourhoods(decoder.norm_out(_before(vae, start, COARSE, 0)), 8000)
        fit.add(seen, _tokens(x)[:, at], _weights(x))
    tell(f"decoder's last convolution: {_set(decoder.conv_out, fit):.4f} is explained")


def _before(vae: ReducioVAE, x: Tensor, first: int, level: int) -> Tensor:
    """Take x through the decoder's levels without their blocks, up to a level's up-sampling
    convolution; level 0: up to `norm_out`."""
    decoder: Any = vae.decoder
    for i in range(first, -1, -1):
        up = decoder.up[i]
        if i < COARSE or first > COARSE:
            x = _shortcut(up.block_1, x)
        for fusion in up.fuse:
            x = x + _time(fusion)
        if i == 0:
            break
        x = F.interpolate(x, scale_factor=up.upsample.factors, mode="nearest")
        if i == level:
            break
        x = up.upsample.conv(x)
    return x


def _resized(x: Tensor, channels: int) -> Tensor:
    """The first channels of a map; zeros where it has fewer."""
    return F.pad(x[:, :channels], (0, 0) * 3 + (0, max(0, channels - x.shape[1])))


def _neighbourhoods(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return what a 3x3x3 convolution sees at `count` random positions, and which they are."""
    _, _, t, h, w = x.shape
    windows = F.pad(x, (1,) * 6).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)
    at = torch.randperm(t * h * w)[:count]
    seen = windows[:, :, at // (h * w), at // w % h, at % w]
    return rearrange(seen, "b c n a p q -> b n (c a p q)"), at


class Regression:
    """Weighted least squares of y on x and a constant."""

    def __init__(self) -> None:
        self.xx = self.xy = self.yy = torch.zeros((), dtype=torch.float64)

    def add(self, x_BNP: Tensor, y_BNQ: Tensor, weights_B: Tensor) -> None:
        x = torch.cat([x_BNP, torch.ones_like(x_BNP[..., :1])], dim=-1)
        weighted = (x * weights_B[:, None, None]).flatten(0, 1)
        self.xx = self.xx + (weighted.T @ x.flatten(0, 1)).double()
        self.xy = self.xy + (weighted.T @ y_BNQ.flatten(0, 1)).double()
        self.yy = self.yy + (y_BNQ.square() * weights_B[:, None, None]).sum((0, 1)).double()

    def solve(self, ridge: float = 1e-4) -> tuple[Tensor, Tensor, float]:
        """Return slopes (P, Q), constants (Q,) and the share of y's squares that is explained."""
        own = self.xx.diagonal()
        extra = ridge * own.clamp(min=1e-9 * float(own.max()))
        extra[-1] = 0
        found = torch.linalg.solve(self.xx + extra.diag(), self.xy)
        left = self.yy - 2 * (found * self.xy).sum(0) + (found * (self.xx @ found)).sum(0)
        explained = 1 - float(left.sum() / self.yy.sum())
        return found[:-1].float(), found[-1].float(), explained


def _set(conv: nn.Module, fit: Regression) -> float:
    slopes, constants, explained = fit.solve()
    weight = rearrange(slopes, "(c a p q) o -> o c a p q", a=3, p=3, q=3)
    conv.get_parameter("weight").copy_(weight)
    conv.get_parameter("bias").copy_(constants)
    return explained


@torch.no_grad()
def _coarse_maps(vae: ReducioVAE, clips_NTHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps of stride 8 (2N, C, T, H/8, W/8) and the content images, uint8, of all clips
    and their mirror images."""
    maps, images = [], []
    for clips in (clips_NTHWC, clips_NTHWC.flip(3)):
        batches = _Clips(vae, clips)
        for x, _ in batches:
            maps.append(batches.encoded(x, COARSE + 1)[-1].bfloat16())
        images.append(clips[:, (clips.shape[1] - 1) // 2])
    return torch.cat(maps), torch.cat(images)


def _coarse(
    vae: ReducioVAE, x: Tensor, image: Tensor, noise: Tensor | None, *, whole_network: bool
) -> tuple[Tensor, Posterior]:
    """Take a map of stride 8 through the latents and back to stride 8."""
    encoder: Any = vae.encoder_3d
    decoder: Any = vae.decoder
    for level in list(encoder.down)[COARSE:]:
        x = level.downsample(level.block(x) if whole_network else _shortcut(level.block, x))
    x = encoder.mid(x) if whole_network else x
    moments = vae.quant_conv(encoder.conv_out(encoder.norm_out(x)))
    posterior = Posterior.of_moments(moments.float()).clamped()
    y = decoder.conv_in(vae.post_quant_conv(vae.final_latents(posterior, noise)))
    maps: ContentMaps | None = None
    if whole_network:
        maps = vae.encoder_2d(image)
        y = decoder.mid(y, maps.middle)
    else:
        y = y + _time(decoder.mid.fuse[0])
    for i in range(len(decoder.up) - 1, COARSE - 1, -1):
        up = decoder.up[i]
        y = up.block_1(y) if whole_network else _shortcut(up.block_1, y)
        for fusion in up.fuse:
            y = fusion(y, maps.level_3) if maps is not None else y + _time(fusion)
        y = up.block_2(y) if whole_network else y
        if i > COARSE:
            y = up.upsample(y)
    return y.float() - _time(decoder.up[COARSE].fuse[0]), posterior


@torch.no_grad()
def _explained(vae: ReducioVAE, clips: _Clips) -> float:
    """Return the mean share of the maps of stride 8 that comes back."""
    shares = []
    for x, image in clips:
        level = clips.encoded(x, COARSE + 1)[-1]
        y, _ = _coarse(vae, level, image, None, whole_network=True)
        shares.append(_share(_resized(level, y.shape[1]), y))
    return float(torch.cat(shares).mean())


def _share(x: Tensor, y: Tensor) -> Tensor:
    """(B,): the share of x that y explains."""
    error, energy = ((v.square().flatten(1).mean(1)) for v in (x - y, x))
    return 1 - error / (energy + 10 * TINY)


def _descend(
    vae: ReducioVAE,
    data: tuple[Tensor, Tensor],
    how: Descent,
    *,
    whole_network: bool,
    tell: Tell,
) -> None:
    """Train what lies between the maps of stride 8; leave the average of the weights."""
    maps, images = data
    average = deepcopy(vae)
    optimizer = torch.optim.Adam(
        [p for p in vae.parameters() if p.requires_grad], lr=how.lr, betas=how.betas
    )
    random = torch.Generator().manual_seed(0)
    order: list[int] = []
    explained: list[float] = []
    size = min(how.batch_size, len(maps))
    for step in range(how.steps):
        cosine = (1 + math.cos(math.pi * step / how.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = how.lr * min(1, (step + 1) / how.warmup) * max(0.02, cosine)
        if len(order) < size:
            order = torch.randperm(len(maps), generator=random).tolist()
        chosen = [order.pop() for _ in range(size)]
        # Without a gradient of its input, GroupNorm of the layout channels_last crashes going
        # backward (torch 2.13, CPU).
        x = maps[chosen].float().requires_grad_()
        image = to_unit(images[chosen].unsqueeze(1)).squeeze(2)
        latent = vae.config.geometry.latent_shape(x.shape[2], 8 * x.shape[3], 8 * x.shape[4])
        noise = torch.randn((len(chosen), *latent), generator=random)
        with torch.autocast("cpu", torch.bfloat16):
            y, posterior = _coarse(vae, x, image, noise, whole_network=whole_network)
        x = _resized(x.detach(), y.shape[1])
        error = (x - y).square().flatten(1).mean(1)
        energy = x.square().flatten(1).mean(1)
        # A tenth: what is not in the map anyway. The constant: what does not move.
        loss = torch.log((error + 0.1 * energy + TINY) / (energy + TINY)).mean()
        loss = loss + how.kl_weight * kl_to_unit_normal(posterior).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(vae.parameters(), how.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, vae, min(how.ema_decay, (1 + step) / (10 + step)))
        explained.append(float(_share(x, y.detach()).mean()))
        if (step + 1) % max(1, how.steps // 20) == 0:
            recent = explained[-max(1, how.steps // 20) :]
            tell(f"step {step + 1} of {how.steps}: {sum(recent) / len(recent):.4f} is explained")
    vae.load_state_dict(average.state_dict())
