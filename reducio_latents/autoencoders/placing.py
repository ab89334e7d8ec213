"""How a network is put to work: layout of its weights, and what that and its dtype are called."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from reducio_latents.autoencoders.protocol import LoadOptions

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the rank of a weight."""


def lay_out(network: nn.Module, options: LoadOptions) -> None:
    """Lay the weights of convolutions out as `memory_format` asks."""
    if options.memory_format == torch.contiguous_format:
        return
    for parameter in network.parameters():
        if parameter.ndim in LAYOUTS:
            parameter.data = parameter.data.contiguous(memory_format=LAYOUTS[parameter.ndim])


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
