"""Files of a repository on the Hugging Face Hub, for reading, by fsspec."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from reducio_latents.errors import ConfigError, LatentsError, StoreError
from reducio_latents.files.inside import require_inside
from reducio_latents.files.protocol import require_readable

READ_BYTES = 8 << 20


def open_hub(url: str) -> HubFiles:
    """Return the files below hf://datasets/OWNER/NAME[@REVISION][/FOLDER].

    The token is the one of HF_TOKEN or of `hf auth login`. Raise StoreError if the repository
    cannot be reached, ConfigError if huggingface_hub is not installed.
    """
    files = HubFiles(url)
    files.probe()
    return files


class HubFiles:
    """Files that fsspec reads; they are never written, since each one would be a Git commit."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._root = self._url.split("://", 1)[1]
        self._opened: Any = None

    def __reduce__(self) -> tuple[type[HubFiles], tuple[str]]:
        return type(self), (self._url,)

    @property
    def url(self) -> str:
        return self._url

    @property
    def _system(self) -> Any:
        if self._opened is None:
            import fsspec

            try:
                self._opened = fsspec.filesystem(urlsplit(self._url).scheme)
            except ImportError as err:
                raise ConfigError(
                    f"{self._url} needs the package huggingface_hub. "
                    "Install it: pip install huggingface_hub."
                ) from err
        return self._opened

    def probe(self) -> None:
        """Raise StoreError unless the folder can be listed."""
        with self._told("open"):
            self._system.ls(self._root, detail=False)

    def read(self, path: str) -> bytes:
        require_readable(self._url, path, self.size(path) or 0)
        return b"".join(self.stream(path))

    def read_range(self, path: str, start: int, length: int) -> bytes:
        if start < 0:
            size = self.size(path)
            if size is None:
                raise FileNotFoundError(f"{self._url}/{path} does not exist")
            start = max(0, size + start)
        with self._told("read", path):
            data: bytes = self._system.cat_file(self._at(path), start, start + length)
        return data

    def stream(self, path: str) -> Iterator[bytes]:
        """Yield a whole file in pieces of some MiB."""
        with (
            self._told("read", path),
            self._system.open(self._at(path), "rb", block_size=READ_BYTES) as file,
        ):
            while piece := file.read(READ_BYTES):
                yield piece

    def size(self, path: str) -> int | None:
        info = self._info(path)
        return None if info is None else int(info["size"])

    def version(self, path: str) -> str | None:
        """Return what changes whenever the file does, or None if there is no such file."""
        info = self._info(path)
        if info is None:
            return None
        return f"{info.get('blob_id') or info.get('created') or ''}-{info['size']}"

    def sizes(self, paths: Collection[str]) -> dict[str, int]:
        return {path: size for path in paths if (size := self.size(path)) is not None}

    def list(self, prefix: str) -> Iterator[str]:
        found = []
        with suppress(FileNotFoundError), self._told("list", prefix):
            found = self._system.find(self._at(prefix) if prefix else self._root)
        root = self._system._strip_protocol(self._root).strip("/")
        yield from sorted(name.strip("/").removeprefix(f"{root}/") for name in found)

    def _refuse(self, path: str, *_: Any, **__: Any) -> NoReturn:
        raise StoreError(
            f"cannot change {self._url}/{path}: the Hub is only read. Write to a folder, then "
            "upload it: reducio-latents publish FOLDER hf://datasets/USER/NAME."
        )

    write = create = swap = delete = _refuse

    def local_path(self, path: str) -> Path | None:
        return None

    def _info(self, path: str) -> dict[str, Any] | None:
        info: dict[str, Any] = {}
        with suppress(FileNotFoundError), self._told("look up", path):
            info = self._system.info(self._at(path))
        return info if info.get("type") == "file" else None

    def _at(self, path: str) -> str:
        return f"{self._root}/{require_inside(path, self._url)}"

    @contextmanager
    def _told(self, verb: str, path: str = "") -> Iterator[None]:
        """Turn what fsspec raises into a StoreError; a missing file stays a FileNotFoundError."""
        try:
            yield
        except LatentsError:
            raise
        # What fsspec's systems raise has no common base: HTTP errors, ValueError, OSError.
        except Exception as err:
            if isinstance(err, FileNotFoundError) and verb != "open":
                raise
            text = " ".join(str(err).split())[:300]
            raise StoreError(
                f"cannot {verb} {self._url}/{path}: {type(err).__name__}: {text}. Check the name, "
                "the network and the token (HF_TOKEN)."
            ) from err
