"""The report as one HTML file that opens offline: style, script and videos are inside."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from reducio_latents.check.charts import bar_chart, histogram, line_chart, spark_bars, spark_line
from reducio_latents.check.decode import make_folder
from reducio_latents.check.report import HISTOGRAM_LIMIT, Report, ReportClip, Scores
from reducio_latents.errors import StoreError
from reducio_latents.version import __version__

POLICY = (
    "default-src 'none'; media-src data:; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'"
)
"""Nothing is fetched, whatever a caption or a file name says."""
FAILED_SHOWN = 200
WARNED_SHOWN = 12
BUCKETS_NAMED = 3
PSNR = "dB PSNR"
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
    """Write the page; raise StoreError where that cannot be done."""
    make_folder(path.parent)
    try:
        path.write_text(render(report), encoding="utf-8")
    except OSError as err:
        raise StoreError(f"cannot write {path}: {err.strerror}.") from err


def render(report: Report) -> str:
    """Return the page. Everything that comes from the store is escaped."""
    here = files("reducio_latents.check") / "templates"
    style = (here / "report.css").read_text(encoding="utf-8")
    script = (here / "report.js").read_text(encoding="utf-8")
    sections = [
        _warnings(report),
        _clips(report),
        _curves(report),
        _recorded(report),
        _buckets(report),
        _statistics(report),
        _failures(report),
        _description(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(Path(report.store).name)}: spot check</title>"
        f"<style>\n{style}</style></head>\n<body>\n"
        + f"{_head(report)}\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>\n{script}</script>\n</body></html>\n"
    )


def _head(report: Report) -> str:
    scored = [scores for _, scores in report.scored]
    clips = report.meta.counts.get("clips", {})
    tiles = {
        "clips shown": str(len(report.clips)),
        "mean PSNR": _decibel([s.psnr_db for s in scored]),
        "lowest PSNR": f"{min(s.psnr_db for s in scored):.2f} dB" if scored else "none",
        "mean SSIM": _mean([s.ssim for s in scored], "{:.3f}"),
        **{f"clips {name}": f"{number:,}" for name, number in clips.items()},
    }
    rows = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in tiles.items()
    )
    meta, clip = report.meta, report.meta.clip
    several = len(meta.buckets) > BUCKETS_NAMED
    sizes = f"{len(meta.buckets)} sizes" if several else ", ".join(meta.buckets)
    facts = [
        f"<li>decoded by {escape(report.model)}</li>",
        f"<li>{clip.frames} frames at {clip.rate_fps:g} fps</li>",
        f"<li>{escape(sizes)}</li>",
    ]
    if report.untrained:
        facts.insert(1, '<li class="alert">random weights: untrained, its pictures are noise</li>')
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    return (
        f"<header><h1>{escape(Path(report.store).name)}</h1>"
        f'<p class="path">Spot check of {escape(report.store)}, encoded from '
        f"{escape(meta.corpus)}</p>"
        f'<ul class="facts">{"".join(facts)}</ul>'
        f'<div class="tiles">{rows}</div>'
        f'<div class="notes"><p>Protocol {escape(report.protocol.name)}: '
        f"{escape(report.protocol.note)}.</p>{notes}</div></header>"
    )


def _warnings(report: Report) -> str:
    if not report.warnings:
        return "<h2>Health</h2><p>No warnings.</p>"
    items = []
    cards = {clip.clip.clip_id for clip in report.clips}
    for warning in report.warnings:
        shown = ", ".join(_clip_name(clip_id, cards) for clip_id in warning.clips[:WARNED_SHOWN])
        more = len(warning.clips) - WARNED_SHOWN
        kind = escape(warning.kind.capitalize())
        items.append(
            f'<div class="warning"><b>{kind}</b>: {escape(warning.text)}. '
            f'<span class="small">Clips: {shown}{f" and {more:,} more" if more > 0 else ""}</span>'
            "</div>"
        )
    return f'<h2>Health</h2><div class="warnings">{"".join(items)}</div>'


def _clip_name(clip_id: str, cards: Set[str]) -> str:
    """Return a clip's id, as a link to its card where it is among `cards`."""
    name = escape(clip_id)
    return f'<a href="#clip-{quote(clip_id)}">{name}</a>' if clip_id in cards else name


