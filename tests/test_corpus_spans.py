"""Clip lists as they are published: each clip lies in its span, with that span's caption."""

from __future__ import annotations

import ast
import csv
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reducio_latents.core.clips import ClipSpec, TimeSpan
from reducio_latents.core.geometry import square_bucket
from reducio_latents.corpus import CorpusVideo, list_corpus, planning, readers
from reducio_latents.corpus.build import plan_part
from reducio_latents.corpus.probe import ProbeRecord, Probing
from reducio_latents.corpus.rows import ENTRY
from reducio_latents.corpus.shots import VideoShots
from reducio_latents.corpus.spans import Times, as_list, as_time
from reducio_latents.errors import ConfigError, CorpusError
from reducio_latents.store.plan import Plan, PlanSpec

SPEC = PlanSpec(clip=ClipSpec(policy="centre"), buckets=(square_bucket(16, 256),))
A, B = "-2kGPr1c9Dw", "AbCdEfGhIjK"
PANDA = "videoID,url,timestamp,caption,matching_score,desirable_filtering,shot_boundary_detection"


def planned(corpus: Path | str, duration_s: float = 200.0, **options: Any) -> Plan:
    """Plan a corpus of videos that last 200 s at 25 fps, whatever is there."""
    videos = list_corpus(corpus, **options)
    known = ProbeRecord(
        width=640, height=360, rate_fps=25.0, duration_s=duration_s, frames=5000, bytes=1
    )
    return Plan.of(plan_part(videos, {v.video: known for v in videos}, SPEC))


def clips(plan: Plan, *columns: str) -> list[tuple[Any, ...]]:
    """Return of each clip: video, span, caption, and what the corpus carried."""
    rows = plan.clips.to_pylist()
    for row in rows:
        start_s, end_s = row["span_start_s"], row["span_end_s"]
        assert start_s <= row["start_s"] <= row["start_s"] + 15 / 16 < end_s
    names = ("video", "span_start_s", "span_end_s", "captions", *columns)
    found = [tuple(row[name] for name in names) for row in rows]
    return [
        (video, pytest.approx(start_s), pytest.approx(end_s), *(captions or [None]), *rest)
        for video, start_s, end_s, captions, *rest in found
    ]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as the kind of table that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue())
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_panda_70m(tmp_path: Path) -> None:
    row = {
        "videoID": A,
        "url": f"https://www.youtube.com/watch?v={A}",
        "timestamp": "[['0:00:20.880', '0:00:23.983'], ['0:01:00.000', '0:01:04.000']]",
        "caption": """['A "neuron" is shown.', "It's a heart, isn't it?"]""",
        "matching_score": "[0.4514, 0.375]",
        "desirable_filtering": "['desirable', '0_low_desirable_score']",
        "shot_boundary_detection": "[[['0:00:00.000', '0:00:03.103']], [['0:00:00.000', "
        "'0:00:01.000'], ['0:00:01.000', '0:00:04.000']]]",
    }
    touch(tmp_path, f"videos/00/{A}.mp4")
    table = write(tmp_path / "panda70m.csv", [row])
    wanted = [
        (f"00/{A}.mp4", 20.88, 23.983, 'A "neuron" is shown.', 0.4514, "desirable"),
        (f"00/{A}.mp4", 60, 64, "It's a heart, isn't it?", 0.375, "0_low_desirable_score"),
    ]
    plan = planned(table, root=tmp_path / "videos")
    assert clips(plan, "matching_score", "desirable_filtering") == wanted
    assert plan.clips["shot_boundary_detection"][0].as_py() == '[["0:00:00.000", "0:00:03.103"]]'
    older = {name: row[name] for name in list(row)[:5]}  # its first files
    plan = planned(write(tmp_path / "older.csv", [older]), root=tmp_path / "videos")
    assert clips(plan, "matching_score") == [row[:5] for row in wanted]


def test_openvid_1m(tmp_path: Path) -> None:
    table = write(
        tmp_path / "OpenVid-1M.csv",
        [
            {
                "video": "celebv_abc_0.mp4", "caption": "A woman, smiling.",
                "aesthetic score": 5.2, "motion score": 3.5, "temporal consistency score": 0.99,
                "camera motion": "static", "frame": 115, "fps": 29.97, "seconds": 3.8,
            }
        ],
    )  # fmt: skip
    (clip,) = planned(table).clips.to_pylist()
    assert (clip["video"], clip["captions"]) == ("celebv_abc_0.mp4", ["A woman, smiling."])
    assert (clip["aesthetic score"], clip["motion score"], clip["frame"]) == (5.2, 3.5, 115)
    assert "span_start_s" not in clip


