"""Captions as the text encoder gets them: as they are, or cleaned.

PixArt-style models were trained on web captions from which addresses, markup, file names, serial
numbers and advertising were removed; a caption that keeps them is one that they have not seen. The
steps and their order are those of the published extraction, applied twice as there.
"""

# ruff: noqa: RUF001 (characters that look like others are what is replaced here)
from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from html import unescape
from urllib.parse import unquote_plus

from reducio_latents.core.libraries import import_library
from reducio_latents.errors import ConfigError

_SUFFIXES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_ADDRESS = r"[a-zA-Z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (
    "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_IDEOGRAPHS = "\u31c0-\u31ff\u3200-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_BEFORE_MARKUP = _rules(
    (r"<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_ADDRESS})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_ADDRESS})", ""),
)
_AFTER_MARKUP = _rules(
    (r"@\w+\b", ""),  # a nickname
    (rf"[{_IDEOGRAPHS}]+", ""),
    (rf"[{_DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # an IP address
    (r"\d:\d\d\s+$", ""),  # an article's number
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_SUFFIXES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINED_WORDS = re.compile(r"[-_]")
_LAST = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # serial numbers: ab1234, ab12cd, 12ab34
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_SUFFIXES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # a size; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_pixart(caption: str) -> str:
    """Return a caption as PixArt-style models expect it: lower case, plain words.

    Raises ConfigError where ftfy or bs4 is not installed.
    """
    return _clean_once(_clean_once(_whole(caption)))


def _clean_once(caption: str) -> str:
    ftfy = import_library("ftfy", "text cleaning pixart")
    text = _apply(_BEFORE_MARKUP, unquote_plus(caption).strip().lower())
    text = _apply(_AFTER_MARKUP, _without_markup(text))
    if len(_JOINED_WORDS.findall(text)) > 3:
        text = _JOINED_WORDS.sub(" ", text)
    text = unescape(unescape(ftfy.fix_text(text))).strip()
    return _apply(_LAST, text).strip()


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_markup(text: str) -> str:
    """Return what a page would show; text that no parser reads as markup is left as it is."""
    bs4 = import_library("bs4", "text cleaning pixart")
    try:
        with warnings.catch_warnings():  # of captions that look like a file's name or an address
            warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
            shown: str = bs4.BeautifulSoup(text, features="html.parser").text
    except bs4.ParserRejectedMarkup:
        return text
    return shown


def clean_whitespace(caption: str) -> str:
    """Return a caption with mended characters, without entities, and with single spaces.

    Source: what Wan was trained on. Raises ConfigError where ftfy is not installed.
    """
    ftfy = import_library("ftfy", "text cleaning whitespace")
    text = unescape(unescape(ftfy.fix_text(_whole(caption))))
    return " ".join(text.split())


def _whole(caption: str) -> str:
    return caption.encode(errors="replace").decode()  # half a surrogate pair is no character


CLEANINGS: dict[str, Callable[[str], str]] = {
    "none": str,
    "whitespace": clean_whitespace,
    "pixart": clean_pixart,
}
"""Name -> what is done to a caption before it is cut into tokens."""
REVISIONS = {"pixart": "pixart, by ftfy"}
"""What a fingerprint calls a cleaning whose results are not what they once were."""


def get_cleaning(name: str) -> Callable[[str], str]:
    """Return the cleaning called `name`; raise ConfigError if there is none."""
    if name not in CLEANINGS:
        raise ConfigError(f"text cleaning is {name!r}; choose one of {', '.join(CLEANINGS)}.")
    return CLEANINGS[name]
