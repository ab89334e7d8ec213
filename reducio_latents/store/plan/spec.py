"""The settings that a plan is a function of, and that all its parts share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from reducio_latents.core.choices import Duplicates
from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.config import check_choices
from reducio_latents.core.geometry import Bucket
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.store.limits import MAX_SHARD_ROWS, require_bucket, require_count


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """How videos become clips, and clips become shards."""

    clip: ClipSpec
    """Where clips start and which frames they have; T is that of the longest bucket."""
    buckets: tuple[Bucket, ...]
    """Sizes. Clips are as long as the longest that leaves room for one, and of these go to the
    nearest in aspect ratio."""
    shard_rows: int = 512
    """Clips of one bucket in a shard."""
    duplicates: Duplicates = "refer"
    """Whether clips of a video with the same bytes as an earlier one refer to that one's rows."""
    shots: str = ""
    """What found the shots that no clip leaves, and its settings; or `table`. "": whole videos."""

    def __post_init__(self) -> None:
        if not self.buckets or len(set(self.buckets)) < len(self.buckets):
            names = ", ".join(bucket.name for bucket in self.buckets)
            raise ConfigError(f"buckets are [{names}]; give one or more, each once.")
        for bucket in self.buckets:
            require_bucket(bucket.name)
        longest = max(self.buckets, key=lambda bucket: bucket.frames)
        if longest.frames != self.clip.frames:
            raise ConfigError(
                f"bucket {longest}, the longest, has {longest.frames} frames, but clip.frames is "
                f"{self.clip.frames}. Make them equal."
            )
        if self.shard_rows < 1:
            raise ConfigError(f"shard_rows must be >= 1, got {self.shard_rows}.")
        require_count(self.shard_rows, MAX_SHARD_ROWS, "shard_rows")
        check_choices(self)

    def require_same(self, now: PlanSpec) -> None:
        """Raise StoreError, naming each difference, if `now` is not this, the stored spec."""
        stored, wanted = self._flat(), now._flat()
        lines = [
            f"{name} is {stored[name]}, not {wanted[name]}"
            for name in stored
            if stored[name] != wanted[name]
        ]
        if lines:
            raise StoreError(
                f"the stored plan was made differently: {'; '.join(lines)}. "
                "Use the same settings, or write to a new store."
            )

    def _flat(self) -> dict[str, Any]:
        clip = {f"clip.{name}": value for name, value in asdict(self.clip).items()}
        buckets = ", ".join(bucket.name for bucket in self.buckets)
        rest: dict[str, Any] = {"shard_rows": self.shard_rows, "duplicates": self.duplicates}
        rest["shots"] = self.shots or "none"
        return {**clip, "buckets": buckets, **rest}