def _clips(report: Report) -> str:
    options = "".join(f'<option value="{key}">{name}</option>' for key, name in SORTS.items())
    cards = "\n".join(_card(clip) for clip in report.clips)
    return (
        '<section class="clips"><div class="bar-tools"><h2>Clips</h2>'
        f'<select id="sort" aria-label="Order of the clips">{options}</select>'
        '<input id="filter" type="search" placeholder="Filter by video, caption, id" '
        'aria-label="Filter">'
        '<button id="play" type="button">Pause all</button>'
        '<span id="shown" class="small faint" role="status"></span></div>'
        f'<div id="cards" class="cards">\n{cards}\n</div></section>'
    )


def _card(item: ReportClip) -> str:
    clip, scores = item.clip, item.scores
    labels = "".join(f"<span>{escape(label)}</span>" for label in item.labels)
    text = " ".join([clip.video, clip.clip_id, *clip.captions]).lower()
    data = {
        "id": clip.clip_id,
        "psnr": _attribute(None if scores is None else scores.psnr_db),
        "ssim": _attribute(None if scores is None else scores.ssim),
        "flicker": _attribute(None if scores is None else scores.flicker),
        "kl": _attribute(item.kl_nats),
        "recorded": _attribute(item.recorded_db),
        "video": f"{clip.video} {clip.start_s:012.3f}",
        "bucket": clip.key.bucket,
        "text": text,
    }
    attributes = " ".join(f'data-{name}="{escape(value)}"' for name, value in data.items())
    caption = "\n".join(clip.captions)
    source = base64.b64encode(item.video).decode()
    return (
        f'<article class="card" id="clip-{escape(clip.clip_id)}" {attributes}>'
        f'<video muted loop playsinline preload="auto" title="Click to pause or play" '
        f'src="data:video/mp4;base64,{source}"></video>'
        f'<div class="labels">{labels}</div><div class="body">'
        f'<dl class="numbers">{_numbers(item)}</dl>'
        + (f'<p class="caption">{escape(caption)}</p>' if caption else "")
        + f'<p class="where">{escape(Path(clip.video).name)} at {clip.start_s:g} s, '
        f'{clip.key.bucket}<br><span class="faint">'
        + (f"{escape(clip.video)}<br>" if "/" in clip.video else "")
        + f"{escape(clip.clip_id)}, shard {clip.key.shard}, row {clip.row}</span></p>"
        + (f'<p class="problem">{escape(item.problem)}</p>' if item.problem else "")
        + f'<div class="sparks">{_sparks(item)}</div></div></article>'
    )


def _numbers(item: ReportClip) -> str:
    rows = []
    if item.scores is not None:
        rows.append((PSNR, f"{item.scores.psnr_db:.2f}"))
        if item.scores.frame_ssim:
            rows.append(("SSIM", f"{item.scores.ssim:.3f}"))
        rows.append(("flicker", f"{item.scores.flicker:.2f}"))
    rows.append(("nats a value", f"{item.kl_nats:.2f}"))
    if item.recorded_db is not None:
        rows.append(("dB recorded", f"{item.recorded_db:.2f}"))
    return "".join(
        f"<div{' class=first' if name == PSNR else ''}><dt>{name}</dt><dd>{value}</dd></div>"
        for name, value in rows
    )


def _sparks(item: ReportClip) -> str:
    charts = []
    if item.scores is not None:
        psnr, ssim = item.scores.frame_psnr_db, item.scores.frame_ssim
        charts.append((f"PSNR by frame, {_range(psnr, '.2f')}", _spark(psnr, "dB")))
        charts.append((f"SSIM by frame, {_range(ssim, '.3f')}", _spark(ssim, "SSIM")))
    limit = f"{HISTOGRAM_LIMIT:g}"
    histogram = spark_bars(item.histogram, f"final latents from -{limit} to {limit}")
    charts.append((f"latents, &plusmn;{limit}", histogram))
    return "".join(f"<figure>{chart}{name}</figure>" for name, chart in charts if chart)


def _range(values: Sequence[float], form: str) -> str:
    """Return from where to where a line goes, which has no axis."""
    return f"{min(values):{form}} to {max(values):{form}}" if values else ""


def _spark(values: Sequence[float], unit: str) -> str:
    if not values:
        return ""
    listed = ", ".join(f"{value:.4g}" for value in values)
    return spark_line(values, f"{unit} of each frame: {listed}")


def _curves(report: Report) -> str:
    if not report.scored:
        return ""
    groups = _by_bucket(report)
    psnr = {name: _average([s.frame_psnr_db for s in group]) for name, group in groups.items()}
    ssim = {name: _average([s.frame_ssim for s in group]) for name, group in groups.items()}
    charts = [
        line_chart(lines, x_label="frame", y_label=unit, title=f"{what}, mean over clips")
        for lines, unit, what in [(psnr, "dB", "PSNR by frame"), (ssim, "", "SSIM by frame")]
    ]
    return f'<h2>Quality by frame</h2><div class="charts">{"".join(charts)}</div>'


