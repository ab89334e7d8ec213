"""Parquet tables that somebody else has written, read within bounds."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MOST_BYTES, ROW_BYTES = 64 << 20, 8 << 10
"""What a table may unpack to: so many bytes, and so many more a row."""
ROWS_A_BYTE = 4
"""Rows that a byte of a file may hold at most; ids that differ take more than that."""


def bounded_table(data: bytes) -> pa.Table:
    """Return the table of a part; raise ValueError if it unpacks to more than its rows may be.

    Text is read as Parquet's dictionaries first: a text of a megabyte may stand in every row.
    """
    whole = pq.ParquetFile(pa.BufferReader(data))
    texts = [
        whole.schema.column(i).path
        for i in range(len(whole.schema))
        if whole.schema.column(i).physical_type == "BYTE_ARRAY"
    ]
    file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts)
    metadata = file.metadata
    rows, schema = metadata.num_rows, whole.schema_arrow
    require_few_rows(rows, len(data))
    left = MOST_BYTES + ROW_BYTES * rows
    require_bytes(sum(metadata.row_group(g).total_byte_size for g in groups_of(metadata)), left)
    tables = []
    for group in groups_of(metadata):
        table = file.read_row_group(group, use_threads=False)
        left -= sum(map(text_bytes, table.columns)) + table.nbytes
        require_bytes(0, left)
        tables.append(table.cast(schema))
    found: pa.Table = pa.concat_tables(tables) if tables else schema.empty_table()
    found.validate(full=True)
    return found


def groups_of(metadata: pq.FileMetaData) -> range:
    return range(metadata.num_row_groups)


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
