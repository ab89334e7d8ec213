"""Engines: who takes which shard. Whatever the engine, the store has the same bytes."""

from __future__ import annotations

from reducio_latents.encode.engines.local import Request, run_local
from reducio_latents.encode.report import EncodeReport

__all__ = ["Request", "run"]


def run(request: Request) -> EncodeReport:
    """Encode a corpus by the engine that the options name."""
    if request.options.engine == "ray":
        from reducio_latents.encode.engines.ray import run_ray

        return run_ray(request)
    return run_local(request)
