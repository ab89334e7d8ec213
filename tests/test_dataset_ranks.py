"""A dataset learns when an iteration begins which rank it is, whoever iterates in its name."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from reducio_latents.dataset import LatentLoader, LatentTable
from reducio_latents.dataset.dataset import Pass
from reducio_latents.errors import ConfigError
from tests.latent_stores import write_store
from tests.test_dataset_resume import ALL, SPEC, clips, open_dataset, whole_epoch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

WAYS = ["dataset", "LatentLoader", "DataLoader(2)", "StatefulDataLoader(3), persistent"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_store(folder, SPEC)
    return folder


def be_rank(rank: int, path: Path, folder: Path) -> None:
    """Make a dataset, join the group, read an epoch each way; write down what was read."""
    datasets = {name: open_dataset(path, batch_size=2) for name in (*WAYS, "spawned", "given")}
    datasets["given"] = open_dataset(path, batch_size=2, rank=0, world_size=1)
    before = len(datasets["dataset"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {"before": before, "after": len(datasets["dataset"])}
    for name, dataset in datasets.items():
        loader = ALL[name if name in WAYS else "dataset"].make(dataset)
        if name == "spawned":
            if rank == 0:
                continue  # one is enough: it has all to import
            loader = DataLoader(
                dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn"
            )
        found[name] = [clips(batch) for batch in loader]
    found["state"] = datasets["dataset"].state_dict()
    table: Any = LatentTable(path, ["motion"])  # all that a map-style dataset must be
    sampler: Any = DistributedSampler(table, shuffle=False)
    shared: Any = DataLoader(table, batch_size=None, sampler=sampler)
    found["table"] = [clip["clip_id"] for clip in shared]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("group")
    context = multiprocessing.get_context("fork")  # which costs no imports
    group = [context.Process(target=be_rank, args=(rank, path, folder)) for rank in range(2)]
    for process in group:
        process.start()
    for process in group:
        process.join()
        assert process.exitcode == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_spawned_worker_reads_its_rank(path: Path, ranks: list[dict[str, Any]]) -> None:
    wanted = [list(batch[2:]) for batch in whole_epoch(path, 0, batch_size=4)]
    assert [list(batch) for batch in ranks[1]["spawned"]] == wanted


@pytest.mark.parametrize("name", WAYS)
def test_datasets_that_were_made_before_the_group_share_each_batch(
    path: Path, ranks: list[dict[str, Any]], name: str
) -> None:
    found = [tuple(a + b) for a, b in zip(*(rank[name] for rank in ranks), strict=True)]
    assert found == whole_epoch(path, 0, batch_size=4)


def test_ranks_that_are_given_stay_and_numbers_are_those_of_the_group(
    path: Path, ranks: list[dict[str, Any]]
) -> None:
    alone = [list(batch) for batch in whole_epoch(path, 0, batch_size=2)]
    assert [rank["given"] for rank in ranks] == [alone, alone]
    assert {(r["before"], r["after"]) for r in ranks} == {
        (len(alone), len(whole_epoch(path, 0, batch_size=4)))
    }
    assert ranks[0]["state"] == ranks[1]["state"]
    assert ranks[0]["state"]["global_batch_size"] == 4


def test_a_sampler_shares_a_table(path: Path, ranks: list[dict[str, Any]]) -> None:
    ids = LatentTable(path, ["motion"]).clip_ids
    assert {*ranks[0]["table"], *ranks[1]["table"]} == set(ids)
    assert len(ranks[0]["table"]) == len(ranks[1]["table"]) == -(-len(ids) // 2)


def test_the_world_may_change_from_epoch_to_epoch(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(path, batch_size=2)
    loader = LatentLoader(dataset)
    for epoch, world_size in enumerate((1, 2, 3)):
        monkeypatch.setenv("RANK", str(world_size - 1))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        wanted = whole_epoch(path, epoch, batch_size=2, rank=world_size - 1, world_size=world_size)
        assert [clips(batch) for batch in loader] == wanted
        assert dataset.global_batch_size == 2 * world_size


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_workers_that_persist_are_refused_once_their_process_has_another_rank(
    path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(path, batch_size=2)
    loader = kind(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        assert [clips(batch) for batch in loader] == whole_epoch(path, epoch, batch_size=2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^the .* rank 0 of 1, and now this is rank 1 of 2\."):
        list(loader)
    dataset.set_epoch(2)
    anew = kind(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    wanted = whole_epoch(path, 2, batch_size=2, rank=1, world_size=2)
    assert [clips(batch) for batch in anew] == wanted


def test_an_iteration_that_is_on_keeps_its_rank(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(path, batch_size=2)
    batches = iter(dataset)
    first = clips(next(batches))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [first, *map(clips, batches)] == whole_epoch(path, 0, batch_size=2, rank=0, world_size=1)


def test_a_state_of_other_batches_is_refused_when_the_world_has_changed_since_it_was_loaded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(path, batch_size=2)
    list(islice(dataset, 3))
    resumed = open_dataset(path, batch_size=2)
    resumed.load_state_dict(dataset.state_dict())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="of 2 samples, and now they are of 4: there are 2 ranks"):
        iter(resumed)
    resumed.set_epoch(1)
    assert [clips(b) for b in resumed] == whole_epoch(path, 1, batch_size=2, rank=1, world_size=2)


def test_a_copy_that_was_sent_elsewhere_is_of_the_rank_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pickle.dumps(open_dataset(path, batch_size=2))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    copy = pickle.loads(data)
    wanted = whole_epoch(path, 0, batch_size=2, rank=1, world_size=2)
    assert [clips(b) for b in DataLoader(copy, batch_size=None, num_workers=2)] == wanted


@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"batch_size": 2, "num_workers": 1}])
def test_a_loader_that_would_add_an_axis_is_refused(
    path: Path, loader: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"use DataLoader\(dataset, batch_size=None\)"):
        next(iter(loader(open_dataset(path), **options)))


def test_who_collates_on_purpose_may(path: Path) -> None:
    def joined(batches: list[dict[str, Any]]) -> tuple[int, ...]:
        return tuple(clip for batch in batches for clip in clips(batch))

    loader = DataLoader(open_dataset(path), batch_size=2, collate_fn=joined)
    first, second = whole_epoch(path, 0)[:2]
    assert next(iter(loader)) == first + second
    table: Any = LatentTable(path, ["motion"])
    assert (
        next(iter(DataLoader(table, collate_fn=default_collate)))["motion"].shape[0] == 1
    )  # single clips are there to be collated


def test_two_iterators_at_once_do_not_disturb_each_other(path: Path) -> None:
    dataset = open_dataset(path)
    pairs = list(zip(dataset, LatentLoader(dataset), strict=True))
    assert [clips(a) for a, _ in pairs] == [clips(b) for _, b in pairs] == whole_epoch(path, 0)
    assert [clips(batch) for batch in dataset] == whole_epoch(path, 1)


@pytest.mark.parametrize(
    ("workers", "size", "slow"),
    [(1, 5, None), (2, 4, 0), (2, 5, 1), (3, 4, None), (3, 5, 0), (3, 4, 1)],
)
def test_a_state_after_whole_epochs_begins_the_next_one_though_workers_persist(
    path: Path, workers: int, size: int, slow: int | None
) -> None:
    def make() -> Any:
        return StatefulDataLoader(
            open_dataset(path, batch_size=size), batch_size=None, num_workers=workers,
            persistent_workers=True, worker_init_fn=None if slow is None else Slow(slow),
        )  # fmt: skip

    loader = make()
    list(loader)
    state = loader.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    for epoch in (1, 2):
        assert [clips(batch) for batch in resumed] == whole_epoch(path, epoch, batch_size=size)


class Slow:
    """Makes a worker the last to come to the end of what it does."""

    def __init__(self, worker: int) -> None:
        self.worker = worker

    def __call__(self, worker: int) -> None:
        if worker == self.worker:
            give_out = Pass.give_out

            def give_out_late(*words: Any) -> Iterator[Any]:
                time.sleep(0.2)
                yield from give_out(*words)

            Pass.give_out = give_out_late  # type: ignore[method-assign,assignment]
