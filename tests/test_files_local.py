"""Files in a folder: whole or not at all, whatever happens to the one who writes."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from reducio_latents.errors import StoreError
from reducio_latents.files import Buffer, LocalFiles, local, open_files


def everything(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    open_files(f"file://{tmp_path}").write("x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = LocalFiles(tmp_path)
    files.write("a/x", b"as it was")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write .*a/x: the disk is full\. Free some space"):
        files.write("a/x", b"new")
    assert everything(tmp_path) == ["a/x"]
    assert files.read("a/x") == b"as it was"


def test_a_file_where_a_folder_should_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"I am a file")
    for root in (tmp_path / "store", tmp_path / "store" / "below"):
        files = LocalFiles(root)
        assert files.size("zarr.json") is None
        with pytest.raises(StoreError, match=r"cannot write .*Give a folder of its own"):
            files.write("zarr.json", b"{}")
    assert (tmp_path / "store").read_bytes() == b"I am a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="permission denied"):
        LocalFiles(tmp_path).write("x", b"1")
    tmp_path.chmod(0o700)


def test_permission_denied_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(local, "_write_durably", denied)
    with pytest.raises(StoreError, match=r"permission denied\. Check who owns the folder"):
        LocalFiles(tmp_path).write("x", b"1")


def write_and_stall(root: Path, ready: Event) -> None:
    setattr(local, "_write_durably", _slow_write(ready))  # noqa: B010
    LocalFiles(root).write("x", b"new")


def _slow_write(ready: Event) -> Callable[[Path, Sequence[Buffer]], None]:
    def write(path: Path, parts: Sequence[Buffer]) -> None:
        with path.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(b"half")
            file.flush()
            ready.set()
            time.sleep(60)

    return write


def test_a_killed_writer_leaves_nothing_that_counts_and_is_swept_up(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write("x", b"as it was")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writer = context.Process(target=write_and_stall, args=(tmp_path, ready))
    writer.start()
    assert ready.wait(10)
    assert len(everything(tmp_path)) == 2
    assert list(files.list("")) == ["x"]
    files.sweep()
    assert len(everything(tmp_path)) == 2, "a living writer's file was taken"
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert files.read("x") == b"as it was"
    files.sweep()
    assert everything(tmp_path) == ["x"]


def test_a_writer_whose_file_is_swept_before_it_has_its_lock_writes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, genuine = LocalFiles(tmp_path), local._write_durably
    taken: list[Path] = []

    def taken_once(path: Path, parts: Sequence[Buffer]) -> None:
        genuine(path, parts)
        if not taken:
            taken.append(path)
            path.unlink()

    monkeypatch.setattr(local, "_write_durably", taken_once)
    files.write("x", b"1")
    assert files.read("x") == b"1"


def test_sweeping_where_there_is_nothing_is_no_error(tmp_path: Path) -> None:
    LocalFiles(tmp_path / "nothing").sweep()


def test_many_writers_of_one_file_leave_one_whole_version(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    versions = [bytes([n]) * 10_000 for n in range(6)]

    def write(data: bytes) -> None:
        for _ in range(10):
            files.write("a/b/x", [data[:5000], data[5000:]])

    threads = [threading.Thread(target=write, args=(data,)) for data in versions]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        if files.size("a/b/x") is not None:
            seen.add(files.read("a/b/x"))
    for thread in threads:
        thread.join()
    assert seen | {files.read("a/b/x")} <= set(versions)
    assert everything(tmp_path) == ["a/b/x"]


def test_a_store_whose_folder_is_another_file_system_is_written_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    folder = elsewhere / f"reducio-test-{os.getpid()}"
    folder.mkdir()
    try:
        (tmp_path / "bucket").symlink_to(folder)
        LocalFiles(tmp_path).write("bucket/x", b"1")
        assert (folder / "x").read_bytes() == b"1"
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
