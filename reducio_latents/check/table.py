"""The comparison as the paper prints it, and as other programs read it: Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

from reducio_latents.check.evaluate import DatasetScores, Evaluation
from reducio_latents.check.rendering import render_template
from reducio_latents.check.sample import about_video
from reducio_latents.check.writing import make_folder, write_text
from reducio_latents.core.choices import MetricName
from reducio_latents.metrics.i3d import CLASSES
from reducio_latents.metrics.suite import METRICS


def write_tables(evaluation: Evaluation, out: Path) -> list[Path]:
    """Write `table.md`, `table.csv` and `table.json` into `out`; return where they are."""
    make_folder(out)
    texts = {
        "table.md": markdown(evaluation),
        "table.csv": as_csv(evaluation),
        "table.json": as_json(evaluation),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    return [out / name for name in texts]


def markdown(evaluation: Evaluation) -> str:
    """Return the paper's table, and below it what its numbers mean and which are missing.

    As in the paper, PSNR, SSIM, LPIPS and speed are of the first corpus, and rFVD has a column
    for each; the other corpora have a shorter table each, of what else was measured on them.
    """
    asked = [name for name in METRICS if _asked(evaluation, name)]
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


def as_json(evaluation: Evaluation) -> str:
    return json.dumps(asdict(evaluation), indent=2, ensure_ascii=False) + "\n"


def _asked(evaluation: Evaluation, metric: str) -> bool:
    """Whether a metric was computed for any method, or would have been with its weights."""
    return metric in evaluation.unavailable or any(
        metric in found.scores
        for method in evaluation.methods
        for found in method.datasets.values()
    )


def _score(found: DatasetScores, name: MetricName) -> str:
    return METRICS[name].form.format(found.scores[name]) if name in found.scores else "n/a"