def test_koala_36m(tmp_path: Path) -> None:
    touch(tmp_path, f"{A}.webm")
    rows = [
        {
            "videoID": f"{A}_{i}", "url": f"https://www.youtube.com/watch?v={A}",
            "timestamp": f"['0:00:{10 * i:02d}.000', '0:00:{10 * i + 5:02d}.500']",
            "caption": f"clip {i}", "clarity score": 0.9, "aesthetic score": 4 + i / 2,
        }
        for i in (3, 1)
    ]  # fmt: skip
    plan = planned(write(tmp_path / "Koala_36M.csv", rows))
    assert clips(plan, "aesthetic score") == [
        (f"{A}.webm", 10, 15.5, "clip 1", 4.5), (f"{A}.webm", 30, 35.5, "clip 3", 5.5)
    ]  # fmt: skip


def test_internvid(tmp_path: Path) -> None:
    touch(tmp_path, f"{A}.mp4", f"{B}.mkv")
    rows = [
        {
            "YoutubeID": name, "Start_timestamp": start, "End_timestamp": end,
            "Caption": f"seen at {start}", "UMT_Score": 0.41, "Aesthetic_Score": 4.9,
        }
        for name, start, end in [
            (A, "00:00:01.000", "00:00:05.250"), (B, "00:00:00.000", "00:00:02.000"),
            (A, "00:01:01.000", "00:01:05.250"), ("no-such-one", "00:00:00.000", "00:00:02.000"),
        ]
    ]  # fmt: skip
    plan = planned(write(tmp_path / "InternVid-10M.jsonl", rows))
    assert clips(plan, "UMT_Score") == [
        (f"{A}.mp4", 1, 5.25, "seen at 00:00:01.000", 0.41),
        (f"{A}.mp4", 61, 65.25, "seen at 00:01:01.000", 0.41),
        (f"{B}.mkv", 0, 2, "seen at 00:00:00.000", 0.41),
    ]
    assert Counter(plan.videos["status"].to_pylist()) == {"planned": 2, "failed": 1}
    assert plan.videos["reason"].to_pylist()[-1].startswith("no video file of this name lies in")


def test_hd_vila(tmp_path: Path) -> None:
    touch(tmp_path, f"{A}.mp4")
    spans = [["00:00:00.000", "00:00:02.000"], ["00:00:02.000", "00:00:12.000"]]
    row = {
        "video_id": A,
        "url": f"https://www.youtube.com/watch?v={A}",
        "clip": [{"clip_id": f"{A}.{i}.mp4", "span": span} for i, span in enumerate(spans)],
    }
    plan = planned(write(tmp_path / "hdvila100m.jsonl", [row]))
    assert clips(plan, "corpus_clip_id") == [
        (f"{A}.mp4", 0, 2, None, f"{A}.0.mp4"), (f"{A}.mp4", 2, 12, None, f"{A}.1.mp4")
    ]  # fmt: skip


def test_video2dataset(tmp_path: Path) -> None:
    """Of videos that it did not cut, in tars and in folders; its cuts are in frames of theirs."""
    whole = {"key": "a", "clips": [["00:00:01.000", "00:00:03.000"], [5.0, 9.5]], "status": "x"}
    cuts = {"original_fps": 50.0, "cuts_original_fps": [[0, 100], [100, 250]]}
    # A clip that it cut says where it was cut: that is no span of the clip.
    handed_on = {"clips": [["00:10:00.000", "00:13:20.200"]], "caption": "whole"}
    sides = {"a": whole, "b.v2": {"cuts": cuts, "caption": ["one", "two"]}, "c": handed_on}
    wanted = [
        ("a.mp4", 1, 3, "said of a"), ("a.mp4", 5, 9.5, "said of a"),
        ("b.v2.mp4", 0, 2, "one"), ("b.v2.mp4", 2, 5, "two"), ("c.mp4", 0, 200, "whole"),
    ]  # fmt: skip
    folder, shard = tmp_path / "00000", tmp_path / "tars/00000.tar"
    folder.mkdir()
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        for key, side in sides.items():
            (folder / f"{key}.mp4").write_bytes(b"x")
            (folder / f"{key}.json").write_text(json.dumps(side))
        (folder / "a.txt").write_text("said of a")
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    assert clips(planned(folder)) == wanted
    in_tar = [(f"00000.tar/{video}", *rest) for video, *rest in wanted]
    assert clips(planned(tmp_path / "tars")) == in_tar


