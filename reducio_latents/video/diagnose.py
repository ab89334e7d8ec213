"""Why a file cannot be read as a video, in words for the person who has it."""

from __future__ import annotations

import os
import string
from typing import BinaryIO

_HEAD_BYTES = 1 << 16
_DESCRIPTION_BYTES = 1 << 20
_ENCRYPTED_BOXES = (b"encv", b"pssh", b"tenc", b"drmi")
ENCRYPTED = "it is encrypted; decrypt it first"
_TEXT = frozenset(string.printable.encode())


def why_unreadable(file: BinaryIO) -> str:
    """Return a clause that says what the bytes look like instead of a readable video."""
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    if not head:
        return "the file is empty"
    if not any(head):
        return "the file starts with nothing but zero bytes; it was not written completely"
    if head[:16].lstrip()[:1] == b"<" or all(byte in _TEXT for byte in head[:1024]):
        return "it is a text or web page, not a video"
    if is_encrypted(file):
        return ENCRYPTED
    if head[4:8] == b"ftyp" and not _find_box(file, b"moov"):
        return "it is an MP4 without its index (moov box): it was cut short or never finished"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "it is a damaged Matroska or WebM file"
    return "it is not a video in a format that is known here, or it is damaged or encrypted"


def is_encrypted(file: BinaryIO) -> bool:
    """Return whether an MP4 says that its pictures are encrypted."""
    file.seek(0)
    if b"ftyp" not in file.read(64):
        return False
    file.seek(_find_box(file, b"moov") or 0)
    description = file.read(_DESCRIPTION_BYTES)
    return any(box in description for box in _ENCRYPTED_BOXES)


def _find_box(file: BinaryIO, wanted: bytes) -> int | None:
    """Walk the top level boxes of an MP4; return where the wanted one begins."""
    at, end = 0, file.seek(0, os.SEEK_END)
    while at < end:
        file.seek(at)
        header = file.read(16)
        if len(header) < 8:
            return None
        if header[4:8] == wanted:
            return at
        size = int.from_bytes(header[:4], "big")
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if size < 8:
            return None
        at += size
    return None
