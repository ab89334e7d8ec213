"""A plan: each clip once, shards filled, old rows never moved, nothing but its inputs in it."""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.compute as pc
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.geometry import Bucket, aspect_buckets, nearest_bucket, square_bucket
from reducio_latents.core.starts import clip_starts
from reducio_latents.corpus import CorpusVideo
from reducio_latents.corpus import build as build_module
from reducio_latents.corpus.build import plan_part
from reducio_latents.corpus.entry import CorpusSpan
from reducio_latents.corpus.probe import ProbeRecord
from reducio_latents.corpus.summary import summarise
from reducio_latents.errors import ConfigError, CorpusError, StoreError
from reducio_latents.files.source import VideoSource
from reducio_latents.store.plan import CLIP_SCHEMA, Plan, PlanPart, PlanSpec

ROOT = Path(__file__).parents[1]
SPEC = PlanSpec(clip=ClipSpec(), buckets=(square_bucket(16, 256),), shard_rows=4)


def video(name: str, *captions: str, **extra: Any) -> CorpusVideo:
    return CorpusVideo(name, VideoSource(f"/corpus/{name}"), captions, extra)


def record(duration_s: float = 3.0, *, content: str = "", **changes: Any) -> ProbeRecord:
    """Describe a healthy video; equal `content` is equal bytes."""
    known: dict[str, Any] = {
        "codec": "h264", "width": 640, "height": 360, "rate_fps": 30.0, "frames": 90, "bytes": 1000
    }  # fmt: skip
    return ProbeRecord(**(known | {"duration_s": duration_s, "sha256": content} | changes))


def rows(part: PlanPart | Plan) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = part.clips.to_pylist()
    return found


def fates(part: PlanPart | Plan) -> dict[str, tuple[str, int]]:
    return {row["video"]: (row["status"], row["clips"]) for row in part.videos.to_pylist()}


@st.composite
def corpora(draw: st.DrawFn) -> dict[str, ProbeRecord]:
    """Draw videos of which some are broken, too short, or copies of others."""
    names = draw(st.lists(st.text("abc/é", min_size=1, max_size=4), max_size=12, unique=True))
    broken = st.just(ProbeRecord(error="it is text"))
    sizes = st.sampled_from([(640, 360), (360, 640), (500, 500), (1920, 800)])
    healthy = st.builds(
        lambda duration_s, content, size: record(
            # Equal bytes are equal in everything that is known of them.
            duration_s=duration_s if content is None else content * 1.3,
            content="" if content is None else f"{content:064x}",
            width=size[0] if content is None else 640,
            height=size[1] if content is None else 360,
        ),
        st.floats(0, 9),
        st.one_of(st.none(), st.integers(1, 4)),
        sizes,
    )
    return {name: draw(st.one_of(healthy, healthy, healthy, broken)) for name in names}


specs = st.builds(
    PlanSpec,
    clip=st.builds(ClipSpec, policy=st.sampled_from(["all", "centre", "random:3", "stride:0.5"])),
    buckets=st.sampled_from([SPEC.buckets, aspect_buckets(16, 256)]),
    shard_rows=st.integers(1, 9),
    duplicates=st.sampled_from(["refer", "encode"]),
)


def check_rows(plan: Plan, records: Mapping[str, ProbeRecord], spec: PlanSpec) -> None:
    """Prove what holds for every plan, in one part or many."""
    table = rows(plan)
    own = [row for row in table if row["status"] == "planned"]
    places = [(row["bucket"], row["shard"], row["row"]) for row in own]
    assert len(set(places)) == len(places)
    assert len({row["clip_id"] for row in table}) == len(table)
    # Shards: rows 0, 1, 2, ... without a gap, and `shards` says how many.
    in_shard: dict[tuple[str, int], list[int]] = defaultdict(list)
    for bucket, shard, row in places:
        in_shard[bucket, shard].append(row)
    assert {(s.bucket, s.shard): s.rows for s in plan.shards()} == {
        key: len(found) for key, found in in_shard.items()
    }
    assert all(sorted(found) == list(range(len(found))) for found in in_shard.values())
    # Videos: all of them, each with the clips that its policy gives.
    by_video: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in table:
        by_video[row["video"]].append(row)
    described = {row["video"]: row for row in plan.videos.to_pylist()}
    assert described.keys() == records.keys()
    place_of = {(r["video"], r["start_s"]): (r["bucket"], r["shard"], r["row"]) for r in own}
    for name, known in records.items():
        found, status = by_video[name], described[name]["status"]
        assert described[name]["clips"] == len(found)
        original = described[name]["duplicate_of"] or name
        if status in ("planned", "duplicate"):
            wanted = clip_starts(records[original].duration_s, spec.clip, original)
            assert [row["start_s"] for row in found] == wanted
            bucket = nearest_bucket(known.height, known.width, spec.buckets).name
            assert {row["bucket"] for row in found} == {bucket}
            for row in found:
                place = (row["bucket"], row["shard"], row["row"])
                assert place_of[original, row["start_s"]] == place
        else:
            assert not found
            assert status == ("too_short" if known.error is None else "failed")
            assert described[name]["reason"]
    if spec.duplicates == "refer":
        contents = [
            described[n]["sha256"] for n in records
            if described[n]["status"] == "planned" and described[n]["sha256"]
        ]  # fmt: skip
        assert len(set(contents)) == len(contents)
    counts = plan.counts()
    assert counts.videos["found"] == len(records) == sum(counts.videos.values()) / 2
    assert counts.clips["found"] == len(table) == sum(counts.clips.values()) / 2


