"""The comparison as the paper prints it, and as other programs read it: Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reducio_latents.check.evaluate import DatasetScores, Evaluation
from reducio_latents.check.html import render_template
from reducio_latents.check.pictures import make_folder, write_picture, write_text
from reducio_latents.check.sample import about_video
from reducio_latents.core.choices import MetricName
from reducio_latents.core.libraries import import_library
from reducio_latents.metrics.i3d import CLASSES
from reducio_latents.metrics.suite import METRICS

matplotlib_figure, matplotlib_agg = (  # told before clips are read
    import_library(f"matplotlib.{part}", "a plot of rates", extra="encode")
    for part in ("figure", "backends.backend_agg")
)

PLOT = "rate.png"
PLOT_LINK = f"\n![PSNR over kbit/s]({PLOT})\n"
PLOT_MARKS = "osD^v"
"""Of the corpora, in turn."""


def write_tables(evaluation: Evaluation, out: Path) -> list[Path]:
    """Write `table.md`, `table.csv` and `table.json` into `out`, and a plot of PSNR over rate where
    PSNR was measured; return where they are."""
    make_folder(out)
    plot = plot_rates(evaluation)
    texts = {
        "table.md": markdown(evaluation) + ("" if plot is None else PLOT_LINK),
        "table.csv": as_csv(evaluation),
        "table.json": as_json(evaluation),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    if plot is not None:
        write_picture(out / PLOT, plot)
    return [out / name for name in [*texts, *([] if plot is None else [PLOT])]]


def markdown(evaluation: Evaluation) -> str:
    """Return the paper's table, and below it what its numbers mean and which are missing.

    As in the paper, PSNR, SSIM, LPIPS and speed are of the first corpus, and rFVD has a column
    for each; the other corpora have a shorter table each, of what else was measured on them.
    """
    tried = {m for method in evaluation.methods for d in method.datasets.values() for m in d.scores}
    asked = [name for name in METRICS if name in tried or name in evaluation.unavailable]
    return render_template(
        "table.md.j2",
        found=evaluation,
        corpora=list(evaluation.datasets),
        asked=asked,
        metrics=[name for name in asked if name != "fvd"],
        titles={name: metric.title for name, metric in METRICS.items()},
        score=_score,
        lost={
            name: (len(failed), about_video(*next(iter(failed.items()))))
            for name, failed in evaluation.datasets.items()
            if failed
        },
        features=CLASSES,
    )


def as_csv(evaluation: Evaluation) -> str:
    """Return one row for each method and corpus; what is unavailable is empty."""
    rows = [
        {
            "method": method.name,
            "untrained": method.untrained,
            "corpus": corpus,
            "clips": found.clips,
            "channels": method.channels,
            "temporal_stride": method.strides[0],
            "spatial_stride": method.strides[1],
            **{name: found.scores.get(name, "") for name in METRICS},
            "protocol": evaluation.protocol.name,
            "clips_per_s": found.clips_per_s,
            "bytes_per_s": found.bytes_per_s,
            "kbit_per_s": found.kbit_per_s,
            "db_per_kbit_per_s": found.db_per_kbit_per_s,
            "parameters": method.parameters,
            "frames": method.frames,
        }
        for method in evaluation.methods
        for corpus, found in method.datasets.items()
    ]
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()


def plot_rates(evaluation: Evaluation) -> NDArray[np.uint8] | None:
    """Return a picture (H, W, 3) of PSNR over rate, with a mark for each method on each corpus;
    None if there is nothing to show."""
    figure = matplotlib_figure.Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="stored, kbit/s of video", ylabel="PSNR, dB")
    several = len(evaluation.datasets) > 1
    for number, corpus in enumerate(evaluation.datasets):
        for method in evaluation.methods:
            found = method.datasets[corpus]
            if found.db_per_kbit_per_s is None:
                continue
            at = found.kbit_per_s, found.scores["psnr"]
            axes.plot(*at, PLOT_MARKS[number % len(PLOT_MARKS)])
            label = f"{method.name}{', random weights' if method.untrained else ''}"
            axes.annotate(
                f"{label} on {corpus}" if several else label,
                at,
                (5, 5),
                textcoords="offset points",
                fontsize=8,
                parse_math=False,
            )
    if not axes.lines:
        return None
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.margins(0.15)
    canvas = matplotlib_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def as_json(evaluation: Evaluation) -> str:
    return json.dumps(asdict(evaluation), indent=2, ensure_ascii=False) + "\n"


def _score(found: DatasetScores, name: MetricName) -> str:
    return METRICS[name].form.format(found.scores[name]) if name in found.scores else "n/a"
