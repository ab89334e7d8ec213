"""One name an idea, one idea a name: a top-level name stands in one place, or has a reason."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import reducio_latents

PACKAGE = Path(reducio_latents.__file__).parent

ONE_IDEA = {
    "Moved": "videos that have moved: engines keep a dict, a job takes any mapping",
    "Todo": "what shards lack: orders keep a dict, the ledger is given any mapping",
    "log": "each module's logger",
    **dict.fromkeys(
        ("add_column", "encode_corpus", "evaluate", "import_checkpoint", "train", "verify"),
        "the command, and the function that it calls",
    ),
}
"""Names in several places that mean the same in each, and why they cannot be one."""


def test_no_name_means_two_things() -> None:
    found = {
        name: places
        for name, places in _top_level_names().items()
        if len(places) > 1 and name not in ONE_IDEA
    }
    assert not found, "\n".join(f"{name}: {', '.join(at)}" for name, at in sorted(found.items()))


def test_exceptions_are_still_needed() -> None:
    names = _top_level_names()
    assert not [name for name in ONE_IDEA if len(names.get(name, ())) < 2]


def _top_level_names() -> dict[str, list[str]]:
    """Return where each public function, class and variable of a module is defined."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            for name in _defined(node):
                if not name.startswith("_"):
                    found[name].append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    return found


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]
