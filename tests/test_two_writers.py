"""Two writers of one store at once: whoever is held up wherever, nothing is lost or mixed up.

One run is stopped at each of its changes in turn, before it or after it, which take turns unless
both are asked for; meanwhile another one runs from its beginning to its end. No thread and no clock
is needed for any of the races.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from reducio_latents import encode_corpus, open_store
from reducio_latents.corpus import CorpusVideo
from reducio_latents.corpus.build import plan_part
from reducio_latents.corpus.probe import ProbeRecord
from reducio_latents.errors import StoreError
from reducio_latents.files import Files, LocalFiles, open_files
from reducio_latents.files.source import VideoSource
from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey, commit_path, list_commits
from reducio_latents.store.container import array_rows
from reducio_latents.store.drop import drop_column
from reducio_latents.store.index import build_index, write_index
from reducio_latents.store.meta import ColumnMeta, StoreMeta
from reducio_latents.store.plan import PlanSpec, PlanTakenError, read_plan, write_part
from reducio_latents.store.writer import StoreWriter
from reducio_latents.upkeep.convert import convert_store
from reducio_latents.upkeep.verify import verify
from tests.corpora import write_video
from tests.object_storage import BUCKET as PLACE
from tests.object_storage import FaultyProxy, s3, s3_server
from tests.stores import (
    BUCKET,
    CAPTION,
    COLUMNS,
    MOTION,
    MemoryFiles,
    column_rows,
    finish,
    make_meta,
    make_store,
    open_writer,
    write_shards,
)
from tests.stores import plan_part as some_plan

__all__ = ["s3", "s3_server"]

SPEC: PlanSpec = some_plan(1, 4).spec
ONE = [f"one/{n}.mp4" for n in range(5)]  # a full shard, and one that is not
OTHER = [f"other/{n}.mp4" for n in range(2)]
CHANGES = ("write", "create", "swap", "delete")


class HeldUpFiles:
    """Files that let `meanwhile` happen once, before or after the n-th change."""

    def __init__(self, files: Files, number: int, after: bool, meanwhile: Callable[[], object]):
        self._files, self._left, self._after, self._meanwhile = files, number, after, meanwhile
        self.changes = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._files, name)
        if name not in CHANGES:
            return found

        def change(*args: Any) -> Any:
            self.changes += 1
            held_up = self.changes == self._left
            if held_up and not self._after:
                self._meanwhile()
            result = found(*args)
            if held_up and self._after:
                self._meanwhile()
            return result

        return change


def each_hold_up(
    start: Callable[[], Files],
    run: Callable[[Any], object],
    other: Callable[[Files], object],
    only: Sequence[int] = (),
    both: bool = False,
) -> Iterator[Files]:
    """Yield the files that `run` has left, held up at each of its changes in turn by `other`."""
    turns = [(number, False) for number in only] or (
        ((n // 2, n % 2 == 1) for n in count(2)) if both else ((n, n % 2 == 0) for n in count(1))
    )
    for number, after in turns:
        files = start()
        held_up = HeldUpFiles(files, number, after, partial(other, files))
        run(held_up)
        if held_up.changes < number:
            assert number > 2
            break
        yield files


def in_memory() -> Files:
    return MemoryFiles()


def on_s3() -> Files:
    return open_files(f"s3://{PLACE}/{uuid.uuid4().hex}")


def encode(files: Files, videos: Sequence[str], columns: Sequence[str] = ("motion",)) -> None:
    """Do what a run over a corpus does, with rows that only depend on the clip."""
    listing = [CorpusVideo(name, VideoSource(f"/corpus/{name}")) for name in videos]
    records = {
        name: ProbeRecord(
            codec="h264", width=64, height=32, rate_fps=30, duration_s=1.2, frames=36,
            bytes=9, sha256=f"{abs(hash(name)):064x}",
        )
        for name in videos
    }  # fmt: skip
    while True:
        part = plan_part(listing, records, SPEC, read_plan(files))
        try:
            if part.videos.num_rows:
                write_part(files, part.number, part)
            break
        except PlanTakenError:
            continue
    add(files, {name: COLUMNS[name] for name in columns}, set(videos))


def add(files: Files, columns: dict[str, ColumnMeta], videos: set[str] | None = None) -> None:
    plan = read_plan(files)
    assert plan is not None
    meta = make_meta(columns=columns)
    writer = StoreWriter.open(files, meta, array_rows(plan.shards(), meta.shard_rows))
    there = set(list_commits(files))
    for shard in plan.shards():
        key = ShardKey(shard.bucket, shard.shard)
        table = plan.shard_clips(*key)
        missing = [name for name in columns if (name, key) not in there]
        if missing and (videos is None or videos & set(table["video"].to_pylist())):
            ids = table["clip_id"].to_pylist()
            details = table.select(["video", "start_s"]).to_pylist()
            rows = {name: column_rows(name, ids) for name in missing}
            writer.write_shard(key, ids, rows, details=details)
    write_index(files, build_index(files))
    writer.complete(plan, lambda stored: replace(stored or meta, versions={"numpy": "1"}))


def require_whole(files: Files, videos: Sequence[str], columns: Sequence[str]) -> None:
    store = Store(files)
    assert sorted(store.plan.videos["video"].to_pylist()) == sorted(videos)
    assert sorted(set(store.plan.clips["video"].to_pylist())) == sorted(videos)
    assert store.columns == sorted(columns)
    report = verify(store)
    assert report.ok, report.damage
    assert not report.missing
    for shard in store.plan.shards():
        ids = store.plan.shard_clips(shard.bucket, shard.shard)["clip_id"].to_pylist()
        key = ShardKey(shard.bucket, shard.shard)
        for name in columns:
            found = [store.read_row(key, row, name) for row in range(len(ids))]
            wanted = column_rows(name, ids).rows
            assert all(bytes(a) == bytes(b) for a, b in zip(found, wanted, strict=True))  # type: ignore[arg-type]
    names = files.read("listing.txt").decode().splitlines()
    assert names == sorted([*files.list("commits"), *files.list("plan")])
    assert not list(files.list("plan/pending"))


def test_runs_over_two_corpora_that_begin_one_store_at_once() -> None:
    for files in each_hold_up(
        in_memory, lambda files: encode(files, ONE), lambda files: encode(files, OTHER), both=True
    ):
        require_whole(files, [*ONE, *OTHER], ["motion"])


def test_runs_over_two_corpora_that_begin_one_store_on_s3_at_once(s3: FaultyProxy) -> None:
    # Before the clips of the plan's part are stored, its checksums, the description of the store.
    for files in each_hold_up(
        on_s3,
        lambda files: encode(files, ONE[:1]),
        lambda files: encode(files, OTHER[:1]),
        only=(2, 3, 6),
    ):
        require_whole(files, [ONE[0], OTHER[0]], ["motion"])


def test_runs_over_one_corpus_at_once() -> None:
    def run(files: Files) -> None:
        encode(files, ONE)

    for files in each_hold_up(in_memory, run, run):
        require_whole(files, ONE, ["motion"])


def test_a_run_over_a_corpus_that_has_grown_meanwhile() -> None:
    for files in each_hold_up(
        in_memory,
        lambda files: encode(files, ONE),
        lambda files: encode(files, [*ONE, *OTHER]),
    ):
        require_whole(files, [*ONE, *OTHER], ["motion"])


@contextmanager
def held_up_at_system_call(number: int, meanwhile: Callable[[], object]) -> Iterator[list[str]]:
    """Let `meanwhile` happen before the n-th link or rename, but for those under a lock."""
    seen: list[str] = []
    genuine = {"link": os.link, "replace": os.replace}

    def patched(name: str) -> Callable[..., None]:
        def call(source: Any, target: Any, **options: Any) -> None:
            is_alone = any((p / ".partial" / "swapping").exists() for p in Path(target).parents)
            if not is_alone:
                seen.append(str(target))
                if len(seen) == number:
                    meanwhile()
            genuine[name](source, target, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in genuine:
            patch.setattr(os, name, patched(name))
        yield seen


def test_each_rename_of_a_run_may_be_late(tmp_path: Path) -> None:
    number, seen = 0, ["first"]
    while len(seen) > number or not number:
        number += 1
        files = LocalFiles(tmp_path / str(number))
        with held_up_at_system_call(number, partial(encode, files, OTHER)) as seen:
            encode(files, ONE)
        if len(seen) >= number:
            require_whole(files, [*ONE, *OTHER], ["motion"])
    assert number > 6


def test_two_columns_are_added_at_once() -> None:
    def start() -> Files:
        files = in_memory()
        encode(files, ONE)
        return files

    for files in each_hold_up(
        start,
        lambda files: add(files, {"caption": CAPTION}),
        lambda files: add(files, {"content_image": COLUMNS["content_image"]}),
    ):
        require_whole(files, ONE, ["caption", "content_image", "motion"])


def test_two_runs_put_their_columns_into_the_tars_of_one_store_at_once() -> None:
    def run(*names: str) -> Callable[[Files], None]:
        def write(files: Files) -> None:
            meta = make_meta("webdataset", columns={name: COLUMNS[name] for name in names})
            write_shards(open_writer(files, meta, 7), names)

        return write

    for files in each_hold_up(in_memory, run("motion", "content_image"), run("caption")):
        finish(StoreWriter(files, StoreMeta.read(files)))
        report = verify(Store(files))
        assert report.ok, report.damage
        assert not report.missing


def test_a_column_described_otherwise_at_the_same_moment_is_refused() -> None:
    def start() -> Files:
        files = in_memory()
        encode(files, ONE)
        return files

    mine = {"caption": replace(CAPTION, encoder="mine")}
    theirs = {"caption": replace(CAPTION, encoder="theirs")}
    refused = []

    def other(files: Files) -> None:
        try:
            add(files, theirs)
        except StoreError as err:
            refused.append(str(err))

    def run(files: Files) -> None:
        try:
            add(files, mine)
        except StoreError as err:
            refused.append(str(err))

    for files in each_hold_up(start, run, other):
        assert len(refused) == 1
        assert "was made differently: column caption: encoder is" in refused.pop()
        report = verify(Store(files))
        assert report.ok, report.damage
        assert not report.missing


def test_two_replace_a_column_at_once() -> None:
    new = replace(MOTION, config={"weights_sha256": "b" * 64})

    def start() -> Files:
        files = in_memory()
        encode(files, ONE)
        return files

    def run(files: Files, seen: StoreMeta) -> None:
        drop_column(files, seen, "motion")
        add(files, {"motion": new})

    def both(files: Any) -> None:
        run(files, StoreMeta.read(files))

    number, changes = 0, 1
    while changes > number:
        number += 1
        files = start()
        seen = StoreMeta.read(files)

        def other(files: Files = files, seen: StoreMeta = seen) -> None:
            if files.size("drop.lock") is None:  # else it would wait
                run(files, seen)

        held_up = HeldUpFiles(files, number, False, other)
        both(held_up)
        changes = held_up.changes
        require_whole(files, ONE, ["motion"])
        assert Store(files).meta.columns["motion"] == new


def test_stores_are_converted_to_one_place_at_once() -> None:
    one, two = MemoryFiles("one"), MemoryFiles("two")
    make_store(one, clips=7)
    make_store(two, clips=9)
    refused = []

    def convert(source: Files, target: Files) -> None:
        try:
            convert_store(Store(source), target, "webdataset")
        except StoreError as err:
            refused.append(str(err))

    for second in (one, two):
        for files in each_hold_up(in_memory, partial(convert, one), partial(convert, second)):
            report = verify(Store(files))
            assert report.ok, report.damage
            assert not report.missing
            assert len(refused) == (second is two)
            assert all("is of another plan" in why for why in refused)
            refused.clear()


def test_rows_that_differ_in_their_last_bits_are_those_of_the_commit() -> None:
    """Two machines make one shard at once."""

    def start() -> Files:
        files = in_memory()
        write_part(files, 0, some_plan(4, 4))
        StoreWriter.open(files, make_meta(columns={"motion": MOTION}), {BUCKET: 4})
        return files

    def write(files: Files, nudge: float) -> None:
        ids = Store(files).plan.shard_clips(BUCKET, 0)["clip_id"].to_pylist()
        rows = column_rows("motion", ids)
        nudged = [row + type(row.flat[0])(nudge) for row in rows.rows]  # type: ignore[union-attr, operator]
        writer = StoreWriter(files, StoreMeta.read(files))
        writer.write_shard(ShardKey(BUCKET, 0), ids, {"motion": replace(rows, rows=nudged)})

    for files in each_hold_up(start, lambda f: write(f, 0.0), lambda f: write(f, 0.25)):
        report = verify(Store(files))
        assert report.ok, report.damage
        assert files.size(commit_path(ShardKey(BUCKET, 0), "motion")) is not None


def test_two_corpora_are_encoded_into_one_store_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("one", "other")):
        write_video(tmp_path / name / f"{name}.mp4", 1.2, seed=seed)
    settings: dict[str, Any] = {
        "model": "reducio-random:8",
        "resolution": 32,
        "batch_size": 2,
        "workers": 1,
    }

    def encode_real(name: str, store: str = "both") -> Any:
        return encode_corpus(tmp_path / name, tmp_path / store, **settings)

    genuine, met = LocalFiles.create, list[str]()

    def create(self: LocalFiles, path: str, data: Any) -> bool:
        if path == "plan/part-00000.parquet" and not met:
            met.append(path)
            encode_real("other")
        return genuine(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "create", create)
        encode_real("one")
    assert len(met) == 1
    both = open_store(tmp_path / "both")
    report = verify(both)
    assert report.ok, report.damage
    assert not report.missing
    found = both.meta.counts["videos"]
    assert (found["found"], found["encoded"]) == (2, 2)
    rows: dict[str, bytes] = {}
    for name in ("both", "one", "other"):
        if name != "both":
            encode_real(name, f"{name}.alone")
        store = both if name == "both" else open_store(tmp_path / f"{name}.alone")
        for clip in store.plan.clips.to_pylist():
            key = ShardKey(clip["bucket"], clip["shard"])
            row = bytes(store.read_row(key, clip["row"], "motion"))  # type: ignore[arg-type]
            assert rows.setdefault(clip["clip_id"], row) == row
    assert len(rows) == both.plan.clips.num_rows
