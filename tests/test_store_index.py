"""Commits and the index over them: made again at any time, and quick at any size."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from reducio_latents.errors import StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store import Store
from reducio_latents.store.commit import Commit, Failure, ShardKey, commit_path, list_commits
from reducio_latents.store.index import (
    PATH,
    Index,
    IndexEntry,
    build_index,
    read_index,
    write_index,
)
from reducio_latents.store.seal import seal
from reducio_latents.store.statistics import ChannelStatistics
from tests.stores import (
    BUCKET,
    MemoryFiles,
    clip_ids,
    make_meta,
    make_store,
    open_writer,
    put_commit,
    write_shards,
)


def commit_of(shard: int, column: str = "motion", rows: int = 512) -> Commit:
    return Commit(
        bucket=BUCKET,
        column=column,
        shard=shard,
        rows=rows,
        fingerprint="f" * 64,
        file=f"{BUCKET}/{column}/c/{shard}",
        file_bytes=1000 + shard,
        file_sha256="5" * 64,
        row_crc32c=tuple(None if i == 3 else (shard * 7919 + i) % 2**32 for i in range(rows)),
        failed=(Failure(row=3, clip_id="c", video="v", reason="because \u2713"),),
        statistics={"mean": ChannelStatistics(count=1, mean=(0.1,) * 16, m2=(0.2,) * 16)},
        timings={"encode": 1.5},
    )


def test_a_commit_reads_as_it_was_written() -> None:
    files, commit = MemoryFiles(), commit_of(7)
    put_commit(files, commit)
    assert Commit.read(files, ShardKey(BUCKET, 7), "motion") == commit
    assert list(list_commits(files)) == [("motion", ShardKey(BUCKET, 7))]
    assert (commit.done, str(commit.key)) == (511, f"{BUCKET}/000007")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged .it does not match its own checksum.. Delete it and run the encode"),
        (b"{}", "does not match its own checksum"),
        (seal(b'{"bucket":"b"}'), "is damaged .it: .*missing .* required"),
        (seal(b'{"bucket":7}'), "it: bucket must be str, got 7"),
        (seal(b'{"buckets":"b"}'), "unknown key 'buckets'; did you mean 'bucket'"),
    ],
)
def test_a_damaged_commit_is_one_clear_error(data: bytes, message: str) -> None:
    files = MemoryFiles()
    files.write(commit_path(ShardKey(BUCKET, 0), "motion"), data)
    with pytest.raises(StoreError, match=message):
        Commit.read(files, ShardKey(BUCKET, 0), "motion")


def test_a_missing_commit_says_that_the_shard_is_not_done() -> None:
    with pytest.raises(StoreError, match="column motion of this shard is not done"):
        Commit.read(MemoryFiles(), ShardKey(BUCKET, 0), "motion")


def test_other_files_beside_the_commits_are_no_commits() -> None:
    files = MemoryFiles()
    for name in ("commits/notes.txt", f"commits/{BUCKET}/motion/000000.json.bak"):
        files.write(name, b"")
    assert list(list_commits(files)) == []


def test_the_index_of_commits_is_the_same_with_and_without_the_stored_one() -> None:
    files = MemoryFiles()
    make_store(files, failed={1: [0, 2]})
    stored = read_index(files)
    assert stored == build_index(files) == build_index(files, use_cache=False)
    assert stored is not None
    assert len(stored.entries) == 6
    assert stored.columns() == ["caption", "content_image", "motion"]
    assert stored.entries["motion", ShardKey(BUCKET, 1)].failed == (0, 2)


def test_commits_that_are_newer_than_the_index_are_in_it() -> None:
    files = MemoryFiles()
    writer = open_writer(files, make_meta(), 7)
    write_shards(writer, only=[0])
    write_index(files, build_index(files))
    write_shards(writer, only=[1])
    assert len(build_index(files).entries) == 6


def test_commits_that_are_gone_are_not_in_the_index() -> None:
    files = MemoryFiles()
    make_store(files)
    files.delete(commit_path(ShardKey(BUCKET, 0), "motion"))
    assert ("motion", ShardKey(BUCKET, 0)) not in build_index(files).entries


def test_a_reader_uses_the_shards_that_have_all_its_columns() -> None:
    files = MemoryFiles()
    writer = open_writer(files, make_meta(), 7)
    write_shards(writer, ["motion"], failed={0: [1]})
    write_shards(writer, ["caption"], only=[0])
    shards = build_index(files).shards(["motion", "caption"])
    assert shards == {ShardKey(BUCKET, 0): (4, frozenset({1}))}
    assert len(build_index(files).shards(["motion"])) == 2
    assert build_index(files).shards(["nothing"]) == {}


@pytest.mark.parametrize("data", [b"", b"{}", seal(b'{"commits":3}'), seal(b'{"commits":[{}]}')])
def test_a_damaged_index_is_one_clear_error(data: bytes) -> None:
    files = MemoryFiles()
    make_store(files)
    files.write(PATH, data)
    with pytest.raises(StoreError, match=r"index\.json is damaged .*Delete it: it is made again"):
        Store(files).index  # noqa: B018


def test_the_listing_names_plan_and_commits() -> None:
    files = MemoryFiles()
    make_store(files)
    names = files.read("listing.txt").decode().splitlines()
    assert names == [*files.list("commits"), *files.list("plan")]


def seconds(action: object) -> float:
    start = time.process_time()
    action()  # type: ignore[operator]
    return time.process_time() - start


def test_ten_times_as_many_commits_take_ten_times_as_long_and_not_more() -> None:
    def index_of(count: int) -> Index:
        entries = (IndexEntry.of(commit_of(shard, rows=8)) for shard in range(count))
        return Index({(entry.column, entry.key): entry for entry in entries})

    files, took = MemoryFiles(), {}
    read_index(files)
    for count in (1_000, 10_000):
        index = index_of(count)
        files.write(PATH, index.to_json())
        # The fastest of some: the collector of a process full of other tests takes its time too.
        took[count] = min(seconds(lambda: read_index(files)) for _ in range(5))
        assert read_index(files) == index
    assert took[10_000] < 40 * took[1_000]
    assert took[10_000] < 1.0


def test_a_whole_commit_is_read_in_a_few_milliseconds(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    for shard in range(50):
        put_commit(files, replace(commit_of(shard), ranges=((128, 4096),) * 512))
    assert seconds(lambda: build_index(files)) < 50 * 0.01


def test_clip_ids_differ_and_records_are_json() -> None:
    files = MemoryFiles()
    make_store(files)
    assert len(set(clip_ids(100))) == 100
    record = json.loads(files.read(commit_path(ShardKey(BUCKET, 0), "motion")))
    assert list(record)[-1] == "crc32c"
