"""How the ranks of a run find together: small files in the store, and no network of their own.

    runs/<run>/order.json       written by rank 0 when it has planned: what there is to do
    runs/<run>/rank-00001.json  rewritten by a rank every few seconds: that it is alive, or is done
    runs/<run>/shards/...       created by the rank that takes a shard up, before it does

They say who works on what, never what is done: that is in the commits. Rank 0 removes them at its
end, so that a finished store holds none.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from reducio_latents.core.config import from_mapping
from reducio_latents.encode.engines.ranks import Rank
from reducio_latents.encode.stop import Stop
from reducio_latents.errors import ConfigError, LatentsError, StoreError
from reducio_latents.files import Files
from reducio_latents.files.source import VideoSource, public_url
from reducio_latents.store.commit import ShardKey

log = logging.getLogger(__name__)

RUNS_FOLDER = "runs"
BEAT_S = 5.0
"""How often a rank gives a sign of life, at least."""
POLLS = 50
"""How often a waiting rank looks within the time after which another one counts as dead."""

Todo = dict[ShardKey, tuple[str, ...]]
Moved = dict[str, VideoSource | None]


@dataclass(frozen=True, kw_only=True)
class Order:
    """The work of one run, as rank 0 found it."""

    id: str
    """Of this planning; a run that was started again has another."""
    root: str
    """What the addresses in the plan are relative to, now."""
    shards: tuple[tuple[str, int, tuple[str, ...]], ...]
    """Bucket and number of each unfinished shard, and the columns that it lacks."""
    sources: dict[str, tuple[str, int | None, int | None] | None] = field(default_factory=dict)
    """Videos that are not where the plan has them: url, offset, length; None if they are gone."""
    signed: bool = False
    """Whether passwords or signatures were left out, which no file of a store holds: each rank has
    them from its own command."""

    @classmethod
    def of(cls, root: str, todo: Mapping[ShardKey, tuple[str, ...]], moved: Moved) -> Order:
        return cls(
            id=uuid.uuid4().hex,
            root=public_url(root),
            shards=tuple((key.bucket, key.shard, names) for key, names in todo.items()),
            sources={
                video: (public_url(source.url), source.offset, source.length) if source else None
                for video, source in moved.items()
            },
            signed=any(
                url != public_url(url) for url in [root, *(s.url for s in moved.values() if s)]
            ),
        )

    def todo(self) -> Todo:
        return {ShardKey(bucket, shard): names for bucket, shard, names in self.shards}

    def moved(self) -> Moved:
        return {video: place and VideoSource(*place) for video, place in self.sources.items()}


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A rank's sign of life."""

    beat: int = 0
    """Counts up; a clock would have to agree with the other machines'."""
    done: bool = False
    error: str = ""
    """What ended it."""


