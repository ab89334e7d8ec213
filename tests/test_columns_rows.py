"""How rows of columns lie in bytes: 8-bit tokens, rows of text, zstd, equal rows once."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numcodecs import zstd

from reducio_latents.errors import StoreError
from reducio_latents.files import LocalFiles
from reducio_latents.store.commit import Commit, Failure, ShardKey
from reducio_latents.store.container import LAYOUTS
from reducio_latents.store.limits import Ranges
from reducio_latents.store.meta import ColumnMeta, StoreMeta, require_same
from reducio_latents.store.quantize import TAIL_BYTES, dequantize, quantize, relative_errors
from reducio_latents.store.row_kinds import row_kind
from reducio_latents.store.text_rows import (
    VALUES,
    CaptionTokens,
    decode_text_row,
    empty_caption,
    pack_text_row,
    text_row_errors,
    text_row_lengths,
)
from reducio_latents.store.writer import ColumnRows, StoreWriter
from tests.stores import row_in

BUCKET = "16x64x64"
KEY = ShardKey(BUCKET, 0)
FLOATS = st.floats(-1e4, 1e4, width=32)
TOKENS = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=FLOATS)


@given(TOKENS)
def test_eight_bits_are_off_by_at_most_half_a_step_and_say_by_how_much(
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> None:
    packed = quantize(values)
    assert packed.dtype == np.int8
    assert packed.shape == (len(values), values.shape[1] + TAIL_BYTES)
    found = dequantize(packed)
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - values) <= step * 0.502 + 1e-7).all()
    rms = np.sqrt(np.square(found - values).mean(axis=1))
    size = np.sqrt(np.square(found).mean(axis=1))
    expected = np.where(size > 1e-3, rms / np.maximum(size, 1e-12), 0)
    measured = np.where(size > 1e-3, relative_errors(packed), 0)
    np.testing.assert_allclose(measured, expected, rtol=2e-3, atol=1e-4)


def test_eight_bits_cost_a_normal_token_under_one_per_cent() -> None:
    values = np.random.default_rng(0).standard_normal((64, 1280)).astype(np.float32)
    error = np.linalg.norm(dequantize(quantize(values)) - values) / np.linalg.norm(values)
    assert error < 0.01
    assert relative_errors(quantize(values)).mean() == pytest.approx(error, rel=0.02)


@given(st.lists(TOKENS, min_size=1, max_size=3), st.sampled_from(VALUES))
def test_a_text_row_gives_back_every_caption(
    captions: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]], values: str
) -> None:
    dim = captions[0].shape[1]
    tokens = [np.resize(c, (len(c), dim)) for c in captions]
    row = pack_text_row([CaptionTokens(v, len(v) + i) for i, v in enumerate(tokens)], values)
    found = decode_text_row(row)
    assert text_row_lengths(row) == [(len(v), len(v) + i) for i, v in enumerate(tokens)]
    tolerance = {"float16": 2**-11, "bfloat16": 2**-8, "int8": 0.502 / 127}[values]
    for vectors, wanted in zip(found, tokens, strict=True):
        assert vectors.shape == wanted.shape
        largest = np.abs(wanted).max(axis=1, keepdims=True)
        assert (np.abs(vectors - wanted) <= largest * tolerance + 1e-6).all()
    assert len(text_row_errors(row)) == (sum(map(len, tokens)) if values == "int8" else 0)
    assert decode_text_row(memoryview(row))[0].shape == found[0].shape


def test_bfloat16_rounds_to_nearest_even_as_torch_does() -> None:
    import torch

    values = np.random.default_rng(1).standard_normal((3, 500)).astype(np.float32) * 1e3
    values[0, :3] = [1.00390625, 1.01171875, -1.00390625]  # half way between two
    row = pack_text_row([CaptionTokens(values, 3)], "bfloat16")
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    assert np.array_equal(decode_text_row(row)[0], expected)


def test_a_caption_of_no_tokens_is_a_row() -> None:
    for values in VALUES:
        row = pack_text_row([CaptionTokens(np.zeros((0, 4), np.float32), 0)], values)
        assert decode_text_row(row)[0].shape == (0, 4)


@pytest.mark.parametrize(
    "damage", [lambda r: r[:5], lambda r: r[:-1], lambda r: r + b"x", lambda r: b"\x09" + r[1:]]
)
def test_a_damaged_text_row_is_said_to_be(damage: object) -> None:
    row = pack_text_row([CaptionTokens(np.ones((3, 4), np.float32), 3)], "float16")
    with pytest.raises(StoreError, match="text row"):
        decode_text_row(damage(row))  # type: ignore[operator]


def array_column(**settings: object) -> ColumnMeta:
    known = {
        "kind": "array",
        "content": "tokens",
        "encoder": "fake",
        "config": {},
        "row_shapes": {BUCKET: (4, 8)},
    }
    return ColumnMeta(**{**known, **settings})  # type: ignore[arg-type]


def bytes_column(**settings: object) -> ColumnMeta:
    known = {"kind": "bytes", "content": "text/plain", "encoder": "fake", "config": {}}
    return ColumnMeta(**{**known, "dtype": "bytes", **settings})  # type: ignore[arg-type]


def write(root: Path, columns: dict[str, ColumnMeta], rows: dict[str, list[object]]) -> StoreWriter:
    meta = StoreMeta(shard_rows=8, buckets=(BUCKET,), columns=columns)
    count = len(next(iter(rows.values())))
    writer = StoreWriter.open(LocalFiles(root), meta, {BUCKET: count})
    clip_ids = [f"clip{i}" for i in range(count)]
    given = {name: ColumnRows(rows=r, failed=failures(r)) for name, r in rows.items()}  # type: ignore[arg-type]
    writer.write_shard(KEY, clip_ids, given)
    return writer


def failures(rows: list[object]) -> list[Failure]:
    return [
        Failure(row=i, clip_id=f"clip{i}", video="v", reason="broken")
        for i, row in enumerate(rows)
        if row is None
    ]


def places(writer: StoreWriter, column: str) -> Ranges:
    commit = Commit.read(writer.files, KEY, column)
    return LAYOUTS["zarr"].locate(writer.files, writer.meta, commit)


def stored(writer: StoreWriter, column: str) -> list[bytes | None]:
    commit = Commit.read(writer.files, KEY, column)
    ranges = places(writer, column).tolist()
    kind = row_kind(writer.meta.columns[column])
    return [
        None if start < 0 else kind.unpack(writer.files.read_range(commit.file, start, n), BUCKET)
        for start, n in ranges
    ]


def test_compressed_rows_are_smaller_and_plain_zarr_reads_them(tmp_path: Path) -> None:
    arrays = [np.full((4, 8), i, np.float16) for i in range(3)]
    texts = [b"snow " * 50, b"", b"fox " * 50]
    columns = {
        "codes": array_column(compression="zstd"),
        "words": bytes_column(compression="zstd"),
        "plain": bytes_column(),
    }
    writer = write(
        tmp_path,
        columns,
        {"codes": [*arrays, None], "words": [*texts, None], "plain": [*texts, None]},
    )
    assert stored(writer, "codes") == [a.tobytes() for a in arrays] + [None]
    assert stored(writer, "words") == [*texts, None]
    sizes = {n: places(writer, n)[:, 1].sum() for n in columns}
    assert sizes["words"] < sizes["plain"] - 300
    group = zarr.open_group(str(tmp_path / BUCKET), mode="r")
    assert np.array_equal(group["codes"][:3], np.stack(arrays))
    assert group["words"].attrs["compression"] == "zstd"
    for row, text in enumerate(texts):
        found = row_in(group["words"], row, writer.meta.shard_rows)
        assert found is not None
        assert zstd.decompress(found)[8:] == text


def test_equal_rows_of_bytes_are_stored_once_whatever_objects_they_are(tmp_path: Path) -> None:
    row = bytes(range(256)) * 40
    for compression in ("none", "zstd"):
        rows: list[object] = [row, bytes(bytearray(row)), b"other", bytearray(row)]
        root = tmp_path / compression
        writer = write(root, {"words": bytes_column(compression=compression)}, {"words": rows})
        assert len(np.unique(places(writer, "words"), axis=0)) == 2
        assert stored(writer, "words") == [row, row, b"other", row]


def test_a_row_that_cannot_be_decompressed_is_said_to_be() -> None:
    kind = row_kind(bytes_column(compression="zstd"))
    assert kind.unpack(kind.store(b"abc"), BUCKET) == b"abc"
    with pytest.raises(StoreError, match="cannot be decompressed"):
        kind.unpack(b"not zstd at all", BUCKET)


def test_what_was_measured_is_no_difference_but_compression_is() -> None:
    text = bytes_column(measured={"float32_error": 0.01}, empty_row="AAAA")
    other = replace(text, measured={}, empty_row="BBBB")
    meta = StoreMeta(columns={"text": text})
    require_same(replace(meta, columns={"text": other}), meta, "here")
    assert other.fingerprint == text.fingerprint
    with pytest.raises(StoreError, match="compression"):
        require_same(
            replace(meta, columns={"text": replace(text, compression="zstd")}), meta, "here"
        )


def test_the_empty_caption_is_kept_in_the_description() -> None:
    vectors = np.arange(4, dtype=np.float32)[None]
    row = pack_text_row([CaptionTokens(vectors, 1)], "float16")
    column = bytes_column(empty_row=base64.b64encode(row).decode())
    assert np.array_equal(empty_caption(column), vectors)
    with pytest.raises(StoreError, match="not of text"):
        empty_caption(bytes_column())
