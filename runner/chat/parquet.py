"""The rows of a Parquet file as the records that chats and documents are read from.

Rows are read in batches of a few megabytes. pyarrow is imported when the first file is read; where
it is not installed, its ModuleNotFoundError goes up.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from runner.chat.json_parser import MAX_DEPTH
from runner.chat.json_values import Broken, Value
from runner.chat.text_window import Unreadable
from runner.errors import PreconditionError

MAGIC = b"PAR1"
CHAT_COLUMNS = frozenset(
    {
        "chat",
        "chat_messages",
        "chosen",
        "completion",
        "conversation",
        "conversations",
        "instances",
        "instruction",
        "mapping",
        "messages",
        "output",
        "prompt",
        "question",
        "rejected",
        "response",
        "responses",
        "sender",
    }
)
"""A table with one of these holds chats, whose format is told by the shape of its rows."""
MAX_COLUMNS = 10_000
MAX_UNSEEKABLE_BYTES = 2**30
"""A table inside an archive is held in memory, because its reader jumps about in it."""

_BATCH_BYTES = 4 * 2**20
_MAX_BATCH_ROWS = 1024
_BUFFER_BYTES = 2**16
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


class UnknownColumns(PreconditionError):
    """No column says what is to be read: the recipe has to name the one with the text."""

    def __init__(self, message: str, columns: Sequence[str], *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.columns = tuple(columns)


def rows(file: Path | BinaryIO, text_column: str | None = None) -> Iterator[Value | Broken]:
    """The rows in order, as plain data that JSON can hold; a damaged file ends in a `Broken`.

    With `text_column` a row is a document: `{"text": ...}` and its other columns, but for another
    one called text. Else the row is what it is, if it has a column `text` or one of a chat; if
    not, `UnknownColumns` is raised. Fields that are null are left
    out, because a table has every field in every row; `text` stays.
    """
    import pyarrow as pa

    if isinstance(file, Path):
        with file.open("rb") as opened:
            yield from rows(opened, text_column)
        return
    index = 0
    try:
        for batch in _batches(_seekable(file), text_column):
            for row in _plain_rows(batch, index):
                yield row if isinstance(row, Broken) else Value(row, index)
                index += 1
    except Unreadable as error:
        yield Broken(str(error))
    except (pa.ArrowException, OSError, MemoryError, UnicodeError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system, not about the bytes
        rest = f"; the rows from {index} on are lost" if index else ""
        yield Broken(f"is not a Parquet file that can be read: {_first_line(error)}{rest}")


def _seekable(file: BinaryIO) -> BinaryIO:
    if file.seekable():
        return file
    held = io.BytesIO()
    while data := file.read(2**20):
        held.write(data)
        if held.tell() > MAX_UNSEEKABLE_BYTES:
            raise Unreadable(
                f"is a table of more than {MAX_UNSEEKABLE_BYTES:,} bytes in an archive; unpack it"
            )
    return held


def _batches(file: BinaryIO, text_column: str | None) -> Iterator[Any]:
    """Record batches of the columns that count, the text called `text`."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(
        file,
        buffer_size=_BUFFER_BYTES,
        pre_buffer=False,
        page_checksum_verification=True,
        schema_depth_limit=MAX_DEPTH,
    )
    columns = table.schema_arrow.names
    if len(columns) > MAX_COLUMNS:
        raise Unreadable(f"has more than {MAX_COLUMNS:,} columns")
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        raise Unreadable(f"has the column {twice[0]!r} twice")
    columns = [column for column in columns if not _PANDAS_INDEX.fullmatch(column)]
    _check_columns(columns, text_column)
    if text_column:  # another column called text would be in its way
        columns = [text_column, *(c for c in columns if c not in (text_column, "text"))]
    for group in range(table.num_row_groups):
        metadata = table.metadata.row_group(group)
        row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
        size = min(_MAX_BATCH_ROWS, max(1, _BATCH_BYTES // row_bytes))
        for batch in table.iter_batches(
            size, row_groups=[group], columns=columns, use_threads=False
        ):
            ordered = batch.select(columns)
            yield ordered.rename_columns(["text", *columns[1:]]) if text_column else ordered


def _check_columns(columns: Sequence[str], text_column: str | None) -> None:
    listed = (", ".join(columns[:20]) + (", …" if len(columns) > 20 else "")) or "none"
    if text_column:
        if text_column not in columns:
            raise UnknownColumns(
                f"has no column {text_column!r}; its columns are {listed}",
                columns,
                hint="set `text_column:` to the one that holds the text",
            )
    elif "text" not in columns and not CHAT_COLUMNS.intersection(columns):
        raise UnknownColumns(
            f"has no column 'text' and none of a chat; its columns are {listed}",
            columns,
            hint="set `text_column:` to the one that holds the text",
        )


def _plain_rows(batch: Any, index: int) -> Iterator[dict[str, Any] | Broken]:
    batch = _with_python_times(batch)
    try:
        found = batch.to_pylist()
    except (ValueError, OverflowError):
        found = None  # one value spoils the batch: a text that is no UTF-8, the year 10000
    for place in range(batch.num_rows):
        try:
            row = found[place] if found is not None else batch.slice(place, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield Broken(f"row {index + place} has text that is not UTF-8")
        except (ValueError, OverflowError) as error:
            yield Broken(f"row {index + place} cannot be read: {_first_line(error)}")
        else:
            yield _plain(row) | ({"text": None} if row.get("text", "") is None else {})


def _with_python_times(batch: Any) -> Any:
    """Times in microseconds and in UTC, so that neither pandas nor a list of time zones counts."""
    import pyarrow as pa

    columns = []
    for column in batch.columns:
        wanted = _python_times(column.type)
        columns.append(column if wanted == column.type else column.cast(wanted, safe=False))
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _python_times(kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_timestamp(kind):
        return pa.timestamp("us" if kind.unit == "ns" else kind.unit, kind.tz and "UTC")
    if pa.types.is_duration(kind):
        return pa.duration("us" if kind.unit == "ns" else kind.unit)
    if pa.types.is_dictionary(kind):
        return kind if _python_times(kind.value_type) == kind.value_type else kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_python_times(field.type)) for field in kind.fields])
    if pa.types.is_map(kind):
        return pa.map_(_python_times(kind.key_type), _python_times(kind.item_type))
    for is_kind, make in (
        (pa.types.is_list, pa.list_),
        (pa.types.is_large_list, pa.large_list),
    ):
        if is_kind(kind):
            return make(kind.value_field.with_type(_python_times(kind.value_type)))
    return kind


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: times in ISO 8601, decimals as text, no NaN, no null field."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {
                str(key): plain
                for key, inner in value.items()
                if (plain := _plain(inner)) is not None
            }
        case list() if value and all(type(pair) is tuple for pair in value):  # a map
            keys = {key for key, _ in value if isinstance(key, str)}
            return _plain(dict(value)) if len(keys) == len(value) else [*map(_plain, value)]
        case list():
            return [*map(_plain, value)]
        case tuple() if len(value) == 2:
            return [*map(_plain, value)]
        case bytes():
            return _text(value)
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case _:
            return str(value)


def _text(data: bytes) -> str:
    """Text that an old writer stored as bytes; base64 if it is none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return base64.b64encode(data).decode()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c if c.isprintable() else "?" for c in lines[0][:200])
