"""Kill an encode run at random moments and prove that the store ends with the same bytes.

    python tools/kill_test.py CORPUS [--victim run] [--rounds 100] [--seed 0] [-- OPTIONS]

A round encodes CORPUS into a new store, is disturbed (SIGKILL) after a random part of the time that
an undisturbed run takes, once or several times, is then run to its end, and compared with the
undisturbed store, file by file. Timings in commits are the only difference allowed.

Victims: `run`, the whole process group; `main`, the main process alone; `worker`, one decode
worker, after which the run must go on by itself; `rank`, one of two ranks, after which the other
one must end by itself; `actor`, one of two Ray actors, after which the run must go on by itself;
`random`, one of these, drawn anew for every round; or several of them, as `run,rank`, in turn.
OPTIONS are those of encode-corpus.

Every run is forked from this process, which has imported what it needs: so a kill meets work, not
imports, and a round takes seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import util
from pathlib import Path

from reducio_latents.cli import main as command_line
from reducio_latents.encode.attempts import CAREFUL_ATTEMPTS, PLAIN_ATTEMPTS

FINISHED = (0, 3)
TINY = ["--model", "reducio-random:8", "--resolution", "64", "--shard-rows", "4", "--workers", "2"]
RANKS = 2
VICTIMS = ("run", "main", "worker", "rank", "actor")
IMPORTED = (
    "reducio_latents.autoencoders",
    "reducio_latents.video.reading",
    "reducio_latents.encode.engines.local",
    "reducio_latents.corpus.probe",
    "reducio_latents.video.pyav",
)
MOST_KILLS = PLAIN_ATTEMPTS + CAREFUL_ATTEMPTS - 1
"""Of one round: one more at the same video, and it is set aside, as it should be."""
LONGEST_S = 600.0
"""A run that takes longer has hung."""


class Run:
    """One encode-corpus process and all that it starts: a process group of its own."""

    def __init__(self, words: list[str], **environment: str) -> None:
        self._said = tempfile.TemporaryFile()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(
            target=_be_command, args=(words, self._said.fileno(), environment)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout_s: float = LONGEST_S) -> bool:
        """Return whether it has ended by itself within this time."""
        self._process.join(timeout_s)
        return not self.is_running

    def finish(self) -> None:
        """Wait for its end; exit with what it said if that is not a good one."""
        ended = self.wait()
        if not ended:
            self.kill()
        if not ended or self._process.exitcode not in FINISHED:
            how = f"ended with {self._process.exitcode}" if ended else "did not end"
            sys.exit(f"a run {how}:\n{self.said()}")

    def kill(self, *, group: bool = True) -> None:
        (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)
        self._process.join()

    def said(self) -> str:
        self._said.seek(0)
        return self._said.read().decode()


def _be_command(words: list[str], said: int, environment: dict[str, str]) -> None:
    """Be `reducio-latents encode-corpus`, as a process that was started by a shell is."""
    os.setsid()
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ |= environment
    util.spawnv_passfds = _fork_for  # type: ignore[assignment]
    command_line(words, prog_name="reducio-latents")


def _fork_for(path: bytes, words: list[str], fds: list[int]) -> int:
    """Start in a fork of this process what multiprocessing starts by a new interpreter.

    Its fork server is one such: it takes the same place among the processes, without the imports.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        kept = sorted({0, 1, 2, *map(int, fds), os.sysconf("SC_OPEN_MAX")})
        for left, right in pairwise(kept):
            os.closerange(left + 1, right)
        exec(words[-1], {})  # `from multiprocessing.forkserver import main; main(...)`
    finally:
        os._exit(0)


def disturb(victim: str, words: list[str], took_s: float, rng: random.Random) -> int:
    """Bring a store to its end, killing `victim` on the way; return how often that came about."""
    moment_s = rng.uniform(0.1, 0.9) * took_s
    if victim in ("run", "main"):
        kills = 0
        while kills < MOST_KILLS and not (run := Run(words)).wait(rng.uniform(0.1, 1.1) * took_s):
            run.kill(group=victim == "run")
            kills += 1
        Run(words).finish()
        return kills
    if victim == "rank":
        killed = kill_a_rank(words, moment_s, rng)
        Run(words).finish()
        return killed
    return kill_one(words, moment_s, decode_workers if victim == "worker" else ray_actors, rng)


def kill_one(
    words: list[str], after_s: float, find: Callable[[int], list[int]], rng: random.Random
) -> int:
    """Kill one process that `find` names of a run, which must then end well; return how many."""
    run = Run(words)
    run.wait(after_s)
    while run.is_running:
        victims = find(run.pid)
        with suppress(ProcessLookupError):
            if victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
                run.finish()
                return 1
        time.sleep(0.005)
    run.finish()
    return 0


