"""Filesystems of fsspec, for what is read file by file: videos, tables, tars."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from reducio_latents.files.remote import OBJECT_SCHEMES, client_settings, patience


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return the filesystem that has `url`, and the path of `url` in it.

    Object storage is reached as `ObjectFiles` does, with the same credentials and limits; where
    obstore is not installed by fsspec's own packages, as is everything else. ImportError says
    which one is missing.
    """
    import fsspec

    scheme = urlsplit(url).scheme
    if scheme in OBJECT_SCHEMES:
        try:
            from obstore.fsspec import FsspecStore
        except ImportError:
            return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
        settings = client_settings(scheme, *patience())
        return FsspecStore(scheme, **settings), url.removeprefix(f"{scheme}://")
    return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
