"""About how many bytes a clip will take, before a model is loaded or a frame decoded."""

from __future__ import annotations

from reducio_latents.conditioning.options import POOLED_SUFFIX, is_text_column, text_name
from reducio_latents.conditioning.presets import recipes_of
from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.options import EncodeOptions

TEMPORAL_STRIDES = {"reducio-ft2-fs32": 2}
IMAGE_BYTES_PER_PIXEL = {"webp": 0.65, "png": 0.9, "jpeg": 0.35, "raw": 3.0}
"""Measured on frames of natural video at 256 px."""
CAPTION_BYTES = 200
CAPTION_TOKENS = 45


def bytes_per_clip(bucket: Bucket, options: EncodeOptions) -> int:
    """Return an estimate of the bytes of one clip in the columns of the run.

    Motion is counted as Reducio's: two float16 moments of 16 channels at strides 4 (2 for ft2), 32
    and 32; codes as those of the models by default: SD-VAE, ViT-H/14, T5 v1.1 XXL, or the preset's.
    """
    stride = TEMPORAL_STRIDES.get(options.model, 4)
    steps = max(1, bucket.frames // stride)
    area = bucket.height * bucket.width
    code_bytes = 1 if options.content_clip.quantization == "int8" else 2
    sizes = {
        "motion": 2 * 2 * 16 * steps * (area // 32**2),
        "content_image": round(IMAGE_BYTES_PER_PIXEL[options.image_codec] * area),
        "caption": CAPTION_BYTES,
        "frame_times": 8 * bucket.frames,
        "scores": 4 * 8,
        "content_latent": 2 * 2 * 4 * (area // 64),
        "content_clip": code_bytes * 256 * 1280,
        "content_clip_pooled": 2 * 1024,
    }
    sizes |= {name: _text_bytes(name, options) for name in options.columns if is_text_column(name)}
    return sum(sizes.get(name, 0) for name in options.columns)


def _text_bytes(column: str, options: EncodeOptions) -> int:
    recipe = recipes_of(options.text.preset, text_name(column))[0]
    tokens = recipe.max_tokens if recipe.pads else CAPTION_TOKENS
    if recipe.pooled or column.endswith(POOLED_SUFFIX):
        tokens = 1
    return (1 if options.text.values == "int8" else 2) * tokens * recipe.width
