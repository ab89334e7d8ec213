#!/usr/bin/env python
"""Write the JSON Schemas in `schemas/` from the types they describe.

Run it after changing one of the types: `python tools/make_schemas.py`. With `--check` it writes
nothing and fails if a file differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # this checkout, installed or not

from json_schema import DIALECT, json_schema_of, json_schema_of_table  # noqa: E402

from reducio_latents.encode.options import EncodeOptions  # noqa: E402
from reducio_latents.store.commit import Commit  # noqa: E402
from reducio_latents.store.index import IndexEntry  # noqa: E402
from reducio_latents.store.meta import StoreMeta  # noqa: E402
from reducio_latents.store.plan import (  # noqa: E402
    CLIP_SCHEMA,
    SPAN_SCHEMA,
    VIDEO_SCHEMA,
    VIDEO_SHOT_SCHEMA,
    VIDEO_SPAN_SCHEMA,
)
from reducio_latents.store.reports import (  # noqa: E402
    ERRORS_SCHEMA,
    QUALITY_SCHEMA,
    SHOTS_SCHEMA,
)
from reducio_latents.train.config import TrainConfig  # noqa: E402

FOLDER = ROOT / "schemas"


def plan_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a plan's rows: `$defs` clip and video."""
    clip = json_schema_of_table(
        CLIP_SCHEMA,
        optional=SPAN_SCHEMA,
        title="clip",
        description="A row of plan/part-*.parquet. Columns of the corpus table follow.",
        extra=True,
    )
    video = json_schema_of_table(
        VIDEO_SCHEMA,
        optional=[*VIDEO_SPAN_SCHEMA, *VIDEO_SHOT_SCHEMA],
        title="video",
        description="A row of plan/videos-*.parquet.",
        extra=False,
    )
    return {
        "$schema": DIALECT,
        "title": "plan",
        "description": "A row of the plan of a latent store.",
        "oneOf": [{"$ref": "#/$defs/clip"}, {"$ref": "#/$defs/video"}],
        "$defs": {"clip": clip, "video": video},
    }


SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {
    "commit.schema.json": lambda: json_schema_of(Commit),
    "encode_options.schema.json": lambda: json_schema_of(EncodeOptions),
    "errors.schema.json": lambda: json_schema_of_table(
        ERRORS_SCHEMA,
        title="errors.parquet",
        description="One row for each video and each clip that failed.",
        extra=False,
    ),
    "index_entry.schema.json": lambda: json_schema_of(IndexEntry),
    "plan.schema.json": plan_json_schema,
    "quality.schema.json": lambda: json_schema_of_table(
        QUALITY_SCHEMA,
        title="quality.parquet",
        description="One row for each clip that was decoded while it was encoded.",
        extra=False,
    ),
    "shots.schema.json": lambda: json_schema_of_table(
        SHOTS_SCHEMA,
        title="shots.parquet",
        description="One row for each shot, and for each video whose shots are not known.",
        extra=False,
    ),
    "store.schema.json": lambda: json_schema_of(StoreMeta),
    "train_config.schema.json": lambda: json_schema_of(TrainConfig),
}


def text_of(name: str) -> str:
    """Return what the file `name` in `schemas/` must hold."""
    return json.dumps(SCHEMAS[name](), indent=2, ensure_ascii=False) + "\n"


def is_current(name: str) -> bool:
    path = FOLDER / name
    return path.is_file() and path.read_text(encoding="utf-8") == text_of(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    check = parser.parse_args().check
    stale = [name for name in SCHEMAS if not is_current(name)]
    for name in stale:
        if not check:
            (FOLDER / name).write_text(text_of(name), encoding="utf-8")
        print(f"{name} {'is not what the types say' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
