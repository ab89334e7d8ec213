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
from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.config import DUPLICATE_POLICIES, IMAGE_CODECS, RESIZE_MODES
from reducio_latents.core.geometry import Bucket, aspect_buckets, square_bucket
from reducio_latents.errors import ConfigError

BUCKET_RULES = ("square", "aspect")
DTYPES = ("float32", "bfloat16", "float16")
BUCKET_MULTIPLE = 32
"""Sides of buckets are divisible by this, the largest spatial stride in use."""
ENGINES = ("local", "ray")
COMPILES = ("none", "norms", "all")
MEASURES = ("auto", "none", "latents", "decoded")
RESIZE_ON = ("auto", "worker", "device")
COUNTS: dict[str, str | None] = {
    "shard_rows": None,
    "batch_size": "auto",
    "workers": None,
    "worker_memory_mb": None,
    "read_ahead_mb": None,
    "gpus": "all",
}
"""Settings that are numbers from 1, and the word that each may be instead."""
AUTO_BATCH = 64
"""Clips of 16x256x256 that `auto` begins with; of larger clips, fewer."""


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

    batch_size: int | Literal["auto"] = 8
    """Clips that are encoded together. Part of the low bits: keep it for equal bytes. `auto`: as
    many as fit in the GPU's memory."""
    device: str = "auto"
    """As torch names it; `auto`: the first GPU if there is one, else the CPU. A rank of several
    gets the GPU of its number on the machine."""
    compile: Literal["none", "norms", "all"] = "none"
    """What torch.compile is used on: `all`, the encoder whole, which takes minutes for each size of
    clip; `norms`, its normalisations with their activations, seconds; `none`. The compiler may take
    other kernels at the next start, so the last bits of a resumed run need not be the same."""
    engine: str = "local"
    """`local`: this process, or one rank of those that torchrun or Slurm started. `ray`: actors."""
    gpus: int | Literal["all"] = 1
    """Encoding processes: of `local` on this machine, one for each GPU; of `ray` in its cluster.
    `all`: as many as there are GPUs."""
    ray_address: str | None = None
    """Of a running Ray cluster, `auto` to find it; None starts Ray on this machine."""
    rank_timeout_s: float = 300.0
    """A rank that shows no sign of life for so long is taken for dead."""
    measure_error: str = "auto"
    """What to measure when a store is begun, of a precision or layout other than plain float32:
    `latents`, their relative error on one clip, kept in the store as `float32_error`; `decoded`,
    also what the video loses when it is decoded, `float32_psnr_loss_db`, which takes the decoder
    into memory for a moment; `none`. `auto`: `decoded` with check_every, else `latents`."""
    check_every: int = 0
    """Decode every n-th clip of a bucket while it is encoded and record its PSNR; 0: none."""
    min_psnr: float | None = None
    """Mean PSNR of the clips decoded so far, in dB, below which the run stops."""
    resize_on: str = "auto"
    """Who resizes frames: `worker`, the decode processes; `device`, the encoder's device, which
    takes work off them and hands whole frames over; the same bits. `auto`: the device if it is a
    GPU."""
    workers: int = field(default_factory=usable_cores)
    """Decode processes. Those of the ranks that `gpus` starts, together."""
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
            ("measure_error", self.measure_error, MEASURES),
            ("resize_on", self.resize_on, RESIZE_ON),
            ("duplicates", self.duplicates, DUPLICATE_POLICIES),
            ("dtype", self.dtype, DTYPES),
            ("tiling", self.tiling, ("auto", "none")),
            ("engine", self.engine, ENGINES),
            ("compile", self.compile, COMPILES),
        ]:
            if value not in choices:
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
        for name, word in COUNTS.items():
            value = getattr(self, name)
            if value != word and (isinstance(value, str) or value < 1):
                or_word = f" or {word!r}" if word else ""
                raise ConfigError(f"{name} must be >= 1{or_word}, got {value}.")
        if self.clip_timeout_s <= 0:
            raise ConfigError(f"clip_timeout_s must be > 0, got {self.clip_timeout_s}.")
        if self.rank_timeout_s <= 0:
            raise ConfigError(f"rank_timeout_s must be > 0, got {self.rank_timeout_s}.")
        if self.check_every < 0:
            raise ConfigError(f"check_every must be >= 0, got {self.check_every}.")
        if self.min_psnr is not None and self.check_every == 0:
            raise ConfigError("min_psnr needs clips that are decoded; give check_every too.")
        if self.check_every and "motion" not in self.columns:
            raise ConfigError("check_every decodes the column motion; name it among the columns.")
        if self.ray_address is not None and self.engine != "ray":
            raise ConfigError(
                "ray_address is for the engine ray; leave it out, or name that engine."
            )
        if not 0 <= self.max_failed <= 1:
            raise ConfigError(f"max_failed is a share from 0 to 1, got {self.max_failed}.")
        if not self.columns:
            raise ConfigError("columns is empty; name at least one, as motion,content_image.")

    @property
    def torch_device(self) -> str:
        """`device` with `auto` resolved; raise ConfigError for one that is not here."""
        from reducio_latents.core.devices import usable_device

        device = usable_device(self.device)
        return device.type if ":" not in self.device else str(device)

    @property
    def measures(self) -> str:
        """`measure_error` with `auto` resolved."""
        if self.measure_error != "auto":
            return self.measure_error
        return "decoded" if self.check_every else "latents"

    @property
    def resizes_on_device(self) -> bool:
        """`resize_on` with `auto` resolved."""
        if self.resize_on != "auto":
            return self.resize_on == "device"
        return self.torch_device.startswith("cuda")

    @property
    def clips_per_batch(self) -> int:
        """How many rows of a shard are handed to the encoders at once."""
        if self.batch_size != "auto":
            return self.batch_size
        pixels = self.clip.frames * self.resolution**2
        return max(1, min(AUTO_BATCH, AUTO_BATCH * 16 * 256**2 // pixels, self.shard_rows))

    def bucket_list(self, multiple: int) -> tuple[Bucket, ...]:
        """Return the buckets of the run, sides divisible by `multiple` px."""
        if self.buckets == "square":
            return (square_bucket(self.clip.frames, self.resolution),)
        return aspect_buckets(self.clip.frames, self.resolution, multiple=multiple)
