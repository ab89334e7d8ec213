"""What the public docstrings say of shapes and types is what a store gives."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reducio_latents.core.geometry import Bucket
from reducio_latents.dataset import LatentDataset, LatentLoader, LatentTable
from reducio_latents.files import LocalFiles
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.index import build_index, write_index
from reducio_latents.store.meta import ColumnMeta
from reducio_latents.store.plan import read_plan
from reducio_latents.store.quantize import INT8_MEDIA_TYPE, quantize
from reducio_latents.store.writer import ColumnRows, StoreWriter
from tests.latent_stores import StoreSpec, meta_of, plan_store, write_shard

BUCKET = "16x32x64"
BATCH = 4
PLAIN = ("motion", "content_latent", "content_image", "caption", "text")
TENSOR = re.compile(r"\b(float16|float32|float64|uint8|bool|int64) \(([^)]*)\)")
SIZE = Bucket.parse(BUCKET)


def array(content: str, dtype: str, *shape: int) -> ColumnMeta:
    return ColumnMeta(
        kind="array",
        content=content,
        encoder="fake",
        config={},
        dtype=dtype,
        row_shapes={BUCKET: shape},
    )


EXTRA = {
    "content_clip": array("tokens", "float16", 3, 8),
    "content_clip_pooled": array("vector", "float16", 8),
    "frame_times": array("array", "float64", 16),
    "small_clip": array(INT8_MEDIA_TYPE, "int8", 3, 12),
    "scores": replace(array("scores", "float32", 2), config={"names": ["motion", "own"]}),
}
COLUMNS = (*PLAIN, *EXTRA)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every kind of column that a batch or an entry is said to have."""
    path = tmp_path_factory.mktemp("store")
    spec = StoreSpec(videos=2, buckets=(BUCKET,), columns=PLAIN, shard_rows=8)
    files = LocalFiles(path)
    writer = plan_store(files, spec)
    columns = {**meta_of(spec).columns, **EXTRA}
    writer = StoreWriter.open(files, replace(writer.meta, columns=columns), {BUCKET: 8})
    key = ShardKey(BUCKET, 0)
    write_shard(writer, spec, key)
    plan = read_plan(files)
    assert plan is not None
    ids = plan.shard_clips(*key)["clip_id"].to_pylist()
    rows = {name: np.ones(m.row_shapes[BUCKET], m.dtype) for name, m in EXTRA.items()}
    rows["small_clip"] = quantize(np.ones((3, 8), np.float32))
    writer.write_shard(key, ids, {name: ColumnRows(rows=[row] * 8) for name, row in rows.items()})
    write_index(files, build_index(files, use_cache=False))
    return path


def claims(docstring: str, entry: str) -> dict[str, str]:
    """Return what is said of each field: all text up to the next one."""
    parts = re.split(entry, docstring)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def require_true(text: str, value: Any, known: dict[str, int]) -> None:
    """Hold a value against the first type and shape that a text names."""
    found = TENSOR.search(text)
    if found is None:
        assert not isinstance(value, torch.Tensor), text
        return
    dtype, axes = found.groups()
    names = [name.strip() for name in axes.split(",") if name.strip()]
    assert value.dtype == getattr(torch, dtype), text
    assert value.ndim == len(names), (text, tuple(value.shape))
    own = dict(known)
    for name, size in zip(names, value.shape, strict=True):
        factor, letters = re.fullmatch(r"(\d*)(\D*)", name).groups()  # type: ignore[union-attr]
        if not letters:
            assert size == int(factor), text
            continue
        assert size == own.setdefault(letters, size // int(factor or 1)) * int(factor or 1), text


def test_a_batch_is_as_the_docstring_of_the_dataset_says(root: Path) -> None:
    said = claims(str(LatentDataset.__doc__), r"(?m)(?:^ {4}|; )``(\w+)``")
    known = {"B": BATCH, "T": SIZE.frames, "H": SIZE.height, "W": SIZE.width}
    columns = (*COLUMNS, "clip_id", "video", "start_s")
    seen = set()
    for options in ({}, {"latents": "moments"}):
        dataset = LatentDataset(
            root,
            columns,
            batch_size=BATCH,
            on_error="skip",
            **options,  # type: ignore[arg-type]
        )
        for loader in (dataset, LatentLoader(dataset)):
            batch = next(iter(loader))
            for name in batch.keys() & said.keys():
                seen.add(name)
                # As stored it has the other one of the two shapes that are told.
                text = said[name]
                if name == "content_latent" and options:
                    text = "float16 (B, 2D, h, w)"
                require_true(text, batch[name], known)
            assert batch.keys() <= {*said, "small_clip"}
            assert batch["small_clip"].dtype == torch.float32
    assert seen == set(said)


def test_an_entry_is_as_the_docstring_of_the_table_says(root: Path) -> None:
    said = claims(str(LatentTable.__doc__), r"`(\w+)`:")
    known = {"T": SIZE.frames, "H": SIZE.height, "W": SIZE.width}
    entry = LatentTable(root)[3]
    assert {name for name in said if name in entry} == set(said)
    for name, text in said.items():
        require_true(text, entry[name], known)
    assert entry["small_clip"].dtype == torch.float32
    assert isinstance(entry["caption"], str)
