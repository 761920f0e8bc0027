"""Documents: JSON records `{"text": "…"}`, and whole files of plain text or Markdown.

The key that holds the text is `text_column`; what else a record has is kept as metadata. A text is
kept as it is, line ends too: making texts alike is not a reader's work.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from typing import Any

from runner.chat.conversation import Content
from runner.chat.formats.reading import Options, Unreadable
from runner.chat.json_values import LFS_POINTER

_MESSAGE_KEYS = {"role", "sender"}


def named(record: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """A record as `claims` wants it: the text under `text`, whatever its column is called."""
    if column == "text":
        return record
    beside = {name: value for name, value in record.items() if name not in ("text", column)}
    return {**beside, "text": record[column]} if column in record else beside


def claims(record: Mapping[str, Any]) -> bool:
    # Messages with a `text` beside them are claimed by both formats: only their owner knows which
    # of the two is meant.
    return "text" in record and not _MESSAGE_KEYS & record.keys()


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    name = options.text_column
    text = record[name]
    if not (isinstance(text, str) and text.strip()):
        raise Unreadable(f"{name} must be a text that is not empty")
    beside = {other: value for other, value in record.items() if other != name}
    yield Content(text=text, metadata=beside)


def document(data: bytes) -> Content | str:
    """The document that a text file is, or why it is none."""
    if data.startswith(LFS_POINTER):
        return "is a Git LFS pointer, not the data itself; run `git lfs pull`"
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if is_utf16 else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        wanted = "UTF-16, as its first bytes say" if is_utf16 else "UTF-8"
        return f"is not {wanted}: byte {error.start} does not fit; save it as UTF-8"
    if "\0" in text:
        return "is not a text: it has a zero byte"
    return Content(text=text) if text.strip() else "is empty"
