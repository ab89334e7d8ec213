"""Which rank of how many this process is, as torchrun or Slurm say it in the environment."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from reducio_latents.errors import ConfigError

T = TypeVar("T")

SCHEMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", ""),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
"""Variables that hold rank, number of ranks, and the rank's number on its machine. A task of a
Slurm array is a job of one process, so its array comes before its process number. SLURM_NTASKS is
no good: a batch script has it too, which is one process whatever it says."""
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
                "(RANK and WORLD_SIZE; a Slurm array must have no gaps: --array=0-7)."
            )

    @property
    def leads(self) -> bool:
        """Whether this is the rank that plans the run and finishes the store."""
        return self.number == 0

    def share(self, items: list[T]) -> list[T]:
        """Return this rank's items: every one whose index leaves its number when divided."""
        return items[self.number :: self.of]

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
    """Return which rank this process is, or None where there is only one.

    Raise ConfigError for variables that contradict each other.
    """
    for number, of, local in SCHEMES:
        if number in environment and of in environment:
            try:
                size = int(environment[of])
                rank = int(environment[number])
                if number == "SLURM_ARRAY_TASK_ID":
                    rank -= int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
                place = int(environment.get(local, "0"))
            except ValueError as err:
                raise ConfigError(f"{number} and {of} must be whole numbers: {err}.") from err
            if size > 1:
                return Rank(rank, size, place, _run_name(environment))
    return None


def _run_name(environment: Mapping[str, str]) -> str:
    names = list(RUN_NAMES)
    if "SLURM_ARRAY_JOB_ID" in environment:
        names.remove("SLURM_JOB_ID")  # each task of an array has its own
    text = "\n".join(f"{name}={environment.get(name, '')}" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
