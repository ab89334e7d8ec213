"""From a listed corpus to the plan that covers it: what is new is probed and planned."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from reducio_latents.core.clips import TimeSpan
from reducio_latents.core.text import printable
from reducio_latents.corpus.build import not_planned, plan_part
from reducio_latents.corpus.entry import CorpusVideo
from reducio_latents.corpus.fate import Sizes
from reducio_latents.corpus.probe import OnProbe, ProbeRecord, Probing, probe_videos
from reducio_latents.corpus.shots import ShotTable
from reducio_latents.errors import StoreError
from reducio_latents.store.plan import Plan, PlanPart, PlanSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewPlan:
    """A plan that covers a corpus."""

    plan: Plan
    part: PlanPart | None
    """What is new in it, and not in the store yet; None if nothing is."""
    stamps: Mapping[str, str]
    """What `stamp_of` said of the videos that were probed, before their bytes were hashed."""


def plan_listed(
    listed: Sequence[CorpusVideo],
    spec: PlanSpec,
    previous: Plan | None,
    probing: Probing,
    on_probe: OnProbe = lambda _, __: None,
    *,
    retry_failed: bool = False,
    replaced: Collection[str] = (),
    records: dict[str, ProbeRecord] | None = None,
) -> NewPlan:
    """Probe and plan what `previous` does not have, and those of `replaced` with other bytes now.

    With `retry_failed` also what failed before. `records` holds what an earlier try has probed, and
    takes in what this one does. Raise StoreError for a plan of another spec.
    """
    if previous is not None:
        previous.spec.require_same(spec)
        if probing.shots.table is not None:
            _require_same_shots(listed, previous, probing.shots.table)
    new = not_planned(listed, previous, retry=retry_failed, replaced=replaced)
    records = {} if records is None else records
    sizes = Sizes(spec)
    unknown = [v for v in new if v.video not in records and not sizes.not_taken(v, None)]
    records |= probe_videos(unknown, probing, on_probe)
    part = plan_part(listed, records, spec, previous, retry_failed=retry_failed, replaced=replaced)
    _warn_of_lost_shots(part)
    if part.changed:
        log.warning(
            "%d videos were replaced since they were planned, %s first: they are planned anew. "
            "What is stored of the old ones stays.",
            len(part.changed),
            part.changed[0],
        )
    plan = previous or Plan.of(part)
    if previous is not None and part.videos.num_rows:
        plan = previous.extended(part)
    return NewPlan(
        plan,
        part if part.videos.num_rows else None,
        {name: record.stamp for name, record in records.items()},
    )


def _require_same_shots(listed: Sequence[CorpusVideo], plan: Plan, table: ShotTable) -> None:
    """Raise StoreError if a table now tells other shots of a video than it was planned with."""
    columns = ("shot_starts_s", "shot_ends_s", "duration_s", "rate_fps")
    planned = plan.video_columns("video", "status", *columns)
    planned = planned.filter(pc.equal(planned["status"], "planned"))
    rows = {row["video"]: row for row in planned.to_pylist()}
    other = [
        video.video
        for video in listed
        if (row := rows.get(video.video)) is not None
        and table.of(video, row["duration_s"], row["rate_fps"]).spans
        != tuple(map(TimeSpan, row["shot_starts_s"] or (), row["shot_ends_s"] or ()))
    ]
    if other:
        raise StoreError(
            f"the table tells other shots of {len(other)} videos than they were planned with, "
            f"{printable(other[0])} first. Use the same table, or write to a new store."
        )


def _warn_of_lost_shots(part: PlanPart) -> None:
    if "shots_problem" in part.videos.schema.names:
        lost = part.videos.filter(pc.is_valid(part.videos["shots_problem"]))
        if len(lost):
            first = lost.slice(0, 1).to_pylist()[0]
            log.warning(
                "the shots of %d videos are not known, so their clips may run across cuts: %s: %s.",
                len(lost),
                printable(first["video"]),
                printable(first["shots_problem"]),
            )
