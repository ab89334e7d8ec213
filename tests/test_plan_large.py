"""Plans of more clips than a part, or a piece of one, holds: made and read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.geometry import Bucket
from reducio_latents.corpus import CorpusVideo, planning
from reducio_latents.corpus import build as build_module
from reducio_latents.corpus.planning import NewPlan, plan_listed
from reducio_latents.corpus.probe import ProbeRecord, Probing
from reducio_latents.corpus.summary import summarise
from reducio_latents.errors import CorpusError
from reducio_latents.files import LocalFiles
from reducio_latents.files.source import VideoSource
from reducio_latents.store.index import build_index, same_clips
from reducio_latents.store.plan import (
    Plan,
    PlanPart,
    PlanSpec,
    PlanTakenError,
    StoredPart,
    parts,
    read_plan,
    verify_parts,
    write_part,
)
from reducio_latents.store.plan.bounded import BoundedParquet
from tests.stores import make_store

SPEC = PlanSpec(clip=ClipSpec(), buckets=(Bucket(16, 256, 256), Bucket(16, 256, 448)), shard_rows=4)
PROBING = Probing(backend="none", workers=1, timeout_s=1.0)


def listing(count: int) -> list[CorpusVideo]:
    """Return videos of 1 to 4 clips; every seventh cannot be read, each has a caption."""
    return [
        CorpusVideo(
            f"{n:04d}.mp4",
            VideoSource(f"/corpus/{n:04d}.mp4"),
            (f"caption {n}",),
            {"n": n},
            "it is a folder" if n % 7 == 6 else None,
        )
        for n in range(count)
    ]


class Prober:
    """Stands for the processes that probe: a video's number says how long and wide it is."""

    def __init__(self) -> None:
        self.probed: list[str] = []

    def __call__(self, videos: Sequence[CorpusVideo], *_: object) -> Iterator[ProbeRecord]:
        for video in videos:
            number = int(video.video[:4])
            self.probed.append(video.video)
            yield ProbeRecord(
                codec="h264", width=640, height=360 if number % 2 else 640, rate_fps=30.0,
                duration_s=1.0 + number % 4, frames=30, bytes=9, sha256=f"{number % 50:064x}",
                error=video.problem, stamp=f"stamp {number}",
            )  # fmt: skip


@pytest.fixture
def prober(monkeypatch: pytest.MonkeyPatch) -> Prober:
    prober = Prober()
    monkeypatch.setattr(planning, "probe_videos", prober)
    monkeypatch.setattr(planning, "PART_CLIPS", 40)
    return prober


def plan_into(folder: Path, videos: Sequence[CorpusVideo], lives: int = 99) -> NewPlan:
    """Plan into a store; killed before it has stored `lives` parts more."""
    files = LocalFiles(folder)

    def keep(part: PlanPart) -> StoredPart:
        nonlocal lives
        if (lives := lives - 1) < 0:
            raise KeyboardInterrupt
        write_part(files, part.number, part)
        return StoredPart.of(files, part.number)

    return plan_listed(videos, SPEC, read_plan(files), PROBING, keep=keep)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("plan/*.*"))}


def test_a_large_corpus_is_planned_in_parts_and_a_kill_costs_one_of_them(
    tmp_path: Path, prober: Prober
) -> None:
    whole = plan_into(tmp_path / "a", listing(100))
    assert len(whole.parts) > 3
    assert [row["video"] for row in whole.plan.videos.to_pylist()] == [
        video.video for video in listing(100)
    ]
    assert whole.stamps["0042.mp4"] == "stamp 42"
    with pytest.raises(KeyboardInterrupt):
        plan_into(tmp_path / "b", listing(100), lives=2)
    stored = read_plan(LocalFiles(tmp_path / "b"))
    assert stored is not None
    kept = set(stored.videos["video"].to_pylist())
    prober.probed.clear()
    plan_into(tmp_path / "b", listing(100))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert kept
    assert kept.isdisjoint(prober.probed)
    assert verify_parts(LocalFiles(tmp_path / "b")) == []