def test_curator(tmp_path: Path) -> None:
    meta = {
        "span_uuid": "0f3e", "source_video": "/raw/a.mp4", "duration_span": [10.0, 30.0],
        "clip_location": "/out/clips/0f3e.mp4", "width_source": 1280, "framerate_source": 25.0,
        "motion_score": {"global_mean": 0.5, "per_patch_min_256": 0.1}, "aesthetic_score": 4.5,
        "windows": [
            {"start_frame": 0, "end_frame": 250, "qwen_caption": "a dog"},
            {"start_frame": 250, "end_frame": 500, "qwen_caption": "the dog sleeps"},
        ],
    }  # fmt: skip
    other = {**meta, "span_uuid": "1a2b", "duration_span": [30.0, 42.0], "windows": []}
    for one in (meta, other):
        path = tmp_path / "metas/v0" / f"{one['span_uuid']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(one))
    wanted = [
        ("/raw/a.mp4", 10, 20, "a dog", 4.5, "0f3e"),
        ("/raw/a.mp4", 20, 30, "the dog sleeps", 4.5, "0f3e"),
        ("/raw/a.mp4", 30, 42, None, 4.5, "1a2b"),
    ]
    for corpus in (tmp_path, tmp_path / "metas/v0/*.json"):
        assert clips(planned(corpus), "aesthetic_score", "span_uuid") == wanted


