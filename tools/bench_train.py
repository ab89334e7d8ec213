#!/usr/bin/env python
"""Measure training steps with each option on and off, as ratios of one run.

    python tools/bench_train.py [--width 128 --size 256 --batch 4 --rounds 5] [--corpus VIDEOS]

On a CPU every round does a step of each variant in turn, so that a machine that slows down slows
all of them; on a GPU, whose memory is for one, they come one after another. What is printed is the
median and the spread of the ratio to the first variant. Memory is the peak that the GPU allocator
saw; without a GPU, the bytes that a forward pass keeps for the backward one. On a GPU FLOPs are
counted, those of recomputed activations too, and compared with a large matrix product in the same
precision. With --corpus a short run of the last variant on real videos follows, for the share of
the time that steps wait for clips.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, installed or not

from reducio_latents.train.batch import ClipName, PixelBatch  # noqa: E402
from reducio_latents.train.config import (  # noqa: E402
    AdversarialConfig,
    DataConfig,
    LogConfig,
    LossConfig,
    OptimisationConfig,
    TrainConfig,
)
from reducio_latents.train.loop import train  # noqa: E402
from reducio_latents.train.ranks import RunRanks  # noqa: E402
from reducio_latents.train.state import PRECISIONS, build_state, prepare_networks  # noqa: E402
from reducio_latents.train.step import Stepper, train_step  # noqa: E402
from reducio_latents.vae import ReducioVAEConfig  # noqa: E402

VARIANTS: dict[str, dict[str, object]] = {
    "fp32": {"precision": "fp32"},
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
        # The counter does not see into compiled graphs, and CPUs have no rate worth comparing with.
        if self.device.type == "cuda" and not self.config.train.compile:
            with FlopCounterMode(display=False) as counter:
                train_step(self.state, [self.batch], self.run)
            self.numbers.flops = counter.get_total_flops()

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


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the rate of a large matrix product, the best of ten."""
    n = 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(10):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - start_s))
    return best


def measure(configs: dict[str, TrainConfig], batch: PixelBatch, rounds: int) -> dict[str, Numbers]:
    """Step each of some variants in turn, `rounds` times; they are in memory together."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    variants = {name: Variant(config, device, batch) for name, config in configs.items()}
    for variant in variants.values():
        variant.warm_up()
    for _ in range(rounds):
        for variant in variants.values():
            variant.step()
    return {name: variant.numbers for name, variant in variants.items()}


def table_row(name: str, found: Numbers, first: Numbers, clips: int, dtype: torch.dtype) -> str:
    """Return a line of the table: a variant that steps `clips` at a time, against the first one."""
    ratios = [a / b for a, b in zip(first.times_s, found.times_s, strict=True)]
    time_s = statistics.median(found.times_s)
    share = "-"
    if found.flops:
        share = f"{found.flops / time_s / matmul_flops_per_s(torch.device('cuda'), dtype):.0%}"
    memory = f"{found.bytes / 2**20:8.0f} MiB {found.bytes / first.bytes:5.2f}"
    return f"{name:34} {clips / time_s:8.3f}  {spread(ratios):>20}  {memory}  {share:>6}"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):6.2f} ({min(values):.2f}-{max(values):.2f})"


def waiting_share(config: TrainConfig, corpus: str, workers: int) -> str:
    """Train a few steps on real videos; return what share of the time they waited."""
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

    sizes = dict.fromkeys(("width", "content_width", "decoder_width"), arguments.width)
    base = TrainConfig(
        model=ReducioVAEConfig(**sizes),
        data=DataConfig(size_px=arguments.size),
        loss=LossConfig(perceptual="none"),
        adversarial=AdversarialConfig(start_step=0),
    )
    side, count = arguments.size, arguments.batch
    frames = torch.randint(0, 256, (count, 16, side, side, 3), dtype=torch.uint8)
    batch = PixelBatch(frames, tuple(range(count)), (ClipName("random", 0.0),) * count)

    names = arguments.variants.split(",")
    what = "peak" if has_gpu else "kept for backward"
    name_of = torch.cuda.get_device_name() if has_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name_of}; width {arguments.width}, {count} x 16x{side}x{side}; torch {torch.__version__}"
    )
    head = f"{'variant':34} {'clips/s':>8}  {'speed, ratio':>20}  {what}, ratio"
    print(f"{head}  of matmul rate", flush=True)
    configs = {
        # VARIANTS holds keywords of several types.
        name: replace(base, train=OptimisationConfig(**VARIANTS[name], batch_size=count))  # type: ignore[arg-type]
        for name in names
    }
    first: Numbers | None = None
    for group in [[name] for name in names] if has_gpu else [names]:
        try:
            found = measure({name: configs[name] for name in group}, batch, arguments.rounds)
        except torch.OutOfMemoryError:
            print(f"{group[0]:34} does not fit in memory", flush=True)
            continue
        for name, numbers in found.items():
            first = first or numbers
            dtype = PRECISIONS[configs[name].train.precision]
            print(table_row(name, numbers, first, count, dtype), flush=True)
    if arguments.corpus:
        print(waiting_share(configs[names[-1]], arguments.corpus, arguments.workers))


if __name__ == "__main__":
    main()
