"""Tables listed before: what is as it was is not read again, and nothing is overlooked."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reducio_latents.core.geometry import Bucket
from reducio_latents.corpus import CorpusVideo, listed, planning, readers, table
from reducio_latents.corpus.probe import ProbeRecord
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.encode.prepare import Planned, make_plan
from reducio_latents.files import LocalFiles
from reducio_latents.store.plan import edit_part

BUCKET = Bucket(16, 256, 256)
OPTIONS = EncodeOptions(shard_rows=8, columns=("motion",))
Row = dict[str, Any]
NAMES = ("path", "start", "end", "score", "note", "caption")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make blocks small, and keep each listing; return how many rows each one read."""
    monkeypatch.setattr(listed, "KEPT_FROM", 0)
    monkeypatch.setattr(readers, "BATCH_BYTES", 300)
    monkeypatch.setattr(readers, "BATCH", 8)
    monkeypatch.setattr(planning, "probe_videos", probe)
    rows, read_tables = list[int](), table.read_tables

    def spied(*args: Any) -> table.TableRows:
        found = read_tables(*args)
        rows.append(found.rows)
        return found

    monkeypatch.setattr(listed, "read_tables", spied)
    return rows


def probe(videos: Sequence[CorpusVideo], *_: object) -> Iterator[ProbeRecord]:
    for video in videos:
        yield ProbeRecord(
            width=640, height=360, rate_fps=25.0, duration_s=60.0, bytes=1, sha256=video.video
        )


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        texts = [{name: str(cell) for name, cell in row.items()} for row in rows]
        pq.write_table(pa.Table.from_pylist(texts), path, row_group_size=8)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, NAMES, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_text(text + "\n")


def clip(video: int, start: int, caption: str, score: Any = 1) -> Row:
    cells = {"path": f"{video:03d}.mp4", "start": start, "end": start + 1.2, "caption": caption}
    return cells | {"score": score, "note": "once" if video == 2 else ""}


def clips_of(videos: Sequence[int], score: Any = 1) -> list[Row]:
    return [clip(video, 3 * i, f"{video} {i}", score) for video in videos for i in range(3)]