def test_clips_that_curator_has_cut_have_what_its_metas_say(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In its own folder, times are of the clip, and neither previews nor rejects are clips."""
    meta = {
        "span_uuid": "0f3e", "source_video": "/raw/a.mp4", "duration_span": [10.0, 210.0],
        "clip_location": "/out/clips/0f/0f3e.mp4", "aesthetic_score": 4.5, "valid": True,
        "windows": [
            {"start_frame": 0, "end_frame": 250, "qwen_caption": "a dog"},
            {"start_frame": 250, "end_frame": 500, "qwen_caption": "the dog sleeps"},
        ],
    }  # fmt: skip
    metas = [meta, {**meta, "clip_location": "/out/clips/1a/1a2b.mp4", "windows": []}]
    metas.append({**meta, "clip_location": "/out/filtered_clips/77/77cc.mp4", "valid": False})
    for one in metas:
        path = tmp_path / "metas/v0" / f"{Path(str(one['clip_location'])).stem}.json"
        write(path, [one])
        path.write_text(json.dumps(one))
    files = ["clips/0f/0f3e.mp4", "clips/1a/1a2b.mp4", "filtered_clips/77/77cc.mp4"]
    touch(tmp_path, *files, "previews/0f3e_0_250.webp", "ce1_embd/0f3e.pickle")
    write(tmp_path / "processed_videos/a.mp4.json", [{"video": "/raw/a.mp4", "clips": ["0f3e"]}])
    pq.write_table(pa.table({"id": ["0f3e"], "embedding": [[1.0]]}), tmp_path / "embd.parquet")
    plan = planned(tmp_path)
    assert clips(plan, "aesthetic_score")[:2] == [
        ("clips/0f/0f3e.mp4", 0, 10, "a dog", 4.5),
        ("clips/0f/0f3e.mp4", 10, 20, "the dog sleeps", 4.5),
    ]
    assert plan.clips["aesthetic_score"].to_pylist() == [4.5] * 3
    assert plan.videos["video"].to_pylist() == files[:2]
    assert "2 files in filtered_clips and previews are left out" in caplog.text
    assert (
        "1 tables lie among the videos, name none of them and are not read: embd.p" in caplog.text
    )


def test_what_tools_write_beside_a_folder_of_videos_is_theirs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Texts in a folder of their own; a table that names the files, as `videofolder` has it."""
    touch(tmp_path, "videos/a.mp4", "videos/b.mp4", "videos/c.mp4", "x/d.mp4", "y/d.mp4")
    for name, text in {
        "captions/a.txt": "said of a", "captions/d.txt": "of which?", "labels/b.txt": "0 0.5 0.5",
        "metas/b.json": '{"caption": "said of b", "score": 7}',
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    rows = [
        {"file_name": "videos/b.mp4", "start": 1, "end": 3, "text": "first"},
        {"file_name": "/elsewhere/b.mp4", "start": 5, "end": 9, "text": "then"},
        {"file_name": "videos/gone.mp4", "start": 5, "end": 9, "text": "nowhere"},
    ]
    write(tmp_path / "metadata.csv", rows[:1])
    found = {video.video: video for video in list_corpus(tmp_path)}
    assert not caplog.text
    assert [found[f"videos/{v}.mp4"].captions for v in "abc"] == [
        ("said of a",),
        ("said of b",),
        (),
    ]
    assert [span.captions for span in found["videos/b.mp4"].spans] == [("first",)]
    assert (found["x/d.mp4"].captions, found["y/d.mp4"].captions) == ((), ())
    write(tmp_path / "more.jsonl", rows[1:])
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    found = {video.video: video for video in list_corpus(tmp_path)}
    assert sorted(span.start for span in found["videos/b.mp4"].spans) == [1, 5]
    assert "1 videos of metadata.csv; more.jsonl are not in the folder" in caplog.text
    assert "1 tables lie among the videos, name none of them and are not read: notes" in caplog.text
    for name, text in (("one", "x"), ("two", "y")):
        write(tmp_path / f"{name}.json", [{"path": "videos/c.mp4", "caption": text}])
    assert [v.captions for v in list_corpus(tmp_path) if v.video == "videos/c.mp4"] == [()]
    assert "names videos/c.mp4 twice" in caplog.text
    caplog.clear()
    assert len(list_corpus(tmp_path / "videos/*.mp4")) == 3
    assert not caplog.text


FORMS: dict[str, dict[str, Any]] = {
    "seconds": {"start": 1.5, "end": 4},
    "texts": {"Start Time": "00:01.500", "End Time": "0:00:04"},
    "comma": {"begin_time": "00:00:01,500", "end_time": "00:00:04,000"},
    "one word": {"tstart": "1.5", "tend": "4s"},
    "milliseconds": {"start_ms": 1500, "end_ms": 4000},
    "frames": {"start_frame": 37.5, "end_frame": 100},
    "seconds before frames": {"start_frame": 1, "end_frame": 2, "startSec": 1.5, "endSec": 4.0},
    "of a clip": {"clip_start": 1.5, "clip_end": 4},
    "a pair": {"duration_span": [1.5, 4]},
    "a pair as text": {"timestamps": "0:00:01.500 - 0:00:04.000"},
    "a mapping": {"segment": {"begin": 1.5, "end": 4}},
    "a list of one": {"spans": [["0:00:01.5", "0:00:04"]]},
    "two lists": {"starts": [1.5], "ends": [4.0]},
    "nested": {"segments": [{"timestamp": [1.5, 4.0]}]},
    "frame spans": {"frame_span": [37.5, 100]},
    "of another corpus": {"video_start_sec": 1.5, "video_end_sec": 4},
    "a start and a length": {"start": 1.5, "duration": 2.5},
    "both in milliseconds": {"start_ms": 1500, "clip_duration_ms": 2500},
    "a transcript": {"segments": [{"start": "0:01.5", "duration": 2.5}]},
}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "json"])
def test_every_form_of_times_in_every_kind_of_table(tmp_path: Path, kind: str) -> None:
    for name, cells in FORMS.items():
        table = write(tmp_path / f"{name}.{kind}", [{"path": "a.mp4", "cap": "c", **cells}])
        assert clips(planned(table)) == [("a.mp4", 1.5, 4, "c")], name


