"""Tables: paths found by column name, all else carried along, every bad row named by its line."""

from __future__ import annotations

import datetime
import gzip
import json
import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.geometry import square_bucket
from reducio_latents.corpus import list_corpus
from reducio_latents.corpus.build import plan_part
from reducio_latents.corpus.probe import ProbeRecord
from reducio_latents.dataset.conditions import parse_conditions, passing
from reducio_latents.errors import ConfigError, CorpusError, VideoError
from reducio_latents.files.source import VideoSource, open_source
from reducio_latents.store.plan import Plan, PlanSpec


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_the_three_kinds_of_table_say_the_same(tmp_path: Path) -> None:
    rows = [
        {"path": "b.mp4", "caption": "a cat\tand \N{CAT FACE}", "score": 0.5, "views": 3},
        {"path": "x/a.mp4", "caption": 'two, "quoted"\nlines', "score": 1.0, "views": 12},
    ]
    quoted = [[str(v).replace('"', '""') for v in row.values()] for row in rows]
    lines = ["path,caption,score,views"]
    lines += [",".join(f'"{cell}"' for cell in row) for row in quoted]
    write(tmp_path / "t.csv", "\r\n".join(lines), "utf-8-sig")
    tabbed = ["\t".join(f'"{cell}"' for cell in row) for row in quoted]
    write(tmp_path / "t.tsv", "\n".join([lines[0].replace(",", "\t"), *tabbed, ""]))
    write(tmp_path / "t.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")

    listings = [list_corpus(tmp_path / f"t.{kind}") for kind in ("csv", "tsv", "jsonl", "parquet")]
    first = listings[0]
    assert all(listing == first for listing in listings)
    assert [video.video for video in first] == ["b.mp4", "x/a.mp4"]
    assert [video.captions[0] for video in first] == [row["caption"] for row in rows]
    assert [dict(v.extra) for v in first] == [
        {"score": 0.5, "views": 3},
        {"score": 1.0, "views": 12},
    ]
    assert first[1].source.url == str(tmp_path / "x/a.mp4")


def test_a_video_in_a_table_need_not_exist_nor_look_like_one(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "path\nnowhere.mp4\ndata.bin\n")
    assert [v.video for v in list_corpus(table)] == ["data.bin", "nowhere.mp4"]


@pytest.mark.parametrize("header", ["Path", "VIDEO", "file_name", " filepath ", "url"])
def test_the_path_column_is_found_by_name(tmp_path: Path, header: str) -> None:
    table = write(tmp_path / "t.csv", f"id,{header},Text\n7,a.mp4,hello\n")
    (video,) = list_corpus(table)
    assert (video.video, video.captions, dict(video.extra)) == ("a.mp4", ("hello",), {"id": 7})


def test_the_likeliest_of_several_names_is_taken_and_the_others_are_carried(
    tmp_path: Path,
) -> None:
    table = write(tmp_path / "t.csv", "url,path,prompt,caption\nhttp://x/y,a.mp4,p,c\n")
    (video,) = list_corpus(table)
    assert (video.video, video.captions) == ("a.mp4", ("c",))
    assert video.extra == {"url": "http://x/y", "prompt": "p"}


def test_columns_are_taken_as_given(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "path,clip,note\nx,007,n\n")
    (video,) = list_corpus(table, path_column="clip", caption_column="note")
    assert (video.video, video.captions, dict(video.extra)) == ("007", ("n",), {"path": "x"})


def test_relative_paths_are_relative_to_the_table_or_to_root(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "path\na.mp4\n/abs/b.mp4\ns3://bucket/c.mp4\n../d.mp4\n")

    def urls(**options: Any) -> dict[str, str]:
        return {v.video: v.source.url for v in list_corpus(table, **options)}

    assert urls() == {
        "a.mp4": f"{tmp_path}/a.mp4",
        "/abs/b.mp4": "/abs/b.mp4",
        "s3://bucket/c.mp4": "s3://bucket/c.mp4",
        "../d.mp4": f"{tmp_path}/../d.mp4",
    }
    assert urls(root="/videos")["a.mp4"] == "/videos/a.mp4"
    assert urls(root="s3://b/videos")["../d.mp4"] == "s3://b/d.mp4"


def test_a_remote_table_names_videos_beside_it() -> None:
    fsspec.filesystem("memory").pipe("/tables/t.csv", b"path\na.mp4\n")
    (video,) = list_corpus("memory://tables/t.csv")
    assert video.source.url == "memory://tables/a.mp4"
    fsspec.filesystem("memory").rm("/tables", recursive=True)


