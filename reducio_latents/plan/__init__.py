"""What will be done: which clips of which videos, in which shard and row. A pure function."""

from reducio_latents.plan.build import plan_part
from reducio_latents.plan.parts import PlanPart, read_parts, verify_parts, write_part
from reducio_latents.plan.plan import Plan, PlanCounts, PlannedShard, read_plan
from reducio_latents.plan.spec import PlanSpec
from reducio_latents.plan.summary import BucketSummary, PlanSummary, summarise
from reducio_latents.plan.tables import CLIP_SCHEMA, VIDEO_SCHEMA, plan_json_schema

__all__ = [
    "CLIP_SCHEMA",
    "VIDEO_SCHEMA",
    "BucketSummary",
    "Plan",
    "PlanCounts",
    "PlanPart",
    "PlanSpec",
    "PlanSummary",
    "PlannedShard",
    "plan_json_schema",
    "plan_part",
    "read_parts",
    "read_plan",
    "summarise",
    "verify_parts",
    "write_part",
]
