"""What a dataset can be told beside its store and batch size: checked by name and type, once."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from reducio_latents.core.config import from_mapping
from reducio_latents.dataset.batches import ReadOptions
from reducio_latents.dataset.conditions import parse_conditions
from reducio_latents.dataset.filters import Filters
from reducio_latents.errors import ConfigError

WHERE = "LatentDataset"


@dataclass(frozen=True, kw_only=True)
class OrderOptions:
    """How the order of batches is made."""

    window_shards: int = 64
    """Shards of a bucket whose samples are mixed with one another: a sample's batch is drawn from
    64 x 512 = 32,768 others. Two neighbours in a video, which lie in one shard, come 0.29 windows
    apart in the median, 9,600 samples, as against 0.29 datasets in a full permutation; and both in
    one batch of 256 with a probability of 0.8 %. More shards mix better and read from more files
    at a time."""
    drop_last: bool = True
    """Whether a bucket's last, incomplete batch is left out. If it is kept, a rank's part of it may
    be smaller than `batch_size`, down to no sample at all, so that all ranks have as many."""

    def __post_init__(self) -> None:
        if self.window_shards < 1:
            raise ConfigError(f"window_shards must be >= 1, got {self.window_shards}.")


class DatasetOptions(TypedDict, total=False):
    """Keywords of `LatentDataset`; see OrderOptions, Filters and ReadOptions."""

    window_shards: int
    drop_last: bool
    buckets: str | Iterable[str] | None
    filters: Sequence[Any] | str | None
    require_caption: bool
    min_psnr: float | None
    clip_ids: Iterable[str] | str | Path | None
    split: Literal["train", "val"] | None
    val_fraction: float
    clips_per_sample: int
    latents: Literal["sample", "mean", "moments"]
    normalize: Literal["channel"] | None
    images: Literal["tensor", "bytes"]
    text_tokens: int | None
    text_dropout: float
    checksums: Literal["index", "full"]
    on_error: Literal["raise", "skip"]
    pin_memory: bool
    only_tensors: bool


def parse_options(options: Mapping[str, Any]) -> tuple[OrderOptions, Filters, ReadOptions]:
    """Sort keywords into the three dataclasses; raise ConfigError for one that none of them has."""
    known = {f.name: cls for cls in (OrderOptions, Filters, ReadOptions) for f in fields(cls)}
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}."
            raise ConfigError(f"{WHERE} has no option {name!r}; {hint}")

    def of(cls: type[Any]) -> dict[str, Any]:
        return {k: v for k, v in options.items() if known[k] is cls}

    chosen = of(Filters)
    buckets, clip_ids = chosen.pop("buckets", None), chosen.pop("clip_ids", None)
    conditions = parse_conditions(chosen.pop("filters", None))
    if isinstance(buckets, str):
        buckets = (buckets,)
    if clip_ids is not None and not isinstance(clip_ids, str | Path):
        clip_ids = tuple(clip_ids)
    filters = replace(
        from_mapping(Filters, chosen, where=WHERE),
        buckets=None if buckets is None else tuple(buckets),
        clip_ids=clip_ids,
        filters=conditions,
    )
    order = from_mapping(OrderOptions, of(OrderOptions), where=WHERE)
    return order, filters, from_mapping(ReadOptions, of(ReadOptions), where=WHERE)


def whole_number(value: Any, name: str) -> int:
    """Return an option that counts something; raise ConfigError for what is no integer."""
    try:
        return operator.index(value)
    except TypeError as err:
        raise ConfigError(f"{WHERE}: {name} must be a whole number, got {value!r}.") from err


class Part(NamedTuple):
    """Which part of each global batch a process reads."""

    rank: int
    world_size: int


def find_part(rank: int | None, world_size: int | None) -> Part:
    """Return what is given, or else what torch.distributed or the environment says by now."""
    if rank is None and world_size is None:
        rank, world_size = _detected()
    if rank is None or world_size is None:
        raise ConfigError("give both rank and world_size, or neither to have them detected.")
    rank, world_size = whole_number(rank, "rank"), whole_number(world_size, "world_size")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of {world_size} ranks, 0 to {world_size - 1}.")
    return Part(rank, world_size)


def _detected() -> tuple[int, int]:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    texts = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    if None in texts:
        return 0, 1
    try:
        rank, world_size = (int(text or "") for text in texts)
    except ValueError as err:
        raise ConfigError(
            f"RANK and WORLD_SIZE are {texts[0]!r} and {texts[1]!r} in the environment; whole "
            "numbers are wanted. Set both or neither."
        ) from err
    return rank, world_size


def require_rank(rank: int | None, world_size: int | None) -> None:
    """Raise ConfigError where the environment tells of several processes, and not which this is."""
    import torch.distributed as dist

    if rank is not None or (dist.is_available() and dist.is_initialized()):
        return
    told = {n: os.environ[n] for n in ("RANK", "WORLD_SIZE") if n in os.environ}
    if len(told) == 1 and told not in ({"RANK": "0"}, {"WORLD_SIZE": "1"}):
        [(name, text)] = told.items()
        raise ConfigError(
            f"{name} is {text!r} in the environment, which does not tell which of how many ranks "
            "this is: each would read all. Begin the process group first, or set both RANK and "
            "WORLD_SIZE."
        )


def find_global_batch_size(
    batch_size: int | None, global_batch_size: int | None, world_size: int
) -> int:
    """Return the samples of a batch over all ranks, given one of the two sizes."""
    if (batch_size is None) == (global_batch_size is None):
        raise ConfigError("give batch_size, that of each rank, or global_batch_size, one of them.")
    if global_batch_size is None:
        batch_size = whole_number(batch_size, "batch_size")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1, got {batch_size}.")
        return batch_size * world_size
    global_batch_size = whole_number(global_batch_size, "global_batch_size")
    if global_batch_size < 1 or global_batch_size % world_size:
        below = max(world_size, global_batch_size // world_size * world_size)
        raise ConfigError(
            f"global_batch_size is {global_batch_size}, which does not divide among {world_size} "
            f"ranks. Use {below}, or another number of ranks."
        )
    return global_batch_size
