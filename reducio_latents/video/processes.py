"""Worker processes that may crash, hang or eat memory without taking the run with them.

`concurrent.futures` breaks whole when one worker dies, and cannot say which task did it. Here a
lost worker costs one task, which is reported by name, and a fresh process takes its place. Large
results travel through shared-memory slots that belong to one worker; all else through its pipe.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, NamedTuple

from reducio_latents.core.signals import ENDING
from reducio_latents.errors import ConfigError, LatentsError

PRELOAD = [
    "reducio_latents.video.fork_server",
    "reducio_latents.video.reading",
    "reducio_latents.corpus.probe",
    "reducio_latents.video.pyav",
]
"""Modules that all workers share from the start, so that importing them is paid for once."""
ALIVE_S = 0.1
"""How often a worker says that it goes on, at most."""
WATCH_S = 1.0
"""How often a worker looks for its main process, where the kernel does not say that it ended."""
MEMORY_CHECK_S = 0.5
STARTS = 5
"""Workers that may be killed in a row before they have done anything."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    memory: SharedMemory | None
    task: int | None = None
    heard_s: float = field(default_factory=time.monotonic)
    """When it last said something; what its time limit counts from."""
    blocked: bool = False
    """It waits for a slot, so its silence is ours."""


class Slot(NamedTuple):
    """A piece of a worker's shared memory that holds a result; give it back with `release`."""

    worker: _Worker
    number: int
    memory: memoryview


class Event(NamedTuple):
    """What became of a task: any number of `item`, then one `done` or `lost`."""

    kind: str
    task: int
    value: Any
    """item: what the worker sent. lost: why, as text. done: None."""
    slot: Slot | None = None


class Channel:
    """A worker's side: where its target sends results."""

    def __init__(self, pipe: Connection, memory: SharedMemory | None, slots: int) -> None:
        self._pipe, self._memory = pipe, memory
        self._free = deque(range(slots))
        self._slot_bytes = memory.size // slots if memory is not None else 0
        self._heard_s = 0.0

    def acquire(self) -> tuple[int, memoryview]:
        """Return a free slot of shared memory, waiting until the parent has given one back."""
        assert self._memory is not None
        assert self._memory.buf is not None
        while not self._free:
            self._pipe.send(("full", None, None))
            self._take(self._pipe.recv())
        while self._pipe.poll():
            self._take(self._pipe.recv())
        number = self._free.popleft()
        start = number * self._slot_bytes
        return number, self._memory.buf[start : start + self._slot_bytes]

    def emit(self, value: Any, slot: int | None = None) -> None:
        """Send one result, small enough to pickle; its pixels lie in `slot`."""
        self._pipe.send(("item", value, slot))

    def alive(self) -> None:
        """Say that the task goes on, where it brings no result for long; may be called often."""
        now = time.monotonic()
        if now - self._heard_s > ALIVE_S:
            self._heard_s = now
            self._pipe.send(("alive", None, None))

    def next_task(self) -> Any:
        while True:
            message = self._pipe.recv()
            if message[0] == "task":
                return message[1]
            self._take(message)

    def finish(self) -> None:
        self._pipe.send(("done", None, None))

    def fail(self, error: str) -> None:
        """Say why the task could not be done."""
        self._pipe.send(("error", error, None))

    def refuse(self, error: str) -> None:
        """Say why no task can be done."""
        self._pipe.send(("refusal", error, None))

    def _take(self, message: tuple[str, Any]) -> None:
        kind, value = message
        assert kind == "free", kind
        self._free.append(value)


Target = Callable[[Any, Channel], None]
"""Module-level function (task, channel) that emits results. It catches what it expects of a task;
a ConfigError is not about the task, and is raised where the pool is polled."""


