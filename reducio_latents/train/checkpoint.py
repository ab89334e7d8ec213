"""Checkpoints: a folder that appears whole or not at all, and what is kept of them.

checkpoints/
  step-00005000/
    model/  ema/      model.safetensors and config.json each: what --weights takes
    training.pt       the rest, tensors and plain values alone
    settings.yaml     of the run that wrote it
  best -> step-...    the one that validated best
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from reducio_latents.autoencoders.checkpoint import write_weights
from reducio_latents.errors import LatentsError, TrainingError, WeightsError
from reducio_latents.train.config import TrainConfig
from reducio_latents.train.settings import SETTINGS, to_yaml
from reducio_latents.train.state import Best, TrainState
from reducio_latents.vae import ReducioVAE
from reducio_latents.vae.weights import check_config, infer_config, open_state_dict

FORMAT = 1
STEP = "step-"
MODEL, AVERAGE, TRAINING, BEST = "model", "ema", "training.pt", "best"


def checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints below `root`, oldest first."""
    return sorted(path for path in root.glob(f"{STEP}*") if path.is_dir())


def save_checkpoint(root: Path, state: TrainState, config: TrainConfig) -> Path:
    """Write the state as `root/step-N`, durably; return the folder.

    Raises TrainingError if it cannot be written; then the older ones are as they were.
    """
    folder = root / f"{STEP}{state.step:08d}"
    if folder.exists():
        return folder
    partial = root / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(state.vae, partial / MODEL)
        if state.average is not None:
            _write(state.average, partial / AVERAGE)
        with (partial / TRAINING).open("wb") as file:
            torch.save(_training_state(state), file)
        (partial / SETTINGS).write_text(to_yaml(config))
        _sync(partial)
        partial.rename(folder)
        _sync_one(root)
    except (OSError, RuntimeError, LatentsError) as err:
        shutil.rmtree(partial, ignore_errors=True)
        # Over what the system said of a file, torch.save raises a RuntimeError of its own.
        covered = isinstance(err, RuntimeError) and isinstance(err.__context__, OSError)
        why = err.__context__ if covered else err
        raise TrainingError(
            f"cannot save {folder}: {str(why).rstrip('.')}. Older checkpoints are as they were."
        ) from err
    return folder


def prune(root: Path, best: Best | None, keep_last: int) -> None:
    """Point `best` at the best checkpoint, and delete all but it and the newest `keep_last`.

    What a run that was killed left of others goes as well.
    """
    found = checkpoints(root)
    kept = set(found[-keep_last:])
    best_folder = None if best is None else root / f"{STEP}{best.step:08d}"
    if best_folder in found:
        kept.add(best_folder)
        link = root / f".{BEST}.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(best_folder.name)
        link.replace(root / BEST)
    for path in found:
        if path not in kept:
            # Under another name first, so that a half-deleted one is never taken for whole.
            path.rename(path.with_name(f".{path.name}.deleted"))
    for path in root.glob(f".{STEP}*"):
        shutil.rmtree(path)


def load_checkpoint(folder: Path, state: TrainState) -> None:
    """Bring `state` to where the checkpoint left it; WeightsError for one that is damaged."""
    saved = read_training(folder / TRAINING)
    try:
        _load_weights(state.vae, folder / MODEL)
        if state.average is not None:
            averaged = folder / AVERAGE
            _load_weights(state.average, averaged if averaged.exists() else folder / MODEL)
    except WeightsError as err:
        raise WeightsError(f"{err} {_without(folder)}") from err
    state.discriminators.load_state_dict(saved["discriminators"])
    state.vae_optimizer.load_state_dict(saved["vae_optimizer"])
    if state.discriminator_optimizer is not None:
        state.discriminator_optimizer.load_state_dict(saved["discriminator_optimizer"])
    if state.scaler.is_enabled() and saved["scaler"]:
        state.scaler.load_state_dict(saved["scaler"])
    state.step, state.batches = saved["step"], saved["batches"]
    state.best = None if saved["best"] is None else Best(**saved["best"])


def _write(vae: ReducioVAE, folder: Path) -> None:
    write_weights({k: t.cpu() for k, t in vae.state_dict().items()}, vae.config, folder)


def _training_state(state: TrainState) -> dict[str, Any]:
    optimizer = state.discriminator_optimizer
    return {
        "format": FORMAT,
        "step": state.step,
        "batches": state.batches,
        "best": None if state.best is None else asdict(state.best),
        "discriminators": state.discriminators.state_dict(),
        "vae_optimizer": state.vae_optimizer.state_dict(),
        "discriminator_optimizer": None if optimizer is None else optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
    }


def read_training(path: Path) -> Mapping[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # whatever a parser of damaged bytes raises says the same of the file
        raise WeightsError(
            f"{path} is damaged ({(str(err).splitlines() or [type(err).__name__])[0]}). "
            f"{_without(path.parent)}"
        ) from err
    if saved.get("format") != FORMAT:
        raise WeightsError(
            f"{path} has format {saved.get('format')}; this version reads {FORMAT}. Resume with "
            "the version that wrote it, or start anew with --pretrained."
        )
    return saved


def _without(folder: Path) -> str:
    return f"Remove the folder {folder} to continue from the checkpoint before it."


def _load_weights(vae: ReducioVAE, folder: Path) -> None:
    state = open_state_dict(folder)
    check_config(infer_config(state.shapes, state.where), vae.config, state.where)
    vae.load_state_dict({key: state.read(key) for key in state.shapes}, strict=True)


def _sync(folder: Path) -> None:
    """Make a folder and all that is in it durable."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
