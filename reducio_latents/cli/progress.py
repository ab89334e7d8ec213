"""The bars of an encode run, and its last words."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click
from tqdm import tqdm

from reducio_latents.cli import show
from reducio_latents.cli.show import say_stopped
from reducio_latents.encode.progress import Progress

if TYPE_CHECKING:
    from reducio_latents.corpus.summary import PlanSummary
    from reducio_latents.encode import EncodeReport


class Bars(Progress):
    """A bar for probing, then one for clips with clips/s and time left. Says what it is told."""

    def __init__(self) -> None:
        self._probe: tqdm[NoReturn] | None = None
        self._clips: tqdm[NoReturn] | None = None
        self._failed = 0
        self._psnr: float | None = None
        self._begun_s = time.monotonic()
        self._spent: dict[str, float] = {}

    def probed(self, done: int, total: int) -> None:
        if self._probe is None:
            self._probe = _bar(total, "probe", "video")
        self._probe.update(done - self._probe.n)

    def planned(self, clips: int, done: int) -> None:
        self.close()
        self._clips = _bar(clips, "encode", "clip")
        self._begun_s = time.monotonic()
        # `initial` keeps what was stored before out of the rate.
        self._clips.initial = self._clips.n = done
        self._clips.refresh()

    def encoded(self, clips: int, failed: int) -> None:
        if self._clips is None:
            return
        self._failed += failed
        self._clips.set_postfix(self._shown(), refresh=False)
        self._clips.update(clips + failed)

    def _shown(self) -> dict[str, Any]:
        """Return what stands behind the bar."""
        passed_s = max(time.monotonic() - self._begun_s, 1e-9)
        shares = {what: f"{min(1, s / passed_s):.0%}" for what, s in self._spent.items()}
        failed = {"failed": self._failed} if self._failed else {}
        psnr = {} if self._psnr is None else {"psnr": f"{self._psnr:.2f} dB"}
        return {**shares, **failed, **psnr}

    def spent(self, stage: str, seconds: float) -> None:
        self._spent[stage] = self._spent.get(stage, 0.0) + seconds

    def checked(self, psnr: float) -> None:
        self._psnr = psnr

    def stopping(self, seconds: float) -> None:
        """Say that a request to stop was heard."""
        left = f"the shard in hand has {seconds:.0f} s to be finished; once more ends at once"
        click.echo(f"\nstopping: {left}", err=True)

    def close(self) -> None:
        for bar in (self._probe, self._clips):
            if bar is not None:
                bar.close()
        self._probe = self._clips = None


def _bar(total: int, what: str, unit: str) -> tqdm[NoReturn]:
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, file=sys.stderr)


@contextmanager
def encode_progress() -> Iterator[Bars]:
    """Show bars on the terminal while the block runs."""
    bars = Bars()
    try:
        yield bars
    finally:
        bars.close()


def print_report(report: EncodeReport, store: str) -> None:
    """Print what became of every video and clip, why, and what came out."""
    if report.share or report.signal:
        who = f"{report.share}: " if report.share else ""
        show.echo(f"{who}{report.clips.encoded} clips encoded, {report.clips.failed} failed")
    else:
        _print_whole(report, store)
    if report.signal:
        say_stopped(report.signal)
    if report.shards_left:
        left = f"{report.shards_left} shards are not done; run the same command again."
        show.echo(left, err=True)
    if report.exit_code == 3:
        too_many = f"more than --max-failed {report.max_failed:.0%}."
        show.echo(f"{report.failed_share:.0%} failed, {too_many}", err=True)


def _print_whole(report: EncodeReport, store: str) -> None:
    show.echo(f"videos  {report.videos}")
    show.echo(f"clips   {report.clips}")
    for what, reasons in (("skipped", report.skipped), ("failed", report.failed)):
        for reason, number in reasons.items():
            show.echo(f"  {what} {number}: {reason}")
    print_changes(report.captions_changed, report.videos_gone, updated=report.captions_updated)
    if report.failed:
        show.echo(f"  each one with its reason: {store}/errors.parquet")
    show.channels(report.statistics)
    if report.psnr is not None:
        show.echo(f"decoded on the spot: mean PSNR {report.psnr:.2f} dB")
    shares, busy = show.spent(report.stages, report.seconds)
    if shares and report.clips.encoded:
        rate = f"{report.clips.encoded / report.seconds:.2f} clips/s"
        took = ", ".join(filter(None, (show.duration(report.seconds), rate, busy)))
        show.echo(f"{took}; time went to: {shares}")


def print_changes(captions: int, gone: int, *, updated: bool = False) -> None:
    """Print what has changed in the corpus since it was planned."""
    if captions:
        rest = "were taken" if updated else "are not taken without --update-captions"
        show.echo(f"captions of {show.counted(captions, 'clip')} have changed: they {rest}")
    if gone:
        stay = "what is stored of them stays; `remove` takes it out"
        show.echo(f"{show.counted(gone, 'video')} of the store no longer in the corpus: {stay}")


def print_summary(summary: PlanSummary) -> None:
    """Print what a run would do."""
    for what, counts in (("videos", summary.counts.videos), ("clips", summary.counts.clips)):
        # One may be too short, a picture for which there is no bucket, or have spans of no times.
        rest = {name: n for name, n in counts.items() if name != "found"}
        rest = {"without a clip" if k == "too_short" else k: n for k, n in rest.items()}
        parts = ", ".join(f"{show.count(number)} {name}" for name, number in rest.items())
        show.echo(f"{what:<7} {show.count(counts['found'])} found: {parts}")
    if spans := summary.counts.spans:
        show.echo(f"spans   {show.count(spans['found'])} found")
        for why, number in list(spans.items())[1:]:
            show.echo(f"  {show.count(number)} without a clip: {why}")
    if shots := summary.counts.shots:
        show.echo(f"shots   {show.count(shots['found'])} found")
        for why, number in list(shots.items())[1:]:
            show.echo(f"  not known of {show.counted(number, 'video')}: {why}")
    show.echo(f"hours   {summary.video_hours:.2f} of video, {summary.clip_hours:.2f} of clips")
    for bucket in summary.buckets:
        if bucket.clips:
            clips = f"{show.count(bucket.clips)} clips in {show.count(bucket.shards)} shards"
            show.echo(f"bucket  {bucket.bucket}: {clips}, about {show.size(bucket.bytes or 0)}")
    for reason, number in summary.reasons.items():
        show.echo(f"  {show.count(number)}: {reason}")
    print_changes(summary.captions_changed, summary.videos_gone)
    show.echo(f"store   about {show.size(summary.bytes or 0)}")
