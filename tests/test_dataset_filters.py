"""Which clips a dataset reads: each filter keeps what it says, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reducio_latents.corpus.build import plan_part
from reducio_latents.dataset import LatentDataset, LatentTable
from reducio_latents.dataset.batches import ReadOptions
from reducio_latents.dataset.filters import Filters
from reducio_latents.dataset.options import DatasetOptions, OrderOptions, parse_options
from reducio_latents.dataset.selection import sequence_starts
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store import Store
from reducio_latents.store.plan import read_plan, write_part
from tests.latent_stores import StoreSpec, numbers_in, record_of, video_of, write_store


def numbers(store: Path | Store, **filters: Any) -> set[int]:
    """Return the numbers of the clips that a dataset reads."""
    dataset = LatentDataset(
        store, batch_size=3, latents="moments", drop_last=False, shuffle=False, **filters
    )
    found = [n for batch in dataset for n in numbers_in(batch["motion"])]
    assert len(found) == len(set(found)) == dataset.num_samples
    return set(found)


def ids(store: Store) -> list[str]:
    found: list[str] = store.plan.clips["clip_id"].to_pylist()
    return found


def test_failed_clips_are_never_read(tmp_path: Path) -> None:
    write_store(tmp_path, failed=frozenset({0, 7, 8, 23}))
    assert numbers(tmp_path) == set(range(24)) - {0, 7, 8, 23}


def test_a_clip_that_lacks_one_of_the_columns_is_not_read(tmp_path: Path) -> None:
    from reducio_latents.store.commit import ShardKey
    from reducio_latents.store.writer import StoreWriter

    store = write_store(tmp_path, columns=("motion", "caption"))
    writer = StoreWriter(store.files, store.meta)
    writer.drop_commit(ShardKey("16x32x32", 1), "caption")
    assert numbers(Store(store.files)) == set(range(24))
    both = LatentDataset(
        tmp_path, ("motion", "caption"), batch_size=1, latents="moments", shuffle=False
    )
    assert [numbers_in(b["motion"])[0] for b in both] == [*range(8), *range(16, 24)]


def test_buckets_can_be_chosen(tmp_path: Path) -> None:
    store = write_store(tmp_path, buckets=("16x32x32", "16x32x64"))
    clips = store.plan.clips.to_pylist()
    wide = {i for i, clip in enumerate(clips) if clip["bucket"] == "16x32x64"}
    assert numbers(tmp_path, buckets="16x32x64") == wide
    assert numbers(tmp_path, buckets=["16x32x32", "16x32x64"]) == set(range(24))


def test_clips_without_a_caption_can_be_left_out(tmp_path: Path) -> None:
    write_store(tmp_path, captions=lambda video: ("text",) * (video % 3))
    assert numbers(tmp_path, require_caption=True) == {n for n in range(24) if n // 4 % 3}


def test_clips_below_a_psnr_can_be_left_out(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    quality = {"clip_id": ids(store)[:10], "psnr": [20.0 + n for n in range(10)], "ssim": [1] * 10}
    pq.write_table(pa.table(quality), tmp_path / "quality.parquet")
    assert numbers(tmp_path, min_psnr=25) == set(range(5, 10))


def test_clips_can_be_named_one_by_one_or_in_a_file(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", failed=frozenset({5}))
    wanted = [3, 5, 9, 20]
    names = [ids(store)[n] for n in wanted]
    assert numbers(store, clip_ids=names) == {3, 9, 20}
    assert numbers(store, clip_ids=iter(names)) == {3, 9, 20}
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"clip_id": pa.array(names, pa.string()).cast(kind)})
        pq.write_table(table, tmp_path / "list.parquet")
        assert numbers(store, clip_ids=tmp_path / "list.parquet") == {3, 9, 20}


def test_a_duplicate_that_is_named_means_its_originals_rows(tmp_path: Path) -> None:
    store = write_store(tmp_path, duplicates={4: 1})
    clips = store.plan.clips.to_pylist()
    named = [c["clip_id"] for c in clips if c["status"] == "duplicate"][:2]
    assert numbers(store, clip_ids=named) == {4, 5}
    assert numbers(store) == set(range(20))


def test_filters_are_combined(tmp_path: Path) -> None:
    store = write_store(tmp_path, captions=lambda video: ("text",) * (video % 2))
    names = [ids(store)[n] for n in range(0, 24, 3)]
    wanted = {n for n in range(0, 24, 3) if n // 4 % 2}
    assert numbers(store, clip_ids=names, require_caption=True) == wanted


def test_a_split_divides_the_videos_and_never_a_video(tmp_path: Path) -> None:
    store = write_store(tmp_path, videos=40, clips_per_video=3)
    train = numbers(store, split="train", val_fraction=0.3)
    held_out = numbers(store, split="val", val_fraction=0.3)
    assert not train & held_out
    assert train | held_out == set(range(120))
    assert not {n // 3 for n in train} & {n // 3 for n in held_out}
    assert 6 <= len(held_out) / 3 <= 16  # 12 in the mean; they are the same 40 hashes every time


def test_no_table_of_clips_is_held_once_they_are_chosen(tmp_path: Path) -> None:
    """It would be 250 MB a million clips, in every rank."""
    store = write_store(tmp_path)
    dataset = LatentDataset(store, ("motion", "clip_id"), batch_size=3, split="train")
    assert "plan" not in vars(dataset.sources[0].store)
    assert len(dataset.batch(0, 0)["clip_id"]) == 3  # it is read again where it is asked for


def test_a_split_is_stable_when_videos_are_added_and_under_a_larger_fraction(
    tmp_path: Path,
) -> None:
    def held_out(videos: int, fraction: float) -> set[str]:
        path = tmp_path / f"{videos}-{fraction}"
        if not path.exists():
            write_store(path, videos=videos, clips_per_video=1)
        dataset = LatentDataset(
            path,
            ("motion", "video"),
            batch_size=1,
            split="val",
            val_fraction=fraction,
            drop_last=False,
        )
        return {batch["video"][0] for batch in dataset}

    few, many = held_out(30, 0.3), held_out(60, 0.3)
    assert few == {name for name in many if name < "folder/00030.mp4"}
    assert many < held_out(60, 0.6)


def test_copies_of_a_video_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    """Also where each copy was encoded: the hash is of the bytes."""
    spec = StoreSpec(videos=20, clips_per_video=1, duplicates={i: i - 10 for i in range(10, 20)})
    store = write_store(tmp_path, spec)
    names = LatentDataset(store, ("motion", "video"), batch_size=1, split="val", val_fraction=0.5)
    assert {Path(batch["video"][0]).stem < "00010" for batch in names} == {True}


def test_clips_of_videos_added_later_are_read_too(tmp_path: Path) -> None:
    from reducio_latents.store.commit import ShardKey
    from reducio_latents.store.container import array_rows
    from reducio_latents.store.writer import StoreWriter
    from tests.latent_stores import write_shard

    store = write_store(tmp_path, videos=5)
    files = LocalFiles(tmp_path)
    more = StoreSpec(videos=8)
    plan = store.plan
    videos = [video_of(i, more) for i in range(8)]
    records = {v.video: record_of(i, more) for i, v in enumerate(videos)}
    write_part(files, 1, plan_part(videos, records, plan.spec, plan))
    grown = read_plan(files)
    assert grown is not None
    writer = StoreWriter.open(files, store.meta, array_rows(grown.shards(), 8))
    for shard in grown.shards()[3:]:
        write_shard(writer, more, ShardKey(shard.bucket, shard.shard))
    assert numbers(tmp_path) == set(range(32))
    assert numbers(tmp_path, require_caption=True) == set(range(32))
    names = {c["clip_id"] for c in grown.clips.to_pylist()}
    assert {entry["clip_id"] for entry in LatentTable(tmp_path)} == names


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30),
    st.integers(1, 5),
)
def test_sequences_are_runs_of_joined_usable_rows_and_do_not_overlap(
    rows: list[tuple[bool, bool]], length: int
) -> None:
    usable = np.array([u for u, _ in rows], np.bool_)
    joined = np.array([j for _, j in rows], np.bool_)
    joined[:1] = False
    starts = np.flatnonzero(sequence_starts(usable, joined, length)).tolist()
    covered: list[int] = []
    for start in starts:
        members = list(range(start, start + length))
        assert members[-1] < len(rows)
        assert usable[members].all()
        assert joined[members[1:]].all()
        covered += members
    assert len(covered) == len(set(covered))
    # Nothing that would have made one more sequence is left over, one after another.
    free, run = set(range(len(rows))) - set(covered), 0
    for row in range(len(rows)):
        run = (run + 1 if run and joined[row] else 1) if row in free and usable[row] else 0
        assert run < length


def test_options_are_those_of_the_dataclasses() -> None:
    fields = {
        name for cls in (OrderOptions, Filters, ReadOptions) for name in cls.__dataclass_fields__
    }
    assert set(DatasetOptions.__annotations__) == fields


def test_defaults_are_the_dataclasses_own() -> None:
    assert parse_options({}) == (OrderOptions(), Filters(), ReadOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_shard": 2}, "did you mean 'window_shards'"),
        ({"min_psnr": "high"}, "min_psnr must be"),
        ({"split": "test"}, "one of train, val"),
        ({"val_fraction": 1.5}, "between 0 and 1"),
        ({"clips_per_sample": 0}, "clips_per_sample"),
        ({"window_shards": 0}, "window_shards"),
        ({"latents": "raw"}, "one of sample, mean, moments"),
        ({"normalize": "channel", "latents": "moments"}, "normalize"),
        ({"text_tokens": 0}, "text_tokens"),
        ({"on_error": "ignore"}, "raise, skip"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LatentDataset(tmp_path, batch_size=1, **options)


def test_a_filter_that_cannot_be_tested_says_so(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    with pytest.raises(StoreError, match=r"quality\.parquet"):
        numbers(store, min_psnr=20)
    (tmp_path / "store" / "quality.parquet").write_text("no")
    with pytest.raises(StoreError, match="psnr"):
        numbers(store, min_psnr=20)
    with pytest.raises(ConfigError, match=r"1 clips that .* does not have"):
        numbers(store, clip_ids=["nobody"])
    pq.write_table(pa.table({"clip_id": [7]}), tmp_path / "numbers.parquet")
    for named in ([7], tmp_path / "numbers.parquet"):
        with pytest.raises(ConfigError, match=r"does not have, such as 7\."):
            numbers(store, clip_ids=named)
    with pytest.raises(ConfigError, match="not a Parquet file"):
        numbers(store, clip_ids=str(tmp_path / "missing.parquet"))
    with pytest.raises(ConfigError, match=r"no bucket '16x1x1'.*16x32x32"):
        numbers(store, buckets="16x1x1")


def test_filters_that_leave_nothing_are_named(tmp_path: Path) -> None:
    store = write_store(tmp_path, captions=lambda video: ())
    with pytest.raises(ConfigError, match="require_caption"):
        numbers(store, require_caption=True)
    with pytest.raises(ConfigError, match=r"\(split='val', val_fraction=0\.001\)"):
        numbers(store, split="val", val_fraction=0.001)
    with pytest.raises(ConfigError, match=r"clip_ids \(0 of them\)"):
        numbers(store, clip_ids=[])
