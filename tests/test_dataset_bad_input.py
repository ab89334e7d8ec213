"""What is wrong with a store or a call is said in one clear error, or skipped and counted."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from reducio_latents.dataset import LatentDataset, LatentLoader
from reducio_latents.errors import ConfigError, LatentsError, StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.meta import ROOT
from reducio_latents.store.writer import ColumnRows, StoreWriter
from tests.latent_stores import StoreSpec, numbers_in, plan_store, write_shard, write_store
from tests.stores import put_commit

BUCKET = "16x32x32"
SPEC = StoreSpec(columns=("motion", "content_image", "caption", "text"))


def file_of(store: Store, column: str, shard: int = 1) -> Path:
    return Path(store.files.url) / store.index.entries[column, ShardKey(BUCKET, shard)].file


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def flip(offset: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 0x10
        path.write_bytes(data)

    return change


def read_all(path: Path, columns: tuple[str, ...] = ("motion",), **options: Any) -> list[int]:
    dataset = LatentDataset(
        path, columns, batch_size=6, latents="moments", drop_last=False, **options
    )
    return [n for batch in dataset for n in numbers_in(batch["motion"])]


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (truncate, {}, "bytes, its commit says .* truncated"),
        (Path.unlink, {}, "is missing"),
        (flip(-3), {}, "damaged index"),
        (flip(-9), {}, "damaged index"),
        (flip(3), {"checksums": "full"}, "row 0 does not match its checksum"),
    ],
)
def test_a_damaged_shard_is_named_with_its_remedy(
    tmp_path: Path, damage: Callable[[Path], None], options: dict[str, Any], message: str
) -> None:
    store = write_store(tmp_path)
    path = file_of(store, "motion")
    damage(path)
    with pytest.raises(StoreError, match=message) as caught:
        read_all(tmp_path, **options)
    assert str(path) in str(caught.value)
    assert "verify" in str(caught.value)


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_what_cannot_be_read_is_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, container: Any
) -> None:
    store = write_store(tmp_path, SPEC, container=container)
    commit = store.commit(ShardKey(BUCKET, 1), "motion")
    offset, _ = store.ranges(commit)[2]
    flip(int(offset))(file_of(store, "motion"))
    truncate(file_of(store, "motion", 2))
    dataset = LatentDataset(
        tmp_path,
        ("motion", "caption", "clip_id"),
        batch_size=12,
        latents="moments",
        checksums="full",
        on_error="skip",
        window_shards=3,
    )
    with caplog.at_level(logging.WARNING):
        batches = list(dataset)
    found = [n for batch in batches for n in numbers_in(batch["motion"])]
    assert sorted(found) == [n for n in range(16) if n != 10]
    assert sum(batch["skipped"] for batch in batches) == 9
    assert sum(dataset.skipped.values()) == 9
    for batch in batches:
        assert len(batch["caption"]) == len(batch["clip_id"]) == len(batch["motion"])
        assert len(batch["motion"]) + batch["skipped"] == 12
    assert any("checksum" in record.message for record in caplog.records)
    through_workers = DataLoader(dataset, batch_size=None, num_workers=1)
    assert sum(batch["skipped"] for batch in through_workers) == 9


WAYS: dict[str, Callable[[LatentDataset], Any]] = {
    "dataset": lambda dataset: dataset,
    "LatentLoader": lambda dataset: LatentLoader(dataset, device="cpu"),
    "DataLoader(2)": lambda d: DataLoader(d, batch_size=None, num_workers=2),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_of_which_nothing_is_left_is_passed_and_counted(tmp_path: Path, way: str) -> None:
    store = write_store(tmp_path)
    truncate(file_of(store, "motion"))  # the second of three shards of 8 rows
    options: dict[str, Any] = {"latents": "moments", "on_error": "skip", "checksums": "full"}
    dataset = LatentDataset(tmp_path, batch_size=4, shuffle=False, **options)
    loader = WAYS[way](dataset)
    for _ in range(2):  # epochs
        batches = list(loader)
        numbers = [numbers_in(batch["motion"]) for batch in batches]
        assert sorted(numbers) == [[0, 1, 2, 3], [4, 5, 6, 7], [16, 17, 18, 19], [20, 21, 22, 23]]
        assert sum(batch["skipped"] for batch in batches) == 8
    if way != "DataLoader(2)":
        assert dataset.state_dict()["epoch"] == 2
        assert sum(dataset.skipped.values()) == 16
    with pytest.raises(StoreError, match=r"nothing of a batch can be read: .*truncated"):
        dataset.batch(0, 2)


def test_a_state_after_a_lost_batch_goes_on_behind_it(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    truncate(file_of(store, "motion", 0))
    options: dict[str, Any] = {"latents": "moments", "on_error": "skip", "shuffle": False}
    loader = LatentLoader(LatentDataset(tmp_path, batch_size=4, **options))
    batch = next(iter(loader))
    assert (numbers_in(batch["motion"]), batch["skipped"]) == ([8, 9, 10, 11], 8)
    assert loader.state_dict()["batch"] == 3
    resumed = LatentDataset(tmp_path, batch_size=4, **options)
    resumed.load_state_dict(loader.state_dict())
    assert numbers_in(next(iter(resumed))["motion"]) == [12, 13, 14, 15]


def test_a_bucket_may_be_lost_as_a_whole(tmp_path: Path) -> None:
    buckets = ("16x32x32", "16x32x64")
    store = write_store(tmp_path, StoreSpec(videos=12, buckets=buckets))
    clips = dict.fromkeys(buckets, 0)
    for batch in LatentDataset(tmp_path, batch_size=1, latents="moments"):
        clips[batch["bucket"]] += 1
    for (_, key), entry in store.index.entries.items():
        if key.bucket == buckets[0]:
            truncate(tmp_path / entry.file)
    dataset = LatentDataset(tmp_path, batch_size=1, latents="moments", on_error="skip")
    assert [batch["bucket"] for batch in dataset] == [buckets[1]] * clips[buckets[1]]
    assert sum(dataset.skipped.values()) == clips[buckets[0]] > 0


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_of_which_nothing_is_left_is_an_error(tmp_path: Path, way: str) -> None:
    store = write_store(tmp_path)
    for shard in range(3):
        truncate(file_of(store, "motion", shard))
    dataset = LatentDataset(tmp_path, batch_size=8, on_error="skip")
    with pytest.raises(StoreError, match="nothing of epoch 0 can be read"):
        list(WAYS[way](dataset))


@pytest.mark.parametrize(
    ("column", "payload"),
    [
        ("content_image", b"no image"),
        ("content_image", None),
        ("caption", b"\xff\xfe"),
        ("text", b"\x01"),
    ],
)
def test_a_row_that_cannot_be_decoded_costs_only_itself(
    tmp_path: Path, column: str, payload: bytes | None
) -> None:
    """The bytes are those that were committed, so no checksum tells."""
    store = write_store(tmp_path, SPEC)
    if payload is None:  # an image of another size
        out = io.BytesIO()
        Image.new("RGB", (8, 8)).save(out, "PNG")
        payload = out.getvalue()
    key = ShardKey(BUCKET, 1)
    rows = [store.read_row(key, row, column) for row in range(8)]
    rows[3] = payload
    clips = store.plan.shard_clips(*key)["clip_id"].to_pylist()
    StoreWriter(store.files, store.meta).write_shard(key, clips, {column: ColumnRows(rows=rows)})
    store.files.delete("index.json")
    with pytest.raises(StoreError):
        read_all(tmp_path, ("motion", column))
    found = read_all(tmp_path, ("motion", column), on_error="skip")
    assert sorted(found) == [n for n in range(24) if n != 11]


def test_of_a_mixture_only_the_damaged_rows_are_skipped(tmp_path: Path) -> None:
    write_store(tmp_path / "a", videos=3)
    store = write_store(tmp_path / "b", videos=5)
    for row in (0, 3, 4, 6):
        offset, _ = store.ranges(store.commit(ShardKey(BUCKET, 1), "motion"))[row]
        flip(int(offset))(file_of(store, "motion"))
    dataset = LatentDataset(
        [tmp_path / "a", tmp_path / "b"],
        ("motion", "clip_id"),
        batch_size=16,
        latents="moments",
        checksums="full",
        on_error="skip",
    )
    numbers = {name: i for i, name in enumerate(store.plan.clips["clip_id"].to_pylist())}
    found = []
    for batch in dataset:
        assert [numbers[name] for name in batch["clip_id"]] == numbers_in(batch["motion"])
        found += numbers_in(batch["motion"])
    assert sum(dataset.skipped.values()) == 4
    assert sorted(found) == sorted([*range(12), *(set(range(20)) - {8, 11, 12, 14})])


def test_a_sequence_with_a_damaged_clip_is_skipped_whole(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    flip(3)(file_of(store, "motion"))
    dataset = LatentDataset(
        tmp_path,
        batch_size=2,
        clips_per_sample=2,
        latents="moments",
        checksums="full",
        on_error="skip",
    )
    found = [n for batch in dataset for n in numbers_in(batch["motion"].flatten(0, 1))]
    assert sorted(found) == [n for n in range(24) if n not in (8, 9)]


def test_a_store_that_is_being_written_gives_what_is_there(tmp_path: Path) -> None:
    spec = StoreSpec(columns=("motion", "caption"))
    writer = plan_store(LocalFiles(tmp_path), spec)
    with pytest.raises(StoreError, match="no shard yet with all of motion, caption"):
        LatentDataset(tmp_path, ("motion", "caption"), batch_size=1)
    write_shard(writer, spec, ShardKey(BUCKET, 1))
    write_shard(writer, spec, ShardKey(BUCKET, 0), ["motion"])
    assert not (tmp_path / "index.json").exists()
    assert sorted(read_all(tmp_path)) == list(range(16))
    assert sorted(read_all(tmp_path, ("motion", "caption"))) == list(range(8, 16))


def test_a_shard_of_another_encoder_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    commit = store.commit(ShardKey(BUCKET, 2), "motion")
    put_commit(store.files, replace(commit, fingerprint="0" * 64))
    store.files.delete("index.json")
    with pytest.raises(StoreError, match=f"{BUCKET}/000002 of motion.*fingerprint 000000000000"):
        LatentDataset(tmp_path, batch_size=1)


def test_a_place_that_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a latent store"):
        LatentDataset(tmp_path, batch_size=1)
    with pytest.raises(StoreError, match="not a latent store"):
        LatentDataset(str(tmp_path / "missing"), batch_size=1)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "give batch_size"),
        ({"batch_size": 2, "global_batch_size": 2}, "give batch_size"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"global_batch_size": 10, "rank": 0, "world_size": 4}, "divide among 4 ranks. Use 8"),
        ({"global_batch_size": 2, "rank": 0, "world_size": 4}, "Use 4"),
        ({"batch_size": 25}, f"global batch is 25 samples.*{BUCKET}: 24.* size of 24 a rank"),
        ({"batch_size": 7, "rank": 0, "world_size": 4}, "global batch is 28.* size of 6 a rank"),
        ({"batch_size": "4"}, "batch_size must be a whole number, got '4'"),
        ({"global_batch_size": 4.0}, "global_batch_size must be a whole number"),
        ({"batch_size": 1, "seed": None}, "seed must be a whole number, got None"),
        ({"batch_size": 1, "rank": "0", "world_size": 1}, "rank must be a whole number"),
        ({"batch_size": 1, "columns": None}, "name one or more"),
        ({"batch_size": 1, "rank": 0}, "both rank and world_size"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank 2 is not one of 2"),
        ({"batch_size": 1, "columns": ()}, "name one or more"),
        ({"batch_size": 1, "columns": ("clip_id",)}, "name one or more"),
        ({"batch_size": 1, "columns": ("motion", "motion")}, "each once"),
        (
            {"batch_size": 1, "columns": ("motion", "depth")},
            "no column 'depth'; it has caption",
        ),
        ({"batch_size": 1, "weights": [1, 2]}, "weights"),
        ({"batch_size": 1, "weights": [0]}, "weights"),
        ({"batch_size": 1, "weights": ["1"]}, "weights"),
        (
            {"batch_size": 1, "columns": ("caption",), "normalize": "channel"},
            "about motion, which is not among columns",
        ),
        ({"batch_size": 1, "normalise": "channel"}, "did you mean 'normalize'"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(
    tmp_path: Path, keywords: dict[str, Any], message: str
) -> None:
    write_store(tmp_path, columns=("motion", "caption"))
    with pytest.raises(LatentsError, match=message):
        LatentDataset(tmp_path, **keywords)


@pytest.mark.parametrize("stores", [[], None, 3])
def test_no_store_at_all_is_an_error(stores: Any) -> None:
    with pytest.raises(ConfigError, match="no store"):
        LatentDataset(stores, batch_size=1)


def test_a_bucket_that_never_fills_a_batch_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_store(tmp_path, videos=5, buckets=(BUCKET, "16x32x64"))
    with caplog.at_level(logging.WARNING):
        dataset = LatentDataset(tmp_path, batch_size=10)
    assert "16x32x64" in caplog.text
    assert {batch["bucket"] for batch in dataset} == {BUCKET}


def test_statistics_that_are_not_there_yet_are_asked_for_in_vain(tmp_path: Path) -> None:
    spec = StoreSpec()
    writer = plan_store(LocalFiles(tmp_path), spec)
    write_shard(writer, spec, ShardKey(BUCKET, 0))
    with pytest.raises(ConfigError, match="statistics of motion"):
        LatentDataset(tmp_path, batch_size=1, normalize="channel")


def test_a_column_without_a_final_rule_gives_moments_only(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    motion = replace(store.meta.columns["motion"], final=None)
    store.files.write(ROOT, replace(store.meta, columns={"motion": motion}).to_json())
    with pytest.raises(ConfigError, match='latents="moments"'):
        LatentDataset(tmp_path, batch_size=1)
    dataset = LatentDataset(tmp_path, batch_size=1, latents="moments")
    assert dataset.batch(0, 0)["motion"].shape[0] == 1
    with pytest.raises(ConfigError, match="no rule"):
        dataset.final_rule()
    with pytest.raises(StoreError, match="no column 'depth'"):
        dataset.final_rule("depth")


def test_a_batch_that_there_is_not_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path)
    dataset = LatentDataset(tmp_path, batch_size=12)
    for number in (-1, 2):
        with pytest.raises(ConfigError, match="batches 0 to 1"):
            dataset.batch(0, number)
    with pytest.raises(ConfigError, match="epoch must be"):
        dataset.set_epoch(-1)


def test_an_error_in_a_thread_comes_in_its_place(tmp_path: Path) -> None:
    store = write_store(tmp_path, videos=12)
    truncate(file_of(store, "motion", 3))
    loader = LatentLoader(LatentDataset(tmp_path, batch_size=8, shuffle=False), prefetch=6)
    batches = iter(loader)
    for _ in range(3):
        assert isinstance(next(batches)["latents"], torch.Tensor)
    with pytest.raises(StoreError, match="truncated"):
        next(batches)
    assert loader.state_dict()["batch"] == 3


def test_a_loader_needs_a_thread_and_a_batch(tmp_path: Path) -> None:
    write_store(tmp_path)
    dataset = LatentDataset(tmp_path, batch_size=8)
    with pytest.raises(ConfigError, match=">= 1"):
        LatentLoader(dataset, threads=0)
    with pytest.raises(ConfigError, match=">= 1"):
        LatentLoader(dataset, prefetch=0)


def test_a_device_that_there_is_not_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path)
    dataset = LatentDataset(tmp_path, batch_size=8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU"):
        LatentLoader(dataset, device="cuda:1")
    with pytest.raises(ConfigError, match="does not know"):
        LatentLoader(dataset, device="gpu")