def test_numbers_in_csv_become_numbers_only_where_nothing_is_lost(tmp_path: Path) -> None:
    table = write(
        tmp_path / "t.csv",
        "path,count,ratio,zip,big,mixed,gap\n"
        "a.mp4,1,0.5,007,12345678901234567890,1,\n"
        "b.mp4,-2,1e3,123,1,x,4\n",
    )
    a, b = list_corpus(table)
    big = "12345678901234567890"
    assert a.extra == {"count": 1, "ratio": 0.5, "zip": "007", "big": big, "mixed": "1"}
    assert b.extra == {
        "count": -2, "ratio": 1000.0, "zip": "123", "big": "1", "mixed": "x", "gap": 4
    }  # fmt: skip


def test_a_list_of_captions_is_several_captions(tmp_path: Path) -> None:
    rows = [
        {"path": "a.mp4", "captions": ["one", "", "two"]},
        {"path": "b.mp4", "captions": "three"},
        {"path": "c.mp4", "captions": None},
        {"path": "d.mp4"},
    ]
    table = write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
    captions = [video.captions for video in list_corpus(table)]
    assert captions == [("one", "two"), ("three",), (), ()]


def test_nested_values_are_carried_as_json_and_nothing_is_not_carried(tmp_path: Path) -> None:
    row = {"path": "a.mp4", "tags": ["é", 1], "none": None, "ok": True, "nan": float("nan")}
    (video,) = list_corpus(write(tmp_path / "t.jsonl", json.dumps(row)))
    assert video.extra == {"tags": '["é", 1]', "ok": True}


