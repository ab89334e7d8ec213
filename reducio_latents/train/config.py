"""Everything that a training run is told, as strict YAML: one small dataclass a section."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from reducio_latents.core.choices import ResizeMode, VideoBackendName
from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.config import check_choices
from reducio_latents.errors import ConfigError
from reducio_latents.vae import ReducioVAEConfig, Tiling
from reducio_latents.vae.config import FRAMES, SPATIAL_STRIDE


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Multiplier of a learning rate: `start` until `from_step`, then on to `end` at `to_step`."""

    start: float = 1.0
    end: float = 1.0
    from_step: int = 0
    to_step: int = 0
    """Equal to `from_step`: a sudden change there."""
    shape: Literal["linear", "cosine"] = "linear"
    """How it goes from start to end."""
    warmup_steps: int = 0
    """The first steps rise linearly from 0, on top of the rest."""

    def __post_init__(self) -> None:
        if min(self.start, self.end) < 0:
            raise ConfigError(
                f"a schedule multiplies by start={self.start} and end={self.end}; use 0 or more."
            )
        if min(self.from_step, self.warmup_steps) < 0 or self.to_step < self.from_step:
            raise ConfigError(
                f"a schedule changes from step {self.from_step} to step {self.to_step} after "
                f"{self.warmup_steps} of warm-up; use 0 <= from_step <= to_step."
            )

    def multiplier(self, step: int) -> float:
        """Return what the base rate is multiplied by at `step`, counted from 0.

        >>> Schedule(end=0.01, to_step=1_000_000).multiplier(500_000)
        0.505
        """
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * (self.start + (self.end - self.start) * self._share(step))

    def _share(self, step: int) -> float:
        """How far from start to end, 0 to 1."""
        if step >= self.to_step:
            return 1.0
        if step <= self.from_step:
            return 0.0
        share = (step - self.from_step) / (self.to_step - self.from_step)
        return share if self.shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * share)


FREEZABLE = {
    "video_encoder": ("encoder_3d", "quant_conv"),
    "content_encoder": ("encoder_2d",),
    "decoder": ("post_quant_conv", "decoder"),
}
"""What `train.freeze` may name, and the modules that it means."""


def require(holds: bool, message: str) -> None:
    """Raise ConfigError(message) unless `holds`."""
    if not holds:
        raise ConfigError(message)


RANGES: dict[str, Callable[[float], bool]] = {
    ">= 0": lambda value: value >= 0,
    ">= 1": lambda value: value >= 1,
    "> 0": lambda value: value > 0,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "between 0 and 1": lambda value: 0 < value < 1,
    "in [0, 2**32)": lambda value: 0 <= value < 2**32,
}
"""How a range is called -> whether a number lies in it."""


