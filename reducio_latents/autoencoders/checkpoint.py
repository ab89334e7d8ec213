"""A folder of Reducio-VAE weights: `model.safetensors`, and `config.json` that says what it is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reducio_latents.autoencoders.pretrained import CONFIG_FILE
from reducio_latents.autoencoders.protocol import identity_hash
from reducio_latents.core.config import from_mapping
from reducio_latents.core.fetching import WeightsPlace, find_weights
from reducio_latents.core.parsing import parse_json
from reducio_latents.core.regular import read_small
from reducio_latents.core.weight_files import MODEL_FILE, StateDict, open_tensor_file
from reducio_latents.errors import ConfigError, StoreError, WeightsError
from reducio_latents.vae.config import ReducioVAEConfig
from reducio_latents.vae.model import FINAL_RULE
from reducio_latents.vae.weights import (
    WeightsDigest,
    check_config,
    check_shapes,
    check_values,
    infer_config,
    open_state_dict,
)

ARCHITECTURE = "reducio-vae"


@dataclass(frozen=True)
class ImportedWeights:
    """What `import_checkpoint` found and wrote."""

    folder: Path
    config: ReducioVAEConfig
    parameters: int
    weights_sha256: str
    dropped: int
    """Keys of the file that inference does not need."""

    @property
    def fingerprint(self) -> str:
        return reducio_fingerprint(self.config, self.weights_sha256)


def reducio_fingerprint(config: ReducioVAEConfig, weights_sha256: str) -> str:
    """Identify a Reducio-VAE: SHA-256 over its architecture, final rule and weights."""
    return identity_hash(
        architecture=ARCHITECTURE,
        config=asdict(config),
        final_rule=FINAL_RULE,
        weights_sha256=weights_sha256,
    )


def import_checkpoint(
    src: WeightsPlace, dst_dir: Path, *, ema: bool | None = None
) -> ImportedWeights:
    """Turn published weights into a folder that loads fast and names its own sizes.

    ema chooses between the averaged and the plain weights where the file holds both. The numbers
    and their dtype stay as they are. Raises WeightsError if the file is not a Reducio-VAE and for
    a folder that holds something else; nothing is overwritten.
    """
    state = open_state_dict(find_weights(src), ema=ema)
    config = infer_config(state.shapes, state.where)
    check_shapes(state.shapes, config, state.where)
    tensors = read_all(state)
    sha256 = write_weights(tensors, config, dst_dir)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return ImportedWeights(dst_dir, config, parameters, sha256, state.dropped)


def read_all(state: StateDict) -> dict[str, Tensor]:
    """Return all tensors of a file; WeightsError for values that are not finite."""
    tensors = {key: state.read(key) for key in state.shapes}
    for key, tensor in tensors.items():
        check_values(key, tensor, state.where)
    return tensors


def write_weights(tensors: Mapping[str, Tensor], config: ReducioVAEConfig, folder: Path) -> str:
    """Write `model.safetensors`, then `config.json`, each whole or not at all; return the sha256.

    What is there already of these weights is kept, so a killed write is finished by the next one;
    a folder with other files of these names is refused with a WeightsError.
    """
    from safetensors.torch import save_file

    digest = WeightsDigest()
    for key, tensor in tensors.items():
        digest.add(key, tensor)
    sha256 = digest.hexdigest()
    _refuse_other_weights(folder, sha256)
    if not (folder / MODEL_FILE).exists():
        with _replacing(folder / MODEL_FILE) as partial:
            save_file({k: t.contiguous() for k, t in tensors.items()}, partial, {"format": "pt"})
    description = {
        "architecture": ARCHITECTURE,
        "config": asdict(config),
        "weights_sha256": sha256,
        "fingerprint": reducio_fingerprint(config, sha256),
    }
    with _replacing(folder / CONFIG_FILE) as partial:
        partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return sha256


def _refuse_other_weights(folder: Path, sha256: str) -> None:
    config, model = folder / CONFIG_FILE, folder / MODEL_FILE
    if config.exists() and read_description(folder) is None:
        raise WeightsError(f"{config} belongs to something else. Give an empty folder.")
    if not model.exists():
        return
    digest, found = WeightsDigest(), open_tensor_file(model)
    for key in found.shapes:
        digest.add(key, found.read(key))
    if digest.hexdigest() != sha256:
        raise WeightsError(
            f"{model} holds other weights. Give an empty folder. Their sha256 is "
            f"{digest.hexdigest()[:12]}, not {sha256[:12]}."
        )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success it is on disk and takes its name."""
    from safetensors import SafetensorError

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode  # safetensors leaves a file that its owner alone may read
        yield partial
        partial.chmod(mode)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as err:
        raise StoreError(f"cannot write {path}: {err}.") from err
    finally:
        with suppress(OSError):
            partial.unlink()


def read_description(folder: Path) -> dict[str, Any] | None:
    """Return what our `config.json` in `folder` says, or None if there is none of ours."""
    try:
        raw = parse_json(read_small(folder / CONFIG_FILE))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return None
    if not isinstance(raw, dict) or raw.get("architecture") != ARCHITECTURE:
        return None
    return raw


def check_description(weights: Path, config: ReducioVAEConfig, weights_sha256: str) -> None:
    """Raise WeightsError if a description beside the weights file speaks of other weights.

    Then a file was replaced or damaged after it was written. Without a description all is well.
    """
    folder = weights if weights.is_dir() else weights.parent
    if not weights.is_dir() and weights.name != MODEL_FILE:
        return
    description = read_description(folder)
    if description is None:
        return
    where = str(folder / CONFIG_FILE)
    try:
        written = from_mapping(ReducioVAEConfig, description["config"], where=where)
    except (ConfigError, KeyError) as err:
        raise WeightsError(f"{where} cannot be read: {err}. Import the checkpoint again.") from err
    check_config(config, written, str(weights))
    if description.get("weights_sha256") != weights_sha256:
        raise WeightsError(
            f"{folder / MODEL_FILE} is not what {CONFIG_FILE} beside it describes: it was damaged "
            f"or replaced (sha256 {weights_sha256[:12]}, not "
            f"{str(description.get('weights_sha256'))[:12]}). "
            "Import the checkpoint again, into an empty folder."
        )
