"""The rows of a Parquet file as the records that chats and documents are read from.

Rows are read in batches of some megabytes. A few bytes in a file can stand for very much text, so
what is read may be no more than a hundred times the file. pyarrow is imported when the first file
is read; where it is not installed, its ModuleNotFoundError goes up.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from runner.chat.json_parser import MAX_DEPTH, quoted
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

MAX_RATIO = 100
"""What is read to a file's bytes: a text that is stored once and used again and again is a bomb."""
FREE_BYTES = 64 * 2**20
"""What can be read of any file, however small."""

_BATCH_BYTES = 4 * 2**20
_MOST_BATCH_BYTES = 32 * 2**20
_COUNTED_BYTES = 64 * 2**20
"""Columns that are no larger are counted before they are read; others while they are read."""
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
        yield Broken(f"{error}{_lost(index)}")
    except (pa.ArrowException, OSError, MemoryError, UnicodeError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system, not about the bytes
        reason = f"is not a Parquet file that can be read: {_first_line(error)}"
        yield Broken(f"{reason}{_lost(index)}")


def _lost(index: int) -> str:
    return f"; the rows from {index} on are lost" if index else ""


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
        raise Unreadable(f"has the column {quoted(twice[0])} twice")
    columns = [column for column in columns if not _PANDAS_INDEX.fullmatch(column)]
    _check_columns(columns, text_column)
    if text_column:  # another column called text would be in its way
        columns = [text_column, *(c for c in columns if c not in (text_column, "text"))]
    most = max(FREE_BYTES, MAX_RATIO * file.seek(0, io.SEEK_END))
    read = 0
    is_sound = _is_sound(table)
    for group in range(table.num_row_groups):
        chunks = _chunks(table.metadata.row_group(group), columns) if is_sound else []
        repeated = {chunk.path_in_schema: _repeated_bytes(file, chunk) for chunk in chunks}
        _check_group(file, group, chunks, repeated, most - read)
        size = _batch_rows(table.metadata.row_group(group), chunks, repeated) if chunks else 1
        for batch in table.iter_batches(
            size, row_groups=[group], columns=columns, use_threads=False
        ):
            read += sum(map(_expanded_bytes, batch.columns))
            if read > most:
                raise _bomb()
            ordered = batch.select(columns)
            yield ordered.rename_columns(["text", *columns[1:]]) if text_column else ordered


def _bomb() -> Unreadable:
    return Unreadable(f"expands to more than {MAX_RATIO} times its size, as a bomb does")


def _is_sound(table: Any) -> bool:
    """Whether all can be read; of a damaged file pyarrow's words on its columns end the process."""
    import pyarrow as pa

    try:
        table.scan_contents(batch_size=2**16)
    except (pa.ArrowException, OSError, MemoryError, OverflowError):
        return False
    return True


def _chunks(group: Any, columns: Sequence[str]) -> list[Any]:
    """What a row group says of the columns that are read, and of all that lie inside of them."""
    every = map(group.column, range(group.num_columns))
    inside = tuple(f"{column}." for column in columns)
    return [
        chunk
        for chunk in every
        if chunk.path_in_schema in columns or chunk.path_in_schema.startswith(inside)
    ]


def _repeated_bytes(file: BinaryIO, chunk: Any) -> int:
    """The longest text that can stand in a column again and again, while it is stored once."""
    encodings = " ".join(chunk.encodings)
    if chunk.physical_type != "BYTE_ARRAY":
        return 0
    if "DELTA_BYTE_ARRAY" in encodings:  # the beginnings that texts share
        return int(max(0, chunk.total_uncompressed_size))
    if "DICTIONARY" not in encodings:
        return 0
    file.seek(max(0, chunk.dictionary_page_offset or chunk.data_page_offset))
    return _page_bytes(file.read(12)) or int(max(0, chunk.total_uncompressed_size))


def _page_bytes(head: bytes) -> int:
    """How much a dictionary page unpacks to by its header; 0 where that is no such header.

    Thrift's compact protocol: the page's type (2) and its size, both zigzag numbers.
    """
    if head[:3] != b"\x15\x04\x15":
        return 0
    number = 0
    for place, byte in enumerate(head[3:]):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number >> 1
    return 0


def _batch_rows(group: Any, chunks: Sequence[Any], repeated: Mapping[str, int]) -> int:
    """How many rows to read at once: few where each could be one of the longest texts."""
    rows = max(1, group.num_rows)
    usual: int = max(1, group.total_byte_size // rows)
    worst = sum(
        repeated[chunk.path_in_schema] * max(1, chunk.num_values // rows) for chunk in chunks
    )
    size = min(_MAX_BATCH_ROWS, _BATCH_BYTES // usual, _MOST_BATCH_BYTES // max(1, worst))
    return int(max(1, size))


def _check_group(
    file: BinaryIO, group: int, chunks: Sequence[Any], repeated: Mapping[str, int], room: int
) -> None:
    """Raises Unreadable where a row group is sure to expand to more than there is room for.

    One row can hold a list of any length, so this is counted without expanding it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if sum(4 * max(0, chunk.num_values) for chunk in chunks if "." in chunk.path_in_schema) > room:
        raise _bomb()
    for chunk in chunks:
        path = chunk.path_in_schema
        if repeated[path] * chunk.num_values <= room:
            continue
        if chunk.total_uncompressed_size > _COUNTED_BYTES:
            continue
        try:
            table = pq.ParquetFile(file, read_dictionary=[path], buffer_size=_BUFFER_BYTES)
            for batch in table.iter_batches(row_groups=[group], columns=[path], use_threads=False):
                room -= sum(map(_expanded_bytes, batch.columns))
                if room < 0:
                    raise _bomb()
        except (pa.ArrowException, OSError):
            continue  # damage is said where the rows are read


def _expanded_bytes(array: Any) -> int:
    """The bytes of the texts and numbers in an array, each as often as it stands there."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        if not len(array.dictionary):
            return 0
        try:
            lengths = pc.binary_length(array.dictionary)
        except pa.ArrowNotImplementedError:
            return int(array.nbytes)
        return int(pc.sum(lengths.take(array.indices).cast(pa.int64())).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(map(_expanded_bytes, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _expanded_bytes(array.flatten()) + 4 * len(array)
    return int(array.nbytes)


def _check_columns(columns: Sequence[str], text_column: str | None) -> None:
    listed = (
        ", ".join(quoted(column).replace("'", "") for column in columns[:20])
        + (", …" if len(columns) > 20 else "")
    ) or "none"
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
