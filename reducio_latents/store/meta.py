"""A store's description of itself: what a reader must know without its writer's command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

import google_crc32c
import numpy as np

from reducio_latents.core.choices import Container
from reducio_latents.core.clips import ClipSpec
from reducio_latents.core.config import from_mapping
from reducio_latents.core.parsing import compact_json, fingerprint_of, parse_json
from reducio_latents.errors import ConfigError, GeometryError, StoreError
from reducio_latents.files import Files
from reducio_latents.store.limits import (
    MAX_SHARD_ROWS,
    ROW_DTYPES,
    must_hold,
    require_bucket,
    require_column,
    require_count,
    require_shape,
)

FORMAT_VERSION = 2
"""Of new stores. Format 1 is read, and gone on with, as it was: see `zarr`."""
FORMAT_VERSIONS = (1, FORMAT_VERSION)
ATTRIBUTE = "reducio_latents"
"""Key of the description in the root group's Zarr attributes."""
CHECKSUM = "reducio_latents_crc32c"
"""Key of its checksum: crc32c of the description as compact JSON."""
ROOT = "zarr.json"

MAX_BUCKETS, MAX_COLUMNS, MAX_PLACE = 1000, 200, 4096
Nodes = Mapping[str, Mapping[str, Any]]
"""Path of a group or an array -> its `zarr.json`."""
NOT_DECISIVE = ("measured", "empty_row", "weights")
"""What of a column two runs over the same store may disagree on."""


@dataclass(frozen=True, kw_only=True)
class ColumnMeta:
    """One payload per clip, and everything that decided its numbers."""

    kind: Literal["array", "bytes"]
    """`array`: every row of a bucket has one shape. `bytes`: rows of any length."""
    content: str
    """What a row is: `moments`, or a media type such as `image/webp` or `text/plain`."""
    encoder: str
    """Name of what made it."""
    config: dict[str, Any]
    """Everything that changes the numbers: weights hash, architecture, resize rule, precision."""
    dtype: str = "float16"
    """Numpy name of an array's values; `bytes` for kind `bytes`."""
    row_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Bucket name -> shape of one row; (2D, t, h, w) for moments: mean, then log-variance."""
    final: dict[str, Any] | None = None
    """The rule that turns a sample into final latents, `gaussian.final_latents` reads it."""
    compression: Literal["none", "zstd"] = "none"
    """Of each row by itself; see `row_kinds`."""
    measured: dict[str, float] = field(default_factory=dict)
    """What was measured when the column was begun: `float32_error`, a fast path's relative error
    (2-norm) against float32; `batch_size`, the clips at once with which the GPU was fastest. Like
    `empty_row` it differs from machine to machine, so neither is part of the fingerprint or of what
    makes two runs different."""
    empty_row: str | None = None
    """For text: base64 of the row of a clip without captions."""
    weights: str | None = None
    """Where the weights of `motion` lay, an absolute path or a name of the Hub; for decoding. None
    for a model that has none or brings them."""

    def __post_init__(self) -> None:
        must_hold(self.dtype in (*ROW_DTYPES, "bytes"), f"dtype {self.dtype[:30]!r} is no such.")
        must_hold(
            self.kind == "bytes" or self.dtype in ROW_DTYPES, "an array has values of a dtype."
        )
        must_hold(len(self.row_shapes) <= MAX_BUCKETS, "row_shapes names too many buckets.")
        must_hold(
            len(self.weights or "") <= MAX_PLACE and "\0" not in (self.weights or ""),
            "weights names no place.",
        )
        for bucket, shape in self.row_shapes.items():
            require_bucket(bucket)
            require_shape(shape, np.dtype(self.dtype).itemsize if self.dtype in ROW_DTYPES else 1)

    def decisive(self) -> dict[str, Any]:
        """Return all that two runs over the same store must agree on, as JSON-like values."""
        values = asdict(self)
        return {k: v for k, v in values.items() if k not in NOT_DECISIVE}

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints give equal rows from equal videos."""
        return fingerprint_of({"encoder": self.encoder, "dtype": self.dtype, **self.config})