@given(corpora(), specs)
def test_every_clip_has_one_row_and_every_shard_is_filled(
    records: dict[str, ProbeRecord], spec: PlanSpec
) -> None:
    part = plan_part([video(name) for name in records], records, spec)
    check_rows(Plan.of(part), records, spec)
    for bucket in spec.buckets:
        sizes = [s.rows for s in Plan.of(part).shards() if s.bucket == bucket.name]
        assert sizes[:-1] == [spec.shard_rows] * len(sizes[:-1])


@given(corpora(), specs, st.randoms(use_true_random=False))
def test_the_order_of_the_listing_does_not_matter(
    records: dict[str, ProbeRecord], spec: PlanSpec, rng: Any
) -> None:
    listing = [video(name, extra=len(name)) for name in records]
    first = plan_part(listing, records, spec)
    rng.shuffle(listing)
    second = plan_part(listing, dict(reversed(records.items())), spec)
    assert first.clips.equals(second.clips)
    assert first.videos.equals(second.videos)
    assert first == second


@settings(max_examples=60)
@given(corpora(), specs, st.data())
def test_adding_videos_moves_no_row_and_plans_each_new_clip_once(
    records: dict[str, ProbeRecord], spec: PlanSpec, data: st.DataObject
) -> None:
    plan: Plan | None = None
    listed: list[str] = []
    waiting = list(data.draw(st.permutations(list(records))))
    while waiting or plan is None:
        take = data.draw(st.integers(0, len(waiting)))
        listed, waiting = listed + waiting[:take], waiting[take:]
        part = plan_part([video(name) for name in listed], records, spec, plan)
        before = [] if plan is None else rows(plan)
        used = set() if plan is None else {(s.bucket, s.shard) for s in plan.shards()}
        plan = Plan.of(part) if plan is None else plan.extended(part)
        assert rows(plan)[: len(before)] == before
        new = [r for r in rows(part) if r["status"] == "planned"]
        assert not used & {(r["bucket"], r["shard"]) for r in new}
        check_rows(plan, {name: records[name] for name in listed}, spec)
        if not take and waiting:
            break


def test_clips_are_the_longest_that_there_is_room_for_then_of_the_nearest_shape() -> None:
    names = ("16x256x256", "48x256x256", "48x256x448", "4x256x256")
    spec = replace(SPEC, clip=ClipSpec(frames=48), buckets=tuple(map(Bucket.parse, names)))
    records = {
        "a": record(7.0),  # 2 clips of 3 s, and it is wide
        "b": record(7.0, width=300, height=300),
        "c": record(2.9),  # room for 2 clips of 1 s, none of 3 s
        "d": record(0.6),
        "e": record(0.1),
    }
    part = plan_part([video(name) for name in records], records, spec)
    found = Counter((row["video"], row["bucket"]) for row in rows(part))
    assert found == {
        ("a", "48x256x448"): 2, ("b", "48x256x256"): 2, ("c", "16x256x256"): 2,
        ("d", "4x256x256"): 2,
    }  # fmt: skip
    assert fates(part)["e"] == ("too_short", 0)
    (reason,) = part.videos.filter(pc.equal(part.videos["video"], "e"))["reason"].to_pylist()
    assert "clip of 4 frames" in reason
    hours = (2 * 48 + 2 * 48 + 2 * 16 + 2 * 4) / 16 / 3600
    assert math.isclose(summarise(Plan.of(part)).clip_hours, hours)


