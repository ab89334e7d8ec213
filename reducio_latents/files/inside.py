"""Paths that stay inside their root."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from reducio_latents.core.text import printable
from reducio_latents.errors import StoreError


def require_inside(path: str, url: str) -> str:
    """Return `path`; raise StoreError unless it is relative and plain, whoever asks for it.

    Paths come out of descriptions, commits and indices, which anybody may have written.
    """
    if "\0" in path or not all(part not in ("", ".", "..") for part in path.split("/")):
        raise StoreError(
            f"{printable(path)!r} is no path of a file inside {url}. Whoever wrote the store's "
            "files is wrong or means harm: do not use it, or restore it from a copy."
        )
    return path


def place_inside(root: Path, path: str) -> Path:
    """Return where `path` lies below the folder `root`.

    Raise StoreError if it would be outside, by its name or by a symbolic link in the store. Links
    of the Hugging Face cache, whose snapshots hold links to blobs, are no such links.
    """
    full = root / require_inside(path, str(root))
    if not _leads_on(root, path):
        return full
    real, home = os.path.realpath(full), os.path.realpath(root)
    if real.startswith(home.rstrip("/") + "/"):
        return full
    if any(real.startswith(f"{blobs}/") for blobs in _hub_blobs(home)):
        return full
    raise StoreError(
        f"{root}/{printable(path)} is a link that leads out of the store, to {printable(real)}. "
        "Remove it, or put the file itself there."
    )


def _leads_on(root: Path, path: str) -> bool:
    """Return whether there is a symbolic link on the way from `root` to `path`."""
    place = str(root)
    for part in path.split("/"):
        place = f"{place}/{part}"
        try:
            if stat.S_ISLNK(os.lstat(place).st_mode):
                return True
        except OSError:  # nothing is there
            return False
    return False


def _hub_blobs(home: str) -> list[str]:
    revisions = [f for f in Path(home, "_").parents if f.parent.name == "snapshots"]
    return [f"{revision.parent.parent}/blobs" for revision in revisions]