TWO = {
    "one list beside another": {
        "info": {"year": "2016"},
        "videos": [
            {"video_id": A, "url": "https://x.org/", "start time": 1, "end time": 9, "id": 0},
            {"video_id": B, "url": "https://x.org/", "start time": 2, "end time": 5, "id": 1},
        ],
        "sentences": [
            {"caption": text, "video_id": name, "sen_id": i}
            for i, (text, name) in enumerate([("a car", A), ("a dog", B), ("a red car", A)])
        ],
    },
    "an object by name in an object": {
        "version": "1.3", "taxonomy": [{"nodeName": "x", "nodeId": 1}],
        "database": {
            A: {"duration": 82.7, "annotations": [{"segment": [1, 9], "sentence": "a car"}]},
            B: {"duration": 50, "annotations": [{"segment": [2, 5], "sentence": "a dog"}]},
        },
    },
    "nothing but that": {
        "database": {
            A: {"annotations": [{"segment": [1, 9], "sentence": "a car"}]},
            B: {"annotations": [{"segment": [2, 5], "sentence": "a dog"}]},
        },
    },
    "an object by name": {
        A: {"duration": 82.7, "timestamps": [[1, 9]], "sentences": ["a car"]},
        B: {"duration": 50, "timestamps": [[2, 5]], "sentences": ["a dog"]},
    },
    "lists of starts and ends": {
        A: {"start": [1], "end": [9], "text": ["a car"]},
        B: {"start": [2], "end": [5], "text": ["a dog"]},
    },
}  # fmt: skip
"""As MSR-VTT, ActivityNet, YouCook2, ActivityNet Captions and HowTo100M are published."""


@pytest.mark.parametrize("form", TWO)
def test_an_object_of_rows_is_read_whatever_is_around_them(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, f"{A}.mp4", f"{B}.mp4")
    table = tmp_path / "t.json"
    table.write_text(json.dumps(TWO[form]))
    wanted = [(f"{A}.mp4", 1, 9, "a car"), (f"{B}.mp4", 2, 5, "a dog")]
    plan = planned(table)
    assert [clip[:4] for clip in clips(plan)] == wanted
    both = ["a car", "a red car"] if form == "one list beside another" else ["a car"]
    assert plan.clips["captions"][0].as_py() == both
    monkeypatch.setattr(readers, "PIECE", 7)
    assert planned(table).clips == plan.clips
    monkeypatch.setattr(readers, "MAX_ROW", 70)  # too large to be looked at as a whole
    if form in ("an object by name", "lists of starts and ends"):
        assert clips(planned(table)) == wanted
    else:
        with pytest.raises(CorpusError, match=r"a row(.*)a line, as \.jsonl|one row a line"):
            list_corpus(table)


def test_lists_that_do_not_go_together_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    videos, table = [{"video_id": A}, {"video_id": B}], tmp_path / "t.json"
    for others in ([{"image": A, "text": "x"}], [{"video_id": A}, {"no": 1}]):
        table.write_text(json.dumps({"videos": [*videos, *videos], "others": others}))
        with pytest.raises(CorpusError, match="holds 'videos', 'others', and it is not clear"):
            list_corpus(table)
    others = [{"video_id": "gone", "text": "x"}, {"video_id": A, "text": "y"}]
    touch(tmp_path, f"{A}.mp4", f"{B}.mp4")
    table.write_text(json.dumps({"videos": videos, "others": others}))
    assert [video.captions for video in list_corpus(table)] == [("y",), ()]
    assert "says something of 1 videos that it does not list" in caplog.text


