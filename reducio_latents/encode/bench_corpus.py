"""A whole run over videos against the loop that most scripts have: decode, encode, save, again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from reducio_latents.autoencoders import load_autoencoder
from reducio_latents.core.geometry import Bucket
from reducio_latents.corpus import corpus_root
from reducio_latents.encode.bench import naive
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.run import encode_corpus
from reducio_latents.encode.shards import BUSY
from reducio_latents.errors import VideoError
from reducio_latents.files import open_files
from reducio_latents.store import Store
from reducio_latents.store.plan import Plan
from reducio_latents.video import get_backend
from reducio_latents.video.pixels import fit_frame


@dataclass(frozen=True)
class RunComparison:
    """Seconds for the same clips, planning left out, and where those of a run went."""

    clips: int
    naive_s: float
    run_s: float
    stages: Mapping[str, float]
    """Seconds of the encoding thread by stage."""
    busy_s: float | None
    """Seconds of the GPU; None on a CPU."""

    def __str__(self) -> str:
        total = sum(self.stages.values())
        shares = ", ".join(f"{name} {s / total:.0%}" for name, s in self.stages.items())
        busy = "" if self.busy_s is None else f"; GPU busy {self.busy_s / self.run_s:.0%}"
        return (
            f"{self.clips} clips: naive loop {self.naive_s:.1f} s, a run {self.run_s:.1f} s "
            f"({self.naive_s / self.run_s:.2f} x){busy}. The encoding thread: {shares}."
        )


def compare_runs(corpus: str, options: EncodeOptions) -> RunComparison:
    """Encode `corpus` by a run and by the naive loop, into folders that are removed again."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        report = encode_corpus(corpus, store, options)
        plan = Store(open_files(store)).plan
        begin = time.perf_counter()
        clips = _naive_run(plan, corpus, options, Path(folder))
        naive_s = time.perf_counter() - begin
    stages = {name: s for name, s in report.stages.items() if name != BUSY}
    return RunComparison(clips, naive_s, sum(stages.values()), stages, report.stages.get(BUSY))


def _naive_run(plan: Plan, corpus: str, options: EncodeOptions, folder: Path) -> int:
    """Decode, encode and save clip by clip; return how many there were."""
    autoencoder = load_autoencoder(
        options.model,
        options.weights,
        device=options.torch_device,
        parts="encoder",
        trust_config=options.trust_config,
    )
    backend, root = (
        get_backend(options.video_backend, deinterlace=options.deinterlaces),
        corpus_root(corpus, options.root),
    )
    count = 0
    for shard in plan.shards():
        bucket = Bucket.parse(shard.bucket)
        for clip in plan.shard_clips(shard.bucket, shard.shard).to_pylist():
            source, start_s = plan.source(clip["video"], root), clip["start_s"]
            found = next(
                backend.read_clips(
                    source, [start_s], frames=bucket.frames, rate_fps=options.clip.rate_fps
                )
            )
            count += 1
            if isinstance(found, VideoError):
                continue
            fitted = [torch.from_numpy(fit_frame(f, bucket, options.resize)) for f in found.frames]
            (mean,) = naive(autoencoder, torch.stack(fitted)[None])
            torch.save(mean, folder / f"{clip['clip_id']}.pt")
    return count
