"""JSON Schemas (2020-12) made from the types that are written: dataclasses and Arrow tables."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from reducio_latents.cli.options import field_notes

if TYPE_CHECKING:
    import pyarrow as pa

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Json = dict[str, Any]

_PLAIN: dict[Any, Json] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    type(None): {"type": "null"},
    Any: {},
}


def json_schema_of(cls: type) -> Json:
    """Return the schema of a dataclass as `config.from_mapping` reads it.

    Unknown keys are refused, fields without a default required, nested dataclasses under `$defs`.
    The string after a field is its description. Raise TypeError for a type JSON has no word for.
    """
    definitions: dict[str, Json] = {}
    body = _of_dataclass(cls, definitions)
    schema = {"$schema": DIALECT, "title": cls.__name__, **body}
    definitions.pop(cls.__name__, None)
    return {**schema, "$defs": dict(sorted(definitions.items()))} if definitions else schema


def _of_dataclass(cls: type, definitions: dict[str, Json]) -> Json:
    hints, notes = typing.get_type_hints(cls), field_notes(cls)
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        value = _of_hint(hints[field.name], definitions)
        if field.name in notes:
            value = {**value, "description": notes[field.name]}
        if field.default is not dataclasses.MISSING:
            value = {**value, "default": _plain(field.default)}
        elif field.default_factory is dataclasses.MISSING:
            required.append(field.name)
        properties[field.name] = value
    schema: Json = {"type": "object"}
    if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("):  # dataclass' own signature
        schema["description"] = " ".join(inspect.cleandoc(cls.__doc__).split())
    schema["properties"] = properties
    if required:
        schema["required"] = required
    return {**schema, "additionalProperties": False}


def _of_hint(hint: Any, definitions: dict[str, Json]) -> Json:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        return dict(_PLAIN[hint])
    if origin in (typing.Union, types.UnionType):
        choices = [_of_hint(arg, definitions) for arg in args]
        if all(choice.keys() == {"type"} for choice in choices):
            return {"type": [choice["type"] for choice in choices]}
        return {"anyOf": choices}
    if origin is typing.Literal:
        return {"enum": list(args)}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}  # known by name before its own fields are looked at
            definitions[hint.__name__] = _of_dataclass(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        items = [_of_hint(arg, definitions) for arg in args]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin in (tuple, list):
        return {"type": "array", "items": _of_hint(args[0], definitions)}
    if origin in (dict, Mapping) and args[0] is str:
        return {"type": "object", "additionalProperties": _of_hint(args[1], definitions)}
    raise TypeError(f"no JSON Schema for {hint}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value))


def json_schema_of_table(
    schema: pa.Schema,
    *,
    title: str,
    description: str,
    extra: bool,
    optional: Iterable[pa.Field] = (),
) -> Json:
    """Return the schema of one row, as `to_pylist` gives it; it may lack those that are `optional`.

    A field's metadata may hold `description`, and `schema`: JSON to add to what the type says.
    With `extra`, a row may have more columns, of plain values.
    """
    properties = {}
    for field in [*schema, *optional]:
        notes = {key.decode(): text.decode() for key, text in (field.metadata or {}).items()}
        value = _of_arrow(field.type)
        if field.nullable:
            value = {**value, "type": [value["type"], "null"]}
        value |= json.loads(notes.get("schema", "{}"))
        if "description" in notes:
            value["description"] = notes["description"]
        properties[field.name] = value
    rest = {"type": ["string", "integer", "number", "boolean", "null"]} if extra else False
    return {
        "title": title,
        "description": description,
        "type": "object",
        "properties": properties,
        "required": schema.names,
        "additionalProperties": rest,
    }


def _of_arrow(kind: pa.DataType) -> Json:
    from pyarrow import types as arrow

    if arrow.is_string(kind) or arrow.is_large_string(kind):
        return {"type": "string"}
    if arrow.is_integer(kind):
        low = 0 if str(kind).startswith("u") else -(2 ** (kind.bit_width - 1))
        return {"type": "integer", "minimum": low, "maximum": low + 2**kind.bit_width - 1}
    if arrow.is_floating(kind):
        return {"type": "number"}
    if arrow.is_boolean(kind):
        return {"type": "boolean"}
    if arrow.is_list(kind):
        return {"type": "array", "items": _of_arrow(kind.value_type)}
    raise TypeError(f"no JSON Schema for {kind}")
