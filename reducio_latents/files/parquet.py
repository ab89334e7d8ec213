"""Parquet tables, read whole and by the thread that asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(
    source: bytes | str | PathLike[str] | IO[Any], columns: Sequence[str] | None = None
) -> pa.Table:
    """Return the table of a file, or of its bytes; of it, `columns`, all of which must be there.

    `pyarrow.parquet.read_table` leaves its work to a pool of threads. One that still holds a Python
    buffer when the interpreter ends aborts the process ("terminate called without an active
    exception"), which short commands ran into every second time.

    Raises KeyError for a column that is not there, OSError or ArrowException for what cannot be
    read.
    """
    with pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source) as file:
        missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
        if missing:
            raise KeyError(f"no column {missing[0]}")
        return file.read(columns=columns, use_threads=False)
