"""Packages that only some work needs: imported where it begins, their errors in one line."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from reducio_latents.errors import ConfigError


def import_library(name: str, needed_for: str = "this model", *, extra: str = "models") -> Any:
    """Import a package of the extra `extra`; a ConfigError says how to install a missing one."""
    try:
        return import_module(name)
    # A package beside it that is installed but broken (torchvision is a known one) raises anything.
    except Exception as err:
        raise ConfigError(
            f"{needed_for} needs {name}, which cannot be imported ({first_line(err)}). "
            f"Install it: pip install 'reducio-latents[{extra}]'."
        ) from err


def first_line(err: BaseException) -> str:
    """Return the first line of what an error says, shortened, without its full stop."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return (lines[0] if lines else type(err).__name__)[:200].rstrip(".")