def plan(corpus: Path, store: Path) -> tuple[Planned, dict[str, bytes]]:
    found = make_plan(corpus, LocalFiles(store), OPTIONS, [BUCKET])
    return found, {path.name: path.read_bytes() for path in sorted(store.glob("plan/*.*"))}


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_table_read_in_part_is_planned_as_one_read_whole(
    tmp_path: Path, read: list[int], ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is done to it: rows at the end, in between, other ones, fewer, of other types."""
    chance, corpus = random.Random(ending), tmp_path / "corpus"
    tables = {"b": clips_of(range(20)), "d": clips_of(range(40, 50))}
    high = clips_of([70], "high")
    edits: list[Callable[[list[Row]], object]] = [
        lambda rows: None,
        lambda rows: rows.extend([*clips_of(range(50, 54), 2.5), clip(49, 30, "a span more")]),
        lambda rows: rows.append(clip(1, 30, "of another table's video")),
        lambda rows: rows.insert(chance.randrange(len(rows)), clip(60, 1, "between")),
        lambda rows: rows[chance.randrange(len(rows))].update(caption="changed"),
        lambda rows: [rows.pop(chance.randrange(len(rows))), *map(rows.append, high)],
        lambda rows: tables.update(c=clips_of(range(80, 84))),
        lambda rows: tables.pop("b"),
    ]
    for edit in edits:
        edit(tables["d"])
        for path in corpus.glob("*"):
            path.unlink()
        for name, rows in tables.items():
            write(corpus / f"{name}{ending}", rows)
        found, bytes_of = plan(corpus, tmp_path / "a")
        with monkeypatch.context() as patch:
            patch.setattr(listed, "read_listed", None)
            (tmp_path / "b/listed/tables").unlink(missing_ok=True)
            whole, expected = plan(corpus, tmp_path / "b")
        assert bytes_of == expected
        assert (found.captions, found.gone) == (whole.captions, whole.gone)
        names = {row["path"] for row in chain(*tables.values())} | {"000.mp4"}
        assert all(found.find(name) == whole.find(name) for name in names)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_only_new_rows_are_read(tmp_path: Path, read: list[int], ending: str) -> None:
    path, rows = tmp_path / f"t{ending}", clips_of(range(40))
    write(path, rows)
    plan(path, tmp_path / "store")
    plan(path, tmp_path / "store")
    path.touch()
    plan(path, tmp_path / "store")
    assert read == [120, 0, 0]
    write(path, [*rows, *clips_of([40])])
    plan(path, tmp_path / "store")
    assert sum(read[3:]) <= 16
    write(path, [*rows, *clips_of([40]), clip(40, 20, "a span more")])
    read.clear()
    plan(path, tmp_path / "store")
    assert sum(read) <= 24


@pytest.mark.parametrize("name", ["t.json", "t.csv.gz"])
def test_a_table_that_is_only_read_whole_is_not_read_again(
    tmp_path: Path, read: list[int], name: str
) -> None:
    path, rows = tmp_path / name, clips_of(range(20))
    for count in (60, 0, 63, 0):
        if count:
            write(tmp_path / name.removesuffix(".gz"), rows)
        if count and name.endswith(".gz"):
            path.write_bytes(gzip.compress((tmp_path / "t.csv").read_bytes()))
        read.clear()
        plan(path, tmp_path / "store")
        assert read == [count]
        rows += clips_of([20]) if count == 60 else []


def test_tables_that_have_moved_are_read(tmp_path: Path, read: list[int]) -> None:
    ending = ".csv"
    write(tmp_path / f"t{ending}", clips_of(range(40)))
    plan(tmp_path / f"t{ending}", tmp_path / "store")
    write(tmp_path / f"u{ending}", clips_of([50]))
    read.clear()
    (tmp_path / "both").mkdir()
    for name in ("t", "u"):
        (tmp_path / f"{name}{ending}").rename(tmp_path / f"both/{name}{ending}")
    plan(tmp_path / "both", tmp_path / "store")
    assert read == [123]


def test_what_was_listed_is_not_believed_where_it_may_be_wrong(
    tmp_path: Path, read: list[int]
) -> None:
    path, store = tmp_path / "t.csv", tmp_path / "store"
    write(path, clips_of(range(20)))
    plan(path, store)
    kept = store / "listed/tables"
    good = kept.read_bytes()
    for damaged in (good[:-9], b"", good[:40] + b"x" + good[41:], b"x" * 99):
        kept.write_bytes(damaged)
        plan(path, store)
    table = pq.read_table(pa.BufferReader(good[32:]))
    lies: Sequence[dict[str, Any]] = (
        {"types": {"videos": {"score": "nothing"}}},
        {"types": 3},
        {"blocks": [["t.csv", [-5, 0], "", False]]},
        {"blocks": []},
        {"stamps": 3},
        {"plan": 3},
    )
    for lie in lies:
        about = json.loads(table.schema.metadata[b"reducio_latents"]) | lie
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({"reducio_latents": json.dumps(about)}), sink)
        data = sink.getvalue().to_pybytes()
        kept.write_bytes(hashlib.sha256(data).digest() + data)
        plan(path, store)
    assert (read, kept.read_bytes()) == ([60] * 11, good)
    text = path.read_text()
    path.write_text(text[:-1])  # a last line without an end
    plan(path, store)
    path.write_text(text[:-1] + "?\n")
    changed, _ = plan(path, store)
    assert list(changed.captions.values()) == [("19 2?",)]
    path.write_text(text)
    plan(path, store)
    read.clear()
    edit_part(LocalFiles(store), 0, {"part": _edited})  # as `remove` does
    plan(path, store)
    make_plan(path, LocalFiles(store), EncodeOptions(label="folder", shard_rows=8), [BUCKET])
    assert read == [60, 60]


def _edited(clips: pa.Table) -> pa.Table:
    number = clips.schema.get_field_index("captions")
    field = clips.schema.field(number)
    return clips.set_column(number, field, pa.array([["other"]] * len(clips), field.type))
