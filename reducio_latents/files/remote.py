"""Whole files on object storage (S3, GCS, Azure), on a web server, or in memory, by obstore.

Credentials, regions and endpoints come from each process's environment and nowhere else, so that
an object that is pickled, printed or stored holds a URL and no secret. The names are those of the
services' own tools: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL (any
S3-compatible storage), AWS_SKIP_SIGNATURE=true (public buckets); GOOGLE_APPLICATION_CREDENTIALS;
AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY.

Requests that fail by a server's fault (5xx), a lost or silent connection are made again, after
pauses that grow from 0.2 to 5 s: REDUCIO_REMOTE_RETRIES times (10, for a storage that asks to slow
down does so for seconds), each given up after REDUCIO_REMOTE_TIMEOUT_S seconds (60) of silence, and
none after six times as long. A reading that breaks off goes on where it was.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from reducio_latents.core.text import without_secrets
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files.explained import explained
from reducio_latents.files.inside import require_inside
from reducio_latents.files.protocol import LISTING, Buffer, Origin, joined, require_readable

log = logging.getLogger(__name__)

OBJECT_SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
WEB_SCHEMES = ("https", "http")
CONNECT_S = 5
PROBE_RETRIES, PROBE_TIMEOUT_S = 2, 10
"""When a store is opened, nobody waits as long as in the middle of a run."""
PART_BYTES = 8 << 20
"""Larger files are sent in parts of this size, and appear when the last one has arrived."""
PARTS_AT_ONCE = 4
BROKEN_OFF = re.compile("response body|error sending request")
TRIED_OFTEN = re.compile(r"after (\d+) retries, max_retries: \1\b")
LIST_PAGE = 1000
REQUEST_ATTEMPTS = 3
UNCONDITIONAL = (
    "this object storage cannot write on condition (If-None-Match), so that two runs which begin "
    "at once may replace each other's files. Let one run at a time write to it."
)

AnswerT = TypeVar("AnswerT")
_memory: dict[str, Any] = {}
_runtime_pid: int | None = None
"""The process in which obstore's threads run, once they do."""


def open_remote(url: str) -> Origin:
    """Return the files below `url`: s3://, gs://, az://, https://, hf:// or memory://.

    Raise StoreError, within half a minute, if the place cannot be reached or read; ConfigError for
    a URL of another kind, one that holds credentials, or where a package is missing.
    """
    parts = urlsplit(url)
    if parts.query or without_secrets(url) != url:
        raise ConfigError(
            f"{without_secrets(url).partition('?')[0]} is given with credentials in it. "
            "Put them into the environment: a URL ends up in logs and in stores."
        )
    if parts.scheme == "hf":
        from reducio_latents.files.hub import open_hub

        return open_hub(url)
    if parts.scheme not in (*OBJECT_SCHEMES, *WEB_SCHEMES, "memory"):
        raise ConfigError(
            f"{url}: no way to read {parts.scheme}:// is known. Use a folder, s3://, gs://, az://, "
            "https:// or hf://."
        )
    files = ObjectFiles(url)
    files.probe()
    return files


