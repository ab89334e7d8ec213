"""`encode_corpus`: corpus in, store out. What is done already is not done again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from reducio_latents.core.config import made_from
from reducio_latents.corpus.summary import PlanSummary, summarise
from reducio_latents.encode.engines.local import local_engine
from reducio_latents.encode.estimate import bytes_per_clip
from reducio_latents.encode.finish import run_job
from reducio_latents.encode.job import RunRequest, as_begun, prepare
from reducio_latents.encode.options import BUCKET_MULTIPLE, EncodeOptions
from reducio_latents.encode.prepare import make_plan
from reducio_latents.encode.progress import Progress
from reducio_latents.encode.report import EncodeReport
from reducio_latents.encode.stop import Stop, StoppedError
from reducio_latents.files import open_files
from reducio_latents.store.turns import at_work
from reducio_latents.store.writer import read_meta_if_any


def encode_corpus(
    corpus: str | Path,
    store: str | Path,
    options: EncodeOptions | None = None,
    *,
    progress: Progress | None = None,
    stop: Stop | None = None,
    **settings: Any,
) -> EncodeReport:
    """Encode every clip of `corpus` that `store` does not hold yet, and say what became of all.

    `settings` are fields of `EncodeOptions`, for callers who have none:

        encode_corpus("videos/", "pexels.latents", weights="reducio-ft4-fs32-attn23.ckpt")

    A video that cannot be read is recorded with its reason and the run goes on. A run that was
    killed resumes by the same call, at the first shard without a commit, and ends with the same
    bytes. `stop` can be asked to end the run early.

    Raise CorpusError for a corpus that cannot be listed, WeightsError for weights that do not fit,
    StoreError for a store that was made differently or cannot be written, QualityError for clips
    below the floor.
    """
    asked = made_from(EncodeOptions, options, settings, "encode_corpus").for_model()
    chosen = as_begun(asked, store)
    stop = stop or Stop()
    request = RunRequest(str(corpus), str(store), chosen, progress or Progress(), stop)
    if chosen.engine == "ray":
        from reducio_latents.encode.engines.ray import run_ray

        engine: Callable[[RunRequest], EncodeReport] | None = run_ray
    else:
        engine = local_engine(chosen)
    try:
        if engine is not None and chosen.engine == "local":
            return engine(request)
        files = open_files(store)
        read_meta_if_any(files)  # refuses a place that is taken by something else
        with at_work(files, "encoding") as run:
            request = replace(request, run=run)
            return engine(request) if engine else run_job(prepare(request))
    except StoppedError:  # before the first shard was begun
        return EncodeReport(signal=stop.signal)


def plan_corpus(
    corpus: str | Path,
    store: str | Path,
    options: EncodeOptions | None = None,
    *,
    write: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> PlanSummary:
    """Return what `encode_corpus` would do; with `write` the plan is stored, and nothing else.

    The sizes are estimates: content images and captions take what they take.
    """
    options = made_from(EncodeOptions, options, settings, "plan_corpus")
    options, files = as_begun(options, store), open_files(store)
    buckets = options.bucket_list(BUCKET_MULTIPLE)
    told = (progress or Progress()).probed
    with at_work(files, "planning") if write else nullcontext():
        planned = make_plan(corpus, files, options, buckets, told, write=write)
    found = summarise(planned.plan, {b.name: bytes_per_clip(b, options) for b in buckets})
    return replace(found, captions_changed=len(planned.captions), videos_gone=planned.gone)
