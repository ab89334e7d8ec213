"""One holder at a time, of this machine or of others; the lock of a dead one is no obstacle."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import uuid
from pathlib import Path

import pytest

from reducio_latents.errors import StoreError
from reducio_latents.files import Files, LocalFiles, lock, open_files
from reducio_latents.files.lock import hold
from tests.object_storage import BUCKET, s3, s3_server

__all__ = ["s3", "s3_server"]

PATH = "running.json"
context = multiprocessing.get_context("fork")


@pytest.fixture(params=["folder", "s3"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    if request.param == "folder":
        return open_files(tmp_path / "out")
    request.getfixturevalue("s3")
    return open_files(f"s3://{BUCKET}/{uuid.uuid4().hex}")


def hold_in_child(root: Path) -> multiprocessing.process.BaseProcess:
    """Return a process that holds the lock of a folder, and does not let go of it."""
    ready = context.Event()

    def child() -> None:
        with hold(LocalFiles(root), PATH, "training"):
            ready.set()
            signal.pause()

    process = context.Process(target=child, daemon=True)
    process.start()
    assert ready.wait(30)
    return process


def other_machine(files: Files) -> bytes:
    """Write the lock of a process that cannot be seen from here."""
    record = {"host": "elsewhere", "space": "", "pid": 1, "started": None, "what": "a", "beats": 0}
    data = json.dumps(record).encode()
    files.write(PATH, data)
    return data


def test_a_second_holder_is_refused_and_told_who_is_there(files: Files) -> None:
    with hold(files, PATH, "training"):
        with pytest.raises(StoreError) as caught, hold(files, PATH, "training"):
            pass
        assert f"in use: training (process {os.getpid()} on " in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list(files.list("")) == []
    with hold(files, PATH, "training") as again:
        again.require()


def test_of_many_who_want_it_one_holds_it_at_a_time(files: Files) -> None:
    inside, most, start = [0], [0], threading.Barrier(5)

    def work() -> None:
        start.wait()
        with hold(files, PATH, "counting", wait=True):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    process = hold_in_child(tmp_path)
    with pytest.raises(StoreError, match="in use"), hold(LocalFiles(tmp_path), PATH, "training"):
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)  # and not waited for: a zombie is dead, too
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with hold(LocalFiles(tmp_path), PATH, "training", silence_s=1e9):
        pass
    process.join()


def test_another_process_of_the_same_number_does_not_hold_it(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write(PATH, json.dumps({**lock._me(), "started": "1", "beats": 0}).encode())
    with hold(files, PATH, "training", silence_s=1e9):
        pass


def test_a_holder_elsewhere_counts_as_long_as_its_heart_beats(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = other_machine(files)

    def beat(_: float) -> None:
        nonlocal last
        last = last.replace(b'"beats": 0', b'"beats": 1')
        files.write(PATH, last)

    monkeypatch.setattr(lock, "sleep", beat)
    with pytest.raises(StoreError, match="on elsewhere"), hold(files, PATH, "b", silence_s=1e9):
        pass
    assert files.read(PATH) == last


def test_a_holder_elsewhere_that_is_silent_loses_it_and_is_told(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads(other_machine(files))
    now = iter(range(0, 10_000, 20))
    monkeypatch.setattr(lock, "monotonic", lambda: next(now))
    with hold(files, PATH, "b", silence_s=60) as held:
        held.require()
        suspended = lock.Lock(files, PATH, record)
        suspended.beat()
        with pytest.raises(StoreError, match="taken over by another process"):
            suspended.require()
        held.beat()
        held.require()
    assert list(files.list("")) == []


def test_a_lock_that_is_no_json_is_that_of_a_silent_holder(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    for text in (b"", b"[" * 200_000, b"[1]", b'{"host": [], "pid": {}}'):
        files.write(PATH, text)
        with hold(files, PATH, "training", silence_s=0.0):
            pass