def test_rows_follow_one_another_by_video_and_start() -> None:
    part = plan_part([video("b"), video("a")], {"a": record(3.0), "b": record(2.0)}, SPEC)
    assert [(r["video"], r["start_s"], r["shard"], r["row"]) for r in rows(part)] == [
        ("a", 0.0, 0, 0), ("a", 1.0, 0, 1), ("a", 2.0, 0, 2), ("b", 0.0, 0, 3), ("b", 1.0, 1, 0)
    ]  # fmt: skip


def test_a_clip_id_depends_on_the_clip_alone_and_is_a_safe_name() -> None:
    few = plan_part([video("a/b.mp4")], {"a/b.mp4": record(2.0)}, SPEC)
    records = {"a/b.mp4": record(2.0), "0": record(9.0), "a/c.mp4": record(9.0)}
    many = plan_part([video(name) for name in records], records, SPEC)
    ids = [row["clip_id"] for row in rows(few)]
    assert ids == ["b0a066fc48626e7b_000000000", "b0a066fc48626e7b_000001000"]
    assert set(ids) < {row["clip_id"] for row in rows(many)}


@given(st.floats(0.5, 999_000.0), st.sampled_from([16.0, 24000 / 1001, 1000.0]))
def test_a_clip_id_tells_the_start_in_milliseconds(duration_s: float, rate_fps: float) -> None:
    spec = replace(SPEC, clip=ClipSpec(policy="uniform:3", rate_fps=rate_fps))
    for row in rows(plan_part([video("a")], {"a": record(duration_s)}, spec)):
        assert math.isclose(int(row["clip_id"][17:]), row["start_s"] * 1000, abs_tol=0.501)
        assert len(row["clip_id"]) == 26


def test_two_videos_whose_clip_ids_would_collide_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build_module, "clip_prefix", lambda name: f"{len(name):016x}")
    first = plan_part([video("aa")], {"aa": record()}, SPEC)
    with pytest.raises(CorpusError, match="aa and bb would get the same clip ids"):
        plan_part([video("bb")], {"bb": record()}, SPEC, Plan.of(first))
    with pytest.raises(CorpusError, match="would get the same clip ids"):
        plan_part([video("aa"), video("bb")], {"aa": record(), "bb": record()}, SPEC)


def test_a_duplicate_refers_to_the_rows_of_the_first_one_here_or_earlier() -> None:
    same = record(2.0, content="f" * 64)
    first = plan_part([video("m", "one"), video("n", "two")], {"m": same, "n": same}, SPEC)
    assert fates(first) == {"m": ("planned", 2), "n": ("duplicate", 2)}
    own, other = rows(first)[:2], rows(first)[2:]
    assert [row["status"] for row in other] == ["duplicate"] * 2
    assert [row["captions"] for row in other] == [["two"]] * 2
    places = [(row["shard"], row["row"]) for row in own]
    assert [(row["shard"], row["row"]) for row in other] == places

    later = plan_part([video("a")], {"a": same}, SPEC, Plan.of(first))
    assert fates(later) == {"a": ("duplicate", 2)}
    assert later.videos["duplicate_of"].to_pylist() == ["m"]
    assert [(row["shard"], row["row"]) for row in rows(later)] == places
    assert later.shards == {}


def test_duplicates_are_encoded_each_if_asked_for() -> None:
    same = record(2.0, content="f" * 64)
    part = plan_part(
        [video("a"), video("b")], {"a": same, "b": same}, replace(SPEC, duplicates="encode")
    )
    assert fates(part) == {"a": ("planned", 2), "b": ("planned", 2)}


def test_files_that_could_not_be_hashed_are_no_duplicates() -> None:
    part = plan_part([video("a"), video("b")], {"a": record(2.0), "b": record(2.0)}, SPEC)
    assert fates(part) == {"a": ("planned", 2), "b": ("planned", 2)}


