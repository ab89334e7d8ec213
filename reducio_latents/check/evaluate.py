"""`evaluate`: several autoencoders on the same clips, measured alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reducio_latents.autoencoders import Autoencoder, load_autoencoder
from reducio_latents.autoencoders.protocol import is_untrained
from reducio_latents.check.benchmarks import as_videos
from reducio_latents.check.options import EvaluateOptions
from reducio_latents.check.pictures import (
    Frames,
    Panel,
    SheetRow,
    contact_sheet,
    file_name,
    frames_of,
    make_folder,
    side_by_side,
    write_picture,
)
from reducio_latents.check.sample import Sample, read_sample
from reducio_latents.core.clips import centre_frame
from reducio_latents.core.devices import usable_device
from reducio_latents.core.images import encode_image
from reducio_latents.core.text import printable
from reducio_latents.errors import ConfigError, GeometryError
from reducio_latents.metrics.psnr import ComparisonRule, protocol_named
from reducio_latents.metrics.suite import RunningScores, Suite, load_suite
from reducio_latents.video.pixels import to_unit
from reducio_latents.video.write import write_mp4

LATENT_BYTES = 2
"""Of one value: latents are stored as float16."""
MAX_REPEATED = 32


@dataclass(frozen=True)
class FrameRule:
    """How a clip is made as long as a model wants it."""

    given: int
    used: int
    """`given`, and as many repetitions of the last frame as are needed."""

    def __str__(self) -> str:
        return str(self.given) if self.used == self.given else f"{self.given} as {self.used}"


class RoundTrip(NamedTuple):
    """What came back of a batch of clips."""

    video_BCTHW: Tensor
    """float32 on the CPU, clamped to [-1, 1], as many frames as were given."""
    seconds: float
    """Encoding and decoding, without copies to and from the device."""
    stored_bytes: int
    """Of the batch: final latents as float16, and the content images the decoder needs."""


def frame_rule(model: Autoencoder, frames: int, height: int, width: int) -> FrameRule:
    """Return how clips of this size go through `model`.

    The last frame is repeated up to the next length that the model takes; what is decoded of the
    repetitions is dropped. Raises GeometryError if no length near it does.
    """
    refusal = None
    for used in range(frames, frames + MAX_REPEATED):
        if not model.geometry.takes(used):
            continue
        try:
            model.check_clip(used, height, width)
        except GeometryError as err:
            refusal = refusal or err
        else:
            return FrameRule(frames, used)
    raise GeometryError(f"{model.name}: {refusal}") from refusal


@torch.inference_mode()
def round_trip(model: Autoencoder, frames_BTHWC: Frames, rule: FrameRule) -> RoundTrip:
    """Encode, take the final latents of the mean, and decode; frames are uint8."""
    video = to_unit(torch.from_numpy(frames_BTHWC)).contiguous()
    centre = centre_frame(rule.given)
    content = video[:, :, centre].to(model.device) if model.needs_content else None
    if rule.used > rule.given:
        last = video[:, :, -1:].expand(-1, -1, rule.used - rule.given, -1, -1)
        video = torch.cat([video, last], dim=2)
    video = video.to(model.device)
    _synchronise(model.device)
    start = time.perf_counter()
    latents = model.final_latents(model.encode(video))
    decoded = model.decode(latents, content)
    _synchronise(model.device)
    seconds = time.perf_counter() - start
    stored = latents.numel() * LATENT_BYTES
    if model.needs_content:
        stored += sum(len(encode_image(clip[centre], "webp")) for clip in frames_BTHWC)
    pixels = decoded[:, :, : rule.given].float().clamp(-1, 1).cpu()
    return RoundTrip(pixels, seconds, stored)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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

    @property
    def kbit_per_s(self) -> float:
        """The same, in 1000 bits."""
        return self.bytes_per_s * 8 / 1000

    @property
    def db_per_kbit_per_s(self) -> float | None:
        """PSNR over that rate; None if PSNR was not measured, or nothing is stored."""
        psnr = self.scores.get("psnr")
        return psnr / self.kbit_per_s if psnr is not None and self.bytes_per_s else None


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
    resolution: int | str
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
    protocol, spec = protocol_named(options.protocol_name), options.sample_spec
    suite = load_suite(
        options.metrics,
        protocol,
        device=device,
        lpips_weights=options.lpips_weights,
        fvd_weights=options.fvd_weights,
    )
    for remedy in suite.unavailable.values():
        on_missing(remedy)
    load = partial(
        load_autoencoder,
        device=device,
        dtype=getattr(torch, options.dtype),
        trust_config=options.trust_config,
    )
    # Each is loaded once now: an unusable one is told before an hour has passed.
    size = (spec.bucket.frames, spec.bucket.height, spec.bucket.width)
    rules = [frame_rule(load(choice.name, choice.weights), *size) for choice in options.models]
    if out is not None:
        make_folder(out)
    with ExitStack() as stack:
        trials = []
        for name, corpus in corpora.items():
            told = partial(on_sample, name)
            with as_videos(options.preset, corpus) as videos:
                sample = read_sample(videos, spec, name=name, preset=options.preset, progress=told)
            trials.append(_Trial.of(stack.enter_context(sample), suite, options.pictures))
        methods = []
        for choice, rule in zip(options.models, rules, strict=True):
            model = load(choice.name, choice.weights)
            told = partial(on_clip, model.name)
            datasets = {
                trial.sample.name: trial.run(model, rule, options.batch_size, told)
                for trial in trials
            }
            weights = "" if choice.weights is None else f" ({choice.weights})"
            geometry, network = model.geometry, model.model
            found = MethodResult(
                name=f"{choice.name}{weights}",
                channels=geometry.channels,
                strides=(geometry.temporal_stride, geometry.spatial_stride),
                parameters=sum(p.numel() for p in network.parameters())
                if network is not None
                else 0,
                untrained=is_untrained(model),
                frames=str(rule),
                datasets=datasets,
            )
            methods.append(found)
        if out is not None:
            make_folder(out / "pictures")
            for trial in trials:
                trial.write_pictures(out / "pictures")
        return Evaluation(
            methods=methods,
            datasets={trial.sample.name: trial.sample.failed for trial in trials},
            protocol=protocol,
            resolution=spec.resolution,
            unavailable=suite.unavailable,
            biased=any(trial.biased for trial in trials),
            fvd_file=suite.fvd_file,
            machine=f"{device.type}, {options.dtype}, batch {options.batch_size}",
        )


@dataclass
class _Trial:
    """The clips of one corpus, which every model is put to."""

    sample: Sample
    suite: Suite
    real_ND: Tensor
    """What FVD compares of the originals."""
    shown: list[list[Panel]]
    """Of each clip that is shown, its panels; every model adds one."""
    biased: bool = False

    @classmethod
    def of(cls, sample: Sample, suite: Suite, pictures: int) -> _Trial:
        clips = (to_unit(torch.from_numpy(frames)) for frames in sample.batches(1))
        real = torch.cat([suite.features(clip) for clip in clips])
        originals = map(sample.__getitem__, range(min(pictures, len(sample))))
        return cls(sample, suite, real, [[Panel("original", clip)] for clip in originals])

    def run(
        self,
        model: Autoencoder,
        rule: FrameRule,
        batch_size: int,
        told: Callable[[int, int], None],
    ) -> DatasetScores:
        """Put all clips through the model."""
        sample, scores = self.sample, RunningScores(self.suite, self.real_ND)
        times: list[tuple[int, float]] = []
        stored = done = 0
        for frames in sample.batches(batch_size):
            made = round_trip(model, frames, rule)
            originals = to_unit(torch.from_numpy(frames))
            for original, decoded in zip(originals, made.video_BCTHW, strict=True):
                scores.add(original, decoded)
                if done < len(self.shown):
                    self.shown[done].append(Panel(model.name, frames_of(decoded)))
                done += 1
            times.append((len(frames), made.seconds))
            stored += made.stored_bytes
            told(done, len(sample))
        self.biased = self.biased or scores.fvd_is_biased
        timed = times[1:] or times
        return DatasetScores(
            clips=len(sample),
            scores=scores.means(),
            clips_per_s=sum(n for n, _ in timed) / max(1e-9, sum(s for _, s in timed)),
            bytes_per_s=stored / (len(sample) * sample.spec.clip.span_s),
        )

    def write_pictures(self, folder: Path) -> None:
        """Write a contact sheet of the clips that are shown, and a video of each."""
        name, rate_fps = self.sample.name, self.sample.spec.clip.rate_fps
        rows = []
        for number, (clip, panels) in enumerate(zip(self.sample.clips, self.shown, strict=False)):
            title = f"{name}-{number:03d}   {clip.video} at {clip.start_s:g} s"
            rows.append(SheetRow(title, panels))
            path = folder / f"{file_name(name)}-{number:03d}.mp4"
            write_mp4(path, side_by_side(panels), rate_fps)
        if rows:
            write_picture(folder / f"{file_name(name)}.png", contact_sheet(rows))


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
        name = printable(name)
        if name in taken:
            raise ConfigError(f"two corpora are called {name!r}; name them: NAME=CORPUS.")
        taken.add(name)
        yield name, place
