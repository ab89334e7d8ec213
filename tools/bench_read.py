#!/usr/bin/env python
"""Measure how fast shuffled batches come out of a store, beside the limits and other formats.

    python tools/bench_read.py [--size 256 --batch-size 256 --rounds 7] [--text] [--only ours]

Every reader gets the same clips of float16 moments (and captions, with --text) and gives batches of
them, shuffled, as tensors; a first pass checks that it gives each clip once. Then rounds go through
all readers in random order, so that a machine that slows down slows all of them; a round is one
epoch, or --seconds of it. Printed are medians: clips per second once the first batch is there, CPU
microseconds a clip (worker processes included), and both against the gather from one flat
memory-mapped file. Files are in the page cache. Formats whose library is not installed are skipped
with a note.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, installed or not

from bench_read_clips import (  # noqa: E402
    DEFAULT_CLIPS,
    Clips,
    Reader,
    Sample,
    numbers_of,
    write_store,
)

from reducio_latents.dataset import LatentDataset, LatentLoader  # noqa: E402


def write_flat(clips: Clips, folder: Path) -> Path:
    """Write the moments one after another, and nothing else."""
    path = folder / "flat.bin"
    if path.exists():
        return path
    with path.open("wb") as file:
        for _, block in clips.blocks():
            file.write(block.data)
    return path


def pread(clips: Clips, folder: Path) -> Reader:
    """Return the limit: the bytes in order, in pieces of a batch, not even made into tensors."""
    path = write_flat(clips, folder)
    size = clips.batch_size * clips.row_bytes

    def epoch() -> Iterator[Sample]:
        descriptor = os.open(path, os.O_RDONLY)
        buffer = np.empty((clips.batch_size, *clips.shape), np.float16)
        tensor = torch.from_numpy(buffer)
        try:
            for offset in range(0, clips.count * clips.row_bytes - size + 1, size):
                os.preadv(descriptor, [buffer.data], offset)
                yield tensor, []
        finally:
            os.close(descriptor)

    return epoch


class FlatFile(IterableDataset[Sample]):
    """Rows of one memory-mapped file, gathered by number."""

    def __init__(self, path: Path, clips: Clips) -> None:
        self.path, self.clips = path, clips
        self.rows: NDArray[np.float16] | None = None

    def __iter__(self) -> Iterator[Sample]:
        clips, info = self.clips, torch.utils.data.get_worker_info()
        if self.rows is None:  # kept, as our reader keeps its maps: mapping anew costs page faults
            self.rows = np.memmap(self.path, np.float16, "r", shape=(clips.count, *clips.shape))
        rows = self.rows
        order = np.random.default_rng(0).permutation(clips.count)
        step = clips.batch_size
        starts = range(0, clips.count - step + 1, step)
        for start in starts if info is None else starts[info.id :: info.num_workers]:
            chosen = order[start : start + step]
            moments = torch.from_numpy(rows[chosen])
            yield moments, [clips.caption(n) for n in chosen.tolist()] if clips.text else []


def memmap(clips: Clips, folder: Path) -> Reader:
    dataset = FlatFile(write_flat(clips, folder), clips)
    return lambda: iter(dataset)


def memmap_workers(clips: Clips, folder: Path) -> Reader:
    dataset = FlatFile(write_flat(clips, folder), clips)
    return lambda: iter(DataLoader(dataset, batch_size=None, num_workers=2))


def ours(
    container: str, load: Callable[[LatentDataset], Any] = iter, **options: Any
) -> Callable[[Clips, Path], Reader]:
    """Return how `LatentDataset` reads a store of a container, through some loader."""

    def open_reader(clips: Clips, folder: Path) -> Reader:
        path = folder / container
        if not path.exists():
            write_store(clips, folder, container)
        columns = ("motion", "caption") if clips.text else ("motion",)
        chosen = {"latents": "moments", **options}
        dataset = LatentDataset(path, columns, batch_size=clips.batch_size, **chosen)
        loader = load(dataset) if load is not iter else dataset

        name = "motion" if chosen["latents"] == "moments" else "latents"

        def epoch() -> Iterator[Sample]:
            for batch in loader:
                yield batch[name], batch.get("caption", [])

        return epoch

    return open_reader


def in_one_thread(dataset: LatentDataset) -> LatentLoader:
    return LatentLoader(dataset, threads=1, prefetch=2)


def in_workers(dataset: LatentDataset) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=None, num_workers=2)


def readers() -> dict[str, Callable[[Clips, Path], Reader]]:
    """Return every reader by name; the first two are the limits."""
    from bench_read_peers import PEERS

    return {
        "pread in order, no shuffle": pread,
        "memmap gather": memmap,
        "memmap gather, 2 workers": memmap_workers,
        "ours, Zarr": ours("zarr"),
        "ours, Zarr, LatentLoader": ours("zarr", LatentLoader),
        "ours, Zarr, LatentLoader, 1 thread": ours("zarr", in_one_thread),
        "ours, Zarr, 2 workers": ours("zarr", in_workers),
        "ours, WebDataset tar": ours("webdataset"),
        MOMENTS: ours("zarr", checksums="full"),
        SAMPLED: ours("zarr", latents="sample"),
        **PEERS,
    }


BASELINE = "memmap gather"
UNORDERED = ("pread in order, no shuffle",)
MOMENTS, SAMPLED = "ours, Zarr, every row's checksum", "ours, Zarr, sampled latents"
NOT_ROWS = (SAMPLED,)
"""Gives latents, in which no number can be found."""


@dataclass
class Measured:
    """What one reader did."""

    epoch: Reader
    first_batch_s: float
    clips_s: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def open_reader(
    name: str, make: Callable[[Clips, Path], Reader], clips: Clips, folder: Path
) -> Measured:
    """Write the clips for a reader, and check one epoch of it."""
    make(clips, folder)  # writes its files
    start = time.perf_counter()
    epoch = make(clips, folder)
    batches = epoch()
    next(batches)
    first_s = time.perf_counter() - start
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    seen: list[int] = []
    for moments, captions in epoch():
        assert moments.shape[0] == clips.batch_size
        numbers = numbers_of(moments) if name not in NOT_ROWS else []
        assert not captions or captions == [clips.caption(n) for n in numbers] or not numbers
        seen += numbers
    if name not in NOT_ROWS:
        assert len(set(seen)) == len(seen), f"{name} gives clips twice"
        assert len(seen) > clips.count - clips.batch_size * 4, f"{name} gives {len(seen)} clips"
    return Measured(epoch, first_s)


def measure(reader: Measured, clips: Clips, seconds: float) -> None:
    """Read one epoch, or some seconds of it; the clock starts when the first batch is there."""
    begin_cpu, count = cpu_seconds(), 0
    batches = reader.epoch()
    next(batches)
    begin = time.perf_counter()
    for moments, _ in islice(batches, clips.count // clips.batch_size):
        count += len(moments)
        if time.perf_counter() - begin > seconds:
            break
    wall = time.perf_counter() - begin
    del batches  # worker processes end, and their time counts
    reader.clips_s.append(count / wall)
    reader.cpu_us.append(1e6 * (cpu_seconds() - begin_cpu) / (count + clips.batch_size))


def print_table(found: dict[str, Measured], skipped: dict[str, str]) -> None:
    base_rate = statistics.median(found[BASELINE].clips_s)
    base_cpu = statistics.median(found[BASELINE].cpu_us)
    print("| reader | clips/s | of memmap | CPU us/clip | of memmap | first batch, ms |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, reader in found.items():
        rate, cpu = statistics.median(reader.clips_s), statistics.median(reader.cpu_us)
        print(
            f"| {name} | {rate:,.0f} | {rate / base_rate:.2f} | {cpu:.1f} | {cpu / base_cpu:.2f} "
            f"| {1000 * reader.first_batch_s:.0f} |"
        )
    if MOMENTS in found and SAMPLED in found:
        ratios = zip(found[SAMPLED].cpu_us, found[MOMENTS].cpu_us, strict=True)
        ratio = statistics.median(sampled / moments for sampled, moments in ratios)
        print(f"\nA draw and its moments cost {ratio:.1f} times the CPU of the moments alone.")
    for name, why in skipped.items():
        print(f"{name}: skipped, {why}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", type=int, choices=sorted(DEFAULT_CLIPS), default=256)
    parser.add_argument("--clips", type=int, help="how many; a multiple of 512")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="longest round of a reader")
    parser.add_argument("--text", action="store_true", help="read captions, too")
    parser.add_argument("--only", default="", help="readers whose names contain one of these; A|B")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder otherwise")
    arguments = parser.parse_args()
    clips = Clips(
        arguments.size,
        arguments.clips or DEFAULT_CLIPS[arguments.size],
        arguments.batch_size,
        arguments.text,
    )
    wanted = [part for part in arguments.only.split("|") if part]
    chosen = {
        name: make
        for name, make in readers().items()
        if not wanted or name in (*UNORDERED, BASELINE) or any(part in name for part in wanted)
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        run(chosen, clips, Path(name), arguments.rounds, arguments.seconds)


def run(
    chosen: dict[str, Callable[[Clips, Path], Reader]],
    clips: Clips,
    folder: Path,
    rounds: int,
    seconds: float,
) -> None:
    found: dict[str, Measured] = {}
    skipped: dict[str, str] = {}
    for name, make in chosen.items():
        print(f"opening {name}", file=sys.stderr)
        try:
            found[name] = open_reader(name, make, clips, folder)
        except ImportError as err:
            skipped[name] = f"{err}"
    order = list(found.values())
    for number in range(rounds):
        random.Random(number).shuffle(order)  # nobody always follows the one who empties the caches
        for reader in order:
            measure(reader, clips, seconds)
    print(
        f"{clips.count:,} clips of {clips.row_bytes:,} bytes, batches of {clips.batch_size}, "
        f"{'with' if clips.text else 'without'} captions; medians of {rounds} rounds\n"
    )
    print_table(found, skipped)


if __name__ == "__main__":
    main()
