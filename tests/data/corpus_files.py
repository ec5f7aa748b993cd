"""Write records as JSON, JSON lines, Parquet, and compressed."""

import gzip
import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

Fields = dict[str, Any]


def json_lines(records: Sequence[Fields], line_end: str = "\n", ascii_only: bool = False) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=ascii_only) + line_end for record in records).encode()


def json_array(records: Sequence[Fields], indent: int | None = None, ascii_only: bool = False) -> bytes:
    return json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode()


def parquet(records: Sequence[Fields], rows_per_group: int = 100, **columns: pa.DataType) -> bytes:
    names = dict.fromkeys(name for record in records for name in record)
    arrays = {name: pa.array([record.get(name) for record in records], columns.get(name)) for name in names}
    file = io.BytesIO()
    pq.write_table(pa.table(arrays), file, row_group_size=rows_per_group)
    return file.getvalue()


def compressed(data: bytes, ending: str, members: int = 1) -> bytes:
    """Return `data` as consecutive gzip members or Zstandard frames."""
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress, "": bytes}[ending]
    size = max(1, -(-len(data) // members))
    return b"".join(compress(data[start : start + size]) for start in range(0, len(data), size))
