"""Small charts as inline SVG, coloured by the page's own style sheet. No script, no library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 560, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 22, 32
SERIES = 6
"""Colours that the style sheet has: `.s0` to `.s5`."""


def line_chart(
    series: Mapping[str, Sequence[float]], *, x_label: str, y_label: str, title: str
) -> str:
    """Return lines over 0, 1, 2, ...; each series is a name and its values."""
    values = [value for line in series.values() for value in line if math.isfinite(value)]
    if not values:
        return ""
    low, high = _span(values)
    longest = max(map(len, series.values()))
    parts = [_axes(low, high, longest, x_label, y_label)]
    for number, (name, line) in enumerate(series.items()):
        points = " ".join(
            f"{_x(i, longest):.1f},{_y(value, low, high):.1f}" for i, value in enumerate(line)
        )
        parts.append(f'<polyline class="line s{number % SERIES}" points="{points}"/>')
        parts += [
            f'<circle class="dot s{number % SERIES}" cx="{_x(i, longest):.1f}" '
            f'cy="{_y(value, low, high):.1f}" r="3"><title>{escape(name)}, {i}: {value:.2f}'
            "</title></circle>"
            for i, value in enumerate(line)
        ]
    return _figure("".join(parts), title, _legend(list(series)))


def bar_chart(
    values: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    title: str,
    spread: Sequence[float] = (),
) -> str:
    """Return one bar for each value, from 0, with whiskers of +- `spread`."""
    if not values:
        return ""
    reach = spread or [0.0] * len(values)
    ends = [v + sign * s for v, s in zip(values, reach, strict=True) for sign in (-1, 1)]
    low, high = _span([0.0, *ends])
    step = (WIDTH - LEFT - RIGHT) / len(values)
    parts = [_axes(low, high, 0, x_label, y_label)]
    for i, value in enumerate(values):
        x = LEFT + i * step + step * 0.15
        top, bottom = sorted((_y(value, low, high), _y(0, low, high)))
        shown = f"{i}: {value:.3g}" + (f" +- {spread[i]:.3g}" if spread else "")
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{top:.1f}" width="{step * 0.7:.1f}" '
            f'height="{max(0.5, bottom - top):.1f}"><title>{shown}</title></rect>'
        )
        if spread:
            middle = x + step * 0.35
            y1, y2 = (_y(value + sign * spread[i], low, high) for sign in (-1, 1))
            parts.append(
                f'<line class="whisker" x1="{middle:.1f}" x2="{middle:.1f}" '
                f'y1="{y1:.1f}" y2="{y2:.1f}"/>'
            )
    parts += _x_ticks(
        [(LEFT + (i + 0.5) * step, str(i)) for i in range(0, len(values), max(1, len(values) // 8))]
    )
    return _figure("".join(parts), title, "")


def histogram(values: Sequence[float], *, x_label: str, title: str, bins: int = 24) -> str:
    """Return how many of `values` lie in each of `bins` equal steps from the least to the most."""
    if not values:
        return ""
    low, high = _span(values)
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    width = (WIDTH - LEFT - RIGHT) / bins
    parts = [_axes(0, max(counts), 0, x_label, "clips")]
    for i, count in enumerate(counts):
        y = _y(count, 0, max(counts))
        edges = (low + (high - low) * (i + side) / bins for side in (0, 1))
        shown = " to ".join(f"{edge:.2f}" for edge in edges)
        parts.append(
            f'<rect class="bar" x="{LEFT + (i + 0.06) * width:.1f}" y="{y:.1f}" '
            f'width="{width * 0.88:.1f}" height="{HEIGHT - BOTTOM - y:.1f}">'
            f"<title>{shown}: {count}</title></rect>"
        )
    reach = WIDTH - LEFT - RIGHT
    parts += _x_ticks(
        [(LEFT + reach * (v - low) / (high - low), f"{v:g}") for v in _round_values(low, high)]
    )
    return _figure("".join(parts), title, "")


def _x_ticks(ticks: Sequence[tuple[float, str]]) -> list[str]:
    return [
        f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{name}'
        "</text>"
        for x, name in ticks
    ]


def spark_line(values: Sequence[float], label: str, *, width: int = 120, height: int = 28) -> str:
    """Return a line the size of a word; its own lowest value is at the bottom."""
    if len(values) < 2:
        return ""
    low, high = _span(values)
    points = " ".join(
        f"{2 + i * (width - 4) / (len(values) - 1):.1f},"
        f"{height - 2 - (v - low) / (high - low) * (height - 4):.1f}"
        for i, v in enumerate(values)
    )
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}"'
        f'><title>{escape(label)}</title><polyline class="line s0" points="{points}"/></svg>'
    )


def spark_bars(counts: Sequence[int], label: str, *, width: int = 120, height: int = 28) -> str:
    """Return a histogram the size of a word."""
    tallest = max(counts, default=0)
    if tallest == 0:
        return ""
    step = width / len(counts)
    bars = "".join(
        f'<rect class="bar" x="{i * step:.1f}" y="{height - count / tallest * height:.1f}" '
        f'width="{step * 0.85:.1f}" height="{count / tallest * height:.1f}"/>'
        for i, count in enumerate(counts)
    )
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}"'
        f"><title>{escape(label)}</title>{bars}</svg>"
    )


def _figure(inner: str, title: str, legend: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">{inner}</svg>{legend}</figure>'
    )


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    keys = "".join(
        f'<span><i class="key s{n % SERIES}"></i>{escape(name)}</span>'
        for n, name in enumerate(names)
    )
    return f'<div class="legend">{keys}</div>'


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low - 0.5, high + 0.5) if high - low < 1e-9 else (low, high)


def _x(i: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (i / max(1, count - 1))


def _y(value: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))


def _axes(low: float, high: float, count: int, x_label: str, y_label: str) -> str:
    """Return grid, ticks and names; `count` is how many points lie along x, 0 for no numbers."""
    parts = []
    for value in _round_values(low, high):
        y = _y(value, low, high)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    parts += _x_ticks([(_x(i, count), str(i)) for i in range(0, count, max(1, (count - 1) // 5))])
    parts.append(
        f'<text class="tick" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="tick" x="{LEFT - 6}" y="12" text-anchor="end">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _round_values(low: float, high: float) -> list[float]:
    """Return three to eight round numbers within [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    for factor in (1, 2, 5, 10):
        if (high - low) / (step * factor) <= 6:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