def require_ranges(section: str, settings: object, **ranges: str) -> None:
    """Raise ConfigError, naming it, for a setting outside its range; None stands for `off`."""
    for name, words in ranges.items():
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else (value,)
        found = list(value) if isinstance(value, tuple) else value
        off = "; null turns it off" if getattr(type(settings), name) is None else ""
        require(
            value is None or all(map(RANGES[words], numbers)),
            f"{section}.{name} must be {words}, got {found}{off}.",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which clips are trained on, and what is done to them."""

    corpus: str | None = None
    """What `encode-corpus` takes: a folder, a glob, a table, tars. The presets leave it open."""
    validation_corpus: str | None = None
    """Another corpus to validate on. None: `validation_share` of the first one."""
    validation_share: float = 0.05
    """Share of the videos that is set apart, chosen by a hash of their names; whole videos."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    size_px: int = 256
    """Height and width; with `aspect`, the side of a square of the buckets' area."""
    crop: Literal["random_resized", "square", "aspect"] = "random_resized"
    """random_resized: a random part of the frame. square: the frame's centre. aspect: resized to
    the bucket nearest in aspect ratio. Validation never crops at random."""
    crop_area: tuple[float, float] = (0.5, 1.0)
    """random_resized: smallest and largest share of the largest square in the frame."""
    flip: bool = True
    """Mirror every second clip left to right."""
    resize: ResizeMode = "bicubic"
    deinterlace: Literal["bwdif", "none"] = "bwdif"
    """What makes whole pictures of frames that their stream calls interlaced."""
    video_backend: VideoBackendName = "pyav"
    workers: int = 4
    """Decoding processes of each rank."""
    ahead: int = 4
    """Batches that are decoded before they are asked for."""
    timeout_s: float = 120.0
    """A decoder that is silent for this long is replaced, and its clip counted as failed."""
    max_failed: float = 0.1
    """Stop when more than this share of the split's clips could not be read."""

    def __post_init__(self) -> None:
        require(
            self.clip.frames == FRAMES, f"data.clip.frames must be {FRAMES}, what the VAE takes."
        )
        require(
            self.size_px >= SPATIAL_STRIDE and self.size_px % SPATIAL_STRIDE == 0,
            f"data.size_px is {self.size_px}; use a multiple of {SPATIAL_STRIDE}, such as "
            f"{max(SPATIAL_STRIDE, self.size_px // SPATIAL_STRIDE * SPATIAL_STRIDE)}.",
        )
        low, high = self.crop_area
        require(
            0 < low <= high <= 1,
            f"data.crop_area is [{low}, {high}]; give two shares, 0 < smallest <= largest <= 1.",
        )
        check_choices(self, "data.")
        require_ranges("data", self, validation_share="in [0, 1)", max_failed="in [0, 1]")
        require_ranges("data", self, workers=">= 1", ahead=">= 1", timeout_s="> 0")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The terms that do not need a discriminator."""

    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual: Literal["vgg", "none"] = "vgg"
    """LPIPS with VGG16, over the frames; `none` needs no other weights."""
    perceptual_weight: float = 0.1
    kl_weight: float = 1e-6
    """Of the KL divergence summed over a clip."""
    penalty_weight: float = 1.0
    logvar: float = 0.0
    """Log-variance of the pixels' noise; it is not trained."""

    def __post_init__(self) -> None:
        weights = ("perceptual_weight", "kl_weight", "penalty_weight")
        require_ranges("loss", self, **dict.fromkeys(weights, ">= 0"))


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """The discriminators. With none of them the adversarial term is off."""

    discriminators: tuple[Literal["3d", "2d"], ...] = ("3d",)
    weight: float = 0.05
    adaptive: bool = True
    """Multiply the weight by the ratio of gradients at the decoder's last layer."""
    start_step: int = 10_001
    """The first step in which the discriminators are trained and the generator listens to them;
    steps count from 0, as in schedules."""
    sync: bool = True
    """Batch statistics and gradient norms are those of all ranks, so a run does not depend on
    their number. False: each rank has its own, as the published models were trained."""
    lr_factor: float = 0.1
    """The discriminators' rate as a share of `train.lr`."""
    schedule: Schedule = field(
        default_factory=lambda: Schedule(start=0.1, end=1.0, from_step=5_000, to_step=6_000)
    )

    def __post_init__(self) -> None:
        require(
            len(set(self.discriminators)) == len(self.discriminators),
            f"adversarial.discriminators names one twice: {', '.join(self.discriminators)}.",
        )
        require_ranges("adversarial", self, start_step=">= 0")
        require(
            self.weight >= 0 and self.lr_factor > 0,
            "adversarial.weight must be >= 0 and adversarial.lr_factor > 0, got "
            f"{self.weight} and {self.lr_factor}.",
        )


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig:
    """How the weights are changed. A step is one update of the VAE."""

    steps: int = 1_000_000
    batch_size: int = 4
    """Clips that one rank sees in one forward pass."""
    accumulate: int = 1
    """Forward passes a step; a step sees batch_size * accumulate * ranks clips."""
    lr: float = 2e-5
    betas: tuple[float, float] = (0.5, 0.9)
    """Of Adam, for VAE and discriminators."""
    eps: float = 1e-8
    """Of Adam. Weights whose gradient is mostly rounding noise move less with a larger one."""
    schedule: Schedule = field(default_factory=lambda: Schedule(end=0.01, to_step=1_000_000))
    max_grad_norm: float | None = None
    """Clip the VAE's gradient to this norm."""
    ema_decay: float | None = None
    """Keep a running average of the weights, and validate with it. The first steps average over
    fewer: the decay is at most (1 + step) / (10 + step)."""
    freeze: tuple[Literal["video_encoder", "content_encoder", "decoder"], ...] = ()
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the networks; weights and losses are float32. fp16 scales the loss. A GPU's convolutions
    in fp32 still round what they multiply to 10 bits (TF32), as elsewhere in torch."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """torch.compile each residual block."""
    channels_last: bool = False
    seed: int = 0
    deterministic: bool = False
    """Ask torch for kernels that give the same bits again, where a GPU has others."""

    def __post_init__(self) -> None:
        require_ranges("train", self, steps=">= 1", batch_size=">= 1", accumulate=">= 1")
        require_ranges("train", self, lr="> 0", eps="> 0", betas="in [0, 1)", max_grad_norm="> 0")
        require_ranges("train", self, ema_decay="between 0 and 1", seed="in [0, 2**32)")
        require(
            len(set(self.freeze)) < len(FREEZABLE),
            "train.freeze names all three networks, so there is nothing to train. Leave one out.",
        )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """When and on what the model is measured."""

    every_steps: int = 5_000
    clips: int = 64
    """At most so many, one of each video before a second one of any."""
    batch_size: int = 1
    tiling: Tiling | None = None
    """For frames higher than a whole tile; null: frames are seen whole."""

    def __post_init__(self) -> None:
        require_ranges("validation", self, every_steps=">= 1", clips=">= 1", batch_size=">= 1")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while it trains."""

    every_steps: int = 10
    batch_frequency: int = 1_000
    """Steps from one picture and video of originals above reconstructions to the next."""
    pictures: int = 4
    """Clips in a picture."""
    tensorboard: bool = True
    wandb: Literal["off", "online", "offline"] = "off"
    wandb_project: str = "reducio-vae"

    def __post_init__(self) -> None:
        require_ranges("log", self, every_steps=">= 1", batch_frequency=">= 1", pictures=">= 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and what is kept."""

    every_steps: int = 5_000
    keep_last: int = 3
    """Besides the one that validated best."""

    def __post_init__(self) -> None:
        require_ranges("checkpoint", self, every_steps=">= 1", keep_last=">= 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, but for where it writes."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ReducioVAEConfig = field(default_factory=ReducioVAEConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    train: OptimisationConfig = field(default_factory=OptimisationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        for name, value in flat(asdict(self)).items():
            for item in value if isinstance(value, tuple) else (value,):
                finite = not isinstance(item, int | float) or math.isfinite(item)
                require(finite, f"{name} is {item}; use a finite number.")
        require(
            not (self.adversarial.adaptive and self.adversarial.discriminators)
            or "decoder" not in self.train.freeze,
            "train.freeze has the decoder, but adversarial.adaptive weighs by gradients at its "
            "last layer. Set adversarial.adaptive=false, or train the decoder.",
        )


def flat(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every value of nested settings by its name, as `train.lr`."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found
