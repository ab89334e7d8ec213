#!/usr/bin/env python
"""Measure training steps with each option on and off, as ratios of one run.

    python tools/bench_train.py [--width 128 --size 256 --batch 4 --rounds 5] [--corpus VIDEOS]

On a CPU every round does a step of each variant in turn, so that a machine that slows down slows
all of them; on a GPU, whose memory is for one, they come one after another. What is printed is the
median and the spread of the ratio to the first variant. Memory is the peak that the GPU allocator
saw; without a GPU, the bytes that a forward pass keeps for the backward one. FLOPs are counted,
those of recomputed activations too, and compared with a large matrix product in the same precision.
With --corpus a short run of the last variant on real videos follows, for the share of
the time that steps wait for clips.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, installed or not

from reducio_latents.encode.bench import matmul_flops  # noqa: E402
from reducio_latents.train.batch import ClipName, PixelBatch  # noqa: E402
from reducio_latents.train.config import (  # noqa: E402
    AdversarialConfig,
    DataConfig,
    LogConfig,
    LossConfig,
    OptimisationConfig,
    TrainConfig,
)
from reducio_latents.train.ranks import RunRanks  # noqa: E402
from reducio_latents.train.state import PRECISIONS, build_state, prepare_networks  # noqa: E402
from reducio_latents.train.step import Stepper, train_step  # noqa: E402
from reducio_latents.vae import ReducioVAEConfig  # noqa: E402

VARIANTS: dict[str, dict[str, object]] = {
    "fp32": {"precision": "fp32"},
    "fp32 channels_last checkpointing": {
        "precision": "fp32",
        "channels_last": True,
        "checkpointing": True,
    },
    "bf16": {"precision": "bf16"},
    "bf16 channels_last": {"precision": "bf16", "channels_last": True},
    "bf16 checkpointing": {"precision": "bf16", "checkpointing": True},
    "bf16 channels_last checkpointing": {
        "precision": "bf16",
        "channels_last": True,
        "checkpointing": True,
    },
    "bf16 compile": {"precision": "bf16", "compile": True},
}


@dataclass
class Numbers:
    """What was measured of a variant."""

    times_s: list[float] = field(default_factory=list)
    bytes: int = 0
    flops: int = 0
    """Of a step; 0 where they are not counted."""
    recomputed: float = 0.0
    """Share of these that checkpointing does a second time."""


@dataclass
class Variant:
    """One way to train, ready to step."""

    config: TrainConfig
    device: torch.device
    batch: PixelBatch
    numbers: Numbers = field(default_factory=Numbers)

    def __post_init__(self) -> None:
        self.ranks = RunRanks(0, 1, self.device)
        self.state = build_state(self.config, self.device)
        networks = prepare_networks(self.state, self.config.train, self.ranks)
        self.run = Stepper(self.config, networks, None, self.ranks)

    def warm_up(self) -> None:
        """Step until nothing is compiled or chosen any more, then measure what is not time."""
        train_step(self.state, [self.batch], self.run)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            train_step(self.state, [self.batch], self.run)
            self.numbers.bytes = torch.cuda.max_memory_allocated()
        else:
            self.numbers.bytes = self._kept_bytes()
        if not self.config.train.compile:  # the counter does not see into compiled graphs
            self.numbers.flops = self.count_flops()

    def count_flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            train_step(self.state, [self.batch], self.run)
        return int(counter.get_total_flops())

    def _kept_bytes(self) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            train_step(self.state, [self.batch], self.run)
        return sum(kept.values())

    def step(self) -> None:
        self._wait()
        start_s = time.perf_counter()
        train_step(self.state, [self.batch], self.run)
        self._wait()
        self.numbers.times_s.append(time.perf_counter() - start_s)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(
    configs: dict[str, TrainConfig], batch: PixelBatch, rounds: int, device: torch.device
) -> dict[str, Numbers]:
    """Step each of some variants in turn, `rounds` times; they are in memory together."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    variants = {name: Variant(config, device, batch) for name, config in configs.items()}
    for variant in variants.values():
        variant.warm_up()
        settings = variant.config.train
        if settings.checkpointing and variant.numbers.flops:
            whole = replace(variant.config, train=replace(settings, checkpointing=False))
            once = len(batch.clips) * Variant(whole, device, first_clip(batch)).count_flops()
            variant.numbers.recomputed = 1 - once / variant.numbers.flops
    for _ in range(rounds):
        for variant in variants.values():
            variant.step()
    return {name: variant.numbers for name, variant in variants.items()}


def first_clip(batch: PixelBatch) -> PixelBatch:
    """Return a batch that fits in memory without checkpointing."""
    return PixelBatch(batch.frames_BTHWC[:1], batch.seeds[:1], batch.clips[:1])


HEADER = (
    "| | clips/s | speed, ratio | {memory}, MiB | ratio | of matmul | recomputed |\n"
    "|---|--:|--:|--:|--:|--:|--:|"
)