def test_missing_ends_are_those_of_the_video(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("path,start,end\na.mp4,1.5,\nb.mp4,,nan\nc.mp4,None,2\n")
    assert clips(planned(table)) == [
        ("a.mp4", 1.5, 200, None), ("b.mp4", 0, 200, None), ("c.mp4", 0, 2, None)
    ]  # fmt: skip
    lengths = {name: pa.array([1_500, 4_000], pa.duration("ms")) for name in ("start", "end")}
    times = {name: column.slice(i, 1) for i, (name, column) in enumerate(lengths.items())}
    pq.write_table(pa.table({"path": ["a.mp4"], **times}), tmp_path / "t.parquet")
    assert clips(planned(tmp_path / "t.parquet")) == [("a.mp4", 1.5, 4, None)]


@pytest.mark.parametrize("shots", ["", "s"])
def test_spans_that_are_listed_later_become_clips_of_their_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, shots: str
) -> None:
    """No matter whether the first ones were cut at shots; what is too short does not come again."""
    found = VideoShots("s", (TimeSpan(0.0, 30.0), TimeSpan(30.0, 200.0))) if shots else None
    record = ProbeRecord(
        width=640, height=360, rate_fps=25.0, duration_s=200.0, sha256="5", bytes=1, shots=found
    )
    spec, probed = replace(SPEC, shots=shots), list[str]()

    def probe(videos: Sequence[CorpusVideo], *_: object) -> Iterator[ProbeRecord]:
        probed.extend(video.video for video in videos)
        return (replace(record, sha256=video.video) for video in videos)

    monkeypatch.setattr(planning, "probe_videos", probe)

    def plan(table: Path, previous: Plan | None) -> planning.NewPlan:
        probing = Probing(backend="none", workers=1, timeout_s=1.0)
        return planning.plan_listed(list_corpus(table), spec, previous, probing)

    rows = [
        {"path": "a.mp4", "start": 0, "end": 2, "caption": "one"},
        {"path": "a.mp4", "start": 25, "end": 35, "caption": "two"},
        {"path": "b.mp4", "start": 1, "end": 3, "caption": "three"},
    ]
    first = plan(write(tmp_path / "t.csv", rows), None).plan
    rows[0]["caption"] = "other"
    rows += [
        {"path": "a.mp4", "start": 0, "end": 3, "caption": "four"},
        {"path": "a.mp4", "start": 50, "end": 50.5, "caption": "short"},
        {"path": "b.mp4", "start": 50, "end": 60, "caption": "five"},
        {"path": "c.mp4", "start": 5, "end": 6, "caption": "six"},
    ]
    new = plan(write(tmp_path / "t.csv", rows), first)
    assert probed == ["a.mp4", "b.mp4", "c.mp4"]
    old = first.clips.to_pylist()
    assert [len(part.clips) for part in new.parts] == [3]
    table = new.plan.clips.to_pylist()
    assert table[: len(old)] == old
    assert [row["captions"] for row in table[len(old) :]] == [["four"], ["five"], ["six"]]
    assert len({row["clip_id"] for row in table}) == len(table)
    assert new.captions == {old[0]["clip_id"]: ("other",)}
    videos = {row["video"]: row for row in new.plan.videos.to_pylist()}
    assert [videos[f"{v}.mp4"]["clips"] for v in "abc"] == [len(old), 2, 1]
    assert [videos[f"{v}.mp4"]["spans"] for v in "abc"] == [4, 2, 1]
    assert len(new.plan.own_clips(["a.mp4"])) == len(old)
    assert new.plan.counts().spans["found"] == 7
    caplog.clear()
    again = plan(tmp_path / "t.csv", new.plan)
    assert (len(again.parts), again.gone, caplog.text) == (0, (), "")
    last = plan(write(tmp_path / "t.csv", rows[:1] + rows[2:]), new.plan)
    assert (len(last.parts), probed) == (0, ["a.mp4", "b.mp4", "c.mp4"])
    assert "lie in spans that the corpus does not list any more" in caplog.text


def test_columns_are_taken_as_given(tmp_path: Path) -> None:
    row = {"path": "a.mp4", "a": 1, "b": 3, "c": "[[4, 6], [8, 10]]", "start": 0, "end": 9}
    table = write(tmp_path / "t.csv", [row])
    assert clips(planned(table, start_column="a", end_column="b")) == [("a.mp4", 1, 3, None)]
    assert clips(planned(table, start_column="c")) == [
        ("a.mp4", 4, 6, None), ("a.mp4", 8, 10, None)
    ]  # fmt: skip
    assert clips(planned(table, start_column="b")) == [("a.mp4", 3, 200, None)]
    assert "span_start_s" not in planned(table, start_column="none").clips.schema.names
    with pytest.raises(ConfigError, match=r"start_column is 'stat'.* 'start'"):
        list_corpus(table, start_column="stat", end_column="end")
    with pytest.raises(ConfigError, match="without start_column"):
        list_corpus(table, end_column="end")


@pytest.mark.parametrize(
    "cells",
    [
        {"speech_begin": 1, "speech_end": 2}, {"start_time": "0:00:01"}, {"end": 3.5},
        {"scene_boundaries": [[0, 2], [2, 5]]}, {"t_first": 3, "t_last": 9},
        {"word_spans": [[0.1, 0.5]]}, {"start": "here", "end": "there"},
    ],
)  # fmt: skip
def test_columns_that_look_like_times_and_are_not_used_are_an_error(
    tmp_path: Path, cells: dict[str, Any]
) -> None:
    table = write(tmp_path / "t.jsonl", [{"path": "a.mp4", **cells}])
    with pytest.raises(CorpusError, match=f"{next(iter(cells))}.* look like times") as caught:
        list_corpus(table)
    assert "\n" not in str(caught.value)
    assert len(list_corpus(table, start_column="none")) == 1