@dataclass(kw_only=True)
class ProcessPool:
    """Runs `target(task, channel)` in `workers` processes, one task at a time each.

    Not thread-safe: one thread submits, polls and releases.
    """

    target: Target
    workers: int
    timeout_s: float
    """A worker that sends nothing for this long while it works is killed and its task lost."""
    memory_bytes: int = 0
    """A worker whose resident memory passes this is killed and its task lost; 0: no limit."""
    slots: int = 0
    """Shared-memory slots of each worker."""
    slot_bytes: int = 0

    def __post_init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._queue: deque[tuple[int, Any]] = deque()
        self._pool: list[_Worker | None] = [None] * self.workers
        self._last_memory_check = 0.0

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or running."""
        return not self._queue and all(w is None or w.task is None for w in self._pool)

    @property
    def waiting(self) -> int:
        """Tasks that no worker has taken up yet."""
        return len(self._queue)

    def submit(self, number: int, task: Any, *, first: bool = False) -> None:
        """Queue a task under a number of the caller's; `first` puts it before the others."""
        if first:
            self._queue.appendleft((number, task))
        else:
            self._queue.append((number, task))

    def poll(self, wait_s: float) -> list[Event]:
        """Deal out tasks and return what has happened, waiting up to `wait_s` for something.

        Raises the ConfigError of a worker that can do no task at all.
        """
        self._deal()
        busy = {w.pipe: n for n, w in enumerate(self._pool) if w is not None and w.task is not None}
        if not busy:
            return []
        events: list[Event] = []
        for pipe in wait(list(busy), timeout=min(wait_s, 1.0)):
            events += self._hear(busy[pipe])  # type: ignore[index]
        # Not dealt out again before the caller has seen the events: what it puts first, after a
        # loss, must be taken up first, or workers that wait for its result could wait for ever.
        return events + self._check_limits()

    def release(self, slot: Slot) -> None:
        """Give a slot back to its worker."""
        slot.memory.release()
        worker = slot.worker
        if not worker.pipe.closed:  # else it was replaced meanwhile
            worker.heard_s, worker.blocked = time.monotonic(), False
            try:
                worker.pipe.send(("free", slot.number))
            except OSError:  # it has just died; the next poll says so
                return

    def run(self, tasks: Iterator[Any]) -> Iterator[tuple[int, Any, str | None]]:
        """Yield (number, last item, why it was lost) of every task, in the order given.

        A task is lost when it was lost twice: the first time something else may be to blame, the
        machine's memory or whoever killed the worker.
        """
        results: dict[int, tuple[Any, str | None]] = {}
        running: dict[int, Any] = {}
        again: set[int] = set()
        items: dict[int, Any] = {}
        given = told = 0
        exhausted = False
        while True:
            while not exhausted and self.waiting < self.workers and given - told < 1024:
                try:
                    running[given] = next(tasks)
                    self.submit(given, running[given])
                    given += 1
                except StopIteration:
                    exhausted = True
            for event in self.poll(0.5):
                if event.kind == "item":
                    items[event.task] = event.value
                elif event.kind == "lost" and event.task not in again:
                    again.add(event.task)
                    items.pop(event.task, None)
                    self.submit(event.task, running[event.task], first=True)
                else:
                    del running[event.task]
                    results[event.task] = (items.pop(event.task, None), event.value)
            while told in results:
                yield told, *results.pop(told)
                told += 1
            if exhausted and told == given:
                return

    def close(self) -> None:
        """Kill all workers. What they were doing is not reported."""
        for worker in self._pool:
            if worker is not None:
                _end(worker)
        self._pool = [None] * self.workers
        self._queue.clear()

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _deal(self) -> None:
        for number, worker in enumerate(self._pool):
            if not self._queue:
                return
            if worker is None:
                worker = self._pool[number] = self._start()
            if worker.task is None:
                worker.task, task = self._queue.popleft()
                worker.heard_s, worker.blocked = time.monotonic(), False
                try:
                    worker.pipe.send(("task", task))
                except OSError:  # it died while idle: the task is not to blame
                    self._queue.appendleft((worker.task, task))
                    _end(worker)
                    self._pool[number] = None

    def _start(self) -> _Worker:
        """Start a worker; one that something kills on its way is started again, up to a limit."""
        for _ in range(STARTS):
            worker = self._start_once()
            if worker is not None:
                return worker
        raise LatentsError(
            f"{STARTS} worker processes in a row were killed before they could start. Look for "
            "what kills them. If it is the machine, short of memory, give --workers a smaller "
            "number."
        )

    def _start_once(self) -> _Worker | None:
        """Start a worker; None if a signal has ended it before it was ready."""
        ours, theirs = self._context.Pipe()
        memory = None
        if self.slots:
            memory = SharedMemory(create=True, size=self.slots * self.slot_bytes)
        name = memory.name if memory is not None else None
        process = self._context.Process(
            target=_main, args=(self.target, theirs, name, self.slots, os.getpid()), daemon=True
        )
        process.start()
        theirs.close()
        worker = _Worker(process, ours, memory)
        try:
            if not ours.poll(120):
                raise EOFError
            ours.recv()  # it has attached
        except (EOFError, OSError) as err:
            process.join(5)
            code = process.exitcode
            _end(worker)
            if code is not None and code < 0:
                return None
            raise LatentsError(
                "a worker process did not start. If this is a script of yours, call the package "
                'under `if __name__ == "__main__":`; else see the error above.'
            ) from err
        finally:
            if memory is not None:
                memory.unlink()  # the name goes now, the memory with its last user
        return worker

    def _hear(self, number: int) -> list[Event]:
        worker = self._pool[number]
        assert worker is not None
        assert worker.task is not None
        try:
            kind, value, slot_number = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(5)
            return [self._lose(number, _death(worker.process.exitcode))]
        worker.heard_s, worker.blocked = time.monotonic(), kind == "full"
        task = worker.task
        if kind == "done":
            worker.task = None
            return [Event("done", task, None)]
        if kind in ("full", "alive"):
            return []
        if kind == "error":
            worker.task = None
            return [Event("lost", task, value)]
        if kind == "refusal":
            raise ConfigError(value)
        slot = None
        if slot_number is not None:
            assert worker.memory is not None
            assert worker.memory.buf is not None
            start = slot_number * self.slot_bytes
            slot = Slot(worker, slot_number, worker.memory.buf[start : start + self.slot_bytes])
        return [Event("item", task, value, slot)]

    def _check_limits(self) -> list[Event]:
        now, events = time.monotonic(), []
        check_memory = self.memory_bytes and now - self._last_memory_check > MEMORY_CHECK_S
        if check_memory:
            self._last_memory_check = now
        for number, worker in enumerate(self._pool):
            if worker is None or worker.task is None or worker.pipe.poll():
                continue
            if not worker.blocked and now - worker.heard_s > self.timeout_s:
                why = f"the decoder hung: no answer for {self.timeout_s:g} s"
                events.append(self._lose(number, why))
            elif check_memory and _resident_bytes(worker.process.pid) > self.memory_bytes:
                why = f"the decoder took more than {self.memory_bytes >> 20} MiB of memory"
                events.append(self._lose(number, why))
        return events

    def _lose(self, number: int, why: str) -> Event:
        worker = self._pool[number]
        assert worker is not None
        assert worker.task is not None
        self._pool[number] = None
        _end(worker)
        return Event("lost", worker.task, why)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join(5)
    worker.pipe.close()
    if worker.memory is not None:
        try:
            worker.memory.close()
        except BufferError:  # a slot is still being read; its memoryview keeps the pages
            worker.memory._buf = None  # type: ignore[attr-defined]
            worker.memory._mmap = None  # type: ignore[attr-defined]


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"the decoder crashed ({signal.Signals(-exitcode).name})"
    return f"the decoder process ended (exit code {exitcode})"


