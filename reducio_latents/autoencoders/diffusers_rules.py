"""What each autoencoder of diffusers takes and gives, as a table: frames, strides, final latents.

The library itself pads, drops or repeats frames that do not fit, without a word. What final latents
are is written in its pipelines, where they prepare and decode latents. A class that is not in the
table is tried on small clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reducio_latents.core.gaussian import check_final_rule
from reducio_latents.core.geometry import LatentGeometry
from reducio_latents.core.libraries import first_line
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError, GeometryError, WeightsError
from reducio_latents.vae.tiling import Tiling

ClipKind = Literal["each", "each_as_clip", "causal", "whole"]
"""`each`: pictures, so a clip's frames one by one; `each_as_clip`: the same, as clips of one frame;
`causal`: sk+1 of them; `whole`: sk."""
Final = Literal["scaled", "raw", "batch_norm", "repeated"]
"""`scaled`: by what the config says; `raw`: as encoded; `batch_norm`: by the model's batch norm;
`repeated`: scaled, all channels twice."""
Settings = Callable[[Any, Tensor], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ModelRules:
    """What one class of diffusers takes and gives. The functions are of a model."""

    strides: Callable[[Any], tuple[int, int]]
    """Frames of a latent step, and pixels of a latent cell."""
    channels: str | int = "latent_channels"
    """How many of latents, or the key of its config that says it."""
    frames: ClipKind = "causal"
    chunks: Callable[[Any], tuple[int, int, int, int] | None] = lambda _: None
    """See `LatentGeometry.chunks`."""
    sides: Callable[[Any], tuple[tuple[int, int], ...]] | None = None
    """Of height and width, the least and the step to the next, where cells are not the rule."""
    final: Final = "scaled"
    certain: bool = False
    """Whether its log-variance means nothing."""
    patch: Callable[[Any], int] = lambda _: 1
    """Cells a side that final latents have in one, as channels."""
    pixels: tuple[Sequence[float], Sequence[float]] | None = None
    """(a, b), of one value or three: it was trained on a * pixel + b, pixels in [-1, 1]."""
    opaque: bool = False
    """Whether a fourth colour channel, where it has one, is 1 where all is to be seen."""
    lead: Callable[[Any], int] = lambda _: 0
    """How often the first frame is repeated before a clip is encoded."""
    alone: bool = False
    """Whether it takes one clip at a time."""
    decodes_clips: bool = False
    """Whether it decodes the frames of a clip together, though it encodes each."""
    settings: Settings = lambda _, __: {}
    """What else `decode` is told, of the model and the samples."""
    frames_first: bool = False
    """Whether `decode` gives (B, T, 3, H, W)."""
    tiles: bool = True
    """Whether the library can cut its frames, as asked."""
    own_tiling: Tiling | None = None
    """How frames are cut as published."""
    always_tiled: bool = False
    """Whether it works on pieces of its own size only."""
    decoder: str = "decoder"
    counts_both: bool = False
    """Whether it counts the layers of both halves before each call, so that none may be None."""

    def geometry(self, model: Any) -> LatentGeometry:
        temporal, spatial = self.strides(model)
        patch, chunks = self.patch(model), self.chunks(model)
        return LatentGeometry(
            channels=self.raw_channels(model) * patch**2,
            temporal_stride=temporal,
            spatial_stride=spatial * patch,
            causal=self.frames == "causal" and (chunks is None or chunks[0] == 1),
            chunks=chunks,
        )

    def raw_channels(self, model: Any) -> int:
        channels = self.channels
        return channels if isinstance(channels, int) else int(_get(model, channels))

    def check_sides(self, model: Any, height: int, width: int) -> None:
        """Raise GeometryError for sides that it does not cover whole."""
        for name, size, (least, step) in zip(
            ("height", "width"),
            (height, width),
            self.sides(model) if self.sides else (),
            strict=False,
        ):
            more = max(0, size - least) // step if step > 0 else 0
            if size != least + more * step:
                near = f" or {least + (more + 1) * step}" if step > 0 else ""
                raise GeometryError(
                    f"{name} is {size}, but {type(model).__name__} takes {least + more * step}"
                    f"{near}. Crop or resize the clip."
                )


def _get(model: Any, name: str) -> Any:
    """Return a value of the config, or else of the model itself; of names with |, the first."""
    for key in name.split("|"):
        value = model.config.get(key)
        value = vars(model).get(key) if value is None else value
        if value is not None:
            return value
    raise WeightsError(f"the config of {type(model).__name__} has no {name}.")


def _image(levels: str) -> Callable[[Any], tuple[int, int]]:
    """Halved between the levels that a key of the config lists."""
    return lambda model: (1, 2 ** (len(_get(model, levels)) - 1))


def _declared(model: Any) -> tuple[int, int]:
    return int(_get(model, "temporal_compression_ratio")), int(
        _get(model, "spatial_compression_ratio")
    )


def _wan(model: Any) -> tuple[int, int]:
    config = model.config
    patch = config.get("patch_size") or 1
    return 2 ** sum(config.temperal_downsample), 2 ** (len(config.dim_mult) - 1) * patch


def _levels_in(levels: str, temporal: str) -> Callable[[Any], tuple[int, int]]:
    return lambda model: (int(_get(model, temporal)), 2 ** (len(_get(model, levels)) - 1))


def ltx_strides(model: Any) -> tuple[int, int]:
    """What is written of the strides is wrong, or missing, where blocks halve one of the two."""
    config = model.config
    halved = config.spatio_temporal_scaling
    kinds = config.downsample_type
    halved = [halved] * len(kinds) if isinstance(halved, bool) else halved
    used = [kind for kind, on in zip(kinds, halved, strict=False) if on]
    return (
        config.patch_size_t * 2 ** sum(kind != "spatial" for kind in used),
        config.patch_size * 2 ** sum(kind != "temporal" for kind in used),
    )


def _at_time_zero(model: Any, z: Tensor) -> dict[str, Any]:
    """Tell a decoder that also removes noise that there is none."""
    asked = model.config.get("timestep_conditioning", False)
    return {"temb": z.new_zeros(len(z))} if asked else {}


def _cubes(model: Any) -> tuple[int, int, int, int]:
    length, step = model.kernel[0], model.stride[0]
    temporal = int(model.config.temporal_compression_ratio)
    return length, step, length // temporal, step // temporal


def _dropped_tokens(model: Any) -> tuple[int, int, int, int]:
    """The last tokens of a clip are dropped, so that it ends inside of a chunk."""
    length, steps = model.config.clip_length, model.tokens_chunk_size
    return length + model.frame_overlap, length, steps + model.token_overlap, steps


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of pixels in [0, 1]."""
MINIMAX_PIXELS = (
    [0.5 / std for std in IMAGENET[1]],
    [(0.5 - mean) / std for mean, std in zip(*IMAGENET, strict=True)],
)
KANDINSKY_PIXELS = 127.5 / 128

