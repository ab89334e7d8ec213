"""Click options out of the fields of dataclasses, which say their types, words, defaults and help.

A command lists the fields that it takes, under headings; it is called with the dataclass, built of
what was given. What is not given is left to the dataclass.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache, partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from reducio_latents.core.config import hints_of


@cache
def field_notes(cls: type, *, brief: bool = False) -> dict[str, str]:
    """Return the string literal that follows each field of a class in its source, on one line.

    `brief`: its first paragraph. None if there is no source, as in a package of bytecode alone.
    """
    notes = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        for field, note in pairwise(typing.cast(ast.ClassDef, tree.body[0]).body):
            match field, note:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=text)),
                ):
                    paragraph = str(text).partition("\n\n" if brief else "\0")[0]
                    notes[name] = " ".join(paragraph.split())
    return notes


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
    "corpus": "CORPUS",
    "filters": "CONDITIONS",
    "text.layer": "N|all",
    "text.model": "[NAME=]DIR|HUB",
    "text.template": "TEXT",
    "fvd_weights": "FILE|HUB",
    "lpips_weights": "NET=FILE",
    "models": "NAME[=WEIGHTS]",
    "policy": "POLICY",
    "pretrained": "FILE|DIR|HUB",
    "buckets": "square|aspect|TxHxW,...",
    "resolution": "PX|HxW",
    "root": "DIR",
    "scorer": "MODULE:FUNCTION",
    "shots": "detect[:NAME]|FILE",
    "sort": "[-]NAME",
    "selection.buckets": "TxHxW,...",
    "weights": "FILE|DIR|HUB",
}
"""What stands for the value in the help, if the type does not say enough."""


class Value(click.ParamType):  # type: ignore[type-arg]
    """A value of the type that a field is annotated as."""

    name = "value"

    def __init__(self, hint: Any) -> None:
        self.hint = hint

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return _read(self.hint, value)
        except ValueError as err:
            self.fail(str(err), param, ctx)


def _read(hint: Any, text: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        for value in args:
            if str(value) == text:
                return value
        several = "one of " if len(args) > 1 else ""
        raise ValueError(f"{text!r} is not {several}{', '.join(map(str, args))}.")
    if _is_union(origin):
        says = []
        for arg in args:
            if arg is not types.NoneType:
                try:
                    return _read(arg, text)
                except ValueError as err:
                    says.append(str(err))
        is_not = f"{text!r} is not "
        said = ", nor ".join(why.removeprefix(is_not).rstrip(".") for why in says)
        raise ValueError(f"{is_not}{said}." if says[0].startswith(is_not) else f"{said}.")
    if origin is tuple and not hasattr(args[0], "parse"):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise ValueError(f"{text!r} names nothing; write A,B,... or leave the option out.")
        return tuple(_read(args[0], part) for part in parts)
    if origin is tuple:
        return (args[0].parse(text),)
    if origin is Mapping:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} has no '='.")
        return ((_read(args[0], key), _read(args[1], value)),)
    try:
        return hint(text)
    except ValueError:
        kind = "a whole number" if hint is int else "a number"
        raise ValueError(f"{text!r} is not {kind}.") from None


def _is_union(origin: Any) -> bool:
    return origin in (types.UnionType, typing.Union)


def _stands_for(hint: Any) -> str:
    """Return what stands for a value of a type in the help."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "|".join(map(str, args))
    if _is_union(origin):
        return "|".join(_stands_for(arg) for arg in args if arg is not types.NoneType)
    if origin is tuple:
        return f"{_stands_for(args[0])},..."
    return {int: "N", float: "X", Path: "FILE"}.get(hint, "NAME")


class FieldOption(click.Option):
    """An option that a field of a dataclass declares; its help is read when it is asked for."""

    def __init__(self, *args: Any, owner: type, usual: Any, heading: str, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.owner, self.heading = owner, heading
        text = ",".join(map(str, usual)) if isinstance(usual, tuple | dict) else str(usual)
        self.shown = f"  [{text}]" if text not in ("None", "False", "") else ""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        field = str(self.name).rpartition("__")[2]
        self.help = field_notes(self.owner, brief=True).get(field, "") + self.shown
        return super().get_help_record(ctx)


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


def takes(cls: type, headed: Mapping[str, str]) -> Callable[[Decorated], Decorated]:
    """Return a decorator that gives a command options for fields of `cls`: heading -> their names.

    `clip.frames` is a field of a nested dataclass. The command gets the dataclass as `options`.
    """
    fields = [(path, heading) for heading, paths in headed.items() for path in paths.split()]

    def decorate(function: Decorated) -> Decorated:
        @wraps(function)
        def run(*args: Any, **settings: Any) -> Any:
            given = {path: settings.pop(path.replace(".", "__")) for path, _ in fields}
            given = {p: value for p, value in given.items() if value not in (None, (), {}, False)}
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
    """Return the default of a field; MISSING if it has none."""
    if base is not None:
        return getattr(base, name)
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _option(cls: type, path: str, heading: str) -> Callable[[Decorated], Decorated]:
    owner, base = cls, None
    *outer, name = path.split(".")
    for part in outer:
        base = _default(owner, part, base)
        owner = type(base)
    default, hint = _default(owner, name, base), hints_of(owner)[name]
    if _is_union(typing.get_origin(hint)):  # what may be a list may also be repeated
        lists = [arg for arg in typing.get_args(hint) if typing.get_origin(arg) is tuple]
        hint = lists[0] if lists else hint
    required = default is dataclasses.MISSING
    origin = typing.get_origin(hint)
    kind: dict[str, Any] = {"is_flag": True}
    if hint is not bool:
        stands_for = "SECONDS" if name.endswith("_s") else _stands_for(hint)
        metavar = METAVARS.get(path) or METAVARS.get(name) or stands_for
        kind = {"type": Value(hint), "metavar": metavar}
    if origin in (tuple, Mapping):
        kind |= {"multiple": True, "callback": partial(_joined, origin)}
    prefix = "".join(f"{part}-" for part in outer if part not in FLAT)
    words = SPELLED.get(path) or SPELLED.get(name) or name
    return click.option(
        f"--{prefix}{words}".replace("_", "-"),
        path.replace(".", "__"),
        cls=FieldOption,
        owner=owner,
        heading=heading,
        usual=None if required else default,
        required=required,
        **kind,
    )


def _joined(origin: Any, _: click.Context, __: click.Parameter, several: Any) -> Any:
    """Return the values of an option that was repeated as one tuple, or as one mapping."""
    items = tuple(item for values in several for item in values)
    return items if origin is tuple else dict(items)
