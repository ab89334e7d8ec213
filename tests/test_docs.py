"""What the documents say is there: links, commands, options, Python that parses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

import reducio_latents
from reducio_latents.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links(page: Path) -> list[str]:
    text = prose(page)
    found = re.findall(r"\]\(\s*([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    found += re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.M)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def commands(page: Path) -> list[list[str]]:
    """Return the words of every call of the command line in a page's blocks of shell."""
    found = []
    for kind, body in FENCE.findall(page.read_text()):
        if kind in ("sh", "bash"):
            for line in body.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for start in ("reducio-latents", "reducio_latents"):
                    if start in words:
                        found.append(words[words.index(start) + 1 :])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_options_are_there(page: Path) -> None:
    for words in commands(page):
        if not words or words[0].startswith("-"):
            continue
        command = main.get_command(click.Context(main), words[0])
        assert command is not None, f"{page.name}: {words[0]}"
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        for word in words[1:]:
            option = word.partition("=")[0]
            if re.fullmatch(r"--?[a-z][\w-]*", option):
                assert option in known, f"{page.name}: {words[0]} {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_parses(page: Path) -> None:
    for kind, body in FENCE.findall(page.read_text()):
        if kind in ("py", "python"):
            compile(body, str(page), "exec")


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    missing = [name for name in main.list_commands(click.Context(main)) if name not in text]
    assert not missing


def test_every_page_is_reached_from_the_guide() -> None:
    guide = (ROOT / "docs" / "README.md").read_text()
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert all(f"({name}" in guide for name in pages)


def test_what_users_call_is_had_from_the_top_of_the_package() -> None:
    names = "LatentDataset LatentLoader LatentTable encode_corpus load_autoencoder open_store"
    assert {*names.split()} <= {*dir(reducio_latents)}
    assert all(callable(getattr(reducio_latents, name)) for name in names.split())
    deep = [page.name for page in PAGES if ".dataset import Latent" in page.read_text()]
    assert not deep
