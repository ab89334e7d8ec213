"""Stores that the first version wrote are read as they were then: `golden/format_1_*.zip`."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from reducio_latents import LatentDataset, LatentTable, open_store
from reducio_latents.core.choices import Container
from reducio_latents.errors import StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store.commit import list_commits
from reducio_latents.store.container import array_rows
from reducio_latents.store.writer import StoreWriter
from reducio_latents.upkeep.convert import convert_store, read_payloads
from reducio_latents.upkeep.remove import remove_clips
from reducio_latents.upkeep.verify import verify

GOLDEN = Path(__file__).parent / "golden"
ROWS = "945b850a0fe953cc49b1e782bf3a95c67f1dae0644577889b3e2209f57425071"
"""SHA-256 of every row as that version gave it."""
ORDER = ["e6d48eabd560bc60_000001000", "db0f8b31c197bd80_000000000", "e6d48eabd560bc60_000000000"]
"""How that version shuffled the clips of epoch 0 for seed 3."""


@pytest.fixture(params=["zarr", "webdataset"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with zipfile.ZipFile(GOLDEN / f"format_1_{request.param}.zip") as archive:
        archive.extractall(tmp_path / "store")
    return tmp_path / "store"


def rows_of(store: Path) -> str:
    digest = hashlib.sha256()
    for clip in LatentTable(store):
        digest.update(clip["clip_id"].encode())
        for name in ("motion", "content_image"):
            digest.update(clip[name].numpy().tobytes())
        digest.update(clip["caption"].encode())
        digest.update(clip["frame_times"].numpy().tobytes())
    return digest.hexdigest()


def test_it_is_sound_and_every_row_is_what_it_was(store: Path) -> None:
    report = verify(open_store(store))
    assert report.ok, report.damage
    assert rows_of(store) == ROWS


def test_batches_come_in_the_order_that_they_had(store: Path) -> None:
    dataset = LatentDataset(store, ("motion", "clip_id"), batch_size=1, latents="mean", seed=3)
    assert [name for batch in dataset for name in batch["clip_id"]] == ORDER


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_it_can_be_converted(store: Path, container: Container, tmp_path: Path) -> None:
    """A Zarr store also to one that more readers can open."""
    opened, target = open_store(store), tmp_path / "other"
    if opened.meta.container == container == "webdataset":
        with pytest.raises(StoreError, match="is a webdataset store already"):
            convert_store(opened, LocalFiles(target), container)
        return
    convert_store(opened, LocalFiles(target), container)
    assert rows_of(target) == ROWS
    assert verify(open_store(target)).ok
    assert open_store(target).meta.format_version == 2


def test_who_goes_on_with_it_leaves_it_as_it_is(store: Path) -> None:
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    opened = open_store(store)
    rows = array_rows(opened.plan.shards(), opened.meta.shard_rows)
    files = LocalFiles(store)
    writer = StoreWriter.open(files, replace(opened.meta, format_version=2), rows)
    writer.write_coordinates(opened.plan)
    assert writer.meta.format_version == 1
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    for column, key in list_commits(files):  # and makes its rows as they were made
        payloads = read_payloads(files, opened.meta, opened.commit(key, column), {})
        if opened.meta.container == "zarr":
            packed = writer.layout.pack(files, opened.meta, key, [], {column: payloads})
            assert b"".join(packed[column].parts) == files.read(packed[column].path)


def test_clips_can_be_removed_from_it(store: Path) -> None:
    gone, *kept = ORDER
    assert remove_clips(store, clip_ids=[gone]).clips == 1
    report = verify(open_store(store))
    assert report.ok, report.damage
    dataset = LatentDataset(store, ("motion", "clip_id"), batch_size=1, latents="mean", seed=3)
    assert sorted(name for batch in dataset for name in batch["clip_id"]) == sorted(kept)
