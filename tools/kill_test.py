"""Kill an encode run at random moments and prove that the store ends with the same bytes.

    python tools/kill_test.py CORPUS [--rounds 100] [--seed 0] [-- OPTIONS OF encode-corpus]

A round encodes CORPUS into a new store, is killed (SIGKILL, the whole process group) after a random
part of the time that an undisturbed run takes, once or several times, is then run to its end, and
compared with the undisturbed store, file by file. Timings in commits are the only difference
allowed.
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
from pathlib import Path

FINISHED = (0, 3)


def command(corpus: Path, store: Path, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "reducio_latents", "encode-corpus", str(corpus), str(store)] + (
        options or ["--model", "reducio-random:8", "--resolution", "64", "--shard-rows", "4"]
    )


def run(words: list[str], kill_after_s: float | None = None) -> int | None:
    """Run to the end and return the exit code, or kill the whole group and return None."""
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    if process.returncode not in FINISHED:
        sys.exit(f"{' '.join(words)} ended with {process.returncode}:\n{errors.decode()}")
    return process.returncode


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    kills = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole.latents"
        start = time.monotonic()
        run(command(arguments.corpus, whole, arguments.options))
        took_s = time.monotonic() - start
        expected = contents(whole)
        print(f"undisturbed: {took_s:.1f} s, {len(expected)} files")
        for number in range(arguments.rounds):
            store = Path(scratch) / "killed.latents"
            shutil.rmtree(store, ignore_errors=True)
            words = command(arguments.corpus, store, arguments.options)
            while run(words, kill_after_s=rng.uniform(0.2, 1.1) * took_s) is None:
                kills += 1
            wrong = differences(contents(store), expected)
            leftovers = [p.name for p in store.rglob("*.partial")]
            if wrong:
                sys.exit(f"round {number}: {len(wrong)} files differ: {', '.join(wrong[:5])}")
            print(f"round {number}: same bytes, {len(leftovers)} partial files left, {kills} kills")
    print(f"{arguments.rounds} rounds, {kills} kills, every store byte-identical")


if __name__ == "__main__":
    main()
