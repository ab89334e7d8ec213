"""The spans that a row of a table lists: which of its cells are times, and what goes with each."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from reducio_latents.core.parsing import MAX_DEPTH, parse_json
from reducio_latents.corpus.cells import Cells, Column, plain_pairs, plain_times
from reducio_latents.corpus.entry import (
    CAPTION_NAMES,
    NO_CAPTION,
    CorpusSpan,
    as_captions,
    as_extra,
    match_name,
    squashed,
)
from reducio_latents.corpus.rows import ENTRY, NO_END
from reducio_latents.errors import ConfigError, CorpusError

MAX_CELL = 1 << 20
"""Characters of a cell that is read as a list. A Python literal takes 500 times as many bytes."""
MAX_SPANS = 100_000
"""Spans of one row."""
NO_TIME = "a span's start or end is no time"
NO_LIST = "a span is no start and end"
TOO_MANY = f"its cells are larger than {MAX_CELL >> 20} MiB or list more than {MAX_SPANS:,} spans"
NO_SPAN = "its row lists no span"
NOT_PAIRED = "its row has other numbers of starts, ends and captions"
WHOLE = "none"
"""What `start_column` and `end_column` say where a table's times are not meant."""

_STARTS = ("start", "starts", "begin", "begins", "onset", "from", "in", "t0")
_ENDS = ("end", "ends", "stop", "stops", "finish", "offset", "to", "out", "t1")
_UNITS = {
    "": 1.0, "t": 1.0, "time": 1.0, "times": 1.0, "timestamp": 1.0, "timestamps": 1.0, "ts": 1.0,
    "s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0, "point": 1.0, "pts": 1.0,
    "ms": 1e-3, "msec": 1e-3, "millis": 1e-3, "milliseconds": 1e-3,
    "frame": 0.0, "frames": 0.0, "idx": 0.0, "index": 0.0,
}  # fmt: skip
"""What may stand beside `start` in a name -> seconds; 0: frames."""
_OF = ("clip", "segment", "seg", "span", "shot", "scene", "video", "window", "interval", "moment")
"""What may stand there too, and says nothing of the unit."""
_LISTS = (
    "durationspan", "span", "spans", "timestamp", "timestamps", "timespan", "timerange", "segment",
    "segments", "interval", "intervals", "clip", "clips", "cuts", "times", "windows", "shots",
    "scenes", "moments", "framespan", "framespans", "annotations",
)  # fmt: skip
"""Names of a column that holds starts and ends together, the likeliest first."""
_TIMELIKE = {
    *_STARTS, *_ENDS, *_OF, *(f"{name}s" for name in _OF), "timestamp", "timestamps", "times",
    "time", "cut", "cuts", "boundary", "boundaries", "range", "ranges", "first", "last",
}  # fmt: skip
_BESIDE = {"from", "to", "in", "out", "first", "last"}
_OTHERWISE = {
    "size", "resolution", "shape", "embedding", "score", "scores", "id", "ids", "uuid", "name",
    "count", "num", "number", "date", "page", "line",
}  # fmt: skip
"""Words of names of what is no time, whatever else they say."""
_CLOCK = re.compile(r"(?:(\d{1,4}):)?(\d{1,4}):(\d{1,2}(?:[.,]\d{1,9})?)", re.ASCII)
_BETWEEN_TIMES = re.compile(r"\s*(?:-|\u2013|,|;|\bto\b)\s*")
_PLAIN = re.compile(r"\d{1,15}(?:\.\d{0,15})?(?:[eE][-+]?\d{1,2})?s?", re.ASCII)


def as_time(value: Any) -> float | None:
    """Return a number, or `H:MM:SS.mmm`, as seconds (or frames); None for what is no time."""
    if isinstance(value, str):
        text = value.strip()
        if match := _CLOCK.fullmatch(text):
            hours, minutes, seconds = match.groups()
            second = float(seconds.replace(",", "."))
            return int(hours or 0) * 3600 + int(minutes) * 60 + second if second < 60 else None
        if not _PLAIN.fullmatch(text):
            return None
        value = float(text.removesuffix("s"))
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    return float(value) if 0 <= value < 1e12 else None  # also refuses NaN


def as_list(cell: Any) -> Any:
    """Return a cell that is a list, mapping or tuple written as JSON or as a Python literal.

    Anything else comes back as it is. Raise CorpusError if it is too large to be read.
    """
    if not isinstance(cell, str):
        return cell
    text = cell.strip()
    if text[:1] not in ("[", "{", "(") or text[-1:] not in ("]", "}", ")"):
        return cell
    if len(text) > MAX_CELL:
        raise CorpusError(TOO_MANY)
    # What Python writes of texts without quotes and escapes is JSON, but for the marks.
    for written in (text,) if '"' in text or "\\" in text else (text, text.replace("'", '"')):
        with suppress(ValueError):
            return parse_json(written)
    try:
        return _plain(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return cell


def _plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    if depth == 0:
        raise ValueError("it nests too deep")
    if isinstance(value, list | tuple):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, depth - 1) for key, item in value.items()}
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"{type(value).__name__} is no plain value")


