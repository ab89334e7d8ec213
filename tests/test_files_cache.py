"""The cache of remote files: fetched once, proven, bounded, shared, never broken under a reader."""

from __future__ import annotations

import errno
import hashlib
import logging
import mmap
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files import LocalFiles, cache
from reducio_latents.files.cache import CachedFiles, cache_folder
from reducio_latents.files.remote import open_remote
from tests.object_storage import BUCKET, FaultyProxy, s3, s3_server

__all__ = ["s3", "s3_server"]

KIB = 1 << 10


class Origin(LocalFiles):
    """A folder that is read like a remote place, and keeps a log of what was fetched."""

    pause_s = 0.0

    @property
    def log(self) -> Path:
        return self.root.with_suffix(".log")

    @property
    def fetched(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    def stream(self, path: str) -> Iterator[bytes]:
        with self.log.open("a") as log:
            log.write(f"{path}\n")
        data = self.read(path)
        for start in range(0, len(data), 700):
            time.sleep(self.pause_s)
            yield data[start : start + 700]

    def version(self, path: str) -> str | None:
        try:
            stat = (self.root / path).stat()
        except FileNotFoundError:
            return None
        return f"{stat.st_mtime_ns}-{stat.st_size}"


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    origin = Origin(tmp_path / "origin")
    for number in range(6):
        origin.write(f"f{number}", os.urandom(KIB))
    return origin


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "HANDED_OUT_S", 0.0)


def cached(origin: Origin, max_bytes: int = 100 * KIB) -> CachedFiles:
    return CachedFiles(origin, origin.root.with_name("cache"), max_bytes)


def blobs(files: CachedFiles) -> int:
    return sum(path.stat().st_size for path in files.folder.iterdir() if path.is_file())


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_fetched_once_and_is_the_same(origin: Origin) -> None:
    files = cached(origin)
    for _ in range(3):
        assert files.local_path("f0").read_bytes() == origin.read("f0")
    assert cached(origin).local_path("f0") == files.local_path("f0")
    assert origin.fetched == ["f0"]


def test_small_files_are_always_read_where_they_are(origin: Origin) -> None:
    files = cached(origin)
    files.local_path("f0")
    files.write("f0", b"new")
    assert files.read("f0") == b"new"
    assert files.read_range("f0", -2, 2) == b"ew"
    assert files.size("f0") == 3
    assert files.local_path("f0").read_bytes() == b"new"
    files.delete("f0")
    with pytest.raises(FileNotFoundError):
        files.local_path("f0")
    assert list(files.list("")) == ["f1", "f2", "f3", "f4", "f5"]


def test_processes_of_a_machine_fetch_each_file_once(origin: Origin) -> None:
    origin.pause_s = 0.02
    files = cached(origin)

    def read_all() -> None:
        for number in range(4):
            assert files.local_path(f"f{number}").stat().st_size == KIB

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=read_all) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sorted(origin.fetched) == ["f0", "f1", "f2", "f3"]


