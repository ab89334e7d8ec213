"""What plain zarr-python reads is what was written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from reducio_latents.errors import StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store import open_store
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.container import array_rows
from reducio_latents.store.row_kinds import row_kind
from reducio_latents.store.writer import ColumnRows
from reducio_latents.store.zarr import ShardForm, pack_shard, read_ranges
from tests.stores import (
    BUCKET,
    CAPTION,
    IMAGE,
    MOTION,
    clip_ids,
    column_rows,
    make_meta,
    make_store,
    open_writer,
    row_in,
    row_of,
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Bytes of any length have no Zarr v3 specification yet, and folders beside the arrays.
        warnings.simplefilter("ignore")
        yield


def group(root: Path) -> Any:
    return zarr.open_group(root, mode="r")


def test_arrays_are_what_was_written_and_failed_rows_are_nan(tmp_path: Path) -> None:
    make_store(LocalFiles(tmp_path), failed={0: [1], 1: [2]})
    array = group(tmp_path)[f"{BUCKET}/motion"]
    assert (array.shape, array.dtype) == ((7, 4, 1, 1, 2), np.float16)
    assert array.shards == (4, 4, 1, 1, 2)
    for row, clip_id in enumerate(clip_ids(7)):
        if row in (1, 6):
            assert np.isnan(array[row]).all()
        else:
            np.testing.assert_array_equal(array[row], row_of("motion", clip_id))


def test_bytes_are_what_was_written_and_empty_ones_too(tmp_path: Path) -> None:
    make_store(LocalFiles(tmp_path), failed={0: [1]})
    for column in ("caption", "content_image"):
        array = group(tmp_path)[f"{BUCKET}/{column}"]
        wanted = [row_of(column, name) for name in clip_ids(7)]
        if column == "content_image":
            wanted[1] = None
        assert [row_in(array, i) for i in range(7)] == wanted


def test_the_attributes_of_the_group_describe_the_store(tmp_path: Path) -> None:
    writer = make_store(LocalFiles(tmp_path))
    described = group(tmp_path).attrs["reducio_latents"]
    assert described["columns"]["motion"]["config"] == MOTION.config
    assert described["counts"] == writer.meta.counts


def test_a_shard_that_is_not_done_reads_as_nan(tmp_path: Path) -> None:
    from tests.stores import write_shards

    write_shards(open_writer(LocalFiles(tmp_path), make_meta(), 7), only=[1])
    array = group(tmp_path)[f"{BUCKET}/motion"]
    assert np.isnan(array[:4]).all()
    np.testing.assert_array_equal(array[5], row_of("motion", clip_ids(7)[5]))


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8", "int64"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_type_of_number_survives(tmp_path: Path, dtype: str, compression: Any) -> None:
    shape = (4, 5)
    column = replace(MOTION, dtype=dtype, row_shapes={BUCKET: shape}, compression=compression)
    meta = make_meta(columns={"x": column})
    writer = open_writer(LocalFiles(tmp_path), meta, 3)
    rng = np.random.RandomState(0)
    rows = [(rng.standard_normal(shape) * 100).astype(dtype) for _ in range(3)]
    writer.write_shard(ShardKey(BUCKET, 0), clip_ids(3), {"x": ColumnRows(rows=rows)})
    np.testing.assert_array_equal(group(tmp_path)[f"{BUCKET}/x"][:], np.stack(rows))
    store = open_store(tmp_path)
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(store.read_row(ShardKey(BUCKET, 0), number, "x"), row)


@settings(max_examples=15)
@given(
    rows=st.lists(
        st.one_of(st.none(), st.binary(max_size=40), st.just(b""), st.just(b"x" * 100_000)),
        min_size=1,
        max_size=9,
    ),
    compression=st.sampled_from(["none", "zstd"]),
)
def test_rows_of_any_length_survive(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes | None], compression: Any
) -> None:
    root = tmp_path_factory.mktemp("store")
    meta = make_meta(columns={"x": replace(CAPTION, compression=compression)}, shard_rows=5)
    writer = open_writer(LocalFiles(root), meta, len(rows))
    ids = clip_ids(len(rows))
    for shard in range(math.ceil(len(rows) / 5)):
        part, names = rows[shard * 5 :][:5], ids[shard * 5 :][:5]
        bad = column_rows("x", names, [i for i, row in enumerate(part) if row is None]).failed
        given_rows = ColumnRows(rows=part, failed=bad)
        writer.write_shard(ShardKey(BUCKET, shard), names, {"x": given_rows})
    store = open_store(root)
    read = [store.read_row(ShardKey(BUCKET, i // 5), i % 5, "x") for i in range(len(rows))]
    assert read == rows
    array = group(root)[f"{BUCKET}/x"]
    found = [row_in(array, i, 5) for i in range(len(rows))]
    kind = row_kind(meta.columns["x"])
    assert [row if row is None else kind.unpack(row, BUCKET) for row in found] == rows


def test_equal_rows_are_stored_once_whoever_made_them(tmp_path: Path) -> None:
    form = ShardForm.of(make_meta(shard_rows=8), "caption", BUCKET)
    once = pack_shard([b"long caption " * 50, b"other"], form)
    often = pack_shard([bytes(b"long caption " * 50) for _ in range(7)] + [b"other"], form)
    assert sum(map(len, once)) == sum(map(len, often))
    ranges = read_ranges(b"".join(often)[: form.places[1]], form, sum(map(len, often)), "x")
    assert len(set(map(tuple, ranges.tolist()))) == 2


def test_rows_of_an_array_lie_one_after_another(tmp_path: Path) -> None:
    make_store(LocalFiles(tmp_path))
    store = open_store(tmp_path)
    commit = store.commit(ShardKey(BUCKET, 0), "motion")
    assert store.ranges(commit).tolist() == [[0, 16], [16, 16], [32, 16], [48, 16]]


def test_a_damaged_index_of_rows_is_named(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    make_store(files)
    store = open_store(tmp_path)
    commit = store.commit(ShardKey(BUCKET, 0), "motion")
    data = bytearray(files.read(commit.file))
    data[-6] ^= 1
    files.write(commit.file, data)
    with pytest.raises(StoreError, match="has a damaged index: it is truncated or was changed"):
        store.ranges(commit)
    files.write(commit.file, data[:20])
    with pytest.raises(StoreError, match="has a damaged index"):
        store.ranges(commit)
    files.delete(commit.file)
    with pytest.raises(StoreError, match="is missing or truncated"):
        store.ranges(commit)


def test_an_array_is_as_long_as_its_last_shard_says() -> None:
    shards = [("a", 0, 4), ("a", 1, 2), ("b", 0, 1), ("a", 2, 4), ("a", 3, 1)]
    assert array_rows(shards, 4) == {"a": 13, "b": 1}


def test_images_keep_their_media_type(tmp_path: Path) -> None:
    make_store(LocalFiles(tmp_path))
    assert group(tmp_path)[f"{BUCKET}/content_image"].attrs["content"] == IMAGE.content