@dataclass(frozen=True, slots=True)
class RowSpan:
    """A span as a row lists it: times that are not parsed yet, and cells of its own."""

    start: Any
    end: Any
    cells: Mapping[str, Any]
    unit: float = 1.0
    """Seconds of what start and end are counted in; 0: frames of the video."""
    from_s: float = 0.0
    """What frames are counted from."""


@dataclass(frozen=True, slots=True)
class Times:
    """Which columns of a table say where spans are."""

    start: str | None = None
    end: str | None = None
    both: str | None = None
    """Column of starts and ends together."""
    windows: str | None = None
    """Column of parts of these spans, counted from their start."""
    unit: float = 1.0
    lasts: bool = False
    """Whether `end` says how long a span is."""

    def of(self, row: dict[str, Any]) -> Iterable[RowSpan]:
        """Take the spans out of a row; raise CorpusError, with a reason, if it lists none right."""
        if self.both is None:
            start = as_list(row.pop(self.start, None)) if self.start is not None else None
            end = as_list(row.pop(self.end, None)) if self.end is not None else None
            if not isinstance(start, list) and not isinstance(end, list):
                return [self._span(start, end)]
            if not isinstance(start, list) or not isinstance(end, list) or len(start) != len(end):
                raise CorpusError(NOT_PAIRED)
            return _shared(row, list(map(self._span, start, end)))
        parts, listed = _parts(as_list(row.pop(self.both, None)), self.unit)
        if self.windows is not None and len(parts) == 1 and not listed:
            return _windows(parts[0], as_list(row.pop(self.windows, None)))
        return _shared(row, parts) if listed else parts

    def _span(self, start: Any, end: Any) -> RowSpan:
        begins = 0.0 if _is_missing(start) else as_time(start)
        if self.lasts and begins is not None and (length := as_time(end)) is not None:
            end = begins + length
        return RowSpan(start, end, {}, self.unit)

    def columns(self, cells: dict[str, Cells], rows: int) -> tuple[Column, Column]:
        """Take the spans out of columns: rows of `ENTRY`, and which are plain, one span of two
        times. Others are to be read one by one."""
        entries, plain = np.zeros(rows, ENTRY), np.ones(rows, bool)
        nothing = pa.nulls(rows, pa.string())
        if self.both is None:
            both = [cells.pop(name or "", nothing) for name in (self.start, self.end)]
        else:
            *both, plain = plain_pairs(cells.pop(self.both, nothing))
        (start, is_start), (end, is_end) = map(plain_times, both)
        plain = plain & is_start & is_end
        end = end + np.nan_to_num(start) if self.lasts else end
        for name, missing, times in (("start", 0.0, start), ("end", NO_END, end)):
            entries[name] = np.where(np.isnan(times), missing, times * (self.unit or 1.0))
        entries["in_frames"] = self.unit == 0
        return entries, plain if self.windows is None else np.zeros(rows, bool)


def _parts(value: Any, unit: float) -> tuple[list[RowSpan], bool]:
    """Return the spans in a cell, and whether it is a list of them."""
    if value is None or value == "":
        return [RowSpan(None, None, {}, unit)], False
    if isinstance(value, str):
        start, end = _two(_BETWEEN_TIMES.split(value.strip()))
        return [RowSpan(start, end, {}, unit)], False
    if isinstance(value, dict):
        rate = as_time(value.get("original_fps"))
        if isinstance(cuts := value.get("cuts_original_fps"), list):
            return _parts(cuts, 1 / rate if rate else 0.0)[0], True
        return [_item(value, unit)], False
    if not isinstance(value, list):
        raise CorpusError(NO_LIST)
    if len(value) > MAX_SPANS:
        raise CorpusError(TOO_MANY)
    if len(value) == 2 and not any(isinstance(item, list | dict) for item in value):
        start, end = value
        return [RowSpan(start, end, {}, unit)], False
    parts = []
    for item in value:
        try:
            parts.append(_item(item, unit))
        except CorpusError:  # costs that span, not those beside it
            parts.append(RowSpan(NO_LIST, NO_LIST, {}))
    return parts, True


def _item(value: Any, unit: float) -> RowSpan:
    """Return the span that one item of a list is: a pair, or a mapping that has one."""
    if isinstance(value, list):
        # Also a pair in a list of its own, as lists of spans of several shots have it.
        start, end = _two(value[0] if len(value) == 1 else value)
        return RowSpan(start, end, {}, unit)
    if not isinstance(value, dict):
        raise CorpusError(NO_LIST)
    cells = dict(value)
    times = times_by_name(list(cells), [cells])
    if times is None:
        raise CorpusError(NO_LIST)
    inner = [part for part in Times.of(times, cells) if not part.cells]
    if len(inner) != 1:
        raise CorpusError(NO_LIST)
    part = inner[0]
    return RowSpan(part.start, part.end, cells, part.unit)


