"""Files in a folder: whole or not at all, whatever happens to the one who writes."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import stat
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
            time.sleep(600)

    return write


def test_a_killed_writer_leaves_nothing_that_counts_and_is_swept_up(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write("x", b"as it was")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writer = context.Process(target=write_and_stall, args=(tmp_path, ready))
    writer.start()
    assert ready.wait(100)
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


def test_a_part_of_the_store_on_another_file_system_is_written_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounted").mkdir()
    genuine, renamed = Path.stat, []

    def stat(self: Path, **options: bool) -> os.stat_result:
        found = genuine(self, **options)
        device = found.st_dev + ("mounted" in self.parts)
        return os.stat_result([*found[:2], device, *found[3:]])

    def replace(self: Path, target: Path) -> Path:
        renamed.append((self.parent, target.parent))
        return genuine_replace(self, target)

    genuine_replace = Path.replace
    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(Path, "replace", replace)
    LocalFiles(tmp_path).write("mounted/x", b"1")
    assert renamed == [(tmp_path / "mounted" / ".partial", tmp_path / "mounted")]
    assert (tmp_path / "mounted" / "x").read_bytes() == b"1"


@pytest.fixture
def strange(tmp_path: Path) -> LocalFiles:
    """A store that somebody else has made, beside a file that is no part of it."""
    (tmp_path / "secret").write_text("secret")
    files = LocalFiles(tmp_path / "store")
    files.write("a/x", b"1")
    return files


def every_way_in(files: LocalFiles, path: str) -> list[Callable[[], object]]:
    return [
        lambda: files.read(path),
        lambda: files.read_range(path, 0, 4),
        lambda: files.local_path(path),
        lambda: files.create(path, b"x"),
        lambda: files.swap(path, None, b"x"),
        lambda: files.write(path, b"x"),
        lambda: files.size(path),
        lambda: files.delete(path),
    ]


@pytest.mark.parametrize("through", ["link", "folder/secret", "chain"])
def test_a_link_that_leads_out_of_the_store_is_refused(
    strange: LocalFiles, through: str, tmp_path: Path
) -> None:
    (strange.root / "link").symlink_to(tmp_path / "secret")
    (strange.root / "folder").symlink_to("..")
    (strange.root / "chain").symlink_to("a/../folder/secret")
    for way in every_way_in(strange, through):
        with pytest.raises(StoreError, match="is a link that leads out of the store") as caught:
            way()
        assert "\n" not in str(caught.value)
    assert (tmp_path / "secret").read_text() == "secret"


def test_a_link_inside_the_store_and_a_link_to_the_store_are_followed(
    strange: LocalFiles, tmp_path: Path
) -> None:
    (strange.root / "b").symlink_to("a")
    (tmp_path / "elsewhere").symlink_to(strange.root)
    assert LocalFiles(tmp_path / "elsewhere").read("b/x") == b"1"


def test_a_snapshot_of_the_hub_cache_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main" / "folder"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_bytes(b"1")
    (tmp_path / "secret").write_bytes(b"2")
    (snapshot / "x").symlink_to("../../../blobs/abc")
    (snapshot / "y").symlink_to("../../../secret")
    assert LocalFiles(snapshot).read("x") == b"1"
    with pytest.raises(StoreError, match="leads out"):
        LocalFiles(snapshot).read("y")


def test_where_files_are_written_is_no_link_to_another_place(
    strange: LocalFiles, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "letter").write_text("mine")
    (strange.root / ".partial").rename(tmp_path / "away")
    (strange.root / ".partial").symlink_to(own)
    strange.sweep()
    for write in (
        lambda: strange.write("y", b"1"),
        lambda: strange.create("y", b"1"),
        lambda: strange.swap("y", None, b"1"),
    ):
        with pytest.raises(StoreError, match=r"\.partial is a link, not a folder"):
            write()
    assert [path.name for path in own.iterdir()] == ["letter"]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_lies_among_half_written_files_is_not_opened(
    strange: LocalFiles, tmp_path: Path, kind: str
) -> None:
    (strange.root / ".partial").mkdir(exist_ok=True)
    lock = strange.root / ".partial" / "swapping"
    if kind == "link":
        lock.symlink_to(tmp_path / "new")
    else:
        os.mkfifo(lock)
    with pytest.raises(StoreError, match="cannot write"):
        strange.swap("y", None, b"1")
    strange.sweep()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["x.json", "x"])
def test_a_file_too_long_to_be_read_whole_is_refused_at_once(
    strange: LocalFiles, name: str
) -> None:
    with (strange.root / name).open("wb") as file:
        file.truncate(max(2 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    with pytest.raises(StoreError, match=rf"{name} has [\d,]+ bytes, and cannot be right"):
        strange.read(name)
    assert strange.read_range(name, 0, 2) == b"\0\0"


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device", "a folder"])
def test_what_is_not_a_file_is_refused_at_once(strange: LocalFiles, kind: str) -> None:
    path = strange.root / "x"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # as /dev/zero
        except PermissionError:
            pytest.skip("only root makes devices")
    reading: list[Callable[[], object]] = [
        lambda: strange.read("x"),
        lambda: strange.read_range("x", 0, 4),
        lambda: strange.local_path("x"),
    ]
    for read in reading:
        with pytest.raises(StoreError, match=f"cannot read .*x: it is {kind}, not a file"):
            read()
    assert strange.size("x") is None


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.EROFS, "the file system is read-only"),
        (errno.EIO, "input/output error"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "your quota is used up"),
        (errno.ESTALE, "stale handle"),
    ],
)
@pytest.mark.parametrize(
    "call", ["os.open", "os.fsync", "os.link", "os.replace", "os.unlink", "os.stat", "os.scandir"]
)
def test_a_file_system_that_fails_is_one_clear_error(
    strange: LocalFiles, monkeypatch: pytest.MonkeyPatch, number: int, why: str, call: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    ways = [*every_way_in(strange, "a/x"), lambda: list(strange.list("")), strange.sweep]
    ways += [lambda: strange.create("a/y", b"1"), lambda: strange.swap("a/x", b"1", b"2")]
    before = everything(strange.root)
    with monkeypatch.context() as patched:
        patched.setattr(call, fail)
        said = [err for way in ways if (err := error_of(way))]
    assert said
    for err in said:
        assert why in err
        assert "\n" not in err
    if call not in ("os.unlink", "os.scandir"):  # which leave what could not be removed, or walked
        strange.sweep()
        assert set(before) - {"a/x"} <= set(everything(strange.root)) <= {*before, "a/x", "a/y"}


def error_of(way: Callable[[], object]) -> str:
    try:
        way()
    except StoreError as err:
        return str(err)
    return ""


def test_without_hard_links_a_file_is_still_created_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    files, start, won = LocalFiles(tmp_path), threading.Barrier(6), []

    def create(mine: bytes) -> None:
        start.wait()
        if files.create("x", mine):
            won.append(mine)

    threads = [threading.Thread(target=create, args=(bytes([n]),)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [files.read("x")]
    assert files.swap("x", files.read("x"), b"new")
    assert files.swap("y", None, b"new")
    assert everything(tmp_path) == ["x", "y"]
