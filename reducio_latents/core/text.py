"""Text from elsewhere, made safe to show."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

_OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""What a terminal acts on (control characters, ESC sequences begin with one), what turns the
direction of text, and what is not UTF-8."""


def printable(text: str, keep: str = "") -> str:
    r"""Return the text with what a terminal would obey written out: ESC as \x1b.

    Names and captions are whatever somebody typed: printed as they are, they could move the cursor,
    retitle the window or hide what stands before them. Characters in `keep` stay as they are.

    >>> printable("a\x1b]0;pwned\x07.mp4")
    'a\\x1b]0;pwned\\x07.mp4'
    """

    def written_out(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        number = ord(character)
        if 0xDC80 <= number <= 0xDCFF:  # a byte of a file name that is not UTF-8
            number -= 0xDC00
        return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"

    return _OBEYED.sub(written_out, text)


_URL = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)(?:[^\s/?#@'\"]*@)?([^\s?#'\"]*)(\?[^\s'\"]+)?")


def without_secrets(text: str) -> str:
    """Return the text with users, passwords and signatures taken out of the URLs in it.

    >>> without_secrets("cannot read https://me:pw@host/a.mp4?X-Amz-Signature=1f: gone")
    'cannot read https://host/a.mp4?...: gone'
    """

    def shown(match: re.Match[str]) -> str:
        scheme, place, query = match.groups()
        end = ":" if query and query.endswith(":") else ""
        return f"{scheme}{place}{'?...' if query else ''}{end}"

    return _URL.sub(shown, text)


def print_logs_safely(safe: Callable[[str], str] = printable) -> None:
    """Have warnings printed safely in a process whose logging nobody has configured."""

    class SafeFormatter(logging.Formatter):
        def formatMessage(self, record: logging.LogRecord) -> str:
            return safe(super().formatMessage(record))

    if logging.lastResort is not None:
        logging.lastResort.setFormatter(SafeFormatter())
