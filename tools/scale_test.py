"""Time and memory of what grows with a store: scan of its commits, index, and the run's end.

    python tools/scale_test.py [--clips 100000 1000000] [--shard-rows 512]

Makes the plan of a listing that is made up and commits of the column motion without rows, then
measures, as a resumed run would go through them: plan, resume scan, index from nothing, and again.
Prints each size and the slope between sizes: 1.0 is linear.
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.geometry import Bucket
from reducio_latents.corpus import CorpusVideo
from reducio_latents.corpus.build import plan_part
from reducio_latents.corpus.probe import ProbeRecord
from reducio_latents.files import Buffer, LocalFiles
from reducio_latents.files.protocol import joined
from reducio_latents.files.source import VideoSource
from reducio_latents.store.commit import Commit, ShardKey, commit_path, list_commits
from reducio_latents.store.index import build_index, write_index
from reducio_latents.store.plan import Plan, PlanSpec, read_plan, write_part

CLIPS_PER_VIDEO = 10


def listing(clips: int) -> tuple[list[CorpusVideo], dict[str, ProbeRecord]]:
    videos, records = [], {}
    for number in range(clips // CLIPS_PER_VIDEO):
        name = f"{number // 1000:05d}/{number:08d}.mp4"
        videos.append(CorpusVideo(name, VideoSource(f"/corpus/{name}")))
        records[name] = ProbeRecord(
            bytes=1 << 20,
            sha256=f"{number:064x}",
            codec="h264",
            width=1280,
            height=720,
            rate_fps=30.0,
            duration_s=CLIPS_PER_VIDEO + 0.05,
            frames=30 * CLIPS_PER_VIDEO,
        )
    return videos, records


def write_commits(root: Path, plan: Plan) -> None:
    """Write a commit for every shard, without waiting for the disk each time."""
    for shard in plan.shards():
        key = ShardKey(shard.bucket, shard.shard)
        commit = Commit(
            bucket=shard.bucket,
            column="motion",
            shard=shard.shard,
            rows=shard.rows,
            fingerprint="0" * 64,
            file=f"{shard.bucket}/motion/c/{shard.shard}/0/0/0/0",
            file_bytes=shard.rows * 16384,
            file_sha256="0" * 64,
            row_crc32c=tuple(range(1 << 30, (1 << 30) + shard.rows)),
        )
        _Unsynced(root).write(commit_path(key, "motion"), commit.to_json())
        assert (root / commit_path(key, "motion")).is_file()


class _Unsynced(LocalFiles):
    def write(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(joined(data))


def measure(clips: int, shard_rows: int) -> dict[str, float]:
    """Return seconds by step for a store of so many clips."""
    seconds: dict[str, float] = {}

    def step(name: str, work: Callable[[], object]) -> object:
        start = time.process_time()
        found = work()
        seconds[name] = time.process_time() - start
        return found

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        files = LocalFiles(root)
        videos, records = listing(clips)
        spec = PlanSpec(clip=ClipSpec(), buckets=(Bucket(16, 256, 256),), shard_rows=shard_rows)
        part = plan_part(videos, records, spec)
        step("plan", lambda: plan_part(videos, records, spec))
        step("write plan", lambda: write_part(files, 0, part))
        write_commits(root, Plan.of(part))

        def scan() -> int:
            plan = read_plan(files)
            assert plan is not None
            done = set(list_commits(files))
            wanted = {("motion", ShardKey(s.bucket, s.shard)) for s in plan.shards()}
            return len(wanted - done)

        assert step("resume scan", scan) == 0
        step("index from nothing", lambda: write_index(files, build_index(files)))
        step("index again", lambda: build_index(files))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--shard-rows", type=int, default=512)
    arguments = parser.parse_args()
    before: tuple[int, dict[str, float]] | None = None
    for clips in sorted(arguments.clips):
        found = measure(clips, arguments.shard_rows)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{clips:,} clips: peak {peak:.0f} MiB")
        for name, seconds in found.items():
            slope = ""
            if before is not None and before[1][name] > 0.01:
                power = math.log(seconds / before[1][name]) / math.log(clips / before[0])
                slope = f", grows as clips^{power:.2f}"
            print(f"  {name}: {seconds:.2f} s CPU{slope}")
        before = (clips, found)


if __name__ == "__main__":
    main()