def _recorded(report: Report) -> str:
    """Show what was measured while encoding: of more clips than the page has."""
    values = [clip.psnr_db for clip in report.recorded if math.isfinite(clip.psnr_db)]
    if not values:
        return ""
    lines: dict[str, list[Sequence[float]]] = {}
    for clip in report.recorded:
        lines.setdefault(clip.bucket, []).append(clip.frame_psnr_db)
    charts = histogram(values, x_label="dB", title="PSNR of the clips")
    charts += line_chart(
        {bucket: _average(frames) for bucket, frames in sorted(lines.items())},
        x_label="frame",
        y_label="dB",
        title="PSNR by frame, mean over clips",
    )
    worst = min(report.recorded, key=lambda clip: (clip.psnr_db, clip.clip_id))
    return (
        f"<h2>Recorded while encoding</h2><p>{len(values):,} clips: mean {_decibel(values)}, "
        f"lowest {worst.psnr_db:.2f} dB ({escape(worst.clip_id)}). Protocol standard. "
        "<code>--worst</code> shows the lowest.</p>"
        f'<div class="charts">{charts}</div>'
    )


def _by_bucket(report: Report) -> dict[str, list[Scores]]:
    found: dict[str, list[Scores]] = {}
    for clip, scores in report.scored:
        found.setdefault(clip.clip.key.bucket, []).append(scores)
    return dict(sorted(found.items()))


def _average(lines: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*lines, strict=True)]


def _buckets(report: Report) -> str:
    if not report.scored:
        return ""
    rows = [
        [
            bucket,
            str(len(scores)),
            _decibel([s.psnr_db for s in scores]),
            f"{min(s.psnr_db for s in scores):.2f} dB",
            _mean([s.ssim for s in scores], "{:.3f}"),
            _mean([s.flicker for s in scores], "{:.2f}"),
        ]
        for bucket, scores in _by_bucket(report).items()
    ]
    head = ["bucket", "clips", "mean PSNR", "lowest", "mean SSIM", "flicker"]
    return f'<h2>By bucket</h2><div class="short">{_table(head, rows)}</div>'


def _statistics(report: Report) -> str:
    charts = []
    for name, summaries in report.meta.statistics.items():
        column, _, bucket = name.partition("/")
        if bucket != "all":
            continue
        for what, summary in summaries.items():
            title = f"{column}, {what}: mean and std of each channel"
            mean, std = summary["mean"], summary["std"]
            charts.append(bar_chart(mean, spread=std, x_label="channel", y_label="", title=title))
    charts.append(
        bar_chart(
            report.channel_kl,
            x_label="channel",
            y_label="nats",
            title="KL to N(0, 1) of each channel, nats per latent value",
        )
    )
    return f'<h2>Latents</h2><div class="charts">{"".join(charts)}</div>'


def _failures(report: Report) -> str:
    if not report.failed:
        return "<h2>Failures</h2><p>None.</p>"
    reasons = Counter(
        ("clip" if failed.clip_id else "video", failed.reason) for failed in report.failed
    )
    summary = _table(
        ["failed", "reason"],
        [
            [f"{n:,} {what}" + ("" if n == 1 else "s"), reason]
            for (what, reason), n in reasons.most_common(20)
        ],
    )
    rows = [[f.video, f.clip_id, f.reason] for f in report.failed[:FAILED_SHOWN]]
    more = len(report.failed) - FAILED_SHOWN
    rest = f"<p>and {more:,} more: see errors.parquet.</p>" if more > 0 else ""
    return (
        f"<h2>Failures</h2>{summary}<details><summary>Each one ({len(report.failed):,})</summary>"
        f"{_table(['video', 'clip', 'reason'], rows)}{rest}</details>"
    )


def _description(report: Report) -> str:
    text = json.dumps(asdict(report.meta), indent=2, ensure_ascii=False)
    return (
        "<h2>The store</h2><details><summary>Its description</summary>"
        f"<pre>{escape(text)}</pre></details>"
        f'<p class="small faint">Made by reducio-latents {__version__}.</p>'
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _attribute(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.6g}"


def _mean(values: Sequence[float], form: str) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return form.format(sum(finite) / len(finite)) if finite else "none"


def _decibel(values: Sequence[float]) -> str:
    return _mean(values, "{:.2f} dB")
