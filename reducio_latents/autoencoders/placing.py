"""How a network is put to work, and what a store says of it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from reducio_latents.autoencoders.protocol import LoadOptions
from reducio_latents.errors import ConfigError
from reducio_latents.vae.tiling import Tiling

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the rank of a weight."""


def lay_out(network: nn.Module, options: LoadOptions) -> None:
    """Lay the weights of convolutions out as `memory_format` asks."""
    if options.memory_format == torch.contiguous_format:
        return
    for parameter in network.parameters():
        if parameter.ndim in CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=CHANNELS_LAST[parameter.ndim])


def precision_of(device: torch.device, dtype: torch.dtype, options: LoadOptions) -> dict[str, Any]:
    """Return `Autoencoder.precision` of a network that is there and has been given `options`."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "memory_format": str(options.memory_format).removeprefix("torch."),
        "compiled": options.compile,
        # PyTorch lets float32 convolutions use 10-bit mantissas unless told otherwise.
        "tf32": device.type == "cuda"
        and dtype == torch.float32
        and torch.backends.cudnn.allow_tf32,
    }


def identity_hash(**identity: Any) -> str:
    """Return the fingerprint of a model: SHA-256 over all that makes it another one, as JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def tiling_record(tiling: Tiling | None) -> dict[str, Any] | None:
    """Return what changes numbers of a tiling, as JSON."""
    if tiling is None:
        return None
    return {"tile_px": tiling.tile_px, "overlap": tiling.overlap}


def tiling_of(record: Any) -> Tiling | None:
    """Return the tiling of a record in a store; raise ConfigError for what is none."""
    if record is None:
        return None
    try:
        return Tiling(tile_px=int(record["tile_px"]), overlap=float(record["overlap"]))
    except (KeyError, TypeError, ValueError) as err:
        raise ConfigError(f"the store's tiling is {record!r}, which is not understood.") from err
