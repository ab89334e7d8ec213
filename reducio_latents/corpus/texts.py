"""What stands beside a video: `x.txt`, its caption, and `x.json`, what else is known of it."""

from __future__ import annotations

import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from reducio_latents.core.config import Scalar
from reducio_latents.core.parsing import parse_json
from reducio_latents.core.text import printable
from reducio_latents.corpus.entry import (
    CAPTION_NAMES,
    LOST,
    CorpusSpan,
    as_captions,
    as_extra,
    match_name,
)
from reducio_latents.corpus.spans import find_times, read_spans
from reducio_latents.corpus.trees import MAX_TEXT_BYTES, TOO_LARGE, Tree
from reducio_latents.errors import CorpusError
from reducio_latents.files.source import public_url

log = logging.getLogger(__name__)

NAMED = 20
"""Files that a message names; of more it gives the number."""
SIDE_FILES = (".txt", ".json")
_FOLDERS = {
    *("caption", "captions", "cap", "caps", "text", "texts", "txt", "prompt", "prompts"),
    *("meta", "metas", "metadata", "json", "jsons"),
}
"""Names of folders of such files that tools write beside a folder of videos."""


@dataclass(frozen=True)
class Described:
    """What is said of one video."""

    captions: tuple[str, ...] = ()
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    spans: tuple[CorpusSpan, ...] = ()


@dataclass
class SideFiles:
    """Reads what stands beside videos, and keeps what was wrong with it until all is read."""

    caption_key: str | None
    """Key of the captions in JSON, if its name does not tell."""
    lost: dict[str, list[str]] = field(default_factory=dict)
    """Why texts are left out -> their names."""
    bad: list[str] = field(default_factory=list)
    """What is wrong with which JSON."""

    def leave_out(self, where: str, why: str) -> None:
        self.lost.setdefault(why, []).append(where)

    def read(self, text: tuple[str, bytes] | None, values: tuple[str, bytes] | None) -> Described:
        """Return what a text and a JSON file say, each given with its name.

        The text is the caption, else what the JSON has under one of `CAPTION_NAMES`.
        """
        caption = ""
        if text is not None:
            try:
                caption = text[1].decode("utf-8-sig").strip()
            except UnicodeDecodeError as err:
                byte = f"byte {err.object[err.start]:#04x} at {err.start}"
                self.leave_out(f"{text[0]} ({byte})", "not UTF-8")
        captions = as_captions(caption, where="", lost=[])
        if values is None:
            return Described(captions)
        where, lost = values[0], list[str]()
        try:
            said = self._values(values[1], where)
            not_times = {self.caption_key, "duration_span" if _is_of_clip(said, where) else None}
            names = [name for name in said if name not in not_times]
            times = find_times(names, [said], where)
            key = self.caption_key or match_name(CAPTION_NAMES, list(said))
            if times is not None:
                spans = read_spans(said, times, key if key in said else None, where, lost)
                spans = [replace(span, captions=span.captions or captions) for span in spans]
                found = Described(captions, {}, tuple(spans))
            else:
                if key in said and (not captions or (said[key],) == captions):
                    captions = captions or as_captions(said[key], where=where, lost=lost)
                    del said[key]
                found = Described(captions, as_extra(said, where=where))
        except CorpusError as err:
            self.bad.append(str(err))
            return Described(captions)
        for _ in lost:
            self.leave_out(where, LOST)
        return found

    def _values(self, data: bytes, where: str) -> dict[str, Any]:
        try:
            values = parse_json(data.decode("utf-8-sig"))
        except UnicodeDecodeError as err:
            raise not_utf8(where, err) from err
        except ValueError as err:
            raise CorpusError(f"{where} is not JSON: {err}. Correct or remove it.") from err
        if not isinstance(values, dict):
            raise CorpusError(f"{where} is not a JSON object. Correct or remove it.")
        return values

    def finish(self) -> None:
        """Say which texts are left out; raise CorpusError, naming all, if JSON is wrong."""
        for why, names in sorted(self.lost.items()):
            log.warning("%d texts beside videos are left out, %s: %s", len(names), why, few(names))
        if self.bad:
            first, *others = sorted(self.bad)
            more = f" {len(others)} more are wrong: {few(others)}" if others else ""
            raise CorpusError(f"{first}{more}")


def few(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    shown = "; ".join(printable(name) for name in sorted(names)[:NAMED])
    return f"{shown}{f'; and {len(names) - NAMED} more' if len(names) > NAMED else ''}"


def side_name(video: str, ending: str) -> str:
    """Return the name of the file that may stand beside a video."""
    return posixpath.splitext(video)[0] + ending


def _is_of_clip(said: Mapping[str, Any], where: str) -> bool:
    """Whether JSON is of a clip that was cut, whose `duration_span` is of what it was cut from."""
    names = (posixpath.basename(str(name)) for name in (said.get("clip_location", ""), where))
    return len({posixpath.splitext(name)[0] for name in names}) == 1


def side_files(videos: Sequence[str], texts: Iterable[str]) -> dict[str, str]:
    """Return `side_name` -> which of the texts it is: that one, or the only one of its file's name
    in a folder for such files, if no other video is called so."""
    there, apart = set(texts), dict[str, list[str]]()
    wanted = list({side_name(video, ending): 0 for video in videos for ending in SIDE_FILES})
    called = Counter(map(posixpath.basename, wanted))
    for name in there.difference(wanted):
        if not _FOLDERS.isdisjoint(name.lower().split("/")[:-1]):
            apart.setdefault(posixpath.basename(name), []).append(name)
    found = {name: name for name in wanted if name in there}
    for name in wanted:
        file = posixpath.basename(name)
        if name not in found and called[file] == 1 and len(apart.get(file, ())) == 1:
            found[name] = apart[file][0]
    return found


def read_beside(
    tree: Tree,
    videos: Sequence[str],
    of: Mapping[str, str],
    texts: Mapping[str, str | None],
    side: SideFiles,
) -> list[Described]:
    """Return what stands beside each of these videos, as `side_files` says.

    `texts` says of what there is why it cannot be read, if that is known.
    """
    names = sorted({*of.values()})
    for name in names:
        if (problem := texts[name]) is not None:
            side.leave_out(_shown(tree, name), problem)
    names = [name for name in names if texts[name] is None]
    found: dict[str, tuple[str, bytes]] = {}
    for name, data in zip(names, tree.read_all(names), strict=True):
        if isinstance(data, OSError):
            side.leave_out(_shown(tree, name), f"it cannot be read: {data.strerror}")
        elif len(data) > MAX_TEXT_BYTES:
            side.leave_out(_shown(tree, name), TOO_LARGE)
        else:
            found[name] = (_shown(tree, name), data)
    return [
        side.read(*(found.get(of.get(side_name(video, ending), "")) for ending in SIDE_FILES))
        for video in videos
    ]


def _shown(tree: Tree, name: str) -> str:
    return f"{public_url(tree.root)}/{name}"


def not_utf8(where: str, err: UnicodeDecodeError) -> CorpusError:
    return CorpusError(
        f"{printable(where)} is not UTF-8: byte {err.object[err.start]:#04x} at {err.start}. "
        "Save it as UTF-8."
    )
