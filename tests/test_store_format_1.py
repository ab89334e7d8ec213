"""Stores that the first version wrote are read as they were then: `golden/format_1_*.zip`."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from reducio_latents import LatentDataset, LatentTable, open_store
from reducio_latents.core.choices import Container
from reducio_latents.files import LocalFiles
from reducio_latents.upkeep.convert import convert_store
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


def test_it_can_be_converted(store: Path, tmp_path: Path) -> None:
    opened = open_store(store)
    other: Container = "webdataset" if opened.meta.container == "zarr" else "zarr"
    convert_store(opened, LocalFiles(tmp_path / "other"), other)
    assert rows_of(tmp_path / "other") == ROWS
