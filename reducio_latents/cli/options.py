"""Click options out of the fields of dataclasses, which say their types, words, defaults and help.

A command lists the fields that it takes, under headings; it is called with the dataclass, built of
what was given. What is not given is left to the dataclass.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import click

from reducio_latents.core.config import hints_of
from reducio_latents.core.notes import field_notes

Decorated = Callable[..., Any]

FLAT = {"clip", "selection", "sample"}
"""Nested dataclasses whose fields are options without its name before theirs."""
SPELLED = {
    "rate_fps": "fps",
    "policy": "clips",
    "container": "format",
    "selection.buckets": "bucket",
    "sample_seed": "sample",
    "models": "model",
}
"""Options that are called otherwise than their field."""
METAVARS = {
    "batches": "N,N,...",
    "caption_column": "NAME",
    "check_every": "N",
    "corpus": "CORPUS",
    "device": "NAME",
    "frames": "N",
    "fvd_weights": "FILE",
    "gpus": "N|all",
    "look": "CLIPS",
    "lpips_weights": "NET=FILE",
    "max_failed": "SHARE",
    "max_tokens": "N",
    "min_psnr": "DB",
    "model": "NAME",
    "models": "NAME[=WEIGHTS]",
    "num": "N",
    "out": "DIR",
    "path_column": "NAME",
    "pictures": "N",
    "policy": "POLICY",
    "pretrained": "FILE|DIR",
    "rate_fps": "FPS",
    "ray_address": "ADDRESS",
    "report": "FILE",
    "resolution": "PX",
    "root": "DIR",
    "sample_seed": "SEED",
    "seconds": "SECONDS",
    "seed": "N",
    "selection.buckets": "TxHxW,...",
    "selection.ids": "ID,ID,...",
    "shard_rows": "CLIPS",
    "videos": "N",
    "weights": "FILE|DIR",
    "workers": "N",
}


class Listed(click.ParamType):  # type: ignore[type-arg]
    """Values that commas part; an option of it can also be repeated."""

    name = "list"

    def __init__(self, item: click.ParamType) -> None:  # type: ignore[type-arg]
        self.item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not parts:
            self.fail(
                f"{value!r} names nothing; write A,B,... or leave the option out.", param, ctx
            )
        return tuple(self.item.convert(part, param, ctx) for part in parts)


class NumberOr(click.ParamType):  # type: ignore[type-arg]
    """A whole number, or the one word that stands for a number found later."""

    name = "number"

    def __init__(self, word: str) -> None:
        self.word = word

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value == self.word:
            return self.word
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor {self.word!r}.", param, ctx)


class OneOf(click.Choice):  # type: ignore[type-arg]
    """One of the values of a Literal, words or numbers."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        super().__init__([str(value) for value in values])
        self.values = values

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        word = super().convert(value, param, ctx)
        return next(value for value in self.values if str(value) == word)


class Parsed(click.ParamType):  # type: ignore[type-arg]
    """What a dataclass's own `parse` reads."""

    name = "text"

    def __init__(self, cls: Any) -> None:
        self.cls = cls

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self.cls.parse(value)


class KeyValue(click.ParamType):  # type: ignore[type-arg]
    """`KEY=VALUE`, where the key is one of a few."""

    name = "pair"

    def __init__(self, key: click.ParamType, item: click.ParamType) -> None:  # type: ignore[type-arg]
        self.key, self.item = key, item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        key, equals, item = value.partition("=")
        if not equals:
            self.fail(f"{value!r} has no '='; write {param and param.metavar}.", param, ctx)
        return self.key.convert(key, param, ctx), self.item.convert(item, param, ctx)


class FieldOption(click.Option):
    """An option that a field of a dataclass declares; its help is read when it is asked for."""

    def __init__(self, *args: Any, owner: type, default_text: str, heading: str, **attrs: Any):
        super().__init__(*args, **attrs)
        self.owner, self.default_text, self.heading = owner, default_text, heading

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        field = str(self.name).rpartition("__")[2]
        self.help = _notes(self.owner).get(field, "") + self.default_text
        return super().get_help_record(ctx)


@cache
def _notes(cls: type) -> dict[str, str]:
    return field_notes(cls, brief=True)


