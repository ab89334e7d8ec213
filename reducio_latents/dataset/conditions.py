"""Conditions on what is known of clips, as pyarrow takes them: `[("motion", ">", 2.0), ...]`.

A list of conditions must hold as a whole; of a list of such lists, one of them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducio_latents.core.config import Scalar
from reducio_latents.errors import ConfigError

COMPARISONS = {
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    ">": pc.greater,
    "<=": pc.less_equal,
    ">=": pc.greater_equal,
}
OPERATORS = (*COMPARISONS, "in", "not in")
MAX_TEXT = 1 << 20
NOT_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
"""What `ast.literal_eval` raises of other texts."""
LIKE_THIS = 'write a list of conditions, as [("motion", ">", 2.0)]'
ONE_CONDITION = re.compile(
    r"""\s*(?P<name>'[^']+'|"[^"]+"|.+?)\s*(?P<op>\bnot\s+in\b|\bin\b|[=!<>]=|[=<>](?!=))"""
    r"\s*(?P<value>.+?)\s*",
    re.DOTALL,
)
"""`motion > 2`, as a command line may have it."""


class Condition(NamedTuple):
    """One comparison with what is known of a clip. What is not known is never right."""

    name: str
    op: str
    value: Scalar | tuple[Scalar, ...]


Alternatives = tuple[tuple[Condition, ...], ...]
"""One of them must hold, which is all of its conditions; none at all is no condition."""


def parse_conditions(filters: Any) -> Alternatives:
    """Return what `filters` say: a list, a list of lists, or either as text; ConfigError for else.

    Text may also be one condition, `motion > 2`.
    """
    if isinstance(filters, str):
        filters = _of_text(filters)
    if filters is None:
        return ()
    if not isinstance(filters, list | tuple):
        raise ConfigError(f"filters are {_short(filters)}; {LIKE_THIS}.")
    if _looks_like_one(filters):
        filters = [filters]
    if not filters:
        return ()
    groups = [filters] if all(map(_looks_like_one, filters)) else filters
    for group in groups:
        if not isinstance(group, list | tuple) or not group or _looks_like_one(group):
            raise ConfigError(
                f"filters hold {_short(group)}; {LIKE_THIS}, or a list of such lists, of which one "
                "must hold."
            )
    return tuple(tuple(_condition(item) for item in group) for group in groups)


def _looks_like_one(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == 3 and isinstance(item[0], str)


def _of_text(text: str) -> Any:
    if len(text) > MAX_TEXT:
        raise ConfigError(f"filters are {len(text)} characters; {MAX_TEXT} are the most.")
    if text.lstrip()[:1] in ("[", "("):
        try:
            return ast.literal_eval(text.strip())
        except NOT_LITERAL as err:
            raise ConfigError(f"filters are {_short(text)}; {LIKE_THIS}.") from err
    found = ONE_CONDITION.fullmatch(text)
    if found is None:
        raise ConfigError(f"filters are {_short(text)}; {LIKE_THIS}, or motion > 2.")
    return [(found["name"].strip("'\""), found["op"], _unquoted(found["value"]))]


def _unquoted(text: str) -> Any:
    """Return the value of a literal; text that is none stands for itself."""
    with suppress(*NOT_LITERAL):
        return ast.literal_eval(text)
    return text


def _condition(item: Any) -> Condition:
    if not _looks_like_one(item):
        raise ConfigError(f"{_short(item)} is no condition; {LIKE_THIS}.")
    name, op, value = item
    op = " ".join(op.split()) if isinstance(op, str) else op
    if op not in OPERATORS:
        raise ConfigError(f"{op!r} is no comparison; choose one of {', '.join(OPERATORS)}.")
    if op not in ("in", "not in"):
        return Condition(name, op, _scalar(value, name))
    if isinstance(value, np.ndarray | pa.Array | pa.ChunkedArray):
        value = value.tolist()
    if not isinstance(value, list | tuple | set | frozenset):
        raise ConfigError(f"{name} {op} {_short(value)}: give a list of values.")
    values = tuple(_scalar(each, name) for each in value)
    if len({isinstance(each, str) for each in values}) > 1:
        raise ConfigError(f"{name} {op} {_short(value)}: give texts or numbers, not both.")
    return Condition(name, op, values)


def _scalar(value: Any, name: str) -> Scalar:
    value = value.item() if isinstance(value, np.generic) else value
    if (isinstance(value, float) and value != value) or value is None:
        raise ConfigError(
            f"{name} is compared with {value}; a clip that has no {name} never passes, so leave "
            "the condition out."
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = float(value)
    if not isinstance(value, Scalar):
        raise ConfigError(f"{name} is compared with {_short(value)}; give a number or a text.")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def passing(alternatives: Alternatives, table: pa.Table) -> NDArray[np.bool_]:
    """Return for which rows of a table, which has a column for each name, one alternative holds."""
    held = [[_holds(condition, table[condition.name]) for condition in a] for a in alternatives]
    flags: NDArray[np.bool_] = np.any([np.all(each, axis=0) for each in held], axis=0)
    return flags


def _holds(condition: Condition, column: pa.ChunkedArray) -> NDArray[np.bool_]:
    name, op, value = condition
    values = value if isinstance(value, tuple) else (value,)
    wants_text = bool(values) and isinstance(values[0], str)
    if pa.types.is_null(column.type):  # of the corpus' table, which has nothing in it
        return np.zeros(len(column), np.bool_)
    if is_text(column) and not wants_text and values:
        column = numbers_in(column)
        if column.null_count == len(column) > 0:
            raise ConfigError(f"{name} holds texts, and is compared with {_short(value)}.")
    if not is_text(column) and wants_text:
        raise ConfigError(f"{name} holds no texts, and is compared with {_short(value)}.")
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if isinstance(value, tuple):
        found = _is_in(column, value)
        found = pc.invert(found) if op == "not in" else found
    else:
        number = int(value) if isinstance(value, bool) else value
        if isinstance(number, float) and pa.types.is_integer(column.type):
            column = column.cast(pa.float64(), safe=False)  # which is as near as floats come
        found = COMPARISONS[op](column, pa.scalar(number))
    flags: NDArray[np.bool_] = np.asarray(pc.and_(known(column), pc.fill_null(found, False)))
    return flags


def _is_in(column: pa.ChunkedArray, values: Sequence[Scalar]) -> pa.ChunkedArray:
    if is_text(column):
        return pc.is_in(column, pa.array(values, pa.string()))
    whole = pa.types.is_integer(column.type) and all(isinstance(v, int) for v in values)
    kind = pa.int64() if whole else pa.float64()
    return pc.is_in(
        column.cast(kind, safe=False), pa.array([kind.to_pandas_dtype()(v) for v in values], kind)
    )


def is_text(column: pa.ChunkedArray) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def known(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return where there is a value: neither null nor NaN."""
    return pc.invert(pc.is_null(column, nan_is_null=True))


def numbers_in(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the numbers that texts write, null for those that write none."""

    def number(text: str | None) -> float | None:
        try:
            return None if text is None else float(text)
        except ValueError:
            return None

    texts = column.combine_chunks().dictionary_encode()
    found = pa.array([number(text) for text in texts.dictionary.to_pylist()], pa.float64())
    return pa.chunked_array([found.take(texts.indices)])
