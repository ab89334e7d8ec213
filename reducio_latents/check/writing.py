"""Folders and files that a person named, with one line of reason if they cannot be written."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reducio_latents.errors import StoreError


def make_folder(folder: Path) -> None:
    """Make a folder to write to; call it before work that would be lost without one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise StoreError(f"cannot write to {folder}: {err.strerror}.") from err
    if not os.access(folder, os.W_OK):
        raise StoreError(f"cannot write to {folder}: {os.strerror(errno.EACCES)}.")


def write_text(path: Path, text: str) -> None:
    with _errors_about(path):
        path.write_text(text, encoding="utf-8")


def write_picture(path: Path, picture_HWC: NDArray[np.uint8]) -> None:
    with _errors_about(path):
        Image.fromarray(picture_HWC).save(path)


@contextmanager
def _errors_about(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise StoreError(f"cannot write {path}: {err.strerror or err}.") from err


def file_name(clip_id: str) -> str:
    """Return a clip id as a file name; ids of stores from elsewhere may hold anything."""
    return re.sub(r"[^\w.-]", "_", clip_id).lstrip(".") or "clip"
