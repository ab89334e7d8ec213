"""Batches on their way to a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from reducio_latents.dataset.batches import LatentBatch
from reducio_latents.dataset.sampling import Undrawn


def move_ahead(batches: Iterable[LatentBatch], device: torch.device) -> Iterator[LatentBatch]:
    """Yield batches with their tensors on `device`, each being copied while the one before is used.

    On CUDA the copies, and the draws of a LatentLoader, run on a stream of their own; the stream
    that uses a batch waits for its copy, and for nothing else.
    """
    if device.type != "cuda":
        yield from (_moved(batch, device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: tuple[LatentBatch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = (_moved(batch, device), stream.record_event())
        if ahead is not None:
            yield _handed_over(*ahead, device)
        ahead = moved
    if ahead is not None:
        yield _handed_over(*ahead, device)


def _moved(batch: LatentBatch, device: torch.device) -> LatentBatch:
    moved = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device, non_blocking=True)
        elif isinstance(value, Undrawn):
            moved[name] = value.to(device).draw()
    return moved


def _handed_over(batch: LatentBatch, copied: torch.cuda.Event, device: torch.device) -> LatentBatch:
    """Let the current stream use a batch that another stream has copied."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for value in batch.values():
        if isinstance(value, Tensor):
            value.record_stream(current)
    return batch
