"""The processes of a run: one, or as many as torchrun started."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reducio_latents.errors import ConfigError

PREPARE_TIMEOUT = timedelta(days=2)
"""How long ranks wait while the first one lists and probes the corpus."""


@dataclass(frozen=True)
class RunRanks:
    """Who this process is among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over ranks, on every rank."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def meet(self) -> None:
        """Wait here for all the others."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Return, on every rank, whether any rank raised its flag."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def distribute(self, module: nn.Module) -> nn.Module:
        """Return the module with its gradients averaged over ranks.

        Nothing is sharded: weights, gradients, Adam and an average of the published model take
        9 GB, and activations are what fills a GPU.
        """
        if self.size == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        # Buffers are constant, or statistics that each rank computes alike.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        settings = {buffers: False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(module, **settings)  # type: ignore[arg-type]

    @contextmanager
    def after_first(self) -> Iterator[None]:
        """Let the first rank go through the block alone, then the others."""
        if self.size == 1:
            yield
            return
        patient = dist.new_group(backend="gloo", timeout=PREPARE_TIMEOUT)
        if not self.first:
            dist.barrier(patient)
        yield
        if self.first:
            dist.barrier(patient)


def lost_a_rank(err: RuntimeError) -> bool:
    """Whether this is how a communication library says that another process went away."""
    return isinstance(err, dist.DistError) or "gloo" in str(err)  # gloo has no class of its own


def short_reason(err: Exception) -> str:
    """Return what a communication library says, without its source line and its advice."""
    line = (str(err).splitlines() or [type(err).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).split(". ")[0].rstrip(".")


@contextmanager
def join_ranks() -> Iterator[RunRanks]:
    """Join the other processes that torchrun started, if it did; leave them at the end.

    Raises ConfigError where there are more of them than GPUs, or where they do not find each other.
    """
    device, size = _own_device(), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield RunRanks(0, 1, device)
        return
    try:
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    except (ValueError, RuntimeError) as err:  # a variable that is not set is a ValueError
        raise ConfigError(
            f"WORLD_SIZE is {size}, but the processes of this run do not find each other: "
            f"{short_reason(err)}. Start them with torchrun, or unset WORLD_SIZE."
        ) from err
    try:
        yield RunRanks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def _own_device() -> torch.device:
    """Return this process's GPU, made the current one; the CPU on a machine without any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigError(
            f"this is process {local_rank + 1} of the run on this machine, where torch sees {gpus} "
            f"GPUs. Start one for each: torchrun --nproc_per_node={gpus}."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
