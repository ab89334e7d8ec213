"""JSON that proves itself: its last key is the crc32c of every byte before it."""

from __future__ import annotations

from typing import Any

import google_crc32c

from reducio_latents.core.parsing import parse_json

KEY = "crc32c"


def seal(body: bytes) -> bytes:
    """Return the JSON object `body`, which has at least one key, with its checksum."""
    return b'%s,"%s":%d}\n' % (body[:-1], KEY.encode(), google_crc32c.value(body[:-1]))


def unseal(data: bytes) -> dict[str, Any]:
    """Return the object, its checksum with it; raise ValueError if any byte was changed."""
    head, found, _ = data.rpartition(b',"%s":' % KEY.encode())
    if not found or seal(head + b"}") != data:
        raise ValueError("it does not match its own checksum")
    record = parse_json(data)
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    return record
