"""What is in one source file: conversations, documents, and records that could not be read.

The kind of file is told by its first bytes: an archive, parquet, or JSON; only plain text has no
sign of its own and goes by the ending of its name, or by `format: documents`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO

from runner.chat import archive, formats, parquet
from runner.chat.conversation import Conversation, Rejected, Source
from runner.chat.formats import documents
from runner.chat.formats.reading import Options
from runner.chat.json_values import values
from runner.chat.text_window import Unreadable

TEXT_ENDINGS = (".txt", ".md", ".markdown")


def read(
    name: str, data: BinaryIO | bytes, format: str = "auto", options: Options | None = None
) -> Iterator[Conversation | Rejected]:
    """Every conversation and document in a file, in order; `name` is what records call it."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    begin = file.read(4)
    file.seek(0)
    options = options or Options()
    if begin.startswith(archive.MAGIC):
        yield from _members(name, file, format, options)
    else:
        yield from _file(name, file, begin, format, options)


def _members(
    name: str, file: BinaryIO, format: str, options: Options
) -> Iterator[Conversation | Rejected]:
    for member in archive.members(file):
        inside = f"{name}/{member.name}" if member.name else name
        if isinstance(member, archive.Refused):
            yield Rejected(inside, member.reason)
            continue
        try:
            with member.open() as opened:
                yield from _file(inside, opened, b"", format, options)
        except Unreadable as error:
            yield Rejected(inside, str(error))


def _rows(
    name: str, file: BinaryIO, format: str, options: Options
) -> Iterator[Conversation | Rejected]:
    wanted = options.text_column if options.text_column != Options().text_column else None
    try:
        rows = parquet.rows(file, wanted, name=name)
        # The table's text column has been called `text` by now.
        plain = replace(options, text_column=Options().text_column)
        yield from formats.read(name, rows, "documents" if wanted else format, plain)
    except parquet.UnknownColumns as error:
        yield Rejected(name, f"{error.message}; {error.hint}")


def _file(
    name: str, file: BinaryIO, begin: bytes, format: str, options: Options
) -> Iterator[Conversation | Rejected]:
    if begin.startswith(parquet.MAGIC) or name.lower().endswith(".parquet"):
        yield from _rows(name, file, format, options)
    elif name.lower().endswith(TEXT_ENDINGS):
        found = documents.document(file.read())
        if isinstance(found, str):
            yield Rejected(name, found)
        else:
            yield Conversation(Source(name, "documents", 0), found)
    else:
        yield from formats.read(name, values(file), format, options)
