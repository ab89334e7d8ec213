"""Devices by name."""

from __future__ import annotations

import torch

from reducio_latents.errors import ConfigError


def usable_device(name: torch.device | str) -> torch.device:
    """Return a device that tensors can be put on; `auto` is a GPU if there is one.

    Raise ConfigError for any other name, saying what there is.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except Exception as err:  # what torch raises differs from backend to backend
        raise ConfigError(
            f"device {str(name)!r} cannot be used here: {_why(str(name), err)} Use {_others()}."
        ) from err
    if device.type == "meta":
        raise ConfigError(f"device 'meta' holds no numbers. Use {_others()}.")
    return device


def _why(name: str, err: Exception) -> str:
    kind = name.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU."
    if kind == "cuda" and torch.cuda.device_count() > 0:
        return f"there are {torch.cuda.device_count()} GPUs, numbered from 0."
    if "Expected one of" in str(err) or "Invalid device string" in str(err) or not name:
        return "no device is called so."
    return f"this torch ({torch.__version__}) has no such device on this machine."


def _others() -> str:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ", ".join(["auto", "cpu", *(f"cuda:{i}" for i in range(min(gpus, 8)))])
