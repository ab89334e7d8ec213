"""Checkpoints: a folder that appears whole or not at all, and starting from other weights.

checkpoints/
  step-00005000/
    model/  ema/      model.safetensors and config.json each: what --weights takes
    training.pt       the rest, tensors and plain values alone
    settings.yaml     of the run that wrote it
  best -> step-...    the one that validated best
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reducio_latents.autoencoders.checkpoint import read_all, write_weights
from reducio_latents.core.fetching import WeightsPlace, find_weights
from reducio_latents.core.weight_files import open_tensor_file
from reducio_latents.errors import LatentsError, TrainingError, WeightsError
from reducio_latents.files.local import sync_path
from reducio_latents.train.config import TrainConfig
from reducio_latents.train.settings import SETTINGS, to_yaml
from reducio_latents.train.state import Best, TrainState, update_average
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
        for path in [*partial.rglob("*"), partial]:
            sync_path(path)
        partial.rename(folder)
        sync_path(root)
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
    found = read_all(source)
    taken = _copy_fitting(state.vae, found)
    # A few have the same shape in models of all sizes, such as quant_conv's: they make no start.
    if not any(key.startswith(NETWORKS) and found[key].ndim > 1 for key in taken):
        raise WeightsError(
            f"{path} has {len(found)} tensors, and no weight of its networks fits this model. "
            "Check model.* in the config: import-checkpoint says of what sizes a file is."
        )
    discriminators: Mapping[str, Tensor] = (
        read_training(path / TRAINING)["discriminators"] if own else _published_discriminator(path)
    )
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
