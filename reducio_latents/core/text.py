"""Text from elsewhere, made safe to show."""

from __future__ import annotations

import logging
import re

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


_USER = r"(?:[^\s/?#'\"]*@|[^\s/?#:@\['\"]*:(?!\d*(?:[/?#\s'\"]|$))[^\s@'\"]*@)?"
"""User and password before a host; keys of S3 hold a `/` as often as not."""
_URL = re.compile(rf"(?i)\b([a-z][a-z0-9+.-]*://){_USER}([^\s?#'\"]*)(\?[^\s'\"]+)?")
_FIELD = re.compile(
    r"(?i)(?<![\w-])((?:x-(?:amz|goog|oss|cos|ms)-[\w-]+|(?:\w+_)?token|(?:\w+_)?signature|sig|jwt"
    r"|(?:\w+_)?secret(?:_\w+)?|password|passwd|(?:\w+_)?api_?key|(?:aws_?)?access_?key(?:_?id)?)"
    r"(?:=|%3D))[^\s&'\"<>)]+"
)
"""What grants access in a query whose URL is cut off, as in `url: /a?X-Amz-Signature=1f`."""
_TOKEN = re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}|\bhf_[a-z0-9]{20,}")


def without_secrets(text: str) -> str:
    """Return the text with users, passwords and signatures taken out of the URLs in it, and tokens.

    >>> without_secrets("cannot read https://me:p/w@host/a.mp4?X-Amz-Signature=1f: gone")
    'cannot read https://host/a.mp4?...: gone'
    >>> without_secrets("no answer (url: /a.mp4?X-Amz-Signature=1f)")
    'no answer (url: /a.mp4?X-Amz-Signature=...)'
    """

    def shown(match: re.Match[str]) -> str:
        scheme, place, query = match.groups()
        end = ":" if query and query.endswith(":") else ""
        return f"{scheme}{place}{'?...' if query else ''}{end}"

    text = _FIELD.sub(r"\1...", _URL.sub(shown, text))
    return _TOKEN.sub(lambda match: f"{match[1] or ''}...", text)


def without_user(place: str) -> str:
    """Return what stands behind `://` in a URL, without user and password."""
    found = re.match(_USER, place)
    return place[found.end() :] if found else place


def print_logs_safely() -> None:
    """Have warnings printed safely, without secrets, where nobody has configured logging."""

    class SafeFormatter(logging.Formatter):
        def formatMessage(self, record: logging.LogRecord) -> str:
            return printable(without_secrets(super().formatMessage(record)))

    if logging.lastResort is not None:
        logging.lastResort.setFormatter(SafeFormatter())