def test_parquet_types_that_json_has_not_are_carried_as_text(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 2, 3, 4, 5, 6)
    table = pa.table(
        {
            "path": ["a.mp4"],
            "when": pa.array([moment.isoformat()]).cast(pa.timestamp("ns")),
            "price": pa.array([Decimal("1.50")]),
            "missing": pa.array([float("nan")]),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    (video,) = list_corpus(tmp_path / "t.parquet")
    assert video.extra.keys() == {"when", "price"}
    assert str(video.extra["when"]).startswith("2024-02-03 04:05:06")
    assert video.extra["price"] == "1.50"


def test_binary_columns_are_left_out_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"path": "a.mp4", "thumbnail": b"\xff\xd8", "n": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    with caplog.at_level(logging.WARNING):
        (video,) = list_corpus(tmp_path / "t.parquet")
    assert video.extra == {"n": 1}
    assert "thumbnail" in caplog.text


def test_equal_rows_count_once_and_different_ones_are_an_error(tmp_path: Path) -> None:
    same = write(tmp_path / "same.csv", "path,caption\na.mp4,x\nb.mp4,y\na.mp4,x\n")
    assert [video.video for video in list_corpus(same)] == ["a.mp4", "b.mp4"]
    other = write(tmp_path / "other.csv", "path,caption\na.mp4,x\nb.mp4,y\na.mp4,z\n")
    with pytest.raises(CorpusError, match=r"a\.mp4 twice, in line 2 and line 4"):
        list_corpus(other)


def test_a_column_without_a_value_is_known_and_takes_any_type_later(tmp_path: Path) -> None:
    known = ProbeRecord(width=64, height=36, rate_fps=25.0, duration_s=50.0, bytes=1)
    spec = PlanSpec(clip=ClipSpec(policy="centre"), buckets=(square_bucket(16, 256),))

    def plan(text: str, previous: Plan | None) -> Plan:
        videos = list_corpus(write(tmp_path / "t.csv", text))
        part = plan_part(videos, {v.video: known for v in videos}, spec, previous)
        return Plan.of(part) if previous is None else previous.extended(part)

    first = plan("path,score,start,end\na.mp4,,1,5\n", None)
    assert first.clip_schema.field("score").type == pa.null()
    both = plan("path,score,start,end\na.mp4,,1,5\nb.mp4,7,1,5\n", first)
    assert both.clip_columns(["score"])["score"] == pa.chunked_array([[None, 7]])
    table = pa.table({"score": first.clips["score"]})
    for value in (5, 2.5, "x", True):
        for condition in ([("score", "!=", value)], [("score", "not in", [value])]):
            assert not passing(parse_conditions(condition), table).any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", r"is empty"),
        ("t.csv", b"path,caption\n", r"has no rows"),
        ("t.csv", b"id,name\n1,x\n", r"no column of paths.* id, name.*--path-column"),
        ("t.csv", b"path,a,a\nx,1,2\n", r"two columns named 'a'"),
        ("t.csv", b"path,caption\na.mp4,one, two\n", r"line 2: 3 cells, but 2 columns"),
        ("t.csv", b"path,caption\na.mp4\n", r"line 2: 1 cells"),
        ("t.csv", b'path,caption\na.mp4,"x\nb.mp4,y\n', r"line 3: unexpected end"),
        ("t.csv", b'path,caption\na.mp4,"x" y\n', r"line 2"),
        ("t.csv", b"path,caf\xe9\na.mp4,x\n", r"not UTF-8: byte 0xe9 at"),
        ("t.csv", b"a.mp4,one\nb.mp4,two\n", r"write a first line"),
        ("t.csv", b"-2kGPr1c9Dw,10,a dog\n-2kGPr1c9Dx,20,a cat\n", r"write a first line"),
        ("t.csv.zst", b"(\xb5/\xfd", r"\.gz is read; unpack others"),
        ("t.csv", "path\na.mp4\n".encode("utf-16"), r"not UTF-8: byte 0xff at 0"),
        ("t.csv", b"path,n\n,1\n", r"line 2: path is '', not a path"),
        ("t.jsonl", b"", r"has no rows"),
        ("t.jsonl", b'{"path": "a.mp4", "n": 1, "n": 2}\n', r"two values named 'n'"),
        ("t.json", b"", r"t.json is not JSON"),
        ("t.json", b"[]", r"has no rows"),
        ("t.json", b'[{"path": "a.mp4"}, {"path": ]', r"t.json is not JSON"),
        ("t.json", b'[{"path": "a.mp4"}', r"t.json is not JSON"),
        ("t.json", b"[3]", r"row 1 is not a JSON object"),
        ("t.json", b"3", r"t.json is not a JSON object"),
        ("t.json", b'{"path": "a.mp4", "path": "b.mp4"}', r"two values named 'path'"),
        ("t.json", b'{"path": "a.mp4"', r"t.json is not JSON"),
        ("t.json", b"{}", r"has no rows"),
        ("t.json", b'{"a": 1}', r"no column of paths"),
        ("t.txt", b"caf\xe9 1", r"line 1: path is 'caf"),
        ("t.jsonl", b'{"path": "a.mp4"}\n\n{"path": \n', r"line 3 is not JSON"),
        ("t.jsonl", b'["a.mp4"]\n', r"line 1 is not a JSON object"),
        ("t.jsonl", b'{"path": "a.mp4"}\n{"paht": "b.mp4"}\n', r"line 2: path is None"),
        ("t.jsonl", b'{"path": 3}\n', r"line 1: path is 3"),
        ("t.jsonl", b'{"path": "\\ud800.mp4"}\n', r"line 1: path is"),
        ("t.jsonl", b'{"path": "a.mp4", "\\ud800": 1}\n', r"surrogate"),
        ("t.jsonl", b'{"path": "a.mp4", "caption": 5}\n', r"caption must be text, got 5"),
        ("t.jsonl", b"[" * 100_000, r"line 1 is not JSON"),
        ("t.parquet", b"PAR1 not", r"not a readable Parquet file"),
        ("t.parquet", b"", r"not a readable Parquet file"),
    ],
)
def test_a_bad_table_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        list_corpus(tmp_path / name)
    assert name in str(caught.value)


def test_a_column_that_is_not_there_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "video,text\na.mp4,x\n")
    with pytest.raises(ConfigError, match=r"path_column is 'vidoe'.* 'video'"):
        list_corpus(table, path_column="vidoe")
    with pytest.raises(ConfigError, match=r"caption_column is 'zzz'.*video, text"):
        list_corpus(table, caption_column="zzz")


def test_an_unnamed_column_is_carried_under_its_number(tmp_path: Path) -> None:
    (video,) = list_corpus(write(tmp_path / "t.csv", ",path\n0,a.mp4\n"))
    assert video.extra == {"column_1": 0}


