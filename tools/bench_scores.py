#!/usr/bin/env python
"""What the column `scores` costs: its share of the CPU time of an encode run, and of its seconds.

    python tools/bench_scores.py CORPUS [--columns content_image,scores] [--resolution 256]

The run is one of `encode-corpus`, with the default columns; without `motion` it is what is left to
the CPUs where a GPU encodes. Seconds of CPU are those of the thread that makes the scores, and of
this process with all that it started.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from reducio_latents.encode import EncodeOptions, encode_corpus
from reducio_latents.encode.columns import RowFailed
from reducio_latents.encode.scores import ScoresColumn
from reducio_latents.store.writer import Row


def cpu_s() -> float:
    """Return the CPU seconds of this process and of all that it has started."""
    ticks: dict[int, int] = {}
    below = {os.getpid()}
    for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        pid, fields = int(name.split()[0]), rest.split()
        ticks[pid] = sum(map(int, fields[11:15]))  # own and of children, in user and kernel mode
        if int(fields[1]) in below:
            below.add(pid)
    return sum(ticks.get(pid, 0) for pid in below) / os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("corpus")
    parser.add_argument("--model", default="reducio-tiny-ft4-fs32")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--columns", default=",".join(EncodeOptions.columns))
    chosen = parser.parse_args(arguments)
    columns = tuple(chosen.columns.split(","))
    spent, make = [0.0], ScoresColumn._score

    def timed(column: ScoresColumn, frames: NDArray[np.uint8]) -> list[Row | RowFailed]:
        start = time.thread_time()
        rows = make(column, frames)
        spent[0] += time.thread_time() - start
        return rows

    ScoresColumn._score = timed  # type: ignore[assignment, method-assign]
    with tempfile.TemporaryDirectory() as folder:
        start = cpu_s()
        report = encode_corpus(
            chosen.corpus,
            Path(folder) / "store",
            model=chosen.model,
            resolution=chosen.resolution,
            columns=columns,
        )
        whole = cpu_s() - start
    clips, waited = report.clips.encoded, report.stages.get("encode scores", 0.0)
    print(
        f"{clips} clips of {chosen.resolution} px in {report.seconds:.1f} s: {', '.join(columns)}"
    )
    each, all_of_it = 1000 * spent[0] / clips, 1000 * whole / clips
    print(f"scores take {each:.2f} ms of CPU a clip, of {all_of_it:.0f} ms: {each / all_of_it:.2%}")
    print(f"the encoding thread waits for them {waited / report.seconds:.2%} of its seconds")


if __name__ == "__main__":
    main()