@pytest.mark.parametrize(
    "known",
    [
        record(float("nan")),
        record(float("inf")),
        record(-1.0),
        record(1e12),
        record(width=0),
        ProbeRecord(error="it is text."),
    ],
)
def test_what_a_header_cannot_mean_is_a_failure_with_a_reason(known: ProbeRecord) -> None:
    part = plan_part([video("a")], {"a": known}, SPEC)
    assert fates(part) == {"a": ("failed", 0)}
    (row,) = part.videos.to_pylist()
    assert row["reason"]
    assert row["duration_s"] is row["width"] is row["codec"] is None


def test_a_reason_does_not_repeat_where_the_file_is() -> None:
    listing = [
        video("a.mp4"),
        CorpusVideo("x.tar/b.mp4", VideoSource("/corpus/x.tar", 512, 100)),
        video("c.mp4"),
    ]
    why = "there is no such file."
    records = {
        "a.mp4": ProbeRecord(error=f"/corpus/a.mp4: {why}"),
        "x.tar/b.mp4": ProbeRecord(error=f"/corpus/x.tar@512: {why}"),
        "c.mp4": ProbeRecord(error=f"/corpus/c.mp4: {why}"),
    }
    plan = Plan.of(plan_part(listing, records, SPEC))
    assert summarise(plan).reasons == {"there is no such file": 3}


def test_a_problem_of_the_listing_is_a_failure_and_needs_no_record() -> None:
    shut = CorpusVideo("d/", VideoSource("/corpus/d/"), problem="permission denied")
    part = plan_part([shut, video("a")], {"a": record()}, SPEC)
    assert fates(part) == {"a": ("planned", 3), "d/": ("failed", 0)}


def test_a_video_that_was_not_probed_or_is_listed_twice_is_refused() -> None:
    with pytest.raises(CorpusError, match="a was listed, but not probed"):
        plan_part([video("a")], {}, SPEC)
    with pytest.raises(CorpusError, match="a is listed twice"):
        plan_part([video("a"), video("a")], {"a": record()}, SPEC)


def test_failed_videos_are_planned_again_only_when_asked_and_only_if_it_changes() -> None:
    listing = [video("a"), video("b"), video("c")]
    missing = ProbeRecord(error="there is no such file")
    records = {"a": missing, "b": missing, "c": record(2.0)}
    first = Plan.of(plan_part(listing, records, SPEC))
    records = {"a": record(3.0), "b": missing}
    assert build_module.not_planned(listing, first) == []
    assert plan_part(listing, records, SPEC, first).videos.num_rows == 0
    assert [v.video for v in build_module.not_planned(listing, first, retry=True)] == ["a", "b"]
    part = plan_part(listing, records, SPEC, first, retry_failed=True)
    assert fates(part) == {"a": ("planned", 3)}
    plan = first.extended(part)
    assert fates(plan) == {"a": ("planned", 3), "b": ("failed", 0), "c": ("planned", 2)}
    assert plan.counts().videos == {
        "found": 3, "planned": 2, "too_short": 0, "duplicate": 0, "failed": 1
    }  # fmt: skip
    assert plan.video("a")["status"] == "planned"


def test_changed_and_gone_videos_are_told_and_their_clips_are_left() -> None:
    records = {name: record(content=name * 64) for name in "abc"}
    plan = Plan.of(plan_part([video(name) for name in "abc"], records, SPEC))
    part = plan_part(
        [video("a"), video("b")], {"a": record(content="a" * 64), "b": record(content="f" * 64)},
        SPEC, plan,
    )  # fmt: skip
    assert (part.changed, part.gone) == (("b",), ("c",))
    assert part.clips.num_rows == part.videos.num_rows == 0


