"""Parquet tables that somebody else has written, read within bounds, a row group at a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

MOST_BYTES, ROW_BYTES = 64 << 20, 8 << 10
"""What a row group may unpack to: so many bytes, and so many more a row."""
SHOTS_TIMES = 4
"""So many times more a row where it has shots: 2,000 of them a video, on the average."""
ROWS_A_BYTE = 4
"""Rows that a byte of a file may hold at most; ids that differ take more than that."""


class BoundedParquet:
    """A Parquet file, by its bytes or its path; its tables are made when they are asked for.

    Raise ValueError for one that unpacks to more than its rows may be. Text is read as Parquet's
    dictionaries first: a text of a megabyte may stand in every row.
    """

    def __init__(self, data: bytes | Path) -> None:
        self._data = data
        with pq.ParquetFile(self._source()) as file:
            self.metadata: pq.FileMetaData = file.metadata
            self.schema: pa.Schema = file.schema_arrow
            columns = map(file.schema.column, range(len(file.schema)))
            self._texts = [c.path for c in columns if c.physical_type == "BYTE_ARRAY"]
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        require_few_rows(self.metadata.num_rows, size)
        has_shots = "shot_ends_s" in self.schema.names
        self._row_bytes = ROW_BYTES * (SHOTS_TIMES if has_shots else 1)

    def _source(self) -> str | pa.BufferReader:
        return str(self._data) if isinstance(self._data, Path) else pa.BufferReader(self._data)

    @cached_property
    def begins(self) -> NDArray[np.int64]:
        """The first row of each group, then how many rows there are."""
        groups = range(self.metadata.num_row_groups)
        rows = [self.metadata.row_group(g).num_rows for g in groups]
        return np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)

    def group(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a row group, or `columns` of it; raise KeyError if it lacks one."""
        names = list(self.schema.names if columns is None else columns)
        schema = pa.schema([self.schema.field(name) for name in names], self.schema.metadata)
        about = self.metadata.row_group(number)
        left = MOST_BYTES + self._row_bytes * about.num_rows
        require_bytes(about.total_byte_size, left)
        # A file of its own each time: threads may read at once.
        with pq.ParquetFile(
            self._source(), metadata=self.metadata, read_dictionary=self._texts
        ) as file:
            found = file.read_row_group(number, columns=columns, use_threads=False).select(names)
        require_bytes(sum(map(text_bytes, found.columns)) + found.nbytes, left)
        table: pa.Table = found.cast(schema)
        table.validate(full=True)
        return table

    def groups(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield all groups; raise ValueError where they come to more than all rows may be."""
        left = MOST_BYTES + self._row_bytes * self.metadata.num_rows
        for number in range(self.metadata.num_row_groups):
            require_bytes(self.metadata.row_group(number).total_byte_size, left)
            table = self.group(number, columns)
            left -= table.nbytes
            require_bytes(0, left)
            yield table

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        tables = list(self.groups(columns))
        return pa.concat_tables(tables) if tables else self.schema.empty_table()

    def groups_with(self, column: str, values: Sequence[str]) -> Iterator[int]:
        """Yield the groups whose statistics let one of `values`, which are sorted, be in a column
        of texts."""
        for number in range(self.metadata.num_row_groups):
            group = self.metadata.row_group(number)
            chunks = map(group.column, range(group.num_columns))
            said = next(c.statistics for c in chunks if c.path_in_schema == column)
            if said is None or not said.has_min_max:
                yield number
            elif (at := bisect_left(values, said.min)) < len(values) and values[at] <= said.max:
                yield number


def bounded_table(data: bytes) -> pa.Table:
    """Return a whole table; raise ValueError if it unpacks to more than its rows may be."""
    return BoundedParquet(data).table()


def require_few_rows(rows: int, file_bytes: int) -> None:
    if rows > file_bytes * ROWS_A_BYTE:
        raise ValueError(f"it says that it has {rows} rows in {file_bytes} bytes")


def require_bytes(needed: int, left: int) -> None:
    if needed > left:
        raise ValueError("it unpacks to more than a plan of its rows can be")


def text_bytes(column: pa.ChunkedArray | pa.Array) -> int:
    """Return the bytes of all texts of a column that was read as dictionaries."""
    if isinstance(column, pa.ChunkedArray):
        return sum(map(text_bytes, column.chunks))
    if pa.types.is_list(column.type):
        return text_bytes(column.flatten())
    if not pa.types.is_dictionary(column.type) or not len(column):
        return 0
    lengths = pc.binary_length(column.dictionary).cast(pa.int64())
    return pc.sum(pc.take(lengths, column.indices)).as_py() or 0
