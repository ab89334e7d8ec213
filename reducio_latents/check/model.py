"""The model that a store's latents decode with: loaded, and proven to be the one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from reducio_latents.autoencoders import Autoencoder, load_autoencoder
from reducio_latents.check.clips import MOTION
from reducio_latents.core.devices import usable_device
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.store import Store
from reducio_latents.store.meta import differences
from reducio_latents.vae.tiling import Tiling

NOT_IDENTITY = frozenset({"precision", "resize", "deinterlace"})
"""What of a column's config may differ: rounding, and what was done before the model."""


def load_store_model(
    store: Store,
    *,
    model: str | None = None,
    weights: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Autoencoder:
    """Load the autoencoder that made the motion latents of `store`, to decode them.

    `model` is a name for `load_autoencoder`, by default the one that the store names; `weights`
    says where its weights lie now; `device` may be `auto`. Frames are tiled as they were encoded.

    Raises StoreError, saying what differs, for a model that is not the store's.
    """
    store.require_columns([MOTION])
    motion = store.meta.columns[MOTION]
    loaded = load_autoencoder(
        model or motion.encoder,
        weights,
        device=usable_device(device),
        dtype=dtype,
        tiling=_tiling(motion.config.get("tiling")),
        parts="decoder",
    )
    lines = differences(_identity(loaded.config), _identity(motion.config))
    if lines:
        raise StoreError(
            f"{store.files.url} was made by another model ({motion.encoder}), so {loaded.name} "
            f"cannot decode it: {'; '.join(lines[:4])}. Give the weights that made it."
        )
    return loaded


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NOT_IDENTITY}


def _tiling(stored: Any) -> Tiling | None:
    if stored is None:
        return None
    try:
        return Tiling(tile_px=int(stored["tile_px"]), overlap=float(stored["overlap"]))
    except (KeyError, TypeError, ValueError) as err:
        raise ConfigError(f"the store's tiling is {stored!r}, which is not understood.") from err