class ObjectFiles:
    """Files below a URL. Every process opens the URL for itself."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._scheme = urlsplit(url).scheme
        self._store: Any = None
        self._store_pid = 0

    def __reduce__(self) -> tuple[type[ObjectFiles], tuple[str]]:
        return type(self), (self._url,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    @property
    def url(self) -> str:
        return self._url

    @property
    def read_only(self) -> bool:
        return self._scheme in WEB_SCHEMES

    def probe(self) -> None:
        """Raise StoreError unless the place answers; an empty one is no error."""
        obstore = _obstore(self._url)
        with explained("open", self._url):
            store = _new_store(obstore, self._url, PROBE_RETRIES, PROBE_TIMEOUT_S)
            try:
                if self.read_only:
                    obstore.head(store, "zarr.json")
                else:
                    first = lambda: next(iter(obstore.list(store, chunk_size=1)), None)  # noqa: E731
                    _persist(obstore, first, min(PROBE_RETRIES, patience()[0]))
            except FileNotFoundError:
                pass
            except obstore.exceptions.BaseError as err:
                if " 403 " not in str(err):
                    raise
                obstore.head(store, "zarr.json")  # some may read a bucket and not list it

    def read(self, path: str) -> bytes:
        def whole(obstore: Any, store: Any) -> bytes:
            found = obstore.get(store, path)
            require_readable(self._url, path, found.meta["size"])
            return bytes(found.bytes())

        return self._call("read", path, whole)

    def read_range(self, path: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        if start < 0:
            return self._read_tail(path, -start)[:length]
        try:
            return self._call(
                "read",
                path,
                lambda o, store: bytes(o.get_range(store, path, start=start, length=length)),
            )
        except StoreError:
            size = self.size(path)
            if size is not None and start >= size:  # which servers answer with an error
                return b""
            raise

    def _read_tail(self, path: str, length: int) -> bytes:
        if self._scheme not in ("az", "abfs", "abfss"):  # Azure cannot count from the end
            options: Any = {"range": {"suffix": length}}
            return self._call(
                "read", path, lambda o, store: bytes(o.get(store, path, options=options).bytes())
            )
        size = self.size(path)
        if size is None:
            raise FileNotFoundError(f"{self._url}/{path}")
        return self.read_range(path, max(0, size - length), length)

    def stream(self, path: str) -> Iterator[bytes]:
        """Yield a whole file in pieces of some MiB."""
        require_inside(path, self._url)
        with explained("read", f"{self._url}/{path}"):
            obstore, store = self._client()
            for piece in obstore.get(store, path).stream(min_chunk_size=PART_BYTES):
                yield bytes(piece)

    def write(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        self._require_writable(path)
        parts: Any = [data] if isinstance(data, Buffer) else data
        how: dict[str, Any] = {"chunk_size": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}
        if sum(memoryview(part).nbytes for part in parts) <= PART_BYTES:
            parts, how = b"".join(parts), {"use_multipart": False}
        self._call("write", path, lambda o, store: o.put(store, path, parts, **how))

    def create(self, path: str, data: Buffer | Sequence[Buffer]) -> bool:
        return self._put_if(path, joined(data), "create")

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        if old is None:
            return self.create(path, new)

        def get(obstore: Any, store: Any) -> tuple[bytes, Any]:
            there = obstore.get(store, path)
            return bytes(there.bytes()), there.meta

        try:
            found, meta = self._call("read", path, get)
        except FileNotFoundError:
            return False
        tags = {"e_tag": meta["e_tag"], "version": meta["version"]}
        mode = {name: tag for name, tag in tags.items() if tag is not None}
        return self._put_if(path, new, mode) if found == old else found == new

    def _put_if(self, path: str, whole: bytes, mode: Any) -> bool:
        """Write where nothing is (mode "create"), or over what has these tags; return whether
        `whole` is there now: a try that was answered by an error may have arrived."""
        self._require_writable(path)

        def put(obstore: Any, store: Any) -> bool:
            known = obstore.exceptions
            try:
                obstore.put(store, path, whole, mode=mode, use_multipart=False)
            except (known.AlreadyExistsError, known.PreconditionError, FileNotFoundError):
                return False
            except (known.BaseError, NotImplementedError) as err:
                if not (isinstance(err, NotImplementedError) or " 501 " in str(err)):
                    raise
                log.warning("%s: %s", self._url, UNCONDITIONAL)
                if mode == "create" and self._head(path) is not None:
                    return False
                obstore.put(store, path, whole, use_multipart=False)
            return True

        # S3 answers two who write at once with a conflict, at times both.
        for _ in range(REQUEST_ATTEMPTS):
            if self._call("write", path, put):
                return True
            with suppress(FileNotFoundError):
                return self.read(path) == whole
        return False

    def size(self, path: str) -> int | None:
        head = self._head(path)
        return None if head is None else int(head["size"])

    def version(self, path: str) -> str | None:
        """Return what changes whenever the file does, or None if there is no such file."""
        head = self._head(path)
        return None if head is None else f"{head['e_tag'] or head['last_modified']}-{head['size']}"

    def _listing(self, prefix: str) -> list[str]:
        try:
            names = self.read(LISTING).decode().splitlines()
        except FileNotFoundError as err:
            raise StoreError(
                f"{self._url} is a web server, which cannot be listed, and there is no {LISTING} "
                "of a latent store. Check the URL, or copy the whole store there."
            ) from err
        except UnicodeDecodeError as err:
            raise StoreError(f"{self._url}/{LISTING} is no list of file names: {err}.") from err
        return [name for name in names if not prefix or name.startswith(f"{prefix}/")]

    def delete(self, path: str) -> None:
        self._require_writable(path)
        with suppress(FileNotFoundError):
            self._call("delete", path, lambda o, store: o.delete(store, path))

    def local_path(self, path: str) -> Path | None:
        return None

    def _head(self, path: str) -> Any:
        try:
            return self._call("look up", path, lambda o, store: o.head(store, path))
        except FileNotFoundError:
            return None

    def _require_writable(self, path: str) -> None:
        if self.read_only:
            raise StoreError(
                f"cannot change {self._url}/{path}: a web server is only read. Write to a folder "
                "or to object storage."
            )

    def _call(self, verb: str, path: str, request: Callable[[Any, Any], AnswerT]) -> AnswerT:
        """Return what `request` makes of (obstore, store), its errors in our words."""
        if path or verb != "list":
            require_inside(path, self._url)
        with explained(verb, f"{self._url}/{path}"):
            obstore, store = self._client()
            return _persist(obstore, lambda: request(obstore, store), patience()[0])

    def _client(self) -> tuple[ModuleType, Any]:
        obstore = _obstore(self._url)
        if self._store_pid != os.getpid():
            self._store = _new_store(obstore, self._url, *patience())
            self._store_pid = os.getpid()
        return obstore, self._store

    def sizes(self, paths: Collection[str]) -> dict[str, int]:
        if self.read_only:
            return {path: size for path in paths if (size := self.size(path)) is not None}
        found: dict[str, int] = {}
        for folder in {require_inside(path, self._url).partition("/")[0] for path in paths}:
            found |= self._listed(folder)
        return found

    def list(self, prefix: str) -> Iterator[str]:
        yield from self._listing(prefix) if self.read_only else sorted(self._listed(prefix))

    def _listed(self, prefix: str) -> dict[str, int]:
        def collect(obstore: Any, store: Any) -> dict[str, int]:
            pages = obstore.list(store, prefix or None, chunk_size=LIST_PAGE)
            return {entry["path"]: entry["size"] for entry in chain.from_iterable(pages)}

        return self._call("list", prefix, collect)


def _persist(obstore: Any, request: Callable[[], AnswerT], retries: int) -> AnswerT:
    """Return what a request answers; make it again if it breaks off, as obstore does not always."""
    for left in range(retries, -1, -1):
        try:
            return request()
        except obstore.exceptions.BaseError as err:
            what, _, _ = str(err).partition("\n")
            if not left or TRIED_OFTEN.search(what) or not BROKEN_OFF.search(what):
                raise
    raise AssertionError("unreachable")


def _obstore(url: str) -> ModuleType:
    """Return the module, once it is sure that its threads live in this process."""
    global _runtime_pid
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as err:
        raise ConfigError(
            f"{url} needs the package obstore. Install it: pip install 'reducio-latents[remote]'."
        ) from err
    if _runtime_pid not in (None, os.getpid()):
        # Its threads did not come along into the fork: any request would wait for ever.
        raise StoreError(
            f"{url} was opened before this process was forked off, and cannot be read in it. Start "
            'workers by multiprocessing_context="forkserver" or "spawn", or use threads.'
        )
    _runtime_pid = os.getpid()
    module: ModuleType = obstore
    return module


def _new_store(obstore: Any, url: str, retries: int, timeout_s: float) -> Any:
    scheme = urlsplit(url).scheme
    if scheme == "memory":
        return _memory.setdefault(url, obstore.store.MemoryStore())
    settings = client_settings(scheme, retries, timeout_s)
    if scheme in WEB_SCHEMES:
        return obstore.store.HTTPStore(url, **settings)
    return obstore.store.from_url(url, **settings)


def patience() -> tuple[int, float]:
    """Return how often a request is made again, and after how many seconds of silence."""
    retries = _number("REDUCIO_REMOTE_RETRIES", 10)
    return int(retries), _number("REDUCIO_REMOTE_TIMEOUT_S", 60)


def client_settings(scheme: str, retries: int, timeout_s: float) -> dict[str, Any]:
    """Return what obstore's clients are made with."""
    silence = timedelta(seconds=timeout_s)
    return {
        "client_options": {
            "allow_http": _may_use_http(scheme),
            "connect_timeout": timedelta(seconds=min(CONNECT_S, timeout_s)),
            "read_timeout": silence,
            "timeout": timedelta(hours=1),  # a whole shard over a slow line, as long as it moves
        },
        "retry_config": {
            "max_retries": retries,
            "backoff": {
                "init_backoff": timedelta(seconds=0.2),
                "max_backoff": timedelta(seconds=5),
            },
            "retry_timeout": (silence + timedelta(seconds=5)) * min(retries + 1, 6),
        },
    }


def _may_use_http(scheme: str) -> bool:
    """Whether the user has named an address without TLS."""
    endpoints = (os.environ.get(f"AWS_ENDPOINT_URL{suffix}", "") for suffix in ("", "_S3"))
    return scheme == "http" or any(e.lower().startswith("http://") for e in endpoints)


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise ConfigError(f"{name} is {text!r} in the environment; give a number, as {default}.")
    return value


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
