"""Imports point down nine floors, in no circle; and what a training job imports is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import reducio_latents

PACKAGE = Path(reducio_latents.__file__).parent
TOOLS = PACKAGE.parent / "tools"
FLOORS = [
    {"errors", "version"},
    {"core"},
    {"vae", "files", "metrics"},
    {"video", "autoencoders"},
    {"store"},
    {"corpus", "dataset", "conditioning"},
    {"encode", "check", "train", "upkeep"},  # flows; they never import each other
    {"cli", "__init__"},
    {"tools", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
NEVER = {
    "dataset": {"video", "vae", "autoencoders", "conditioning", "metrics"},
    "train": {"conditioning"},
    "store": {"vae", "metrics"},
}
MOST_ROOMS = 20


@cache
def modules() -> dict[str, Path]:
    """Return every module of the package and of the tools, by its dotted name."""
    found = {}
    for root in (PACKAGE, TOOLS):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    top, *rest = module.split(".")
    if top == "tools":
        return "tools"
    return rest[0] if rest else "__init__"


@cache
def imported(path: Path) -> list[tuple[int, str]]:
    """Return (line, module) of every import of our own outside `if TYPE_CHECKING`."""
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
        if isinstance(node, ast.ImportFrom):
            base = str(node.module)
            names = [f"{base}.{alias.name}" for alias in node.names]
            found += [(node.lineno, _ours(name) or _ours(base)) for name in names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, _ours(alias.name)) for alias in node.names]
    return [(line, module) for line, module in found if module is not None]


def _ours(name: str) -> str | None:
    """Return the module of ours that `name` is; the tools import each other by bare names."""
    return next((full for full in (name, f"tools.{name}") if full in modules()), None)


def test_imports_point_down() -> None:
    wrong = []
    for module, path in modules().items():
        here = room_of(module)
        for line, target in imported(path):
            there = room_of(target)
            is_below = there == here or FLOOR[there] < FLOOR[here]
            if not is_below or there in NEVER.get(here, ()):
                wrong.append(f"{path}:{line} imports {there}")
    assert not wrong


def test_no_file_imports_in_a_circle() -> None:
    graph = {
        module: {target for _, target in imported(path) if target != module}
        for module, path in modules().items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as err:
        pytest.fail(f"a circle of imports: {' -> '.join(err.args[1])}")


def test_the_house_has_few_rooms() -> None:
    rooms = {path.stem if path.suffix == ".py" else path.name for path in PACKAGE.iterdir()}
    rooms -= {"__pycache__"}
    assert len(rooms) <= MOST_ROOMS, sorted(rooms)
    assert rooms - {"py.typed"} == set(FLOOR) - {"tools"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_a_training_job_loads_no_video_library_and_no_vae() -> None:
    loaded = loaded_by(
        "import reducio_latents.dataset; from reducio_latents import LatentDataset, LatentTable"
    )
    banned = {"av", "decord", "diffusers", "transformers", "ray", "zarr", "tensorboard"}
    banned |= {"PIL", "obstore"}
    assert not banned & loaded
    rooms = {name.split(".")[1] for name in loaded if name.startswith("reducio_latents.")}
    assert not {"vae", "autoencoders", "video", "corpus", "encode", "check", "train"} & rooms


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
