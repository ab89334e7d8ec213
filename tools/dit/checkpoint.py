"""All that a run needs to go on bit for bit, in one file that appears whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dit.model import DiT, DiTConfig
from reducio_latents.errors import ConfigError, WeightsError
from reducio_latents.files import LocalFiles

CHECKPOINT = "checkpoint.pt"
FORMAT = 1


@dataclass(kw_only=True)
class TrainState:
    """What training changes. No state of random numbers: those of a step follow from its number."""

    model: DiT
    average: DiT
    """Exponential moving average of the weights."""
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Updates done."""


def build_state(config: DiTConfig, *, seed: int, lr: float, device: torch.device) -> TrainState:
    """Return a network at step 0; equal for equal seeds, on every rank."""
    torch.manual_seed(seed)
    model = DiT(config).to(device)
    return TrainState(
        model=model,
        average=deepcopy(model).eval().requires_grad_(False),
        optimizer=torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0),
    )


@torch.no_grad()
def update_average(state: TrainState, decay: float) -> None:
    """Move the average towards the weights; in a run's first steps faster than `decay` says."""
    decay = min(decay, (1 + state.step) / (10 + state.step))
    for average, weight in zip(state.average.parameters(), state.model.parameters(), strict=True):
        average.lerp_(weight, 1 - decay)


def save_checkpoint(
    out: Path, state: TrainState, settings: Mapping[str, Any], loader: Mapping[str, Any]
) -> None:
    """Write the state as `out/checkpoint.pt` in place of the one before."""
    saved = {
        "format": FORMAT,
        "step": state.step,
        "settings": dict(settings),
        "sizes": asdict(state.model.config),
        "model": state.model.state_dict(),
        "average": state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "loader": dict(loader),
    }
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    LocalFiles(out).write(CHECKPOINT, [buffer.getbuffer()])


def load_checkpoint(
    out: Path, state: TrainState, settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Bring `state` to where the run in `out` stands; return its loader's state.

    Return None where there is no checkpoint. Raises WeightsError for one that is damaged, and
    ConfigError, naming what differs, for one of other settings.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # a parser of damaged bytes may raise anything
        why = (str(err).splitlines() or [type(err).__name__])[0]
        raise WeightsError(f"{path} is damaged ({why}). Remove it to begin the run again.") from err
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise WeightsError(f"{path} is no checkpoint of this version. Choose another folder.")
    ours = {**settings, **asdict(state.model.config)}
    theirs = {**saved["settings"], **saved["sizes"]}
    lines = [
        f"{key} is {ours[key]}, was {theirs.get(key)}"
        for key in ours
        if ours[key] != theirs.get(key)
    ]
    if lines:
        raise ConfigError(
            f"{path} is of another run: {'; '.join(lines)}. Give the settings it was begun with, "
            "or another folder."
        )
    state.model.load_state_dict(saved["model"], strict=True)
    state.average.load_state_dict(saved["average"], strict=True)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.step = saved["step"]
    loader: dict[str, Any] = saved["loader"]
    return loader
