"""Which rank of how many a process is: by torchrun, by Slurm, by nobody, or by a mistake."""

from __future__ import annotations

import pytest

from reducio_latents.encode.engines.ranks import Rank, rank_of
from reducio_latents.errors import ConfigError


def place(**environment: object) -> tuple[int, int, int] | None:
    """Return number, count and number on the machine of the rank that an environment names."""
    rank = rank_of({name: str(value) for name, value in environment.items()})
    return None if rank is None else (rank.number, rank.of, rank.local)


BATCH = {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 4, "SLURM_PROCID": 0, "SLURM_LOCALID": 0}
"""What every batch script has, which is one process."""


def test_a_process_that_nobody_has_numbered_is_alone() -> None:
    assert place() is None
    assert place(**BATCH) is None
    assert place(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0) is None
    assert place(SLURM_ARRAY_TASK_ID=5, SLURM_ARRAY_TASK_COUNT=1, SLURM_ARRAY_TASK_MIN=5) is None
    assert place(SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=1) is None


def test_torchrun_names_rank_and_gpu() -> None:
    assert place(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1) == (5, 8, 1)
    within_a_job = {**BATCH, "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1}
    assert place(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, **within_a_job) == (5, 8, 1)


def test_srun_names_rank_and_gpu() -> None:
    step = {**BATCH, "SLURM_STEP_NUM_TASKS": 4, "SLURM_PROCID": 3, "SLURM_LOCALID": 1}
    assert place(**step) == (3, 4, 1)


@pytest.mark.parametrize("first", [0, 1, 10])
def test_tasks_of_a_slurm_array_are_ranks(first: int) -> None:
    array = {**BATCH, "SLURM_ARRAY_TASK_COUNT": 3, "SLURM_ARRAY_TASK_MIN": first}
    places = [place(**array, SLURM_ARRAY_TASK_ID=first + i) for i in range(3)]
    assert places == [(0, 3, 0), (1, 3, 0), (2, 3, 0)]


def test_processes_of_the_tasks_of_an_array_are_ranks_each() -> None:
    places = [
        place(
            SLURM_ARRAY_TASK_ID=task,
            SLURM_ARRAY_TASK_COUNT=2,
            SLURM_PROCID=process,
            SLURM_STEP_NUM_TASKS=3,
            SLURM_LOCALID=process,
        )
        for task in range(2)
        for process in range(3)
    ]
    assert places == [(i, 6, i % 3) for i in range(6)]


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"RANK": 1}, "has RANK and no WORLD_SIZE"),
        ({"WORLD_SIZE": 2}, "has WORLD_SIZE and no RANK"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "rank 2 of 2, which cannot be"),
        ({"RANK": "one", "WORLD_SIZE": 2}, "RANK, WORLD_SIZE, LOCAL_RANK must be whole numbers"),
        ({"SLURM_ARRAY_TASK_ID": 14, "SLURM_ARRAY_TASK_COUNT": 8}, "must have no gaps"),
    ],
)
def test_an_environment_that_contradicts_itself_is_one_clear_error(
    environment: dict[str, object], what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        place(**environment)


def test_ranks_of_one_run_share_its_name_and_other_runs_have_others() -> None:
    def run(**environment: str) -> str:
        rank = rank_of({"RANK": "1", "WORLD_SIZE": "2", **environment})
        assert rank is not None
        return rank.run

    assert run(MASTER_PORT="1") == run(MASTER_PORT="1", RANK="0", LOCAL_RANK="1")
    assert run(MASTER_PORT="1") != run(MASTER_PORT="2")
    assert run(SLURM_JOB_ID="5") != run(SLURM_JOB_ID="5", SLURM_RESTART_COUNT="1")
    # Each task of an array has a job number, and is requeued, of its own.
    requeued = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    assert run(SLURM_ARRAY_JOB_ID="5", SLURM_JOB_ID="6") == run(SLURM_ARRAY_JOB_ID="5", **requeued)
    assert run(SLURM_ARRAY_JOB_ID="5") != run(SLURM_ARRAY_JOB_ID="6")


def test_ranks_begin_with_shares_and_go_on_with_those_of_others_from_the_end() -> None:
    shards = list(range(11))
    turns = [Rank(i, 4).in_turn(shards) for i in range(4)]
    assert all(sorted(turn) == shards for turn in turns)
    assert turns[3] == [3, 7, 10, 9, 8, 6, 5, 4, 2, 1, 0]
    assert sorted(shard for turn in turns for shard in turn[:2]) == shards[:8]
