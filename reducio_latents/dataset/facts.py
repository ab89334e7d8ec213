"""What is known of each clip, by name: by the plan, the corpus' table, `scores`, quality.parquet.

A name that two of them have is written with where it is from: `scores.motion`, `corpus.motion`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducio_latents.dataset.conditions import is_text
from reducio_latents.dataset.mapped import MappedColumn
from reducio_latents.dataset.reader import ColumnReader, Ints
from reducio_latents.dataset.zarr_rows import ZarrColumn
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.plan import CLIP_SCHEMA
from reducio_latents.store.plan.tables import SPAN_SCHEMA
from reducio_latents.store.reports import QUALITY, read_quality
from reducio_latents.store.row_kinds import ScoresRows

Home = Literal["plan", "corpus", "scores", "quality"]
log = logging.getLogger(__name__)

SCORES_COLUMN = "scores"
QUALITY_FACTS = ("psnr", "psnr_whole")
PLACE_FIELDS = ("bucket", "shard", "row", "status")
"""Columns of the plan that every table of facts has."""
CAPTIONS_FACT = "captions"
"""As a fact it is how many there are."""
SHOWN_NAMES = 30
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
ONE_COLUMN = (
    "name one or more of the store's, each once. What is known of clips may stand beside them, as "
    "clip_id, video, start_s."
)


class Fact(NamedTuple):
    """One thing that is known of clips."""

    home: Home
    name: str
    """Without its home."""


class NoSuchFactError(ConfigError):
    """A name that means nothing."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def store_facts(store: Store) -> list[Fact]:
    """Return all that can be known of the clips of a store."""
    own = {*CLIP_SCHEMA.names, *SPAN_SCHEMA.names}
    names = store.plan.clip_schema.names
    found = [Fact("plan" if name in own else "corpus", name) for name in names]
    found += [Fact("scores", name) for name in score_names(store)]
    return found + [Fact("quality", name) for name in QUALITY_FACTS]


def score_names(store: Store) -> tuple[str, ...]:
    """Return the names of the scores of a store, in the order of a row."""
    if SCORES_COLUMN not in store.meta.columns:
        return ()
    kind = store.kind(SCORES_COLUMN)
    return kind.names if isinstance(kind, ScoresRows) else ()


def find_fact(store: Store, name: str) -> Fact:
    """Return what a name means; raise ConfigError if it means nothing, or two things."""
    if name in CLIP_SCHEMA.names:  # without reading any plan
        return Fact("plan", name)
    facts = store_facts(store)
    meant = [fact for fact in facts if name in (fact.name, f"{fact.home}.{fact.name}")]
    if len(meant) == 1 or (meant and meant[0].home == "plan"):
        return meant[0]
    where = store.files.url
    if meant:
        choices = " or ".join(f"{fact.home}.{fact.name}" for fact in meant)
        raise ConfigError(f"{where} knows {len(meant)} things as {name!r}; write {choices}.")
    names = [name for fact in facts for name in (fact.name, f"{fact.home}.{fact.name}")]
    close = get_close_matches(name, names, n=1)
    shown = ", ".join([*_called(facts)][:SHOWN_NAMES])
    hint = f"did you mean {close[0]!r}?" if close else f"known are {shown}."
    if SCORES_COLUMN not in store.meta.columns:
        hint += f" It has no scores: `add-column {where} scores` makes them."
    raise NoSuchFactError(f"{where} knows nothing of its clips as {name!r}; {hint}", hint)


def _called(facts: Sequence[Fact]) -> dict[str, Fact]:
    """Return facts by a name that means nothing else."""
    names = [fact.name for fact in facts]
    taken = {*CLIP_SCHEMA.names, *(name for name in names if names.count(name) > 1)}
    plain = {fact: fact.home == "plan" or fact.name not in taken for fact in facts}
    return {fact.name if plain[fact] else f"{fact.home}.{fact.name}": fact for fact in facts}


