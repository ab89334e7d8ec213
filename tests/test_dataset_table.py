"""Any clip by number or id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reducio_latents.dataset import LatentTable
from reducio_latents.errors import LatentsError, StoreError
from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey
from tests.latent_stores import StoreSpec, image_of, moments_of, numbers_in, text_of, write_store

SPEC = StoreSpec(
    videos=5,
    clips_per_video=3,
    columns=("motion", "content_image", "caption", "text"),
    failed=frozenset({4}),
    duplicates={3: 0},
    captions=lambda video: (f"first {video}", f"second {video}"),
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LatentTable:
    folder = tmp_path_factory.mktemp("table")
    write_store(folder, SPEC)
    return LatentTable(folder)


def test_an_entry_holds_the_clip_and_all_its_columns(table: LatentTable) -> None:
    entry = table[7]
    assert entry.keys() == {"clip_id", "video", "start_s", "bucket", *SPEC.columns}
    assert (entry["video"], entry["start_s"]) == ("folder/00002.mp4", 2.0)
    assert entry["bucket"] == "16x32x32"
    assert torch.equal(entry["motion"], torch.from_numpy(moments_of(8)))
    picture = torch.from_numpy(image_of(8, "16x32x32").transpose(2, 0, 1))
    assert torch.equal(entry["content_image"], picture)
    assert entry["caption"] == "first 2"
    assert np.array_equal(entry["text"], text_of(8, 0))
    entry["motion"][0] = 0  # a copy: nothing else changes
    assert table[7]["motion"].any()


def test_clips_are_numbered_in_the_plans_order_without_those_that_failed(
    table: LatentTable,
) -> None:
    assert len(table) == 14
    own = [numbers_in(entry["motion"][None])[0] for entry in table][:11]
    assert own == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert [entry["clip_id"] for entry in table] == table.clip_ids


def test_a_clip_is_found_by_its_id(table: LatentTable) -> None:
    for number, name in enumerate(table.clip_ids):
        assert name in table
        assert table[name]["clip_id"] == name
        assert torch.equal(table[name]["motion"], table[number]["motion"])


def test_a_duplicate_has_its_originals_rows_and_its_own_name(table: LatentTable) -> None:
    entry = table[-1]
    assert entry["video"] == "folder/00003.mp4"
    assert torch.equal(entry["motion"], table[2]["motion"])


def test_only_the_columns_that_were_asked_for_are_needed(tmp_path: Path) -> None:
    store = write_store(tmp_path, SPEC)
    for path in list(store.files.list("16x32x32/content_image")):
        store.files.delete(path)
    assert LatentTable(store, ["caption"])[0]["caption"] == "first 0"
    with pytest.raises(StoreError, match="no column 'size'"):
        LatentTable(store, ["size"])


def test_a_clip_that_is_not_there_is_named(table: LatentTable) -> None:
    failed = table.store.plan.clips["clip_id"][4].as_py()
    assert failed not in table
    with pytest.raises(KeyError, match="failed, or is not done yet"):
        table[failed]
    with pytest.raises(LatentsError, match=r"clip nobody is not in its plan\.$"):
        table["nobody"]
    for number in (14, -15):
        with pytest.raises(IndexError, match="14 clips"):
            table[number]


def test_a_damaged_row_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    path = tmp_path / store.index.entries["motion", ShardKey("16x32x32", 0)].file
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    fresh = LatentTable(Store(store.files))
    with pytest.raises(StoreError, match="row 0 does not match its checksum"):
        fresh[0]
    assert fresh[1]["clip_id"]
