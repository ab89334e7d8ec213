"""The run: what happens, in order, from the first step to the last."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

import torch

from reducio_latents.errors import ConfigError, LatentsError, TrainingError
from reducio_latents.files import LocalFiles
from reducio_latents.files.lock import Lock, hold
from reducio_latents.metrics.lpips import LPIPS, load_lpips
from reducio_latents.metrics.weights import MetricUnavailableError
from reducio_latents.train.batch import PixelBatch, TrainOrder, batch_numbers
from reducio_latents.train.checkpoint import (
    AVERAGE,
    MODEL,
    checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
    take_pretrained,
)
from reducio_latents.train.config import TrainConfig
from reducio_latents.train.options import RunOptions
from reducio_latents.train.progress import Clock, StopAsked, move_bar, open_bar, stop_signal
from reducio_latents.train.ranks import RunRanks, join_ranks, lost_a_rank, short_reason
from reducio_latents.train.records import Records, write_pictures
from reducio_latents.train.settings import SETTINGS, changed_settings, to_yaml
from reducio_latents.train.split import ClipTable, Split, check_data, forget_split, make_split
from reducio_latents.train.state import Best, TrainState, build_state, prepare_networks
from reducio_latents.train.step import NotFiniteError, Stepper, train_step
from reducio_latents.train.stream import BatchStream, training_requests
from reducio_latents.train.validate import Pair, Validation, reconstruct, to_pairs, validate
from reducio_latents.video.pixels import to_unit

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
RUN_LOCK = "running.json"
SHOWN_TERMS = ("total", "nll", "kl", "disc")
"""Terms beside the bar."""
SMALLER = "Set train.checkpointing=true, or, in a new run, a smaller train.batch_size."
"""What to do where a step does not fit in memory."""


@dataclass(frozen=True)
class TrainReport:
    """How a run stands when `train` returns."""

    step: int
    checkpoint: Path | None
    """The newest one."""
    best: Best | None
    scores: dict[str, float] | None
    """Of the last validation, if there was one; see `validate.Validation`."""


def train(config: TrainConfig, out: Path, options: RunOptions | None = None) -> TrainReport:
    """Train a Reducio-VAE in `out`; to resume, call it again with the same arguments.

    Under torchrun every process calls it, with an `out` that all of them see. Raises ConfigError
    for settings that cannot be, CorpusError for a corpus that cannot be listed, WeightsError for
    weights that do not fit, StoreError where another process trains in `out`, TrainingError where
    the run cannot go on; its checkpoints stay.
    """
    options = options or RunOptions()
    with join_ranks() as ranks:
        if options.eval_only:
            with _explained("Use a smaller validation.batch_size, or validation.tiling."):
                return _evaluate(_prepare(config, out, options, ranks))
        since = f"training since {datetime.now():%Y-%m-%d %H:%M:%S}"
        with (
            # The first rank has `out` for this run alone.
            hold(LocalFiles(out), RUN_LOCK, since) if ranks.first else nullcontext() as lock,
            _naming_the_last_checkpoint(out),
            _explained(SMALLER),
            stop_signal() as stop,
        ):
            return _train(_prepare(config, out, options, ranks, stop), stop, lock)


@dataclass(kw_only=True)
class Run:
    """A run that is ready: everything it has, at the step where it stands."""

    config: TrainConfig
    out: Path
    options: RunOptions
    ranks: RunRanks
    split: Split
    state: TrainState
    lpips: LPIPS | None
    scores: dict[str, float] | None = None

    def tell(self, line: str) -> None:
        if self.ranks.first:
            self.options.tell(line)

    def report(self) -> TrainReport:
        found = checkpoints(self.out / CHECKPOINTS)
        return TrainReport(
            self.state.step, found[-1] if found else None, self.state.best, self.scores
        )


def _prepare(
    config: TrainConfig,
    out: Path,
    options: RunOptions,
    ranks: RunRanks,
    stop: StopAsked | None = None,
) -> Run:
    """Bring everything up that can fail, the quickest first."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    check_data(config.data, training=not options.eval_only)
    anew = _begins_anew(out, config)
    lpips = _lpips(config, options, ranks)
    state = build_state(config, ranks.device)
    lines = _start_weights(state, out, options)

    def probed(done: int, total: int) -> None:
        move_bar(bar, done, total)
        if stop is not None and stop.is_set():
            raise TrainingError("stopped by a signal before the first step.", signal=stop.signal)

    with ranks.after_first(), open_bar("probe", "video", shown=options.bar and ranks.first) as bar:
        if ranks.first and anew:
            forget_split(out)
        split = make_split(out, config.data, training=not options.eval_only, on_probe=probed)
        if ranks.first and not (options.eval_only and (out / SETTINGS).exists()):
            LocalFiles(out).write(SETTINGS, to_yaml(config).encode())
    run = Run(
        config=config, out=out, options=options, ranks=ranks, split=split, state=state, lpips=lpips
    )
    for line in [to_yaml(config).rstrip(), *lines, *_describe(run)]:
        run.tell(line)
    return run


