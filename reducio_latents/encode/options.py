"""The settings of an encode run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from reducio_latents.conditioning.options import (
    ContentClipOptions,
    ContentLatentOptions,
    TextOptions,
)
from reducio_latents.core.choices import (
    Colours,
    Compile,
    Container,
    Deinterlace,
    DtypeOrAuto,
    Duplicates,
    ImageCodec,
    Label,
    ResizeMode,
    VideoBackendName,
    usable_cores,
)
from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.config import check_choices
from reducio_latents.core.geometry import Bucket, aspect_buckets, parse_size, require_fits
from reducio_latents.errors import ConfigError, GeometryError

log = logging.getLogger(__name__)

BUCKET_MULTIPLE = 32
"""Sides of buckets are divisible by this, the largest spatial stride in use."""
COUNTS: dict[str, str | None] = {
    "shard_rows": None,
    "batch_size": "auto",
    "workers": None,
    "gpus": "all",
}
"""Settings that are numbers from 1, and the word that each may be instead."""


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What `encode_corpus` makes and how. The first block decides bytes; the second only speed."""

    model: str = "reducio-ft4-fs32"
    """Name of the autoencoder.

    `load_autoencoder` lists them."""
    weights: str | None = None
    """The model's checkpoint: .ckpt, .safetensors, the folder that import-checkpoint made, or
    hf://OWNER/NAME[/FILE] on the Hugging Face Hub.

    Without, the published weights of Reducio-VAE are fetched, once."""
    trust_config: bool = False
    """Try a model of diffusers whose class is not known here, by its config and a trial.

    What is assumed is said, and kept in the store."""
    resolution: int | str = 256
    """Size of clips in px: a side, or height x width, as 480x832."""
    buckets: str | tuple[str, ...] = "square"
    """`square`: the resolution alone. `aspect`: sizes of its area, each video at the nearest shape.
    Or names: 16x480x832,1x480x832.

    With several numbers of frames a video is cut into the longest clips that it has room for; those
    of one frame also take pictures."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    columns: tuple[str, ...] = ("motion", "content_image", "caption", "frame_times", "scores")
    """What to store of each clip: motion, content_image, caption, frame_times, scores,
    content_latent, content_clip, content_clip_pooled, text, text:NAME, text:NAME_pooled."""
    container: Container = "zarr"
    """Files of the store: Zarr v3, or WebDataset tars."""
    image_codec: ImageCodec = "webp"
    """How content images are kept: webp, png and raw lose nothing, jpeg does."""
    resize: ResizeMode = "bicubic"
    """How frames are resized, always antialiased."""
    deinterlace: Deinterlace = "auto"
    """What makes whole pictures of frames that their stream calls interlaced; `none` leaves them.

    `auto`: what the store was begun with; bwdif in a new one."""
    colours: Colours = "auto"
    """How ordinary 8-bit video is made RGB: `exact`, to the nearest level, after resizing.

    `swscale`: before it, by FFmpeg's fast path, which is half a level too dark. `auto`: what the
    store was begun with; exact in a new one, where the video backend can."""
    duplicates: Duplicates = "refer"
    """Of files with equal bytes, `refer` encodes one, `encode` each."""
    shots: str | None = None
    """Keep each clip inside one shot: `detect`, `detect:transnetv2`, or a table of shots.

    `detect` is PySceneDetect with a test for dissolves and fades; transnetv2 is a network, and
    slower. The table's rows are those of a clip list: video, start and end. Videos whose shots are
    not known are cut as a whole; `info` counts them."""
    shard_rows: int = 512
    """Clips in a shard."""
    dtype: DtypeOrAuto = "auto"
    """Precision of the encoder. `auto`: the store's; at first bfloat16 on a GPU that has it.

    What that costs is measured and kept; where it is too much, and elsewhere, float32."""
    content_latent: ContentLatentOptions = field(default_factory=ContentLatentOptions)
    content_clip: ContentClipOptions = field(default_factory=ContentClipOptions)
    """Also of the column content_clip_pooled."""
    text: TextOptions = field(default_factory=TextOptions)
    scorer: str | None = None
    """An own function for the column scores, `module:function`: uint8 frames (T, H, W, 3) -> a dict
    of numbers."""
    zstd: tuple[str, ...] = ()
    """Columns whose rows are compressed. It pays for raw content images and 8-bit codes.

    Moments hardly shrink, and every row then costs its decompression when it is read."""
    tiling: Literal["auto", "none"] = "auto"
    """`auto`: tiles of 256 px for frames above 256 px, as published. `none`: whole frames."""
    path_column: str | None = None
    """Column of a corpus table that holds the paths, if its name does not say so."""
    caption_column: str | None = None
    """Column of a corpus table that holds the captions, if its name does not say so."""
    start_column: str | None = None
    """Column of a corpus table that holds where clips start, if its name does not say so.

    In seconds, as H:MM:SS.mmm, or in frames if its name says that; it may hold ends, too. `none`
    takes whole videos."""
    end_column: str | None = None
    """Column of a corpus table that holds where clips end, if its name does not say so."""
    root: str | None = None
    """Folder that a table's relative paths start from, if not its own."""
    label: Label = "none"
    """`folder`: the folder that a video is in is a field, `label`, and the caption without one."""

    batch_size: int | Literal["auto"] = "auto"
    """Clips that are encoded together. `auto`: the store's; at first 8, or what suits the GPU best.

    Part of the low bits, so a number must be kept for equal bytes."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ... `auto`: the first GPU if there is one, else the CPU.

    A rank of several gets the GPU of its number on the machine."""
    compile: Compile = "none"
    """What torch.compile is used on: `norms` takes seconds, `all` minutes for each size of clip.

    `all` is the whole encoder; `norms`, its normalisations with their activations. The compiler may
    take other kernels at the next start, so the last bits of a resumed run need not be the same."""
    engine: Literal["local", "ray"] = "local"
    """`local`: this process, `gpus` of them, or the ranks of torchrun or Slurm. `ray`: actors."""
    gpus: int | Literal["all"] = 1
    """Encoding processes, one for each GPU, here or in Ray's cluster. `all`: one for every GPU."""
    ray_address: str | None = None
    """Address of a Ray cluster, `auto` to find it. Without it Ray starts on this machine."""
    rank_timeout_s: float = 300.0
    """A rank that shows no sign of life for this long counts as dead."""
    check_every: int = 0
    """Decode every n-th clip while it is encoded and record its PSNR. 0: none."""
    min_psnr: float | None = None
    """Stop if the mean PSNR of the clips decoded so far falls below this, in dB."""
    workers: int = field(default_factory=usable_cores)
    """Decode processes, one for each core by default; those of all `gpus` together."""
    video_backend: VideoBackendName = "pyav"
    """Library that reads videos; the frames are the same. torchcodec decodes on an NVIDIA GPU where
    there is one, and pyav the most files."""
    clip_timeout_s: float = 120.0
    """A decoder that brings no clip for this long has hung."""
    retry_failed: bool = False
    """Try again what failed in an earlier run."""
    update_captions: bool = False
    """Take the captions that the corpus has changed, and make what is made of them anew."""
    max_failed: float = 0.1
    """Share of failed videos or clips above which the exit code is 3."""
    worker_memory_mb: ClassVar[int] = 4096
    """Resident memory of one decode process, at most, in MiB."""
    read_ahead_mb: ClassVar[int] = 1024
    """Decoded pixels that may wait for the encoder, in MiB."""

    def __post_init__(self) -> None:
        check_choices(self)
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
        self._require_sizes()
        if self.scorer is not None and "scores" not in self.columns:
            raise ConfigError("scorer is for the column scores; name it among the columns.")
        if not 0 <= self.max_failed <= 1:
            raise ConfigError(f"max_failed is a share from 0 to 1, got {self.max_failed}.")
        if not self.columns:
            raise ConfigError("columns is empty; name at least one, as motion,content_image.")

    def _require_sizes(self) -> None:
        parse_size(self.resolution)
        if not (named := self.named_buckets):
            return
        lengths = sorted({bucket.frames for bucket in named})
        for name, value in (("resolution", self.resolution), ("clip.frames", self.clip.frames)):
            default = EncodeOptions.resolution if name == "resolution" else ClipSpec.frames
            if value != default and not (name == "clip.frames" and value in lengths):
                raise ConfigError(f"{name} is {value}, but buckets name their sizes. Leave it out.")

    @property
    def named_buckets(self) -> tuple[Bucket, ...]:
        """The buckets that are named; none for `square` and `aspect`."""
        given = self.buckets.split(",") if isinstance(self.buckets, str) else self.buckets
        words = [name.strip() for name in given]
        if words in (["square"], ["aspect"]):
            return ()
        try:
            return tuple(map(Bucket.parse, words))
        except GeometryError as err:
            raise ConfigError(f"buckets: {err} Or write square, or aspect.") from err

    @property
    def clip_spec(self) -> ClipSpec:
        """`clip`, with the frames of the longest bucket."""
        frames = max((b.frames for b in self.named_buckets), default=self.clip.frames)
        return replace(self.clip, frames=frames)

    @property
    def takes_pictures(self) -> bool:
        """Whether clips of one frame may be encoded, as far as the model's name tells."""
        from reducio_latents.autoencoders import takes_pictures

        return "motion" not in self.columns or takes_pictures(self.model)

    def for_model(self) -> Self:
        """Return the options without buckets of one frame, where the model takes no pictures.

        Raise GeometryError for sizes that Reducio does not take; others are asked once loaded.
        """
        from reducio_latents.vae.config import SPATIAL_STRIDE, ReducioVAEConfig

        options, named = self, self.named_buckets
        left = tuple(bucket.name for bucket in named if bucket.frames > 1)
        if not self.takes_pictures and 0 < len(left) < len(named):
            log.warning(
                "%s takes no single frames: buckets of one frame are left out, pictures are "
                "skipped.",
                self.model,
            )
            options = replace(self, buckets=left)
        if "motion" in self.columns and self.model.startswith("reducio"):
            buckets = options.bucket_list(BUCKET_MULTIPLE)
            require_fits(buckets, ReducioVAEConfig().check_clip, SPATIAL_STRIDE, self.model)
        return options

    @property
    def deinterlaces(self) -> bool:
        return self.deinterlace != "none"

    @property
    def exact_colours(self) -> bool:
        """`colours`, as `ClipRequest` has it; raise ConfigError where the backend cannot."""
        from reducio_latents.video import GIVE_PLANES

        able = self.video_backend in GIVE_PLANES
        if self.colours == "exact" and not able:
            raise ConfigError(
                f"colours are exact, but {self.video_backend} gives RGB alone. Use --video-backend "
                "pyav, or write to a new store."
            )
        return able and self.colours != "swscale"

    @property
    def torch_device(self) -> str:
        """`device` with `auto` resolved; raise ConfigError for one that is not here."""
        from reducio_latents.core.devices import usable_device

        device = usable_device(self.device)
        return device.type if ":" not in self.device else str(device)

    @property
    def resizes_on_device(self) -> bool:
        """Whether the encoder's device resizes frames, to the same bits as decode processes.

        That takes work off them, and whole frames go to the device.
        """
        return self.torch_device.startswith("cuda")

    def bucket_list(self, multiple: int) -> tuple[Bucket, ...]:
        """Return the buckets of the run, sides divisible by `multiple` px."""
        if named := self.named_buckets:
            return named
        height, width = parse_size(self.resolution)
        if self.buckets in ("square", ("square",)):
            return (Bucket(self.clip.frames, height, width),)
        return aspect_buckets(self.clip.frames, height, width, multiple=multiple)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and for how long."""

    model: str = "reducio-random:128"
    """Name of the autoencoder."""
    weights: str | None = None
    """The model's checkpoint."""
    trust_config: bool = False
    """Try a model of diffusers whose class is not known here, by its config and a trial."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ..."""
    resolution: int | str = 256
    """Size of the clips in px: a side, or height x width, as 480x832."""
    batches: tuple[int, ...] = (8, 16, 32)
    """Batch sizes to try."""
    seconds: float = 5.0
    """About how long each measurement takes."""
    no_compile: bool = False
    """Leave out the variants with torch.compile."""
    psnr_loss: bool = False
    """Decode too: what fast paths cost in dB."""

    def __post_init__(self) -> None:
        if min(self.batches, default=0) < 1:
            raise ConfigError(f"batches must be numbers from 1, got {list(self.batches)}.")

    @property
    def encoding(self) -> EncodeOptions:
        """The same settings of an encode run, clip by clip."""
        return EncodeOptions(
            model=self.model,
            weights=self.weights,
            trust_config=self.trust_config,
            device=self.device,
            resolution=self.resolution,
            batch_size=1,
        )
