"""From a listed corpus to the plan that covers it: what is new is probed and planned."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from reducio_latents.corpus.build import not_planned, plan_part
from reducio_latents.corpus.entry import CorpusVideo
from reducio_latents.corpus.fate import Sizes
from reducio_latents.corpus.probe import OnProbe, ProbeRecord, Probing, probe_videos
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
    new = not_planned(listed, previous, retry=retry_failed, replaced=replaced)
    records = {} if records is None else records
    sizes = Sizes(spec)
    unknown = [v for v in new if v.video not in records and not sizes.not_taken(v, None)]
    records |= probe_videos(unknown, probing, on_probe)
    part = plan_part(listed, records, spec, previous, retry_failed=retry_failed, replaced=replaced)
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