def _begins_anew(out: Path, config: TrainConfig) -> bool:
    """Whether `out` holds a run on other data that has trained nothing yet.

    Raises ConfigError if it holds another run that has.
    """
    changed = changed_settings(out, config)
    if changed and checkpoints(out / CHECKPOINTS):
        raise ConfigError(
            f"{out} holds a run with other settings: {'; '.join(changed)}. Give another --out; "
            "--pretrained starts from the weights of this one."
        )
    return any(line.startswith("data.") for line in changed)


def _lpips(config: TrainConfig, options: RunOptions, ranks: RunRanks) -> LPIPS | None:
    if config.loss.perceptual == "none" and options.lpips_weights is None:
        return None
    try:
        return load_lpips("vgg", options.lpips_weights).to(ranks.device)
    except MetricUnavailableError as err:
        raise ConfigError(f"{err} Or train without it: --set loss.perceptual=none.") from err


def _start_weights(state: TrainState, out: Path, options: RunOptions) -> list[str]:
    """Load the newest checkpoint, or what the run is to start from; say which."""
    found = checkpoints(out / CHECKPOINTS)
    if found and not (options.eval_only and options.pretrained):
        load_checkpoint(found[-1], state)
        lines = [f"continuing from {found[-1]}"]
        if options.pretrained is not None:
            lines.append("--pretrained was taken when this run began; it is not taken again")
        return lines
    if options.pretrained is not None:
        return take_pretrained(state, options.pretrained).lines()
    if options.eval_only:
        raise ConfigError(
            f"there is nothing to evaluate: {out} has no checkpoint. Give --pretrained WEIGHTS."
        )
    return []


def _describe(run: Run) -> Iterator[str]:
    parameters = sum(p.numel() for p in run.state.vae.parameters())
    yield f"model: {parameters / 1e6:.2f} M parameters, on {run.ranks.size} x {run.ranks.device}"
    for name, table in (("training", run.split.train), ("validation", run.split.validation)):
        if table is not None:
            yield f"{name}: {len(table)} clips of {table.videos} videos"
    if run.split.unusable:
        video, why = next(iter(run.split.unusable.items()))
        yield f"left out: {len(run.split.unusable)} videos; the first one, {video}: {why}"


def _evaluate(run: Run) -> TrainReport:
    if run.split.validation is None:
        raise ConfigError(
            "there are no validation videos. Set data.validation_share or data.validation_corpus."
        )
    found = validate(run.state.measured, run.split.validation, run.config, run.ranks, run.lpips)
    run.scores = found.scores
    if run.ranks.first:
        record = {"step": run.state.step, "clips": found.clips, **found.scores}
        LocalFiles(run.out).write("evaluation.json", json.dumps(record, indent=2).encode())
        rate_fps = run.config.data.clip.rate_fps
        write_pictures(run.out, "evaluation", run.state.step, found.pairs, rate_fps)
    run.tell(_words(found))
    return run.report()