@pytest.mark.parametrize(
    "text",
    [
        '[{"media_path": "a.mp4", "cap": "x", "n": 1},\n {"media_path": "b.mp4", "cap": "y"}]\n',
        '{"version": 1, "data": [{"content_loc": "a.mp4", "caption": "x", "n": 1}, '
        '{"content_loc": "b.mp4", "caption": "y"}]}',
        '[{"videos": ["a.mp4"], "text": "x", "n": 1}, {"videos": ["b.mp4"], "text": ["y", ""]}]',
        '[{"video": {"path": "a.mp4", "bytes": null}, "caption": "x", "n": 1}\n,'
        '{"video": {"path": "b.mp4", "bytes": null}, "caption": "y"}]',
    ],
)
def test_json_is_read_in_the_forms_that_it_is_published_in(tmp_path: Path, text: str) -> None:
    found = list_corpus(write(tmp_path / "t.json", text, "utf-8-sig"))
    assert [(v.video, v.captions, dict(v.extra)) for v in found] == [
        ("a.mp4", ("x",), {"n": 1}), ("b.mp4", ("y",), {})
    ]  # fmt: skip


def test_a_json_array_is_read_item_by_item(tmp_path: Path) -> None:
    rows = [{"path": f"{i}.mp4", "caption": "é" * (i % 7 * 1000), "n": i} for i in range(2000)]
    table = write(tmp_path / "t.json", json.dumps(rows, ensure_ascii=False, indent=1))
    assert table.stat().st_size > 4 << 20  # several pieces
    found = {v.video: (v.captions, v.extra["n"]) for v in list_corpus(table)}
    texts = [(row["caption"],) if row["caption"] else () for row in rows]
    assert found == {f"{i}.mp4": (text, i) for i, text in enumerate(texts)}


def test_several_tables_are_one_corpus(tmp_path: Path) -> None:
    for shard in range(3):
        rows = [{"path": "v.mp4", "score": shard / 2}]
        (tmp_path / f"data/{shard}").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"data/{shard}/train.parquet")
    for corpus, below in ((tmp_path, "data/"), (tmp_path / "data/*/*.parquet", "")):
        found = [(v.video, v.source.url, v.extra["score"]) for v in list_corpus(corpus)]
        assert found == [
            (f"{below}{i}/v.mp4", f"{tmp_path}/data/{i}/v.mp4", i / 2) for i in range(3)
        ]  # fmt: skip
        assert [v.address for v in list_corpus(corpus)] == [v for v, *_ in found]


def test_what_tables_write_for_no_caption_is_none(tmp_path: Path) -> None:
    for i, text in enumerate(["nan", "N/A", "NaN", "null", "None", "<NA>", " ", ""]):
        (video,) = list_corpus(write(tmp_path / f"{i}.csv", f'path,caption\na.mp4,"{text}"\n'))
        assert video.captions == (), text
    (video,) = list_corpus(write(tmp_path / "l.csv", "path,caption\na.mp4,\"['x', 'y']\"\n"))
    assert video.captions == ("x", "y")


def test_rows_without_a_file_are_counted_and_the_rest_is_listed(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "path,n\na.mp4,1\n,2\nb.mp4,3\n,4\n")
    found = list_corpus(table)
    assert [(v.video, v.extra.get("n"), v.problem) for v in found] == [
        ("a.mp4", 1, None),
        ("b.mp4", 3, None),
        ("t.csv, line 3", None, "path is '', not a path"),
        ("t.csv, line 5", None, "path is '', not a path"),
    ]


def test_captions_without_end_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"path": "a.mp4", "caption": [""] * 1_100_000}, {"path": "b.mp4", "caption": "x"}]
    table = write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
    assert [video.captions for video in list_corpus(table)] == [(), ("x",)]
    assert "1 captions are left out, larger than 1 MiB or not UTF-8" in caplog.text


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json"])
def test_a_cell_in_another_encoding_costs_itself(tmp_path: Path, name: str) -> None:
    rows = [{"path": f"{v}.mp4", "caption": f"{v} caf\xe9", "n": "\xfc"} for v in "ab"]
    rows[0]["caption"] = "fine"
    text = json.dumps(rows, ensure_ascii=False)
    if name == "t.jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    elif name == "t.csv":
        text = "path,caption,n\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    found = list_corpus(write(tmp_path / name, text, "latin-1"))
    captions = [(v.video, v.captions, v.extra["n"]) for v in found]
    assert captions == [("a.mp4", ("fine",), "\\udcfc"), ("b.mp4", (), "\\udcfc")]


