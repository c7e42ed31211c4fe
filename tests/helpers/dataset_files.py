"""The same records as a file of every kind."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Records = list[dict[str, Any]]


def json_list(records: Records) -> bytes:
    return json.dumps(records).encode()


def json_lines(records: Records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def objects_in_a_row(records: Records) -> bytes:
    return "".join(json.dumps(record, indent=1) for record in records).encode()


def object_of_columns(records: Records) -> bytes:
    return json.dumps({key: [record[key] for record in records] for key in records[0]}).encode()


def table_of_text(records: Records, delimiter: str = ",", ends: str = "\r\n") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(records[0]), delimiter=delimiter, lineterminator=ends)
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().encode()


def parquet(records: Records, **options: Any) -> bytes:
    pq.write_table(pa.Table.from_pylist(records), out := io.BytesIO(), **options)
    return out.getvalue()


def arrow_file(records: Records, compression: str | None = None, batch: int = 2) -> bytes:
    table, options = pa.Table.from_pylist(records), pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(out := io.BytesIO(), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch)
    return out.getvalue()


def arrow_stream(records: Records, batch: int = 2) -> bytes:
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_stream(out := io.BytesIO(), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return out.getvalue()


def zst(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


KINDS: dict[str, Callable[[Records], bytes]] = {
    "list.json": json_list,
    "lines.jsonl": json_lines,
    "lines.NDJSON": json_lines,
    "row.json": objects_in_a_row,
    "row.jsonl": objects_in_a_row,
    "columns.json": object_of_columns,
    "wrapped.json": lambda records: json.dumps({"version": {"n": 1}, "rows": records}).encode(),
    "list.json.gz": lambda records: gzip.compress(json_list(records)),
    "lines.JSONL.GZ": lambda records: gzip.compress(json_lines(records)),
    "lines.jsonl.zst": lambda records: zst(json_lines(records)),
    "columns.json.zst": lambda records: zst(object_of_columns(records)),
    "comma.csv": table_of_text,
    "comma.csv.gz": lambda records: gzip.compress(table_of_text(records)),
    "semicolon.csv": lambda records: b"\xef\xbb\xbf" + table_of_text(records, ";"),
    "tab.TSV": lambda records: table_of_text(records, "\t", "\n"),
    "rows.parquet": parquet,
    "groups.PARQUET": lambda records: parquet(records, row_group_size=1, compression="zstd"),
    "file.arrow": arrow_file,
    "stream.arrow": arrow_stream,
    "lz4.feather": lambda records: arrow_file(records, "lz4"),
    "zstd.Feather": lambda records: arrow_file(records, "zstd"),
}
"""By the file's name, what it holds."""
