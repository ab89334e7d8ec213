"""The settings of an encode run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from reducio_latents.conditioning.options import (
    ContentClipOptions,
    ContentLatentOptions,
    TextOptions,
)
from reducio_latents.config import DUPLICATE_POLICIES, IMAGE_CODECS, RESIZE_MODES, ClipSpec
from reducio_latents.errors import ConfigError
from reducio_latents.geometry import Bucket, aspect_buckets, square_bucket

BUCKET_RULES = ("square", "aspect")
DTYPES = ("float32", "bfloat16", "float16")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What `encode_corpus` makes and how. The first block decides bytes; the second only speed."""

    model: str = "reducio-ft4-fs32"
    """Name of the autoencoder; `load_autoencoder` lists them."""
    weights: str | None = None
    """Checkpoint of the model: .ckpt, .safetensors, or the folder that import-checkpoint made."""
    resolution: int = 256
    """Side of the square bucket, or of the square whose area the aspect buckets share, in px."""
    buckets: str = "square"
    """`square`: one size. `aspect`: each video goes to the size nearest to its aspect ratio."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    columns: tuple[str, ...] = ("motion", "content_image", "caption", "frame_times")
    container: Literal["zarr", "webdataset"] = "zarr"
    """`zarr` or `webdataset`."""
    image_codec: str = "webp"
    """How content images are kept: webp, png and raw are lossless, jpeg is not."""
    resize: str = "bicubic"
    duplicates: Literal["refer", "encode"] = "refer"
    """`refer`: of files with equal bytes one is encoded. `encode`: each is."""
    shard_rows: int = 512
    dtype: str = "float32"
    """Precision of the encoder."""
    content_latent: ContentLatentOptions = field(default_factory=ContentLatentOptions)
    content_clip: ContentClipOptions = field(default_factory=ContentClipOptions)
    """Also of the column content_clip_pooled."""
    text: TextOptions = field(default_factory=TextOptions)
    zstd: tuple[str, ...] = ()
    """Columns whose rows are compressed. Raw content images and 8-bit codes shrink; moments hardly
    do, and every row then costs its decompression when it is read."""
    tiling: str = "auto"
    """`auto`: tiles of 256 px for frames above 256 px, as published. `none`: whole frames."""
    path_column: str | None = None
    caption_column: str | None = None
    root: str | None = None
    """Folder that a table's relative paths start from, if not its own."""

    batch_size: int = 8
    """Clips that are encoded together. Part of the low bits: keep it for equal bytes."""
    device: str = "auto"
    """`auto`: the first GPU if there is one, else the CPU."""
    compile: bool = False
    workers: int = field(default_factory=usable_cores)
    """Decode processes."""
    video_backend: str = "pyav"
    clip_timeout_s: float = 120.0
    """A decoder that brings no clip for so long has hung."""
    worker_memory_mb: int = 4096
    """Resident memory of one decode process, at most, in MiB."""
    read_ahead_mb: int = 1024
    """Decoded pixels that may wait for the encoder, in MiB."""
    retry_failed: bool = False
    """Take up again what failed in an earlier run."""
    max_failed: float = 0.1
    """Share of failed clips or videos above which a finished run counts as not well done."""

    def __post_init__(self) -> None:
        for name, value, choices in [
            ("buckets", self.buckets, BUCKET_RULES),
            ("container", self.container, ("zarr", "webdataset")),
            ("image_codec", self.image_codec, IMAGE_CODECS),
            ("resize", self.resize, RESIZE_MODES),
            ("duplicates", self.duplicates, DUPLICATE_POLICIES),
            ("dtype", self.dtype, DTYPES),
            ("tiling", self.tiling, ("auto", "none")),
        ]:
            if value not in choices:
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
        for name in ("shard_rows", "batch_size", "workers", "worker_memory_mb", "read_ahead_mb"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}.")
        if self.clip_timeout_s <= 0:
            raise ConfigError(f"clip_timeout_s must be > 0, got {self.clip_timeout_s}.")
        if not 0 <= self.max_failed <= 1:
            raise ConfigError(f"max_failed is a share from 0 to 1, got {self.max_failed}.")
        if not self.columns:
            raise ConfigError("columns is empty; name at least one, as motion,content_image.")

    @property
    def torch_device(self) -> str:
        """`device` with `auto` resolved."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def bucket_list(self, multiple: int) -> tuple[Bucket, ...]:
        """Return the buckets of the run, sides divisible by `multiple` px."""
        if self.buckets == "square":
            return (square_bucket(self.clip.frames, self.resolution),)
        return aspect_buckets(self.clip.frames, self.resolution, multiple=multiple)
