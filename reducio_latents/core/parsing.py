"""JSON: what somebody else has written is parsed within bounds, or refused by one kind of error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 32


def parse_json(data: bytes | str, limit: int = MAX_DEPTH, *, unique: bool = False) -> Any:
    """Return what JSON says; raise ValueError for other text, or if it nests deeper than `limit`.

    With `unique` also if an object has a name twice, of which Python's parser keeps the last.

    Python's own parser ends brackets without end by a RecursionError, and what it lets through may
    be too deep for those who walk it.
    """
    try:
        found = json.loads(data, object_pairs_hook=once if unique else None)
    except RecursionError:
        raise ValueError(f"it nests deeper than {limit} levels") from None
    except MemoryError:
        raise ValueError("there is no memory for all of it") from None
    return bounded(found, limit)


def bounded(found: Any, limit: int = MAX_DEPTH) -> Any:
    """Return what was parsed; raise ValueError if it nests deeper than `limit`."""
    level = [found] if isinstance(found, list | dict) else []
    for _ in range(limit):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [item for items in inner for item in items if isinstance(item, list | dict)]
        if not level:
            return found
    raise ValueError(f"it nests deeper than {limit} levels")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; raise ValueError if it has a name twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has two values named {twice!r}")
    return found


def fingerprint_of(config: Mapping[str, Any]) -> str:
    """Return the sha256 of a JSON-able config, independent of the order of its keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def compact_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
