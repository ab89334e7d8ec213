"""Open a file of tensors, whatever its name says it is, without running anything it holds.

Two formats: safetensors, and what `torch.save` writes, a zip or a plain pickle, both read with
weights_only=True. A training framework's checkpoint also names its own classes for its records;
those few are replaced by placeholders that do nothing, and a file that names any other class is
refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reducio_latents.core.libraries import first_line
from reducio_latents.core.regular import open_regular
from reducio_latents.errors import WeightsError

MODEL_FILE = "model.safetensors"
"""Name of the weights in a directory that `import-checkpoint` makes."""

_LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
_INERT_MODULES = _LIGHTNING | {"argparse", "omegaconf", "pathlib", "typing"}
_INERT_BUILTINS = {f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str")}
_INERT_MAPPINGS = ("AttributeDict", "defaultdict")


Shapes = Mapping[str, tuple[int, ...]]
SHOWN_KEYS = 5


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, read one at a time; an opened file holds none of them in memory."""

    where: str
    """What a message calls it: a path."""
    shapes: Shapes
    read: Callable[[str], Tensor]
    """Return one tensor. It may lie in the mapped file: copy what is kept."""
    dropped: int = 0
    """Keys of the file that have no part in inference, and are not among `shapes`."""


def refuse_keys(where: str, **kinds: Iterable[str]) -> None:
    """Raise WeightsError, naming some keys of each kind, if there are any."""
    found = {kind.replace("_", " "): sorted(keys) for kind, keys in kinds.items()}
    wrong = [f"{len(keys)} {kind} ({some(keys)})" for kind, keys in found.items() if keys]
    if wrong:
        raise WeightsError(f"{where}: its weights are of another architecture: {'; '.join(wrong)}.")


def check_keys(where: str, found: Shapes, wanted: Shapes) -> None:
    """Raise WeightsError, naming some keys of each kind, unless keys and shapes are exact."""
    other = [
        f"{key} {found[key]} instead of {shape}"
        for key, shape in wanted.items()
        if found.get(key, shape) != shape
    ]
    missing, unexpected = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    refuse_keys(where, missing=missing, unexpected=unexpected, of_another_shape=other)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, by its name."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into a model: every one of its own and no other, or a WeightsError."""
    check_keys(where, shapes_of(tensors), shapes_of(model.state_dict()))
    model.load_state_dict(tensors, strict=True)


def some(keys: Iterable[str]) -> str:
    """Return the first few keys in words, and how many more there are."""
    names = list(keys)
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more


def open_tensor_file(path: Path) -> StateDict:
    """Open a .safetensors, .ckpt or .pt file, or a directory that holds `model.safetensors`.

    The format is told from the content. Raises WeightsError for a file that is missing, damaged,
    something else, or asks to run code.
    """
    path = _weights_in(path)
    head = _first_bytes(path)
    if head[8:9] == b"{":
        return _open_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        if path.suffix == ".safetensors":  # torch.load goes by this name, whatever is inside
            raise WeightsError(
                f"{path} is a torch checkpoint under the name of a safetensors file. "
                f"Rename it to {path.stem}.ckpt."
            )
        if is_torchscript(path):
            raise WeightsError(
                f"{path} is a TorchScript archive, a program that would have to be run, and not "
                "one that is known here. Give a state dict (.pt of tensors, or .safetensors)."
            )
        return _open_torch(path, is_zip=head.startswith(b"PK"))
    raise WeightsError(
        f"{path} is {_kind_of(head)}, not a weights file. Give a .ckpt or .safetensors file; if it "
        "was downloaded, download it again."
    )


def is_torchscript(path: Path) -> bool:
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def _weights_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    if not (path / MODEL_FILE).is_file():
        raise WeightsError(
            f"{path} is a directory without {MODEL_FILE}. Give one that import-checkpoint made, or "
            "the weights file itself."
        )
    return path / MODEL_FILE


def _first_bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(512)
    except FileNotFoundError as err:
        raise WeightsError(f"{path}: there is no such weights file. Check the path.") from err
    except OSError as err:
        raise WeightsError(f"{path} cannot be read: {err.strerror or err}.") from err


def _kind_of(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "an empty file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run `git lfs pull`)"
    if all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in head):
        return "text"
    return "something else"


def _open_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt", device="cpu")
        names = list(file.keys())  # type: ignore[no-untyped-call]
        shapes = {
            name: tuple(file.get_slice(name).get_shape())  # type: ignore[no-untyped-call]
            for name in names
        }
    except (SafetensorError, OSError) as err:
        raise _damaged(path, err) from err
    return StateDict(str(path), shapes, file.get_tensor)


def _open_torch(path: Path, *, is_zip: bool) -> StateDict:
    content = _load_torch(path, is_zip=is_zip)
    tensors = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(tensors, Mapping) or not any(isinstance(t, Tensor) for t in tensors.values()):
        raise WeightsError(
            f"{path} holds no weights: no mapping of tensors, at its top or under `state_dict`."
        )
    named = {str(key): value for key, value in tensors.items() if isinstance(value, Tensor)}
    return StateDict(str(path), shapes_of(named), named.__getitem__)


def _load_torch(path: Path, *, is_zip: bool) -> Any:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        foreign = sorted(name for name in names if not _is_inert(name))
        if foreign:
            raise _refused(path, ", ".join(foreign[:5]))
        placeholders = [(_placeholder(name), name) for name in names]
        with torch.serialization.safe_globals(placeholders):  # type: ignore[arg-type]
            # Mapped, so that an optimizer's state beside the weights is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except WeightsError:
        raise
    except pickle.UnpicklingError as err:
        if "lobal" in str(err) or "reduce" in str(err):
            raise _refused(path, first_line(err)) from err
        raise _damaged(path, err) from err
    except Exception as err:
        # Whatever a parser of foreign bytes raises (RuntimeError, EOFError, KeyError, struct.error,
        # ...) says the same of the file.
        raise _damaged(path, err) from err


def _is_inert(name: str) -> bool:
    module = name.partition(".")[0]
    return module in _INERT_MODULES or name in _INERT_BUILTINS or name == "collections.defaultdict"


class _Ignored:
    """Stands for any object of a class that was not loaded."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _IgnoredMapping(OrderedDict[Any, Any]):
    """Stands for a class of mappings: gives a plain one, which a pickle may then fill."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


def _placeholder(name: str) -> type:
    return _IgnoredMapping if name.endswith(_INERT_MAPPINGS) else _Ignored


def _refused(path: Path, what: str) -> WeightsError:
    return WeightsError(
        f"{path} holds objects that only running code could rebuild ({what}), so it was not "
        "loaded; nothing in it was run. If you trust it, save its weights alone where it was made: "
        "torch.save({'state_dict': checkpoint['state_dict']}, 'weights.ckpt')."
    )


def _damaged(path: Path, err: Exception) -> WeightsError:
    return WeightsError(
        f"{path} is damaged or cut short ({path.stat().st_size:,} bytes): {first_line(err)}. "
        "Download or copy it again."
    )