class RunFiles:
    """The files of one run, as one of its ranks sees them."""

    def __init__(self, files: Files, rank: Rank, timeout_s: float) -> None:
        self._files = files
        self._rank = rank
        self._timeout_s = timeout_s
        self._folder = f"{RUNS_FOLDER}/{rank.run}"
        self._beat = 0
        self._lock = threading.Lock()

    @property
    def poll_s(self) -> float:
        return min(2.0, self._timeout_s / POLLS)

    def announce(self, order: Order) -> None:
        self._files.write(f"{self._folder}/order.json", json.dumps(asdict(order)).encode())

    def order(self) -> Order | None:
        """Return what rank 0 has announced; None before that, and after its end."""
        try:
            data = self._files.read(f"{self._folder}/order.json")
            return from_mapping(Order, json.loads(data), where="it")
        except FileNotFoundError:
            return None
        except (ValueError, ConfigError) as err:
            raise StoreError(
                f"{self._files.url}/{self._folder}/order.json cannot be read ({err}). Delete "
                f"{RUNS_FOLDER}/ and run the same command again."
            ) from err

    def wait_for_order(self, stop: Stop) -> Order | None:
        """Return rank 0's order, waiting while it is alive; None if a stop is asked for.

        Raise LatentsError if it has failed, or shows no sign of life for the time allowed.
        """
        watch = Watch(self._timeout_s)
        first = self.sign(0)
        trusted = False
        while not stop.requested:
            sign = self.sign(0)
            # Two runs may have one name, and the last one may have been killed: what was there at
            # first sight counts only once rank 0 has shown that it is alive now.
            trusted = trusted or sign != first
            order = self.order() if trusted else None
            if order is not None:
                return order
            if trusted and sign is not None and sign.error:
                raise LatentsError(f"rank 0 could not plan the run: {sign.error}")
            if not watch.is_alive(0, sign):
                said = f" Its last words: {sign.error}" if sign is not None and sign.error else ""
                raise LatentsError(
                    f"rank 0 has shown no sign of life for {self._timeout_s:g} s, and it is the "
                    "one that plans. See what it said, and run the same command again; "
                    f"--rank-timeout-s sets how long the others wait.{said}"
                )
            time.sleep(self.poll_s)
        return None

    def wait_for_ranks(self, stop: Stop, running: Sequence[Callable[[], bool]] = ()) -> None:
        """Wait until every other rank is done or counts as dead.

        `running` says of ranks 1, 2, ... whether their process is there, where that is known.
        """
        watch = Watch(self._timeout_s)
        while not stop.requested:
            signs = {number: self.sign(number) for number in range(self._rank.of)}
            del signs[self._rank.number]
            waiting = [
                number
                for number, sign in signs.items()
                if not (sign is not None and sign.done) and watch.is_alive(number, sign)
            ]
            if not any(not running or running[number - 1]() for number in waiting):
                break
            time.sleep(self.poll_s)
        for number in sorted(watch.dead):
            self._warn_of(number)

    def hear_of_lead(self, stop: Stop) -> bool:
        """Return whether rank 0 is alive, or has come to an end; wait for its next sign of life."""
        watch, first = Watch(self._timeout_s), self.sign(0)
        while not stop.requested:
            sign = self.sign(0)
            if sign is None or sign.done or sign != first:
                return True
            if not watch.is_alive(0, sign):
                self._warn_of(0)
                return False
            time.sleep(self.poll_s)
        return True

    def _warn_of(self, number: int) -> None:
        log.warning(
            "rank %d has shown no sign of life for %g s: it is not waited for.",
            number,
            self._timeout_s,
        )

    def sign(self, number: int) -> Sign | None:
        """Return the last sign of life of a rank, if it has given one."""
        try:
            data = self._files.read(self._sign_path(number))
            return from_mapping(Sign, json.loads(data), where="it")
        except (FileNotFoundError, ValueError, ConfigError):
            return None

    def take(self, key: ShardKey) -> bool:
        """Return whether a shard is this rank's: nobody, or itself before it was started again, has
        taken it up."""
        path = f"{self._folder}/shards/{key.bucket}-{key.shard:06d}"
        return self._files.create(path, b"%d" % self._rank.number)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life while the block runs, and say at its end how it ended."""
        over = threading.Event()
        thread = threading.Thread(target=self._beat_on, args=(over,), daemon=True)
        thread.start()
        error = ""
        try:
            yield
        except BaseException as err:
            error = str(err) or type(err).__name__
            raise
        finally:
            over.set()
            thread.join()
            self._give_sign(Sign(beat=self._beat, done=True, error=error))

    def clear(self) -> None:
        """Remove what this and earlier runs have left."""
        for path in list(self._files.list(RUNS_FOLDER)):
            self._files.delete(path)

    def leave(self) -> bool:
        """Return whether rank 0 has gone without waiting for this one, whose sign then goes too."""
        if self.order() is not None:
            return False
        self._files.delete(self._sign_path(self._rank.number))
        return True

    def _beat_on(self, over: threading.Event) -> None:
        while True:
            self._give_sign(Sign(beat=self._beat))
            self._beat += 1
            if over.wait(min(BEAT_S, self._timeout_s / 10)):
                return

    def _give_sign(self, sign: Sign) -> None:
        with self._lock:
            try:
                path = self._sign_path(self._rank.number)
                self._files.write(path, json.dumps(asdict(sign)).encode())
            except LatentsError as err:  # its work will meet the same error and say more
                log.warning("no sign of life can be written: %s", err)

    def _sign_path(self, number: int) -> str:
        return f"{self._folder}/rank-{number:05d}.json"


class Watch:
    """Tells ranks that are silent for too long from those that are not, by this machine's clock."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._begun = time.monotonic()
        self._heard: dict[int, tuple[int, float]] = {}
        self.dead: set[int] = set()

    def is_alive(self, number: int, sign: Sign | None) -> bool:
        """Take note of a rank's newest sign; one that was never heard counts from the start."""
        now = time.monotonic()
        beat = -1 if sign is None else sign.beat
        if number not in self._heard or self._heard[number][0] != beat:
            self._heard[number] = (beat, now if sign is not None else self._begun)
        if now - self._heard[number][1] > self._timeout_s:
            self.dead.add(number)
        else:
            self.dead.discard(number)
        return number not in self.dead
