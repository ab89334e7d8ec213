"""Starting from other weights: what fits is taken, and what is not is listed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reducio_latents.core.fetching import WeightsPlace, find_weights
from reducio_latents.errors import WeightsError
from reducio_latents.train.checkpoint import MODEL, TRAINING, read_training
from reducio_latents.train.state import TrainState, update_average
from reducio_latents.vae.weight_files import open_tensor_file
from reducio_latents.vae.weights import check_values, open_state_dict

PUBLISHED_DISCRIMINATOR = "loss.discriminator."
NETWORKS = ("encoder_3d.", "encoder_2d.", "decoder.")


@dataclass(frozen=True)
class Taken:
    """What became of a file's weights."""

    path: Path
    taken: int
    """Tensors that were taken."""
    missing: tuple[str, ...]
    """Keys of the model that the file does not have; they stay as they were initialised."""
    unused: tuple[str, ...]
    """Keys of the file that the model does not have, or has in another shape, and why."""

    def lines(self) -> list[str]:
        """Say it in words, one line for each tensor that was not taken."""
        return [
            f"pretrained: {self.taken} tensors of {self.path}",
            *(f"  not in the file: {key}" for key in self.missing),
            *(f"  not taken: {key}" for key in self.unused),
        ]


def take_pretrained(state: TrainState, weights: WeightsPlace) -> Taken:
    """Start from `weights`, where names and shapes agree.

    They are what `encode-corpus --weights` takes, or a folder of this trainer's: `step-N`, or
    its `model` or `ema`. Discriminators are taken along where the file has them. Raises
    WeightsError for a file without weights, and for one that fits no network.
    """
    path = find_weights(weights)
    own = (path / MODEL).is_dir()
    source = open_state_dict(path / MODEL if own else path)
    found = {key: source.read(key) for key in source.shapes}
    for key, tensor in found.items():
        check_values(key, tensor, source.where)
    taken = _copy_fitting(state.vae, found)
    # A few have the same shape in models of all sizes, such as quant_conv's: they make no start.
    if not any(key.startswith(NETWORKS) and found[key].ndim > 1 for key in taken):
        raise WeightsError(
            f"{path} has {len(found)} tensors, and no weight of its networks fits this model. "
            "Check model.* in the config: import-checkpoint says of what sizes a file is."
        )
    discriminators = _own_discriminators(path) if own else _published_discriminator(path)
    wanted = {**state.vae.state_dict(), **_prefixed(state.discriminators.state_dict())}
    offered = {**found, **_prefixed(discriminators)}
    taken |= {DISCRIMINATORS + key for key in _copy_fitting(state.discriminators, discriminators)}
    if state.average is not None:
        update_average(state.average, state.vae, decay=0.0)
    return Taken(
        path=path,
        taken=len(taken),
        missing=tuple(sorted(wanted.keys() - offered.keys())),
        unused=tuple(_why_not(key, offered[key], wanted) for key in sorted(offered.keys() - taken)),
    )


@torch.no_grad()
def _copy_fitting(module: nn.Module, found: Mapping[str, Tensor]) -> set[str]:
    """Copy every tensor whose name and shape the module has; return their names."""
    taken = set()
    for key, tensor in module.state_dict().items():
        if key in found and found[key].shape == tensor.shape:
            tensor.copy_(found[key])
            taken.add(key)
    return taken


DISCRIMINATORS = "discriminators."


def _prefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {DISCRIMINATORS + key: tensor for key, tensor in tensors.items()}


def _own_discriminators(folder: Path) -> Mapping[str, Tensor]:
    found: Mapping[str, Tensor] = read_training(folder / TRAINING)["discriminators"]
    return found


def _published_discriminator(path: Path) -> dict[str, Tensor]:
    """Return the 3-D discriminator of a published checkpoint, if it has one."""
    file = open_tensor_file(path)
    names = {name.removeprefix("module."): name for name in file.shapes}
    return {
        f"3d.{key.removeprefix(PUBLISHED_DISCRIMINATOR)}": file.read(name)
        for key, name in names.items()
        if key.startswith(PUBLISHED_DISCRIMINATOR)
    }


def _why_not(key: str, tensor: Tensor, wanted: Mapping[str, Tensor]) -> str:
    if key not in wanted:
        return f"{key} (the model has no such tensor)"
    return f"{key} (is {tuple(tensor.shape)}, the model's {tuple(wanted[key].shape)})"
