"""What is in one source file: conversations, documents, and records that could not be read.

The kind of file is told by its first bytes: an archive, parquet, or JSON. Only plain text has no
sign of its own and goes by the ending of its name, as do pictures and the like, which are no data.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import BinaryIO

from runner.chat import archive, formats, parquet
from runner.chat.conversation import Conversation, Rejected, Source
from runner.chat.formats import UNKNOWN, documents
from runner.chat.formats.reading import Options
from runner.chat.json_values import values
from runner.chat.text_window import Unreadable

TEXT_ENDINGS = (".txt", ".md", ".markdown")
OTHER_ENDINGS = (
    *(".bmp", ".gif", ".heic", ".ico", ".jpeg", ".jpg", ".png", ".svg", ".tgs", ".tif", ".tiff"),
    *(".aac", ".m4a", ".mp3", ".mpga", ".ogg", ".opus", ".wav", ".webp"),
    *(".avi", ".mkv", ".mov", ".mp4", ".webm"),
    *(".css", ".htm", ".html", ".js"),
)
"""What lies beside chats in exports, and is passed over."""
TABLE_ENDINGS = (".csv", ".tsv", ".xls", ".xlsx")


def read(
    name: str, data: BinaryIO | bytes, format: str = "auto", options: Options | None = None
) -> Iterator[Conversation | Rejected]:
    """Every conversation and document in a file, in order; `name` is what records call it."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    begin = file.read(4)
    file.seek(0)
    options = options or Options()
    if begin.startswith(archive.MAGIC) and _ending(name) not in TABLE_ENDINGS:
        yield from _members(name, file, format, options)
    else:
        yield from _file(name, file, begin, format, options)


def _members(
    name: str, file: BinaryIO, format: str, options: Options
) -> Iterator[Conversation | Rejected]:
    """What is in an archive. An export has other lists beside its chats, of users or projects:
    records of no known shape are reported, but are not bad here.
    """
    for member in archive.members(file):
        inside = f"{name}/{member.name}" if member.name else name
        if isinstance(member, archive.Refused):
            yield Rejected(inside, member.reason, understood=member.passed_over)
            continue
        try:
            with member.open() as opened:
                for found in _file(inside, opened, b"", format, options):
                    if isinstance(found, Rejected) and found.reason.startswith(UNKNOWN):
                        yield replace(found, understood=True)
                    else:
                        yield found
        except Unreadable as error:
            yield Rejected(inside, str(error))


def _file(
    name: str, file: BinaryIO, begin: bytes, format: str, options: Options
) -> Iterator[Conversation | Rejected]:
    ending = _ending(name)
    if begin.startswith(parquet.MAGIC) or ending == ".parquet":
        yield from _rows(name, file, format, options)
    elif ending in TEXT_ENDINGS:
        found = documents.document(file.read())
        if isinstance(found, str):
            yield Rejected(name, found)
        else:
            yield Conversation(Source(name, "documents", 0), found)
    elif ending in OTHER_ENDINGS:
        yield Rejected(name, f"is passed over: {ending} files are no chats", understood=True)
    elif ending in TABLE_ENDINGS:
        yield Rejected(name, "is a table; save it as JSON Lines or Parquet")
    else:
        yield from formats.read(name, values(file), format, options)


def _rows(
    name: str, file: BinaryIO, format: str, options: Options
) -> Iterator[Conversation | Rejected]:
    wanted = options.text_column if options.text_column != Options().text_column else None
    try:
        rows = parquet.rows(file, wanted)
        # The table's text column has been called `text` by now.
        plain = replace(options, text_column=Options().text_column)
        yield from formats.read(name, rows, "documents" if wanted else format, plain)
    except parquet.UnknownColumns as error:
        yield Rejected(name, f"{error.message}; {error.hint}")


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
