"""Encode a corpus with broken videos by every engine, and prove the counts and the bytes.

    python tools/broken_corpus.py [--videos 200] [--broken 20] [--engines local,torchrun,ray]

Writes a corpus of tiny videos, of which some are broken: empty, random bytes, cut off, sound
without pictures, a web page; and three kinds that read well until a clip is decoded, which then
crash the decoder, hang it, or have it eat memory. Every engine must end by itself, count each video
and clip where it belongs, and make the same store, byte for byte but for timings.

`local` is one process, `torchrun` starts two ranks, `ray` two actors on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import wave
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sample_corpus import plasma, regular, write_video

from reducio_latents import open_store
from reducio_latents.encode import Tally

PYTHON = [sys.executable, "-m"]
ENGINES: dict[str, tuple[list[str], list[str]]] = {
    "local": ([*PYTHON, "reducio_latents"], []),
    "torchrun": (
        [*PYTHON, "torch.distributed.run", "--nproc-per-node", "2", "-m", "reducio_latents"],
        [],
    ),
    "ray": ([*PYTHON, "reducio_latents"], ["--engine", "ray", "--gpus", "2"]),
}
"""Engine -> what starts it, and its options."""
OPTIONS = ["--model", "reducio-random:8", "--resolution", "32", "--shard-rows", "16"]
OPTIONS += ["--workers", "2", "--clip-timeout-s", "10"]
MOST_FAILED = 0.1
"""The default of --max-failed."""

FAULTY_DECODER = """
import os, signal, time
from reducio_latents.video.pyav import PyAVBackend

read_clips = PyAVBackend.read_clips

def read_or_fail(self, source, *args, **settings):
    if "crashes" in source.url:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hangs" in source.url:
        time.sleep(3600)
    if "eats" in source.url:
        hoard = b"x" * (1 << 30)
        time.sleep(3600)
    return read_clips(self, source, *args, **settings)

PyAVBackend.read_clips = read_or_fail
"""
"""Python runs `sitecustomize` when it starts, in whatever process of whatever engine."""


def good(path: Path, number: int) -> None:
    """Write a video of one clip, or of two."""
    seconds = 1.1 if number % 3 else 2.1
    write_video(
        path, lambda t, h, w: plasma(t + number, h, w), regular(seconds, 16), (64, 96), seconds
    )


def empty(path: Path, number: int) -> None:
    path.write_bytes(b"")


def noise(path: Path, number: int) -> None:
    path.write_bytes(np.random.RandomState(number).bytes(5000))


def cut_off(path: Path, number: int) -> None:
    good(path, number)
    path.write_bytes(path.read_bytes()[:-400])


def sound(path: Path, number: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.random.RandomState(number).bytes(8000))


def page(path: Path, number: int) -> None:
    path.write_text(f"<html><title>Error {number}</title></html>")


def one_clip(path: Path, number: int) -> None:
    good(path, 3 * number + 1)


BROKEN: dict[str, Callable[[Path, int], None]] = {
    "empty": empty,
    "noise": noise,
    "cut_off": cut_off,
    "sound": sound,
    "page": page,
    "crashes": one_clip,
    "hangs": one_clip,
    "eats": one_clip,
}
DECODED = ("crashes", "hangs", "eats")
"""Kinds that are planned, as one clip, and fail when it is decoded."""


def write_corpus(folder: Path, videos: int, broken: int) -> dict[str, Tally]:
    """Write the corpus and return what must become of its videos and clips."""
    kinds, clips = Counter[str](), 0
    for number in range(videos):
        # Spread evenly: as many of them have come before as belong to this share of the corpus.
        if broken * (number + 1) // videos > broken * number // videos:
            kind = list(BROKEN)[kinds.total() % len(BROKEN)]
            kinds[kind] += 1
            BROKEN[kind](folder / f"{number:04d}_{kind}.mp4", number)
        else:
            clips += 1 if number % 3 else 2
            good(folder / f"{number:04d}.mp4", number)
    failed = sum(kinds[kind] for kind in DECODED)
    return {
        "videos": Tally(videos, videos - broken, 0, broken),
        "clips": Tally(clips + failed, clips, 0, failed),
    }


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


def encode(engine: str, corpus: Path, store: Path, environment: dict[str, str]) -> int:
    """Run one engine to its end; return its exit code."""
    start, options = ENGINES[engine]
    words = [*start, "encode-corpus", str(corpus), str(store), *OPTIONS, *options]
    run = subprocess.run(
        words, check=False, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if run.returncode not in (0, 1, 3):
        sys.exit(f"{engine} ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return run.returncode


def prove(engine: str, store: Path, code: int, expected: dict[str, Tally]) -> None:
    """Exit unless the store says exactly what was expected."""
    counts = {name: Tally(**tally) for name, tally in open_store(store).meta.counts.items()}
    share = max(tally.failed / tally.found for tally in expected.values())
    # torchrun ends with 1 whatever its ranks' codes were.
    bad_code = 1 if engine == "torchrun" else 3
    for what, found, wanted in [
        ("counts", counts, expected),
        ("exit code", code, bad_code if share > MOST_FAILED else 0),
        (
            "rows of errors.parquet",
            len(pq.read_table(store / "errors.parquet")),
            expected["videos"].failed,
        ),
    ]:
        if found != wanted:
            sys.exit(f"{engine}: {what}: {found}, expected {wanted}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--broken", type=int, default=20)
    parser.add_argument("--engines", default=",".join(ENGINES))
    arguments = parser.parse_args()
    # Short, because the paths of Ray's sockets may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="broken") as scratch:
        folder = Path(scratch)
        (folder / "corpus").mkdir()
        expected = write_corpus(folder / "corpus", arguments.videos, arguments.broken)
        (folder / "sitecustomize.py").write_text(FAULTY_DECODER)
        path = os.pathsep.join(filter(None, [scratch, os.environ.get("PYTHONPATH")]))
        first: dict[str, bytes] = {}
        for engine in arguments.engines.split(","):
            begun = time.monotonic()
            store = folder / f"{engine}.latents"
            code = encode(
                engine, folder / "corpus", store, {"PYTHONPATH": path, "RAY_TMPDIR": scratch}
            )
            prove(engine, store, code, expected)
            first = first or contents(store)
            if wrong := differences(contents(store), first):
                sys.exit(f"{engine}: {len(wrong)} files differ: {', '.join(wrong[:5])}")
            print(
                f"{engine:<9} {time.monotonic() - begun:6.1f} s, exact counts, same bytes",
                flush=True,
            )
        for name, tally in expected.items():
            print(f"{name:<9} {tally}")


if __name__ == "__main__":
    main()
