"""Small charts as numbers; `templates/charts.html.j2` draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

WIDTH, HEIGHT = 560, 220
SPARK_WIDTH, SPARK_HEIGHT = 120, 28
LEFT, RIGHT, TOP, BOTTOM = 46, WIDTH - 12, 22, HEIGHT - 32
BINS = 24
SERIES = 6
"""Colours that the style sheet has: `.s0` to `.s5`."""


class Tick(NamedTuple):
    at: float
    text: str


class Point(NamedTuple):
    x: float
    y: float
    text: str


class Line(NamedTuple):
    name: str
    colour: int
    points: Sequence[Point]


class Bar(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    text: str = ""
    whisker: tuple[float, float] | None = None

    @property
    def middle(self) -> float:
        return _px(self.x + self.width / 2)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is drawn, in pixels from the top left."""

    title: str
    x_label: str = ""
    y_label: str = ""
    x_ticks: Sequence[Tick] = ()
    y_ticks: Sequence[Tick] = ()
    lines: Sequence[Line] = ()
    bars: Sequence[Bar] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    bottom: int = BOTTOM


class _Scale(NamedTuple):
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> _Scale:
        low, high = min(values), max(values)
        if high - low <= 1e-4 * max(abs(low), abs(high)):  # a line that wavers by rounding is flat
            low, high = low - 0.5, high + 0.5
        return cls(low, high, start, end)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _px(self.start + (self.end - self.start) * share)

    def ticks(self) -> list[Tick]:
        """Return three to eight round numbers within the scale."""
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span / 2))
        step *= next((factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6), 1)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        rounded = [round(i * step, 12) for i in range(first, last + 1)]
        return [Tick(self(value), f"{value:g}") for value in rounded]


def line_chart(series: Mapping[str, Sequence[float]], **labels: Any) -> Chart | None:
    """Return lines over 0, 1, 2, ...; each series is a name and its values, `labels` a chart's."""
    values = [value for line in series.values() for value in line if math.isfinite(value)]
    if not values:
        return None
    longest = max(map(len, series.values()))
    x = _Scale(0, max(1, longest - 1), LEFT, RIGHT)
    y = _Scale.of(values, BOTTOM, TOP)
    lines = [
        Line(
            name,
            number % SERIES,
            [Point(x(i), y(value), f"{name}, {i}: {value:.2f}") for i, value in enumerate(line)],
        )
        for number, (name, line) in enumerate(series.items())
    ]
    ticks = [Tick(x(i), str(i)) for i in range(0, longest, max(1, (longest - 1) // 5))]
    return Chart(x_ticks=ticks, y_ticks=y.ticks(), lines=lines, **labels)


def bar_chart(
    values: Sequence[float], *, spread: Sequence[float] = (), **labels: Any
) -> Chart | None:
    """Return one bar for each value, from 0, with whiskers of +- `spread`."""
    if not values:
        return None
    reach = spread or [0.0] * len(values)
    ends = [v + sign * s for v, s in zip(values, reach, strict=True) for sign in (-1, 1)]
    if not all(map(math.isfinite, ends)):
        return None
    x, y = _Scale(0, len(values), LEFT, RIGHT), _Scale.of([0.0, *ends], BOTTOM, TOP)
    bars = []
    for i, (value, off) in enumerate(zip(values, reach, strict=True)):
        top, bottom = sorted((y(value), y(0)))
        text = f"{i}: {value:.3g}" + (f" +- {off:.3g}" if spread else "")
        whisker = (y(value + off), y(value - off)) if spread else None
        left, right = x(i + 0.15), x(i + 0.85)
        bars.append(Bar(left, top, _px(right - left), _px(max(0.5, bottom - top)), text, whisker))
    ticks = [Tick(x(i + 0.5), str(i)) for i in range(0, len(values), max(1, len(values) // 8))]
    return Chart(x_ticks=ticks, y_ticks=y.ticks(), bars=bars, **labels)


def histogram(values: Sequence[float], **labels: Any) -> Chart | None:
    """Return how many of `values` lie in each of `BINS` equal steps from the least to the most."""
    if not values:
        return None
    x = _Scale.of(values, LEFT, RIGHT)
    step = (x.high - x.low) / BINS
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, int((value - x.low) / step))] += 1
    y = _Scale(0, max(counts), BOTTOM, TOP)
    found = []
    for i, count in enumerate(counts):
        low, high = x.low + i * step, x.low + (i + 1) * step
        left, right = x(low + 0.06 * step), x(high - 0.06 * step)
        text = f"{low:.2f} to {high:.2f}: {count}"
        found.append(Bar(left, y(count), _px(right - left), _px(BOTTOM - y(count)), text))
    return Chart(y_label="clips", x_ticks=x.ticks(), y_ticks=y.ticks(), bars=found, **labels)


def spark_line(values: Sequence[float], label: str) -> Chart | None:
    """Return a line the size of a word; its own lowest value is at the bottom."""
    if len(values) < 2:
        return None
    x = _Scale(0, len(values) - 1, 2, SPARK_WIDTH - 2)
    y = _Scale.of(values, SPARK_HEIGHT - 2, 2)
    points = [Point(x(i), y(value), "") for i, value in enumerate(values)]
    return Chart(title=label, width=SPARK_WIDTH, height=SPARK_HEIGHT, lines=[Line("", 0, points)])


def spark_bars(counts: Sequence[int], label: str) -> Chart | None:
    """Return a histogram the size of a word."""
    if not any(counts):
        return None
    x, y = _Scale(0, len(counts), 0, SPARK_WIDTH), _Scale(0, max(counts), SPARK_HEIGHT, 0)
    width = _px(0.85 * SPARK_WIDTH / len(counts))
    bars = [Bar(x(i), y(n), width, _px(SPARK_HEIGHT - y(n))) for i, n in enumerate(counts)]
    return Chart(title=label, width=SPARK_WIDTH, height=SPARK_HEIGHT, bars=bars)


def _px(value: float) -> float:
    """Round to a tenth of a pixel, which no eye sees and which keeps the page small."""
    return round(value, 1)