@pytest.mark.parametrize(
    "cells",
    [
        {"duration": "0:03:20", "fps": 25, "num_frames": 100, "resolution": [720, 1280]},
        {"timestamp": 1690000000, "end_reason": "cut", "shot_type": "wide", "clip": "x.mp4"},
        {"clip_score": 0.3, "start_date": "2020-01-02", "scene": 3, "in_stock": 1, "size": [1, 2]},
    ],
)
def test_columns_of_other_things_are_carried(tmp_path: Path, cells: dict[str, Any]) -> None:
    (video,) = list_corpus(write(tmp_path / "t.jsonl", [{"path": "a.mp4", **cells}]))
    assert video.extra.keys() == cells.keys()
    assert not video.spans


def test_bad_spans_cost_themselves_and_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"path": "a.mp4", "start": start, "end": end, "caption": "x"}
        for start, end in [
            (1, 3), (3, 1), ("soon", 4), (-1, 4), (500, 510), (198, 230), (5, 5.2), ("1:99:99", 3),
            (2, 6), (3, "inf"),
        ]
    ]  # fmt: skip
    plan = planned(write(tmp_path / "t.jsonl", rows))
    assert [clip[1:3] for clip in clips(plan)] == [(1, 3), (2, 6), (198, 200)]
    assert plan.counts().spans == {
        "found": 10,
        "a span ends before it begins": 1,
        "a span begins after the video's end": 1,
        "a span's start or end is no time": 4,
        "shorter than a clip of 16 frames at 16 fps": 1,
    }


def test_rows_of_lists_that_do_not_fit_cost_their_row(tmp_path: Path) -> None:
    million = repr(["a caption"] * 1_000_000)
    rows = [
        {"path": "a.mp4", "timestamp": "[[0, 2], [3, 5]]", "caption": "['one', 'two']"},
        {"path": "b.mp4", "timestamp": "[[0, 2], [3, 5]]", "caption": "['only one']"},
        {"path": "c.mp4", "timestamp": "[[0, 2], [3, 5]]", "caption": million},
        {"path": "d.mp4", "timestamp": "[[0, 2], [3, 5, 7]]", "caption": "of both"},
        {"path": "e.mp4", "timestamp": "[" * 100_000 + "]" * 100_000, "caption": "x"},
        {"path": "f.mp4", "timestamp": "[]", "caption": "x"},
        {"path": "", "timestamp": "[[0, 2]]", "caption": "x"},
    ]
    plan = planned(write(tmp_path / "t.csv", rows))
    assert clips(plan) == [
        ("a.mp4", 0, 2, "one"), ("a.mp4", 3, 5, "two"), ("d.mp4", 0, 2, "of both")
    ]  # fmt: skip
    by_status = Counter(plan.videos["status"].to_pylist())
    assert by_status == {"planned": 2, "too_short": 4, "failed": 1}
    reasons = dict(zip(*(plan.videos[n].to_pylist() for n in ("video", "reason")), strict=True))
    assert "other numbers of starts, ends and captions" in reasons["b.mp4"]
    assert "larger than 1 MiB" in reasons["c.mp4"]
    assert "no start and end" in reasons["e.mp4"]
    assert "lists no span" in reasons["f.mp4"]
    assert reasons["t.csv, line 8"] == "path is '', not a path"


def test_rows_of_one_span_are_one_clip_with_all_captions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"video_id": "video7", "start time": 1.0, "end time": 4.0, "caption": text, "sen_id": i}
        for i, text in enumerate(["a cat", "a cat", "one cat"])
    ]
    touch(tmp_path, "video7.mp4")
    (clip,) = planned(write(tmp_path / "msrvtt.json", rows)).clips.to_pylist()
    assert (clip["captions"], clip["sen_id"]) == (["a cat", "one cat"], 0)
    assert "2 rows repeat a span" in caplog.text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:01:20.880", 80.88), ("01:20", 80), ("100:00:00", 360_000), ("12.5", 12.5), (3, 3),
        (" 7s ", 7), ("1e2", 100), (True, None), ("-1", None), ("1:60", None), ("", None),
        (float("nan"), None), (float("inf"), None), ("1:2:3:4", None),
        ("\N{ARABIC-INDIC DIGIT ONE}", None),
    ],
)  # fmt: skip
def test_a_time_is_a_number_or_a_clock(text: Any, seconds: float | None) -> None:
    assert as_time(text) == seconds