class HeadedCommand(click.Command):
    """A command whose options stand under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        under: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                under.setdefault(getattr(param, "heading", "Options"), []).append(record)
        for heading, records in under.items():
            with formatter.section(heading):
                formatter.write_dl(records)


command = partial(click.command, cls=HeadedCommand)
dry_run = click.option(
    "-n", "--dry-run", is_flag=True, help="Print what would be done; do nothing."
)


every_clip = click.option(
    "--clips", "every_clip", is_flag=True, help="Name every clip, not the first five."
)
json_instead = click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")


def takes(cls: type, headed: Mapping[str, str]) -> Callable[[Decorated], Decorated]:
    """Return a decorator that gives a command options for fields of `cls`: heading -> their names.

    `clip.frames` is a field of a nested dataclass. The command gets the dataclass as `options`.
    """
    fields = [(path, heading) for heading, paths in headed.items() for path in paths.split()]

    def decorate(function: Decorated) -> Decorated:
        @wraps(function)
        def run(*args: Any, **settings: Any) -> Any:
            given = {path: settings.pop(_param(path)) for path, _ in fields}
            given = {p: value for p, value in given.items() if value not in (None, (), False)}
            return function(*args, options=dataclass_of(cls, given), **settings)

        decorated: Decorated = run
        for path, heading in reversed(fields):
            decorated = _option(cls, path, heading)(decorated)
        return decorated

    return decorate


def dataclass_of(cls: type, given: Mapping[str, Any], base: Any = None) -> Any:
    """Return the dataclass with the values of `given`, by paths such as `clip.frames`.

    All others are those of `base`, or the defaults.
    """
    values: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in given.items():
        name, _, rest = path.partition(".")
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            values[name] = value
    for name, inner in nested.items():
        default = _default(cls, name, base)
        values[name] = dataclass_of(type(default), inner, default)
    return cls(**values) if base is None else dataclasses.replace(base, **values)


def _default(cls: type, name: str, base: Any = None) -> Any:
    """Return the default of a field, None if it has none."""
    if base is not None:
        return getattr(base, name)
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _param(path: str) -> str:
    return path.replace(".", "__")


def _option(cls: type, path: str, heading: str) -> Callable[[Decorated], Decorated]:
    owner, base = cls, None
    *outer, name = path.split(".")
    for part in outer:
        base = _default(owner, part, base)
        owner = type(base)
    default, hint = _default(owner, name, base), hints_of(owner)[name]
    required = {f.name for f in dataclasses.fields(owner) if _is_required(f)}
    words = SPELLED.get(path) or SPELLED.get(name) or name
    prefix = "".join(f"{part}-" for part in outer if part not in FLAT)
    shown = ",".join(map(str, default)) if isinstance(default, tuple | dict) else default
    return click.option(
        f"--{prefix}{words}".replace("_", "-"),
        _param(path),
        cls=FieldOption,
        owner=owner,
        heading=heading,
        default_text="" if shown is None or shown is False or shown == "" else f"  [{shown}]",
        required=name in required,
        **_kind(hint) | _metavar(path),
    )


def _metavar(path: str) -> dict[str, str]:
    name = path.rpartition(".")[2]
    found = METAVARS.get(path) or METAVARS.get(name) or ("SECONDS" if name.endswith("_s") else None)
    return {"metavar": found} if found else {}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _kind(hint: Any) -> dict[str, Any]:
    """Return how click is to read what a field is annotated as."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        item = _type(args[0])
        if hasattr(args[0], "parse"):
            return {"type": item, "multiple": True}
        return {"type": Listed(item), "metavar": "A,B,...", "multiple": True, "callback": _flat}
    if origin in (dict, Mapping):
        pair = KeyValue(*map(_type, args))
        return {"type": pair, "multiple": True, "callback": lambda _, __, pairs: dict(pairs)}
    if hint is bool:
        return {"is_flag": True}
    return {"type": _type(hint)}


def _type(hint: Any) -> click.ParamType:  # type: ignore[type-arg]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [arg for arg in args if arg is not type(None)]
        if len(inner) == 1:
            return _type(inner[0])
        return NumberOr(typing.get_args(inner[1])[0])
    if origin is typing.Literal:
        return OneOf(args)
    if hint is Path:
        return click.Path(path_type=Path)
    if dataclasses.is_dataclass(hint):
        return Parsed(hint)
    return {str: click.STRING, int: click.INT, float: click.FLOAT}[hint]


def _flat(_: click.Context, __: click.Parameter, values: tuple[tuple[Any, ...], ...]) -> Any:
    return tuple(item for several in values for item in several)
