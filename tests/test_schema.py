"""Schemas say what the types say, and the files in `schemas/` are what the types say today."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jsonschema
import pyarrow as pa
import pytest

from reducio_latents.cli.options import field_notes
from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.config import from_mapping
from reducio_latents.errors import ConfigError

ROOT = Path(__file__).parents[1]


def make_schemas() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_schemas", ROOT / "tools/make_schemas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = make_schemas()
json_schema_of, json_schema_of_table = TOOL.json_schema_of, TOOL.json_schema_of_table


@dataclass(frozen=True)
class Leaf:
    """A leaf
    of the tree."""

    name: str
    """What it is called,
    in one word."""
    weight: float = 1.5
    kind: Literal["oak", "elm"] = "oak"


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    size: tuple[int, int]
    notes: dict[str, list[str]] = field(default_factory=dict)
    root: Leaf | None = None
    age: int | None = None
    anything: Any = None
    best: Leaf = Leaf("b")
    by_name: Mapping[str, Leaf] = field(default_factory=dict)


def valid(schema: dict[str, Any], value: Any) -> bool:
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(value)


GOOD: dict[str, Any] = {"leaves": [{"name": "a"}], "size": [3, 4]}


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"leaves": []}, True),
        ({"root": None, "age": 3}, True),
        ({"root": {"name": "r", "kind": "elm"}}, True),
        ({"anything": [1, {"x": None}]}, True),
        ({"notes": {"a": ["b"]}}, True),
        ({"best": {"name": "b", "weight": 2}}, True),
        ({"by_name": {"x": {"name": "y"}}}, True),
        ({"leaves": [{"weight": 1.0}]}, False),
        ({"leaves": [{"name": 1}]}, False),
        ({"leaves": [{"name": "a", "kind": "fir"}]}, False),
        ({"leaves": [{"name": "a", "colour": "red"}]}, False),
        ({"size": [3]}, False),
        ({"size": [3, 4, 5]}, False),
        ({"size": [3, "4"]}, False),
        ({"notes": {"a": "b"}}, False),
        ({"age": "old"}, False),
        ({"more": 1}, False),
    ],
)
def test_the_schema_of_a_dataclass_accepts_what_it_can_be_built_from(
    change: dict[str, Any], fits: bool
) -> None:
    assert valid(json_schema_of(Tree), GOOD | change) == fits


@pytest.mark.parametrize(
    "value",
    [{"frames": 8}, {"frames": "8"}, {"rate_fps": 24}, {"policy": 3}, {"speed": 1}, {"seed": True}],
)
def test_schema_and_reader_agree_on_types(value: dict[str, Any]) -> None:
    try:
        from_mapping(ClipSpec, value, where="test")
        readable = True
    except ConfigError:
        readable = False
    assert valid(json_schema_of(ClipSpec), value) == readable


def test_the_string_after_a_field_is_its_description() -> None:
    assert field_notes(Leaf) == {"name": "What it is called, in one word."}
    schema = json_schema_of(Leaf)
    assert schema["description"] == "A leaf of the tree."
    assert schema["properties"]["name"]["description"] == "What it is called, in one word."
    assert schema["properties"]["weight"] == {"type": "number", "default": 1.5}
    assert schema["required"] == ["name"]


def test_a_type_that_json_has_no_word_for_is_refused() -> None:
    @dataclass
    class Odd:
        value: complex

    with pytest.raises(TypeError, match="no JSON Schema for <class 'complex'>"):
        json_schema_of(Odd)
    with pytest.raises(TypeError, match="no JSON Schema for binary"):
        json_schema_of_table(pa.schema({"x": pa.binary()}), title="", description="", extra=False)


def test_the_schema_of_a_table_accepts_its_rows() -> None:
    fields = [
        pa.field("n", pa.uint8(), nullable=False),
        pa.field("x", pa.float32()),
        pa.field("b", pa.bool_(), nullable=False),
        pa.field("texts", pa.list_(pa.string()), nullable=False),
        pa.field("s", pa.string(), metadata={"schema": '{"minLength": 2}', "description": "S."}),
    ]
    schema = json_schema_of_table(pa.schema(fields), title="t", description="d", extra=False)
    row = {"n": 255, "x": 0.5, "b": True, "texts": ["a"], "s": "ab"}
    assert schema["properties"]["s"]["description"] == "S."
    assert valid(schema, row)
    assert valid(schema, row | {"x": None, "s": None})
    for change in ({"n": 256}, {"n": -1}, {"n": None}, {"texts": "a"}, {"s": "a"}, {"more": 1}):
        assert not valid(schema, row | change)


@pytest.mark.parametrize("name", TOOL.SCHEMAS)
def test_the_schema_file_is_what_the_types_say(name: str) -> None:
    assert TOOL.is_current(name), f"run tools/make_schemas.py: schemas/{name} is out of date"
    schema = json.loads((ROOT / "schemas" / name).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)


def test_every_schema_file_is_made_from_types() -> None:
    assert {path.name for path in (ROOT / "schemas").glob("*.json")} == set(TOOL.SCHEMAS)