def split_columns(store: Store, columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which of `columns` are the store's, and which are known of its clips otherwise."""
    stored = [name for name in columns if name in store.meta.columns]
    facts = [name for name in columns if name not in stored]
    try:
        homes = {find_fact(store, name).home for name in facts}
    except NoSuchFactError as err:
        try:
            store.require_columns(facts)
        except StoreError as missing:
            raise StoreError(f"{missing} Of its clips: {err.hint}") from err
        raise
    if not stored and SCORES_COLUMN not in homes:
        raise ConfigError(f"columns are {list(columns)}; {ONE_COLUMN}")
    return stored, facts


def clip_facts(store: Store, names: Iterable[str]) -> pa.Table:
    """Return, a row a clip in the order of the plan, `PLACE_FIELDS` and what `names` mean.

    What is not known is null. A clip that duplicates another has the scores of that one's row.
    """
    facts = {name: find_fact(store, name) for name in dict.fromkeys(names)}
    planned = [f.name for f in facts.values() if f.home in ("plan", "corpus")]
    if any(fact.home == "quality" for fact in facts.values()):
        planned.append("clip_id")
    clips = store.plan.clip_columns(dict.fromkeys([*PLACE_FIELDS, *planned]))
    scores = _scores(store, clips, {n: f for n, f in facts.items() if f.home == "scores"})
    columns = {name: clips[name] for name in PLACE_FIELDS}
    for name, fact in facts.items():
        if fact.home == "scores":
            columns[name] = pa.array(scores[name], from_pandas=True)
        elif fact.home == "quality":
            columns[name] = _quality(store, clips["clip_id"], fact.name)
        elif fact.name == CAPTIONS_FACT:
            columns[name] = pc.list_value_length(clips[fact.name])
        else:
            columns[name] = clips[fact.name]
    return pa.table(columns)


class FactSummary(NamedTuple):
    """What a fact is like over the clips that are planned."""

    known: int
    missing: int
    quantiles: list[float]
    """Of numbers, at QUANTILES."""
    texts: int
    """Texts that differ; 0 of numbers."""


def summarise_facts(store: Store) -> dict[str, FactSummary]:
    """Return how scores, PSNR and the columns of the corpus' table are spread, by name."""
    facts = [fact for fact in store_facts(store) if fact.home != "plan"]
    if store.files.size(QUALITY) is None:
        facts = [fact for fact in facts if fact.home != "quality"]
    found = {}
    called = _called(facts)
    scores = [name for name, fact in called.items() if fact.home == "scores"]
    for group in [scores, *([name] for name in called if name not in scores)]:
        try:
            table = clip_facts(store, group)
        except StoreError as err:  # the rest can still be told
            log.warning("%s cannot be read: %s", ", ".join(group), err)
            continue
        table = table.filter(pc.equal(table["status"], "planned"))
        for name in group:
            column = table[name].drop_null()
            is_number = not (is_text(column) or pa.types.is_list(column.type))
            values = column.cast(pa.float64()).to_numpy() if is_number else np.zeros(0)
            values = values[~np.isnan(values)]
            count = len(values) if is_number else len(column)
            if not count and called[name].home == "quality":  # nothing was encoded in tiles
                continue
            quantiles = np.quantile(values, QUANTILES).tolist() if len(values) else []
            texts = 0 if is_number else len(column.unique())
            found[name] = FactSummary(count, len(table) - count, quantiles, texts)
    return found


def shard_fact(store: Store, fact: Fact, bucket: str, shard: int) -> list[Any]:
    """Return a fact of plan or quality.parquet of each row of a shard; None where it is not known.

    Of a column with NaN, that is null too.
    """
    if fact.home == "quality":
        ids = store.plan.shard_clips(bucket, shard, ["clip_id"])["clip_id"]
        return list(_quality(store, ids, fact.name).to_pylist())
    clips = store.plan.shard_clips(bucket, shard, [fact.name])
    if fact.name not in clips.schema.names:  # a part whose corpus carried no such column
        return [None] * len(clips)
    column = clips[fact.name]
    column = pc.list_value_length(column) if fact.name == CAPTIONS_FACT else column
    return list(column.to_pylist())


def fact_types(store: Store, facts: Mapping[str, Fact]) -> dict[str, str]:
    """Return what values of each fact are: `text`, `bool`, `int64`, `float32` (scores), `float64`.

    Whole numbers and truth values of which some are missing are float64.
    """
    kinds = {}
    for name, fact in facts.items():
        if fact.home in ("scores", "quality"):
            kinds[name] = "float32" if fact.home == "scores" else "float64"
            continue
        schema = CLIP_SCHEMA if fact.name in CLIP_SCHEMA.names else store.plan.clip_schema
        kind = schema.field(fact.name).type
        is_bool, is_list = pa.types.is_boolean(kind), pa.types.is_list(kind)
        if is_bool or is_list or pa.types.is_integer(kind):
            whole = "bool" if is_bool else "int64"
            may_lack = schema.field(fact.name).nullable
            lacks = may_lack and store.plan.clip_columns([fact.name])[fact.name].null_count
            kinds[name] = "float64" if lacks else whole
        else:
            is_number = pa.types.is_floating(kind) or pa.types.is_null(kind)
            kinds[name] = "float64" if is_number else "text"
    return kinds


def batch_type(kinds: Sequence[str]) -> str:
    """Return what holds values of all of these kinds; texts and numbers are texts."""
    if len(set(kinds)) == 1:
        return kinds[0]
    return "text" if "text" in kinds else "float64"


def _quality(store: Store, clip_ids: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    table = read_quality(store.files, ["clip_id", name])
    if table is None:
        raise StoreError(
            f"{name} needs {store.files.url}/{QUALITY}, which does not exist. Encode with "
            f"--check-every 1, or leave {name} out."
        )
    values = table[name].combine_chunks()
    return values.take(pc.index_in(clip_ids, table["clip_id"].combine_chunks()))


def _scores(
    store: Store, clips: pa.Table, facts: Mapping[str, Fact]
) -> dict[str, NDArray[np.float32]]:
    """Return scores of all clips; NaN where there is none."""
    names = score_names(store)
    found = {name: np.full(len(clips), np.nan, np.float32) for name in facts}
    shards = store.index.shards([SCORES_COLUMN]) if facts else {}
    readers: dict[str, tuple[ColumnReader, list[int]]] = {}
    for key, places in by_shard(clips, np.ones(len(clips), np.bool_)):
        if key not in shards:
            continue
        if key.bucket not in readers:
            numbers = [shard for bucket, shard in shards if bucket == key.bucket]
            reader = open_column(store, SCORES_COLUMN, key.bucket, numbers, 1, check_rows=True)
            readers[key.bucket] = reader, numbers
        reader, numbers = readers[key.bucket]
        count, failed = shards[key]
        rows = clips["row"].take(places).to_numpy().astype(np.int64)
        good = ~np.isin(rows, list(failed)) & (rows < count)
        number = np.full(int(good.sum()), numbers.index(key.shard), np.int64)
        values = reader.arrays(number, rows[good]).numpy()
        for name, fact in facts.items():
            found[name][places[good]] = values[:, names.index(fact.name)]
    return found


def open_column(
    store: Store,
    column: str,
    bucket: str,
    shards: Sequence[int],
    capacity: int,
    *,
    check_rows: bool,
) -> ColumnReader:
    """Return the fastest reader that can read a column.

    At most `capacity` shards stay open. With `check_rows`, every row's checksum is proven.
    """
    if store.layout.lies_otherwise(store.files, store.meta, column, bucket):
        return ZarrColumn(store, column, bucket, shards, check_rows=check_rows)
    return MappedColumn(store, column, bucket, shards, capacity=capacity, check_rows=check_rows)


def by_shard(clips: pa.Table, chosen: NDArray[np.bool_]) -> Iterator[tuple[ShardKey, Ints]]:
    """Yield each shard and where in the table those of its clips are that are chosen, by row."""
    names = clips["bucket"].combine_chunks().dictionary_encode()
    bucket, shard, row = (
        names.indices.to_numpy(),
        clips["shard"].to_numpy(),
        clips["row"].to_numpy(),
    )
    places = np.flatnonzero(chosen)
    places = places[np.lexsort([row[places], shard[places], bucket[places]])]
    new = (np.diff(bucket[places]) != 0) | (np.diff(shard[places]) != 0)
    for part in np.split(places, np.flatnonzero(new) + 1):
        if len(part):
            name = names.dictionary[int(bucket[part[0]])].as_py()
            yield ShardKey(name, int(shard[part[0]])), part
