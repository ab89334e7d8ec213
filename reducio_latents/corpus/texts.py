"""Captions in text files beside the videos."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from reducio_latents.corpus.trees import Tree
from reducio_latents.errors import CorpusError


def text_name(video: str) -> str:
    """Return the name of the file that may hold the caption of the video."""
    return posixpath.splitext(video)[0] + ".txt"


def read_texts(tree: Tree, names: Sequence[str]) -> dict[str, str]:
    """Return each file's text without the white space around it.

    Raise CorpusError if any is not UTF-8, with the first one's name and how many there are: a
    caption in another encoding would be trained on as it is.
    """
    texts, bad = {}, []
    for name, data in zip(names, tree.read_all(names), strict=True):
        try:
            texts[name] = data.decode("utf-8-sig").strip()
        except UnicodeDecodeError as err:
            bad.append((name, err))
    if bad:
        raise not_utf8(f"{tree.root}/{bad[0][0]}", bad[0][1], others=len(bad) - 1)
    return texts


def not_utf8(where: str, err: UnicodeDecodeError, others: int = 0) -> CorpusError:
    more = f" {others} more are not, either." if others else ""
    return CorpusError(
        f"{where} is not UTF-8: byte {err.object[err.start]:#04x} at {err.start}. "
        f"Save it as UTF-8.{more}"
    )
