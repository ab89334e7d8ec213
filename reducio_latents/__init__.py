"""Encode a video corpus into VAE latents once, and stream them to diffusion training.

The public names below load on first use, so `import reducio_latents` and the command line's
`--help` answer before torch could.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reducio_latents.version import __version__

if TYPE_CHECKING:
    from reducio_latents.autoencoders import load_autoencoder
    from reducio_latents.dataset import LatentDataset, LatentLoader, LatentTable
    from reducio_latents.encode import encode_corpus
    from reducio_latents.store import open_store

__all__ = [
    "LatentDataset",
    "LatentLoader",
    "LatentTable",
    "__version__",
    "encode_corpus",
    "load_autoencoder",
    "open_store",
]

_HOME = {
    "LatentDataset": "dataset",
    "LatentLoader": "dataset",
    "LatentTable": "dataset",
    "encode_corpus": "encode",
    "load_autoencoder": "autoencoders",
    "open_store": "store",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