def _resident_bytes(pid: int | None) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # no /proc, or it has just ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _main(
    target: Target, pipe: Connection, memory_name: str | None, slots: int, main_pid: int
) -> None:
    end_with(main_pid)
    for number in ENDING:  # of the whole group; the parent decides what happens to its workers
        signal.signal(number, signal.SIG_IGN)
    memory = SharedMemory(memory_name) if memory_name is not None else None
    channel = Channel(pipe, memory, slots)
    pipe.send(("ready", None, None))
    try:
        while True:
            task = channel.next_task()
            try:
                target(task, channel)
            except MemoryError:
                channel.fail("the decoder ran out of memory")
            except ConfigError as err:
                channel.refuse(str(err))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                raise
            except Exception as err:
                logging.getLogger(__name__).exception("a worker failed on %r", task)
                channel.fail(f"{type(err).__name__}: {err}")
            else:
                channel.finish()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent is gone


def end_with(main_pid: int) -> None:
    """End this process soon after that one, whatever it is doing then.

    A worker's parent is the fork server, which may live on; so a thread watches the main process.
    The kernel ends a worker with the fork server, also where a decoder does not let threads run.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    threading.Thread(target=_watch, args=(main_pid,), daemon=True).start()


def _watch(main_pid: int) -> None:
    try:
        wait([os.pidfd_open(main_pid)])
    except (AttributeError, OSError):  # another system, an old kernel; or it has ended already
        while _is_there(main_pid):
            time.sleep(WATCH_S)
    os._exit(1)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
