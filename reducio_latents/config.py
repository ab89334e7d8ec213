"""Settings as small frozen dataclasses that cannot exist in a bad state, and how to read them."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from reducio_latents.errors import ConfigError

ConfigT = TypeVar("ConfigT")

RESIZE_MODES = ("bicubic", "bilinear")
IMAGE_CODECS = ("webp", "png", "jpeg", "raw")
DUPLICATE_POLICIES = ("refer", "encode")


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """Which frames of a video make up its clips."""

    frames: int = 16
    """Frames per clip, T."""
    rate_fps: float = 16.0
    """Frames per second of video time; a clip's i-th frame is the one shown at start_s + i/rate."""
    policy: str = "all"
    """Where clips start: `all`, `stride:SECONDS`, `centre`, `uniform:N` or `random:N`."""
    seed: int = 0
    """Seed of the `random:N` policy; each video draws its own starts from (seed, its path)."""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError(f"clip.frames must be >= 1, got {self.frames}.")
        if not 0 < self.rate_fps <= 1000:
            raise ConfigError(f"clip.rate_fps must be in (0, 1000], got {self.rate_fps}.")
        from reducio_latents.clips import parse_policy

        parse_policy(self.policy)

    @property
    def span_s(self) -> float:
        """Seconds from the first frame of a clip to the first frame after it."""
        return self.frames / self.rate_fps


def from_mapping(cls: type[ConfigT], raw: Mapping[str, Any], *, where: str) -> ConfigT:
    """Build the dataclass `cls` from parsed YAML or JSON, refusing keys and types it does not have.

    Nested dataclasses are built from nested mappings; lists become tuples where a tuple is asked
    for. `where` names the source in the message of a ConfigError.
    """
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key in raw:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}."
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
    hints = typing.get_type_hints(cls)
    values = {
        key: convert(value, hints[key], where=f"{where}: {key}") for key, value in raw.items()
    }
    try:
        return cls(**values)
    except TypeError as err:  # a field without a default is missing
        raise ConfigError(f"{where}: {err}.") from err


def convert(value: Any, hint: Any, *, where: str) -> Any:
    """Return `value` as the annotated type `hint`, or raise a ConfigError that names both."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        inner = [arg for arg in args if arg is not type(None)]
        for arg in inner[:-1]:
            try:
                return convert(value, arg, where=where)
            except ConfigError:
                continue
        return convert(value, inner[-1], where=where)
    if origin is typing.Literal:
        if value in args:
            return value
    elif is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return from_mapping(hint, value, where=where)
    elif origin is tuple and isinstance(value, list | tuple):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(convert(item, args[0], where=where) for item in value)
        if len(args) == len(value):
            return tuple(convert(v, arg, where=where) for v, arg in zip(value, args, strict=True))
    elif origin is list and isinstance(value, list | tuple):
        return [convert(item, args[0], where=where) for item in value]
    elif origin is dict and isinstance(value, Mapping):
        return {
            convert(k, args[0], where=where): convert(v, args[1], where=f"{where}.{k}")
            for k, v in value.items()
        }
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif isinstance(hint, type) and hint not in (int, float) and isinstance(value, hint):
        return value
    if origin is typing.Literal:
        wanted = f"one of {', '.join(map(str, args))}"
    else:
        wanted = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ConfigError(f"{where} must be {wanted}, got {value!r}.")