@pytest.mark.parametrize("mark", [";", "|", "\t", ","])
def test_columns_are_parted_as_the_first_line_parts_them(tmp_path: Path, mark: str) -> None:
    lines = (["path", "caption", "n"], ["a.mp4", '"x, y; z"', "1"])
    table = write(tmp_path / "t.csv", "\n".join(map(mark.join, lines)))
    (video,) = list_corpus(table)
    assert (video.video, video.captions, video.extra) == ("a.mp4", ("x, y; z",), {"n": 1})


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json"])
def test_a_packed_table_is_what_it_packs(tmp_path: Path, name: str) -> None:
    rows = [{"path": f"{n}.mp4", "caption": f"{n}", "n": n} for n in range(500)]
    text = json.dumps(rows)
    if name == "t.jsonl":
        text = "\n".join(map(json.dumps, rows))
    elif name == "t.csv":  # from a quote on it is Python that reads, from where that was
        text = "path,caption,n\n" + "".join(f"{n}.mp4,{n},{n}\n" for n in range(500))
        text += '501.mp4,a"b,1\n'
    plain = list_corpus(write(tmp_path / name, text))
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert [(v.video, v.captions, dict(v.extra)) for v in list_corpus(packed)] == [
        (v.video, v.captions, dict(v.extra)) for v in plain
    ]
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(CorpusError, match=r"t\.\w+\.gz"):
        list_corpus(packed)


def test_numbers_are_ids_too(tmp_path: Path) -> None:
    (tmp_path / "7.mp4").touch()
    pq.write_table(pa.table({"video_id": [7]}), tmp_path / "t.parquet")
    write(tmp_path / "t.jsonl", '{"video_id": 7}')
    write(tmp_path / "t.json", '{"7": {"start": 1, "end": 3}}')
    for table in ("t.parquet", "t.jsonl", "t.json"):
        assert [video.video for video in list_corpus(tmp_path / table)] == ["7.mp4"]


def test_values_of_many_rows_are_what_they_were(tmp_path: Path) -> None:
    lines = [f"{i}.mp4,{i},{'' if i % 3 else i / 4},x{i}" for i in range(40_000)]
    table = write(tmp_path / "t.csv", "\n".join(["path,n,score,late", *lines, "z.mp4,7,text,"]))
    found = {video.video: dict(video.extra) for video in list_corpus(table)[::997]}
    for name, extra in found.items():
        number = int(name.removesuffix(".mp4"))
        score = {} if number % 3 else {"score": str(number / 4)}
        assert extra == {"n": number, **score, "late": f"x{number}"}


def test_videos_in_the_rows_of_a_parquet_file_are_read_there(tmp_path: Path) -> None:
    """As `datasets` writes its feature Video, and as one column of bytes."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    contents = [f"video {i}".encode() * 1000 for i in range(7)]
    cells = [{"bytes": c, "path": f"x/{i % 5}.mp4"} for i, c in enumerate(contents)]
    texts = [f"caption {i}" for i in range(7)]
    (tmp_path / "data").mkdir()
    table = pa.table({"video": pa.array(cells, kind), "caption": texts})
    pq.write_table(table, tmp_path / "data/train-0.parquet", row_group_size=3)
    names = [f"data/train-0.parquet/{i}{'.mp4' if i < 5 else ''}" for i in range(7)]
    found = {video.video: video for video in list_corpus(tmp_path)}
    assert sorted(found) == sorted(names)
    for name, content, text in zip(names, contents, texts, strict=True):
        video = found[name]
        assert open_source(video.source).read() == content
        assert (video.captions, video.address) == ((text,), "data/train-0.parquet")
    pq.write_table(pa.table({"mp4": contents}), tmp_path / "bare.parquet")
    assert [
        open_source(v.source).read() for v in list_corpus(tmp_path / "bare.parquet")
    ] == contents
    empty = pa.array([{"bytes": None, "path": "a.mp4"}], kind)
    pq.write_table(pa.table({"video": empty}), tmp_path / "paths.parquet")
    assert [v.source.url for v in list_corpus(tmp_path / "paths.parquet")] == [f"{tmp_path}/a.mp4"]
    with pytest.raises(VideoError, match=r"bare\.parquet@9: the row holds no video"):
        open_source(VideoSource(str(tmp_path / "bare.parquet"), 9))
    pq.write_table(pa.table([["a"], ["x"], ["y"]], ["path", "n", "n"]), tmp_path / "n.parquet")
    with pytest.raises(CorpusError, match=r"two columns named 'n'. Rename one.$"):
        list_corpus(tmp_path / "n.parquet")
    (tmp_path / "bare.parquet").write_bytes(b"PAR1")
    with pytest.raises(VideoError, match=r"bare\.parquet@0: the row cannot be read"):
        open_source(VideoSource(str(tmp_path / "bare.parquet"), 0))
