"""Zarr to tars and back: the same bytes, also when it is killed on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import CliRunner

from reducio_latents.cli import main
from reducio_latents.errors import StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store import Store, open_store
from reducio_latents.store.commit import ClipQuality, Commit, ShardKey, list_commits
from reducio_latents.store.index import build_index
from reducio_latents.upkeep.convert import ConvertReport, convert_store
from reducio_latents.upkeep.verify import verify
from tests.stores import (
    BUCKET,
    CAPTION,
    COLUMNS,
    MOTION,
    KilledError,
    MemoryFiles,
    make_meta,
    make_store,
    open_writer,
    put_commit,
    put_meta,
    write_shards,
)

Container = Literal["zarr", "webdataset"]
OTHER: dict[Container, Container] = {"zarr": "webdataset", "webdataset": "zarr"}
KEY = ShardKey(BUCKET, 0)


def source_files(container: Container, **changes: Any) -> MemoryFiles:
    files = MemoryFiles("source")
    writer = make_store(files, container, failed={0: [1], 1: [0, 2]}, **changes)
    files.write("quality.parquet", b"psnr")
    quality = ClipQuality(row=2, clip_id="c", psnr=31.5, psnr_frames=(31.0, 32.0))
    put_commit(files, replace(Commit.read(files, KEY, "motion"), quality=(quality,)))
    statistics = {"motion/all": {"mean": {"mean": [1.0], "std": [2.0], "count": [3.0]}}}
    put_meta(files, replace(writer.meta, statistics=statistics))
    return files


def convert(source: MemoryFiles, target: MemoryFiles) -> ConvertReport:
    store = Store(source)
    return convert_store(store, target, OTHER[store.meta.container])


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_there_and_back_gives_the_same_bytes(container: Container) -> None:
    source, between, back = source_files(container), MemoryFiles("between"), MemoryFiles("back")
    convert(source, between)
    convert(between, back)
    assert back.data == source.data
    assert between.data.keys() != source.data.keys()


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_a_converted_store_is_the_one_that_encoding_would_have_made(container: Container) -> None:
    converted, encoded = MemoryFiles(), source_files(OTHER[container])
    convert(source_files(container), converted)
    assert converted.data == encoded.data


def test_compressed_rows_are_carried_as_they_are() -> None:
    columns = {
        "motion": replace(MOTION, compression="zstd"),
        "x": replace(CAPTION, compression="zstd"),
    }
    source, between, back = MemoryFiles("source"), MemoryFiles("between"), MemoryFiles("back")
    make_store(source, columns=columns)
    convert(source, between)
    assert verify(Store(between)).ok
    convert(between, back)
    assert back.data == source.data


def test_everything_is_counted_and_comes_along() -> None:
    source, target = source_files("zarr"), MemoryFiles("target")
    report = convert(source, target)
    size = sum(len(data) for path, data in target.data.items() if path.endswith(".tar"))
    assert report == ConvertReport(
        shards=2, commits=6, rows=3 * 7 - 2 * 3, failed=6, bytes=size, skipped=0
    )
    old, new = Store(source), Store(target)
    assert (new.meta.statistics, new.meta.counts) == (old.meta.statistics, old.meta.counts)
    assert new.commit(KEY, "motion").failed == old.commit(KEY, "motion").failed
    assert target.read("quality.parquet") == b"psnr"
    for path in source.list("plan"):
        assert target.read(path) == source.read(path)
    checked = verify(new)
    [damage] = checked.damage  # it comes along as it is, and is no report of these commits
    assert damage.where == "target/quality.parquet"
    for row in range(4):
        ours, theirs = (store.read_row(KEY, row, "caption") for store in (new, old))
        assert ours == theirs


def test_a_conversion_that_is_killed_at_any_write_goes_on_where_it_was() -> None:
    source, undisturbed = source_files("zarr"), MemoryFiles("target")
    convert(source, undisturbed)
    for number in range(1, undisturbed.writes + 1):
        target = MemoryFiles("target")
        target.fail_at = number
        with pytest.raises(KilledError):
            convert(source, target)
        target.fail_at = None
        done = len(list(list_commits(target)))
        assert convert(source, target).skipped == done
        assert target.data == undisturbed.data, f"killed at write {number}"


def test_running_it_again_writes_no_rows() -> None:
    source, target = source_files("zarr"), MemoryFiles("target")
    first = convert(source, target)
    before = dict(target.data)
    again = convert(source, target)
    assert again == replace(first, bytes=0, skipped=6)
    assert target.data == before


def test_columns_and_shards_that_came_later_are_added() -> None:
    source, target = MemoryFiles("source"), MemoryFiles("target")
    writer = open_writer(source, make_meta(columns={"motion": MOTION}), 7)
    write_shards(writer, ["motion"], only=[0])
    convert(source, target)
    write_shards(open_writer(source, make_meta(), 7), tuple(COLUMNS), only=[1])
    write_shards(open_writer(source, make_meta(), 7), ["caption"], only=[0])
    report = convert(source, target)
    assert (report.commits, report.skipped) == (5, 1)
    assert verify(Store(target)).ok
    assert Commit.read(target, KEY, "caption").file.endswith("shard-000000.caption.tar")
    assert len(build_index(target).entries) == 5


def test_a_damaged_row_ends_the_conversion_by_name() -> None:
    source = source_files("zarr")
    path = f"{BUCKET}/motion/c/1/0/0/0/0"
    source.data[path] = source.data[path][:3] + b"!" + source.data[path][4:]
    with pytest.raises(StoreError, match=rf"source/{path}: row 1 does not match its checksum"):
        convert(source, MemoryFiles("target"))
    source.delete(path)
    with pytest.raises(StoreError, match=rf"source/{path} is missing"):
        convert(source, MemoryFiles("target"))


def test_what_was_converted_before_is_proven_again() -> None:
    source, target = source_files("zarr"), MemoryFiles("target")
    convert(source, target)
    path = f"{BUCKET}/shard-000000.tar"
    whole = target.data[path]
    offset = Commit.read(target, KEY, "motion").ranges[0][0]
    target.data[path] = whole[:offset] + b"!!" + whole[offset + 2 :]
    with pytest.raises(StoreError, match=r"target/.*row 0 does not match its checksum"):
        convert(source, target)
    target.data[path] = whole
    other = replace(Commit.read(target, KEY, "motion"), failed=())
    put_commit(target, other)
    with pytest.raises(StoreError, match="motion has other failed than its original"):
        convert(source, target)


def test_a_place_that_is_taken_is_refused() -> None:
    source = source_files("zarr")
    with pytest.raises(StoreError, match="onto itself"):
        convert_store(Store(source), source, "webdataset")
    with pytest.raises(StoreError, match="is a zarr store already"):
        convert_store(Store(source), MemoryFiles("target"), "zarr")
    taken = MemoryFiles("target")
    taken.write("notes.txt", b"mine")
    with pytest.raises(StoreError, match="holds something else"):
        convert(source, taken)
    another = MemoryFiles("target")
    make_store(another, "webdataset", clips=8)
    with pytest.raises(StoreError, match="is of another plan than source's"):
        convert(source, another)


def test_the_command_prints_what_it_did(tmp_path: Path) -> None:
    make_store(LocalFiles(tmp_path / "a.latents"), failed={0: [1]})
    words = ["convert", f"{tmp_path}/a.latents", f"{tmp_path}/b.latents", "--format", "webdataset"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "2 shards, 6 commits, 19 rows, 2 without a value" in result.output
    assert verify(open_store(tmp_path / "b.latents")).ok
    again = CliRunner().invoke(main, words)
    assert "6 of them were there before" in again.output
    missing = CliRunner().invoke(main, ["convert", f"{tmp_path}/no", f"{tmp_path}/c"])
    assert missing.exit_code == 1
    assert "is not a latent store" in missing.output


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_a_file_of_the_new_store_that_is_gone_is_written_again(container: Container) -> None:
    source, target = MemoryFiles("a"), MemoryFiles("b")
    make_store(source, "webdataset" if container == "zarr" else "zarr")
    convert_store(Store(source), target, container)
    whole = dict(target.data)
    lost = next(p for p in target.data if p.endswith(".tar") or "/motion/c/" in p)
    del target.data[lost]
    convert_store(Store(source), target, container)
    assert target.data == whole
