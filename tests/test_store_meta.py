"""A store's description: what it refuses, and in which words."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.parsing import fingerprint_of
from reducio_latents.errors import StoreError
from reducio_latents.store.meta import (
    ATTRIBUTE,
    CHECKSUM,
    ROOT,
    ColumnMeta,
    StoreMeta,
    _checksum,
    differences,
    require_same,
)
from reducio_latents.store.seal import seal, unseal
from tests.stores import BUCKET, CAPTION, IMAGE, MOTION, MemoryFiles, make_meta

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def written(meta: StoreMeta) -> MemoryFiles:
    files = MemoryFiles("store")
    files.write(ROOT, meta.to_json())
    return files


def test_a_description_reads_as_it_was_written() -> None:
    statistics = {"motion/all": {"mean": {"mean": [0.1, -1e-9], "std": [1 / 3], "count": [7.0]}}}
    meta = replace(make_meta(), statistics=statistics, corpus="vidéos/✓", versions={"a": "1"})
    assert StoreMeta.read(written(meta)) == meta


@given(config=st.dictionaries(st.text(), json_values, max_size=4))
def test_any_config_survives_and_keeps_its_fingerprint(config: dict[str, Any]) -> None:
    column = replace(MOTION, config=config)
    read = StoreMeta.read(written(make_meta(columns={"x": column}))).columns["x"]
    assert read.fingerprint == column.fingerprint
    assert differences(read.config, config) == []


@given(config=st.dictionaries(st.text(), json_values, max_size=4))
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(config: dict[str, Any]) -> None:
    assert fingerprint_of(dict(reversed(config.items()))) == fingerprint_of(config)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"config": {"weights_sha256": "b" * 64}}, False),
        ({"encoder": "other"}, False),
        ({"dtype": "float32"}, False),
        ({"measured": {"float32_error": 0.1}}, True),
        ({"compression": "zstd"}, True),
    ],
)
def test_a_fingerprint_depends_on_what_changes_the_numbers(
    change: dict[str, Any], same: bool
) -> None:
    assert (replace(MOTION, **change).fingerprint == MOTION.fingerprint) is same


def test_a_place_without_a_description_is_no_store() -> None:
    with pytest.raises(StoreError, match=r"nowhere is not a latent store: it has no zarr\.json"):
        StoreMeta.read(MemoryFiles("nowhere"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "is a Zarr store, but not a latent store"),
        (b"{}", "is a Zarr store, but not a latent store"),
        (b'{"attributes": 3}', "not a latent store"),
        (b'{"attributes": {"reducio_latents": 3}}', "not a latent store"),
        (b'{"attributes": {"reducio_latents": {"format_version": 3}}}', "has format 3; this ver"),
        (b'{"attributes": {"reducio_latents": {}}}', "has format None"),
        (b'{"attributes": {"reducio_latents": {"format_version": 2}}}', "its own checksum"),
    ],
)
def test_a_damaged_description_is_one_clear_error(data: bytes, message: str) -> None:
    files = MemoryFiles()
    files.write(ROOT, data)
    with pytest.raises(StoreError, match=message):
        StoreMeta.read(files)


def test_a_description_that_was_edited_is_refused_and_other_attributes_are_not() -> None:
    files = written(make_meta())
    group = json.loads(files.read(ROOT))
    group["attributes"]["title"] = "my data set"
    files.write(ROOT, json.dumps(group).encode())
    assert StoreMeta.read(files) == make_meta()
    group["attributes"][ATTRIBUTE]["shard_rows"] = 8
    files.write(ROOT, json.dumps(group).encode())
    with pytest.raises(StoreError, match=r"does not match its own checksum.*Restore it"):
        StoreMeta.read(files)


def test_an_unknown_key_is_named() -> None:
    files = MemoryFiles()
    text = make_meta().to_json().replace(b'"shard_rows"', b'"shard_row"')
    group = json.loads(text)
    group["attributes"][CHECKSUM] = _checksum(group["attributes"][ATTRIBUTE])
    files.write(ROOT, json.dumps(group).encode())
    with pytest.raises(StoreError, match="unknown key 'shard_row'; did you mean 'shard_rows'"):
        StoreMeta.read(files)


def motion(**changes: Any) -> dict[str, ColumnMeta]:
    return {"motion": replace(MOTION, **changes)}


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            make_meta(columns=motion(config={"weights_sha256": "b" * 64})),
            f"column motion: the store was made with fake .weights sha256 {'a' * 12}., this run "
            f"has fake .weights sha256 {'b' * 12}.",
        ),
        (
            make_meta(columns=motion(config={})),
            rf"made with fake .weights sha256 {'a' * 12}., this run has fake .weights sha256 None.",
        ),
        (make_meta(columns=motion(encoder="other")), "encoder is 'fake' in the store, 'other' now"),
        (make_meta(columns=motion(dtype="float32")), "dtype is 'float16' in the store"),
        (make_meta(columns=motion(final={"rule": "scale"})), "final.rule is 'layer_norm' in the s"),
        (make_meta(columns=motion(compression="zstd")), "compression is 'none' in the store"),
        (make_meta(columns=motion(row_shapes={BUCKET: (1,)})), "row_shapes.16x32x64 is"),
        (
            make_meta(columns={"caption": replace(CAPTION, content="x/y")}),
            "column caption: content",
        ),
        (make_meta(shard_rows=8), "shard_rows is 4 in the store, 8 now"),
        (make_meta("webdataset"), "container is 'zarr' in the store, 'webdataset' now"),
        (replace(make_meta(), buckets=("16x64x64",)), r"buckets is \['16x32x64'\] in the store"),
        (replace(make_meta(), resize="bilinear"), "resize is 'bicubic' in the store"),
        (replace(make_meta(), clip=ClipSpec(rate_fps=8)), "clip.rate_fps is 16.0 in the store, 8"),
        (replace(make_meta(), clip=ClipSpec(policy="centre")), "clip.policy is 'all' in the store"),
    ],
)
def test_what_was_made_differently_is_refused_by_name(now: StoreMeta, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        require_same(now, make_meta(), "my.latents")
    text = str(caught.value)
    assert text.startswith("my.latents was made differently: ")
    assert text.endswith("Use the same settings, or write to a new store.")


def test_another_model_is_said_first_and_what_follows_from_it_after_that() -> None:
    config = {"weights_sha256": "b" * 64, "architecture": {"width": 8}}
    columns = motion(encoder="other", config=config, row_shapes={BUCKET: (2, 1, 1, 1)})
    with pytest.raises(StoreError) as caught:
        require_same(make_meta(shard_rows=8, columns=columns), make_meta(), "my.latents")
    cause, *rest = str(caught.value).split("; ")
    assert cause == (
        "my.latents was made differently: column motion: the store was made with fake "
        "(weights sha256 aaaaaaaaaaaa), this run has other (weights sha256 bbbbbbbbbbbb)"
    )
    assert any("row_shapes" in line for line in rest)
    assert not any("encoder is" in line or "weights_sha256 is" in line for line in rest)


def test_another_resolution_is_said_once() -> None:
    moved = motion(row_shapes={"16x64x64": (4, 1, 2, 2)})
    now = replace(make_meta(columns=moved), buckets=("16x64x64",))
    with pytest.raises(StoreError) as caught:
        require_same(now, make_meta(), "store")
    assert "row_shapes" not in str(caught.value)


def test_many_differences_are_counted() -> None:
    config = {f"setting_{i}": i for i in range(9)}
    now = make_meta(columns=motion(config=config))
    with pytest.raises(StoreError, match="; and 4 more"):
        require_same(now, make_meta(), "store")


def test_columns_that_only_one_has_and_what_was_measured_are_no_difference() -> None:
    measured = replace(MOTION, measured={"float32_error": 0.5})
    require_same(make_meta(columns={"motion": measured}), make_meta(), "store")
    require_same(make_meta(columns={"other": IMAGE}), make_meta(), "store")
    require_same(
        replace(make_meta(), corpus="moved", versions={"torch": "9"}), make_meta(), "store"
    )


@given(record=st.dictionaries(st.text(), json_values, min_size=1, max_size=4), data=st.data())
def test_a_sealed_record_reads_as_it_was_and_no_changed_byte_passes(
    record: dict[str, Any], data: st.DataObject
) -> None:
    record.pop("crc32c", None)
    record["x"] = 1
    sealed = seal(json.dumps(record).encode())
    opened = unseal(sealed)
    assert {name: value for name, value in opened.items() if name != "crc32c"} == record
    position = data.draw(st.integers(0, len(sealed) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda value: value != sealed[position]))
    changed = sealed[:position] + bytes([other]) + sealed[position + 1 :]
    with pytest.raises(ValueError):
        unseal(changed)
    with pytest.raises(ValueError):
        unseal(sealed[: data.draw(st.integers(0, len(sealed) - 1))])
