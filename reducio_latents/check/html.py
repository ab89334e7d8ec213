"""The report as one HTML file that opens offline: style, script and videos are inside.

The page is `templates/report.html.j2`; what it shows beside the report itself is worked out here.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reducio_latents.check.charts import (
    Chart,
    bar_chart,
    histogram,
    line_chart,
    spark_bars,
    spark_line,
)
from reducio_latents.check.pictures import make_folder, write_text
from reducio_latents.check.report import HISTOGRAM_LIMIT, Report, ReportClip, Scores
from reducio_latents.core.libraries import import_library
from reducio_latents.core.text import printable
from reducio_latents.version import __version__

jinja2 = import_library("jinja2", "a report", extra="encode")  # told before clips are decoded


def render_template(template: str, /, **values: Any) -> str:
    """Return `templates/TEMPLATE` with `values`; a value that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reducio_latents.check"),
        autoescape=lambda name: ".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        # What turns the direction of text would hide what stands beside it, of markdown in a
        # terminal too. Markup is our own.
        finalize=lambda value: printable(value, "\n\t") if type(value) is str else value,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    text: str = environment.get_template(template).render(**values)
    return text


LIMITS = {"FAILED_SHOWN": 200, "WARNED_SHOWN": 12, "BUCKETS_NAMED": 3}
"""How much of what may be long the page shows."""
SORTS = {
    "psnr:up": "worst PSNR first",
    "psnr:down": "best PSNR first",
    "ssim:up": "worst SSIM first",
    "flicker:down": "most flicker first",
    "kl:up": "lowest KL first",
    "recorded:up": "worst recorded first",
    "video:up": "by video",
    "bucket:up": "by bucket",
}


def write_report(report: Report, path: Path) -> None:
    """Write the page; raise StoreError if it cannot be written."""
    make_folder(path.parent)
    write_text(path, render(report))


def render(report: Report) -> str:
    """Return the page. Everything that comes from the store is escaped."""
    return render_template(
        "report.html.j2",
        report=report,
        meta=report.meta,
        name=Path(report.store).name,
        version=__version__,
        shown_ids={clip.clip.clip_id for clip in report.clips},
        sparks=_sparks,
        curves=_drawn(_curves(report)),
        recorded=_drawn(_recorded(report)),
        by_bucket=_by_bucket(report),
        statistics=_drawn(_statistics(report)),
        reasons=list(_reasons(report)),
        failed=[(f.video, f.clip_id, f.reason) for f in report.failed],
        description=json.dumps(asdict(report.meta), indent=2, ensure_ascii=False),
        mean=_mean,
        sortable=_sortable,
        SORTS=SORTS,
        **LIMITS,
    )


def _sparks(item: ReportClip) -> Iterator[tuple[Chart, str]]:
    """Yield small charts, each with what to write below: from where to where a line goes."""
    lines = []
    if item.scores is not None:
        lines = [
            ("PSNR", "dB", item.scores.frame_psnr_db, ".2f"),
            ("SSIM", "SSIM", item.scores.frame_ssim, ".3f"),
        ]
    for name, unit, values, form in lines:
        listed = ", ".join(f"{value:.4g}" for value in values)
        if chart := spark_line(values, f"{unit} of each frame: {listed}"):
            yield chart, f"{name} by frame, {min(values):{form}} to {max(values):{form}}"
    limit = f"{HISTOGRAM_LIMIT:g}"
    if chart := spark_bars(item.histogram, f"final latents from -{limit} to {limit}"):
        yield chart, f"latents, \N{PLUS-MINUS SIGN}{limit}"


def _drawn(charts: Iterable[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _curves(report: Report) -> Iterator[Chart | None]:
    groups = _by_bucket(report)
    for of, unit, what in [("frame_psnr_db", "dB", "PSNR"), ("frame_ssim", "", "SSIM")]:
        lines = {
            name: _average([getattr(scores, of) for scores in group])
            for name, group in groups.items()
        }
        title = f"{what} by frame, mean over clips"
        yield line_chart(lines, x_label="frame", y_label=unit, title=title)


def _recorded(report: Report) -> Iterator[Chart | None]:
    """Yield charts of what was measured while encoding: of more clips than the page has."""
    lines: dict[str, list[Sequence[float]]] = {}
    for clip in sorted(report.recorded, key=lambda clip: clip.bucket):
        lines.setdefault(clip.bucket, []).append(clip.frame_psnr_db)
    averages = {bucket: _average(frames) for bucket, frames in lines.items()}
    values = [clip.psnr_db for clip in report.recorded if math.isfinite(clip.psnr_db)]
    yield histogram(values, x_label="dB", title="PSNR of the clips")
    yield line_chart(
        averages, x_label="frame", y_label="dB", title="PSNR by frame, mean over clips"
    )


def _by_bucket(report: Report) -> dict[str, list[Scores]]:
    found: dict[str, list[Scores]] = {}
    for clip, scores in report.scored:
        found.setdefault(clip.clip.key.bucket, []).append(scores)
    return dict(sorted(found.items()))


def _average(lines: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*lines, strict=False)]


def _statistics(report: Report) -> Iterator[Chart | None]:
    for name, summaries in report.meta.statistics.items():
        column, _, bucket = name.partition("/")
        for what, summary in summaries.items() if bucket == "all" else ():
            title = f"{column}, {what}: mean and std of each channel"
            mean, std = summary["mean"], summary["std"]
            yield bar_chart(mean, spread=std, x_label="channel", y_label="", title=title)
    title = "KL to N(0, 1) of each channel, nats per latent value"
    yield bar_chart(report.channel_kl, x_label="channel", y_label="nats", title=title)


def _reasons(report: Report) -> Iterator[list[str]]:
    """Yield how many clips or videos failed for a reason, the most frequent first."""
    counts = Counter(("clip" if f.clip_id else "video", f.reason) for f in report.failed)
    for (what, reason), n in counts.most_common(20):
        yield [f"{n:,} {what}" + ("" if n == 1 else "s"), reason]


def _mean(values: Iterable[float], form: str) -> str:
    """Return the mean of the values that are finite."""
    finite = [value for value in values if math.isfinite(value)]
    return form.format(sum(finite) / len(finite)) if finite else "none"


def _sortable(value: float | None) -> str:
    """Return a number as the page's script sorts it; empty if there is none."""
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"