def _two(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise CorpusError(NO_LIST)
    return value[0], value[1]


def _shared(row: dict[str, Any], parts: list[RowSpan]) -> list[RowSpan]:
    """Give each span its item of every cell of the row that is a list of as many.

    Captions must be as many, or one for all.
    """
    if len(parts) > MAX_SPANS:
        raise CorpusError(TOO_MANY)
    own: dict[str, list[Any]] = {}
    for name, cell in row.items():
        found = as_list(cell)
        if isinstance(found, list) and len(found) == len(parts):
            own[name] = found
        elif isinstance(found, list) and found and len(parts) > 1 and caption_key([name]):
            raise CorpusError(NOT_PAIRED)
    for name in own:
        del row[name]
    shared = [{name: cell[i] for name, cell in own.items()} for i in range(len(parts))]
    return [
        RowSpan(part.start, part.end, {**cells, **part.cells}, part.unit)
        for part, cells in zip(parts, shared, strict=True)
    ]


def _windows(clip: RowSpan, windows: Any) -> list[RowSpan]:
    """Return the windows of a clip: parts of it, in frames that are counted from its start."""
    start, end = as_time(clip.start), as_time(clip.end)
    if not isinstance(windows, list) or not windows or start is None or end is None:
        return [clip]
    parts, _ = _parts(windows, 0.0)
    return [RowSpan(p.start, p.end, {**clip.cells, **p.cells}, p.unit, start) for p in parts]


def caption_key(names: Sequence[str]) -> str | None:
    """Return the name of what holds the caption of a span: as in tables, or `qwen_caption`."""
    found = match_name(CAPTION_NAMES, list(names))
    endings = ("caption", "captions", "sentence", "sentences")
    ending = (name for name in names if squashed(name).endswith(endings))
    return found or next(ending, None)


def _words(name: str) -> list[str]:
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return [word for word in re.split(r"[^a-z0-9]+", split.lower()) if word]


def _role(name: str) -> tuple[int, tuple[str, ...]] | None:
    """Return 0 for a start and 1 for an end, and the other words of the name; None for others."""
    words = _words(name)
    for place, word in enumerate(words):
        for role, known in enumerate((_STARTS, _ENDS)):
            if word in known:
                return role, (*words[:place], *words[place + 1 :])
    for role, known in enumerate((_STARTS, _ENDS)):  # written as one word: starttime, tstart
        for start in known[:5]:
            for rest in (*_UNITS, *_OF):
                forms = (f"{start}{rest}", f"{rest}{start}" if rest != "s" else "")
                if rest and squashed(name) in forms:
                    return role, (rest,)
    return None


def is_time_name(name: str) -> bool:
    """Whether a name says that it is of a start or an end."""
    return _role(name) is not None


def _unit_of(words: Iterable[str]) -> float | None:
    """Return the seconds of a unit, 0 for frames; None if the words say something else."""
    unit = 1.0
    for word in words:
        if word in _UNITS:
            unit = min(unit, _UNITS[word])
        elif word not in _OF:
            return None
    return unit


def find_times(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    where: str,
    start: str | None = None,
    end: str | None = None,
) -> Times | None:
    """Return which columns say where spans are, by name or as given; None if none do.

    `rows` are the first ones. Raise ConfigError for given columns that do not go together, and
    CorpusError for columns that look like times and would not be used.
    """
    if WHOLE in (start, end) and WHOLE not in columns:
        return None
    if end is not None and start is None:
        raise ConfigError("end_column is given without start_column. Give both.")
    if start is not None:
        role = _role(start)
        unit = _unit_of(_words(start) if role is None else role[1])
        if end is None and _any(rows, start, _is_span_cell):
            return Times(both=start, unit=0.0 if unit == 0 else 1.0)
        return Times(start, end, unit=1.0 if unit is None else unit)
    found = times_by_name(columns, rows)
    if found is not None:
        return found
    strange = [name for name in columns if _looks_like_times(name, columns, rows)]
    filled = [name for name in columns if _any(rows, name, lambda _: True)]
    pairs = (list(pair.values()) for _, pair in _pairs(filled) if len(pair) == 2)
    if strange := strange or next(pairs, []):
        raise CorpusError(
            f"{where}: {', '.join(map(repr, strange[:4]))} look like times of clips, but it is not "
            f"clear how to use them. Name them (--start-column, --end-column), or say "
            f"--start-column {WHOLE} to take whole videos."
        )
    return None


def times_by_name(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Times | None:
    """Return the columns whose names say that they are times, and whose first cells are."""
    pairs = _pairs(columns)
    for unit, pair in sorted(pairs, key=lambda found: -found[0]):  # seconds before frames
        if len(pair) == 2 and all(_any(rows, name, _is_time_or_list) for name in pair.values()):
            return Times(pair[0], pair[1], unit=unit)
    by_name = {squashed(name): name for name in reversed(columns)}
    for form in _LISTS:
        if form in by_name and _any(rows, name := by_name[form], _is_span_cell):
            windows = by_name.get("windows") if form != "windows" else None
            unit = 0.0 if form.startswith("frame") or form == "windows" else 1.0
            return Times(both=name, windows=windows, unit=unit)
    for unit, pair in pairs:
        for name in columns if set(pair) == {0} else ():
            words = _words(name)
            fits = "duration" in words and unit == _unit_of(w for w in words if w != "duration")
            if fits and all(_any(rows, n, _is_time_or_list) for n in (pair[0], name)):
                return Times(pair[0], name, unit=unit, lasts=True)
    return None


def _pairs(columns: Sequence[str]) -> list[tuple[float, dict[int, str]]]:
    """Return the columns whose names say that they are a start (0) or an end (1), those together
    whose names are else the same, with their unit."""
    pairs: dict[tuple[str, ...], dict[int, str]] = {}
    for name in columns:
        if role := _role(name):
            pairs.setdefault(role[1], {}).setdefault(role[0], name)
    return [(unit, pair) for rest, pair in pairs.items() if (unit := _unit_of(rest)) is not None]


def _any(rows: Iterable[Mapping[str, Any]], name: str, fits: Callable[[Any], bool]) -> bool:
    """Whether a cell of a column is of a kind."""
    return any(fits(cell) for row in rows if (cell := row.get(name)) not in (None, ""))


def _is_time_or_list(cell: Any) -> bool:
    try:
        found = as_list(cell)
    except CorpusError:  # it costs its row
        return True
    items = found if isinstance(found, list | dict) else [found]
    return all(as_time(item) is not None for item in items)


def _is_span_cell(cell: Any) -> bool:
    """Whether a cell has spans: a pair or a list of pairs, of which one at least is of times."""
    try:
        parts, _ = _parts(as_list(cell), 1.0)
    except CorpusError as err:
        return str(err) == TOO_MANY
    return any(as_time(p.start) is not None and as_time(p.end) is not None for p in parts)


def _looks_like_times(name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column that is not used may hold times: by its name and what is in it."""
    words = set(_words(name))
    if words & _OTHERWISE or not (words & _TIMELIKE or _role(name)):
        return False
    if _any(rows, name, _is_span_cell):
        return True
    if not (words & _BESIDE or _role(name)):
        return False
    # `first` and `in` mean times only where there is a `last` or an `out`.
    alone = not any(other != name and _BESIDE & set(_words(other)) for other in columns)
    return not (words & _BESIDE and alone) and _any(rows, name, lambda c: as_time(c) is not None)


def read_spans(
    row: dict[str, Any], times: Times, caption_column: str | None, where: str, lost: list[str]
) -> list[CorpusSpan]:
    """Return the spans of a row, with their captions and all else that it carries.

    A row that lists none right is one span with that problem. Captions that are too large are
    added to what is `lost`; raise CorpusError for those that are no texts.
    """
    try:
        parts = times.of(row)
    except CorpusError as err:
        return [CorpusSpan(problem=str(err))]
    cell = as_list(row.pop(caption_column, None)) if caption_column else None
    shared = as_captions(cell, where=where, lost=lost)
    spans = []
    rest = as_extra(row, where=where)
    for part in parts:
        cells = dict(part.cells)
        captions = shared
        key: str | None = caption_column
        if key not in cells:
            key = caption_key(list(cells))
        if key is not None:
            captions = as_captions(cells.pop(key), where=where, lost=lost) or shared
        extra = {**rest, **as_extra(cells, where=where)}
        start = 0.0 if _is_missing(part.start) else as_time(part.start)
        end = as_time(part.end)
        if start is None or (end is None and not _is_missing(part.end)):
            problem = NO_LIST if part.start == NO_LIST else NO_TIME
            spans.append(CorpusSpan(captions=captions, extra=extra, problem=problem))
            continue
        in_frames = part.unit == 0
        scale = part.unit or 1.0
        from_s = part.from_s if in_frames else 0.0
        start = start * scale + part.from_s - from_s
        end = None if end is None else end * scale + part.from_s - from_s
        spans.append(CorpusSpan(start, end, captions, extra, in_frames, from_s))
    return spans or [CorpusSpan(problem=NO_SPAN)]


def _is_missing(cell: Any) -> bool:
    return cell is None or str(cell).strip().lower() in NO_CAPTION  # "", NaN, ...
