"""`evaluate`: several autoencoders on the same clips, measured alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from reducio_latents.autoencoders import Autoencoder, load_autoencoder
from reducio_latents.autoencoders.untrained import is_untrained
from reducio_latents.check.pictures import Panel, SheetRow, contact_sheet, side_by_side
from reducio_latents.check.reconstruct import (
    FrameRule,
    as_frames,
    count_parameters,
    frame_rule,
    reconstruct,
)
from reducio_latents.check.sample import Sample, SampleSpec, read_sample
from reducio_latents.check.writing import file_name, make_folder, write_picture
from reducio_latents.core.devices import usable_device
from reducio_latents.errors import ConfigError
from reducio_latents.metrics.protocol import PROTOCOLS, ComparisonRule
from reducio_latents.metrics.suite import METRICS, RunningScores, Suite, load_suite
from reducio_latents.video.pixels import to_unit
from reducio_latents.video.write import write_mp4


@dataclass(frozen=True)
class ModelChoice:
    """A model to evaluate: a name for `load_autoencoder`, and where its weights lie."""

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
    sample: SampleSpec = field(default_factory=SampleSpec)
    metrics: tuple[str, ...] = METRICS
    protocol: ComparisonRule = PROTOCOLS["standard"]
    batch_size: int = 1
    device: str = "auto"
    dtype: str = "float32"
    lpips_weights: Mapping[str, Path] = field(default_factory=dict)
    """`alex` or `vgg` -> the backbone's file, where it is not in torch.hub's folder."""
    fvd_weights: Path | None = None
    pictures: int = 4
    """Clips of each corpus that are also shown."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("no model is named; give --model NAME, once for each.")
        for number, choice in enumerate(self.models):
            if choice in self.models[:number]:
                raise ConfigError(f"--model {choice} is given twice; once is enough.")
        if not self.metrics:
            raise ConfigError(f"no metric is named; choose of {', '.join(METRICS)}.")
        if self.pictures < 0:
            raise ConfigError(f"pictures must be >= 0, got {self.pictures}.")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1, got {self.batch_size}.")


@dataclass(frozen=True, kw_only=True)
class DatasetScores:
    """One method on one corpus."""

    clips: int
    scores: dict[str, float]
    """Metric -> mean over clips, or FVD; a metric that is unavailable is not in it."""
    clips_per_s: float
    """Encoded and decoded on this machine; the first batch, which warms up, is left out if there
    are others."""
    bytes_per_s: float
    """Stored per second of video: latents as float16, and the content image where one is needed."""


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One row of the table."""

    name: str
    channels: int
    strides: tuple[int, int]
    """Temporal and spatial."""
    parameters: int
    untrained: bool
    """Random weights: its numbers say nothing about the architecture."""
    frames: str
    """Frames given, and what they were filled up to."""
    datasets: dict[str, DatasetScores]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The table, and what must be said with it."""

    methods: Sequence[MethodResult]
    datasets: dict[str, dict[str, str]]
    """Corpus -> videos that gave no clip, and why."""
    protocol: ComparisonRule
    resolution: int
    unavailable: dict[str, str]
    biased: bool
    """FVD was made of fewer clips than I3D has features."""
    fvd_file: str | None
    """The I3D that FVD was measured with: of the two in use, each gives other numbers."""
    machine: str
    """Device and precision that clips/s belongs to."""


def evaluate(
    corpora: Mapping[str, str | Path],
    options: EvaluateOptions,
    out: Path | None = None,
    *,
    on_missing: Callable[[str], None] = lambda _: None,
    on_sample: Callable[[str, int, int], None] = lambda *_: None,
    on_clip: Callable[[str, int, int], None] = lambda *_: None,
) -> Evaluation:
    """Reconstruct the clips of `corpora` (name -> corpus) by every model, and measure.

    With `out`, pictures and videos go there: originals beside what each model made of them.
    `on_missing` is told at once of each metric that lacks its weights, with the remedy;
    `on_sample` is told (corpus, videos read, videos wanted), `on_clip` (model, clips done, all).
    Raises ConfigError, WeightsError or GeometryError for a model that cannot be used, before any
    clip is read.
    """
    device = usable_device(options.device)
    suite = load_suite(
        options.metrics,
        options.protocol,
        device=device,
        lpips_weights=dict(options.lpips_weights),  # type: ignore[arg-type]
        fvd_weights=options.fvd_weights,
    )
    for remedy in suite.unavailable.values():
        on_missing(remedy)
    rules = [_try_out(choice, options, device) for choice in options.models]
    if out is not None:
        make_folder(out)
    with ExitStack() as stack:
        samples = []
        for name, corpus in corpora.items():
            told = _told(on_sample, name)
            sample = read_sample(corpus, options.sample, name=name, progress=told)
            samples.append(stack.enter_context(sample))
        shown = {sample.name: _originals(sample, options.pictures) for sample in samples}
        real = {sample.name: _features(sample, suite) for sample in samples}
        methods, biased = [], False
        for choice, rule in zip(options.models, rules, strict=True):
            model = _load(choice, options, device)
            datasets = {}
            for sample in samples:
                tally = RunningScores(suite, real[sample.name])
                told = _told(on_clip, model.name)
                datasets[sample.name] = _run(
                    model, rule, sample, tally, options.batch_size, shown[sample.name], told
                )
                biased = biased or tally.fvd_is_biased
            methods.append(_describe(choice, model, rule, datasets))
        if out is not None:
            _write_pictures(out, samples, shown)
        return Evaluation(
            methods=methods,
            datasets={sample.name: sample.failed for sample in samples},
            protocol=options.protocol,
            resolution=options.sample.resolution,
            unavailable=suite.unavailable,
            biased=biased,
            fvd_file=suite.fvd_file,
            machine=f"{device.type}, {options.dtype}, batch {options.batch_size}",
        )


