"""Writing: killed anywhere, raced, refused, out of space; the bytes stay the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from reducio_latents.errors import StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store import Store, open_store
from reducio_latents.store.commit import Commit, ShardKey, list_commits
from reducio_latents.store.index import build_index
from reducio_latents.store.meta import ROOT
from reducio_latents.store.writer import ColumnRows, StoreWriter, read_meta_if_any
from reducio_latents.upkeep.verify import verify
from tests.stores import (
    BUCKET,
    CAPTION,
    COLUMNS,
    MOTION,
    SHAPE,
    KilledError,
    MemoryFiles,
    clip_ids,
    column_rows,
    finish,
    make_meta,
    make_store,
    open_writer,
    rows_of,
    write_shards,
)

Container = Literal["zarr", "webdataset"]
CONTAINERS: list[Container] = ["zarr", "webdataset"]


def resume(files: MemoryFiles, container: Container, by_column: bool) -> None:
    """Do what an encode run does: whatever has no commit yet, then the end of the run."""
    writer = open_writer(files, make_meta(container), 7)
    done = set(list_commits(files))
    for shard in (0, 1):
        missing = [name for name in COLUMNS if (name, ShardKey(BUCKET, shard)) not in done]
        for names in [[name] for name in missing] if by_column else [missing]:
            write_shards(writer, names, failed={1: [2]}, only=[shard] if names else [])
    finish(writer)


# A tar holds the columns that were written together; one by one they are other files.
@pytest.mark.parametrize(
    ("container", "by_column"), [("zarr", False), ("zarr", True), ("webdataset", False)]
)
def test_a_run_that_is_killed_at_any_write_and_started_again_gives_the_same_bytes(
    container: Container, by_column: bool
) -> None:
    undisturbed = MemoryFiles()
    resume(undisturbed, container, by_column=False)
    assert undisturbed.writes > 12
    for number in range(1, undisturbed.writes + 1):
        files = MemoryFiles()
        files.fail_at = number
        with pytest.raises(KilledError):
            resume(files, container, by_column=False)
        files.fail_at = None
        resume(files, container, by_column)
        assert files.data == undisturbed.data, f"killed at write {number}"


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_run_that_is_killed_at_every_write_in_turn_still_ends(container: Container) -> None:
    undisturbed, files = MemoryFiles(), MemoryFiles()
    resume(undisturbed, container, by_column=False)
    for _ in range(100):
        files.fail_at = files.writes + 2  # one write gets through each time
        try:
            resume(files, container, by_column=False)
        except KilledError:
            continue
        break
    files.fail_at = None
    resume(files, container, by_column=False)
    assert files.data == undisturbed.data


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_commit_is_written_after_its_rows(container: Container) -> None:
    files = MemoryFiles()
    make_store(files, container)
    for number in range(1, files.writes):
        partial = MemoryFiles()
        partial.fail_at = number
        with pytest.raises(KilledError):
            make_store(partial, container)
        for column, key in list_commits(partial):
            assert partial.size(Commit.read(partial, key, column).file) is not None


@pytest.mark.parametrize("container", CONTAINERS)
def test_writers_that_race_for_a_shard_leave_one_sound_store(
    tmp_path: Path, container: Container
) -> None:
    files = LocalFiles(tmp_path)
    open_writer(files, make_meta(container), 7)
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            writer = open_writer(LocalFiles(tmp_path), make_meta(container), 7)
            barrier.wait()
            for _ in range(5):
                write_shards(writer)
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    finish(StoreWriter.open(files, make_meta(container), rows_of(files, make_meta(container))))
    report = verify(open_store(tmp_path))
    assert report.ok, report.damage
    assert report.missing == {}
    alone = MemoryFiles()
    make_store(alone, container)
    assert {name: files.read(name) for name in files.list("")} == alone.data


def test_columns_that_come_later_touch_nothing_that_is_there(tmp_path: Path) -> None:
    files = MemoryFiles()
    make_store(files, columns={"motion": MOTION})
    before = dict(files.data)
    writer = open_writer(files, make_meta(columns={"caption": CAPTION}), 7)
    assert sorted(writer.meta.columns) == ["caption", "motion"]
    write_shards(writer, ["caption"])
    written_anew = ("zarr.json", f"{BUCKET}/zarr.json", "index.json", "listing.txt")
    kept = {n: d for n, d in before.items() if n not in written_anew}
    assert kept.items() <= files.data.items()
    assert verify(Store(files)).missing == {}


def test_opening_again_keeps_counts_and_statistics(tmp_path: Path) -> None:
    files = MemoryFiles()
    writer = make_store(files)
    statistics = {"motion/all": {"mean": {"mean": [0.5], "std": [1.0], "count": [9.0]}}}
    files.write(ROOT, replace(writer.meta, statistics=statistics).to_json())
    again = open_writer(files, make_meta(), 7)
    assert again.meta.statistics == statistics
    assert again.meta.counts == writer.meta.counts


def test_opening_again_writes_nothing() -> None:
    files = MemoryFiles()
    make_store(files)
    before = files.writes
    meta = replace(make_meta(), versions=read_meta(files).versions)
    StoreWriter.open(files, meta, rows_of(files, meta))
    assert files.writes == before


def read_meta(files: MemoryFiles) -> Any:
    return read_meta_if_any(files)


def test_metadata_that_a_killed_run_did_not_write_is_written_by_the_next() -> None:
    files = MemoryFiles()
    make_store(files)
    whole = dict(files.data)
    for name in [n for n in whole if n.endswith("zarr.json") and "/" in n]:
        files.delete(name)
    open_writer(files, replace(make_meta(), versions=read_meta(files).versions), 7)
    assert files.data == whole


@pytest.mark.parametrize("name", ["notes.txt", "16x32x64/motion/zarr.json"])
def test_a_place_that_holds_something_else_is_refused_and_left_alone(name: str) -> None:
    files = MemoryFiles("videos")
    files.write(name, b"mine")
    with pytest.raises(StoreError, match=f"holds something else .{name}.*new or empty folder"):
        StoreWriter.open(files, make_meta(), {BUCKET: 7})
    assert files.data == {name: b"mine"}


def test_a_zarr_group_of_somebody_else_is_refused() -> None:
    files = MemoryFiles()
    files.write("zarr.json", b'{"zarr_format":3,"node_type":"group","attributes":{}}')
    with pytest.raises(StoreError, match="is a Zarr store, but not a latent store"):
        StoreWriter.open(files, make_meta(), {BUCKET: 7})


def test_a_store_that_lost_its_description_says_so() -> None:
    files = MemoryFiles()
    make_store(files)
    files.delete("zarr.json")
    with pytest.raises(StoreError, match=r"holds commits .* but its zarr\.json is gone"):
        StoreWriter.open(files, make_meta(), {BUCKET: 7})


def test_a_plan_alone_is_no_hindrance() -> None:
    files = MemoryFiles()
    files.write("plan/part-00000.parquet", b"")
    assert read_meta_if_any(files) is None


Change = Callable[[ColumnRows], ColumnRows]


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("motion", lambda c: replace(c, rows=c.rows[:2]), "2 rows given for 3 clips"),
        ("motion", lambda c: replace(c, rows=[r.T for r in c.rows]), r"float16 \(2, 1, 1, 4\)"),
        ("motion", lambda c: replace(c, rows=[r.astype("f4") for r in c.rows]), "a row is float32"),
        ("motion", lambda c: replace(c, rows=[None, *c.rows[1:]]), "not those that failed"),
        ("motion", lambda c: replace(c, rows=[r.tobytes() for r in c.rows]), r"a row is None \(\)"),
        ("caption", lambda c: replace(c, rows=["text"] * 3), "a row is str, not bytes"),
        ("caption", lambda c: replace(c, rows=[motion()] * 3), "a row is ndarray, not bytes"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_anything_is_written(
    column: str, change: Change, message: str
) -> None:
    writer = open_writer(MemoryFiles(), make_meta(), 3)
    before = writer.files.writes  # type: ignore[attr-defined]
    rows = change(column_rows(column, clip_ids(3)))
    with pytest.raises(StoreError, match=message):
        writer.write_shard(ShardKey(BUCKET, 0), clip_ids(3), {column: rows})
    assert writer.files.writes == before  # type: ignore[attr-defined]


def motion() -> Any:
    return np.zeros(SHAPE, np.float16)


def test_a_shard_is_never_larger_than_it_may_be_nor_of_an_unknown_bucket() -> None:
    writer = open_writer(MemoryFiles(), make_meta(), 3)
    rows = column_rows("motion", clip_ids(5))
    with pytest.raises(StoreError, match="5 clips, a shard has 4 at most"):
        writer.write_shard(ShardKey(BUCKET, 0), clip_ids(5), {"motion": rows})
    rows = column_rows("motion", clip_ids(3))
    with pytest.raises(StoreError, match="the store has no bucket 1x1x1"):
        writer.write_shard(ShardKey("1x1x1", 0), clip_ids(3), {"motion": rows})


def test_rows_of_another_memory_order_are_stored_alike() -> None:
    value = np.arange(8, dtype=np.float16).reshape(4, 1, 1, 2)
    files = []
    for row in (value, np.asfortranarray(value), np.repeat(value, 2, axis=1)[:, ::2]):
        writer = open_writer(MemoryFiles(), make_meta(columns={"motion": MOTION}), 1)
        rows = ColumnRows(rows=[row])
        [commit] = writer.write_shard(ShardKey(BUCKET, 0), clip_ids(1), {"motion": rows})
        files.append(writer.files.read(commit.file))
    assert files[0] == files[1] == files[2] != b""


def test_a_commit_that_is_dropped_counts_as_not_done_in_the_index_too() -> None:
    files = MemoryFiles()
    writer = make_store(files, failed={0: [1]})
    key = ShardKey(BUCKET, 0)
    writer.drop_commit(key, "motion")
    assert ("motion", key) not in build_index(files).entries
    writer.write_shard(key, clip_ids(4), {"motion": column_rows("motion", clip_ids(4))})
    assert build_index(files).entries["motion", key].failed == ()


def test_what_a_killed_writer_left_half_written_is_swept_up_by_the_next(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    make_store(files)
    left = tmp_path / ".partial" / "0.host-1-0"
    left.write_bytes(b"half of a shard")
    open_writer(files, make_meta(), 7)
    assert not left.exists()