def _train(run: Run, stop: StopAsked, lock: Lock | None) -> TrainReport:
    config, out, state, ranks = run.config, run.out, run.state, run.ranks
    assert run.split.train is not None
    records = Records(out, config, state.step, run.options.wandb_key) if ranks.first else None
    perceptual = run.lpips if config.loss.perceptual != "none" else None
    stepper = Stepper(config, prepare_networks(state, config.train, ranks), perceptual, ranks)
    stream, per_epoch = _open_stream(run, run.split.train)
    clips = config.train.batch_size * config.train.accumulate * ranks.size
    clock = Clock(clips)
    with (
        closing(iter(stream)) as batches,
        closing(records) if records else nullcontext(),
        open_bar(f"step {state.step}", "clip", shown=run.options.bar and ranks.first) as bar,
    ):
        move_bar(bar, state.step * clips, config.train.steps * clips)
        while state.step < config.train.steps:
            with clock.waiting():
                taken = list(islice(batches, config.train.accumulate))
            values = train_step(state, taken, stepper)
            last = state.step == config.train.steps
            bar.set_description(f"step {state.step}", refresh=False)
            bar.set_postfix(
                {k: f"{values[k]:.4g}" for k in SHOWN_TERMS if k in values}, refresh=False
            )
            bar.update(clips)

            if last or state.step % config.log.every_steps == 0:
                failed = torch.tensor(float(len(stream.failed)), device=ranks.device)
                values |= clock.read()
                values["failed_clips"] = float(ranks.mean(failed)) * ranks.size
                values["lr"] = state.vae_optimizer.param_groups[0]["lr"]
                values["epoch"] = state.batches / per_epoch
                if records:
                    records.train(state.step, values)
            if records and state.step % config.log.batch_frequency == 0:
                records.pictures("training", state.step, _look(run, taken))
            improved = False
            if run.split.validation and (last or state.step % config.validation.every_steps == 0):
                improved = _validate(run, run.split.validation, records)
            stopping = ranks.any(stop.is_set())
            due = state.step % config.checkpoint.every_steps == 0
            if lock is not None and (last or improved or stopping or due):
                lock.require()
                save_checkpoint(out / CHECKPOINTS, state, config)
                prune(out / CHECKPOINTS, state.best, config.checkpoint.keep_last)
            if stopping and not last:
                ranks.meet()  # the first one has saved
                raise TrainingError(
                    f"stopped by a signal after step {state.step}.", signal=stop.signal
                )
    report = run.report()
    weights = MODEL if state.average is None else AVERAGE
    run.tell(
        f"step {report.step}. Encode with it: encode-corpus --model reducio --weights "
        f"{report.checkpoint}/{weights}"
    )
    return report


def _open_stream(run: Run, table: ClipTable) -> tuple[BatchStream, int]:
    """Return this rank's batches from where the run stands, and how many an epoch has."""
    settings, state, ranks = run.config.train, run.state, run.ranks
    order = TrainOrder(table.bucket_numbers, settings.batch_size, settings.seed)
    steps = settings.steps - state.step
    numbers = batch_numbers(state.batches, steps, ranks.size, ranks.rank, settings.accumulate)
    requests = training_requests(order, numbers, settings.seed)
    return BatchStream(table, run.config.data, requests), order.batches_per_epoch


def _look(run: Run, batches: list[PixelBatch]) -> list[Pair]:
    """Reconstruct the first clips of a step, one at a time."""
    pairs: list[Pair] = []
    for frames in islice((f for b in batches for f in b.frames_BTHWC), run.config.log.pictures):
        video = to_unit(frames[None].to(run.ranks.device)).contiguous()
        pairs += to_pairs(video, reconstruct(run.state.measured, video, run.config))
    return pairs


def _validate(run: Run, table: ClipTable, records: Records | None) -> bool:
    """Measure, record, and return whether it went better than ever before."""
    state = run.state
    found = validate(state.measured, table, run.config, run.ranks, run.lpips)
    run.scores = found.scores
    run.tell(f"step {state.step}: {_words(found)}")
    if records:
        records.validation(state.step, {"clips": float(found.clips), **found.scores})
        records.pictures("validation", state.step, found.pairs)
    improved = state.best is None or found.scores["psnr_db"] > state.best.psnr_db
    if improved:
        state.best = Best(state.step, found.scores["psnr_db"])
    return improved


def _words(found: Validation) -> str:
    scores = ", ".join(f"{name} {value:.4g}" for name, value in found.scores.items())
    return f"validation on {found.clips} clips: {scores}"


@contextmanager
def _explained(smaller: str) -> Iterator[None]:
    """Turn what torch says of a full GPU, and of a rank that went away, into TrainingError."""
    try:
        yield
    except torch.OutOfMemoryError as err:
        short = ". ".join(str(err).split(". ")[:2]).rstrip(".")  # what follows is about allocators
        raise TrainingError(f"{short}. {smaller}") from err
    except RuntimeError as err:
        if isinstance(err, LatentsError) or not lost_a_rank(err):
            raise
        raise TrainingError(
            f"another process of this run is gone ({short_reason(err)}); see what it said."
        ) from err


@contextmanager
def _naming_the_last_checkpoint(out: Path) -> Iterator[None]:
    """Say, when a run ends early, from where the same command continues."""
    try:
        yield
    except TrainingError as err:
        found = checkpoints(out / CHECKPOINTS)
        place = found[-1] if found else "the start"
        place = f"The same command continues from {place}."
        if isinstance(err, NotFiniteError) and len(found) > 1:
            place += f" If it ends so again, remove that folder to continue from {found[-2]}."
        raise TrainingError(f"{err} {place}", signal=err.signal) from err
