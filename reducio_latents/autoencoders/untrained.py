"""Whether a model has learnt anything: its numbers must not be taken for the architecture's."""

from __future__ import annotations

import torch
from torch import nn

from reducio_latents.autoencoders.protocol import Autoencoder


def is_untrained(model: Autoencoder) -> bool:
    """Whether the weights are random: made so by name, or loaded from a file of such.

    A file tells by its normalisation layers. They begin as the identity, and one step of training
    moves them all.
    """
    if model.config.get("random_weights", False):
        return True
    return model.model is not None and _is_untouched(model.model)


def _is_untouched(network: nn.Module) -> bool:
    """Whether there are normalisation layers and each of them has its first weights."""
    seen = False
    for module in network.modules():
        if "norm" not in type(module).__name__.lower():
            continue
        for name, parameter in module.named_parameters(recurse=False):
            first = {"weight": 1.0, "bias": 0.0}.get(name)
            if first is None:
                continue
            if not torch.all(parameter == first):
                return False
            seen = True
    return seen
