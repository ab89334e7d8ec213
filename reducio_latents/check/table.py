"""The comparison as the paper prints it, and as other programs read it: Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from reducio_latents.check.evaluate import DatasetScores, Evaluation, MethodResult
from reducio_latents.check.sample import about_video
from reducio_latents.check.writing import make_folder, write_text
from reducio_latents.metrics.i3d import CLASSES

TITLES = {
    "psnr": ("PSNR", "{:.2f}"),
    "psnr-clip": ("PSNR (clip)", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "lpips-alex": ("LPIPS (alex)", "{:.3f}"),
    "lpips-vgg": ("LPIPS (vgg)", "{:.3f}"),
    "flicker": ("flicker", "{:.2f}"),
}
MISSING = "n/a"


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
    first, names = next(iter(evaluation.datasets)), list(evaluation.datasets)
    metrics = [name for name in TITLES if _asked(evaluation, name)]
    with_fvd = _asked(evaluation, "fvd")
    head = ["Method", "Downsample factor", "\\|z\\|", *(TITLES[m][0] for m in metrics)]
    head += [f"rFVD ({name})" for name in names] if with_fvd else []
    head += ["clips/s", "KiB/s of video", "parameters, M", "frames"]
    lines = [_line(head), _line(["---"] * 3 + ["---:"] * (len(head) - 3))]
    for method in evaluation.methods:
        scores = method.datasets[first]
        row = [_title(method), _factor(method), str(method.channels)]
        row += [_number(scores, metric, TITLES[metric][1]) for metric in metrics]
        if with_fvd:
            row += [_number(method.datasets[name], "fvd", "{:.2f}") for name in names]
        row += [*_speed_and_size(scores), f"{method.parameters / 1e6:.2f}", method.frames]
        lines.append(_line(row))
    for name in names[1:] if metrics else []:
        lines += ["", f"On {name}:", "", *_of_corpus(evaluation, name, metrics)]
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(evaluation)), ""])


def _of_corpus(evaluation: Evaluation, corpus: str, metrics: list[str]) -> Iterator[str]:
    yield _line(["Method", *(TITLES[metric][0] for metric in metrics), "clips/s", "KiB/s of video"])
    yield _line(["---", *["---:"] * (len(metrics) + 2)])
    for method in evaluation.methods:
        scores = method.datasets[corpus]
        numbers = [_number(scores, metric, TITLES[metric][1]) for metric in metrics]
        yield _line([_title(method), *numbers, *_speed_and_size(scores)])


def _speed_and_size(scores: DatasetScores) -> list[str]:
    speed = scores.clips_per_s
    return [
        f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}",
        f"{scores.bytes_per_s / 1024:.1f}",
    ]


def as_csv(evaluation: Evaluation) -> str:
    """Return one row for each method and corpus; what is unavailable is empty."""
    sink = io.StringIO()
    metrics = [*TITLES, "fvd"]
    columns = ["method", "untrained", "corpus", "clips", "channels", "temporal_stride"]
    columns += ["spatial_stride", *metrics, "protocol", "clips_per_s", "bytes_per_s", "parameters"]
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow([*columns, "frames"])
    for method in evaluation.methods:
        for corpus, found in method.datasets.items():
            writer.writerow(
                [
                    method.name,
                    method.untrained,
                    corpus,
                    found.clips,
                    method.channels,
                    *method.strides,
                    *(found.scores.get(name, "") for name in metrics),
                    evaluation.protocol.name,
                    found.clips_per_s,
                    found.bytes_per_s,
                    method.parameters,
                    method.frames,
                ]
            )
    return sink.getvalue()


def as_json(evaluation: Evaluation) -> str:
    return json.dumps(asdict(evaluation), indent=2, ensure_ascii=False) + "\n"


def _notes(evaluation: Evaluation) -> Iterator[str]:
    protocol = evaluation.protocol
    counts = {
        name: next(iter(evaluation.methods)).datasets[name].clips for name in evaluation.datasets
    }
    clips = ", ".join(f"{count} of {name}" for name, count in counts.items())
    yield f"Clips: {clips}, at {evaluation.resolution} px. Speed on {evaluation.machine}."
    if len(counts) > 1:
        yield f"In the first table all but rFVD is of {next(iter(counts))}."
    yield f"Protocol {protocol.name}: {protocol.note}."
    if _asked(evaluation, "psnr-clip"):
        yield (
            "PSNR (clip): of the mean error of all frames of a clip. One perfect frame, which "
            "repeat-content has, lifts the mean over frames by some 5 dB, and not this."
        )
    if any(method.untrained for method in evaluation.methods):
        yield "Random weights: untrained, for the way through only; its numbers judge nothing."
    if any(" as " in method.frames for method in evaluation.methods):
        yield "Frames `16 as 17`: the last one was repeated, and what came of it was dropped."
    if evaluation.fvd_file is not None:
        yield f"rFVD by {evaluation.fvd_file}; the other I3D in use gives values some 10 % apart."
    if evaluation.biased:
        yield (
            f"rFVD is biased upwards with {CLASSES} clips or fewer, as many as I3D has features: "
            "compare it only with numbers from as many clips."
        )
    yield from evaluation.unavailable.values()
    for corpus, failed in evaluation.datasets.items():
        if failed:
            video, reason = next(iter(failed.items()))
            number = f"{len(failed):,} video" + ("" if len(failed) == 1 else "s")
            yield f"{number} of {corpus} gave no clip, such as {about_video(video, reason)}."


def _asked(evaluation: Evaluation, metric: str) -> bool:
    """Whether a metric was computed for any method, or would have been with its weights."""
    return metric in evaluation.unavailable or any(
        metric in found.scores
        for method in evaluation.methods
        for found in method.datasets.values()
    )


def _number(found: DatasetScores, metric: str, form: str) -> str:
    return form.format(found.scores[metric]) if metric in found.scores else MISSING


def _title(method: MethodResult) -> str:
    name = method.name.replace("|", "\\|")
    return f"{name}, random weights" if method.untrained else name


def _factor(method: MethodResult) -> str:
    temporal, spatial = method.strides
    return "none" if method.channels == 0 else f"{temporal}x{spatial}x{spatial}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
