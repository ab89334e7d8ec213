#!/usr/bin/env python
"""How deep a clip goes: our calls from the command to the model's `encode`, and to a file's write.

Encodes a drawn video with a narrow random model and prints both chains, the deepest of their kind.
What another thread does counts from the call that gave it the work.

    python tools/trace_depth.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import av
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from reducio_latents.cli import main  # noqa: E402
from reducio_latents.files.local import LocalFiles  # noqa: E402
from reducio_latents.vae import ReducioVAE  # noqa: E402

MOST = 10
COMMAND = "encode_corpus"
"""What click calls, in the room of the commands."""
PACKAGE = str(ROOT / "reducio_latents")
_given = threading.local()
"""`chain`: that of the call which gave this thread its work."""


def chain_from(frame: FrameType | None) -> list[str]:
    """Return our functions on the stack, from the command on."""
    found = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            place = Path(code.co_filename).relative_to(ROOT)
            found.append(f"{place}:{frame.f_lineno} {code.co_qualname}")
            if code.co_name == COMMAND and place.parts[1] == "cli":
                break
        frame = frame.f_back
    return [*getattr(_given, "chain", []), *reversed(found)]


@contextmanager
def recording(owner: type, name: str, into: list[list[str]]) -> Iterator[None]:
    """Keep the chain of every call of a method."""
    method: Callable[..., Any] = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        into.append([*chain_from(sys._getframe(1)), f"{owner.__name__}.{name}"])
        return method(*args, **kwargs)

    with mock.patch.object(owner, name, recorded):
        yield


@contextmanager
def following_threads() -> Iterator[None]:
    """Have work in a pool's thread remember who gave it."""
    submit = ThreadPoolExecutor.submit

    def remembering(pool: Any, work: Any, *args: Any, **kwargs: Any) -> Future[Any]:
        chain = chain_from(sys._getframe(1))

        def run() -> Any:
            _given.chain = chain
            return work(*args, **kwargs)

        return submit(pool, run)

    with mock.patch.object(ThreadPoolExecutor, "submit", remembering):
        yield


def draw_video(path: Path) -> None:
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", 16)
        stream.width = stream.height = 64
        for i in range(17):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * i, np.uint8))
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def depths() -> dict[str, list[str]]:
    """Return the deepest chain to the model and to the write of a shard."""
    models: list[list[str]] = []
    writes: list[list[str]] = []
    with tempfile.TemporaryDirectory() as scratch, following_threads():
        corpus, store = Path(scratch) / "corpus", Path(scratch) / "store"
        corpus.mkdir()
        draw_video(corpus / "drawn.mp4")
        command = ["encode-corpus", str(corpus), str(store)]
        settings = ["--model", "reducio-random:8", "--resolution", "64", "--workers", "1"]
        to_model, to_file = (
            recording(ReducioVAE, "encode", models),
            recording(LocalFiles, "write", writes),
        )
        with (
            to_model,
            to_file,
            suppress(SystemExit),
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
        ):
            main([*command, *settings, "--device", "cpu"], standalone_mode=False)
    return {"model": max(models, key=len), "write": max(writes, key=len)}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    found = depths()
    for what, chain in found.items():
        print(f"{what}: {len(chain)} calls")
        for number, call in enumerate(chain, 1):
            print(f"  {number:2} {call}")
    sys.exit(any(len(chain) > MOST for chain in found.values()))
