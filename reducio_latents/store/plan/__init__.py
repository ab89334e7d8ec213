"""What is to be done: which clips of which videos, in which shard and row."""

from reducio_latents.store.plan.parts import (
    PlanPart,
    PlanTakenError,
    StoredPart,
    complete_parts,
    edit_part,
    first_sums,
    read_parts,
    verify_parts,
    write_part,
)
from reducio_latents.store.plan.plan import Plan, PlanCounts, PlannedShard, read_plan, require_plan
from reducio_latents.store.plan.spec import PlanSpec
from reducio_latents.store.plan.sums import ShardSums
from reducio_latents.store.plan.tables import (
    CLIP_SCHEMA,
    REMOVED,
    SPAN_SCHEMA,
    VIDEO_SCHEMA,
    VIDEO_SHOT_SCHEMA,
    VIDEO_SPAN_SCHEMA,
)

__all__ = [
    "CLIP_SCHEMA",
    "REMOVED",
    "SPAN_SCHEMA",
    "VIDEO_SCHEMA",
    "VIDEO_SHOT_SCHEMA",
    "VIDEO_SPAN_SCHEMA",
    "Plan",
    "PlanCounts",
    "PlanPart",
    "PlanSpec",
    "PlanTakenError",
    "PlannedShard",
    "ShardSums",
    "StoredPart",
    "complete_parts",
    "edit_part",
    "first_sums",
    "read_parts",
    "read_plan",
    "require_plan",
    "verify_parts",
    "write_part",
]
