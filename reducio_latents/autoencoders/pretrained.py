"""Models of diffusers and transformers: find them, load them strictly, and say which they are.

A name is a folder, a file, or one of the Hugging Face Hub, as `core.fetching` reads them.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from reducio_latents.core.fetching import (
    HUB_TIMEOUT_S,
    WEIGHT_SUFFIXES,
    HubName,
    fetch_file,
    hub_library,
    hub_lock,
    hub_name,
    one_at_a_time,
    why_not,
)
from reducio_latents.core.libraries import first_line, import_library
from reducio_latents.core.parsing import parse_json
from reducio_latents.core.regular import read_small, require_files
from reducio_latents.core.weight_files import refuse_keys
from reducio_latents.errors import ConfigError, WeightsError
from reducio_latents.vae.weights import WeightsDigest

ModelT = TypeVar("ModelT")

CONFIG_FILE = "config.json"
SMALL_FILES = ("*.json", "*.model", "*.txt")
OTHER_VARIANTS = ("*.fp16.*", "*.bf16.*", "*.non_ema.*", "onnx/*", "openvino*")
"""What repositories hold of the same weights beside the plain ones."""
PIPELINE_FILE = "model_index.json"
_WEIGHT_FILES = ("diffusion_pytorch_model", "model", "pytorch_model")
_LOADERS_OWN = {"architectures", "dtype", "torch_dtype", "transformers_version", "name_or_path"}
"""Keys of a config that say how it was saved, not what the model computes."""


def import_class(library: str, name: str) -> Any:
    """Import a class of diffusers or transformers; raise ConfigError as `import_library` does.

    Their modules make tensors of their own when they are imported, at the first use of a name:
    tensors for every later model, also where the first one is being built on the device `meta`.
    """
    with torch.device("cpu"):
        return getattr(import_library(library), name)


def find_model(name: str, part: str = "") -> Path:
    """Return where the model called `name` is: a folder with its config, or a file.

    In the folder of a whole pipeline the model is the subfolder `part`. Raises ConfigError for a
    path that does not exist and for a Hub name that cannot be fetched, WeightsError for one that
    cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if not (name and path.is_dir()):
        there = hub_name(name)
        if there is None:
            raise ConfigError(
                f"there is no model at {name!r}. Give a folder with {CONFIG_FILE} and the weights, "
                "a weights file, or a Hub name as OWNER/NAME."
            )
        if there.file.endswith(WEIGHT_SUFFIXES):
            return fetch_file(there)
        path = _fetch(there, part) / there.file
    inside = path / part
    return inside if part and inside.is_dir() and not (path / CONFIG_FILE).is_file() else path


