"""Which clips a run trains on and which it is measured on: made once, kept in the run's folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducio_latents.core.geometry import Bucket, aspect_buckets, square_bucket
from reducio_latents.corpus import corpus_root, list_corpus
from reducio_latents.corpus.planning import plan_listed
from reducio_latents.corpus.probe import OnProbe, Probing
from reducio_latents.errors import ConfigError
from reducio_latents.files import open_files
from reducio_latents.files.source import VideoSource, join_url
from reducio_latents.store.plan import Plan, PlanSpec, StoredPart, read_plan, write_part
from reducio_latents.store.plan.parts import PLAN_FOLDER as PLAN
from reducio_latents.train.batch import ClipName
from reducio_latents.train.config import DataConfig
from reducio_latents.video import get_backend

VALIDATION = "validation"
"""Folder of the plan of a validation corpus of its own."""


class ClipTable:
    """Clips by number, and where their videos are."""

    def __init__(self, plan: Plan, root: str, videos: Sequence[str]) -> None:
        self._clips = plan.own_clips(videos, ["video", "start_s", "bucket"])
        sources = plan.video_columns("video", "url", "offset", "length")
        self._sources = sources.select(["url", "offset", "length"])
        self._row = {name: i for i, name in enumerate(sources["video"].to_pylist())}
        self._root = root
        codes = self._clips["bucket"].combine_chunks().dictionary_encode()
        self._code: NDArray[np.int32] = codes.indices.to_numpy()
        self.sizes: tuple[Bucket, ...] = tuple(map(Bucket.parse, codes.dictionary.to_pylist()))
        """The buckets that there are."""
        self.videos = len(videos)
        """How many videos the clips are of."""

    def __len__(self) -> int:
        return len(self._code)

    @property
    def bucket_numbers(self) -> NDArray[np.int32]:
        """The bucket of each clip, an index into `sizes`."""
        return self._code

    def bucket(self, clip: int) -> Bucket:
        return self.sizes[int(self._code[clip])]

    def name(self, clip: int) -> ClipName:
        return ClipName(self._clips["video"][clip].as_py(), self._clips["start_s"][clip].as_py())

    def source(self, clip: int) -> VideoSource:
        row = self._row[self._clips["video"][clip].as_py()]
        url, offset, length = (column[row].as_py() for column in self._sources.columns)
        return VideoSource(join_url(self._root, url), offset, length)

    def following(self, clip: int) -> int:
        """Return the next clip of the same bucket, after the last one the first."""
        same = np.flatnonzero(self._code == self._code[clip])
        return int(same[(np.searchsorted(same, clip) + 1) % len(same)])

    def spread(self, count: int) -> list[int]:
        """Return up to `count` clips, one of each video before a second one of any."""
        seen: dict[str, int] = {}
        rounds = []
        for clip, video in enumerate(self._clips["video"].to_pylist()):
            seen[video] = seen.get(video, -1) + 1
            rounds.append((seen[video], _digest(video), clip))
        return sorted(clip for _, _, clip in sorted(rounds)[:count])


@dataclass(frozen=True)
class Split:
    """Training clips and validation clips; no video has clips in both."""

    train: ClipTable | None
    """None where only a validation was asked for, of a corpus of its own."""
    validation: ClipTable | None
    unusable: dict[str, str]
    """Videos that could not be used -> why."""


def check_data(data: DataConfig, *, training: bool = True) -> None:
    """Raise ConfigError for settings with which no clip could be read."""
    if data.corpus is None and (training or data.validation_corpus is None):
        key = "corpus" if training else "validation_corpus"
        raise ConfigError(f"data.{key} names no videos. Give --set data.{key}=FOLDER.")
    get_backend(data.video_backend)


def make_split(
    out: Path, data: DataConfig, *, training: bool = True, on_probe: OnProbe = lambda _, __: None
) -> Split:
    """Return the split of a run; list, probe and plan the corpus where `out` has no plan of it yet.

    The plan in `out` is what a run trains on, also when the corpus has grown since. Raises
    CorpusError for a corpus that cannot be listed, and ConfigError for a split that is empty: then
    no plan is kept, so that more videos help.
    """
    check_data(data, training=training)
    train = validation = None
    fresh: list[tuple[Path, StoredPart]] = []
    unusable: dict[str, str] = {}
    hashes: set[str] = set()
    if data.corpus is not None:
        plan = _plan(out, data.corpus, data, on_probe, fresh)
        share = data.validation_share if data.validation_corpus is None else 0.0
        usable = _usable(plan)
        apart = set_apart(usable, share)
        left = [video for video in usable if video not in set(apart)]
        train = _table("training", plan, data.corpus, left)
        validation = _table("validation", plan, data.corpus, apart) if share else None
        unusable, hashes = _unusable(plan), set(usable.values())
    if data.validation_corpus is not None:
        other = _plan(out / VALIDATION, data.validation_corpus, data, on_probe, fresh)
        # A video that is trained on, under whatever name, proves nothing.
        usable = _usable(other)
        apart = [video for video, sha256 in usable.items() if sha256 not in hashes]
        trained = len(usable) - len(apart)
        validation = _table("validation", other, data.validation_corpus, apart, trained)
        unusable |= _unusable(other)
    for folder, part in fresh:
        write_part(open_files(folder), part.number, part)
    return Split(train, validation, unusable)


def forget_split(out: Path) -> None:
    """Remove the plans of a run that has trained nothing yet, so that others can be made."""
    for folder in (out, out / VALIDATION):
        shutil.rmtree(folder / PLAN, ignore_errors=True)


def _table(
    split: str, plan: Plan, corpus: str, videos: Sequence[str], trained: int = 0
) -> ClipTable:
    """Return the clips of `videos`; raise ConfigError if there are none.

    `trained` is how many others were left out because they are trained on.
    """
    if videos:
        return ClipTable(plan, corpus_root(corpus), videos)
    reasons = [f"{video}: {why}" for video, why in _unusable(plan).items()]
    hint = f" The first one that was left out: {reasons[0]}." if reasons else ""
    also = f", and {trained} are in the training corpus too" if trained else ""
    raise ConfigError(
        f"{corpus} leaves no clip for the {split} split: {plan.videos.num_rows} videos were "
        f"listed, {len(reasons)} of them are unreadable or too short{also}.{hint} Give more "
        "videos, or another data.validation_share."
    )


def set_apart(videos: Collection[str], share: float) -> list[str]:
    """Return the videos whose hashes are smallest: `share` of them, and at least one if above 0."""
    count = max(1, round(len(videos) * share)) if share and videos else 0
    return sorted(sorted(videos, key=_digest)[:count])


def _digest(video: str) -> bytes:
    return hashlib.sha256(video.encode()).digest()


def _plan(
    out: Path,
    corpus: str,
    data: DataConfig,
    on_probe: OnProbe,
    fresh: list[tuple[Path, StoredPart]],
) -> Plan:
    """Return the plan in `out`; if there is none, make one and add it to `fresh`."""
    files = open_files(out)
    bucketed = aspect_buckets(data.clip.frames, data.size_px) if data.crop == "aspect" else ()
    buckets = bucketed or (square_bucket(data.clip.frames, data.size_px),)
    spec = PlanSpec(clip=data.clip, buckets=buckets)
    plan = read_plan(files)
    if plan is not None:
        plan.spec.require_same(spec)
        return plan
    probing = Probing(
        backend=data.video_backend,
        workers=data.workers,
        timeout_s=data.timeout_s,
        deinterlace=data.deinterlace != "none",
    )
    new = plan_listed(list_corpus(corpus), spec, None, probing, on_probe)
    fresh += [(out, part) for part in new.parts]
    return new.plan


def _usable(plan: Plan) -> dict[str, str]:
    """Return the videos that clips are cut from, and the hash of each."""
    planned = plan.videos.filter(pc.equal(plan.videos["status"], "planned"))
    return dict(zip(planned["video"].to_pylist(), planned["sha256"].to_pylist(), strict=True))


def _unusable(plan: Plan) -> dict[str, str]:
    failed = plan.videos.filter(pc.is_in(plan.videos["status"], pa.array(["failed", "too_short"])))
    return dict(zip(failed["video"].to_pylist(), failed["reason"].to_pylist(), strict=True))