def test_another_spec_is_refused_naming_each_difference() -> None:
    plan = Plan.of(plan_part([video("a")], {"a": record()}, SPEC))
    other = PlanSpec(
        clip=ClipSpec(policy="centre"), buckets=(square_bucket(16, 512),), shard_rows=8
    )
    with pytest.raises(StoreError) as caught:
        plan_part([video("b")], {"b": record()}, other, plan)
    for difference in (
        "clip.policy is all, not centre",
        "buckets is 16x256x256, not 16x512x512",
        "shard_rows is 4, not 8",
    ):
        assert difference in str(caught.value)
    assert "seed" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"buckets": ()},
        {"buckets": (square_bucket(16, 256),) * 2},
        {"buckets": (square_bucket(17, 256),)},
        {"shard_rows": 0},
        {"duplicates": "drop"},
    ],
)
def test_a_spec_cannot_exist_in_a_bad_state(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(SPEC, **changes)


def test_what_the_corpus_carries_keeps_its_type_and_gives_way_to_our_names() -> None:
    extras: list[dict[str, Any]] = [
        {"n": 1, "x": 1, "f": 0.5, "b": True, "mixed": 1, "status": "ok", "row": 7},
        {"n": 2, "x": 0.5, "f": 1.5, "b": False, "mixed": "one", "corpus_row": "theirs"},
        {},
    ]
    listing = [video(str(i), f"c{i}", "two", **extra) for i, extra in enumerate(extras)]
    part = plan_part(listing, {str(i): record(1.0) for i in range(3)}, SPEC)
    types = {field.name: str(field.type) for field in part.clips.schema}
    assert list(types)[: len(CLIP_SCHEMA)] == CLIP_SCHEMA.names
    assert {name: types[name] for name in list(types)[len(CLIP_SCHEMA) :]} == {
        "b": "bool", "corpus_row": "string", "f": "double", "mixed": "string", "n": "int64",
        "corpus_corpus_row": "int64", "corpus_status": "string", "x": "double",
    }  # fmt: skip
    first, second, third = rows(part)
    assert (first["corpus_corpus_row"], second["corpus_row"]) == (7, "theirs")
    assert (first["mixed"], second["mixed"], third["mixed"]) == ("1", "one", None)
    assert (first["captions"], third["n"]) == (["c0", "two"], None)


def test_parts_whose_carried_columns_differ_are_joined() -> None:
    first = plan_part([video("a", n=1, t="x", k=1)], {"a": record(1.0)}, SPEC)
    plan = Plan.of(first)
    second = plan_part([video("b", n=0.5, t=3, other=True)], {"b": record(1.0)}, SPEC, plan)
    a, b = rows(plan.extended(second))
    assert (a["n"], a["t"], a["k"], a["other"]) == (1.0, "x", 1, None)
    assert (b["n"], b["t"], b["k"], b["other"]) == (0.5, "3", None, True)


def test_a_videos_row_and_source_are_found_by_name_wherever_the_corpus_is() -> None:
    listing = [
        video("b/é.mp4"),
        CorpusVideo("x/s.tar/f/k.mp4", VideoSource("/corpus/x/s.tar", 512, 99)),
        CorpusVideo("/abs/v.mp4", VideoSource("/abs/v.mp4")),
    ]
    plan = Plan.of(plan_part(listing, {v.video: record() for v in listing}, SPEC))
    assert plan.source("b/é.mp4", "/moved") == VideoSource("/moved/b/é.mp4")
    assert plan.source("x/s.tar/f/k.mp4", "s3://b") == VideoSource("s3://b/x/s.tar", 512, 99)
    assert plan.source("/abs/v.mp4", "/moved") == VideoSource("/abs/v.mp4")
    for name in ("", "b", "zzz"):
        with pytest.raises(StoreError, match="the plan has no video"):
            plan.video(name)


def test_a_shard_that_is_not_planned_is_refused() -> None:
    plan = Plan.of(plan_part([video("a")], {"a": record()}, SPEC))
    for bucket, shard in (("16x256x256", 1), ("16x256x256", -1), ("16x512x512", 0)):
        with pytest.raises(StoreError, match="the plan has no shard"):
            plan.shard_clips(bucket, shard)


def test_a_shards_clips_are_its_rows_in_order() -> None:
    spec = replace(SPEC, buckets=aspect_buckets(16, 256))
    records = {
        name: record(3.0, width=width, content="e" * 64 if name in "ab" else "")
        for name, width in zip("abcdef", (640, 640, 360, 200, 360, 640), strict=True)
    }
    plan = Plan.of(plan_part([video(name) for name in "abcd"], records, spec))
    plan = plan.extended(plan_part([video(name) for name in "abcdef"], records, spec, plan))
    expected = defaultdict(list)
    for row in rows(plan):
        if row["status"] == "planned":
            expected[row["bucket"], row["shard"]].append(row)
    for shard in plan.shards():
        found = plan.shard_clips(shard.bucket, shard.shard).to_pylist()
        assert found == expected.pop((shard.bucket, shard.shard))
        assert [row["row"] for row in found] == list(range(shard.rows))
    assert not expected


def test_a_summary_says_what_encoding_comes_to() -> None:
    same = record(3600.0, content="f" * 64)
    records = {"a": same, "b": same, "c": record(0.5), "d": ProbeRecord(error="it is text")}
    buckets = (Bucket(16, 256, 256), Bucket(16, 256, 448))
    spec = replace(SPEC, buckets=buckets, shard_rows=512)
    summary = summarise(
        Plan.of(plan_part([video(name) for name in records], records, spec)),
        {"16x256x256": 10, "16x256x448": 1000},
    )
    assert summary.counts.videos == {
        "found": 4, "planned": 1, "too_short": 1, "duplicate": 1, "failed": 1
    }  # fmt: skip
    assert summary.counts.clips == {"found": 7200, "planned": 3600, "duplicate": 3600}
    assert summary.clip_hours == 1.0
    assert math.isclose(summary.video_hours, 2 + 0.5 / 3600)
    assert [(b.bucket, b.clips, b.shards, b.bytes) for b in summary.buckets] == [
        ("16x256x256", 0, 0, 0),
        ("16x256x448", 3600, 8, 3_600_000),
    ]
    assert summary.bytes == 3_600_000
    assert summary.reasons == {
        "has the same bytes as another video": 1,
        "it is text": 1,
        "shorter than a clip of 16 frames at 16 fps": 1,
    }


def validators() -> tuple[Any, Any]:
    schema = json.loads((ROOT / "schemas" / "plan.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return tuple(
        jsonschema.Draft202012Validator({**schema, "oneOf": [{"$ref": f"#/$defs/{kind}"}]})
        for kind in ("clip", "video")
    )  # type: ignore[return-value]


@given(corpora(), specs)
@settings(max_examples=30)
def test_every_row_validates_against_the_schema(
    records: dict[str, ProbeRecord], spec: PlanSpec
) -> None:
    clip, described = validators()
    part = plan_part([video(n, "x", status="ok", n=1) for n in records], records, spec)
    for row in rows(part):
        clip.validate(row)
        assert not described.is_valid(row)
    for row in part.videos.to_pylist():
        described.validate(row)


def test_the_schema_refuses_what_is_no_row() -> None:
    clip, described = validators()
    part = plan_part([video("a")], {"a": record()}, SPEC)
    row, about = rows(part)[0], part.videos.to_pylist()[0]
    for change in ({"clip_id": "a.b"}, {"shard": -1}, {"status": "done"}, {"captions": None}):
        assert not clip.is_valid(row | change)
    for change in ({"status": "lost"}, {"clips": "3"}, {"more": 1}):
        assert not described.is_valid(about | change)


def test_planning_ten_thousand_videos_takes_seconds_of_cpu() -> None:
    listing = [video(f"d{i % 97}/{i}.mp4", f"caption {i}", n=i) for i in range(10_000)]
    records = {v.video: record(10.0, content=f"{i % 9_000:064x}") for i, v in enumerate(listing)}
    start = time.process_time()
    part = plan_part(listing, records, replace(SPEC, shard_rows=512))
    assert part.clips.num_rows == 100_000
    assert time.process_time() - start < 5
    assert Counter(part.videos["status"].to_pylist()) == {"planned": 9000, "duplicate": 1000}


def span(start: float, end: float | None, *captions: str, **changes: Any) -> CorpusSpan:
    return CorpusSpan(start, end, captions, **changes)


def with_spans(name: str, *spans: CorpusSpan, **extra: Any) -> CorpusVideo:
    return replace(video(name, "of the whole video", **extra), spans=spans)


def test_clips_lie_inside_spans_and_have_their_captions_and_values() -> None:
    listing = [
        with_spans(
            "a",
            span(0.5, 2.6, "first", extra={"score": 0.5}),
            span(4.0, 5.0, "second", extra={"score": 2, "mood": "calm"}),
            score=9,
            site="x",
        ),
        video("b", "third"),
    ]
    part = plan_part(listing, {"a": record(9.0), "b": record(1.0)}, SPEC)
    names = ("video", "start_s", "span_start_s", "span_end_s", "captions", "score", "mood", "site")
    assert [tuple(row[name] for name in names) for row in rows(part)] == [
        ("a", 0.5, 0.5, 2.6, ["first"], 0.5, None, "x"),
        ("a", 1.5, 0.5, 2.6, ["first"], 0.5, None, "x"),
        ("a", 4.0, 4.0, 5.0, ["second"], 2.0, "calm", "x"),
        ("b", 0.0, 0.0, 1.0, ["third"], None, None, None),
    ]


def test_a_span_is_a_part_of_its_video_or_counted_with_its_reason() -> None:
    spans = [
        span(3.0, 2.0), span(2.0, 2.0), span(9.5, 12.0), span(1.0, 1.9), span(8.5, 12.0),
        span(0, 30, in_frames=True), span(15, 45, in_frames=True, from_s=4.0),
        span(8.75, None), span(0, 1, problem="it is no span"),
    ]  # fmt: skip
    part = plan_part(
        [with_spans("a", *spans), with_spans("b", spans[0])],
        {"a": record(9.5), "b": record(9.5)},
        SPEC,
    )
    assert [(r["span_start_s"], r["span_end_s"]) for r in rows(part)] == [
        (0.0, 1.0), (4.5, 5.5), (8.5, 9.5)
    ]  # fmt: skip
    assert fates(part) == {"a": ("planned", 3), "b": ("too_short", 0)}
    assert part.videos["reason"].to_pylist()[1] == (
        "none of its spans has a clip: a span ends before it begins"
    )
    assert Plan.of(part).counts().spans == {
        "found": 10,
        "a span ends before it begins": 3,
        "a span begins after the video's end": 1,
        "it is no span": 1,
        "shorter than a clip of 16 frames at 16 fps": 2,
    }


def test_overlapping_spans_each_have_their_clips_under_ids_of_their_own() -> None:
    spans = span(0.0, 2.0, "short"), span(0.0, 3.0, "long"), span(0.5, 1.5, "inner")
    part = plan_part([with_spans("a", *spans)], {"a": record(3.0)}, SPEC)
    table = rows(part)
    assert [(row["start_s"], *row["captions"]) for row in table] == [
        (0.0, "short"), (0.0, "long"), (0.5, "inner"), (1.0, "short"), (1.0, "long"), (2.0, "long")
    ]  # fmt: skip
    assert len({row["clip_id"] for row in table}) == 6
    schema = json.loads((ROOT / "schemas/plan.schema.json").read_text())
    for row in table + part.videos.to_pylist():
        jsonschema.validate(row, schema)


def test_a_copy_refers_only_to_clips_of_the_same_spans() -> None:
    same = record(5.0, content="1" * 64)
    listing = [
        with_spans("a", span(1, 0), span(0, 1, "one"), span(2, 3, "two")),
        with_spans("b", span(0, 1, "eins"), span(2, 3, "zwei")),
        with_spans("c", span(1, 2, "other")),
        video("d"),
    ]
    part = plan_part(listing[:3], dict.fromkeys("abc", same), SPEC)
    assert fates(part) == {"a": ("planned", 2), "b": ("duplicate", 2), "c": ("planned", 1)}
    of_b = [row for row in rows(part) if row["video"] == "b"]
    assert [(row["row"], *row["captions"]) for row in of_b] == [(0, "eins"), (1, "zwei")]
    assert [row["span_start_s"] for row in of_b] == [0, 2]
    later = plan_part(listing, dict.fromkeys("abcd", same), SPEC, Plan.of(part))
    assert fates(later) == {"d": ("planned", 5)}
    check_ids = Plan.of(part).extended(later).clips["clip_id"].to_pylist()
    assert len(set(check_ids)) == len(check_ids)


@given(
    st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9), st.booleans()), max_size=6),
    st.sampled_from(["all", "centre", "random:3", "stride:0.5", "uniform:2"]),
)
@example([(1.0, 8.5, False)], "all")
def test_no_frame_of_a_clip_lies_outside_its_span(
    times: list[tuple[float, float, bool]], policy: str
) -> None:
    if len(times) == 1 and not times[0][2]:  # nor is it the file that one span was cut to
        assume(times[0][1] <= 8.5 or abs(times[0][1] - times[0][0] - 8.0) > 0.5)
    spans = [span(start, end, f"{i}", in_frames=f) for i, (start, end, f) in enumerate(times)]
    spec = replace(SPEC, clip=ClipSpec(policy=policy))
    part = plan_part([with_spans("a", *spans)], {"a": record(8.0)}, spec)
    for row in rows(part):
        if spans:
            start, end, in_frames = times[int(row["captions"][0])]
            low, high = row["span_start_s"], row["span_end_s"]
            assert low <= row["start_s"] <= row["start_s"] + 15 / 16 < high <= 8.0
            assert low == pytest.approx(start / (30 if in_frames else 1))
            assert high == pytest.approx(min(8.0, end / (30 if in_frames else 1)))
