"""The run: batches in, losses out, a checkpoint now and then."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dit.checkpoint import (
    TrainState,
    build_state,
    load_checkpoint,
    save_checkpoint,
    update_average,
)
from dit.data import choose_columns, conditions_of, sizes_of
from dit.flow import Draw, draw, flow_loss
from dit.records import Clock, LossTable
from dit.settings import RunSettings, TrainSettings
from reducio_latents.dataset import LatentDataset, LatentLoader
from reducio_latents.dataset.batches import LatentBatch
from reducio_latents.errors import TrainingError
from reducio_latents.files import LocalFiles
from reducio_latents.store import open_store
from reducio_latents.train.ranks import RunRanks, join_ranks

if TYPE_CHECKING:
    from dit.sample import Sampler

LOSSES, SAMPLES = "loss.csv", "samples"
MAX_GRAD_NORM = 1.0
ENDS = 20
"""Steps at the beginning and at the end that a run's losses are told of."""


@dataclass(frozen=True)
class TrainReport:
    """How a run went."""

    step: int
    first_loss: float
    """Mean of the run's first 20 steps; `last_loss`: of its last 20."""
    last_loss: float
    clips_per_s: float
    """Of this command; 0 if there was nothing left to do."""
    waiting_share: float
    """Of this command's time that went by without a batch to train on."""


class Pending(NamedTuple):
    """What is to be written about a step."""

    row: dict[str, float]
    measured: Tensor
    """(2,): the loss and the norm of its gradient, still on the device."""


@dataclass(kw_only=True)
class Job:
    """A run that is ready to step."""

    out: Path
    settings: TrainSettings
    run: RunSettings
    ranks: RunRanks
    loader: LatentLoader
    state: TrainState
    network: nn.Module
    """The state's model, its gradients averaged over ranks."""
    sampler: Sampler | None
    losses: LossTable | None
    """The first rank's."""
    pending: list[Pending] = field(default_factory=list)
    """Steps whose losses are not written yet."""

    def tell(self, line: str) -> None:
        if self.ranks.first:
            self.run.tell(line)


def train(store: str, out: Path, settings: TrainSettings, run: RunSettings) -> TrainReport | None:
    """Train a DiT on `store` in `out`; the same call goes on where it was broken off.

    Under torchrun every process calls it, with an `out` that all of them see; the report is the
    first rank's. Raises ConfigError, StoreError or WeightsError for what cannot be, TrainingError
    for a loss that is not finite.
    """
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with join_ranks() as ranks:
        job = _prepare(store, out, settings, run, ranks)
        return _train(job)


def _prepare(
    url: str, out: Path, settings: TrainSettings, run: RunSettings, ranks: RunRanks
) -> Job:
    store = open_store(url)
    settings = replace(settings, columns=choose_columns(store, settings.columns))
    assert settings.columns is not None
    dataset = LatentDataset(
        store,
        settings.columns,
        global_batch_size=settings.batch_size,
        seed=settings.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        split="train",
        val_fraction=settings.val_fraction,
        latents=settings.latents,
        pin_memory=ranks.device.type == "cuda",
    )
    shape = {name: getattr(settings, name) for name in ("width", "depth", "heads", "patch")}
    sizes = sizes_of(dataset, settings.columns, **shape)
    state = build_state(sizes, seed=settings.seed, lr=settings.lr, device=ranks.device)
    loader = LatentLoader(dataset, device=ranks.device)
    position = load_checkpoint(out, state, asdict(settings))
    if position is not None:
        loader.load_state_dict(position)
    sampler = None
    if run.samples.every and ranks.first:
        from dit.sample import Sampler  # the VAE and the video library, for samples alone

        sampler = Sampler(
            store,
            settings.columns,
            run.samples,
            val_fraction=settings.val_fraction,
            seed=settings.seed,
            device=ranks.device,
        )
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        LocalFiles(out).sweep()
    job = Job(
        out=out,
        settings=settings,
        run=run,
        ranks=ranks,
        loader=loader,
        state=state,
        network=ranks.distribute(state.model),
        sampler=sampler,
        losses=LossTable(out / LOSSES, state.step) if ranks.first else None,
    )
    job.tell(_described(job, dataset))
    return job


