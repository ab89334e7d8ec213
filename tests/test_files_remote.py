"""Files in a folder, on S3, in memory, on a web server: one contract, and what each adds to it."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from reducio_latents.errors import ConfigError, LatentsError, StoreError
from reducio_latents.files import Files, LocalFiles, open_files, remote
from reducio_latents.files.hub import HubFiles
from reducio_latents.files.remote import ObjectFiles, client_settings, open_remote, patience
from tests.object_storage import BUCKET, SECRET, Fault, FaultyProxy, s3, s3_server, web_server

__all__ = ["s3", "s3_server"]


def new_url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    if request.param == "folder":
        return open_files(tmp_path / "store")
    if request.param == "memory":
        return open_files(f"memory://{uuid.uuid4().hex}")
    request.getfixturevalue("s3")
    return open_files(new_url())


def test_what_is_written_is_read(files: Files) -> None:
    files.write("a/b/c.bin", [b"one ", memoryview(b"two "), bytearray(b"three")])
    assert files.read("a/b/c.bin") == b"one two three"
    assert files.size("a/b/c.bin") == 13


def test_a_file_is_replaced_whole(files: Files) -> None:
    files.write("x", b"a longer text")
    files.write("x", b"short")
    assert files.read("x") == b"short"


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, 4, b"0123"),
        (8, 100, b"89"),
        (10, 5, b""),
        (99, 5, b""),
        (3, 0, b""),
        (-4, 2, b"67"),
        (-4, 4, b"6789"),
        (-100, 3, b"012"),
    ],
)
def test_ranges_are_those_of_a_slice(
    files: Files, start: int, length: int, expected: bytes
) -> None:
    files.write("ten", b"0123456789")
    assert files.read_range("ten", start, length) == expected


def test_a_file_is_created_once_and_never_replaced(files: Files) -> None:
    assert files.create("a/x", [b"fi", b"rst"])
    assert not files.create("a/x", b"second")
    assert files.create("a/x", b"first"), "the same bytes again are no conflict"
    assert files.read("a/x") == b"first"


def test_a_file_is_swapped_for_another_only_if_it_is_as_it_was_seen(files: Files) -> None:
    assert not files.swap("x", b"not there", b"new")
    assert files.swap("x", None, b"one")
    assert not files.swap("x", None, b"two")
    assert not files.swap("x", b"other", b"two")
    assert files.swap("x", b"one", b"two")
    assert files.swap("x", b"one", b"two"), "what is there already needs no writing"
    assert files.read("x") == b"two"


def test_of_many_who_create_one_file_at_once_one_wins(files: Files) -> None:
    start, won = threading.Barrier(8), []

    def create(mine: bytes) -> None:
        start.wait()
        if files.create("a/b/x", mine):
            won.append(mine)

    in_threads(create, [bytes([n]) * 5000 for n in range(8)])
    assert won == [files.read("a/b/x")]
    assert list(files.list("")) == ["a/b/x"]


def test_of_many_who_swap_one_file_at_once_nothing_is_lost(files: Files) -> None:
    start = threading.Barrier(6)

    def add(mine: bytes) -> None:
        start.wait()
        while not files.swap("x", found := read_if_any(files, "x"), (found or b"") + mine):
            pass

    in_threads(add, [bytes([ord("a") + n]) for n in range(6)])
    assert sorted(files.read("x")) == sorted(b"abcdef")
    assert list(files.list("")) == ["x"]


def in_threads(target: Callable[[bytes], None], each: Sequence[bytes]) -> None:
    with ThreadPoolExecutor(len(each)) as pool:
        list(pool.map(target, each))


def read_if_any(files: Files, path: str) -> bytes | None:
    try:
        return files.read(path)
    except FileNotFoundError:
        return None


OUTSIDE = ["/etc/passwd", "../x", "a/../../x", "a//x", "./x", "a/.", "x\0y", "a/"]


@pytest.mark.parametrize("path", [*OUTSIDE, ""])
def test_no_path_leads_out_of_the_root(files: Files, path: str) -> None:
    asked: list[Callable[[], object]] = [
        lambda: files.read(path),
        lambda: files.read_range(path, 0, 4),
        lambda: files.size(path),
        lambda: files.write(path, b"x"),
        lambda: files.create(path, b"x"),
        lambda: files.swap(path, None, b"x"),
        lambda: files.delete(path),
    ]
    if path:
        asked.append(lambda: list(files.list(path)))
    for ask in asked:
        with pytest.raises(StoreError, match="is no path of a file inside"):
            ask()


def test_what_is_missing_is_not_found(files: Files) -> None:
    files.write("folder/file", b"1")
    for path in ("nothing", "folder/nothing"):
        assert files.size(path) is None
        with pytest.raises(FileNotFoundError):
            files.read(path)
        with pytest.raises(FileNotFoundError):
            files.read_range(path, -4, 4)
        files.delete(path)
    assert files.size("folder") is None


def test_files_are_listed_by_folder_and_in_order(files: Files) -> None:
    for path in ("b/2", "b/10", "b/c/1", "bb/1", "a"):
        files.write(path, b"")
    assert list(files.list("")) == ["a", "b/10", "b/2", "b/c/1", "bb/1"]
    assert list(files.list("b")) == ["b/10", "b/2", "b/c/1"]
    assert list(files.list("nothing")) == []
    files.delete("b/2")
    assert list(files.list("b")) == ["b/10", "b/c/1"]


def test_listing_goes_on_over_pages(s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LIST_PAGE", 7)
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    files = open_remote(new_url())
    names = [f"commits/{i:06d}.json" for i in range(25)]
    for name in names:
        files.write(name, b"{}")
    s3.requests.clear()
    assert list(files.list("commits")) == names
    assert s3.count("GET", "list-type=2") == 3


@pytest.mark.parametrize("fault", ["500", "503", "reset", "cut"])
def test_reading_survives_a_bad_server(s3: FaultyProxy, fault: str) -> None:
    files, data = open_remote(new_url()), os.urandom(300_000)
    files.write("x", data)
    s3.fail([fault, fault], "GET", "/x")
    assert files.read("x") == data
    assert s3.count("GET", "/x") == 3
    s3.fail([fault], "GET", "/x")
    assert files.read_range("x", 1000, 200_000) == data[1000:201_000]
    s3.fail([fault, fault], "GET", "list-type")
    open_remote(files.url)
    s3.fail(["500", fault, fault], "POST")
    files.delete("x")
    assert files.size("x") is None


@pytest.mark.parametrize("faults", [["done 500"], ["done 503", "500"], ["done 500", "reset"]])
def test_a_creation_that_arrived_before_its_answer_was_lost_is_ours(
    s3: FaultyProxy, faults: list[Fault]
) -> None:
    files = open_remote(new_url())
    s3.fail(faults, "PUT")
    assert files.create("x", b"mine")
    s3.fail(faults, "PUT")
    assert files.swap("x", b"mine", b"mine too")
    s3.fail(faults, "PUT")
    assert not files.create("x", b"another's")
    assert files.read("x") == b"mine too"


def test_a_server_without_conditions_is_written_with_a_warning(
    s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    files = open_remote(new_url())
    assert files.create("x", b"one")
    assert "cannot write on condition" in caplog.text
    assert not files.create("x", b"two")
    assert files.swap("x", b"one", b"two")
    assert files.read("x") == b"two"


@pytest.mark.parametrize("fault", ["500", "503", "reset"])
def test_writing_survives_a_bad_server(s3: FaultyProxy, fault: str) -> None:
    files = open_remote(new_url())
    s3.fail([fault, fault], "PUT")
    files.write("x", b"1234")
    s3.fail([fault], "HEAD")
    assert files.size("x") == 4
    s3.fail([fault], "GET", "list-type")
    assert list(files.list("")) == ["x"]


def test_a_silent_server_is_asked_again(s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDUCIO_REMOTE_TIMEOUT_S", "1")
    files = open_remote(new_url())
    files.write("x", b"1234")
    s3.fail([15.0], "GET", "/x")
    started = time.monotonic()
    assert files.read("x") == b"1234"
    assert 1 <= time.monotonic() - started < 15


def test_a_large_file_goes_in_parts_and_each_is_sent_again(s3: FaultyProxy) -> None:
    files, data = open_remote(new_url()), os.urandom(9 << 20)
    s3.fail(["500", "reset"], "PUT", "partNumber=2")
    files.write("big", [data[i : i + 50_000] for i in range(0, len(data), 50_000)])
    assert s3.count("PUT", "partNumber=1") == 1
    assert s3.count("PUT", "partNumber=2") == 3
    assert files.read("big") == data
    assert b"".join(files.stream("big")) == data


@pytest.mark.parametrize(
    ("size", "method", "path"),
    [(1000, "PUT", "/x"), (9 << 20, "PUT", "partNumber=2"), (9 << 20, "POST", "uploadId")],
    ids=["one request", "a part", "the completion"],
)
def test_a_writing_that_fails_for_good_leaves_the_file_as_it_was(
    s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch, size: int, method: str, path: str
) -> None:
    monkeypatch.setenv("REDUCIO_REMOTE_RETRIES", "1")
    files = open_remote(new_url())
    files.write("x", b"as it was")
    s3.fail(["500"] * 20, method, path)
    with pytest.raises(StoreError, match=r"cannot write s3://latents/\w+/x: .*500"):
        files.write("x", bytes(size))
    s3.fail([])
    assert files.read("x") == b"as it was"
    assert list(files.list("")) == ["x"]


def test_retries_end(s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDUCIO_REMOTE_RETRIES", "2")
    files = open_remote(new_url())
    s3.fail(["500"] * 50, "GET")
    with pytest.raises(StoreError, match=r"cannot read s3://.*: the server failed.* later.*500"):
        files.read("x")
    assert s3.count("GET", "/x") == 3


def test_a_storage_that_asks_to_slow_down_for_20_s_is_outlasted() -> None:
    retry = client_settings("s3", *patience())["retry_config"]
    first, longest = (retry["backoff"][f"{name}_backoff"] for name in ("init", "max"))
    pauses = [min(first * 2**n, longest) for n in range(retry["max_retries"])]
    assert 20 <= sum(pauses, timedelta()).total_seconds() < retry["retry_timeout"].total_seconds()


def test_a_bucket_that_does_not_exist_is_an_error_at_open(s3: FaultyProxy) -> None:
    with pytest.raises(StoreError, match="there is no such bucket") as caught:
        open_remote("s3://no-such-bucket-here/x")
    assert "\n" not in str(caught.value)


def test_a_bucket_that_is_removed_is_no_missing_file(s3: FaultyProxy) -> None:
    files = ObjectFiles("s3://no-such-bucket-here/x")
    with pytest.raises(StoreError, match="there is no such bucket"):
        files.write("x", b"1")


def test_a_forbidden_bucket_is_an_error_at_open_without_the_secret(s3: FaultyProxy) -> None:
    s3.fail(["403"] * 10)
    with pytest.raises(StoreError, match=r"permission denied.*Check the credentials") as caught:
        open_remote(new_url())
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None  # whose text has all headers of the request


def test_a_bucket_that_may_be_read_but_not_listed_opens(s3: FaultyProxy) -> None:
    url = new_url()
    open_remote(url).write("zarr.json", b"{}")
    s3.fail(["403"], "GET", "list-type")
    assert open_remote(url).read("zarr.json") == b"{}"


@pytest.mark.parametrize("silent", [False, True])
def test_an_unreachable_place_is_an_error_at_open_and_soon(
    s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    monkeypatch.setattr(remote, "PROBE_TIMEOUT_S", 0.3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(StoreError, match=r"cannot open s3://.*: no answer\. Check the network"):
            open_remote(new_url())
        assert time.monotonic() - started < 30


def test_no_credentials_are_named_as_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from reducio_latents.files.explained import reason

    text = "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 1s"
    assert "there are no credentials in the environment" in reason(text)


def test_signatures_in_a_query_string_do_not_reach_the_message() -> None:
    from reducio_latents.files.explained import reason

    text = "Generic Azure error: GET https://acc.blob.core.windows.net/c/x?sv=1&sig=TOPSECRET in 1s"
    assert "TOPSECRET" not in reason(text)
    assert "https://acc.blob.core.windows.net/c/x" in reason(text)


def test_pickling_carries_the_url_and_no_secret(s3: FaultyProxy) -> None:
    files = open_remote(new_url())
    files.write("x", b"1234")
    pickled = pickle.dumps(files)
    assert SECRET.encode() not in pickled
    assert SECRET not in repr(files)
    copy = pickle.loads(pickled)
    assert (copy.url, copy.read("x")) == (files.url, b"1234")


@pytest.mark.parametrize("url", ["https://me:pw@host/x", "https://host/x?sig=pw", "s3://k:pw@b/x"])
def test_a_url_with_credentials_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="environment") as caught:
        open_files(url)
    assert "pw" not in str(caught.value)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ftp://.*Use a folder, s3://"):
        open_files("ftp://host/x")


@pytest.mark.parametrize("name", ["REDUCIO_REMOTE_RETRIES", "REDUCIO_REMOTE_TIMEOUT_S"])
def test_a_bad_number_in_the_environment_is_named(
    s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "many")
    with pytest.raises(ConfigError, match=f"{name} is 'many'"):
        open_remote(new_url()).read("x")


def test_a_forked_child_is_refused_at_once_where_it_would_hang(s3: FaultyProxy) -> None:
    url = new_url()
    files = open_remote(url)
    files.write("x", b"1234")

    def child() -> str:
        try:
            return repr(files.read("x"))
        except LatentsError as err:
            return f"{type(err).__name__}: {err}"

    text = in_forked_child(child)
    assert text.startswith("StoreError")
    assert "forkserver" in text
    assert in_forked_child(lambda: str(_try(lambda: open_remote(url)))) == text
    assert files.read("x") == b"1234"


def _try(action: object) -> object:
    try:
        return action()  # type: ignore[operator]
    except LatentsError as err:
        return f"{type(err).__name__}: {err}"


def in_forked_child(action: object) -> str:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        try:
            os.write(write_end, str(action()).encode())  # type: ignore[operator]
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(pid, 0)
    return text


def test_a_process_that_inherits_no_threads_may_fork_first(
    s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_runtime_pid", os.getpid() + 1)
    with pytest.raises(StoreError, match="forked off"):
        open_remote(new_url())
    monkeypatch.setattr(remote, "_runtime_pid", None)
    assert open_remote(new_url()).size("x") is None


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[LocalFiles, str]]:
    files = LocalFiles(tmp_path)
    files.write("commits/b/motion/000000.json", b"{}")
    files.write("plan/part-00000.parquet", b"PAR1")
    with web_server(tmp_path) as url:
        yield files, url


def test_a_web_server_is_read_and_never_written(site: tuple[LocalFiles, str]) -> None:
    local, url = site
    local.write("ten", b"0123456789")
    files = open_files(f"{url}/")
    assert files.url == url
    assert files.read("ten") == b"0123456789"
    assert files.read_range("ten", 2, 3) == b"234"
    assert files.read_range("ten", -3, 3) == b"789"
    assert files.size("ten") == 10
    assert files.size("eleven") is None
    with pytest.raises(FileNotFoundError):
        files.read("eleven")
    with pytest.raises(StoreError, match="only read"):
        files.write("x", b"1")
    with pytest.raises(StoreError, match="only read"):
        files.create("x", b"1")
    with pytest.raises(StoreError, match="only read"):
        files.swap("ten", b"0123456789", b"1")
    with pytest.raises(StoreError, match="only read"):
        files.delete("ten")
    assert local.read("ten") == b"0123456789"


def test_a_web_server_is_listed_by_the_stores_own_listing(site: tuple[LocalFiles, str]) -> None:
    local, url = site
    files = open_files(url)
    with pytest.raises(StoreError, match=r"cannot be listed, and there is no listing\.txt"):
        list(files.list("commits"))
    local.write("listing.txt", b"commits/b/motion/000000.json\nplan/part-00000.parquet\n")
    assert list(files.list("commits")) == ["commits/b/motion/000000.json"]
    assert list(files.list("")) == ["commits/b/motion/000000.json", "plan/part-00000.parquet"]


def test_a_hub_repository_is_read_by_fsspec() -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    for name, data in {"a/1": b"one", "a/2": b"0123456789", "zarr.json": b"{}"}.items():
        system.pipe_file(f"/owner/name/{name}", data)
    files = pickle.loads(pickle.dumps(HubFiles("memory://owner/name/")))
    files.probe()
    assert list(files.list("")) == ["a/1", "a/2", "zarr.json"]
    assert list(files.list("a")) == ["a/1", "a/2"]
    assert list(files.list("nothing")) == []
    assert files.read("a/2") == b"0123456789"
    assert files.read_range("a/2", 3, 4) == b"3456"
    assert files.read_range("a/2", -4, 2) == b"67"
    assert (files.size("a/1"), files.size("a"), files.size("b")) == (3, None, None)
    assert files.version("a/1") != files.version("a/2")
    with pytest.raises(FileNotFoundError):
        files.read("b")
    for path in OUTSIDE:
        with pytest.raises(StoreError, match="is no path of a file inside"):
            files.read(path)
    changes: list[Callable[[], object]] = [
        lambda: files.write("x", b"1"),
        lambda: files.create("x", b"1"),
        lambda: files.swap("a/1", b"one", b"1"),
        lambda: files.delete("a/1"),
    ]
    for change in changes:
        with pytest.raises(StoreError, match="only read"):
            change()


def test_a_hub_that_cannot_be_reached_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    class Unreachable:
        def ls(self, *_: object, **__: object) -> None:
            raise RuntimeError("401 Client Error.\nRepository Not Found")

    monkeypatch.setattr(fsspec, "filesystem", lambda scheme: Unreachable())
    with pytest.raises(StoreError, match="cannot open hf://datasets/o/n/: RuntimeError: 401"):
        open_files("hf://datasets/o/n")

    def not_installed(scheme: str) -> None:
        raise ImportError("Install huggingface_hub to access HfFileSystem")

    monkeypatch.setattr(fsspec, "filesystem", not_installed)
    with pytest.raises(ConfigError, match="pip install huggingface_hub"):
        open_files("hf://datasets/o/n")
