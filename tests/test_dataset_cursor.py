"""Workers that begin at the same time agree on the epoch, whoever comes between whose steps."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from reducio_latents.dataset import cursor as module
from reducio_latents.dataset.cursor import Cursor, Span

WORKERS = 3


class Workers:
    """Copies of a cursor, each in what it takes for a worker process of its own."""

    def __init__(self, main: Cursor, patch: pytest.MonkeyPatch) -> None:
        self.cursors = [pickle.loads(pickle.dumps(main)) for _ in range(WORKERS)]
        for copy in self.cursors:
            copy._memory = main._memory
        self.patch = patch

    def act(self, worker: int, what: str, *words: Any) -> Any:
        info = SimpleNamespace(id=worker, num_workers=WORKERS, seed=7 + worker)
        with self.patch.context() as patch:
            patch.setattr(module, "get_worker_info", lambda: info)
            return getattr(self.cursors[worker], what)(*words)

    def interrupted(self, worker: int, by: int, at: int) -> tuple[Span, Span]:
        """Begin with `worker`; before its `at`-th look at the records, `by` begins as a whole."""
        cursor, looks, other = self.cursors[worker], 0, []
        look = cursor._records

        def look_late(run: int) -> Tensor:
            nonlocal looks
            looks += 1
            if looks == at:
                other.append(self.act(by, "begin"))
            found: Tensor = look(run)
            return found

        cursor._records = look_late
        span = self.act(worker, "begin")
        del cursor._records
        return span, *(other or [self.act(by, "begin")])


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> tuple[Cursor, Workers]:
    main = Cursor()
    return main, Workers(main, monkeypatch)


@pytest.mark.parametrize("at", range(1, 5))
def test_workers_that_begin_at_the_same_time_are_of_one_run(
    workers: tuple[Cursor, Workers], at: int
) -> None:
    main, every = workers
    for epoch in range(4):
        first, second = every.interrupted(1, by=0, at=at)
        spans = [second, first, every.act(2, "begin")]
        assert spans == [Span(epoch, worker, WORKERS) for worker in range(WORKERS)]
        for worker, span in enumerate(spans):
            assert main.epoch == epoch
            every.act(worker, "finish", span)
        assert main.epoch == epoch + 1
