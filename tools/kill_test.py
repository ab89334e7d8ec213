"""Kill an encode run at random moments and prove that the store ends with the same bytes.

    python tools/kill_test.py CORPUS [--victim run] [--rounds 100] [--seed 0] [-- OPTIONS]

A round encodes CORPUS into a new store, is disturbed (SIGKILL) after a random part of the time that
an undisturbed run takes, once or several times, is then run to its end, and compared with the
undisturbed store, file by file. Timings in commits are the only difference allowed.

Victims: `run`, the whole process group; `main`, the main process alone; `worker`, one decode
worker, after which the run must go on by itself; `rank`, one of two ranks; `actor`, one of two Ray
actors, after which the run must go on by itself. OPTIONS are those of encode-corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FINISHED = (0, 3)
TINY = ["--model", "reducio-random:8", "--resolution", "64", "--shard-rows", "4", "--workers", "2"]
RANKS = 2


def command(corpus: Path, store: Path, options: list[str]) -> list[str]:
    words = [sys.executable, "-m", "reducio_latents", "encode-corpus", str(corpus), str(store)]
    return words + (options or TINY)


def start(words: list[str], **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def end_of(process: subprocess.Popen[bytes], timeout_s: float | None = None) -> bool:
    """Wait; return whether it ended by itself, done. Exit with what it said if it failed."""
    try:
        _, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return False
    if process.returncode not in FINISHED:
        sys.exit(f"a run ended with {process.returncode}:\n{errors.decode()}")
    return True


def run(words: list[str], kill_after_s: float | None = None, *, group: bool = True) -> bool:
    """Run to the end, or kill the group or the main process; return whether it was done."""
    process = start(words)
    if end_of(process, kill_after_s):
        return True
    (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
    process.communicate()
    return False


def run_killing_one(
    words: list[str], after_s: float, find: Callable[[int], list[int]], rng: random.Random
) -> bool:
    """Kill one process that `find` names of the run's group, and let the run end by itself."""
    process = start(words)
    if end_of(process, after_s):
        return False
    while not (victims := find(process.pid)) and process.poll() is None:
        time.sleep(0.005)
    if victims:
        os.kill(rng.choice(victims), signal.SIGKILL)
    end_of(process)
    return bool(victims)


def run_ranks(words: list[str], after_s: float, rng: random.Random) -> bool:
    """Run two ranks, kill one of them, wait for the other; return whether one was killed."""
    ranks = [
        start([*words, "--rank-timeout-s", "5"], RANK=str(i), WORLD_SIZE=str(RANKS))
        for i in range(RANKS)
    ]
    time.sleep(after_s)
    victim = rng.choice(ranks)
    killed = victim.poll() is None
    victim.kill()
    for rank in ranks:
        rank.communicate()
    return killed


def decode_workers(group: int) -> list[int]:
    """Return the processes of a group whose parent's parent is the main one: those of its fork
    server."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, parent, of = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(of) == group:
            parents[int(stat.parent.name)] = int(parent)
    return [pid for pid, parent in parents.items() if parents.get(parent) == group]


def ray_actors(group: int) -> list[int]:
    """Return the processes that call themselves actors of ours and belong to this run's Ray."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = line.read_bytes()
            environment = (line.parent / "environ").read_bytes()
        except OSError:
            continue
        if (
            name.startswith(b"ray::ShardActor")
            and f"KILL_TEST={os.getpid()}".encode() in environment
        ):
            found.append(int(line.parent.name))
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


def disturb(victim: str, words: list[str], took_s: float, rng: random.Random) -> int:
    """Bring a store to its end, killing `victim` on the way; return how often that came about."""
    moment = rng.uniform(0.2, 0.9) * took_s
    if victim in ("run", "main"):
        kills = 0
        while not run(words, rng.uniform(0.2, 1.1) * took_s, group=victim == "run"):
            kills += 1
        return kills
    if victim == "worker":
        return run_killing_one(words, moment, decode_workers, rng)
    if victim == "actor":
        return run_killing_one(words, moment, ray_actors, rng)
    killed = run_ranks(words, moment, rng)
    run(words)
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument(
        "--victim", choices=["run", "main", "worker", "rank", "actor"], default="run"
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    # argparse takes no positional arguments after options that come after positional ones.
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:split])
    rng = random.Random(arguments.seed)
    options = words[split + 1 :] or list(TINY)
    os.environ["KILL_TEST"] = str(os.getpid())
    kills = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole.latents"
        run(command(arguments.corpus, whole, options))
        expected = contents(whole)
        if arguments.victim == "actor":
            options += ["--engine", "ray", "--gpus", "2"]
        begun = time.monotonic()
        again = Path(scratch) / "timed.latents"
        run(command(arguments.corpus, again, options))
        took_s = time.monotonic() - begun
        print(f"undisturbed: {took_s:.1f} s, {len(expected)} files", flush=True)
        for number in range(arguments.rounds):
            store = Path(scratch) / "killed.latents"
            shutil.rmtree(store, ignore_errors=True)
            words = command(arguments.corpus, store, options)
            kills += disturb(arguments.victim, words, took_s, rng)
            wrong = differences(contents(store), expected)
            if wrong:
                sys.exit(f"round {number}: {len(wrong)} files differ: {', '.join(wrong[:5])}")
            print(f"round {number}: same bytes, {kills} kills", flush=True)
    print(f"{arguments.rounds} rounds, {kills} kills, every store byte-identical")


if __name__ == "__main__":
    main()
