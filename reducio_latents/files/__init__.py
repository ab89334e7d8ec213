"""Whole files under one root: a local directory, or an object prefix.

A file appears whole or not at all, and is never changed in place.
"""

from __future__ import annotations

from pathlib import Path

from reducio_latents.files.local import LocalFiles
from reducio_latents.files.protocol import Buffer, Files, Origin

__all__ = ["Buffer", "Files", "LocalFiles", "Origin", "open_files"]


def open_files(root: str | Path) -> Files:
    """Return the files below a directory, or below a URL such as s3://bucket/prefix."""
    text = str(root)
    if "://" in text and not text.startswith("file://"):
        from reducio_latents.files.remote import open_remote

        return open_remote(text)
    return LocalFiles(Path(text.removeprefix("file://")))
