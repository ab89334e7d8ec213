"""WebDataset stores: read by stock webdataset and tar, located to the byte, the same every time."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import urllib.parse
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reducio_latents.errors import StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store import Store, open_store, tar
from reducio_latents.store.commit import Commit, ShardKey, commit_path
from reducio_latents.store.row_kinds import npy_head, row_kind
from reducio_latents.store.writer import ColumnRows
from reducio_latents.upkeep.verify import verify
from tests.stores import (
    BUCKET,
    CAPTION,
    IMAGE,
    MOTION,
    MemoryFiles,
    clip_ids,
    column_rows,
    finish,
    make_meta,
    make_store,
    open_writer,
    put_commit,
    row_of,
    write_shards,
)

KEY = ShardKey(BUCKET, 0)


def samples(path: Path, decode: bool = True) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = webdataset.WebDataset(str(path), shardshuffle=False)
        return list(found.decode("rgb8") if decode else found)


def picture(number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.RandomState(number).randint(0, 255, (8, 12, 3), dtype=np.uint8)


def picture_file(number: int, codec: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(number)).save(out, codec, lossless=True)
    return out.getvalue()


def test_stock_webdataset_decodes_every_column(tmp_path: Path) -> None:
    columns = {
        "motion": MOTION,
        "content_image": replace(IMAGE, content="image/png"),
        "caption": CAPTION,
        "text": replace(CAPTION, content="application/x-token-vectors"),
    }
    writer = open_writer(LocalFiles(tmp_path), make_meta("webdataset", columns=columns), 3)
    ids = clip_ids(3)
    rows = {name: column_rows(name, ids) for name in columns}
    rows["content_image"] = ColumnRows(rows=[picture_file(i, "PNG") for i in range(3)])
    rows["text"] = ColumnRows(rows=[b"\x00\x01\x02"] * 3)
    details = [{"video": f"v{i}.mp4", "start_s": i / 2} for i in range(3)]
    writer.write_shard(KEY, ids, rows, details=details)
    found = samples(tmp_path / BUCKET / "shard-000000.tar")
    assert [sample["__key__"] for sample in found] == ids
    for number, sample in enumerate(found):
        np.testing.assert_array_equal(sample["motion.npy"], row_of("motion", ids[number]))
        assert sample["motion.npy"].dtype == np.float16
        np.testing.assert_array_equal(sample["content_image.png"], picture(number))
        assert sample["caption.txt"] == row_of("caption", ids[number]).decode()  # type: ignore[union-attr]
        assert sample["text.bin"] == b"\x00\x01\x02"
        assert sample["json"] == {
            "clip_id": ids[number],
            "video": f"v{number}.mp4",
            "start_s": number / 2,
            "bucket": BUCKET,
            "columns": ["caption", "content_image", "motion", "text"],
            "latents": {
                "motion": {"holds": ["mean", "log-variance"], "axis": 0, "final": MOTION.final}
            },
        }


def test_an_image_is_named_by_its_media_type_and_decodes(tmp_path: Path) -> None:
    for codec, extension in (("WEBP", "webp"), ("PNG", "png"), ("JPEG", "jpg")):
        column = replace(IMAGE, content=f"image/{codec.lower()}")
        meta = make_meta("webdataset", columns={"content_image": column})
        writer = open_writer(LocalFiles(tmp_path / codec), meta, 1)
        rows = ColumnRows(rows=[picture_file(0, codec)])
        [commit] = writer.write_shard(KEY, clip_ids(1), {"content_image": rows})
        [sample] = samples(tmp_path / codec / commit.file)
        assert sample[f"content_image.{extension}"].shape == (8, 12, 3)
        if codec != "JPEG":
            np.testing.assert_array_equal(sample[f"content_image.{extension}"], picture(0))


def test_our_own_reader_gives_the_same(tmp_path: Path) -> None:
    make_store(LocalFiles(tmp_path), "webdataset", failed={0: [1]})
    store = open_store(tmp_path)
    for number, clip_id in enumerate(clip_ids(7)):
        key, row = ShardKey(BUCKET, number // 4), number % 4
        motion = store.read_row(key, row, "motion")
        if number == 1:
            assert motion is None
        else:
            np.testing.assert_array_equal(motion, row_of("motion", clip_id))
        assert store.read_row(key, row, "caption") == row_of("caption", clip_id)
    assert verify(store).ok


def test_a_clip_without_a_row_has_no_member_and_one_without_any_is_not_there(
    tmp_path: Path,
) -> None:
    writer = open_writer(LocalFiles(tmp_path), make_meta("webdataset"), 7)
    write_shards(writer, failed={0: [1]}, only=[0])
    write_shards(writer, ["motion", "content_image"], failed={1: [2]}, only=[1])
    first, second = (tmp_path / BUCKET / f"shard-00000{i}.tar" for i in (0, 1))
    keys = [
        set(sample) - {"__key__", "__url__", "__local_path__"} for sample in samples(first, False)
    ]
    assert keys[1] == {"json", "caption.txt"}
    assert all(len(names) == 4 for i, names in enumerate(keys) if i != 1)
    assert [sample["__key__"] for sample in samples(second, False)] == clip_ids(7)[4:6]


def test_the_same_rows_give_the_same_bytes_and_no_trace_of_who_or_when() -> None:
    stores = [MemoryFiles(), MemoryFiles()]
    for files in stores:
        make_store(files, "webdataset")
    assert stores[0].data == stores[1].data
    with tarfile.open(fileobj=io.BytesIO(stores[0].data[tar.tar_path(KEY)])) as opened:
        for info in opened:
            owner = (info.uid, info.gid, info.uname, info.gname, info.mtime, info.mode)
            assert owner == (0, 0, "", "", 0, 0o644)


def test_gnu_tar_extracts_it(tmp_path: Path) -> None:
    make_store(LocalFiles(tmp_path / "store"), "webdataset")
    (tmp_path / "out").mkdir()
    shard = tmp_path / "store" / BUCKET / "shard-000000.tar"
    done = subprocess.run(
        ["tar", "-xf", shard, "-C", tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    clip_id = clip_ids(1)[0]
    motion = np.load(tmp_path / "out" / f"{clip_id}.motion.npy")
    np.testing.assert_array_equal(motion, row_of("motion", clip_id))
    assert json.loads((tmp_path / "out" / f"{clip_id}.json").read_text())["clip_id"] == clip_id


@settings(max_examples=60)
@given(clip_id=st.text(min_size=1, max_size=80))
def test_any_clip_id_is_one_key_for_webdataset_and_comes_back(clip_id: str) -> None:
    members = {"motion": tar.member_of(row_kind(CAPTION), "motion", BUCKET, [b"payload"])}
    try:
        clip_id.encode()
    except UnicodeEncodeError:
        return
    packed, ranges = tar.pack_tar([{"clip_id": clip_id}], BUCKET, members)
    data = bytes(packed)
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        names = opened.getnames()
        about = opened.extractfile(names[0])
        assert about is not None
        assert json.loads(about.read())["clip_id"] == clip_id
    key, _, suffix = names[1].partition(".")
    assert (urllib.parse.unquote(key), suffix) == (clip_id, "motion.txt")
    [(start, length)] = ranges["motion"]
    assert data[start : start + length] == b"payload"
    assert tar.find_rows(data, [{"clip_id": clip_id}], members["motion"]) == ranges["motion"]


def test_a_long_name_is_read_by_webdataset_too(tmp_path: Path) -> None:
    clip_id = "folder/with.dots/" + "é" * 90 + "-000001000"
    meta = make_meta("webdataset", columns={"caption": CAPTION})
    writer = open_writer(LocalFiles(tmp_path), meta, 1)
    rows = ColumnRows(rows=[b"text"])
    [commit] = writer.write_shard(KEY, [clip_id], {"caption": rows})
    [sample] = samples(tmp_path / commit.file)
    assert (sample["json"]["clip_id"], sample["caption.txt"]) == (clip_id, "text")
    offset, length = commit.ranges[0]
    assert writer.files.read_range(commit.file, offset, length) == b"text"


@pytest.mark.parametrize("shape", [(), (3,), (32, 4, 8, 8), (1,) * 30])
@pytest.mark.parametrize("dtype", ["float16", "uint8", "int64"])
def test_the_head_of_an_array_is_what_numpy_reads(shape: Sequence[int], dtype: str) -> None:
    head = npy_head(np.dtype(dtype), tuple(shape))
    assert len(head) % 64 == 0
    values = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    read = np.load(io.BytesIO(head + values.tobytes()), allow_pickle=False)
    assert read.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(read, values)


def test_rows_lie_aligned_for_mapping() -> None:
    files = MemoryFiles()
    make_store(files, "webdataset")
    offsets = [offset for offset, _ in Commit.read(files, KEY, "motion").ranges]
    assert all(offset % 64 == 0 for offset in offsets)


def test_a_column_that_comes_later_has_a_tar_of_its_own() -> None:
    files = MemoryFiles()
    make_store(files, "webdataset", columns={"motion": MOTION, "content_image": IMAGE})
    before = {path: data for path, data in files.data.items() if path.endswith(".tar")}
    writer = open_writer(files, make_meta("webdataset", columns={"caption": CAPTION}), 7)
    write_shards(writer, ["caption"])
    finish(writer)
    assert before.items() <= files.data.items()
    assert Commit.read(files, KEY, "caption").file == f"{BUCKET}/shard-000000.caption.tar"
    store = Store(files)
    assert verify(store).ok
    assert store.read_row(KEY, 2, "caption") == row_of("caption", clip_ids(7)[2])


def test_adding_a_column_reads_no_more_of_a_tar_than_its_head() -> None:
    class Counting(MemoryFiles):
        bytes_read = 0

        def read(self, path: str) -> bytes:
            self.bytes_read += (self.size(path) or 0) if path.endswith(".tar") else 0
            return super().read(path)

        def read_range(self, path: str, start: int, length: int) -> bytes:
            self.bytes_read += length if path.endswith(".tar") else 0
            if path not in self.data:
                raise FileNotFoundError(path)
            return self.data[path][start:][:length]

    files = Counting()
    make_store(files, "webdataset", clips=8, shard_rows=8, columns={"motion": MOTION})
    writer = open_writer(files, make_meta("webdataset", shard_rows=8, columns={"x": CAPTION}), 8)
    files.bytes_read = 0
    write_shards(writer, ["x"])
    assert 0 < files.bytes_read <= tar.HEAD_BYTES < len(files.data[tar.tar_path(KEY)])


def test_a_column_that_is_made_anew_with_other_rows_leaves_the_shared_tar_alone() -> None:
    files = MemoryFiles()
    writer = make_store(files, "webdataset", failed={0: [1]})
    shared = files.data[tar.tar_path(KEY)]
    writer.drop_commit(KEY, "motion")
    write_shards(writer, ["motion"], only=[0])  # what failed has come right
    finish(writer)
    assert files.data[tar.tar_path(KEY)] == shared
    commit = Commit.read(files, KEY, "motion")
    assert (commit.file, commit.failed) == (f"{BUCKET}/shard-000000.motion.tar", ())
    assert verify(Store(files)).ok


def test_a_column_that_is_made_anew_with_equal_rows_stays_where_it_was() -> None:
    files = MemoryFiles()
    writer = make_store(files, "webdataset", failed={0: [1]})
    before = dict(files.data)
    writer.drop_commit(KEY, "motion")
    write_shards(writer, ["motion"], failed={0: [1]}, only=[0])
    finish(writer)
    assert files.data == before


@pytest.mark.parametrize("damage", [b"", b"no tar at all" * 100])
def test_a_shared_tar_that_is_damaged_is_not_leant_on(damage: bytes) -> None:
    files = MemoryFiles()
    writer = make_store(files, "webdataset")
    writer.drop_commit(KEY, "motion")
    files.data[tar.tar_path(KEY)] = damage
    write_shards(writer, ["motion"], only=[0])
    assert Commit.read(files, KEY, "motion").file == f"{BUCKET}/shard-000000.motion.tar"
    files.delete(tar.tar_path(KEY))
    write_shards(writer, ["motion"], only=[0])


def test_compressed_rows_stay_as_they_are(tmp_path: Path) -> None:
    columns = {"motion": replace(MOTION, compression="zstd")}
    make_store(LocalFiles(tmp_path), "webdataset", columns=columns)
    store = open_store(tmp_path)
    assert verify(store).ok
    clip_id = clip_ids(1)[0]
    np.testing.assert_array_equal(store.read_row(KEY, 0, "motion"), row_of("motion", clip_id))
    [first, *_] = samples(tmp_path / BUCKET / "shard-000000.tar")
    assert "motion.npy.zst" in first


def test_a_commit_that_does_not_say_where_its_rows_are_is_an_error() -> None:
    files = MemoryFiles()
    make_store(files, "webdataset")
    put_commit(files, replace(Commit.read(files, KEY, "motion"), ranges=((0, 1),)))
    store = Store(files)
    with pytest.raises(StoreError, match="says where 1 of its 4 rows are"):
        store.ranges(store.commit(KEY, "motion"))
    assert commit_path(KEY, "motion") in files.data
