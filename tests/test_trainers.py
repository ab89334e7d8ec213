"""Beside trainers, with their own packages: each clip comes once an epoch, over all ranks."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from reducio_latents.dataset import LatentDataset, LatentLoader
from reducio_latents.errors import ConfigError
from tests.forked import Python
from tests.latent_stores import write_store
from tests.test_dataset_resume import SPEC, clips, open_dataset, whole_epoch

ROOT = Path(__file__).parents[1]
EPOCHS, STOP = 2, 3
"""As in tests.trainer_ranks, whose imports cost seconds."""

Found = dict[str, list[dict[str, Any]]]
Batches = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainers")
    write_store(folder, replace(SPEC, columns=("motion", "text", "caption")))
    return folder


@pytest.fixture(scope="module")
def found(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each process was given: the two of a group, and one alone."""
    folder = tmp_path_factory.mktemp("found")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = Python(["-m", "tests.trainer_ranks", store, folder], environment)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return {
        group: [json.loads((folder / group / f"{rank}.json").read_text()) for rank in ranks]
        for group, ranks in {"group": (0, 1), "alone": (None,)}.items()
    }


def together(parts: list[list[list[int]]]) -> Batches:
    """Return the global batches of what each rank was given, which is as many."""
    return [tuple(clip for part in batch for clip in part) for batch in zip(*parts, strict=True)]


def epochs(store: Path, ranks: list[Any], count: int = EPOCHS, **options: Any) -> list[Batches]:
    """Return what the ranks together are to be given."""
    return [whole_epoch(store, e, batch_size=2 * len(ranks), **options) for e in range(count)]


PREPARED = [
    "LatentLoader", "by default", "by default, workers", "by default, collated",
    "by default, cut", "on", "on, text of one length", "off", "off, strings and text",
    "off, incomplete batches", "off, workers", "off, collated",
]  # fmt: skip


def require_whole_epochs(store: Path, found: list[dict[str, Any]], **options: Any) -> None:
    expected = epochs(store, found, **options)
    assert [together([f["epochs"][e] for f in found]) for e in range(EPOCHS)] == expected
    assert {f["len"] for f in found} == {len(expected[0])}


@pytest.mark.parametrize("name", PREPARED)
def test_accelerate_shares_each_batch(store: Path, found: Found, name: str) -> None:
    options = {"drop_last": False} if "incomplete" in name else {}
    require_whole_epochs(store, [rank[name] for rank in found["group"]], **options)


def test_accelerate_reads_alone(store: Path, found: Found) -> None:
    require_whole_epochs(store, [rank["by default"] for rank in found["alone"]])


def test_fabric_shares_each_batch(store: Path, found: Found) -> None:
    for number in range(2):  # a LatentLoader, a DataLoader
        require_whole_epochs(store, [rank["Fabric"][number] for rank in found["group"]])


def test_ddp_shares_each_batch_and_goes_step_by_step(store: Path, found: Found) -> None:
    runs = [rank["DDP"] for rank in found["group"]]
    require_whole_epochs(store, runs)
    assert runs[0]["gradient"] == runs[1]["gradient"] != 0


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("Lightning", "group"),
        ("Lightning", "alone"),
        ("Lightning, StatefulDataLoader", "alone"),
    ],
)
def test_lightning_shares_each_batch_and_goes_on_with_the_next_one(
    store: Path, found: Found, name: str, group: str
) -> None:
    runs = [rank[name] for rank in found[group]]
    first, second = epochs(store, runs)
    assert together([run["trained"] for run in runs]) == first + second
    assert together([run["resumed"] for run in runs]) == second[STOP:]
    validated = together([run["validated"] for run in runs])
    sanity = len(validated) - EPOCHS * len(first)
    assert sanity == 2
    assert validated == first[:sanity] + first + second


@pytest.mark.parametrize("group", ["group", "alone"])
def test_accelerate_goes_on_with_the_very_next_batch(store: Path, found: Found, group: str) -> None:
    ranks = found[group]
    _, second, third = epochs(store, ranks, 3)
    for way in range(2):  # dispatch on and off
        assert together([rank["skipping"][way] for rank in ranks]) == second[STOP:]
    for name in ("saving", "loading"):
        assert together([rank[name] for rank in ranks]) == second[STOP:] + third
    if group == "alone":
        for way in range(2):
            assert together([rank["states"][way] for rank in ranks]) == second[STOP:] + third


@pytest.mark.parametrize("name", ["PyTorch", "Accelerate", "Lightning", "Fabric"])
def test_what_the_page_shows_runs_and_goes_on(store: Path, found: Found, name: str) -> None:
    [alone] = found["alone"]
    first, second = epochs(store, [alone])
    assert together([alone[f"page: {name}"]]) == first + second


@pytest.mark.parametrize(
    ("name", "what"),
    {
        "on, text": "text is as long as the longest of each.*text_tokens=N",
        "on, strings": "a batch has bucket.*only_tensors=True",
        "on, incomplete batches": "drop_last=False makes others",
        "on, states": "use_stateful_dataloader",
        "on, one rank given": "2 processes, and the dataset 1 ranks",
        "off, states": "keep the state",
        "off, one rank given": "2 processes, and the dataset 1 ranks",
        "off, an axis more": r"use DataLoader\(dataset, batch_size=None\)",
        "reading ahead": "reads batches ahead",
    }.items(),
)
def test_what_would_lose_clips_is_refused_on_all_ranks(found: Found, name: str, what: str) -> None:
    for rank in found["group"]:
        with pytest.raises(ConfigError, match=what):
            raise ConfigError(rank[name])


@pytest.mark.parametrize("make", [lambda dataset: dataset, LatentLoader])
def test_who_counts_batches_goes_from_epoch_to_epoch(store: Path, make: Any) -> None:
    """Lightning does: it takes as many as there are, and does not ask for one more."""
    dataset = open_dataset(store)
    loader = make(dataset)
    for epoch in range(3):
        batches = [clips(batch) for batch in islice(loader, len(loader))]
        assert batches == whole_epoch(store, epoch)
        assert (dataset.state_dict()["epoch"], dataset.state_dict()["batch"]) == (epoch + 1, 0)


def test_a_batch_of_tensors_alone(store: Path) -> None:
    columns = ("motion", "text", "start_s")
    [plain, tensors] = (
        next(iter(open_dataset(store, columns=columns, only_tensors=only)))
        for only in (False, True)
    )
    assert plain.keys() - tensors.keys() == {"bucket"}
    assert clips(plain) == clips(tensors)


@pytest.mark.parametrize("column", ["caption", "clip_id", "bucket"])
def test_a_column_of_strings_is_refused_where_tensors_alone_are_wanted(
    store: Path, column: str
) -> None:
    with pytest.raises(ConfigError, match=f"only_tensors=True, and {column} would be no tensor"):
        open_dataset(store, columns=("motion", column), only_tensors=True)
    with pytest.raises(ConfigError, match="on_error"):
        open_dataset(store, on_error="skip", only_tensors=True)


@pytest.mark.parametrize(("name", "text"), [("WORLD_SIZE", "2"), ("RANK", "1")])
def test_an_environment_that_tells_half_is_refused_when_reading_begins(
    store: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(name, text)
    dataset = open_dataset(store)  # the group may begin later
    with pytest.raises(ConfigError, match=f"{name} is '{text}'.* set both RANK and WORLD_SIZE"):
        iter(dataset)
    given = LatentDataset(store, batch_size=4, rank=0, world_size=1, latents="moments")
    assert len(list(given)) == len(dataset)
