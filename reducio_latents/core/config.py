"""How settings, and what files say, become small frozen dataclasses that cannot be bad."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from typing import Any, TypeVar

from reducio_latents.errors import ConfigError

ConfigT = TypeVar("ConfigT")
Scalar = str | int | float | bool
"""A plain value, as a column of Parquet or a member of JSON holds it."""


def from_mapping(cls: type[ConfigT], raw: Mapping[str, Any], *, where: str) -> ConfigT:
    """Build the dataclass `cls` from parsed YAML or JSON, refusing keys and types it does not have.

    Nested dataclasses are built from nested mappings; lists become tuples where a tuple is asked
    for. `where` names the source in the message of a ConfigError.
    """
    try:
        built: ConfigT = _build(cls, raw)
    except _MisfitError as err:
        raise ConfigError(f"{where}{err}") from err
    return built


def convert(value: Any, hint: Any, *, where: str) -> Any:
    """Return `value` as the annotated type `hint`, or raise a ConfigError that names both."""
    try:
        return _reader(hint)(value)
    except _MisfitError as err:
        raise ConfigError(f"{where}{err}") from err


def check_choices(settings: Any, where: str = "") -> None:
    """Raise ConfigError for a field of a dataclass that is not one of the words it may be.

    `where` stands before the field's name.
    """
    for name, hint in hints_of(settings.__class__).items():
        value = getattr(settings, name)
        words = typing.get_args(hint)
        if type(None) in words and len(words) == 2:  # of a word or None
            hint, words = words[0], typing.get_args(words[0])
            if value is None:
                continue
        if typing.get_origin(hint) is typing.Literal and value not in words:
            choices = ", ".join(map(str, words))
            raise ConfigError(f"{where}{name} is {value!r}; choose one of {choices}.")


def made_from(cls: type[ConfigT], options: ConfigT | None, settings: Any, where: str) -> ConfigT:
    """Return `options`, or what `settings` by name make; raise ConfigError for both."""
    if options is None:
        return from_mapping(cls, settings, where=where)
    if settings:
        raise ConfigError(f"{where}: give options, or settings by name, not both.")
    return options


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return what to say of a key that is none of the known ones."""
    known = list(known)
    close = get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}."
    return f"unknown key {key!r}; {hint}"


class _MisfitError(ConfigError):
    """A value that is not what its annotation asks for; its place is added on the way out."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.place = ""
        self.what = what

    def __str__(self) -> str:
        return f"{self.place}{self.what}"

    def under(self, place: str) -> _MisfitError:
        self.place = place + self.place
        return self


def _build(cls: Any, raw: Mapping[str, Any]) -> Any:
    readers = _field_readers(cls)
    values = {}
    for key, value in raw.items():
        if key not in readers:
            raise _MisfitError(f": {unknown_key(str(key), readers)}")
        try:
            values[key] = readers[key](value)
        except _MisfitError as err:
            raise err.under(f": {key}") from None
    try:
        return cls(**values)
    except TypeError as err:  # a field without a default is missing
        raise _MisfitError(f": {err}.") from err


def _misfit(hint: Any, value: Any) -> _MisfitError:
    return _MisfitError(f" must be {_words(hint)}, got {value!r}.")


# Annotations are taken apart once: a store reads the same few types hundreds of thousands of times.
_Reader = Callable[[Any], Any]


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


@cache
def _field_readers(cls: Any) -> dict[str, _Reader]:
    return {name: _reader(hint) for name, hint in hints_of(cls).items()}


@cache
def _reader(hint: Any) -> _Reader:
    """Return the function that takes a parsed value and returns it as `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return lambda value: value
    if origin in (types.UnionType, typing.Union):
        return _union_reader(args)
    if origin is list or args[1:] == (Ellipsis,):
        item = _reader(args[0])
        return _checked(hint, list | tuple, lambda value: origin([item(v) for v in value]))
    if origin is tuple:
        return _tuple_reader(hint, args)
    if origin is dict:
        return _dict_reader(hint, args)
    if is_dataclass(hint) and isinstance(hint, type):
        return _checked(
            hint, Mapping | hint, lambda raw: raw if isinstance(raw, hint) else _build(hint, raw)
        )
    return _scalar_reader(hint, args)


def _checked(hint: Any, accepted: Any, read: _Reader) -> _Reader:
    def reader(value: Any) -> Any:
        if isinstance(value, accepted):
            return read(value)
        raise _misfit(hint, value)

    return reader


def _words(hint: Any) -> str:
    """Return what a type is called in a file of settings."""
    if isinstance(hint, tuple):
        return " or ".join(map(_words, hint))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return f"a mapping, its keys {', '.join(field.name for field in fields(hint)[:3])}, ..."
    if origin is dict:
        return "a mapping"
    if origin is list or args[1:] == (Ellipsis,):
        return f"a list, each of it {_words(args[0])}"
    if origin is tuple:
        return f"a list of {' and '.join(map(_words, args))}"
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _union_reader(args: tuple[Any, ...]) -> _Reader:
    optional = type(None) in args
    readers = [_reader(arg) for arg in args if arg is not type(None)]

    def reader(value: Any) -> Any:
        if value is None and optional:
            return None
        for read in readers[:-1]:
            try:
                return read(value)
            except ConfigError:
                continue
        try:
            return readers[-1](value)
        except ConfigError:
            if typing.get_origin(args[-1]) is typing.Literal and len(readers) > 1:
                raise _misfit(args, value) from None
            raise

    return reader


def _tuple_reader(hint: Any, args: tuple[Any, ...]) -> _Reader:
    items = [_reader(arg) for arg in args]

    def reader(value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == len(items):
            return tuple(read(v) for read, v in zip(items, value, strict=True))
        raise _misfit(hint, value)

    return reader


def _dict_reader(hint: Any, args: tuple[Any, ...]) -> _Reader:
    key_reader, value_reader = map(_reader, args)

    def read(value: Any) -> Any:
        found = {}
        for key, item in value.items():
            try:
                found[key_reader(key)] = value_reader(item)
            except _MisfitError as err:
                raise err.under(f".{key}") from None
        return found

    return _checked(hint, Mapping, read)


def _scalar_reader(hint: Any, args: tuple[Any, ...]) -> _Reader:
    literal = typing.get_origin(hint) is typing.Literal

    def reader(value: Any) -> Any:
        if type(value) is hint:
            return value
        if literal:
            fits = value in args
        elif hint in (int, float):  # a bool is an int to Python, but not to a reader of YAML
            fits = isinstance(value, Integral if hint is int else Real)
            fits = fits and not isinstance(value, bool)
        elif hint is str:
            fits = isinstance(value, str | os.PathLike)
        else:
            fits = isinstance(hint, type) and isinstance(value, hint)
        if not fits:
            raise _misfit(hint, value)
        return hint(value) if hint in (int, float, str) else value

    return reader