@dataclass(frozen=True, kw_only=True)
class StoreMeta:
    """The description, in the root `zarr.json`, also of a WebDataset store."""

    container: Container = "zarr"
    shard_rows: int = 512
    """Clips of one bucket in a shard, at most."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    buckets: tuple[str, ...] = ()
    """Names of the buckets, `TxHxW`."""
    resize: str = "bicubic"
    """How frames were resized to cover their bucket, before the centre crop; always antialiased."""
    deinterlace: str = "none"
    """What made whole pictures of interlaced frames: `bwdif`, or `none`, as before it was asked."""
    colours: str = "swscale"
    """How ordinary 8-bit YUV became RGB: `exact`, resized plane by plane and rounded to the nearest
    level, or by `swscale`, as before it was asked."""
    corpus: str = ""
    """Where the videos were, as the run was told."""
    root: str | None = None
    """Where the relative paths of a table started from, if not at the table."""
    columns: dict[str, ColumnMeta] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """`videos` and `clips`: found, encoded, skipped, failed."""
    statistics: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    """`column/bucket` (bucket `all` for every one) -> `mean` and `final` -> mean, std, count."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of this package and of what the numbers depend on."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        require_count(self.shard_rows, MAX_SHARD_ROWS, "shard_rows", least=1)
        must_hold(len(self.buckets) <= MAX_BUCKETS, "there are too many buckets.")
        must_hold(len(self.columns) <= MAX_COLUMNS, "there are too many columns.")
        for bucket in self.buckets:
            require_bucket(bucket)
        for column in self.columns:
            require_column(column)

    @classmethod
    def update(
        cls,
        files: Files,
        change: Callable[[Self | None], Self],
        nodes: Callable[[Self], Nodes] | None = None,
    ) -> Self:
        """Store what `change` makes of the stored description (None: there is none); return it.

        Both are asked again where another process has stored another one meanwhile. Without `nodes`
        a description that changes names none.
        """
        while True:
            stored, data = cls._read(files) if files.size(ROOT) is not None else (None, None)
            now = change(stored)
            if nodes is None and now == stored:
                return now
            new = now.to_json(None if nodes is None else nodes(now))
            if new == data or files.swap(ROOT, data, new):
                return now

    def to_json(self, nodes: Nodes | None = None) -> bytes:
        """Return the bytes of the root `zarr.json`.

        nodes: all groups and arrays below, by path, so that Zarr's readers need not look around.
        """
        described = asdict(self)
        for name, before in (("deinterlace", "none"), ("colours", "swscale")):
            if described[name] == before:  # as stores were written that do not know of it
                del described[name]
        for column in described["columns"].values():
            if column["weights"] is None:
                del column["weights"]
        attributes = {ATTRIBUTE: described, CHECKSUM: _checksum(described)}
        group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        if nodes is not None and self.format_version > 1:
            group |= consolidated(nodes)
        return json.dumps(group, indent=2, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def read(cls, files: Files) -> Self:
        """Read the description; raise StoreError if there is none, or it is of another version."""
        return cls._read(files)[0]

    @classmethod
    def _read(cls, files: Files) -> tuple[Self, bytes]:
        """Return it with the bytes that say so."""
        where = f"{files.url}/{ROOT}"
        try:
            data = files.read(ROOT)
            raw = parse_json(data)
        except FileNotFoundError as err:
            raise StoreError(
                f"{files.url} is not a latent store: it has no {ROOT}. Check the path."
            ) from err
        except NotADirectoryError as err:
            raise StoreError(f"{files.url} is a file, not a latent store. Check the path.") from err
        except ValueError as err:
            raise StoreError(f"{where} is not JSON ({err}). Restore it from a copy.") from err
        attributes = raw.get("attributes") if isinstance(raw, dict) else None
        described = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
        if not isinstance(attributes, dict) or not isinstance(described, dict):
            raise StoreError(
                f"{files.url} is a Zarr store, but not a latent store: {ROOT} has no attribute "
                f"{ATTRIBUTE!r}. Check the path."
            )
        if described.get("format_version") not in FORMAT_VERSIONS:
            raise StoreError(
                f"{where} has format {described.get('format_version')}; this version reads 1 and "
                f"{FORMAT_VERSION}. Install the version that wrote it, or encode again."
            )
        if attributes.get(CHECKSUM) != _checksum(described, where):
            raise StoreError(
                f"{where} does not match its own checksum: it was edited or damaged. "
                "Restore it from a copy."
            )
        try:
            return from_mapping(cls, described, where=where), data
        except (ConfigError, GeometryError) as err:
            raise StoreError(f"{where}: {str(err).removeprefix(where + ': ')}") from err


def consolidated(nodes: Nodes) -> dict[str, Any]:
    """Return what a group says of the nodes below it, as zarr-python writes and reads it."""
    inline = {"kind": "inline", "must_understand": False, "metadata": dict(nodes)}
    return {"consolidated_metadata": inline}


def _checksum(described: Mapping[str, Any], where: str = ROOT) -> int:
    try:
        return int(google_crc32c.value(compact_json(described)))
    except ValueError as err:  # half of a surrogate pair, which no UTF-8 can hold
        raise StoreError(f"{where} holds text that is not UTF-8. Restore it from a copy.") from err


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """List where two JSON-like values differ, one line each: `dtype is 'a' in the store, 'b' now`.

    Hashes are shortened to 12 digits.
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        lines = []
        for key in sorted({*ours, *theirs}):
            path = f"{name}.{key}" if name else str(key)
            lines += differences(ours.get(key), theirs.get(key), path)
        return lines
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        ours, theirs = list(ours), list(theirs)
    return (
        [] if ours == theirs else [f"{name} is {_short(theirs)} in the store, {_short(ours)} now"]
    )


def _short(value: Any) -> str:
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return repr(value[:12] if is_hash else value)


def column_differences(ours: ColumnMeta, theirs: ColumnMeta) -> list[str]:
    """List where a column of the store, `theirs`, is made differently; another model first."""
    lines = differences(ours.decisive(), theirs.decisive())
    implied = ("encoder is", "config.weights_sha256 is")
    if not any(line.startswith(implied[1]) for line in lines):
        return lines
    made, has = (
        f"{column.encoder} (weights sha256 {str(column.config.get('weights_sha256'))[:12]})"
        for column in (theirs, ours)
    )
    cause = f"the store was made with {made}, this run has {has}"
    return [cause, *(line for line in lines if not line.startswith(implied))]


def require_same(now: StoreMeta, stored: StoreMeta, where: str) -> None:
    """Refuse to add to a store what was made by other means, naming each difference.

    Columns that only one of the two has are no difference: columns are independent.
    """
    lines = []
    for name in ("container", "shard_rows", "buckets", "resize", "deinterlace", "colours"):
        lines += differences(getattr(now, name), getattr(stored, name), name)
    lines += differences(asdict(now.clip), asdict(stored.clip), "clip")
    for name in sorted(now.columns.keys() & stored.columns.keys()):
        ours, theirs = now.columns[name], stored.columns[name]
        if now.buckets != stored.buckets:  # said already; rows of other sizes follow from it
            ours = replace(ours, row_shapes=theirs.row_shapes)
        lines += [f"column {name}: {line}" for line in column_differences(ours, theirs)]
    if lines:
        lines.sort(key=lambda line: "(weights sha256 " not in line)  # the cause of other lines
        text = "; ".join(lines[:6])
        more = f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
        if any("precision.device" in line for line in lines):
            more += (
                ". Another kind of device rounds otherwise: go on with --device and the kind that "
                "the store was begun on"
            )
        raise StoreError(
            f"{where} was made differently: {text}{more}. "
            "Use the same settings, or write to a new store."
        )
