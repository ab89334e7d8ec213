"""Workers may crash, hang, leak or raise; each costs one task, named, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from reducio_latents.errors import ConfigError, LatentsError
from reducio_latents.video import processes
from reducio_latents.video.processes import STARTS, Channel, Event, ProcessPool

SLOT_BYTES = 64


def misbehave(task: str, channel: Channel) -> None:
    """Do what the task says."""
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif task == "exit":
        os._exit(7)
    elif task == "hang":
        time.sleep(600)
    elif task == "leak":
        hoard = np.ones(80 << 20, np.uint8)
        channel.emit(int(hoard[0]))
        time.sleep(600)
    elif task == "raise":
        raise RuntimeError("on purpose")
    elif task == "refuse":
        raise ConfigError("the decoder is not installed.")
    else:
        channel.emit(task.upper())


def crash_once(task: str, channel: Channel) -> None:
    """Kill the worker unless the file that is the task is there; leave it behind."""
    if not Path(task).exists():
        Path(task).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    channel.emit("done")


def start_at_last(folder: Path, deaths: int, *args: object) -> None:
    """Be a worker that is killed `deaths` times before it can say that it is ready."""
    if len(list(folder.iterdir())) < deaths:
        (folder / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    processes._main(*args)  # type: ignore[arg-type]


def fill_slots(task: tuple[int, int], channel: Channel) -> None:
    """Send `count` slots, each full of the number that comes with it."""
    base, count = task
    for i in range(count):
        number, memory = channel.acquire()
        np.frombuffer(memory, np.uint8)[:] = base + i
        channel.emit(base + i, number)


def pool(**settings: object) -> ProcessPool:
    defaults: dict[str, object] = {"target": misbehave, "workers": 2, "timeout_s": 300.0}
    return ProcessPool(**{**defaults, **settings})  # type: ignore[arg-type]


def drain(workers: ProcessPool, tasks: int) -> list[Event]:
    events: list[Event] = []
    deadline = time.monotonic() + 600
    while sum(event.kind != "item" for event in events) < tasks:
        assert time.monotonic() < deadline, events
        events += workers.poll(0.2)
    return events


def test_results_come_in_the_order_of_the_tasks() -> None:
    with pool() as workers:
        tasks = [f"task {i}" for i in range(40)]
        found = list(workers.run(iter(tasks)))
    assert found == [(i, f"TASK {i}", None) for i in range(40)]


def test_a_task_whose_worker_was_killed_once_is_done_by_the_next(tmp_path: Path) -> None:
    with pool(target=crash_once) as workers:
        tasks = [str(tmp_path / str(i)) for i in range(4)]
        found = list(workers.run(iter(tasks)))
    assert found == [(i, "done", None) for i in range(4)]


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("crash", "the decoder crashed (SIGSEGV)"),
        ("exit", "the decoder process ended (exit code 7)"),
        ("raise", "RuntimeError: on purpose"),
    ],
)
def test_a_worker_that_dies_costs_its_task_alone_and_is_replaced(task: str, why: str) -> None:
    tasks = ["a", task, "b", task, "c", "d"]
    with pool() as workers:
        found = list(workers.run(iter(tasks)))
    assert [lost for _, _, lost in found] == [None, why, None, why, None, None]
    assert [item for _, item, _ in found] == ["A", None, "B", None, "C", "D"]


@pytest.mark.parametrize("deaths", [2, STARTS])
def test_a_worker_that_is_killed_while_it_starts_is_started_again_but_not_for_ever(
    deaths: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_main", partial(start_at_last, tmp_path, deaths))
    with pool(workers=1) as workers:
        if deaths < STARTS:
            assert list(workers.run(iter(["a"]))) == [(0, "A", None)]
        else:
            with pytest.raises(LatentsError, match="killed before they could start"):
                list(workers.run(iter(["a"])))
    assert len(list(tmp_path.iterdir())) == deaths


def test_a_worker_that_hangs_is_killed_at_its_time_limit() -> None:
    start = time.monotonic()
    with pool(timeout_s=2.0) as workers:
        found = list(workers.run(iter(["hang", "a"])))
    assert found == [(0, None, "the decoder hung: no answer for 2 s"), (1, "A", None)]
    assert time.monotonic() - start < 300


def test_a_worker_that_eats_memory_is_killed_at_its_limit() -> None:
    with pool(memory_bytes=64 << 20) as workers:
        found = list(workers.run(iter(["leak", "a"])))
    assert found[0][2] == "the decoder took more than 64 MiB of memory"
    assert found[1] == (1, "A", None)


def test_slots_carry_what_was_written_and_bound_what_is_in_flight() -> None:
    seen: list[int] = []
    with pool(target=fill_slots, slots=2, slot_bytes=SLOT_BYTES) as workers:
        for number in range(4):
            workers.submit(number, (50 * number, 20))
        done = held = 0
        waiting: list[Event] = []
        while done < 4:
            for event in workers.poll(0.2):
                if event.kind == "item":
                    waiting.append(event)
                else:
                    assert event.kind == "done"
                    done += 1
            held = max(held, len(waiting))
            for event in waiting:
                assert event.slot is not None
                assert set(event.slot.memory) == {event.value}
                seen.append(event.value)
                workers.release(event.slot)
            waiting = []
    assert sorted(seen) == sorted(50 * n + i for n in range(4) for i in range(20))
    assert held <= 2 * 2


def test_a_slot_of_a_dead_worker_stays_readable_and_is_not_given_to_its_successor() -> None:
    with pool(target=fill_slots, workers=1, slots=2, slot_bytes=SLOT_BYTES) as workers:
        workers.submit(0, (10, 5))
        while not (events := [e for e in workers.poll(0.2) if e.kind == "item"]):
            pass
        first = events[0]
        assert first.slot is not None
        first.slot.worker.process.kill()
        lost = [e for e in drain(workers, 1) if e.kind == "lost"]
        assert len(lost) == 1
        assert set(first.slot.memory) == {10}
        workers.submit(1, (100, 6))
        values: list[int] = []
        done = False
        workers.release(first.slot)
        while not done:
            for event in workers.poll(0.2):
                done = done or event.kind == "done"
                if event.slot is not None:
                    assert set(event.slot.memory) == {event.value}
                    values.append(event.value)
                    workers.release(event.slot)
    assert values == [100, 101, 102, 103, 104, 105]


def test_workers_end_with_their_parent_and_leave_no_shared_memory(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parent.parent)!r}]\n"
        "from tests.test_processes import fill_slots\n"
        "from reducio_latents.video.processes import ProcessPool\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPool(target=fill_slots, workers=2, timeout_s=600, slots=2,\n"
        "                       slot_bytes=64)\n"
        "    for n in range(4): pool.submit(n, (0, 99))\n"
        "    while not pool.poll(0.5): pass\n"
        "    pids = [w.process.pid for w in pool._pool if w is not None]\n"
        "    names = [w.memory.name.lstrip('/') for w in pool._pool if w is not None]\n"
        "    print(*pids, *names, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    words = run.stdout.split()
    pids, names = [int(word) for word in words if word.isdigit()], words[len(words) // 2 :]
    assert pids, run.stderr
    assert len(names) == len(pids)
    deadline = time.monotonic() + 100
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
    assert not [name for name in names if (Path("/dev/shm") / name).exists()]


def fork_aside(task: str, channel: Channel) -> None:
    """Say which process this is, and read without end."""
    channel.emit(os.getpid())
    with Path(task).open("rb", buffering=0) as file:
        while file.read(1 << 16):
            pass


@pytest.mark.parametrize("what", ["pipe", "/dev/zero"])
@pytest.mark.parametrize("server_lives", [False, True])
def test_a_worker_that_reads_without_end_ends_with_its_main_process(
    tmp_path: Path, what: str, server_lives: bool
) -> None:
    if what == "pipe":
        what = str(tmp_path / what)
        os.mkfifo(what)
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path[:0] = [{str(Path(__file__).parent.parent)!r}]\n"
        "from tests.test_processes import fork_aside\n"
        "from reducio_latents.video.processes import ProcessPool\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPool(target=fork_aside, workers=1, timeout_s=60)\n"
        f"    pool.submit(0, {what!r})\n"
        "    while not (events := pool.poll(0.5)): pass\n"
        f"    if {server_lives}:\n"  # who else holds its pipe keeps the fork server from ending
        "        os.fork() or (os.setsid(), time.sleep(30), os._exit(0))\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(events[0].value))\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    # No pipe: the fork server would hold its end open for as long as it lives.
    subprocess.run([sys.executable, script], stdin=subprocess.DEVNULL, timeout=600)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 15
    while _alive(pid):
        assert time.monotonic() < deadline, "a worker outlived its main process"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_what_no_task_can_do_without_ends_the_pool_and_is_no_fault_of_a_task() -> None:
    with (
        pool(workers=1) as workers,
        pytest.raises(ConfigError, match="the decoder is not installed"),
    ):
        for _ in workers.run(iter(["a", "refuse", "b"])):
            pass
