"""A lock that is a file: one holder at a time, on this machine or any other that sees the place.

    with hold(LocalFiles(out), "running.json", "training"):
        ...                                     # refused at once while another process is in here

The file says who holds it, and its holder's heart beats in it. The lock of a dead process is taken
over: at once if it died on this machine, else when its heart has not beaten for `silence_s` by the
clock of the one who watches, so that no two clocks need agree. A holder that was suspended for so
long finds out by `require`.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep  # by name: a test replaces them here alone
from typing import Any

from reducio_latents.core.text import printable
from reducio_latents.errors import StoreError
from reducio_latents.files.protocol import Files

log = logging.getLogger(__name__)

HEART_S = 5.0
SILENCE_S = 60.0
POLL_S = 0.2


class Lock:
    """A lock that this process holds, until the end of its `hold` block."""

    def __init__(self, files: Files, path: str, record: dict[str, Any]) -> None:
        self._files, self._path, self._record = files, path, record
        self._lost = False

    @property
    def where(self) -> str:
        return f"{self._files.url}/{self._path}"

    def require(self) -> None:
        """Raise StoreError if another process has taken the lock over."""
        if self._lost:
            raise StoreError(
                f"{self.where} was taken over by another process, since this one did not move for "
                "long. What it has written stays; this process ends."
            )

    def beat(self) -> None:
        """Show once that this process is alive."""
        now = {**self._record, "beats": self._record["beats"] + 1}
        try:
            if not self._files.swap(self._path, _dump(self._record), _dump(now)):
                self._lost = True
        except StoreError as err:
            log.warning("no sign of life can be written to %s: %s", self.where, err)
        else:
            self._record = now

    def release(self) -> None:
        """Remove the file, if it is still ours."""
        with suppress(FileNotFoundError):
            if self._files.read(self._path) == _dump(self._record):
                self._files.delete(self._path)


@contextmanager
def hold(
    files: Files,
    path: str,
    what: str,
    *,
    wait: bool = False,
    beat_s: float = HEART_S,
    silence_s: float = SILENCE_S,
) -> Iterator[Lock]:
    """Hold the lock `path` of `files` during the block; `what` says what for: "training".

    While a living process holds it, raise StoreError, or with `wait` wait for it to end. Whether a
    process of another machine is alive takes some beats to see.
    """
    lock = Lock(files, path, {**_me(), "what": what, "token": secrets.token_hex(8), "beats": 0})
    _take(lock, files, path, wait, silence_s)
    ended = threading.Event()

    def beat_on() -> None:
        while not ended.wait(beat_s) and not lock._lost:
            lock.beat()

    thread = threading.Thread(target=beat_on, daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        ended.set()
        thread.join()
        lock.release()


def has_died(files: Files, path: str) -> bool:
    """Return whether a lock's holder is a process of this machine that has ended."""
    try:
        return _is_alive(_load(files.read(path))) is False
    except FileNotFoundError:
        return False


def _take(lock: Lock, files: Files, path: str, wait: bool, silence_s: float) -> None:
    mine = _dump(lock._record)
    seen: bytes | None = None
    since = monotonic()
    while not files.create(path, mine):
        try:
            found = files.read(path)
        except FileNotFoundError:
            continue  # its holder has just ended
        beats = seen is not None and found != seen
        if found != seen:
            seen, since = found, monotonic()
        holder = _load(found)
        alive = _is_alive(holder)
        if alive is False or monotonic() - since > silence_s:
            if files.swap(path, found, mine):
                log.warning("%s: took over the lock of %s.", lock.where, _name(holder))
                return
        elif not wait and (alive or beats):
            raise StoreError(
                f"{files.url} is in use: {_name(holder)} holds {path}. Wait for its end, or give "
                "another place."
            )
        sleep(POLL_S)


def _me() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "space": _process_space(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Return whether the process lives; None if it cannot be seen from here."""
    if (holder.get("host"), holder.get("space")) != (platform.node(), _process_space()):
        return None
    pid = holder.get("pid")
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return _started(pid) == holder.get("started")


def _process_space() -> str:
    """Name what process ids mean something in: a boot of a machine, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Return when a process began, in the kernel's ticks, by which one is told from a later one of
    the same number; None where that cannot be seen or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _name(holder: dict[str, Any]) -> str:
    what, pid, host = (printable(str(holder.get(k, "?")))[:80] for k in ("what", "pid", "host"))
    return f"{what} (process {pid} on {host})"


def _dump(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode()


def _load(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
