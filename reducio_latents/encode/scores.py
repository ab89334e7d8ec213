"""The column `scores`: what a clip's pixels say of it, and what an own function makes of them."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.columns import FRAMES, ClipBatch, ColumnEncoder, RowFailed
from reducio_latents.encode.fast_path import made_up_clips
from reducio_latents.errors import ConfigError
from reducio_latents.store.meta import ColumnMeta
from reducio_latents.store.row_kinds import SCORES_CONTENT, require_score_names
from reducio_latents.store.writer import Row
from reducio_latents.video.scores import FORMULAS, FRAME_SCORES, score_frames

_Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Scorer:
    """A function of the user: uint8 frames (T, H, W, 3), not to be written to -> name -> number.

    None and NaN are scores that the clip lacks.
    """

    name: str
    """`module:function`."""
    function: Callable[[_Frames], Mapping[str, Any]]
    source_sha256: str
    """Of the file that it is defined in."""

    @classmethod
    def load(cls, name: str) -> Scorer:
        """Import the function; raise ConfigError, saying why, if that cannot be done."""
        module, colon, function = name.partition(":")
        if not (module and colon and function):
            raise ConfigError(f"scorer is {name!r}; write module:function.")
        if (here := str(Path.cwd())) not in sys.path:  # as `python -m` has it, and a command not
            sys.path.append(here)
        try:
            found = getattr(importlib.import_module(module), function)
        except ModuleNotFoundError as err:
            raise ConfigError(
                f"scorer {name}: {err}. Is it in this folder, or its folder on PYTHONPATH?"
            ) from err
        except Exception as err:  # a module of another may raise anything
            raise ConfigError(f"scorer {name} cannot be imported: {err}.") from err
        if not callable(found):
            raise ConfigError(f"scorer {name} is no function.")
        try:
            source = inspect.getsourcefile(inspect.unwrap(found)) or ""
        except TypeError:  # an object with __call__, or compiled
            source = getattr(importlib.import_module(module), "__file__", None) or ""
        if not Path(source).is_file():
            raise ConfigError(f"scorer {name} has no source file to take a fingerprint of.")
        return cls(name, found, hashlib.sha256(Path(source).read_bytes()).hexdigest())

    def score(self, frames: _Frames) -> dict[str, float]:
        """Return a clip's scores, NaN for one that it lacks; raise ValueError for no numbers."""
        view = frames.view()
        view.flags.writeable = False  # other columns are made of the same pixels
        try:
            given = self.function(view)
            items = [(str(name), value) for name, value in given.items()]
            scores = {n: float("nan") if v is None else float(np.float32(v)) for n, v in items}
        except (Exception, SystemExit) as err:
            what = f"{type(err).__name__}: {err}".partition("\n")[0].rstrip(".")
            raise ValueError(f"{self.name} gave no dict of numbers ({what})") from err
        if infinite := [name for name, value in scores.items() if np.isinf(value)]:
            raise ValueError(f"{self.name} gave infinity as {infinite[0]}")
        return scores


@dataclass(frozen=True)
class ScoresColumn(ColumnEncoder):
    """`scores`: `video.scores.FRAME_SCORES` and those of an own scorer, float32 (K,).

    A thread makes them beside what the encoder's device computes.
    """

    resize: str
    scorer: Scorer | None = None
    name: str = "scores"
    needs: frozenset[str] = frozenset({FRAMES})

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="scores")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the scores, in their order; an own scorer is asked once, with a clip made up."""
        if self.scorer is None:
            return tuple(FRAME_SCORES)
        try:
            own = list(self.scorer.score(made_up_clips(1, Bucket(16, 64, 64))[0].numpy()))
        except ValueError as err:
            raise ConfigError(f"scorer {err} for a clip that was made up to try it.") from err
        if taken := [name for name in own if name in FRAME_SCORES]:
            raise ConfigError(
                f"scorer {self.scorer.name} gives {taken[0]!r}, which is there already; call it "
                "otherwise."
            )
        names = (*FRAME_SCORES, *own)
        require_score_names(names)
        return names

    def describe(self, buckets: Sequence[Bucket]) -> ColumnMeta:
        own = self.scorer
        config = {"formulas": FORMULAS, "names": list(self.names), "resize": self.resize}
        if own is not None:
            config |= {"scorer": own.name, "scorer_sha256": own.source_sha256}
        return ColumnMeta(
            kind="array",
            content=SCORES_CONTENT,
            encoder="scores" if own is None else f"scores and {own.name}",
            config=config,
            dtype="float32",
            row_shapes={bucket.name: (len(self.names),) for bucket in buckets},
        )

    def launch(self, batch: ClipBatch) -> Callable[[], Sequence[Row | RowFailed]]:
        assert batch.frames_BTHWC is not None
        return self._thread.submit(self._score, batch.frames_BTHWC.numpy()).result

    def _score(self, frames_BTHWC: _Frames) -> list[Row | RowFailed]:
        return [self._row(clip) for clip in frames_BTHWC]

    def _row(self, frames: _Frames) -> Row | RowFailed:
        scores = score_frames(frames)
        try:
            own = {} if self.scorer is None else self.scorer.score(frames)
        except ValueError as err:
            return RowFailed(f"scorer {err}.")
        scores |= own
        if scores.keys() != set(self.names):
            other = ", ".join(sorted(scores.keys() ^ set(self.names)))
            return RowFailed(f"scorer gave other scores than at first: {other}.")
        return np.array([scores[name] for name in self.names], np.float32)
