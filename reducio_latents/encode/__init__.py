"""Encoding: a corpus in, a store out.

The public names load on first use: what measures a GPU alone needs no store and no video library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reducio_latents.encode.add import add_column
    from reducio_latents.encode.options import EncodeOptions
    from reducio_latents.encode.report import EncodeReport
    from reducio_latents.encode.run import encode_corpus, plan_corpus
    from reducio_latents.store.whole import Tally

__all__ = ["EncodeOptions", "EncodeReport", "Tally", "add_column", "encode_corpus", "plan_corpus"]

_HOME = {
    "EncodeOptions": "options",
    "EncodeReport": "report",
    "Tally": "report",
    "add_column": "add",
    "encode_corpus": "run",
    "plan_corpus": "run",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
