"""What a data set's page on the Hub shows of a store: its card, and a table of some clips."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from reducio_latents.core.text import printable
from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey, commit_path
from reducio_latents.store.plan import REMOVED
from reducio_latents.store.reports import read_quality
from reducio_latents.store.row_kinds import ImageRows, image_pixels

CARD = "README.md"
PREVIEW_FOLDER = "preview"
PREVIEW = f"{PREVIEW_FOLDER}/clips.parquet"
PREVIEW_CLIPS = 64
PREVIEW_QUALITY = 90
IMAGE_COLUMN = "content_image"
SHOWN_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B")
"""By which the Hub tells how many rows a data set has."""


def preview(store: Store) -> tuple[bytes, int]:
    """Return Parquet of some clips, spread over the store, as the Hub's viewer shows it: their
    content image as WebP, captions, where they are from; and how many images."""
    rows = list(_some_clips(store))
    pictures = sum(row["image"] is not None for row in rows)
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "caption": {"dtype": "string", "_type": "Value"},
        "video": {"dtype": "string", "_type": "Value"},
        "start_s": {"dtype": "float64", "_type": "Value"},
        "size": {"dtype": "string", "_type": "Value"},
        "clip_id": {"dtype": "string", "_type": "Value"},
    }
    types = {"Image": pa.struct([("bytes", pa.binary()), ("path", pa.string())])}
    types |= {"string": pa.string(), "float64": pa.float64()}
    if not pictures:
        del features["image"]
    fields = [(name, types[f.get("dtype", f["_type"])]) for name, f in features.items()]
    known = {"huggingface": json.dumps({"info": {"features": features}})}
    out = io.BytesIO()
    table = pa.Table.from_pylist(rows, pa.schema(fields, metadata=known))
    pq.write_table(table, out, row_group_size=16)
    return out.getvalue(), pictures


def _some_clips(store: Store) -> Iterator[dict[str, Any]]:
    has_images = IMAGE_COLUMN in store.columns
    has_images = has_images and isinstance(store.kind(IMAGE_COLUMN), ImageRows)
    shown = IMAGE_COLUMN if has_images else _main_column(store)
    there = [
        ShardKey(shard.bucket, shard.shard)
        for shard in store.plan.shards()
        if store.files.size(commit_path(ShardKey(shard.bucket, shard.shard), shown)) is not None
    ]
    few = min(len(there), PREVIEW_CLIPS)
    chosen = [there[i] for i in np.linspace(0, len(there) - 1, few).astype(int)]
    each = -(-PREVIEW_CLIPS // few) if few else 0
    for key in chosen:
        fields = ["clip_id", "video", "start_s", "captions", "status"]
        clips = store.plan.shard_clips(key.bucket, key.shard, fields).to_pylist()
        crcs = store.commit(key, shown).row_crc32c
        good = [i for i, crc in enumerate(crcs) if crc and clips[i]["status"] != REMOVED]
        read = store.row_reader(key, shown) if has_images else None
        for row in np.unique(np.linspace(0, len(good) - 1, min(each, len(good))).astype(int)):
            clip = clips[good[row]]
            data = read(good[row]) if read else None
            yield {
                "image": _webp(bytes(data), key.bucket) if data is not None else None,
                "caption": next(iter(clip["captions"]), ""),
                "size": key.bucket,
                **{name: clip[name] for name in ("video", "start_s", "clip_id")},
            }


def _webp(row: bytes, bucket: str) -> dict[str, Any]:
    out = io.BytesIO()
    Image.fromarray(image_pixels(row, bucket)).save(out, "WEBP", quality=PREVIEW_QUALITY)
    return {"bytes": out.getvalue(), "path": None}


def card(store: Store, repository: str, licence: str | None) -> str:
    """Return the card of a store: front matter that the Hub reads, then what people do."""
    meta, name = store.meta, repository.partition("/")[2]
    clips = sum(
        entry.rows - len(entry.failed)
        for entry in store.index.entries.values()
        if entry.column == _main_column(store)
    )
    front = [
        *([f"license: {licence.lower()}"] if licence else []),
        f"pretty_name: {json.dumps(name)}",
        f"size_categories:\n- {_size_of(clips)}",
        "tags:\n- video\n- latents\n- reducio-latents",
        "configs:\n- config_name: preview\n  default: true\n  data_files:\n"
        f"  - split: train\n    path: {PREVIEW}",
    ]
    counts = {
        what: ", ".join(f"{number:,} {fate}" for fate, number in tally.items())
        for what, tally in meta.counts.items()
    }
    main = meta.columns[_main_column(store)]
    about = {
        "model": f"`{_cell(main.encoder)}`",
        "fingerprint": f"`{main.fingerprint}`",
        "latents": f"of {clips:,} clips, in {', '.join(meta.buckets)} (frames x height x width)",
        "frames per second": f"{meta.clip.rate_fps:g}",
        **counts,
        "licence": licence or "not stated",
        "corpus": meta.corpus or "not stated",
        "PSNR of decoded clips": _psnr(store),
    }
    lines = [f"| {key} | {_cell(value)} |" for key, value in about.items()]
    columns = [
        f"| `{key}` | {_cell(c.content)} | {_cell(c.encoder)} | `{c.fingerprint[:16]}` | "
        f"{_cell(json.dumps(c.final)) if c.final else ''} |"
        for key, c in meta.columns.items()
    ]
    fields = [key for key in ("motion", "latents", "caption") if key in meta.columns]
    listed = json.dumps(fields or store.columns[:1])
    front_text, about_text, columns_text = ("\n".join(x) for x in (front, lines, columns))
    return f"""---
{front_text}
---

# {name}

Video latents, made by reducio-latents. The viewer shows some clips by their centre frames; the
latents are read so:

```python
from reducio_latents import LatentDataset

dataset = LatentDataset("hf://datasets/{repository}", columns={listed}, batch_size=64)
for batch in dataset:
    latents = batch["latents"]  # what a diffusion model trains on
```

| | |
|---|---|
{about_text}

| column | holds | made by | fingerprint | final latents |
|---|---|---|---|---|
{columns_text}

`reducio-latents verify` proves a downloaded copy, byte by byte.
"""


def _size_of(clips: int) -> str:
    below = min(sum(clips >= 10 ** (3 + i) for i in range(len(SIZES))), len(SIZES) - 1)
    return f"{SIZES[below - 1]}<n<{SIZES[below]}" if below else f"n<{SIZES[0]}"


def _main_column(store: Store) -> str:
    return next((name for name in ("motion", "latents") if name in store.columns), store.columns[0])


def _psnr(store: Store) -> str:
    table = read_quality(store.files, ["psnr"])
    if table is None or not len(table):
        return "not measured"
    found = np.quantile(table["psnr"].to_numpy(), SHOWN_QUANTILES)
    parts = [f"{value:.2f} ({q:.0%})" for q, value in zip(SHOWN_QUANTILES, found, strict=True)]
    return f"{', '.join(parts)} dB, of {len(table):,} clips"


def _cell(text: str) -> str:
    """Return text from a store so that it cannot leave its cell."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")
