"""Filters over what is known of clips, and those facts as fields of batches and entries."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from reducio_latents.check.clips import select_clips
from reducio_latents.check.options import Selection, StatsOptions
from reducio_latents.cli import main
from reducio_latents.corpus.build import plan_part
from reducio_latents.dataset import LatentDataset, LatentLoader, LatentTable
from reducio_latents.dataset.conditions import parse_conditions, passing
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store import Store
from reducio_latents.store.plan import read_plan, write_part
from tests.latent_stores import (
    StoreSpec,
    moments_of,
    numbers_in,
    record_of,
    scores_of,
    video_of,
    write_store,
)

VIDEOS, CLIPS = 6, 4
COUNT = VIDEOS * CLIPS


def told(video: int) -> dict[str, Any]:
    """Return what the corpus' table says of a video: some columns have holes."""
    said: dict[str, Any] = {
        "aesthetic score": 4 + video / 2,
        "frames": 100 * video,
        "good": video % 2 == 0,
        "camera motion": ("static", "pan", "zoom")[video % 3],
        "mixed": "n/a" if video == 1 else str(video),
    }
    if video % 3:
        said |= {"rating": float(video), "votes": video}
    return said


SPEC = StoreSpec(
    videos=VIDEOS, clips_per_video=CLIPS, columns=("motion", "scores", "caption"), extra=told
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("store")
    store = write_store(path, SPEC)
    ids = store.plan.clips["clip_id"].to_pylist()
    quality = {"clip_id": ids[:9], "psnr": [20.0 + n for n in range(9)], "psnr_whole": [None] * 9}
    pq.write_table(pa.table(quality), path / "quality.parquet")
    return store


def open_dataset(store: Store | Path, columns: Any = ("motion",), **options: Any) -> LatentDataset:
    settings: dict[str, Any] = {"batch_size": 2, "latents": "moments", "drop_last": False}
    return LatentDataset(store, columns, **{**settings, **options})


def numbers(store: Store | Path, filters: Any, **options: Any) -> set[int]:
    dataset = open_dataset(store, filters=filters, **options)
    found = [n for batch in dataset for n in numbers_in(batch["motion"])]
    assert len(found) == len(set(found)) == dataset.num_samples
    return set(found)


def of_videos(*videos: int) -> set[int]:
    return {n for n in range(COUNT) if n // CLIPS in videos}


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ([("motion", ">", 20.5)], {21, 22, 23}),
        ([("scores.motion", "<=", 2), ("brightness", ">=", 1)], {1, 2}),
        ([("brightness", "=", 3)], {3, 8, 13, 18, 23}),
        ([("brightness", "!=", 3)], {n for n in range(COUNT) if n % 5 < 3}),  # NaN never passes
        ([("brightness", "not in", [0, 1, 2])], {3, 8, 13, 18, 23}),
        ([("aesthetic score", ">=", 6)], of_videos(4, 5)),
        ([("corpus.frames", "==", 300.0)], of_videos(3)),
        ([("frames", "in", {100, 500})], of_videos(1, 5)),
        ([("good", "==", True)], of_videos(0, 2, 4)),
        ([("good", "in", [False])], of_videos(1, 3, 5)),
        ([("camera motion", "in", ("pan", "zoom"))], of_videos(1, 2, 4, 5)),
        ([("camera motion", "!=", "pan")], of_videos(0, 2, 3, 5)),
        ([("rating", "<", 5)], of_videos(1, 2, 4)),  # null never passes
        ([("rating", "not in", [1.0])], of_videos(2, 4, 5)),
        ([("mixed", ">", 3)], of_videos(4, 5)),  # what is no number is missing
        ([("psnr", ">", 25)], {6, 7, 8}),
        ([("video", "=", "folder/00002.mp4"), ("start_s", "<", 2)], {8, 9}),
        ([("captions", "=", 1), ("motion", "<", 1)], {0}),
        ([[("motion", "<", 2)], [("motion", ">", 22), ("good", "=", False)]], {0, 1, 23}),
        ("motion > 20.5", {21, 22, 23}),
        ("[('motion', '>', 20.5)]", {21, 22, 23}),
        ('[["motion", ">", 20.5]]', {21, 22, 23}),
        ("'aesthetic score'>=6", of_videos(4, 5)),
        ("aesthetic score >= 6", of_videos(4, 5)),
        ("camera motion = pan", of_videos(1, 4)),
        ("camera motion not in ['pan', 'zoom']", of_videos(0, 3)),
        (("motion", ">", 20.5), {21, 22, 23}),
        ([("motion", "in", np.array([3, 4]))], {3, 4}),
        (None, set(range(COUNT))),
        ([], set(range(COUNT))),
    ],
)
def test_filters_keep_what_they_say(store: Store, filters: Any, wanted: set[int]) -> None:
    assert numbers(store, filters) == wanted