def table_row(name: str, found: Numbers, first: Numbers, clips: int, matmul: float) -> str:
    """Return a line of the table: a variant that steps `clips` at a time, against the first one."""
    ratios = [a / b for a, b in zip(first.times_s, found.times_s, strict=True)]
    time_s = statistics.median(found.times_s)
    share = f"{found.flops / time_s / matmul:.0%}" if found.flops else ""
    again = f"{found.recomputed:.0%}" if found.recomputed else ""
    return (
        f"| {name} | {clips / time_s:.3g} | {spread(ratios)} | {found.bytes / 2**20:.0f} | "
        f"{found.bytes / first.bytes:.2f} | {share} | {again} |"
    )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def print_table(
    names: Sequence[str],
    base: TrainConfig,
    batch: PixelBatch,
    rounds: int,
    device: torch.device,
    deadline: float = math.inf,
) -> None:
    """Measure variants and print each as it comes; by `time.monotonic`, none after the deadline."""
    on_gpu = device.type == "cuda"
    print(HEADER.format(memory="peak" if on_gpu else "kept for backward"), flush=True)
    count = len(batch.clips)
    configs = {
        # VARIANTS holds keywords of several types.
        name: replace(base, train=OptimisationConfig(**VARIANTS[name], batch_size=count))  # type: ignore[arg-type]
        for name in names
    }
    used = {PRECISIONS[config.train.precision] for config in configs.values()}
    matmul = {dtype: matmul_flops(device, dtype, 0.5) for dtype in used}
    first: Numbers | None = None
    for group in [[name] for name in names] if on_gpu else [list(names)]:
        if time.monotonic() > deadline:
            print(f"\nskipped for want of time: {', '.join(group)}")
            continue
        try:
            found = measure({name: configs[name] for name in group}, batch, rounds, device)
        except torch.OutOfMemoryError:
            print(f"| {group[0]} does not fit in memory | | | | | | |", flush=True)
            continue
        for name, numbers in found.items():
            first = first or numbers
            dtype = PRECISIONS[configs[name].train.precision]
            print(table_row(name, numbers, first, count, matmul[dtype]), flush=True)


def base_config(width: int, size_px: int) -> TrainConfig:
    """Return what all variants train: every loss but LPIPS, discriminators from the start."""
    return TrainConfig(
        model=ReducioVAEConfig(width=width, content_width=width, decoder_width=width),
        data=DataConfig(size_px=size_px),
        loss=LossConfig(perceptual="none"),
        adversarial=AdversarialConfig(start_step=0),
    )


def made_up_batch(clips: int, size_px: int) -> PixelBatch:
    frames = torch.randint(0, 256, (clips, 16, size_px, size_px, 3), dtype=torch.uint8)
    return PixelBatch(frames, tuple(range(clips)), (ClipName("random", 0.0),) * clips)


def waiting_share(config: TrainConfig, corpus: str, workers: int) -> str:
    """Train a few steps on real videos; return what share of the time they waited."""
    from reducio_latents.train.loop import train

    data = DataConfig(
        corpus=corpus, size_px=config.data.size_px, workers=workers, validation_share=0.0
    )
    steps = replace(config.train, steps=20)
    short = replace(
        config, data=data, train=steps, log=LogConfig(every_steps=10, tensorboard=False)
    )
    with tempfile.TemporaryDirectory() as folder:
        train(short, Path(folder))
        with (Path(folder) / "train.csv").open(newline="") as file:
            last = list(csv.DictReader(file))[-1]
    return (
        f"with {workers} decode workers: {float(last['clips_per_s']):.2f} clips/s, "
        f"{float(last['waiting_share']):.0%} of the time waiting for clips"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--width", type=int, default=128 if has_gpu else 16)
    parser.add_argument("--size", type=int, default=256 if has_gpu else 64, help="Pixels.")
    parser.add_argument("--batch", type=int, default=4 if has_gpu else 1, help="Clips a step.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="Comma-separated.")
    parser.add_argument("--corpus", help="Videos, to measure waiting too.")
    parser.add_argument("--workers", type=int, default=DataConfig().workers)
    arguments = parser.parse_args()

    device = torch.device("cuda" if has_gpu else "cpu")
    name_of = torch.cuda.get_device_name() if has_gpu else f"CPU, {torch.get_num_threads()} threads"
    size = f"{arguments.batch} x 16x{arguments.size}x{arguments.size}"
    print(f"{name_of}; width {arguments.width}, {size}; torch {torch.__version__}\n")
    base = base_config(arguments.width, arguments.size)
    batch = made_up_batch(arguments.batch, arguments.size)
    names = arguments.variants.split(",")
    print_table(names, base, batch, arguments.rounds, device)
    if arguments.corpus:
        settings = OptimisationConfig(**VARIANTS[names[-1]], batch_size=arguments.batch)  # type: ignore[arg-type]
        last = replace(base, train=settings)
        print(waiting_share(last, arguments.corpus, arguments.workers))


if __name__ == "__main__":
    main()
