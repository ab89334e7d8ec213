"""Files of metric weights: read as tensors alone, and named when they cannot be had."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from reducio_latents.core.fetching import one_at_a_time
from reducio_latents.core.regular import open_regular
from reducio_latents.errors import ConfigError, WeightsError

log = logging.getLogger(__name__)


class MetricUnavailableError(ConfigError):
    """A metric has no weights here. Its message says where they come from; there is no number."""


def hub_path(file: str) -> Path:
    """Return where torch.hub keeps a file: below TORCH_HOME, or ~/.cache/torch."""
    return Path(torch.hub.get_dir()) / "checkpoints" / file


def download(url: str, path: Path) -> None:
    """Have torch.hub download a file and check the hash in its name; one process of a machine."""
    match = torch.hub.HASH_REGEX.search(path.name)
    with one_at_a_time(path.with_name(f"{path.name}.lock")):
        if not path.is_file():
            log.warning("fetching %s to %s", url, path)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), match and match[1])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors or from a .pth that torch.save wrote.

    Nothing in the file is executed: a TorchScript archive, which is a program, is refused.
    Raises WeightsError for anything that is not a flat dict of tensors.
    """
    try:
        open_regular(path).close()
    except FileNotFoundError as err:
        raise WeightsError(f"{path}: there is no such file. Check the path.") from err
    except OSError as err:
        raise WeightsError(f"{path} cannot be read: {err.strerror}.") from err
    if is_torchscript(path):
        raise WeightsError(
            f"{path} is a TorchScript archive, a program that would have to be run, and not one "
            "that is known here. Give a state dict (.pt of tensors, or .safetensors)."
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: object = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:  # its message advises to run what is in the file
        raise WeightsError(
            f"{path} is not a file of weights, or holds more than tensors, which is not loaded. "
            "Give a state dict (.pt of tensors, or .safetensors)."
        ) from err
    except Exception as err:  # torch raises anything from EOFError to RuntimeError
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise WeightsError(f"{path} is not a file of weights: {reason}") from err
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise WeightsError(f"{path} holds no flat dict of tensors. Give a state dict.")
    return found


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load all of `tensors` into `module`; raise WeightsError where a key or shape differs."""
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as err:
        # Torch names every key, hundreds for another network: the first of each kind is enough.
        lines = [line.strip().rstrip(". ") for line in str(err).splitlines()[1:3]]
        faults = [re.sub('", .*', '" and others', line) for line in lines]
        raise WeightsError(f"{where} does not fit: {'; '.join(faults)}.") from err


def is_torchscript(path: Path) -> bool:
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())