def test_filters_stand_beside_other_ones(store: Store) -> None:
    either = [[("motion", "<", 3)], [("motion", ">", 6)]]
    assert numbers(store, either, min_psnr=22) == {2, 7, 8}
    names = [store.plan.clips["clip_id"][n].as_py() for n in (1, 7)]
    assert numbers(store, either, clip_ids=names, require_caption=True) == {1, 7}


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ([("brightnes", ">", 1)], "did you mean 'brightness'"),
        ([("aesthetics", ">", 1)], "did you mean 'aesthetic score'"),
        ([("nothing like it", ">", 1)], "known are .*video.*good.*motion"),
        ([("motion", ">>", 1)], "'>>' is no comparison"),
        ([("motion", ">", None)], "leave the condition out"),
        ([("motion", ">", math.nan)], "leave the condition out"),
        ([("motion", ">", "fast")], "motion holds no texts"),
        ([("camera motion", ">", 3)], "camera motion holds texts"),
        ([("motion", "in", 3)], "give a list"),
        ([("motion", "in", [3, "a"])], "not both"),
        ([("motion", ">", [3])], "a number or a text"),
        ([("motion", ">")], "no condition"),
        ([[]], "one must hold"),
        ([[[("motion", ">", 2)]]], "no condition"),
        (pc.field("motion") > 2, "write a list of conditions"),
        ("motion", "or motion > 2"),
        ("motion >=", "or motion > 2"),
        ("[('motion', '>', os)]", "write a list"),
        ({"motion": 2}, "write a list"),
        ([("motion", ">", 1000)], r"leave no sample.*filters=\[\[\('motion', '>', 1000\)\]\]"),
        ([("rating", ">", 1000)], "8 clips have no rating"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(store: Store, filters: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        numbers(store, filters)


def test_a_name_that_means_two_things_is_asked_about(tmp_path: Path) -> None:
    store = write_store(tmp_path, SPEC, extra=lambda video: {"motion": float(video)})
    with pytest.raises(ConfigError, match=r"corpus\.motion or scores\.motion"):
        numbers(store, [("motion", ">", 2)])
    assert numbers(store, [("corpus.motion", ">", 4)]) == of_videos(5)
    assert numbers(store, [("scores.motion", ">", 22)]) == {23}
    with pytest.raises(ConfigError, match=r"known are clip_id, .*corpus\.motion, scores\.motion, "):
        numbers(store, [("nothing like it", ">", 2)])


def test_a_store_without_scores_says_how_to_have_them(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    with pytest.raises(ConfigError, match=r"add-column .* scores"):
        numbers(store, [("motion", ">", 2)])
    with pytest.raises(StoreError, match=r"psnr needs .*quality\.parquet"):
        numbers(store, [("psnr", ">", 2)])


def test_what_is_not_known_is_counted(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    filters = [[("brightness", ">", 1)], [("rating", ">", 1), ("psnr", ">", 1)]]
    dataset = open_dataset(store, filters=filters)
    assert dataset.missing == {"brightness": 4, "rating": 8, "psnr": 15}
    assert "15 clips have no psnr" in caplog.text
    assert open_dataset(store, filters=[("motion", ">", 1)]).missing == {}


def test_a_shard_without_scores_has_none(tmp_path: Path) -> None:
    from reducio_latents.store.commit import ShardKey
    from reducio_latents.store.writer import StoreWriter

    store = write_store(tmp_path, SPEC, failed=frozenset({2}))
    StoreWriter(store.files, store.meta).drop_commit(ShardKey("16x32x32", 1), "scores")
    store = Store(store.files)
    dataset = open_dataset(store, filters=[("motion", "<", 18)])
    assert {n for b in dataset for n in numbers_in(b["motion"])} == {0, 1, *range(3, 8), 16, 17}
    assert dataset.missing == {"motion": 8}
    both = open_dataset(store, ("motion", "scores.motion"))
    assert both.num_samples == 15
    table = LatentTable(store, ["motion", "brightness"])
    assert len(table) == 23
    assert table[8]["brightness"] is None


def test_columns_of_later_parts_are_known_too(tmp_path: Path) -> None:
    """Of other columns, and of other types under the same name."""
    from reducio_latents.store.commit import ShardKey
    from reducio_latents.store.container import array_rows
    from reducio_latents.store.writer import StoreWriter
    from tests.latent_stores import write_shard

    first = StoreSpec(videos=2, shard_rows=4, extra=lambda video: {"size": video, "old": "x"})
    store = write_store(tmp_path, first)
    later = StoreSpec(videos=4, shard_rows=4, extra=lambda video: {"size": video + 0.5, "new": 1})
    files = LocalFiles(tmp_path)
    videos = [video_of(i, later) for i in range(4)]
    records = {v.video: record_of(i, later) for i, v in enumerate(videos)}
    write_part(files, 1, plan_part(videos, records, store.plan.spec, store.plan))
    grown = read_plan(files)
    assert grown is not None
    writer = StoreWriter.open(files, store.meta, array_rows(grown.shards(), 4))
    for shard in grown.shards()[2:]:
        write_shard(writer, later, ShardKey(shard.bucket, shard.shard))
    assert numbers(tmp_path, [("size", ">", 0.5)]) == of_videos(1, 2, 3)
    assert numbers(tmp_path, [("old", "=", "x")]) == of_videos(0, 1)
    found: dict[int, tuple[Any, ...]] = {}
    for batch in open_dataset(tmp_path, ("motion", "size", "old", "new")):
        assert [batch[name].dtype for name in ("size", "new")] == [torch.float64] * 2
        values = zip(batch["size"].tolist(), batch["old"], batch["new"].tolist(), strict=True)
        found |= dict(zip(numbers_in(batch["motion"]), values, strict=True))
    assert found[4][:2] == (1.0, "x")
    assert math.isnan(found[4][2])
    assert found[8] == (2.5, "", 1.0)


FACTS = ("aesthetic score", "frames", "good", "camera motion", "rating", "votes", "psnr", "bucket")


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_facts_are_fields_of_batches_and_entries(tmp_path: Path, container: Any) -> None:
    store = write_store(tmp_path, SPEC, container=container)
    ids = store.plan.clips["clip_id"].to_pylist()
    quality = {"clip_id": ids[:9], "psnr": [20.0 + n for n in range(9)]}
    pq.write_table(pa.table(quality), tmp_path / "quality.parquet")
    columns = ("motion", "scores", "scores.motion", "brightness", "captions", *FACTS)
    dataset = open_dataset(store, columns, filters=[("motion", ">", 3)])
    table = LatentTable(store, columns)
    seen = 0
    for batch in LatentLoader(dataset):
        kinds = ("scores.motion", "brightness", "aesthetic score", "frames", "good", "votes")
        dtypes = [batch[name].dtype for name in kinds]
        float32, float64 = torch.float32, torch.float64
        assert dtypes == [float32, float32, float64, torch.int64, torch.bool, float64]
        for i, number in enumerate(numbers_in(batch["motion"])):
            seen += 1
            entry, said = table[number], told(number // CLIPS)
            scores = scores_of(number)
            assert np.array_equal(batch["scores"][i].numpy(), scores, equal_nan=True)
            assert batch["scores.motion"][i] == number == entry["scores"]["motion"]
            assert entry["scores.motion"] == number
            assert batch["captions"][i] == entry["captions"] == 1
            for name in FACTS[:6]:
                value = batch[name][i] if isinstance(batch[name], list) else batch[name][i].item()
                assert entry[name] == said.get(name)
                assert value == said[name] if name in said else math.isnan(value)
            assert entry["psnr"] == (20 + number if number < 9 else None)
            assert batch["bucket"] == "16x32x32"
    assert seen == dataset.num_samples == 20


def test_facts_of_sequences_have_an_axis_for_their_clips(store: Store) -> None:
    columns = ("motion", "frames", "camera motion", "brightness")
    for batch in open_dataset(store, columns, clips_per_sample=2):
        assert batch["frames"].shape == batch["brightness"].shape == (len(batch["motion"]), 2)
        assert [len(pair) for pair in batch["camera motion"]] == [2] * len(batch["motion"])


def test_fields_that_do_not_exist_are_named(store: Store) -> None:
    with pytest.raises(StoreError, match=r"no column 'brightnes'.*did you mean 'brightness'"):
        open_dataset(store, ("motion", "brightnes"))
    with pytest.raises(StoreError, match="no column 'brightnes'"):
        LatentTable(store, ["brightnes"])
    with pytest.raises(ConfigError, match="name one or more of the store's"):
        open_dataset(store, ("frames",))
    assert open_dataset(store, ("brightness",)).num_samples == COUNT


def test_mixed_stores_give_fields_of_one_type(store: Store, tmp_path: Path) -> None:
    other = write_store(tmp_path, SPEC, extra=lambda video: {"frames": 0.5, "good": True})
    mixed = LatentDataset([store, other], ("motion", "frames", "good"), batch_size=6)
    for batch in mixed:
        assert (batch["frames"].dtype, batch["good"].dtype) == (torch.float64, torch.bool)
    with pytest.raises(ConfigError, match="rating"):
        LatentDataset([store, other], ("motion", "rating"), batch_size=6)


FILTERS = (
    None,
    [("motion", ">", 4)],
    [("brightness", "<", 3)],
    [[("good", "=", True)], [("rating", ">", 3), ("motion", "<", 20)]],
)


@settings(max_examples=6)
@given(
    st.sampled_from(FILTERS),
    st.sampled_from([(1, 4), (2, 2), (4, 1)]),
    st.integers(0, 2**31),
    st.integers(0, 2),
    st.booleans(),
)
def test_ranks_and_resume_see_each_clip_that_passes_once(
    store: Store, filters: Any, shape: tuple[int, int], seed: int, epoch: int, sequences: bool
) -> None:
    """The order is a function of store, filters and seed: ranks and resuming change nothing."""
    world, per_rank = shape
    options: dict[str, Any] = {
        "filters": filters,
        "seed": seed,
        "global_batch_size": world * per_rank,
        "batch_size": None,
        "clips_per_sample": 1 + sequences,
        "window_shards": 1 + seed % 3,
    }
    whole = open_dataset(store, **options)
    expected = [
        numbers_in(whole.batch(epoch, k)["motion"]) for k in range(whole.num_batches(epoch))
    ]
    ranks = [open_dataset(store, rank=r, world_size=world, **options) for r in range(world)]
    stop = seed % max(1, len(expected))
    found: list[list[int]] = [[] for _ in expected]
    for rank in ranks:
        rank.set_epoch(epoch)
        batches = iter(rank)
        for k in range(stop):
            found[k] += numbers_in(next(batches)["motion"])
        state = rank.state_dict()
        again = open_dataset(store, rank=rank.rank, world_size=world, **options)
        again.load_state_dict(state)
        for k, batch in enumerate(again, start=stop):
            found[k] += numbers_in(batch["motion"])
    assert found == expected
    clips = sorted(n for batch in expected for n in batch)
    assert len(clips) == len(set(clips))
    if not sequences:
        assert set(clips) == numbers(store, filters)
    others = FILTERS[(FILTERS.index(filters) + 1) % len(FILTERS)]
    with pytest.raises(ConfigError, match=r"samples|selection"):
        open_dataset(store, **{**options, "filters": others}).load_state_dict(state)


VALUES = st.one_of(st.none(), st.just(math.nan), st.integers(-3, 3), st.floats(-3, 3))


@given(
    st.lists(VALUES, min_size=1, max_size=8),
    st.sampled_from(["=", "==", "!=", "<", ">", "<=", ">=", "in", "not in"]),
    st.integers(-3, 3),
)
def test_conditions_are_pyarrows_but_for_what_is_not_known(
    values: list[float | None], op: str, bound: int
) -> None:
    value = [bound, bound + 1] if op.endswith("in") else bound
    column = pa.array(values, pa.float64(), from_pandas=True)
    ours = passing(parse_conditions([("x", op, value)]), pa.table({"x": column}))
    expression = pq.filters_to_expression([("x", op, value)])
    known = pa.table({"x": column, "n": range(len(values))}).filter(~pc.field("x").is_null())
    theirs = known.filter(expression)["n"].to_pylist()
    assert np.flatnonzero(ours).tolist() == theirs


@pytest.mark.parametrize("number", [2**60 + 1, 2.0**60, 2.5])
def test_large_whole_numbers_are_compared_with_any_number(number: float) -> None:
    table = pa.table({"x": pa.array([2**60 + 1, 1, None], pa.int64())})
    for op, value in (("in", [number]), (">=", number), ("<", number)):
        large = passing(parse_conditions([("x", op, value)]), table).tolist()[0]
        assert large == ((number > 3) if op == "in" else op == ">=")


def chosen(store: Store, **selection: Any) -> list[int]:
    ids = store.plan.clips["clip_id"].to_pylist()
    return [ids.index(clip.clip_id) for clip in select_clips(store, Selection(**selection))]


def test_clips_to_look_at_are_sorted_and_filtered(store: Store) -> None:
    assert chosen(store, sort="motion", num=3) == [0, 1, 2]
    assert chosen(store, sort="-motion", num=3) == [23, 22, 21]
    assert [n % 5 for n in chosen(store, sort="brightness", num=COUNT)][-4:] == [3] * 4
    assert len(chosen(store, sort="brightness", num=COUNT)) == 20  # those of which it is known
    assert chosen(store, sort="-aesthetic score", num=2, filters="good = True") == [16, 17]
    drawn = chosen(store, filters="[('motion', '>', 15)]", num=4)
    assert drawn == sorted(drawn) == chosen(store, filters="motion > 15", num=4)
    assert set(drawn) < set(range(16, 24))
    assert chosen(store, sort="psnr", num=2, filters="motion > 4") == [5, 6]
    with pytest.raises(ConfigError, match="did you mean 'motion'"):
        chosen(store, sort="motoin")
    for wrong in ({"worst": True, "sort": "motion"}, {"ids": ("a",), "sort": "motion"}):
        with pytest.raises(ConfigError):
            Selection(**wrong)
    with pytest.raises(ConfigError, match="write a list"):
        StatsOptions(filters="motion")


def test_stats_are_of_the_clips_that_pass(store: Store) -> None:
    words = ["stats", store.files.url, "--look", "0", "--filters"]
    result = CliRunner().invoke(main, [*words, "motion >= 22", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    rows = [moments_of(number)[:2].astype(float) for number in (22, 23)]
    mean = np.mean(rows, axis=(0, 2, 3, 4))
    assert said["clips"] == 2
    assert said["statistics"]["motion/all"]["mean"]["mean"] == pytest.approx(mean.tolist())
    every = CliRunner().invoke(main, [*words, "rating > 0"])
    assert "16 clips" in every.output
    assert "8 clips have no rating" in every.output


def test_info_shows_the_range_of_what_is_known(store: Store) -> None:
    shown = CliRunner().invoke(main, ["info", store.files.url]).output
    line = next(line for line in shown.splitlines() if line.startswith("motion "))
    assert line.split()[1:] == ["24", "0", "0", "1.15", "5.75", "11.5", "17.25", "21.85", "23"]
    assert "3 texts" in next(line for line in shown.splitlines() if "camera motion" in line)
    found = json.loads(CliRunner().invoke(main, ["info", store.files.url, "--json"]).stdout)
    known = found["known_of_clips"]
    assert known["rating"] == {"known": 16, "missing": 8, "quantiles": ANY, "texts": 0}
    assert (known["psnr"]["quantiles"][0], known["psnr"]["missing"]) == (20, 15)
    assert known["brightness"]["missing"] == 4
