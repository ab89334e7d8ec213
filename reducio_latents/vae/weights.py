"""Published weights: their keys, the model that fits them, and what identifies them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from reducio_latents.core.weight_files import (
    Shapes,
    StateDict,
    check_keys,
    open_tensor_file,
    shapes_of,
    some,
)
from reducio_latents.errors import ConfigError, WeightsError
from reducio_latents.vae.config import ReducioVAEConfig
from reducio_latents.vae.model import DIFFERENCE_SCALE, PARTS, Parts, ReducioVAE
from reducio_latents.vae.rule_weights import rule_weight

TRAINING_PREFIX = "loss."
"""Discriminator and loss: of use to training only."""
EMA_PREFIX = "model_ema."


def open_state_dict(path: Path, *, ema: bool | None = None) -> StateDict:
    """Open a Reducio-VAE weights file; `module.` prefixes and `loss.*` keys are taken off.

    A training checkpoint may hold the weights twice, the second time averaged (`model_ema.*`).
    These are two models with different latents, so the caller must say which: ema=True or False.
    Raises WeightsError for a file that is not one of weights, or if the choice is missing.
    """
    file = open_tensor_file(path)
    keys = _own_keys(file.shapes, where=file.where)
    averaged = {key for key in keys if key.startswith(EMA_PREFIX)}
    plain = {key: keys[key] for key in keys.keys() - averaged}
    if averaged and ema is None:
        raise WeightsError(
            f"{file.where} holds the weights twice, as trained and averaged ({len(averaged)} keys "
            f"{EMA_PREFIX}*). Choose with import-checkpoint --ema or --no-ema, and use its result."
        )
    if ema and not averaged:
        raise WeightsError(
            f"{file.where} holds no averaged weights (no keys {EMA_PREFIX}*). Leave --ema out."
        )
    kept = {key: name for key, name in plain.items() if not key.startswith(TRAINING_PREFIX)}
    if ema:
        kept = _averaged_keys(kept, {key: keys[key] for key in averaged}, file.where)
    return StateDict(
        where=file.where,
        shapes={key: file.shapes[name] for key, name in kept.items()},
        read=lambda key: file.read(kept[key]),
        dropped=len(file.shapes) - len(kept),
    )


def _own_keys(names: Iterable[str], where: str) -> dict[str, str]:
    """Return the file's names by key, `module.` taken off."""
    keys: dict[str, str] = {}
    for name in names:
        key = name.removeprefix("module.")
        if key in keys:
            raise WeightsError(f"{where} has {key} twice, as {keys[key]} and as {name}.")
        keys[key] = name
    return keys


def _averaged_keys(
    kept: Mapping[str, str], averaged: Mapping[str, str], where: str
) -> dict[str, str]:
    """Return `kept` with the averaged copy of every trained tensor; copies have keys without dots.

    Position codes are not trained, so there is no copy of them.
    """
    copies = {key.removeprefix(EMA_PREFIX): name for key, name in averaged.items()}
    missing = [
        key for key in kept if key.replace(".", "") not in copies and not key.endswith("pos_embed")
    ]
    if missing:
        raise WeightsError(f"{where} has no averaged copy of {some(missing)}. Use --no-ema.")
    return {key: copies.get(key.replace(".", ""), name) for key, name in kept.items()}


def infer_config(shapes: Shapes, where: str = "the weights") -> ReducioVAEConfig:
    """Read widths, latent channels, temporal stride and target off the shapes of a state dict.

    Raises WeightsError where they are not those of a Reducio-VAE.
    """
    try:
        # Time is halved at level 3 by a kernel of 3 along it; where it is kept the kernel is 1.
        halves_time_at_3 = shapes["encoder_3d.down.3.downsample.conv.weight"][2] == 3
        return ReducioVAEConfig(
            temporal_stride=4 if halves_time_at_3 else 2,
            width=shapes["encoder_3d.conv_in.weight"][0],
            content_width=shapes["encoder_2d.conv_in.weight"][0],
            decoder_width=shapes["decoder.norm_out.weight"][0],
            latent_channels=shapes["quant_conv.weight"][0] // 2,
            target="difference" if DIFFERENCE_SCALE in shapes else "video",
        )
    except (KeyError, IndexError) as err:
        raise WeightsError(
            f"{where} does not hold a Reducio-VAE: {_missing(err)}. "
            f"It has {len(shapes)} keys: {some(sorted(shapes))}."
        ) from err
    except ConfigError as err:
        raise WeightsError(f"{where} does not hold a Reducio-VAE: {err}") from err


