"""Every way to iterate gives the same batches, and resumes with the very next one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from reducio_latents.dataset import LatentDataset, LatentLoader
from reducio_latents.dataset.order import Samples
from reducio_latents.errors import ConfigError
from tests.latent_stores import StoreSpec, numbers_in, write_store

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

SPEC = StoreSpec(
    videos=22,
    clips_per_video=4,
    varied=True,
    buckets=("16x32x32", "16x32x64"),
    shard_rows=6,
    failed=frozenset({3, 11}),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_store(folder, SPEC)
    return folder


def open_dataset(path: Path, **keywords: Any) -> LatentDataset:
    chosen: dict[str, Any] = {"batch_size": 4, "window_shards": 2, "latents": "moments"} | keywords
    return LatentDataset(path, **chosen)


def clips(batch: dict[str, Any]) -> tuple[int, ...]:
    return tuple(numbers_in(batch["motion"]))


def whole_epoch(path: Path, epoch: int, **keywords: Any) -> list[tuple[int, ...]]:
    dataset = open_dataset(path, **keywords)
    return [clips(dataset.batch(epoch, k)) for k in range(dataset.num_batches(epoch))]


@dataclass(frozen=True)
class Way:
    """A way to iterate: over what, and who has the state."""

    make: Callable[[LatentDataset], Any]
    """From a dataset to an iterable of batches."""
    stateful: bool = True


WAYS = {
    "dataset": Way(lambda dataset: dataset),
    "LatentLoader": Way(LatentLoader),
    "LatentLoader, one batch ahead": Way(lambda d: LatentLoader(d, threads=1, prefetch=1)),
    "DataLoader(0)": Way(lambda d: DataLoader(d, batch_size=None), stateful=False),
    "StatefulDataLoader(0)": Way(lambda d: StatefulDataLoader(d, batch_size=None)),
}
WORKER_WAYS = {
    "DataLoader(2)": Way(lambda d: DataLoader(d, batch_size=None, num_workers=2), stateful=False),
    "DataLoader(3), persistent": Way(
        lambda d: DataLoader(d, batch_size=None, num_workers=3, persistent_workers=True),
        stateful=False,
    ),
    "StatefulDataLoader(2)": Way(lambda d: StatefulDataLoader(d, batch_size=None, num_workers=2)),
    "StatefulDataLoader(3), persistent": Way(
        lambda d: StatefulDataLoader(d, batch_size=None, num_workers=3, persistent_workers=True)
    ),
}
ALL = {**WAYS, **WORKER_WAYS}


@pytest.mark.parametrize("name", ALL)
def test_epochs_follow_one_another_in_the_one_order(path: Path, name: str) -> None:
    loader = ALL[name].make(open_dataset(path))
    for epoch in range(3):
        assert [clips(batch) for batch in loader] == whole_epoch(path, epoch)


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.stateful])
def test_a_new_process_goes_on_with_the_very_next_batch(path: Path, name: str) -> None:
    way = ALL[name]
    expected = [whole_epoch(path, epoch) for epoch in range(3)]
    batches, every = len(expected[0]), 1 if name == "dataset" else 3
    for stop in range(batches % every, batches + len(expected[1]) + 1, every):
        check_resume(path, way, expected, stop)


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("StatefulDataLoader(2)", 0),
        ("StatefulDataLoader(2)", 4),
        ("StatefulDataLoader(2)", "all"),
        ("StatefulDataLoader(3), persistent", 1),
        ("StatefulDataLoader(3), persistent", "all"),
    ],
)
def test_workers_go_on_with_the_very_next_batch(path: Path, name: str, stop: int | str) -> None:
    expected = [whole_epoch(path, epoch) for epoch in range(3)]
    check_resume(path, ALL[name], expected, len(expected[0]) if stop == "all" else int(stop))


def check_resume(path: Path, way: Way, expected: list[list[tuple[int, ...]]], stop: int) -> None:
    """Stop after `stop` batches, load the state elsewhere, and read to the end of that epoch."""
    loader = way.make(open_dataset(path))
    given_out = list(islice(endless(loader), stop)) if stop else []
    state = json.loads(json.dumps(loader.state_dict()))
    del loader
    resumed = way.make(open_dataset(path))
    resumed.load_state_dict(state)
    rest = [clips(batch) for batch in resumed]
    after = [clips(batch) for batch in resumed]
    flat = [batch for epoch in expected for batch in epoch]
    assert given_out == flat[:stop]
    if stop % len(expected[0]) == 0 and stop and not rest:
        # Stopped before the iteration knew that it was over: so it ends first.
        rest, after = after, []
    assert (rest + after)[: len(flat) - stop] == flat[stop : stop + len(rest + after)]
    assert rest


def endless(loader: Any) -> Iterator[tuple[int, ...]]:
    while True:
        for batch in loader:
            yield clips(batch)


@settings(max_examples=10)
@given(st.data())
def test_a_run_may_go_on_with_any_number_of_ranks_and_workers(
    path: Path, data: st.DataObject
) -> None:
    """Batches are compared over all ranks together: the global batch stays the same."""
    size = data.draw(st.sampled_from([4, 6]))
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    window = data.draw(st.integers(1, 4))
    options = {"batch_size": None, "global_batch_size": size, "window_shards": window}
    expected = [whole_epoch(path, epoch, **options) for epoch in range(2)]
    flat = [batch for epoch in expected for batch in epoch]
    state, position = None, 0
    while position < len(flat):
        world_size = data.draw(st.sampled_from(divisors))
        more = data.draw(st.integers(1, len(flat)))
        ranks = [
            open_dataset(path, rank=r, world_size=world_size, **options) for r in range(world_size)
        ]
        if state is not None:
            for rank in ranks:
                rank.load_state_dict(state)
        streams = [endless(rank) for rank in ranks]
        for parts in islice(zip(*streams, strict=True), min(more, len(flat) - position)):
            assert tuple(clip for part in parts for clip in part) == flat[position]
            position += 1
        states = [rank.state_dict() for rank in ranks]
        assert all(s == states[0] for s in states)
        state = states[0]


def test_workers_take_over_where_one_process_stopped(path: Path) -> None:
    dataset = open_dataset(path)
    expected = whole_epoch(path, 0)
    assert [clips(batch) for batch in islice(dataset, 3)] == expected[:3]
    resumed = open_dataset(path)
    resumed.load_state_dict(dataset.state_dict())
    loader = DataLoader(resumed, batch_size=None, num_workers=2)
    assert [clips(batch) for batch in loader] == expected[3:]
    assert [clips(batch) for batch in loader] == whole_epoch(path, 1)


def test_what_threads_read_ahead_does_not_count(path: Path) -> None:
    loader = LatentLoader(open_dataset(path), threads=3, prefetch=8)
    batches = iter(loader)
    for number in range(4):
        next(batches)
        assert loader.state_dict()["batch"] == number + 1
    assert loader.state_dict() == loader.dataset.state_dict()
    resumed = LatentLoader(open_dataset(path), threads=3, prefetch=8)
    resumed.load_state_dict(loader.state_dict())
    assert clips(next(iter(resumed))) == whole_epoch(path, 0)[4]
    assert resumed.state_dict()["batch"] == 5  # also where it did not begin at the first one


def test_looking_at_a_batch_does_not_use_it_up(path: Path) -> None:
    dataset = open_dataset(path)
    expected, state = whole_epoch(path, 0), dataset.state_dict()
    for loader in (dataset, LatentLoader(dataset)):
        for _ in range(3):
            assert clips(next(iter(loader))) == expected[0]
    workers = DataLoader(dataset, batch_size=None, num_workers=2, prefetch_factor=1)
    for _ in range(2):
        assert clips(next(iter(workers))) == expected[0]
    dataset.load_state_dict(state | {"batch": 2})
    for _ in range(2):
        assert clips(next(iter(dataset))) == expected[2]


@pytest.mark.parametrize("name", ["dataset", "LatentLoader", "DataLoader(2)"])
def test_an_epoch_that_is_set_is_honoured(path: Path, name: str) -> None:
    dataset = open_dataset(path)
    loader = ALL[name].make(dataset)
    for epoch in (5, 2):
        dataset.set_epoch(epoch)
        assert [clips(batch) for batch in loader] == whole_epoch(path, epoch)
    assert [clips(batch) for batch in loader] == whole_epoch(path, 3)


def test_setting_the_epoch_that_was_resumed_keeps_its_place(path: Path) -> None:
    dataset = open_dataset(path)
    list(islice(dataset, 2))
    state = dataset.state_dict()
    resumed = open_dataset(path)
    resumed.load_state_dict(state)
    resumed.set_epoch(0)
    assert [clips(batch) for batch in resumed] == whole_epoch(path, 0)[2:]


def test_loaders_that_are_seeded_alike_still_go_from_epoch_to_epoch(path: Path) -> None:
    dataset = open_dataset(path)
    for epoch in range(3):
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=2,
            generator=torch.Generator().manual_seed(0),
        )
        assert [clips(batch) for batch in loader] == whole_epoch(path, epoch)


def test_the_dataset_says_who_knows_how_far_workers_are(path: Path) -> None:
    dataset = open_dataset(path)
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=2))
    next(batches)
    with pytest.raises(ConfigError, match="StatefulDataLoader"):
        dataset.state_dict()
    list(batches)
    assert dataset.state_dict()["epoch"] == 1


def test_the_state_of_one_worker_is_not_that_of_the_dataset(path: Path) -> None:
    loader = StatefulDataLoader(open_dataset(path), batch_size=None, num_workers=2)
    next(iter(loader))
    state = loader.state_dict()["_snapshot"]["_worker_snapshots"]["worker_0"]["dataset_state"]
    with pytest.raises(ConfigError, match="worker 0 of 2"):
        open_dataset(path).load_state_dict(state)


def test_handles_do_not_cross_a_pickle(path: Path) -> None:
    dataset = open_dataset(path)
    before = clips(dataset.batch(0, 0))
    data = pickle.dumps(dataset)
    assert len(data) < 100_000
    assert clips(pickle.loads(data).batch(0, 0)) == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 1}, "seed is 1 here, 0 in the state"),
        ({"batch_size": 2}, "global_batch_size is 2 here, 4 in the state"),
        ({"window_shards": 3}, "window_shards"),
        ({"shuffle": False}, "shuffle"),
        ({"drop_last": False}, "drop_last"),
        ({"buckets": "16x32x32"}, "samples"),
    ],
)
def test_a_state_of_another_order_is_refused(path: Path, change: dict[str, Any], what: str) -> None:
    state = open_dataset(path).state_dict()
    with pytest.raises(ConfigError, match=what):
        open_dataset(path, **change).load_state_dict(state)


def test_a_state_of_another_store_is_refused(path: Path, tmp_path: Path) -> None:
    write_store(tmp_path, SPEC, captions=lambda video: ("other",))
    state = open_dataset(path).state_dict()
    with pytest.raises(ConfigError, match=r"selection is .* set_epoch"):
        open_dataset(tmp_path).load_state_dict(state)
    copy = tmp_path / "copy"
    write_store(copy, SPEC)
    open_dataset(copy).load_state_dict(state)  # the same store in another place


DAMAGED: list[Any] = [None, [], {}, {"epoch": 0}]
DAMAGED += [{"epoch": epoch} for epoch in (-1, "one", None)]
DAMAGED += [{"batch": 10**6}, {"batch": -1}, {"batch": []}]


@pytest.mark.parametrize("state", DAMAGED)
def test_a_damaged_state_is_refused(path: Path, state: Any) -> None:
    whole = open_dataset(path).state_dict()
    bad = whole | state if isinstance(state, dict) and state not in ({}, {"epoch": 0}) else state
    with pytest.raises(ConfigError, match="state"):
        open_dataset(path).load_state_dict(bad)


def test_the_number_of_batches_is_that_of_every_rank(path: Path) -> None:
    counts = {len(open_dataset(path, rank=r, world_size=3, batch_size=2)) for r in range(3)}
    assert len(counts) == 1
    dataset = open_dataset(path)
    assert len(dataset) == len(LatentLoader(dataset)) == len(list(dataset))
    assert len(DataLoader(dataset, batch_size=None)) == len(dataset)


def test_ranks_are_found_in_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset = open_dataset(path, batch_size=2)
    assert (dataset.rank, dataset.world_size) == (1, 2)
    assert clips(dataset.batch(0, 0)) == whole_epoch(path, 0, rank=0, world_size=1)[0][2:]
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigError, match="RANK"):
        open_dataset(path)


def test_ranks_are_found_in_torch_distributed(path: Path, tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        assert (open_dataset(path).rank, open_dataset(path).world_size) == (0, 1)
    finally:
        dist.destroy_process_group()


def test_a_resumed_epoch_expands_no_more_than_its_windows(path: Path) -> None:
    """Resuming does not read, nor even name, what came before."""
    dataset = open_dataset(path)
    dataset.load_state_dict(dataset.state_dict() | {"batch": len(dataset) - 1, "epoch": 7})
    asked: list[Samples] = []
    read = dataset._reader.read

    def watched(bucket: str, samples: Samples, epoch: int, *, draw: bool = True) -> Any:
        asked.append(samples)
        return read(bucket, samples, epoch, draw=draw)

    dataset._reader.read = watched  # type: ignore[method-assign]
    assert len(list(dataset)) == len(asked) == 1
