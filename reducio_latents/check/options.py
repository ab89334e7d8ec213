"""What the commands that look at latents are told. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from reducio_latents.check.benchmarks import PRESETS, PresetName
from reducio_latents.core.choices import (
    Dtype,
    LpipsNet,
    MetricName,
    ProtocolName,
    usable_cores,
)
from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.config import check_choices
from reducio_latents.core.fetching import WeightsPlace
from reducio_latents.core.geometry import Bucket, parse_size
from reducio_latents.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to look at. `ids` or `worst` come before a random choice."""

    ids: tuple[str, ...] = ()
    """Clip ids, in the order to show them in, instead of a random choice."""
    num: int = 8
    """How many clips, if no ids are given; fewer if the store holds fewer."""
    seed: int = 0
    """Seed of the random choice."""
    sort: str | None = None
    """Take the clips with the lowest value of this, such as motion; -motion: the highest.

    It may be all that filters may name."""
    worst: bool = False
    """Take the clips with the lowest PSNR that was recorded while encoding: sort by psnr."""
    filters: str | None = None
    """Only clips for which this holds: "motion > 2", or a list as LatentDataset takes it."""
    buckets: tuple[str, ...] = ()
    """Only clips of these buckets."""

    def __post_init__(self) -> None:
        if self.num < 1 and not self.ids:
            raise ConfigError(f"the number of clips is {self.num}; ask for at least 1.")
        for name in self.buckets:
            Bucket.parse(name)
        if self.ids and (self.sort or self.filters):
            raise ConfigError("clips that are named by ids are neither sorted nor filtered.")
        if self.sort and self.worst:
            raise ConfigError("worst is sort by psnr; give one of the two.")
        _require_conditions(self.filters)


def _require_conditions(filters: str | None) -> None:
    if filters is not None:
        from reducio_latents.dataset.conditions import parse_conditions

        parse_conditions(filters)


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """What to decode with, and what to compare it with."""

    selection: Selection = field(default_factory=Selection)
    model: str | None = None
    """Name of the model to decode with, by default the one that the store names."""
    weights: str | None = None
    """Where the model's weights are now."""
    corpus: str | None = None
    """Where the original videos are now, by default where the store says they were."""
    root: str | None = None
    """Folder that a table's relative paths start from, if not its own."""
    sample_seed: int | None = None
    """Decode a draw with this seed from each posterior, instead of its mean."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "float32"
    """Precision of the model."""
    clip_timeout_s: float = 120.0
    """A decoder that brings no original for this long has hung."""
    format: Literal["mp4", "webp"] = "mp4"
    """Videos for players (H.264), or animated pictures for pages and chats that show no video."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class CheckOptions(DecodeOptions):
    """What a report is made of."""

    selection: Selection = field(default_factory=lambda: Selection(num=24))
    protocol: ProtocolName = "standard"
    """How PSNR and SSIM are measured; `paper`: as the published repository does."""
    scan: Literal["all", "shown"] = "all"
    """Look for faults in all clips of the store, which reads it whole, or in those shown."""


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    """What is looked at beside the latents themselves."""

    look: int = 32
    """Clips whose original frames are read again, to find frozen and cut-through ones. 0: none."""
    seed: int = 0
    """Seed of the choice of these clips."""
    filters: str | None = None
    """Only clips for which this holds: "motion > 2", or a list as LatentDataset takes it."""
    corpus: str | None = None
    """Where the original videos are now, by default where the store says they were."""
    root: str | None = None
    """Folder that a table's relative paths start from, if not its own."""

    def __post_init__(self) -> None:
        if self.look < 0:
            raise ConfigError(f"look must be >= 0, got {self.look}.")
        _require_conditions(self.filters)


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """Which clips of a corpus, and how they are fitted."""

    clip: ClipSpec = field(default_factory=lambda: ClipSpec(policy="centre"))
    resolution: int | str = 256
    """What frames are resized to cover and cropped to, in px: a side, or height x width."""
    videos: int | None = None
    """How many videos, drawn by the seed; by default all."""
    workers: int = field(default_factory=usable_cores)
    """Processes that read videos, one for each core by default."""
    timeout_s: float = 120.0
    """A decoder that brings no clip for this long has hung."""

    def __post_init__(self) -> None:
        if self.videos is not None and self.videos < 1:
            raise ConfigError(f"the number of videos is {self.videos}; ask for at least 1.")
        parse_size(self.resolution)

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.clip.frames, *parse_size(self.resolution))


@dataclass(frozen=True)
class ModelChoice:
    """A model to evaluate: a name for `load_autoencoder`, and where its weights are."""

    name: str
    weights: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelChoice:
        """Read `NAME` or `NAME=WEIGHTS`.

        >>> ModelChoice.parse("reducio-ft4-fs32=weights/ft4.ckpt")
        ModelChoice(name='reducio-ft4-fs32', weights='weights/ft4.ckpt')
        """
        name, _, weights = text.partition("=")
        if not name:
            raise ConfigError(f"--model is {text!r}; write NAME or NAME=WEIGHTS.")
        return cls(name, weights or None)

    def __str__(self) -> str:
        return self.name if self.weights is None else f"{self.name}={self.weights}"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What is compared, on what, and how it is measured."""

    models: tuple[ModelChoice, ...]
    """A model and its weights; repeat it for each model."""
    trust_config: bool = False
    """Try models of diffusers whose class is not known here, by their config and a trial."""
    sample: SampleSpec = field(default_factory=SampleSpec)
    preset: PresetName | None = None
    """A published set: which of its videos, and how they are measured. pexels-1k and ucf-101: as
    in Reducio's paper."""
    metrics: tuple[MetricName, ...] = get_args(MetricName)
    """What to measure."""
    protocol: ProtocolName | None = None
    """How pictures are compared: as the preset has it, else `standard`."""
    batch_size: int = 1
    """Clips that a model gets at once."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1, ..."""
    dtype: Dtype = "float32"
    """Precision of the models."""
    lpips_weights: Mapping[LpipsNet, WeightsPlace] = field(default_factory=dict)
    """Backbone of LPIPS, alex=FILE or vgg=FILE, instead of torchvision's, which is fetched."""
    fvd_weights: WeightsPlace | None = None
    """I3D's weights: i3d_pretrained_400.pt or i3d_torchscript.pt."""
    pictures: int = 4
    """Clips of each corpus that are also shown."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.models:
            raise ConfigError("no model is named; give --model NAME, once for each.")
        for number, choice in enumerate(self.models):
            if choice in self.models[:number]:
                raise ConfigError(f"--model {choice} is given twice; once is enough.")
        if not self.metrics:
            metrics = ", ".join(get_args(MetricName))
            raise ConfigError(f"no metric is named; choose of {metrics}.")
        for name, least in (("pictures", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be >= {least}, got {getattr(self, name)}.")

    @property
    def protocol_name(self) -> ProtocolName:
        return self.protocol or (PRESETS[self.preset].protocol if self.preset else "standard")

    @property
    def sample_spec(self) -> SampleSpec:
        """`sample`, with the number of videos of the preset if it names none."""
        if self.preset is None or self.sample.videos is not None:
            return self.sample
        return replace(self.sample, videos=PRESETS[self.preset].videos)
