"""Which rank of how many this process is, as torchrun or Slurm say it in the environment."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from reducio_latents.errors import ConfigError

T = TypeVar("T")

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
"""Variables that hold rank, number of ranks, and the rank's number on its machine. SLURM_NTASKS is
no good: a batch script has it too, which is one process whatever it says."""
ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")
"""Of a Slurm array: number of the task, number of tasks, number of the first one. A task may have
several processes, started by srun."""
RUN_NAMES = (
    "REDUCIO_RUN",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
)
"""What tells one run from the next; all ranks of a run have the same values."""


@dataclass(frozen=True)
class Rank:
    """One of the encoding processes of a run."""

    number: int
    of: int
    local: int = 0
    """Its number among those on its machine, which is that of its GPU."""
    run: str = "run"
    """Names the run, the same for all of its ranks; safe in a path."""

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ConfigError(
                f"this is rank {self.number} of {self.of}, which cannot be. Check the environment "
                "(RANK counts from 0 and is below WORLD_SIZE; a Slurm array must have no gaps: "
                "--array=0-7)."
            )

    @property
    def leads(self) -> bool:
        """Whether this is the rank that plans the run and finishes the store."""
        return self.number == 0

    def in_turn(self, items: Sequence[T]) -> list[T]:
        """Return the items in the order in which this rank takes them: every one whose index leaves
        its number when divided; then those of the others, from the end, where they come last."""
        mine = range(self.number, len(items), self.of)
        others = [item for index, item in enumerate(items) if index not in mine]
        return [*items[self.number :: self.of], *reversed(others)]

    def device(self, asked: str) -> str:
        """Return the device for this rank where `asked` leaves the number open."""
        if asked not in ("auto", "cuda"):
            return asked
        import torch

        gpus = torch.cuda.device_count()
        if gpus == 0:
            return asked
        # One GPU alone is the one that a launcher gave to this process.
        return f"cuda:{self.local if gpus > 1 else 0}"

    def __str__(self) -> str:
        return f"rank {self.number} of {self.of}"


def rank_of(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """Return which rank this process is, or None if there is only one.

    Raise ConfigError for variables that contradict each other.
    """
    rank, size, local = _numbers(environment, TORCHRUN)
    if size == 1:
        task, tasks, first = _numbers(environment, ARRAY)
        process, processes, local = _numbers(environment, SRUN)
        rank, size = (task - first) * processes + process, tasks * processes
    if size == 1:
        return None
    return Rank(rank, size, local, _run_name(environment))


def _numbers(environment: Mapping[str, str], names: tuple[str, str, str]) -> tuple[int, int, int]:
    """Return the numbers that these variables hold: of the second 1, of the others 0 by default."""
    number, of, other = names
    given = [name in environment for name in (number, of)]
    if names is TORCHRUN and any(given) and not all(given):
        there, missing = (number, of) if given[0] else (of, number)
        raise ConfigError(
            f"the environment has {there} and no {missing}. Set both to say which rank of how many "
            f"this process is, or unset {there} to have it work alone."
        )
    if not all(given):
        return 0, 1, 0
    try:
        found = int(environment[number]), int(environment[of]), int(environment.get(other, "0"))
    except ValueError as err:
        raise ConfigError(f"{', '.join(names)} must be whole numbers: {err}.") from err
    return found


def _run_name(environment: Mapping[str, str]) -> str:
    names: Iterable[str] = RUN_NAMES
    if "SLURM_ARRAY_JOB_ID" in environment:
        # Each task of an array is a job, and is requeued, of its own.
        names = (n for n in names if n not in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    text = "\n".join(f"{name}={environment.get(name, '')}" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
