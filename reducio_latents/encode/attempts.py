"""A journal of shards that were taken up and not committed: how a run finds a video that kills it.

A decoder that crashes costs one worker process, which names its clip (`source`). Here it is about
what ends the encoding process itself: memory of the machine, a driver, a GPU that faults. An
attempt counts when a shard is taken up; a commit or a clean stop takes it back. After
`PLAIN_ATTEMPTS` a shard is made carefully, one batch at a time, each written down before it is
touched. What is found written down `CAREFUL_ATTEMPTS` times is what killed: its video is
quarantined, and its clips fail with that reason. Where a batch holds several videos, they are then
taken one by one.

A shard that was unlucky, not guilty, comes out with the same bytes: batches stay what they were.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from reducio_latents.core.config import from_mapping
from reducio_latents.errors import ConfigError
from reducio_latents.files import Files
from reducio_latents.store.commit import ShardKey

ATTEMPTS_FOLDER = "attempts"
PLAIN_ATTEMPTS = 2
"""Attempts at a shard before it is suspected of holding a video that kills."""
CAREFUL_ATTEMPTS = 2
"""Ends at the same videos before they are held to be the cause."""


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """What happened to one shard so far."""

    taken: int = 0
    """How often it was taken up."""
    at: tuple[str, ...] = ()
    """Videos that were being worked on, in a careful attempt."""
    ends: dict[str, int] = field(default_factory=dict)
    """Videos, one a line -> how many attempts ended at them."""
    quarantined: tuple[str, ...] = ()

    def again(self) -> Attempts:
        """Return the record of one more attempt, the last one having ended where it says."""
        ends, guilty = Counter(self.ends), self.quarantined
        if self.at:
            name = "\n".join(self.at)
            ends[name] += 1
            if len(self.at) == 1 and ends[name] >= CAREFUL_ATTEMPTS:
                guilty = (*guilty, *self.at)
        return Attempts(taken=self.taken + 1, ends=dict(ends), quarantined=guilty)

    @property
    def is_suspect(self) -> bool:
        """Whether the next attempt must be a careful one."""
        return self.taken >= PLAIN_ATTEMPTS

    def must_part(self, videos: Sequence[str]) -> bool:
        """Whether these videos, one batch, must be taken one by one to find the guilty one."""
        return len(videos) > 1 and self.ends.get("\n".join(videos), 0) >= CAREFUL_ATTEMPTS

    def reason(self, video: str) -> str:
        """Return why the clips of a quarantined video have failed."""
        return (
            f"{video}: quarantined: the encoding process ended each time it worked on this video. "
            "--retry-failed takes it up again."
        )


class Journal:
    """The attempts at the shards of one store, as small files in it. No locks: a shard has one
    owner, and a lost update costs one more attempt."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def suspects(self, keys: Iterable[ShardKey]) -> dict[ShardKey, Attempts]:
        """Return those of `keys` that must be made carefully."""
        begun = set(self._begun())
        found = {key: self.read(key) for key in keys if key in begun}
        return {key: attempts for key, attempts in found.items() if attempts.is_suspect}

    def read(self, key: ShardKey) -> Attempts:
        """Return the attempts at a shard; none if nothing, or nothing readable, is written down."""
        try:
            return from_mapping(Attempts, json.loads(self._files.read(_path(key))), where="it")
        except (FileNotFoundError, ValueError, ConfigError):
            return Attempts()

    def take_up(self, key: ShardKey) -> Attempts:
        """Count an attempt, durably, before it begins."""
        attempts = self.read(key).again()
        self._write(key, attempts)
        return attempts

    def work_on(self, key: ShardKey, attempts: Attempts, videos: Sequence[str]) -> None:
        """Write down which videos a careful attempt is about to touch."""
        self._write(key, replace(attempts, at=tuple(videos)))

    def hand_back(self, key: ShardKey) -> None:
        """Take back an attempt that ended cleanly without a commit."""
        attempts = self.read(key)
        if attempts.taken <= 1:
            self._files.delete(_path(key))
        else:
            self._write(key, replace(attempts, taken=attempts.taken - 1, at=()))

    def settle(self, key: ShardKey) -> None:
        """Forget the attempts at a shard that is committed."""
        self._files.delete(_path(key))

    def sweep(self, unfinished: Mapping[ShardKey, object]) -> None:
        """Forget what is left of finished shards by runs that were killed at their very end."""
        for key in self._begun():
            if key not in unfinished:
                self.settle(key)

    def _begun(self) -> Iterator[ShardKey]:
        for path in list(self._files.list(ATTEMPTS_FOLDER)):
            _, bucket, name = path.split("/")
            yield ShardKey(bucket, int(name.removesuffix(".json")))

    def _write(self, key: ShardKey, attempts: Attempts) -> None:
        self._files.write(_path(key), json.dumps(asdict(attempts)).encode())


def _path(key: ShardKey) -> str:
    return f"{ATTEMPTS_FOLDER}/{key.bucket}/{key.shard:06d}.json"
