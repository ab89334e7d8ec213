"""Glob and brace patterns, as a shell reads them, with `**` for any number of folders."""

from __future__ import annotations

import re

from reducio_latents.errors import CorpusError

MAX_EXPANSIONS = 1_000_000


def is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[{")


def split_pattern(pattern: str) -> tuple[str, str]:
    """Split at the first part that is not plain: the folder to look in, and the rest.

    >>> split_pattern("/data/part-*/{a,b}.mp4")
    ('/data', 'part-*/{a,b}.mp4')
    """
    parts = pattern.split("/")
    plain = next(i for i, part in enumerate(parts) if is_pattern(part))
    return "/".join(parts[:plain]) or "/", "/".join(parts[plain:])


def expand_braces(pattern: str) -> list[str]:
    """Expand `{a,b}` and `{000..012}`, the last keeping its leading zeros.

    >>> expand_braces("{08..10}.tar")
    ['08.tar', '09.tar', '10.tar']
    """
    done, waiting = [], [pattern]
    while waiting:
        text = waiting.pop()
        match = re.search(r"\{([^{}]*,[^{}]*|(\d+)\.\.(\d+))\}", text)
        if match is None:
            done.append(text)
            continue
        choices = match[1].split(",") if match[2] is None else _count(match[2], match[3])
        if len(done) + len(waiting) + len(choices) > MAX_EXPANSIONS:
            raise CorpusError(f"{pattern} names more than {MAX_EXPANSIONS:,} files. Use `*`.")
        waiting += [text[: match.start()] + c + text[match.end() :] for c in reversed(choices)]
    return done


def _count(first: str, last: str) -> list[str]:
    low, high = int(first), int(last)
    if high < low or high - low >= MAX_EXPANSIONS:
        raise CorpusError(f"{{{first}..{last}}} is not a usable range. Write it as {{000..012}}.")
    return [str(number).zfill(len(first)) for number in range(low, high + 1)]


def compile_glob(pattern: str) -> re.Pattern[str]:
    """Return what matches the whole of a relative path; `*` and `?` stop at `/`."""
    parts = pattern.split("/")
    regex = ""
    for number, part in enumerate(parts, start=1):
        last = number == len(parts)
        if part == "**":
            regex += ".*" if last else "(?:[^/]+/)*"
        else:
            regex += _translate(part) + ("" if last else "/")
    try:
        return re.compile(regex, re.DOTALL)
    except re.error as err:
        raise CorpusError(f"{pattern} is not a glob pattern: {err}. Correct its [...].") from err


def _translate(part: str) -> str:
    def token(match: re.Match[str]) -> str:
        text = match[0]
        if len(text) > 1 and text[0] == "[":
            negated, inner = text[1] == "!", text[1:-1].removeprefix("!").replace("\\", "\\\\")
            return f"(?!/)[{'^' if negated else ''}{inner}]"
        return {"*": "[^/]*", "?": "[^/]"}.get(text, re.escape(text))

    return re.sub(r"\[!?\]?[^\]/]*\]|.", token, part, flags=re.DOTALL)


def glob_depth(pattern: str) -> int | None:
    """Return how many levels below its folder a pattern reaches; None for any number."""
    parts = pattern.split("/")
    return None if "**" in parts else len(parts)
