"""Imports point one way, and what a training job imports is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import reducio_latents

PACKAGE = Path(reducio_latents.__file__).parent
LAYERS = [
    ["errors"],
    ["geometry", "clips", "schema"],  # plain Python
    ["config", "resample", "parquet"],
    ["values", "files", "processes", "images", "pixels", "devices"],
    ["gaussian", "metrics"],  # tensors in, tensors out
    ["video", "vae"],
    ["corpus"],
    ["probe"],
    ["plan"],
    ["store"],
    ["pretrained"],
    ["autoencoders"],
    ["conditioning"],
    ["encode", "dataset", "check", "train"],  # flows; they never import each other
    ["cli"],
    ["__main__", "__init__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
NEVER = {
    "dataset": {"video", "vae", "autoencoders", "conditioning", "metrics"},
    "train": {"store", "conditioning"},
    "store": {"gaussian", "values", "vae", "pixels"},
}


def imported(path: Path) -> list[tuple[int, str]]:
    """Return (line, room) of every import of this package outside `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "") == "reducio_latents":
            found += [(node.lineno, a.name) for a in node.names if a.name in LEVEL]
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("reducio_latents."):
            found.append((node.lineno, str(node.module).split(".")[1]))
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_point_down(path: Path) -> None:
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for line, there in imported(path):
        place = f"{path}:{line} imports {there}"
        assert there == here or LEVEL[there] < LEVEL[here], place
        assert there not in NEVER.get(here, ()), place


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_a_training_job_loads_no_video_library_and_no_vae() -> None:
    loaded = loaded_by("from reducio_latents import LatentDataset, LatentTable")
    banned = {"av", "decord", "diffusers", "transformers", "ray", "zarr", "tensorboard"}
    assert not banned & loaded
    rooms = {name.split(".")[1] for name in loaded if name.startswith("reducio_latents.")}
    assert not {"vae", "autoencoders", "encode", "check", "train"} & rooms


def test_the_package_and_its_command_line_load_no_torch() -> None:
    loaded = loaded_by("import reducio_latents.cli")
    assert not {"torch", "numpy", "pyarrow"} & loaded


def test_torchvision_is_absent() -> None:
    # Its registry build does not work with the CPU build of torch, and a broken one breaks others.
    with pytest.raises(ImportError):
        __import__("torchvision")


def test_parquet_is_read_in_one_place() -> None:
    # Whole tables by pyarrow's own function abort short commands at their end; see `parquet`.
    callers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("read_table", "dataset")
        and ast.unparse(node.value) in ("pq", "pyarrow.parquet", "pa", "pyarrow")
    }
    assert not callers