def test_threads_of_a_process_fetch_each_file_once(origin: Origin) -> None:
    origin.pause_s = 0.01
    files = cached(origin)
    threads = [threading.Thread(target=files.local_path, args=("f1",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert origin.fetched == ["f1"]


@pytest.mark.usefixtures("no_grace")
def test_the_least_recently_used_go_first(origin: Origin) -> None:
    files = cached(origin, max_bytes=3 * KIB)
    paths = [files.local_path(f"f{number}") for number in range(3)]
    for number, path in enumerate(paths):
        age(path, 100 - number)
    files.local_path("f0")
    files.local_path("f3")
    assert [path.exists() for path in paths] == [True, False, True]
    assert blobs(files) <= 3 * KIB


@pytest.mark.usefixtures("no_grace")
def test_the_bound_holds_whatever_is_read(origin: Origin) -> None:
    files = cached(origin, max_bytes=5 * KIB // 2)
    for number in [0, 1, 2, 3, 4, 5, 0, 2, 4, 1, 3, 5]:
        assert files.local_path(f"f{number}").read_bytes() == origin.read(f"f{number}")
        assert blobs(files) <= 5 * KIB // 2


@pytest.mark.usefixtures("no_grace")
def test_a_mapped_file_stays_readable_after_it_is_evicted(origin: Origin) -> None:
    files = cached(origin, max_bytes=KIB)
    path = files.local_path("f0")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        files.local_path("f1")
        assert not path.exists()
        assert mapped[:] == origin.read("f0")


def test_what_was_just_handed_out_is_not_evicted(origin: Origin) -> None:
    files = cached(origin, max_bytes=KIB)
    first = files.local_path("f0")
    files.local_path("f1")
    assert first.read_bytes() == origin.read("f0")
    age(first, 2 * cache.HANDED_OUT_S)
    files.local_path("f2")
    assert not first.exists()


def test_a_file_larger_than_the_cache_is_refused(origin: Origin) -> None:
    with pytest.raises(StoreError, match=r"f0 has 1,024 bytes, the cache may hold 1,000"):
        cached(origin, max_bytes=1000).local_path("f0")


def test_a_file_that_arrives_damaged_is_fetched_again(origin: Origin) -> None:
    class Unsteady(Origin):
        def stream(self, path: str) -> Iterator[bytes]:
            yield from super().stream(path)
            if len(self.fetched) < 3:
                yield b"noise"

    unsteady = Unsteady(origin.root)
    files = cached(unsteady)
    files.sha256.update({"f0": sha256(origin.read("f0"))})
    assert files.local_path("f0").read_bytes() == origin.read("f0")
    assert unsteady.fetched == ["f0"] * 3


def test_a_file_that_is_damaged_at_its_origin_never_enters_the_cache(origin: Origin) -> None:
    files = CachedFiles(origin, origin.root.with_name("cache"), 9 * KIB, {"f0": sha256(b"other")})
    with pytest.raises(StoreError, match=r"f0 arrived 3 times with sha256 .*Run `verify`"):
        files.local_path("f0")
    assert blobs(files) == 0


def test_equal_files_are_kept_once(origin: Origin) -> None:
    origin.write("copy", origin.read("f0"))
    files = cached(origin)
    files.sha256.update(dict.fromkeys(("f0", "copy"), sha256(origin.read("f0"))))
    assert files.local_path("f0") == files.local_path("copy")
    assert origin.fetched == ["f0"]


def test_a_checksum_is_not_taken_for_a_path(origin: Origin) -> None:
    files = cached(origin)
    files.sha256.update({"f0": "../../etc/passwd"})
    with pytest.raises(StoreError, match="is no sha256"):
        files.local_path("f0")


def test_a_reader_keeps_to_the_version_that_it_began_with(origin: Origin) -> None:
    files = cached(origin)
    path = files.local_path("f0")
    before = path.read_bytes()
    origin.write("f0", os.urandom(KIB))
    assert files.local_path("f0").read_bytes() == before
    assert cached(origin).local_path("f0").read_bytes() == origin.read("f0")
    path.unlink()
    with pytest.raises(StoreError, match=r"f0 has been replaced since it was opened\. Start again"):
        files.local_path("f0")


def test_files_are_fetched_ahead_in_the_background(origin: Origin) -> None:
    files = cached(origin)
    files.prefetch(["f0", "f1", "f2"])
    files.close()
    wait_until(lambda: len(origin.fetched) <= 3)
    files.prefetch(["f3", "f4"])
    wait_until(lambda: {"f3", "f4"} <= set(origin.fetched))
    files.close()
    count = len(origin.fetched)
    assert files.local_path("f3").read_bytes() == origin.read("f3")
    assert len(origin.fetched) == count


def test_a_newer_wish_takes_the_place_of_what_still_waits(
    origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "FETCHERS", 1)
    origin.pause_s = 0.02
    files = cached(origin)
    files.prefetch(["f0", "f1", "f2"])
    wait_until(lambda: origin.fetched == ["f0"])
    files.prefetch(["f4"])
    wait_until(lambda: "f4" in origin.fetched)
    files.close()
    assert origin.fetched == ["f0", "f4"]


def test_what_cannot_be_fetched_ahead_is_logged_and_raises_when_it_is_needed(
    origin: Origin, caplog: pytest.LogCaptureFixture
) -> None:
    files = cached(origin)
    with caplog.at_level(logging.WARNING):
        files.prefetch(["missing"])
        wait_until(lambda: "missing" in caplog.text)
    files.close()
    with pytest.raises(FileNotFoundError, match="missing"):
        files.local_path("missing")


def test_a_fetcher_that_was_killed_leaves_nothing_in_the_way(origin: Origin) -> None:
    files = cached(origin)
    key = files.local_path("f0").stem
    (files.folder / f"{key}.blob").unlink()
    (files.folder / f"{key}.fetching").write_bytes(b"half")
    stale = files.folder / f"{'0' * 64}.fetching"
    stale.write_bytes(b"half of another")
    age(stale, 2 * cache.ABANDONED_S)
    assert files.local_path("f0").read_bytes() == origin.read("f0")
    assert not stale.exists()


def test_a_full_disk_is_one_clear_error(origin: Origin) -> None:
    class Full(Origin):
        def stream(self, path: str) -> Iterator[bytes]:
            yield b"some"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files = cached(Full(origin.root))
    with pytest.raises(
        StoreError, match=r"cannot write to the cache .*No space left.*REDUCIO_CACHE"
    ):
        files.local_path("f0")
    assert blobs(files) == 0


def test_a_cache_folder_that_cannot_be_made_is_named(origin: Origin) -> None:
    files = CachedFiles(origin, origin.root / "f0" / "cache", KIB)
    with pytest.raises(StoreError, match="cannot make the cache folder"):
        files.local_path("f0")


def test_a_cache_folder_that_cannot_be_written_to_is_named(origin: Origin) -> None:
    files = cached(origin)
    files.make_folder()
    key = files._key("f0")
    (files.folder / "locks" / f"{int(key[:8], 16) % cache.LOCKS:04x}").mkdir()
    with pytest.raises(StoreError, match=r"cannot write to the cache .*REDUCIO_CACHE"):
        files.local_path("f0")


def test_a_copy_in_another_process_uses_the_same_cache(origin: Origin) -> None:
    files = cached(origin)
    files.sha256.update({"f0": sha256(origin.read("f0"))})
    files.local_path("f0")
    copy = pickle.loads(pickle.dumps(files))
    assert copy.local_path("f0") == files.local_path("f0")
    assert origin.fetched == ["f0"]


def test_the_folder_and_the_bound_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("REDUCIO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "reducio-latents"
    monkeypatch.setenv("REDUCIO_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("REDUCIO_CACHE_BYTES", "12345")
    files = CachedFiles(Origin(tmp_path))
    assert (files.folder, files.max_bytes) == (tmp_path / "mine", 12345)
    monkeypatch.setenv("REDUCIO_CACHE_BYTES", "64 GB")
    with pytest.raises(ConfigError, match="REDUCIO_CACHE_BYTES is '64 GB'"):
        CachedFiles(Origin(tmp_path))


def test_shards_come_from_s3_through_faults(s3: FaultyProxy, tmp_path: Path) -> None:
    remote = open_remote(f"s3://{BUCKET}/cached")
    data = os.urandom(2 << 20)
    remote.write("shard", data)
    s3.fail(["500", "cut", "reset"], "GET", "/shard")
    files = CachedFiles(remote, tmp_path, 4 << 20, {"shard": sha256(data)})
    assert files.local_path("shard").read_bytes() == data
    count = s3.count("GET", "/shard")
    assert pickle.loads(pickle.dumps(files)).local_path("shard").read_bytes() == data
    assert s3.count("GET", "/shard") == count


DAMAGE = {
    "truncated": lambda data: data[:-100],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "a flipped bit": lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("known", [True, False])
def test_a_damaged_copy_is_fetched_anew_once(
    origin: Origin, damage: str, known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    files = cached(origin)
    if known:
        files.sha256.update({"f0": sha256(origin.read("f0"))})
    copy = files.local_path("f0")
    copy.write_bytes(DAMAGE[damage](copy.read_bytes()))  # type: ignore[no-untyped-call]
    another = pickle.loads(pickle.dumps(files))  # as another process sees it
    assert another.local_path("f0").read_bytes() == origin.read("f0")
    assert another.local_path("f0").read_bytes() == origin.read("f0")
    assert files.local_path("f0").read_bytes() == origin.read("f0")
    assert origin.fetched == ["f0", "f0"]
    assert f"{origin.url}/f0: its copy {copy} is damaged" in caplog.text


def test_a_copy_of_another_length_is_noticed_by_who_has_proven_it(origin: Origin) -> None:
    files = cached(origin)
    copy = files.local_path("f0")
    files.local_path("f0")
    os.truncate(copy, 5)
    assert files.local_path("f0").read_bytes() == origin.read("f0")


def test_a_copy_that_nothing_is_known_of_or_that_cannot_be_read_is_fetched_anew(
    origin: Origin,
) -> None:
    files = cached(origin)
    copy = files.local_path("f0")
    (files.folder / cache.SUMS / copy.stem).unlink()
    assert pickle.loads(pickle.dumps(files)).local_path("f0").read_bytes() == origin.read("f0")
    copy.unlink()
    os.mkfifo(copy)
    assert files.local_path("f0").read_bytes() == origin.read("f0")


def test_no_path_leads_out_of_the_cache(origin: Origin) -> None:
    for path in ("../secret", "/etc/passwd", "a/../../x"):
        with pytest.raises(StoreError, match="is no path of a file inside"):
            cached(origin).local_path(path)


def wait_until(condition: object, seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never came to pass"
        time.sleep(0.005)
