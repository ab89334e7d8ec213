"""JSON that somebody else has written: parsed within bounds, or refused by one kind of error."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 32


def parse_json(data: bytes | str, limit: int = MAX_DEPTH) -> Any:
    """Return what JSON says; raise ValueError for other text, or if it nests deeper than `limit`.

    Python's own parser ends brackets without end by a RecursionError, and what it lets through may
    be too deep for those who walk it.
    """
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError(f"it nests deeper than {limit} levels") from None
    level = [found]
    for _ in range(limit):
        level = [item for one in level for item in _items(one) if isinstance(item, list | dict)]
        if not level:
            return found
    raise ValueError(f"it nests deeper than {limit} levels")


def _items(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