def kill_a_rank(words: list[str], after_s: float, rng: random.Random) -> int:
    """Run two ranks and kill one of them, the other of which must end; return how many died."""
    words = [*words, "--rank-timeout-s", "3"]
    ranks = [Run(words, RANK=str(i), WORLD_SIZE=str(RANKS)) for i in range(RANKS)]
    time.sleep(after_s)
    victim = ranks.pop(rng.randrange(RANKS))
    killed = victim.is_running
    if killed:
        victim.kill(group=False)
    for rank in ranks:
        if not rank.wait():
            rank.kill()
            sys.exit(f"the other rank did not end:\n{rank.said()}")
    return int(killed)


def parents() -> dict[int, int]:
    """Return every process of this machine and its parent."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            found[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    return found


def decode_workers(main: int) -> list[int]:
    """Return the processes whose parent's parent is the main one: those of its fork server."""
    parent_of = parents()
    return [pid for pid, parent in parent_of.items() if parent_of.get(parent) == main]


def ray_actors(main: int) -> list[int]:
    """Return the actors of the Ray that the main process has started."""
    parent_of, found = parents(), []
    for pid, parent in parent_of.items():
        while parent not in (main, 0):
            parent = parent_of.get(parent, 0)
        with suppress(OSError):
            if parent and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ShardActor"):
                found.append(pid)
    return found


def contents(store: Path) -> dict[str, bytes]:
    """Return every file of a store, commits without their timings and checksum."""
    found = {}
    for path in sorted(store.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            name = path.relative_to(store).as_posix()
            if name.startswith("commits/"):
                commit = json.loads(data)
                del commit["timings"], commit["crc32c"]
                data = json.dumps(commit).encode()
            found[name] = data
    return found


def differences(ours: dict[str, bytes], theirs: dict[str, bytes]) -> list[str]:
    """Name the files that are not in both, or not the same."""
    return [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]


def victims_of(asked: str) -> tuple[str, ...]:
    """Return the victims that the command line names, to be drawn from or taken in turn."""
    if asked == "random":
        return VICTIMS if find_spec("ray") else VICTIMS[:-1]
    names = tuple(asked.split(","))
    for name in names:
        if name not in VICTIMS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of random, {', '.join(VICTIMS)}")
    return names


def timed(words: list[str]) -> float:
    begun = time.monotonic()
    Run(words).finish()
    return time.monotonic() - begun


def rounds(arguments: argparse.Namespace, options: list[str], scratch: Path) -> Counter[str]:
    """Do all rounds; return how many kills there were of each victim. Exit at a difference."""
    rng = random.Random(arguments.seed)
    victims = victims_of(arguments.victim)
    store, kills = scratch / "killed.latents", Counter[str]()

    def words_for(victim: str, where: Path = store) -> list[str]:
        ray = ["--engine", "ray", "--gpus", "2"] if victim == "actor" else []
        return ["encode-corpus", str(arguments.corpus), str(where), *options, *ray]

    whole = scratch / "whole.latents"
    took_s = dict.fromkeys(VICTIMS, timed(words_for("run", whole)))
    expected = contents(whole)
    if "actor" in victims:
        took_s["actor"] = timed(words_for("actor", scratch / "ray.latents"))
    print(f"undisturbed: {took_s['run']:.1f} s, {len(expected)} files", flush=True)
    for number in range(arguments.rounds):
        drawn = rng.randrange(len(victims)) if arguments.victim == "random" else number
        victim = victims[drawn % len(victims)]
        shutil.rmtree(store, ignore_errors=True)
        kills[victim] += disturb(victim, words_for(victim), took_s[victim], rng)
        if wrong := differences(contents(store), expected):
            sys.exit(f"round {number}: {len(wrong)} files differ: {', '.join(wrong[:5])}")
        print(f"round {number}: {victim}, same bytes, {kills.total()} kills", flush=True)
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument(
        "--victim", default="run", metavar="NAMES", help=f"random, or of {', '.join(VICTIMS)}"
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    # argparse takes no positional arguments after options that come after positional ones.
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:split])
    try:
        victims_of(arguments.victim)
    except argparse.ArgumentTypeError as err:
        parser.error(f"--victim: {err}")
    for module in IMPORTED:
        import_module(module)
    # Short, because the paths of Ray's sockets may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kill") as scratch:
        os.environ["RAY_TMPDIR"] = scratch
        kills = rounds(arguments, words[split + 1 :] or TINY, Path(scratch))
    each = ", ".join(f"{name} {number}" for name, number in sorted(kills.items()))
    print(f"{arguments.rounds} rounds, {kills.total()} kills ({each}), every store byte-identical")


if __name__ == "__main__":
    main()