def test_a_literal_is_read_within_bounds() -> None:
    values: list[Any] = [["it's", 1.5, None, True], {"a": (1, 2)}, (1, [2])]
    for value in values:
        assert as_list(repr(value)) == json.loads(json.dumps(value))
        assert as_list(json.dumps(value)) == json.loads(json.dumps(value))
    for text in ("[open('x')]", "[__import__('os')]", "[1, {2, 3}]", "[b'x']", "[1", "[1j]", "no"):
        assert as_list(text) == text
    deep = "[" * 150 + "]" * 150
    assert ast.literal_eval(deep)
    assert as_list(deep) == deep
    with pytest.raises(CorpusError, match="larger than 1 MiB"):
        as_list(f"[{'1,' * 600_000}]")


CELLS: dict[str, st.SearchStrategy[Any]] = {
    "path": st.sampled_from(["a.mp4", "b.mp4", "c/d.mp4", "e", "", None]),
    "time": st.one_of(
        st.floats(0, 99).map(lambda x: round(x, 3)),
        st.sampled_from(
            ["0:00:07.5", "1:02:03", "2:61", "0:99", "5s", " 7 ", "1e1", "", "nan", "None", "soon",
             "-1", "1:02:03,5", 3, 10**13, None, "[1, 2]"]
        ),
    ),
    "caption": st.sampled_from(
        ["a cat", "it's a \"dog\", or", "nan", " N/A ", "['x', 'y']", "[Music]", "(x)", "a\nb",
         "\u3000", "\x1f", "", None]
    ),
    "value": st.sampled_from(["1", "2.5", "007", "x", "", "1e3", None]),
}  # fmt: skip
PAIRS = st.one_of(
    st.lists(st.floats(0, 99).map(lambda x: round(x, 2)), min_size=2, max_size=2),
    st.sampled_from(
        [["0:00:01.5", "0:00:04"], [1, 2], [3], [[1, 2], [3, 5]], [], None, "['0:01', '0:03']",
         '["1", 2.5]', "[01, 2]", "(1, 2)", "1 - 3", "[1, [2]]", "x", ""]
    ),
)  # fmt: skip


def seen(path: Path) -> tuple[Any, ...]:
    """Return all that is listed of a table and planned of it."""
    try:
        videos = list_corpus(path)
    except CorpusError as err:
        return (str(err),)
    known = {
        v.video: ProbeRecord(width=64, height=36, rate_fps=25.0, duration_s=50.0) for v in videos
    }
    part = plan_part(videos, known, SPEC)
    return [(v, list(v.spans)) for v in videos], part.clips, part.videos


@settings(max_examples=15)
@given(st.data(), st.sampled_from(["csv", "jsonl", "parquet"]), st.booleans())
def test_columns_are_read_as_rows_are(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, pairs: bool
) -> None:
    row = {name: CELLS[name] for name in ("path", "caption", "value")}
    row |= {"span": PAIRS} if pairs else {"start": CELLS["time"], "end": CELLS["time"]}
    rows = data.draw(st.lists(st.fixed_dictionaries(row), min_size=1, max_size=9))
    path = tmp_path_factory.getbasetemp() / f"drawn.{kind}"
    if kind == "parquet":
        rows = [{k: v if v is None else str(v) for k, v in row.items()} for row in rows]
    write(path, rows)
    found = seen(path)

    def none_plain(self: Times, cells: dict[str, Any], rows: int) -> tuple[Any, Any]:
        return np.zeros(rows, ENTRY), np.zeros(rows, bool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Times, "columns", none_plain)
        patch.setattr(readers, "_ends_of_rows", lambda *_, **__: np.zeros((0, 2), np.int64))
        assert found == seen(path)


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(["a", ",", '"', "\n", "\r\n", "\r", " ", "\0", "b.mp4"]), max_size=14)
)
def test_csv_is_read_as_pythons_strict_parser_reads_it(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.csv"
    path.write_bytes(("path,n\nx,1\n" + "".join(pieces)).encode())
    found = seen(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_ends_of_rows", lambda *_, **__: np.zeros((0, 2), np.int64))
        assert found == seen(path)
