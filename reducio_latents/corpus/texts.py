"""Captions in text files beside the videos."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Sequence

from reducio_latents.core.text import printable
from reducio_latents.corpus.trees import MAX_TEXT_BYTES, TOO_LARGE, Tree
from reducio_latents.errors import CorpusError
from reducio_latents.files.source import public_url

log = logging.getLogger(__name__)


def text_name(video: str) -> str:
    """Return the name of the file that may hold the caption of the video."""
    return posixpath.splitext(video)[0] + ".txt"


def read_texts(tree: Tree, names: Sequence[str]) -> dict[str, str]:
    """Return each file's text without the white space around it, but for those that are too large.

    Raise CorpusError if any is not UTF-8, with the first one's name and how many there are: a
    caption in another encoding would be trained on as it is.
    """
    texts, bad, large = {}, [], []
    for name, data in zip(names, tree.read_all(names), strict=True):
        if len(data) > MAX_TEXT_BYTES:
            large.append(name)
            continue
        try:
            texts[name] = data.decode("utf-8-sig").strip()
        except UnicodeDecodeError as err:
            bad.append((name, err))
    if bad:
        raise not_utf8(f"{tree.root}/{bad[0][0]}", bad[0][1], others=len(bad) - 1)
    warn_of_lost_captions(tree.root, large, TOO_LARGE)
    return texts


def warn_of_lost_captions(root: str, names: Sequence[str], why: str) -> None:
    """Say how many files beside videos are not read, and why the first one is not."""
    if names:
        log.warning(
            "%d texts beside videos are left out, %s first: %s.",
            len(names),
            printable(f"{public_url(root)}/{names[0]}"),
            why,
        )


def not_utf8(where: str, err: UnicodeDecodeError, others: int = 0) -> CorpusError:
    more = f" {others} more are not, either." if others else ""
    return CorpusError(
        f"{printable(where)} is not UTF-8: byte {err.object[err.start]:#04x} at {err.start}. "
        f"Save it as UTF-8.{more}"
    )