def _missing(err: KeyError | IndexError) -> str:
    return f"no {err.args[0]}" if isinstance(err, KeyError) else "a tensor has too few axes"


@lru_cache
def expected_shapes(config: ReducioVAEConfig) -> Shapes:
    """Return every key and shape of the model, without making it."""
    with torch.device("meta"):
        model = ReducioVAE(config)
    return MappingProxyType(shapes_of(model.state_dict()))


def check_shapes(found: Shapes, config: ReducioVAEConfig, where: str) -> None:
    """Raise WeightsError, naming some keys of each kind, unless keys and shapes are exact."""
    sizes = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
    check_keys(f"{where} does not fit a Reducio-VAE ({sizes})", found, expected_shapes(config))


def check_config(found: ReducioVAEConfig, wanted: ReducioVAEConfig, where: str) -> None:
    """Raise WeightsError, naming what differs, unless the file's sizes are the wanted ones."""
    was = asdict(found)
    differs = [
        f"{name} is {was[name]}, not {value}"
        for name, value in asdict(wanted).items()
        if was[name] != value
    ]
    if differs:
        raise WeightsError(f"{where} holds another Reducio-VAE: {', '.join(differs)}.")


class WeightsDigest:
    """SHA-256 of a set of named tensors: of every key, dtype, shape and value, in any order."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, key: str, tensor: Tensor) -> None:
        values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(values.numpy().data).hexdigest()
        shape = "x".join(map(str, tensor.shape))
        self._lines.append(f"{key} {str(tensor.dtype).removeprefix('torch.')} {shape} {digest}\n")

    def hexdigest(self) -> str:
        return hashlib.sha256("".join(sorted(self._lines)).encode()).hexdigest()


class LoadedVAE(NamedTuple):
    """A model with its weights, and what identifies them."""

    model: ReducioVAE
    weights_sha256: str
    """Of all weights as they lie in the file, whichever parts and dtype were loaded."""


def load_vae(
    state: StateDict,
    parts: Parts = "all",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadedVAE:
    """Build the model that the weights fit, and load them strictly; dtype=None keeps the file's.

    Every tensor is read once, one after another; parts that are not wanted take no memory.
    Raises WeightsError for keys or shapes that do not fit, and for values that are not finite.
    """
    config = infer_config(state.shapes, state.where)
    check_shapes(state.shapes, config, state.where)
    with torch.device("meta"):
        model = ReducioVAE(config, parts)
    digest = WeightsDigest()
    kept: dict[str, Tensor] = {}
    for key in state.shapes:
        tensor = state.read(key)
        check_values(key, tensor, state.where)
        digest.add(key, tensor)
        if key == DIFFERENCE_SCALE or key.partition(".")[0] in PARTS[parts]:
            # A copy: the file may be replaced while the model is in use.
            kept[key] = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
    model.load_state_dict(kept, strict=True, assign=True)
    return LoadedVAE(model, digest.hexdigest())


def check_values(key: str, tensor: Tensor, where: str) -> None:
    if not tensor.is_floating_point():
        raise WeightsError(
            f"{where}: {key} is {tensor.dtype}; quantised weights are not supported. "
            "Give float32, bfloat16 or float16 weights."
        )
    if not torch.isfinite(tensor).all():
        raise WeightsError(
            f"{where}: {key} has values that are not finite. Use another checkpoint."
        )


def random_state_dict(config: ReducioVAEConfig, seed: int = 0) -> StateDict:
    """Return weights made by rule: untrained, and the same for a seed on every machine."""
    shapes = expected_shapes(config)
    return StateDict(
        where=f"random weights, seed {seed}",
        shapes=shapes,
        read=lambda key: rule_weight(key, shapes[key], seed),
    )
