"""`verify` finds every flipped byte, and says which clips the damage costs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from reducio_latents.errors import StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store import Store
from reducio_latents.store.commit import ClipQuality, Commit, ShardKey, commit_path, list_commits
from reducio_latents.store.plan import read_plan, write_part
from reducio_latents.store.seal import seal, unseal
from reducio_latents.store.writer import ColumnRows
from reducio_latents.upkeep.verify import VerifyReport, verify
from tests.stores import (
    BUCKET,
    CAPTION,
    MOTION,
    MemoryFiles,
    clip_ids,
    column_rows,
    finish,
    make_meta,
    make_store,
    motion_row,
    open_writer,
    plan_part,
    put_commit,
    write_shards,
)

SMALL = {"motion": MOTION, "caption": CAPTION}
KEY = ShardKey(BUCKET, 0)


def store_of(files: MemoryFiles) -> Store:
    return Store(files)


def found(files: MemoryFiles, plan: Any = None) -> bool:
    """Whether opening or verifying tells that something is wrong."""
    try:
        store = Store(files)
        if plan is not None:
            store.plan = plan  # parsing it is most of the time
        return not verify(store).ok
    except StoreError:
        return True


def flips(files: MemoryFiles, path: str, step: int = 1) -> Iterator[int]:
    """Yield positions of a file, `step` apart in a small one, while that byte is changed."""
    whole = files.data[path]
    for position in range(0, len(whole), max(step, len(whole) // 30)):
        changed = bytearray(whole)
        changed[position] ^= 1 << (position % 8)
        files.data[path] = bytes(changed)
        yield position
    files.data[path] = whole


def report_of(files: MemoryFiles) -> VerifyReport:
    return verify(Store(files))


def clips_of(report: VerifyReport) -> set[str]:
    return {clip for damage in report.damage for clip in damage.clips}


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_a_store_that_is_as_it_was_written_is_sound(
    container: Literal["zarr", "webdataset"],
) -> None:
    files = MemoryFiles()
    make_store(files, container, failed={0: [1]})
    report = report_of(files)
    assert report.ok, report.damage
    assert (report.commits, report.rows, report.missing) == (6, 7 * 3 - 2, {})
    held = {Commit.read(files, key, column).file for column, key in list_commits(files)}
    assert report.bytes == sum(len(files.data[path]) for path in held)


def test_what_is_damaged_is_named_once() -> None:
    files = MemoryFiles()
    make_store(files)
    for path in ("plan/videos-00000.parquet", "index.json", commit_path(KEY, "motion")):
        whole = files.data[path]
        for damaged in (whole[:-9] + b"?" + whole[-8:], None):
            files.data.pop(path)
            if damaged is not None:
                files.data[path] = damaged
            for damage in report_of(files).damage:
                assert str(damage).count(path) <= 1, damage
                assert ": it memory" not in str(damage)
        files.data[path] = whole


def test_flipped_bytes_all_over_a_zarr_store_are_found() -> None:
    files = MemoryFiles()
    make_store(files, clips=2, shard_rows=2, columns=SMALL, failed={0: [1]})
    plan = read_plan(files)
    assert not found(files, plan)
    missed = [
        (path, position)
        for path in sorted(files.data)
        if not path.endswith(".parquet")
        for position in flips(files, path, 19)
        if not found(files, plan)
    ]
    assert missed == []
    assert not found(files, plan)


def test_flipped_bytes_all_over_a_tar_and_its_commits_are_found() -> None:
    files = MemoryFiles()
    make_store(files, "webdataset", clips=2, shard_rows=2, columns=SMALL, failed={0: [1]})
    plan = read_plan(files)
    assert not found(files, plan)
    missed = [
        (path, position)
        for path in sorted(files.data)
        if path.startswith(("commits/", BUCKET))
        for position in flips(files, path, 19)
        if not found(files, plan)
    ]
    assert missed == []


def test_flipped_bytes_of_the_plan_are_found() -> None:
    files = MemoryFiles()
    make_store(files, clips=2, shard_rows=2, columns=SMALL)
    for path in [path for path in files.data if path.endswith(".parquet")]:
        assert all(found(files) for _ in flips(files, path, 199))


@pytest.mark.parametrize("length", [0, 1, 30, 99])
def test_a_truncated_file_costs_the_clips_that_are_cut_off(length: int) -> None:
    files = MemoryFiles()
    make_store(files)
    path = f"{BUCKET}/motion/c/0/0/0/0/0"
    size = len(files.data[path])
    files.data[path] = files.data[path][:length]
    [damage] = report_of(files).damage
    assert damage.where == f"memory/{path}"
    assert damage.what == f"the file has {length} bytes, the commit says {size}"
    assert damage.clips == tuple(clip_ids(7)[:4])


def test_a_missing_file_costs_its_clips() -> None:
    files = MemoryFiles()
    make_store(files)
    files.delete(f"{BUCKET}/content_image/c/1/0")
    [damage] = report_of(files).damage
    assert (damage.what, damage.clips) == ("the file is missing", tuple(clip_ids(7)[4:]))


def test_what_cannot_be_opened_at_all_hides_no_other_damage(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    make_store(files)
    pipes = [
        f"{BUCKET}/motion/zarr.json", f"{BUCKET}/clip_id/c/0", f"{BUCKET}/caption/c/0/0",
        "errors.parquet", "listing.txt",
    ]  # fmt: skip
    for path in pipes:
        (tmp_path / path).unlink()
        os.mkfifo(tmp_path / path)
    last = f"{BUCKET}/motion/c/1/0/0/0/0"
    (tmp_path / last).unlink()
    shown = [str(damage) for damage in verify(Store(files)).damage]
    for path in pipes:
        assert any(f"{path}: it is a pipe" in line for line in shown), (path, shown)
    assert f"{tmp_path}/{last}: the file is missing" in shown


def test_reports_that_must_be_there_are_missed() -> None:
    files = MemoryFiles()
    part = plan_part(7, 4)
    write_part(files, 0, replace(part, spec=replace(part.spec, shots="told")))
    writer = open_writer(files, make_meta(columns=SMALL), 7)
    commits = write_shards(writer, tuple(SMALL), {0: [1]})
    quality = ClipQuality(row=0, clip_id=clip_ids(1)[0], psnr=30.0, psnr_frames=(30.0,))
    put_commit(files, replace(commits[0], quality=(quality,)))
    finish(writer)
    assert report_of(files).ok
    for name in ("errors.parquet", "quality.parquet", "shots.parquet"):
        data = files.data.pop(name)
        [damage] = report_of(files).damage
        assert str(damage).startswith(f"memory/{name}: the file is missing; run the encode")
        files.data[name] = data


def test_a_missing_tar_costs_the_clips_of_all_its_columns() -> None:
    files = MemoryFiles()
    make_store(files, "webdataset")
    files.delete(f"{BUCKET}/shard-000001.tar")
    damage = report_of(files).damage
    assert len(damage) == 3
    assert {d.clips for d in damage} == {tuple(clip_ids(7)[4:])}


def test_one_damaged_row_costs_one_clip() -> None:
    files = MemoryFiles()
    make_store(files)
    path = f"{BUCKET}/motion/c/0/0/0/0/0"
    data = bytearray(files.data[path])
    data[2 * 16 + 3] ^= 0x40
    files.data[path] = bytes(data)
    [damage] = report_of(files).damage
    assert damage.what == "rows do not match their checksums"
    assert damage.clips == (clip_ids(7)[2],)


def test_a_damaged_row_that_captions_share_costs_all_of_them() -> None:
    files = MemoryFiles()
    make_store(files, clips=7, shard_rows=8)
    path = f"{BUCKET}/caption/c/0/0"
    data = files.data[path]
    place = data.index(b"caption 0")
    files.data[path] = data[:place] + b"C" + data[place + 1 :]
    [damage] = report_of(files).damage
    ids = clip_ids(7)
    assert damage.clips == (ids[0], ids[6])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found(value: float) -> None:
    files = MemoryFiles()
    writer = open_writer(files, make_meta(columns={"motion": MOTION}), 3)
    rows = [motion_row(name) for name in clip_ids(3)]
    rows[1][0, 0, 0, 1] = value
    writer.write_shard(KEY, clip_ids(3), {"motion": ColumnRows(rows=rows)})
    [damage] = report_of(files).damage
    assert damage.what == "rows hold NaN, infinity or another shape"
    assert damage.clips == (clip_ids(3)[1],)


def rewrite(files: MemoryFiles, column: str, **changes: Any) -> None:
    """Change a commit as its writer would: with a new checksum."""
    put_commit(files, replace(Commit.read(files, KEY, column), **changes))
    files.delete("index.json")


@pytest.mark.parametrize(
    ("changes", "message", "lost"),
    [
        ({"fingerprint": "0" * 64}, "an encoder with another fingerprint", 4),
        ({"clips_sha256": "0" * 64}, "of other clips than the plan's", 4),
        ({"rows": 3}, "has 3 rows, the plan 4", 4),
        ({"row_crc32c": (1, 2, 3)}, "has 4 rows, the plan 4", 4),
        ({"row_crc32c": (1, 2, 3, None)}, "row 3 is empty without a reason", 4),
        ({"file": f"{BUCKET}/nothing"}, "the file is missing", 4),
        ({"file": "../elsewhere"}, "names a file outside the store", 4),
        ({"file": "/etc/passwd"}, "names a file outside the store", 4),
        ({"file_sha256": "0" * 64}, "bytes outside the rows differ from the commit", 0),
        ({"bucket": "16x32x65"}, "", 0),
    ],
)
def test_a_commit_that_does_not_agree_with_the_store_is_found(
    changes: dict[str, Any], message: str, lost: int
) -> None:
    files = MemoryFiles()
    make_store(files)
    rewrite(files, "motion", **changes)
    report = report_of(files)
    assert message in " ".join(damage.what for damage in report.damage)
    assert not report.ok
    assert len(clips_of(report)) == lost


def test_a_failed_row_with_a_checksum_is_found() -> None:
    files = MemoryFiles()
    make_store(files, failed={0: [1]})
    failed = Commit.read(files, KEY, "motion").failed
    rewrite(files, "caption", failed=failed)
    [damage] = report_of(files).damage
    assert damage.what == "row 1 is failed, but has a checksum"
    rewrite(files, "caption", failed=(replace(failed[0], row=99),))
    assert [d.what for d in report_of(files).damage] == ["row 99 is failed, but has a checksum"]


def test_commits_of_what_the_store_does_not_describe_are_found() -> None:
    files = MemoryFiles()
    make_store(files)
    data = files.data[commit_path(KEY, "motion")]
    files.write(commit_path(KEY, "unknown"), data)
    files.write(commit_path(ShardKey(BUCKET, 7), "motion"), data)
    what = [damage.what for damage in report_of(files).damage]
    assert what == [
        "there is a commit, but the store describes no such column unknown",
        "there is a commit, but the store describes no such shard",
    ]


def test_a_commit_under_the_name_of_another_shard_is_found() -> None:
    files = MemoryFiles()
    make_store(files, clips=8)
    other = files.data[commit_path(ShardKey(BUCKET, 1), "motion")]
    files.data[commit_path(KEY, "motion")] = other
    assert "speaks of another shard" in report_of(files).damage[0].what


def test_the_plan_of_another_corpus_is_found() -> None:
    files, others = MemoryFiles(), MemoryFiles()
    make_store(files)
    part = plan_part(7, 4)
    reversed_ids = part.clips["clip_id"].to_pylist()[::-1]
    clips = part.clips.set_column(0, part.clips.schema.field(0), [reversed_ids])
    make_plan = replace(part, clips=clips)
    from reducio_latents.store.plan import write_part

    write_part(others, 0, make_plan)
    files.data |= {path: data for path, data in others.data.items() if path.startswith("plan/")}
    what = {damage.what for damage in report_of(files).damage}
    names = "it does not say what the plan says; run the encode command again"
    assert what == {"the commit is of other clips than the plan's", names}


def test_a_store_without_a_plan_is_damage_and_no_traceback() -> None:
    files = MemoryFiles()
    make_store(files)
    for path in [path for path in files.data if path.startswith("plan/")]:
        files.delete(path)
    assert "has no plan" in report_of(files).damage[-1].what


def test_work_to_do_is_not_damage() -> None:
    files = MemoryFiles()
    writer = open_writer(files, make_meta(), 7)
    write_shards(writer, ["motion"], only=[1])
    report = report_of(files)
    assert report.ok, report.damage
    assert report.missing == {"motion": 1, "content_image": 2, "caption": 2}


@pytest.mark.parametrize("path", [f"{BUCKET}/zarr.json", f"{BUCKET}/motion/zarr.json"])
def test_metadata_of_arrays_that_is_gone_or_says_something_else_is_found(path: str) -> None:
    files = MemoryFiles()
    make_store(files)
    files.data[path] = files.data[path].replace(b'"zarr_format": 3', b'"zarr_format": 2')
    assert "does not say what the store's description says" in report_of(files).damage[0].what
    files.delete(path)
    assert "the file is missing" in report_of(files).damage[0].what


def test_an_index_that_disagrees_with_a_commit_is_found() -> None:
    files = MemoryFiles()
    make_store(files, failed={0: [1]})
    record = unseal(files.data["index.json"])
    assert record["commits"][0]["failed"] != record["commits"][2]["failed"]
    record["commits"][2]["failed"] = []
    del record["crc32c"]
    files.data["index.json"] = seal(json.dumps(record).encode())
    assert any("it disagrees with the commit of" in d.what for d in report_of(files).damage)


def test_progress_is_told_and_an_index_of_fewer_commits_is_no_damage() -> None:
    files = MemoryFiles()
    writer = make_store(files, clips=4)
    stale = files.data["index.json"], files.data["listing.txt"]
    rows = column_rows("motion", clip_ids(4))
    text = replace(MOTION, encoder="another")
    meta = make_meta(columns={**writer.meta.columns, "second": text})
    open_writer(files, meta, 4).write_shard(KEY, clip_ids(4), {"second": rows})
    files.data["index.json"], files.data["listing.txt"] = stale
    seen: list[int] = []
    report = verify(store_of(files), seen.append)
    assert report.ok, report.damage
    assert seen == [1, 2, 3, 4]
