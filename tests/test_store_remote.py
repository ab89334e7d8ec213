"""Whole stores on S3 through faults, on a web server, and through the cache."""

from __future__ import annotations

import random
import uuid
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from reducio_latents.errors import StoreError
from reducio_latents.files import LocalFiles, open_files
from reducio_latents.files.cache import CachedFiles
from reducio_latents.files.remote import open_remote
from reducio_latents.store import Store, open_store
from reducio_latents.store.commit import ShardKey, list_commits
from reducio_latents.store.index import PATH as INDEX
from reducio_latents.upkeep.verify import verify
from tests.object_storage import BUCKET as S3_BUCKET
from tests.object_storage import Fault, FaultyProxy, s3, s3_server, web_server
from tests.stores import (
    BUCKET,
    COLUMNS,
    MemoryFiles,
    clip_ids,
    finish,
    make_meta,
    make_store,
    open_writer,
    row_of,
    write_shards,
)

__all__ = ["s3", "s3_server"]

Container = Literal["zarr", "webdataset"]
KEY = ShardKey(BUCKET, 0)
FAULTS: list[Fault] = ["500", "503", "reset", "cut", 0.02]


def new_url() -> str:
    return f"s3://{S3_BUCKET}/{uuid.uuid4().hex}/pexels.latents"


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_a_store_on_s3_has_the_bytes_of_a_local_one_in_spite_of_faults(
    s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch, container: Container
) -> None:
    monkeypatch.setenv("REDUCIO_REMOTE_TIMEOUT_S", "0.5")
    local = MemoryFiles()
    make_store(local, container, failed={0: [1]})
    rng = random.Random(7)
    spoiled: list[Fault] = []

    def fault(method: str, path: str) -> Fault:
        if rng.random() > 0.07:
            return None
        spoiled.append(rng.choice(FAULTS))
        return spoiled[-1]

    s3.fault = fault
    files = open_files(new_url())
    make_store(files, container, failed={0: [1]})
    store = Store(files)
    report = verify(store)
    assert report.ok, report.damage
    assert np.array_equal(store.read_row(KEY, 0, "motion"), row_of("motion", clip_ids(1)[0]))  # type: ignore[arg-type]
    assert len(spoiled) >= 5
    s3.fault = lambda method, path: None
    assert {path: files.read(path) for path in files.list("")} == local.data


def test_a_server_that_fails_for_good_stops_the_run_and_the_next_one_ends_it(
    s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDUCIO_REMOTE_RETRIES", "0")
    local = MemoryFiles()
    make_store(local)
    url = new_url()
    for number in (2, 3, 7, 5):
        writes = 0

        def fault(method: str, path: str, last: int = number) -> Fault:
            nonlocal writes
            writes += method == "PUT"
            return "503" if method == "PUT" and writes >= last else None

        s3.fault = fault
        with pytest.raises(StoreError, match=r"cannot write s3://.*503"):
            resume(url)
    s3.fault = lambda method, path: None
    resume(url)
    files = open_files(url)
    assert {path: files.read(path) for path in files.list("")} == local.data


def resume(url: str) -> None:
    files = open_files(url)
    writer = open_writer(files, make_meta(), 7)
    done = set(list_commits(files))
    for shard in (0, 1):
        missing = [name for name in COLUMNS if (name, ShardKey(BUCKET, shard)) not in done]
        if missing:
            write_shards(writer, missing, only=[shard])
    finish(writer)


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_a_store_on_a_web_server_is_read_and_proven(tmp_path: Path, container: Container) -> None:
    make_store(LocalFiles(tmp_path / "pexels.latents"), container)
    with web_server(tmp_path) as site:
        store = open_store(f"{site}/pexels.latents")
        assert len(store.index.entries) == 6
        assert store.read_row(KEY, 2, "caption") == row_of("caption", clip_ids(3)[2])
        report = verify(store)
        assert report.ok, report.damage
        with pytest.raises(StoreError, match="is not a latent store"):
            open_store(f"{site}/elsewhere")


def test_shards_of_a_remote_store_are_mapped_from_the_cache(
    s3: FaultyProxy, tmp_path: Path
) -> None:
    url = new_url()
    make_store(open_files(url))
    remote = open_remote(url)
    index = Store(remote).index
    sums = {entry.file: entry.file_sha256 for entry in index.entries.values()}
    files = CachedFiles(remote, tmp_path, 1 << 20, sums)
    store = Store(files)
    commit = store.commit(KEY, "motion")
    s3.requests.clear()
    for _ in range(3):
        mapped = np.memmap(files.local_path(commit.file), np.uint8, "r")
        assert mapped.tobytes() == remote.read(commit.file)
    assert s3.count("GET", commit.file) == 1 + 3
    assert s3.count("GET", INDEX) == 0


def test_a_shard_that_does_not_match_its_commit_never_reaches_a_reader(
    s3: FaultyProxy, tmp_path: Path
) -> None:
    url = new_url()
    make_store(open_files(url))
    remote = open_remote(url)
    entry = Store(remote).index.entries["motion", KEY]
    damaged = bytearray(remote.read(entry.file))
    damaged[5] ^= 1
    remote.write(entry.file, damaged)
    files = CachedFiles(remote, tmp_path, 1 << 20, {entry.file: entry.file_sha256})
    with pytest.raises(StoreError, match="arrived 3 times with sha256"):
        files.local_path(entry.file)