def _described(job: Job, dataset: LatentDataset) -> str:
    parameters = sum(p.numel() for p in job.state.model.parameters())
    columns = ", ".join(job.settings.columns or ())
    start = f"from step {job.state.step}" if job.state.step else "from the start"
    return (
        f"{parameters / 1e6:.2f} M parameters on {job.ranks.size} x {job.ranks.device}, "
        f"{dataset.num_samples} clips ({columns}), {start}"
    )


def _train(job: Job) -> TrainReport | None:
    state, run = job.state, job.run
    batches, clock = endless(job.loader), Clock(job.settings.batch_size)
    while state.step < run.steps:
        with clock.waiting():
            batch = next(batches)
        train_step(job, batch)
        last = state.step == run.steps
        saving = last or state.step % run.checkpoint_every == 0
        if saving or state.step % run.log_every == 0:
            _write_losses(job, clock)
        if run.samples.every and (last or state.step % run.samples.every == 0):
            with clock.stopped():
                _write_samples(job)
        # After the samples, so that a run killed while they are made makes them again.
        if saving and job.ranks.first:
            save_checkpoint(job.out, state, asdict(job.settings), job.loader.state_dict())
    if job.losses is None:
        return None
    losses = job.losses.losses()
    report = TrainReport(state.step, fmean(losses[:ENDS]), fmean(losses[-ENDS:]), *clock.pace())
    job.tell(
        f"{report.step} steps: loss {report.first_loss:.4f} -> {report.last_loss:.4f} (means of "
        f"{ENDS} steps); {clock.words()}"
    )
    return report


def endless(loader: LatentLoader) -> Iterator[LatentBatch]:
    """Yield batches of one epoch after the other."""
    while True:
        yield from loader


def train_step(job: Job, batch: LatentBatch) -> None:
    """Update the network once."""
    state, settings, ranks = job.state, job.settings, job.ranks
    latents = batch["latents"]
    drawn = draw(
        latents.shape,
        seed=settings.seed,
        step=state.step,
        first=ranks.rank * len(latents),
        times=settings.times,
        dropout=settings.dropout,
    )
    drawn = Draw(*(tensor.to(ranks.device, non_blocking=True) for tensor in drawn))
    conditions = conditions_of(batch, settings.columns or (), drawn.keep)
    lr = settings.lr * min(1.0, (state.step + 1) / settings.warmup_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = lr

    with _autocast(job):
        loss = flow_loss(job.network, latents, drawn, conditions)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), MAX_GRAD_NORM)
    state.optimizer.step()
    state.step += 1
    update_average(state, settings.ema_decay)
    row = {"step": state.step, "epoch": job.loader.state_dict()["epoch"], "lr": lr}
    # Left on the device: to look at it now would make the next step wait.
    job.pending.append(Pending(row, torch.stack([loss.detach(), norm])))


def _autocast(job: Job) -> Any:
    if job.settings.precision == "fp32":
        return nullcontext()
    return torch.autocast(job.ranks.device.type, torch.bfloat16)


def _write_losses(job: Job, clock: Clock) -> None:
    """Write the losses of the steps since the last time; TrainingError if one is not finite."""
    rows = [pending.row for pending in job.pending]
    values = job.ranks.mean(torch.stack([pending.measured for pending in job.pending])).tolist()
    job.pending.clear()
    for row, (loss, norm) in zip(rows, values, strict=True):
        if not math.isfinite(loss + norm):
            raise TrainingError(
                f"step {int(row['step'])}: the loss is {loss}, its gradient's norm {norm}. The "
                f"checkpoint in {job.out}, if any, is sound. Begin another run with a lower --lr."
            )
        if job.losses is not None:
            job.losses.add({**row, "loss": loss, "grad_norm": norm})
    mean = fmean(loss for loss, _ in values)
    job.tell(f"step {job.state.step:6d}  loss {mean:.4f}  {clock.words()}")


def _write_samples(job: Job) -> None:
    if job.sampler is None:  # another rank does it
        return
    average = job.state.average
    loss = job.sampler.held_out_loss(average)
    folder = job.out / SAMPLES / f"step-{job.state.step:08d}"
    paths = job.sampler.write(average, folder)
    job.tell(f"step {job.state.step:6d}  held-out loss {loss:.4f}  {len(paths)} videos in {folder}")
