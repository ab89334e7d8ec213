"""The published extraction's files become a store: every clip, its numbers, nothing made up."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from reducio_latents.cli import main
from reducio_latents.dataset import LatentDataset
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store import Store, open_store
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.plan import read_plan
from reducio_latents.store.text_rows import decode_text_row
from reducio_latents.upkeep.convert import convert_store
from reducio_latents.upkeep.extraction.importing import (
    ReferenceReport,
    import_reference,
)
from reducio_latents.upkeep.extraction.options import ReferenceOptions
from reducio_latents.upkeep.verify import verify
from tests.stores import KilledError, MemoryFiles

OPTIONS = ReferenceOptions(shard_rows=4)
WIDE, TALL = "16x32x64", "16x64x32"


def tensors(
    seed: int, clips: int, sides: tuple[int, int] = (1, 2), dtype: str = "float16"
) -> dict[str, NDArray[Any]]:
    """Return what the script saves for one video."""
    rng = np.random.RandomState(seed)
    h, w = sides
    shapes = {"z": (16, 4, h, w), "z_2d": (4, h * 4, w * 4), "z_clip": (6, 8)}
    found = {k: rng.standard_normal((clips, *s)).astype(dtype) for k, s in shapes.items()}
    about = {"ar": np.array(1.0, np.float32), "fps": np.array(16)}
    return {**found, **about, "MetaInfo_frame_idxs": np.arange(16 * clips)}


def save(folder: Path, name: str, values: dict[str, NDArray[Any]]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(values, folder / f"{name}.safetensors")


@pytest.fixture
def extracted(tmp_path: Path) -> Path:
    """Three videos of 3, 2 and 1 clips, one of them tall."""
    save(tmp_path / "z", "a_one.mp4", tensors(1, 3))
    save(tmp_path / "z", "b_two", tensors(2, 1, (2, 1)))
    save(tmp_path / "z", "c_three", tensors(3, 2))
    for seed, name in enumerate(("a_one.mp4", "b_two", "c_three")):
        save(tmp_path / "t5", name, text(seed, tokens=3 + seed))
    return tmp_path / "z"


def text(seed: int, tokens: int, dim: int = 5) -> dict[str, NDArray[Any]]:
    vectors = np.random.RandomState(seed).standard_normal((1, 120, dim)).astype(np.float32)
    mask = (np.arange(120) < tokens).astype(np.int64)[None]
    return {"caption_embs": vectors, "emb_masks": mask}


def run(folder: Path, files: MemoryFiles, with_text: bool = False) -> ReferenceReport:
    t5 = folder.with_name("t5") if with_text else None
    return import_reference(folder, files, t5, OPTIONS)


def test_every_clip_is_there_with_the_numbers_of_its_file(extracted: Path) -> None:
    files = MemoryFiles()
    report = run(extracted, files, with_text=True)
    assert (report.files, report.clips, report.failed) == (3, 6, {})
    assert (report.stored.shards, report.stored.rows, report.stored.failed) == (3, 24, 0)
    store = Store(files)
    assert verify(store).ok, verify(store).damage
    rows = [row for key in ((WIDE, 0), (WIDE, 1), (TALL, 0)) for row in clips_of(store, key)]
    expected = [("a_one.mp4", 1, k) for k in range(3)] + [("c_three", 3, k) for k in range(2)]
    expected.append(("b_two", 2, 0))
    assert [(row["video"], row["start_s"]) for row in rows] == [
        (v, float(k)) for v, _, k in expected
    ]
    for row, (_, seed, number) in zip(rows, expected, strict=True):
        key = ShardKey(row["bucket"], row["shard"])
        sides = (2, 1) if seed == 2 else (1, 2)
        file = tensors(seed, {1: 3, 2: 1, 3: 2}[seed], sides)
        for column, name in (("latents", "z"), ("content_latent_sample", "z_2d")):
            stored = store.read_row(key, row["row"], column)
            np.testing.assert_array_equal(stored, file[name][number])
        clip = store.read_row(key, row["row"], "content_clip")
        np.testing.assert_array_equal(clip, file["z_clip"][number])


def clips_of(store: Store, key: tuple[str, int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = store.plan.shard_clips(*key).to_pylist()
    return rows


def test_text_is_kept_without_its_padding_once_a_video(extracted: Path) -> None:
    files = MemoryFiles()
    run(extracted, files, with_text=True)
    store = Store(files)
    row = store.read_row(ShardKey(WIDE, 0), 1, "text")
    assert isinstance(row, bytes)
    [vectors] = decode_text_row(row)
    np.testing.assert_array_equal(vectors, text(0, 3)["caption_embs"][0, :3].astype(np.float16))
    ranges = store.ranges(store.commit(ShardKey(WIDE, 0), "text")).tolist()
    assert ranges[0] == ranges[1] == ranges[2] != ranges[3]


def test_the_store_says_what_its_columns_are_and_claims_no_moments(extracted: Path) -> None:
    files = MemoryFiles()
    run(extracted, files)
    meta = Store(files).meta
    assert {name: column.content for name, column in meta.columns.items()} == {
        "latents": "final latents",
        "content_latent_sample": "sample",
        "content_clip": "tokens",
    }
    assert {column.final for column in meta.columns.values()} == {None}
    assert meta.columns["latents"].config["weights"] == "unknown"
    assert meta.buckets == (WIDE, TALL)
    assert (meta.clip.frames, meta.clip.rate_fps) == (16, 16.0)
    assert meta.counts["clips"] == {"found": 6, "encoded": 6, "skipped": 0, "failed": 0}


def test_statistics_are_those_of_all_latents(extracted: Path) -> None:
    files = MemoryFiles()
    run(extracted, files)
    found = Store(files).meta.statistics[f"latents/{WIDE}"]["final"]
    values = np.concatenate([tensors(1, 3)["z"], tensors(3, 2)["z"]]).astype(np.float64)
    np.testing.assert_allclose(
        found["mean"], values.mean(axis=(0, 2, 3, 4)), rtol=1e-12, atol=1e-15
    )
    np.testing.assert_allclose(found["std"], values.std(axis=(0, 2, 3, 4)), rtol=1e-12)
    assert found["count"] == [5 * 4 * 2]


def test_files_that_do_not_fit_are_left_out_with_their_reasons(extracted: Path) -> None:
    (extracted / "d.safetensors").write_bytes(b"not at all")
    (extracted / "e.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    save(extracted, "f", {"z_2d": np.zeros((1, 4, 4, 4), np.float16)})
    save(extracted, "g", {"z": np.zeros((16, 4, 1, 2), np.float16)})
    save(extracted, "h", {"z": np.zeros((0, 16, 4, 1, 2), np.float16)})
    save(extracted, "i", {**tensors(9, 1), "fps": np.array(8)})
    save(extracted, "j", {"z": np.zeros((1, 16, 2, 1, 2), np.float16)})
    save(extracted, "k", {**tensors(9, 1), "z_clip": np.zeros((2, 6, 8), np.float16)})
    save(extracted, "l", {**tensors(9, 1), "z_clip": np.zeros((1, 7, 8), np.float16)})
    save(extracted, "m", tensors(9, 1, dtype="float32"))
    save_torch(
        {"z": torch.zeros(1, 16, 4, 1, 2, dtype=torch.bfloat16)}, extracted / "n.safetensors"
    )
    files = MemoryFiles()
    report = run(extracted, files)
    assert (report.files, report.clips) == (14, 6)
    parts = {
        "d": "it cannot be read",
        "e": "it cannot be read",
        "f": "it has no z",
        "g": "z is (16, 4, 1, 2), not (clips, channels, t, h, w)",
        "h": "z is (0, 16, 4, 1, 2), not",
        "i": "it has 4 latent steps a clip at 8 fps, a_one.mp4.safetensors 4 at 16",
        "j": "it has 2 latent steps",
        "k": "z_clip is (2, 6, 8), but z has 1 clips",
        "l": "z_clip is float16 (7, 8), in files before it float16 (6, 8)",
        "m": "float32",
        "n": "z is BF16, not of half or single precision",
    }
    assert report.failed.keys() == {f"{name}.safetensors" for name in parts}
    for name, part in parts.items():
        assert part in report.failed[f"{name}.safetensors"]
    store = Store(files)
    plan = read_plan(files)
    assert plan is not None
    status = plan.videos.select(["video", "status"]).to_pylist()
    assert {row["video"] for row in status if row["status"] == "failed"} == set(parts)
    assert store.meta.counts["videos"] == {"found": 14, "encoded": 3, "skipped": 0, "failed": 11}
    assert verify(store).ok


def test_a_column_that_a_file_lacks_is_an_empty_row_with_a_reason(extracted: Path) -> None:
    only_z = {key: value for key, value in tensors(3, 2).items() if key in ("z", "fps")}
    save(extracted, "c_three", only_z)
    (extracted.with_name("t5") / "c_three.safetensors").unlink()
    files = MemoryFiles()
    report = run(extracted, files, with_text=True)
    assert (report.failed, report.stored.failed) == ({}, 6)
    store = Store(files)
    key = ShardKey(WIDE, 1)
    assert store.read_row(key, 0, "content_clip") is None
    assert store.read_row(key, 0, "latents") is not None
    reasons = {store.commit(key, name).failed[0].reason for name in ("content_clip", "text")}
    assert any("c_three.safetensors has no z_clip" in reason for reason in reasons)
    assert any("c_three.safetensors has no T5 vectors" in reason for reason in reasons)
    assert verify(store).ok


@pytest.mark.parametrize(
    "change", [{"emb_masks": np.ones((1, 7), np.int64)}, {"caption_embs": None}]
)
def test_t5_files_that_make_no_sense_are_reasons(
    extracted: Path, change: dict[str, NDArray[Any] | None]
) -> None:
    values = {**text(0, 3), **change}
    save(extracted.with_name("t5"), "a_one.mp4", {k: v for k, v in values.items() if v is not None})
    files = MemoryFiles()
    run(extracted, files, with_text=True)
    failed = Store(files).commit(ShardKey(WIDE, 0), "text").failed
    assert [failure.row for failure in failed] == [0, 1, 2]
    assert "T5 vectors" in failed[0].reason


def test_nothing_that_fits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no \.safetensors files that fit\. Check the path"):
        run(tmp_path, MemoryFiles())
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match=r"x\.safetensors: it cannot be read"):
        run(tmp_path, MemoryFiles())


def test_an_import_that_is_killed_at_any_write_goes_on_where_it_was(extracted: Path) -> None:
    undisturbed = MemoryFiles()
    run(extracted, undisturbed, with_text=True)
    for number in range(1, undisturbed.writes + 1, 3):
        files = MemoryFiles()
        files.fail_at = number
        with pytest.raises(KilledError):
            run(extracted, files, with_text=True)
        files.fail_at = None
        run(extracted, files, with_text=True)
        assert files.data == undisturbed.data, f"killed at write {number}"


def test_files_that_have_changed_since_are_noticed(extracted: Path) -> None:
    files = MemoryFiles()
    run(extracted, files)
    save(extracted, "a_one.mp4", tensors(7, 3))
    with pytest.raises(StoreError, match=r"holds other rows than .*Import into a new folder"):
        run(extracted, files)


def test_a_model_is_trained_on_imported_samples_as_on_ones_that_are_drawn(extracted: Path) -> None:
    files = MemoryFiles()
    run(extracted, files, with_text=True)
    store = Store(files)
    dataset = LatentDataset(
        store, ("latents", "text", "clip_id"), batch_size=5, buckets=WIDE, shuffle=False
    )
    (batch,) = dataset
    values = np.concatenate([tensors(1, 3)["z"], tensors(3, 2)["z"]])
    assert batch["latents"].dtype == torch.float32
    np.testing.assert_array_equal(batch["latents"], values.astype(np.float32))
    assert batch["text_mask"].sum(1).tolist() == [3, 3, 3, 5, 5]
    again = dataset.batch(3, 0)
    assert torch.equal(again["latents"], batch["latents"])

    whole = LatentDataset(
        store, ("latents",), batch_size=5, buckets=WIDE, shuffle=False, normalize="channel"
    ).batch(0, 0)["latents"]
    found = store.meta.statistics["latents/all"]["final"]
    mean, std = (torch.tensor(found[name]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(whole, (batch["latents"] - mean) / std, rtol=1e-5, atol=1e-6)


def test_what_imported_samples_cannot_give_is_said(extracted: Path) -> None:
    files = MemoryFiles()
    run(extracted, files)
    with pytest.raises(StoreError, match=r"no column 'motion'.*imported samples.*'latents'"):
        LatentDataset(Store(files), batch_size=1)
    for latents in ("mean", "moments"):
        with pytest.raises(ConfigError, match=f'drawn once.*latents="{latents}"'):
            LatentDataset(Store(files), ("latents",), batch_size=1, latents=latents)


def test_the_command_imports_and_the_result_converts(extracted: Path, tmp_path: Path) -> None:
    (extracted / "d.safetensors").write_bytes(b"not at all")
    words = ["convert", str(extracted), f"{tmp_path}/out", "--reference"]
    result = CliRunner().invoke(main, [*words, "--text", str(extracted.with_name("t5"))])
    assert result.exit_code == 0, result.output
    assert "2 shards, 8 commits, 24 rows, 0 without a value" in result.output
    assert "d.safetensors: it cannot be read" in result.output
    assert "1 files are left out" in result.output
    tars = MemoryFiles("tars")
    convert_store(open_store(tmp_path / "out"), tars, "webdataset")
    assert verify(Store(tars)).ok
    described = json.loads(LocalFiles(tmp_path / "out").read("zarr.json"))
    assert described["attributes"]["reducio_latents"]["corpus"] == str(extracted)