def _fetch(name: HubName, part: str) -> Path:
    """Return the folder of a Hub model, fetched if need be: of a pipeline only `part` of it.

    Of weights that are there in several formats only safetensors are fetched.
    """
    hub = hub_library(name)

    def fetch(**patterns: Sequence[str]) -> Path:
        download = partial(hub.snapshot_download, name.repository, **settings, **patterns)
        snapshot = name.snapshot(hub)
        # Its list of files says whether all of them are there: then the Hub is not asked.
        if snapshot and (name.storage(hub) / "trees" / f"{snapshot.name}.json").is_file():
            with suppress(hub.errors.LocalEntryNotFoundError):
                return Path(download(local_files_only=True))
        return Path(download())

    revision = None if name.revision == "main" else name.revision
    settings: dict[str, Any] = {"revision": revision, "etag_timeout": HUB_TIMEOUT_S}
    try:
        with one_at_a_time(hub_lock(hub, name)):
            folder = fetch(allow_patterns=[*SMALL_FILES])
            inside = [f"{name.file}/" if name.file else ""]
            if (folder / PIPELINE_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
                wanted = name.file or part
                inside = [f"{wanted}/", f"{wanted.replace('text_encoder', 'tokenizer')}/"]
            for weights, ignored in (("*.safetensors", ("open_clip*",)), ("*.bin", ())):
                fetch(
                    allow_patterns=[f"{place}{weights}" for place in inside],
                    ignore_patterns=[*OTHER_VARIANTS, *ignored],
                )
                if any(_weight_files(folder / inside[0])):
                    break
    # Of the many errors of the Hub's client and its transport each means that we have no files.
    except Exception as err:
        raise ConfigError(
            f"{name.text!r} is not a folder here, is not in the Hub's cache, and could not be "
            f"fetched ({why_not(err, name)}). Give a local folder with its {CONFIG_FILE} and "
            f"weights: with a network, `hf download {name.repository} --local-dir DIR` "
            "makes one."
        ) from err
    return folder


def read_config(folder: Path, file: str = CONFIG_FILE) -> dict[str, Any]:
    """Return a model's config; raise WeightsError where it is missing or no JSON object."""
    path = folder / file
    try:
        require_files(folder)
        config = parse_json(read_small(path))
    except FileNotFoundError as err:
        raise WeightsError(
            f"{folder} has no {file}, so it is not known what its weights are. Give the folder "
            "that a model was saved to."
        ) from err
    except (OSError, ValueError) as err:
        raise WeightsError(f"{path} cannot be read: {first_line(err)}. Copy it again.") from err
    if not isinstance(config, dict):
        raise WeightsError(f"{path} is not a model's config. Give the folder of a saved model.")
    return config


def describe_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says about numbers, without what depends on who saved it and where."""
    return {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key not in _LOADERS_OWN
    }


def load_strictly(
    load: Callable[..., tuple[ModelT, Mapping[str, Any]]],
    folder: Path,
    *,
    allowed: Iterable[str] = (),
    **settings: Any,
) -> ModelT:
    """Return `load(folder)`, a library's `from_pretrained`, with every weight of its own in place.

    The libraries only warn of missing weights and leave them random. `allowed` are patterns of
    keys that may lie in the file beside the model's. Raises WeightsError for anything else.
    """
    if not any(_weight_files(folder)):
        raise WeightsError(
            f"{folder} has no weights beside its {CONFIG_FILE}: no *.safetensors and no *.bin. "
            "Copy the whole folder."
        )
    try:
        with quiet():
            model, info = load(folder, local_files_only=True, output_loading_info=True, **settings)
    # Foreign code reads foreign bytes here; whatever it raises says the same of the folder.
    except Exception as err:
        raise WeightsError(
            f"{folder} cannot be loaded as {_owner(load)}: {first_line(err)}. Its weights are "
            "damaged or of another architecture than its config says."
        ) from err
    beside = re.compile("|".join(allowed) or r"\Z")
    refuse_keys(
        f"{folder} ({_owner(load)})",
        missing=info["missing_keys"],
        unexpected=(key for key in info["unexpected_keys"] if not beside.match(key)),
        of_another_shape=(str(key[0]) for key in info["mismatched_keys"]),
    )
    return model


def renamed(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """Return a weight's key after each of the rules: a pattern, and what takes its place."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def digest_of(model: nn.Module) -> str:
    """Return a sha256 over all weights of a loaded model, however they lay in files."""
    digest = WeightsDigest()
    for key, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{key} has values that are not finite. Use another checkpoint.")
        digest.add(key, tensor)
    return digest.hexdigest()


def digest_of_files(folder: Path, patterns: Iterable[str]) -> str:
    """Return a sha256 over the names and bytes of the files in `folder` that match."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _weight_files(folder: Path) -> Iterator[Path]:
    for stem in _WEIGHT_FILES:
        for suffix in ("safetensors", "bin"):
            yield from folder.glob(f"{stem}*.{suffix}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' advice and bars off the terminal; what matters of it is raised."""
    levels = {log: log.level for log in map(logging.getLogger, ("transformers", "diffusers"))}
    library = sys.modules.get("transformers.utils.logging")
    bars = library is not None and library.is_progress_bar_enabled()
    for log in levels:
        log.setLevel(logging.ERROR)
    if library is not None and bars:
        library.disable_progress_bar()
    try:
        yield
    finally:
        if library is not None and bars:
            library.enable_progress_bar()
        for log, level in levels.items():
            log.setLevel(level)


def _owner(load: Callable[..., Any]) -> str:
    return str(getattr(getattr(load, "__self__", load), "__name__", load))
