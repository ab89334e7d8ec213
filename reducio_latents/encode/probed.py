"""What a run has found out while it probes, kept for the run after it if it is killed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from reducio_latents.core.clips import TimeSpan
from reducio_latents.core.config import convert
from reducio_latents.core.parsing import compact_json
from reducio_latents.corpus import CorpusVideo
from reducio_latents.corpus.probe import ProbeRecord
from reducio_latents.corpus.shots import VideoShots
from reducio_latents.errors import ConfigError
from reducio_latents.files import Files
from reducio_latents.store.seal import seal, unseal
from reducio_latents.store.writer import PROBED_FOLDER
from reducio_latents.video.identity import stamp_of

KEPT_EVERY_S = 20.0


class ProbedSoFar:
    """Records in small files of the store, until the plan has them."""

    def __init__(self, files: Files, settings: str) -> None:
        self._files, self._settings = files, settings
        self._waiting: dict[str, Any] = {}
        self._kept_s = time.monotonic()

    def restore(self, listed: Iterable[CorpusVideo]) -> dict[str, ProbeRecord]:
        """Return what was found with the same settings of videos that have not changed since."""
        rows: dict[str, Any] = {}
        for path in list(self._files.list(PROBED_FOLDER)):
            try:
                raw = unseal(self._files.read(path))
                if raw["settings"] == self._settings:
                    rows |= {name: _record_of(row) for name, row in raw["records"].items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
                continue  # damaged, or another version's: it is found out again
        known = {v.video: v.source for v in listed if v.video in rows}
        return {
            name: rows[name]
            for name, source in known.items()
            if rows[name].stamp and rows[name].stamp == stamp_of(source)
        }

    def keep(self, video: str, record: ProbeRecord) -> None:
        """Take a record in, and write those that have come once in a while."""
        self._waiting[video] = asdict(record)
        if time.monotonic() - self._kept_s >= KEPT_EVERY_S:
            body = compact_json({"settings": self._settings, "records": self._waiting})
            self._files.write(f"{PROBED_FOLDER}/{uuid.uuid4().hex}.json", seal(body))
            self._waiting, self._kept_s = {}, time.monotonic()

    def forget(self) -> None:
        """Remove the files: the plan has all of it."""
        for path in list(self._files.list(PROBED_FOLDER)):
            self._files.delete(path)


def _record_of(row: dict[str, Any]) -> ProbeRecord:
    told = row.pop("shots")
    found: ProbeRecord = convert({**row, "shots": None}, ProbeRecord, where=PROBED_FOLDER)
    spans = convert(told["spans"], list[tuple[float, float]], where=PROBED_FOLDER)
    problem = convert(told["problem"], str | None, where=PROBED_FOLDER)
    by = convert(told["by"], str, where=PROBED_FOLDER)
    shots = VideoShots(by, tuple(TimeSpan(*span) for span in spans), problem)
    return replace(found, shots=shots)