_Shown = dict[str, list[list[Panel]]]
"""Corpus -> for each clip that is shown its panels."""


def _told(tell: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    return lambda done, total: tell(name, done, total)


def _load(choice: ModelChoice, options: EvaluateOptions, device: torch.device) -> Autoencoder:
    dtype: torch.dtype = getattr(torch, options.dtype)
    return load_autoencoder(choice.name, choice.weights, device=device, dtype=dtype)


def _try_out(choice: ModelChoice, options: EvaluateOptions, device: torch.device) -> FrameRule:
    """Load a model and let go of it again: an unusable one is told before an hour has passed."""
    bucket = options.sample.bucket
    model = _load(choice, options, device)
    return frame_rule(model, bucket.frames, bucket.height, bucket.width)


def _originals(sample: Sample, count: int) -> list[list[Panel]]:
    return [[Panel("original", sample[n])] for n in range(min(count, len(sample)))]


def _features(sample: Sample, suite: Suite) -> Tensor:
    """Return what FVD compares of the originals."""
    clips = (to_unit(torch.from_numpy(frames)) for frames in sample.batches(1))
    return torch.cat([suite.features(clip) for clip in clips])


def _run(
    model: Autoencoder,
    rule: FrameRule,
    sample: Sample,
    tally: RunningScores,
    batch_size: int,
    shown: list[list[Panel]],
    told: Callable[[int, int], None],
) -> DatasetScores:
    """Put all clips through the model; the clips of `shown` each get one more panel."""
    times: list[tuple[int, float]] = []
    stored = done = 0
    for frames in sample.batches(batch_size):
        made = reconstruct(model, frames, rule)
        originals = to_unit(torch.from_numpy(frames))
        for original, decoded in zip(originals, made.video_BCTHW, strict=True):
            tally.add(original, decoded)
            if done < len(shown):
                shown[done].append(Panel(model.name, as_frames(decoded)))
            done += 1
        times.append((len(frames), made.seconds))
        stored += made.stored_bytes
        told(done, len(sample))
    timed = times[1:] or times
    return DatasetScores(
        clips=len(sample),
        scores=tally.scores(),
        clips_per_s=sum(n for n, _ in timed) / max(1e-9, sum(s for _, s in timed)),
        bytes_per_s=stored / (len(sample) * sample.spec.clip.span_s),
    )


def _describe(
    choice: ModelChoice, model: Autoencoder, rule: FrameRule, datasets: dict[str, DatasetScores]
) -> MethodResult:
    geometry = model.geometry
    return MethodResult(
        name=choice.name if choice.weights is None else f"{choice.name} ({choice.weights})",
        channels=geometry.channels,
        strides=(geometry.temporal_stride, geometry.spatial_stride),
        parameters=count_parameters(model),
        untrained=is_untrained(model),
        frames=str(rule),
        datasets=datasets,
    )


def _write_pictures(out: Path, samples: Sequence[Sample], shown: _Shown) -> None:
    folder = out / "pictures"
    make_folder(folder)
    for sample in samples:
        panels_of_clips = shown[sample.name]
        if not panels_of_clips:
            continue
        stem, rate_fps = file_name(sample.name), sample.spec.clip.rate_fps
        rows = []
        for number, panels in enumerate(panels_of_clips):
            clip = sample.clips[number]
            title = f"{sample.name}-{number:03d}   {clip.video} at {clip.start_s:g} s"
            rows.append(SheetRow(title, panels))
            write_mp4(folder / f"{stem}-{number:03d}.mp4", side_by_side(panels), rate_fps)
        write_picture(folder / f"{stem}.png", contact_sheet(rows))


def corpus_names(corpora: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, corpus), a `NAME=CORPUS` by its own name and others by their last part.

    A glob is called what the last folder before its wildcards is.
    """
    taken: set[str] = set()
    for text in corpora:
        name, equals, place = text.partition("=")
        if not equals or "/" in name:
            plain = takewhile(lambda part: not set(part) & set("*?["), text.split("/"))
            name, place = Path("/".join(plain).rstrip("/")).stem or "corpus", text
        if name in taken:
            raise ConfigError(f"two corpora are called {name!r}; name them: NAME=CORPUS.")
        taken.add(name)
        yield name, place
