"""The JSON values in a file's bytes: one document, JSON Lines or values one after another.

A top-level list counts as its elements. What cannot be read costs the line or the element it
stands in where the end of that can be found, else the rest of the file, and says why.

Only a window of the file is in memory, so that exports larger than memory can be read. The price:
values in front of damage have been handed out by the time the damage is found.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from runner.chat import json_parser
from runner.chat.conversation import Rejected
from runner.chat.json_parser import Refused
from runner.chat.text_window import CHUNK_BYTES, Unreadable, Window, length

MAX_RECORD_CHARACTERS = 2**26
"""No line, no element of a list and no other value may be longer."""
MAX_RECORD_PARTS = 4_000_000
"""No value may have more lists, objects and elements: each takes memory, up to 200 bytes."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_LOOK_CHARACTERS = 2**22
"""How far to look ahead to tell JSON Lines from values of several lines."""
_OTHER_FILES = {
    b"PK\x03\x04": "is a ZIP archive or an Office document, not JSON",
    b"\x1f\x8b": "is a gzip file; unpack it",
    b"\x28\xb5\x2f\xfd": "is a Zstandard file; unpack it",
    b"7z\xbc\xaf\x27\x1c": "is a 7-Zip archive; unpack it",
    b"PAR1": "is a Parquet file, not JSON",
    b"%PDF-": "is a PDF file; save its text",
    b"SQLite format 3\x00": "is an SQLite database, not JSON",
    codecs.BOM_UTF32_LE: "is UTF-32 text; save it as UTF-8",
    codecs.BOM_UTF32_BE: "is UTF-32 text; save it as UTF-8",
    LFS_POINTER: "is a Git LFS pointer, not the data itself; run `git lfs pull`",
}
_UTF16_WITHOUT_MARK = (b"{\x00", b"[\x00", b"\x00{", b"\x00[")
_BLANK = re.compile(r"\s*")
_JSON_BLANK = re.compile(r"[ \t\n\r]*")
_BLANK_IN_LINE = re.compile(r"[ \t\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_LOST = "; the rest of the file is lost"


@dataclass(frozen=True)
class Value:
    """One JSON value, with its place: the index in the file's list, and the line in JSON Lines."""

    value: Any
    index: int
    line: int | None = None

    def rejected(self, path: str, reason: str) -> Rejected:
        return Rejected(path, reason, index=self.index, line=self.line)


@dataclass(frozen=True)
class Broken:
    """Bytes that are no JSON value: why, and the line they start in; no line for a whole file."""

    reason: str
    line: int | None = None
    understood: bool = False
    """Nothing is wrong: there is only nothing in it."""


def values(
    file: BinaryIO | bytes,
    *,
    _chunk_bytes: int = CHUNK_BYTES,
    _max_characters: int = MAX_RECORD_CHARACTERS,
    _max_parts: int = MAX_RECORD_PARTS,
) -> Iterator[Value | Broken]:
    """The values in a file in order; `Broken` where there is none to be read.

    The file is read once, from where it stands, and need not be seekable. An `Unreadable` raised
    by its `read` becomes the last `Broken`; other errors of `read` go up.
    """
    opened = io.BytesIO(file) if isinstance(file, bytes) else file
    window = Window(opened, _chunk_bytes, _max_characters, _max_parts)
    try:
        yield from _file(window)
    except Unreadable as error:
        yield Broken(str(error), window.line() if window.begun else None)


def _file(window: Window) -> Iterator[Value | Broken]:
    head = window.open()
    kinds = (reason for magic, reason in _OTHER_FILES.items() if head.startswith(magic))
    if reason := next(kinds, None):
        yield Broken(reason)
    elif head.startswith(_UTF16_WITHOUT_MARK):
        yield Broken("is UTF-16 text without a byte order mark; save it as UTF-8")
    elif not (opener := window.skip(_BLANK)):
        yield Broken("is empty")
    elif opener == "[":
        yield from _lines(window, 0) if _each_line_is_a_list(window) else _several(window, 0)
    else:
        yield from _lines_or_several(window)


def _lines_or_several(window: Window) -> Iterator[Value | Broken]:
    """JSON Lines, where the first value has its line for itself; else values one after another."""
    line = window.line()
    first: Value | Broken
    found = True
    try:
        first = Value(json_parser.value(window), 0)
    except Refused as refused:
        if refused.at is not None and _first_line_is_damaged(window, refused.at):
            yield from _lines(window, 0)
            return
        found = window.character() == "{" and json_parser.pass_over(window, in_list=False)
        first = Broken(f"{refused}{'' if found or refused.cut else _LOST}", line)
    in_one_line = window.line() == line and window.skip(_BLANK_IN_LINE) == "\n"
    if not found or not window.skip(_BLANK):
        yield first
        return
    index = 1 if isinstance(first, Value) else 0
    if in_one_line:
        yield replace(first, line=line)
        yield from _lines(window, index)
    else:
        yield first
        yield from _several(window, 1)


def _lines(window: Window, index: int) -> Iterator[Value | Broken]:
    while window.skip(_JSON_BLANK):
        number, column = window.place()
        try:
            line = _next_line(window)
            if line.strip():
                yield Value(json_parser.line_value(window, line, number, column), index, number)
                index += 1
        except Refused as refused:
            yield Broken(str(refused), number)


def _several(window: Window, index: int) -> Iterator[Value | Broken]:
    """Values one after another; a list counts as its elements."""
    while opener := window.skip(_BLANK):
        line = window.line()
        if opener == "[":
            was = index
            index, found = yield from _elements(window, index)
            if not found:
                return
            if was == index == 0 and not window.skip(_BLANK):
                yield Broken("is an empty list", understood=True)
            continue
        try:
            yield Value(json_parser.value(window), index)
        except Refused as refused:
            found = opener == "{" and json_parser.pass_over(window, in_list=False)
            yield Broken(f"{refused}{'' if found or refused.cut else _LOST}", line)
            if not found:
                return
        index += 1


def _elements(window: Window, index: int) -> Generator[Value | Broken, None, tuple[int, bool]]:
    """The elements of the list that starts here; gives the index after them, and if it ended."""
    opened = window.line()
    window.at += 1
    if window.skip(_JSON_BLANK) == "]":
        window.at += 1
        return index, True
    found = True
    while found:
        opener = window.skip(_JSON_BLANK)
        try:
            yield Value(json_parser.element(window), index)
        except Refused as refused:
            line = window.line()
            if opener == "]":
                yield Broken(
                    json_parser.not_json(window, json_parser.NOTHING_AFTER_COMMA, window.at), line
                )
                window.at += 1
                return index, True
            found = json_parser.pass_over(window, in_list=True) and _in_step(
                window, opener, refused
            )
            yield Broken(f"element {index} {refused}{'' if found or refused.cut else _LOST}", line)
        index += 1
        while found and not _pass_comma(window):
            end = window.character()
            if end == "]":
                window.at += 1
                return index, True
            line = window.line()
            if not end:
                yield Broken(f"is cut short: the list of line {opened} is not closed", line)
                return index, False
            reason = json_parser.not_json(window, "Expecting ',' delimiter", window.at)
            found = json_parser.pass_over(window, in_list=True)
            yield Broken(f"element {index} {reason}{'' if found else _LOST}", line)
            index += 1
    return index, False


def _pass_comma(window: Window) -> bool:
    """Passes over a comma and the blanks around it, where there is one."""
    match = _COMMA.match(window.text, window.at)
    if match is None:
        if window.skip(_JSON_BLANK) != ",":
            return False
        window.at += 1
        return True
    window.at = match.end()
    return True


def _in_step(window: Window, opener: str, refused: Refused) -> bool:
    """Whether the list goes on after wrong syntax as it was before: the same kind of element.

    Where a quotation mark is missing, what was passed over may end inside a string.
    """
    if refused.at is None or opener not in "[{" or window.text[window.at] == "]":
        return True
    while (after := _JSON_BLANK.match(window.text, window.at + 1)) and (
        after.end() == len(window.text)
    ):
        if not window.more():
            return False
    return after is not None and window.text[after.end()] == opener


def _next_line(window: Window) -> str:
    """What is left of the line, without its end; passes over it, too if it is too long."""
    searched = 0
    while (end := window.text.find("\n", window.at + searched)) < 0:
        searched = len(window.text) - window.at
        if searched > window.max_characters:
            window.at = len(window.text)
            while window.character() and (end := window.text.find("\n", window.at)) < 0:
                window.at = len(window.text)
            window.at = end + 1 if end >= 0 else window.at
            raise json_parser.too_long(window)
        if not window.more():
            end = len(window.text)
            break
    start, window.at = window.at, min(end + 1, len(window.text))
    if end - start > window.max_characters:
        raise json_parser.too_long(window)
    return window.text[start:end]


def _each_line_is_a_list(window: Window) -> bool:
    """Whether the list that starts here has its line for itself, and is not all there is."""
    lines = _lines_ahead(window, 2)
    return len(lines) == 2 and json_parser.is_json(lines[0])


def _first_line_is_damaged(window: Window, wrong: int) -> bool:
    """Whether the value that starts here is a broken line of JSON Lines.

    Its syntax is wrong at character `wrong`. An object in a line of its own can follow in a
    single document too, but not when the mistake is in the line before, nor can two of them.
    """
    first, *others = [*_lines_ahead(window, 3), "", "", ""][:3]
    are_objects = [line.lstrip().startswith("{") and json_parser.is_json(line) for line in others]
    return are_objects[0] and (wrong <= len(first) or are_objects[1])


def _lines_ahead(window: Window, count: int) -> list[str]:
    """The next lines that are not blank, as far as it is reasonable to look ahead."""
    while len(window.text) - window.at < _LOOK_CHARACTERS and window.more():
        pass
    end = window.at + _LOOK_CHARACTERS
    whole_file = window.ended and len(window.text) <= end
    lines: list[str] = []
    position = window.at
    while len(lines) < count and position < min(end, len(window.text)):
        position += length(_BLANK.match(window.text, position))
        line_end = window.text.find("\n", position, end)
        if line_end < 0 and not whole_file:
            break
        line = window.text[position : line_end if line_end >= 0 else len(window.text)]
        position += len(line) + 1
        if line:
            lines.append(line)
    return lines
