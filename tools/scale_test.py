"""CPU and memory of what grows with a corpus: listing, planning, commits, index, opening.

    python tools/scale_test.py [--clips 1000000 10000000] [--form videos spans] [--shard-rows 512]

The corpus is a table that is made up: 10 clips a video, each video with a caption and three values
(`videos`), or 30, each clip a row of its own with times, caption and value (`spans`). Probing is
simulated: the table says how long a video is, and nothing is decoded. All else is what a run does,
but the commits, of one column, are of no rows. Each step has a process of its own. Prints a table
in Markdown; what 100 million take is the straight line through the two largest sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from reducio_latents.core.geometry import Bucket
from reducio_latents.corpus import CorpusVideo, list_corpus, planning
from reducio_latents.corpus.probe import ProbeRecord
from reducio_latents.encode.finish import make_report
from reducio_latents.encode.job import Job
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.prepare import Planned, make_plan
from reducio_latents.files import Buffer, LocalFiles
from reducio_latents.files.protocol import joined
from reducio_latents.files.source import VideoSource
from reducio_latents.store import whole
from reducio_latents.store.commit import Commit, ShardKey, clips_sha256, commit_path
from reducio_latents.store.container import array_rows
from reducio_latents.store.index import build_index, write_index
from reducio_latents.store.meta import ColumnMeta, StoreMeta
from reducio_latents.store.plan import Plan, read_plan
from reducio_latents.store.writer import StoreWriter

CLIPS_PER_VIDEO, SPANS_PER_VIDEO = 10, 30
ADDED = 1000
GOAL = 100_000_000
BUCKET = Bucket(16, 256, 256)
CAPTION = "number {} of those who walk along a street in the rain, seen from above"
Measured = tuple[float, float]
"""Seconds of CPU, and the most MiB that were resident."""


class Unsynced(LocalFiles):
    """Files that do not wait for the disk."""

    def write(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(joined(data))


def write_table(path: Path, form: str, videos: int) -> None:
    with path.open("w") as file:
        if form == "videos":
            file.write("path,caption,seconds,aesthetic score,motion score\n")
        else:
            file.write("path,start,end,caption,aesthetic score\n")
        for number in range(videos):
            name = f"{number // 1000:05d}/{number:08d}.mp4"
            if form == "videos":
                text, scores = CAPTION.format(number), f"{number % 70 / 10},{number % 13}"
                file.write(f'{name},"{text}",{CLIPS_PER_VIDEO}.05,{scores}\n')
                continue
            for clip in range(SPANS_PER_VIDEO):
                text = CAPTION.format(SPANS_PER_VIDEO * number + clip)
                file.write(f'{name},{clip},{clip + 1.01},"{text}",{(number + clip) % 70 / 10}\n')


def simulated(videos: Sequence[CorpusVideo], *_: object) -> Iterator[ProbeRecord]:
    for video in videos:
        yield ProbeRecord(
            bytes=1 << 20,
            sha256=hashlib.sha256(video.video.encode()).hexdigest(),
            codec="h264",
            width=1280,
            height=720,
            rate_fps=30.0,
            duration_s=float(video.extra.get("seconds", SPANS_PER_VIDEO + 0.05)),
            frames=30 * CLIPS_PER_VIDEO,
        )


class Corpus:
    """A table and its store."""

    def __init__(self, folder: Path, shard_rows: int) -> None:
        self.table, self.files = folder / "clips.csv", LocalFiles(folder / "store")
        self.options = EncodeOptions(shard_rows=shard_rows, columns=("motion",))

    def list(self) -> None:
        list_corpus(self.table)

    def plan(self) -> Planned:
        """List, plan and write what the store does not have: what a run does before all else."""
        vars(planning)["probe_videos"] = simulated
        return make_plan(self.table, self.files, self.options, [BUCKET])

    def stored(self) -> Plan:
        plan = read_plan(self.files)
        assert plan is not None
        return plan

    def writer(self) -> StoreWriter:
        motion = ColumnMeta(
            kind="array",
            content="moments",
            encoder="none",
            config={},
            row_shapes={BUCKET.name: (32, 4, 8, 8)},
            final={"rule": "layer_norm", "eps": 1e-5},
        )
        rows = self.options.shard_rows
        meta = StoreMeta(shard_rows=rows, buckets=(BUCKET.name,), columns={"motion": motion})
        return StoreWriter.open(self.files, meta, array_rows(self.stored().shards(), rows))

    def job(self) -> Job:
        somewhere = VideoSource("/video.mp4")
        return Job(self.options, Planned(lambda _: somewhere, self.stored()), (), self.writer())

    def todo(self) -> None:
        assert len(self.job().todo()) == len(self.stored().shards())

    def commit(self) -> None:
        """Write a commit for every shard."""
        plan, files = self.stored(), Unsynced(self.files.root)
        fingerprint = self.writer().meta.columns["motion"].fingerprint
        for shard in plan.shards():
            key = ShardKey(shard.bucket, shard.shard)
            ids = plan.shard_clips(*key, ["clip_id"])["clip_id"].to_pylist()
            commit = Commit(
                bucket=shard.bucket,
                column="motion",
                shard=shard.shard,
                rows=shard.rows,
                fingerprint=fingerprint,
                file=f"{shard.bucket}/motion/c/{shard.shard}/0/0/0/0",
                file_bytes=shard.rows * 16384,
                file_sha256="0" * 64,
                row_crc32c=tuple(range(1 << 30, (1 << 30) + shard.rows)),
                clips_sha256=clips_sha256(ids),
            )
            files.write(commit_path(key, "motion"), commit.to_json())

    def scan(self) -> None:
        assert not self.job().todo()

    def end(self) -> None:
        job = self.job()
        outcome = whole.gather(job.writer)
        plan, fresh = job.planned.plan, set(job.shards())
        whole.finish(job.writer, plan, whole.stored_counts(plan, outcome), outcome)
        make_report(job, fresh, outcome)

    def index(self) -> None:
        write_index(self.files, build_index(self.files, use_cache=False))

    def open(self) -> None:
        from reducio_latents import LatentDataset

        assert len(LatentDataset(self.files.root, ("motion",), batch_size=64))


def measure(form: str, clips: int, shard_rows: int) -> dict[str, Measured]:
    """Return what each step takes for a corpus of so many clips."""
    found: dict[str, Measured] = {}
    videos = clips // (CLIPS_PER_VIDEO if form == "videos" else SPANS_PER_VIDEO)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Corpus(Path(scratch), shard_rows)
        write_table(corpus.table, form, videos)

        def step(name: str, work: Callable[[], object]) -> None:
            found[name] = in_a_process(work)
            print(f"  {name}: {found[name][0]:.1f} s, {found[name][1]:.0f} MiB", flush=True)

        step("imports", int)
        step("list", corpus.list)
        step("list, plan, write the plan", corpus.plan)
        step("the same again", corpus.plan)
        step("what is to do, of a new store", corpus.todo)
        in_a_process(corpus.commit)
        step("what is to do, when all is done", corpus.scan)
        step("index from nothing", corpus.index)
        step("index, counts and reports at a run's end", corpus.end)
        step("open `LatentDataset`", corpus.open)
        write_table(corpus.table, form, videos + ADDED)
        step(f"{ADDED:,} more videos: list, plan, write", corpus.plan)
    return found


def in_a_process(work: Callable[[], object]) -> Measured:
    context = multiprocessing.get_context("spawn")
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(work, writing))
    process.start()
    writing.close()
    found: Measured = reading.recv()
    process.join()
    return found


def _measured(work: Callable[[], object], result: Connection) -> None:
    begun = time.process_time()
    work()
    # Not ru_maxrss, which begins at what the parent has.
    most = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    result.send((time.process_time() - begun, int(most[1]) / 1024 if most else math.nan))


def print_table(form: str, by_size: Mapping[int, Mapping[str, Measured]]) -> None:
    sizes = sorted(by_size)
    heads = [f"{size:,} clips" for size in sizes] + ([f"{GOAL:,}, by the slope"] * (len(sizes) > 1))
    print(f"\n| {form} | " + " | ".join(heads) + " |\n|---|" + "--:|" * len(heads))
    for name in by_size[sizes[0]]:
        cells = ["{:.1f} s, {:,.0f} MiB".format(*by_size[size][name]) for size in sizes]
        if len(sizes) > 1:
            small, large = (by_size[size][name] for size in sizes[-2:])
            ends = [
                more + max(0.0, more - less) / (sizes[-1] - sizes[-2]) * (GOAL - sizes[-1])
                for less, more in zip(small, large, strict=True)
            ]
            cells.append(f"{ends[0]:,.0f} s, {ends[1] / 1024:,.1f} GiB")
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--form", nargs="+", default=["videos"], choices=["videos", "spans"])
    parser.add_argument("--shard-rows", type=int, default=512)
    arguments = parser.parse_args()
    for form in arguments.form:
        by_size = {}
        for clips in sorted(arguments.clips):
            print(f"{form}, {clips:,} clips:")
            by_size[clips] = measure(form, clips, arguments.shard_rows)
        print_table(form, by_size)


if __name__ == "__main__":
    main()