def test_parts_say_together_what_one_says(
    tmp_path: Path, prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    parted = plan_into(tmp_path / "a", listing(100)).plan
    monkeypatch.setattr(planning, "PART_CLIPS", 1 << 20)
    whole = plan_into(tmp_path / "b", listing(100)).plan
    assert (whole.parts, parted.parts > 1) == (1, True)
    assert summarise(parted).counts == summarise(whole).counts
    assert summarise(parted).reasons == summarise(whole).reasons
    # Copies in later parts refer to originals of earlier ones.
    for plan in (parted, whole):
        copies = {v["video"]: v["duplicate_of"] for v in plan.videos.to_pylist()}
        assert copies["0060.mp4"] == "0010.mp4"
        clips = {(c["video"], c["start_s"]): c for c in plan.clips.to_pylist()}
        place = [(c["bucket"], c["shard"], c["row"]) for c in clips.values() if c["start_s"] == 2.0]
        assert place
        for (video, start_s), clip in clips.items():
            if clip["status"] == "duplicate":
                own = clips[copies[video], start_s]
                assert all(clip[name] == own[name] for name in ("bucket", "shard", "row"))


def test_a_small_corpus_is_one_part_of_the_bytes_that_it_always_had(
    tmp_path: Path, prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "PART_CLIPS", 1 << 20)
    plan_into(tmp_path / "a", listing(30))
    records = {v.video: r for v, r in zip(listing(30), prober(listing(30)), strict=True)}
    write_part(LocalFiles(tmp_path / "b"), 0, build_module.plan_part(listing(30), records, SPEC))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_part_that_another_run_has_stored_costs_no_second_probe(
    tmp_path: Path, prober: Prober
) -> None:
    records: dict[str, ProbeRecord] = {}

    def taken(part: PlanPart) -> StoredPart:
        plan_into(tmp_path, listing(100))
        prober.probed.clear()
        raise PlanTakenError("another was first")

    with pytest.raises(PlanTakenError):
        plan_listed(listing(100), SPEC, None, PROBING, records=records, keep=taken)
    assert records
    new = plan_listed(listing(101), SPEC, read_plan(LocalFiles(tmp_path)), PROBING, records=records)
    assert prober.probed == ["0100.mp4"]
    assert [len(part.videos) for part in new.parts] == [1]


def test_adding_videos_probes_them_alone_and_holds_no_whole_table(
    tmp_path: Path, prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_into(tmp_path, listing(45))
    prober.probed.clear()
    monkeypatch.setattr(StoredPart, "_whole", None)
    new = plan_into(tmp_path, listing(50))
    assert prober.probed == [f"{n:04d}.mp4" for n in range(45, 50)]
    assert (new.captions, new.gone, len(new.parts)) == ({}, (), 1)


def test_clip_ids_that_collide_with_those_of_an_earlier_part_are_refused(
    tmp_path: Path, prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = build_module.clip_prefix
    monkeypatch.setattr(
        build_module, "clip_prefix", lambda name: prefix("0001.mp4" if name == "0090.mp4" else name)
    )
    with pytest.raises(CorpusError, match=r"0001\.mp4 and 0090\.mp4 would get the same clip ids"):
        plan_into(tmp_path, listing(100))


@pytest.mark.parametrize("rows", [3, 64])
def test_a_plan_reads_the_same_in_pieces_of_any_size(
    tmp_path: Path, prober: Prober, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(parts, "ROW_GROUP", rows)
    plan_into(tmp_path, listing(40))
    stored = read_plan(LocalFiles(tmp_path))
    assert stored is not None
    monkeypatch.setattr(planning, "PART_CLIPS", 1 << 20)
    made = plan_listed(listing(40), SPEC, None, PROBING, keep=_as_it_is)  # type: ignore[arg-type]
    for name in ("clip_id", "video", "start_s", "captions", "n", "status"):
        assert sorted(map(str, stored.clips[name].to_pylist())) == sorted(
            map(str, made.plan.clips[name].to_pylist())
        )
    rows_of = {
        (c["bucket"], c["shard"], c["row"]): c
        for c in stored.clips.to_pylist()
        if c["status"] == "planned"
    }
    for shard in stored.shards():
        found = stored.shard_clips(shard.bucket, shard.shard).to_pylist()
        assert found == [rows_of[shard.bucket, shard.shard, row] for row in range(shard.rows)]
        ids = stored.shard_clips(shard.bucket, shard.shard, ["clip_id"])
        assert ids.column_names == ["clip_id"]
        assert ids["clip_id"].to_pylist() == [clip["clip_id"] for clip in found]
    for video in stored.videos.to_pylist():
        assert stored.video(video["video"]) == video
        own = [c for c in rows_of.values() if c["video"] == video["video"]]
        clips = stored.own_clips([video["video"]], ["clip_id"])
        assert sorted(clips["clip_id"].to_pylist()) == sorted(c["clip_id"] for c in own)
    columns = stored.video_columns("clips", "video")
    assert columns.equals(stored.videos.select(["clips", "video"]))
    assert verify_parts(LocalFiles(tmp_path)) == []


def _as_it_is(part: PlanPart) -> PlanPart:
    return part


def test_commits_are_held_against_each_piece_of_the_plan_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ROW_GROUP", 20)
    writer = make_store(LocalFiles(tmp_path))
    read: list[int] = []
    group = BoundedParquet.group

    def spied(self: BoundedParquet, number: int, columns: Sequence[str] | None = None) -> object:
        read.append(number)
        return group(self, number, columns)

    monkeypatch.setattr(BoundedParquet, "group", spied)
    assert same_clips(writer.files) == set(build_index(writer.files, use_cache=False).entries)
    assert max(map(read.count, read)) <= 2


def test_what_a_plan_knows_of_a_video_is_what_came_of_it_last(prober: Prober) -> None:
    spec, videos = replace(SPEC, duplicates="encode"), listing(14)
    bad = plan_listed(videos, spec, None, PROBING).plan
    healed = [replace(video, problem=None) for video in videos]
    plan = plan_listed(healed, spec, bad, PROBING, retry_failed=True).plan
    assert plan.parts == bad.parts + 1
    for one in (plan, Plan([*plan._parts])):  # as it grew, and read anew
        assert one.known.with_status("failed").to_pylist() == []
        assert sorted(one.known.names.to_pylist()) == [video.video for video in videos]
        assert one.known.named(["0006.mp4"])["0006.mp4"].status == "planned"