AUTOENCODERS: dict[str, ModelRules] = {
    # Pictures.
    "AutoencoderKL": ModelRules(strides=_image("block_out_channels"), frames="each"),
    "AsymmetricAutoencoderKL": ModelRules(strides=_image("down_block_out_channels"), frames="each"),
    "AutoencoderTiny": ModelRules(strides=_image("encoder_block_out_channels"), frames="each"),
    "AutoencoderDC": ModelRules(strides=_image("encoder_block_out_channels"), frames="each"),
    "AutoencoderKLFlux2": ModelRules(
        strides=_image("block_out_channels"),
        frames="each",
        final="batch_norm",
        patch=lambda model: math.isqrt(math.prod(model.config.patch_size)),
    ),
    # The library's tiles of it take pictures for video.
    "AutoencoderKLHunyuanImage": ModelRules(
        strides=lambda model: (1, model.config.spatial_compression_ratio),
        frames="each",
        tiles=False,
    ),
    # Its pipeline packs two latent steps into one, and of a picture the first one twice.
    "AutoencoderKLHunyuanImageRefiner": ModelRules(
        strides=lambda model: (1, model.config.spatial_compression_ratio),
        frames="each_as_clip",
        final="repeated",
        tiles=False,  # the library steps from tile to tile in cells where it should in pixels
    ),
    "AutoencoderKLQwenImage21": ModelRules(
        strides=lambda model: (1, _wan(model)[1]),
        channels="z_dim",
        frames="each_as_clip",
        opaque=True,
    ),
    "AutoencoderKLKVAE": ModelRules(
        strides=_image("ch_mult"), channels="z_channels", frames="each"
    ),
    # Each picture has the noise of seed 0, whatever is decoded beside it.
    "ConsistencyDecoderVAE": ModelRules(
        strides=_image("encoder_block_out_channels"),
        frames="each",
        settings=lambda _, z: {"generator": [torch.Generator().manual_seed(0) for _ in z]},
        decoder="decoder_unet",
    ),
    # As Kandinsky's pipelines use it: neither scaled nor put back to the codebook.
    "VQModel": ModelRules(
        strides=_image("block_out_channels"),
        channels="vq_embed_dim|latent_channels",
        frames="each",
        final="raw",
        settings=lambda _, __: {"force_not_quantize": True},
    ),
    # It resizes to its encoder's size by itself and scales latents in `encode`.
    "AutoencoderRAE": ModelRules(
        strides=lambda model: (1, model.decoder_patch_size),
        channels="encoder_hidden_size",
        frames="each",
        sides=lambda model: ((model.decoder_image_size, 0),) * 2,
        final="raw",
        pixels=((0.5,), (0.5,)),
    ),
    # Video.
    "AutoencoderKLTemporalDecoder": ModelRules(
        strides=_image("block_out_channels"),
        frames="each",
        decodes_clips=True,
        settings=lambda _, z: {"num_frames": len(z)},
    ),
    "AutoencoderKLWan": ModelRules(strides=_wan, channels="z_dim"),
    "AutoencoderKLQwenImage": ModelRules(
        strides=_wan, channels="z_dim", opaque=True, counts_both=True
    ),
    "AutoencoderKLLTXVideo": ModelRules(strides=ltx_strides, settings=_at_time_zero),
    # Its decoder mirrors cells at the edges, so there must be two.
    "AutoencoderKLLTX2Video": ModelRules(
        strides=ltx_strides,
        sides=lambda model: ((2 * ltx_strides(model)[1], ltx_strides(model)[1]),) * 2,
        settings=_at_time_zero,
    ),
    # It works through 8 frames at a time: 5 frames give 2 steps, and 2 steps decode to 8 frames.
    "AutoencoderKLCogVideoX": ModelRules(
        strides=_levels_in("block_out_channels", "temporal_compression_ratio"),
        chunks=lambda model: (1, 8, 1, 8 // int(model.config.temporal_compression_ratio)),
    ),
    "AutoencoderKLHunyuanVideo": ModelRules(strides=_declared),
    "AutoencoderKLHunyuanVideo15": ModelRules(strides=_declared, alone=True),
    "AutoencoderKLMochi": ModelRules(strides=_declared),
    "AutoencoderKLCosmos": ModelRules(strides=_declared, tiles=False),
    "AutoencoderKLMagvit": ModelRules(strides=_declared),
    "AutoencoderKLAllegro": ModelRules(
        strides=_declared,
        frames="whole",
        chunks=_cubes,
        sides=lambda model: tuple(zip(model.kernel[1:], model.stride[1:], strict=True)),
        alone=True,
        frames_first=True,
        tiles=False,
        always_tiled=True,
    ),
    "AutoencoderKLMiniMaxH3": ModelRules(
        strides=_declared,
        chunks=_dropped_tokens,
        pixels=MINIMAX_PIXELS,
        own_tiling=Tiling(tile_px=192, overlap=1 / 3),
    ),
    # Its log-variance is 0 everywhere, as a place holder.
    "AutoencoderKLKVAEVideo": ModelRules(
        strides=_levels_in("ch_mult", "temporal_compress_times"),
        channels="z_channels",
        certain=True,
        tiles=False,
    ),
    "Kandinsky6SRVAE": ModelRules(
        strides=_declared, pixels=((KANDINSKY_PIXELS,), (KANDINSKY_PIXELS - 1,)), tiles=False
    ),
    "AutoencoderVidTok": ModelRules(
        strides=lambda model: (
            model.temporal_compression_ratio,
            2 ** len(model.encoder.spatial_ds),
        ),
        channels="z_channels",
        frames="causal",
        chunks=lambda model: (
            None
            if model.is_causal
            else (
                model.num_sample_frames_batch_size,
                model.num_sample_frames_batch_size,
                model.num_latent_frames_batch_size,
                model.num_latent_frames_batch_size,
            )
        ),
        lead=lambda model: model.temporal_compression_ratio - 1 if model.is_causal else 0,
        final="raw",
    ),
}

_SOUND = "is for sound, not for pictures or video"
REFUSED: dict[str, str] = {
    "LTX2VideoDiffusionDecoderModel": (
        "cannot encode: it is a decoder for latents of AutoencoderKLLTX2Video"
    ),
    "AceStepAudioTokenizer": _SOUND,
    "AutoencoderKLKVAEAudio": _SOUND,
    "AutoencoderKLLTX2Audio": _SOUND,
    "AutoencoderKLMiniMaxH3Audio": _SOUND,
    "AutoencoderOobleck": _SOUND,
    "AutoencoderSAME": _SOUND,
    "Cosmos3AVAEAudioTokenizer": _SOUND,
    "LongCatAudioDiTVae": _SOUND,
    "MMAudioVAE": _SOUND,
    "MMAudioVocoder": _SOUND,
    "MiniMaxMusic3Vocoder": _SOUND,
    "RFD4ProteinaAutoencoder": "is for proteins, not for pictures or video",
}
"""Classes that are autoencoders, or parts of one, by name, and why they are of no use here."""


def colour_channels(model: Any) -> int:
    return int(model.config.get("in_channels") or model.config.get("input_channels") or 3)


def unfit(model: Any, rules: ModelRules) -> str:
    """Return why a model cannot be used with its config, or nothing."""
    colours = colour_channels(model)
    if colours in (1, 2) or (colours == 4 and not rules.opaque):
        return f"takes {colours} colour channels, not 3"
    if model.config.get("lookup_from_codebook", False):
        return "gives numbers of a codebook, not latents"
    if model.config.get("reshape_to_2d", True) is False:
        return "gives a list of tokens, not a grid of latents"
    return ""


def moments_of(output: Any) -> Posterior:
    """Return what `encode` gave, float32; a point where it gave no distribution."""
    if isinstance(output, tuple):
        return Posterior.certain(output[0].float())
    for name in ("latent", "latents"):
        if hasattr(output, name):
            return Posterior.certain(getattr(output, name).float())
    distribution = output.latent_dist
    if hasattr(distribution, "mean"):
        return Posterior(distribution.mean.float(), distribution.logvar.float())
    return Posterior.certain(distribution.mode().float())


def decoded_pixels(output: Any) -> Tensor:
    """Return what `decode` gave."""
    pixels: Tensor = output if isinstance(output, Tensor) else output.sample
    return pixels


def final_rule_of(model: Any, rules: ModelRules) -> dict[str, Any]:
    """Return the rule by which the model's own pipelines scale its latents."""
    scale: Any = 1.0
    shift: Any = 0.0
    if rules.final == "batch_norm":
        deviation = (model.bn.running_var.double() + model.config.batch_norm_eps).sqrt()
        scale, shift = (1 / deviation).tolist(), model.bn.running_mean.tolist()
    elif rules.final != "raw":
        scale, shift = _scale_and_shift(model, rules.raw_channels(model))
    name = "repeat_channels" if rules.final == "repeated" else "scale_shift"
    rule = {"rule": name, "scale": scale, "shift": shift}
    check_final_rule(rule)
    return rule


def _scale_and_shift(model: Any, channels: int) -> tuple[Any, Any]:
    config = model.config
    scale = float(config.get("scaling_factor") or 1.0)
    shift: Any = float(config.get("shift_factor") or 0.0)
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if means is None and "latents_mean" in dict(model.named_buffers()):
        means, stds = model.latents_mean.tolist(), model.latents_std.tolist()
    if means is None or stds is None:
        return scale, shift
    deviations = torch.tensor(_per_channel(stds, channels), dtype=torch.float64)
    return (scale / deviations).tolist(), _per_channel(means, channels)


def _per_channel(values: Any, channels: int) -> list[Any]:
    """Return one value a channel, or, of a longer list, one a channel and latent step."""
    flat = [float(value) for value in values]
    steps, rest = divmod(len(flat), channels)
    if rest or not steps:
        raise WeightsError(f"the config has {len(flat)} latent means for {channels} channels.")
    if steps == 1:
        return flat
    return [flat[start : start + steps] for start in range(0, len(flat), steps)]


def latent_steps(rule: Mapping[str, Any]) -> int | None:
    """Return for how many latent steps a rule has values, or None for any."""
    shift = rule["shift"]
    by_step = isinstance(shift, list) and shift and isinstance(shift[0], list)
    return len(shift[0]) if by_step else None


TRIED_SIDES = (64, 128, 256)
"""Of the pictures that it is tried on, until one is taken."""
TRIED_FRAMES = 16


@torch.inference_mode()
def assumed_rules(model: Any) -> tuple[ModelRules, dict[str, Any]]:
    """Return the rules that a model keeps to on small clips, and the same as JSON.

    Final latents are taken to be (z - shift) * scale, by what its config says. Raises ConfigError
    for a model whose latents and frames do not come out in a plain ratio.
    """
    model.eval()
    problem = "the shapes do not agree"
    for side in TRIED_SIDES:
        for trial in (_video, _pictures):
            try:
                found = trial(model, side)
            # Whatever foreign code says of an input of this shape, the next one is tried.
            except Exception as err:
                problem = first_line(err)
                continue
            if found is not None:
                return found, {
                    "frames": found.frames,
                    "strides": list(found.strides(model)),
                    "channels": found.channels,
                }
    raise ConfigError(
        f"{type(model).__name__} does not encode and decode small clips in plain ratios "
        f"({problem}). It cannot be used by its config alone."
    )


def in_words(assumed: Mapping[str, Any]) -> str:
    step, side = assumed["strides"]
    frames = {
        "each": "pictures, so a clip's frames one by one",
        "causal": f"clips of {step}k+1 frames",
        "whole": f"clips of {step}k frames",
    }[assumed["frames"]]
    return (
        f"{frames}, {side} px a latent cell, {assumed['channels']} latent channels, and final "
        "latents scaled and shifted as its config says"
    )


def _video(model: Any, side: int) -> ModelRules | None:
    for frames in (TRIED_FRAMES + 1, TRIED_FRAMES):
        z = moments_of(model.encode(torch.zeros(1, 3, frames, side, side))).mean
        steps = z.shape[2] - frames % 2
        # Libraries drop or pad frames that do not fit: only what comes back whole did fit.
        comes_back = decoded_pixels(model.decode(z)).shape == (1, 3, frames, side, side)
        if comes_back and steps > 0 and not TRIED_FRAMES % steps and not side % z.shape[3]:
            return _rules("causal" if frames % 2 else "whole", TRIED_FRAMES // steps, side, z)
    return None


def _pictures(model: Any, side: int) -> ModelRules | None:
    z = moments_of(model.encode(torch.zeros(1, 3, side, side))).mean
    comes_back = decoded_pixels(model.decode(z)).shape == (1, 3, side, side)
    return _rules("each", 1, side, z) if comes_back and not side % z.shape[2] else None


def _rules(frames: ClipKind, step: int, side: int, z: Tensor) -> ModelRules:
    strides = step, side // z.shape[-2]
    return ModelRules(
        strides=lambda _: strides, channels=z.shape[1], frames=frames, counts_both=True
    )
