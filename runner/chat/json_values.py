"""The JSON values in a file's bytes: one document, JSON Lines or values one after another.

A top-level list counts as its elements. What cannot be read costs the line or the element it
stands in where the end of that can be found, else the rest of the file, and says why.

Only a window of the file is in memory, so that exports larger than memory can be read. The price:
values in front of damage have been handed out by the time the damage is found.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NoReturn

from runner.chat.conversation import Rejected

MAX_DEPTH = 64
MAX_RECORD_CHARACTERS = 2**28
"""No line, no element of a list and no other value may be longer."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_CHUNK_BYTES = 2**18
_LOOK_CHARACTERS = 2**22
"""How far to look ahead to tell JSON Lines from values of several lines."""
_SKIP_DEPTH = 10_000
_LONGEST_CUT = 16
"""The parser can stop this far before the cut: `-Infinit` and `\\ud83d\\ude0` are shorter."""

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

_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANK = re.compile(r"\s*")
_JSON_BLANK = re.compile(r"[ \t\n\r]*")
_BLANK_IN_LINE = re.compile(r"[ \t\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_MARK = re.compile(r'["\[\]{},]')
_NESTED_MARK = re.compile(r'["\[\]{}]')
_REST_OF_STRING = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_CLOSERS = {"[": "]", "{": "}"}
_NOTHING_AFTER_COMMA = "a comma with nothing after it"
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


class Unreadable(Exception):
    """Raised by the `read` of a file whose bytes cannot be had, as in a damaged archive: why."""


class _Refused(ValueError):
    """Why there is no value; `at` is where the syntax is wrong, counted from the value's start."""

    def __init__(self, reason: str, at: int | None = None, *, cut: bool = False) -> None:
        super().__init__(reason)
        self.at = at
        self.cut = cut


def values(
    file: BinaryIO | bytes,
    *,
    _chunk_bytes: int = _CHUNK_BYTES,
    _max_characters: int = MAX_RECORD_CHARACTERS,
) -> Iterator[Value | Broken]:
    """The values in a file in order; `Broken` where there is none to be read.

    The file is read once, from where it stands, and need not be seekable. An `Unreadable` raised
    by its `read` becomes the last `Broken`; other errors of `read` go up.
    """
    window = _Window(
        io.BytesIO(file) if isinstance(file, bytes) else file, _chunk_bytes, _max_characters
    )
    try:
        yield from _file(window)
    except Unreadable as error:
        yield Broken(str(error), window.line() if window.begun else None)


def _file(window: _Window) -> Iterator[Value | Broken]:
    head = window.open()
    kinds = (reason for magic, reason in _OTHER_FILES.items() if head.startswith(magic))
    if reason := next(kinds, None):
        yield Broken(reason)
    elif head.startswith(_UTF16_WITHOUT_MARK):
        yield Broken("is UTF-16 text without a byte order mark; save it as UTF-8")
    elif not (opener := window.skip(_BLANK)):
        yield Broken("is empty")
    elif opener == "[":
        yield from _lines(window, 0) if window.each_line_is_a_list() else _several(window, 0)
    else:
        yield from _lines_or_several(window)


def _lines_or_several(window: _Window) -> Iterator[Value | Broken]:
    """JSON Lines, where the first value has its line for itself; else values one after another."""
    line = window.line()
    first: Value | Broken
    found = True
    try:
        first = Value(window.value(), 0)
    except _Refused as refused:
        if refused.at is not None and window.first_line_is_damaged(refused.at):
            yield from _lines(window, 0)
            return
        found = window.character() == "{" and window.pass_over(in_list=False)
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


def _lines(window: _Window, index: int) -> Iterator[Value | Broken]:
    while window.skip(_JSON_BLANK):
        number, column = window.place()
        try:
            line = window.next_line()
            if line.strip():
                yield Value(_line_value(line, number, column, window), index, number)
                index += 1
        except _Refused as refused:
            yield Broken(str(refused), number)


def _line_value(line: str, number: int, column: int, window: _Window) -> Any:
    if window.undecodable and (wrong := _SURROGATE.search(line)):
        raise _Refused(window.not_text(wrong[0], number, column + wrong.start()))
    try:
        value = _decoder.decode(line)
    except json.JSONDecodeError as error:
        what = "the line ends inside a value" if _is_cut(error, line) else _mistake(error)
        raise _Refused(_not_json(what, number, column + error.pos)) from None
    except (ValueError, RecursionError) as error:
        raise _Refused(_reason(error)) from None
    _check(value, any(escape in line for escape in window.surrogate_escapes))
    return value


def _several(window: _Window, index: int) -> Iterator[Value | Broken]:
    """Values one after another; a list counts as its elements."""
    while opener := window.skip(_BLANK):
        line = window.line()
        if opener == "[":
            was = index
            index, found = yield from _elements(window, index)
            if not found:
                return
            if was == index == 0 and not window.skip(_BLANK):
                yield Broken("is an empty list")
            continue
        try:
            yield Value(window.value(), index)
        except _Refused as refused:
            found = opener == "{" and window.pass_over(in_list=False)
            yield Broken(f"{refused}{'' if found or refused.cut else _LOST}", line)
            if not found:
                return
        index += 1


def _elements(window: _Window, index: int) -> Generator[Value | Broken, None, tuple[int, bool]]:
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
            yield Value(window.element(), index)
        except _Refused as refused:
            line = window.line()
            if opener == "]":
                yield Broken(window.not_json(_NOTHING_AFTER_COMMA, window.at), line)
                window.at += 1
                return index, True
            found = window.pass_over(in_list=True) and window.in_step(opener, refused)
            yield Broken(f"element {index} {refused}{'' if found or refused.cut else _LOST}", line)
        index += 1
        while found and not window.pass_comma():
            end = window.character()
            if end == "]":
                window.at += 1
                return index, True
            line = window.line()
            if not end:
                yield Broken(f"is cut short: the list of line {opened} is not closed", line)
                return index, False
            reason = window.not_json("Expecting ',' delimiter", window.at)
            found = window.pass_over(in_list=True)
            yield Broken(f"element {index} {reason}{'' if found else _LOST}", line)
            index += 1
    return index, False


class _Window:
    """The part of a file's text that is in memory; what stands before `at` is done with.

    Reading on moves `at`, so a position in `text` lives no longer than to the next `more`.
    """

    def __init__(self, file: BinaryIO, chunk_bytes: int, max_characters: int) -> None:
        self.file = file
        self.chunk_bytes = chunk_bytes
        self.max_characters = max_characters
        self.text = ""
        self.at = 0
        self.begun = False
        self.ended = False
        self.undecodable = False
        """Whether bytes that are no text came by; each stands as a lone surrogate in `text`."""
        self.surrogate_escapes: tuple[str, ...] = ()
        """How escapes of surrogates, half or whole, are written in what came by."""
        self._utf16: codecs.IncrementalDecoder | None = None
        self._failure: Unreadable | None = None
        self._ahead = b""
        self._undecoded = b""
        self._last_bytes = b""
        self._start = (0, 1, 1)  # of `text`: position, line, column
        self._known = (0, 1, 1)  # a later position

    def open(self) -> bytes:
        """The first bytes; tells the encoding by them."""
        head = self._read(64)
        self._ahead = head
        if head.startswith(codecs.BOM_UTF8):
            self._ahead = head[len(codecs.BOM_UTF8) :]
        for mark, name in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
            if head.startswith(mark):
                self._utf16 = codecs.getincrementaldecoder(name)("surrogatepass")
                self._ahead = head[len(mark) :]
        self.begun = True
        return head

    def more(self) -> bool:
        """Reads on, at least as much as is kept; False at the end of the file."""
        if self.ended:
            return False
        self._forget()
        data = self._read(max(self.chunk_bytes, len(self.text)))
        self.ended = not data
        self.text += self._decoded(data)
        return True

    def _read(self, size: int) -> bytes:
        """`size` bytes, or what there is before the file ends or cannot be read on."""
        parts, self._ahead = [self._ahead[:size]], self._ahead[size:]
        size -= len(parts[0])
        while size > 0 and self._failure is None:
            try:
                data = self.file.read(size)
            except Unreadable as error:
                self._failure = error
                break
            if not data:
                break
            parts.append(data)
            size -= len(data)
        read = b"".join(parts)
        if self._failure and not read:
            raise self._failure
        return read

    def _forget(self) -> None:
        if self.at:
            _, line, column = self._located(self.at)
            self._start = self._known = (0, line, column)
            self.text = self.text[self.at :]
            self.at = 0

    def _decoded(self, data: bytes) -> str:
        seen = self._last_bytes + data
        self._last_bytes = seen[-2:]
        if self._utf16 or rb"\u" in seen:
            for escape in (r"\ud", r"\uD"):
                known = escape in self.surrogate_escapes
                if not known and (self._utf16 or escape.encode() in seen):
                    self.surrogate_escapes += (escape,)
        data = self._undecoded + data
        self._undecoded = b""
        if self._utf16:
            try:
                text = self._utf16.decode(data, self.ended)
            except UnicodeDecodeError:  # half a character at the end of the file
                text = "\udcff"
            self.undecodable = self.undecodable or _SURROGATE.search(text) is not None
            return text
        try:
            text, used = codecs.utf_8_decode(data, "strict", self.ended)
        except UnicodeDecodeError:
            self.undecodable = True
            text, used = codecs.utf_8_decode(data, "surrogateescape", self.ended)
        self._undecoded = data[used:]
        return text

    def _located(self, position: int) -> tuple[int, int, int]:
        """A position with its line and column, both from 1; counts on from the last one."""
        known, line, column = self._known if self._known[0] <= position else self._start
        if breaks := self.text.count("\n", known, position):
            line += breaks
            column = position - self.text.rfind("\n", known, position)
        else:
            column += position - known
        self._known = (position, line, column)
        return self._known

    def place(self) -> tuple[int, int]:
        """The line and column of what comes next, both from 1."""
        return self._located(self.at)[1:]

    def line(self) -> int:
        return self.place()[0]

    def character(self) -> str:
        """The next character; empty at the end of the file."""
        while self.at == len(self.text):
            if not self.more():
                return ""
        return self.text[self.at]

    def skip(self, blank: re.Pattern[str]) -> str:
        """Passes over what is blank; the character after it, empty at the end of the file."""
        while True:
            self.at += _length(blank.match(self.text, self.at))
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def pass_comma(self) -> bool:
        """Passes over a comma and the blanks around it, where there is one."""
        match = _COMMA.match(self.text, self.at)
        if match is None:
            if self.skip(_JSON_BLANK) != ",":
                return False
            self.at += 1
            return True
        self.at = match.end()
        return True

    def element(self) -> Any:
        """The list element that starts here; a number that the file's end could cut is none."""
        value = self.value()
        if self.text[self.at - 1] not in '}]"' and not self.character():
            raise _Refused(self.not_json("the file ends inside a value", self.at), cut=True)
        return value

    def value(self) -> Any:
        """The value that starts here; where it is refused, `at` stays."""
        while True:
            text, start = self.text, self.at
            try:
                value, end = _decoder.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                if len(text) - start > self.max_characters:
                    raise self._refused_within(start + self.max_characters) from None
                if not isinstance(error, json.JSONDecodeError):
                    raise _Refused(_reason(error)) from None
                if self.ended or not _may_be_cut(error, len(text)):
                    raise self._refused(error, cut=self.ended and _is_cut(error, text)) from None
            else:
                if end - start > self.max_characters:
                    raise self.too_long()
                if self.ended or text[end - 1] in '}]"' or end + _LONGEST_CUT <= len(text):
                    self._check(value, end)
                    self.at = end
                    return value
            self.more()

    def _refused_within(self, end: int) -> _Refused:
        """Why there is no value in the text up to `end`, the same however much is in memory."""
        try:
            _decoder.raw_decode(self.text[:end], self.at)
        except json.JSONDecodeError as error:
            if not _may_be_cut(error, end):
                return self._refused(error, cut=False)
        except (ValueError, RecursionError) as error:
            return _Refused(_reason(error))
        return self.too_long()

    def _refused(self, error: json.JSONDecodeError, *, cut: bool) -> _Refused:
        start = self.at
        if self.undecodable and (wrong := _SURROGATE.search(error.doc, start, error.pos + 1)):
            return _Refused(self._not_text(wrong), error.pos - start)
        what = "the file ends inside a value" if cut else _mistake(error, start)
        return _Refused(self.not_json(what, error.pos), error.pos - start, cut=cut)

    def _check(self, value: Any, end: int) -> None:
        if self.undecodable and (wrong := _SURROGATE.search(self.text, self.at, end)):
            raise _Refused(self._not_text(wrong))
        found = (self.text.find(escape, self.at, end) for escape in self.surrogate_escapes)
        _check(value, any(at >= 0 for at in found))

    def _not_text(self, wrong: re.Match[str]) -> str:
        return self.not_text(wrong[0], *self._located(wrong.start())[1:])

    def not_text(self, wrong: str, line: int, column: int) -> str:
        place = f"at line {line}, column {column}"
        if self._utf16:
            return f"is not UTF-16 text: half a character {place}"
        return f"is not UTF-8 text: byte 0x{ord(wrong) - 0xDC00:02X} {place} is not valid"

    def not_json(self, what: str, position: int) -> str:
        return _not_json(what, *self._located(position)[1:])

    def too_long(self) -> _Refused:
        return _Refused(f"is longer than {self.max_characters:,} characters")

    def pass_over(self, *, in_list: bool) -> bool:
        """Passes over the broken value that starts here, by its brackets and strings.

        In a list up to the comma or bracket behind it. False where its end cannot be told; the
        place is then of no use.
        """
        if self.at > _CHUNK_BYTES // 16:  # the parser counts lines from the start for each mistake
            self._forget()
        open_brackets: list[str] = []
        while self.character():
            marks = _NESTED_MARK if open_brackets else _MARK
            found = marks.search(self.text, self.at)
            if found is None:
                self.at = len(self.text)
                continue
            mark, self.at = found[0], found.end()
            if mark == '"':
                self._pass_string()
            elif mark in "[{":
                open_brackets.append("]" if mark == "[" else "}")
                if len(open_brackets) > _SKIP_DEPTH:
                    return False
            elif open_brackets:
                if open_brackets.pop() != mark:
                    return False
                if not open_brackets and not in_list:
                    return True
            else:
                self.at -= 1
                return in_list and mark in ",]"
        return False

    def _pass_string(self) -> None:
        while self.character():
            self.at += _length(_REST_OF_STRING.match(self.text, self.at))
            if self.at == len(self.text):
                continue
            escaped = self.text[self.at] == "\\"  # the character after it is not here yet
            if escaped and self.at + 1 == len(self.text) and not self.more():
                self.at += 1
            elif not escaped:
                self.at += 1
                return

    def in_step(self, opener: str, refused: _Refused) -> bool:
        """Whether the list goes on after wrong syntax as it was before: the same kind of element.

        Where a quotation mark is missing, what was passed over may end inside a string.
        """
        if refused.at is None or opener not in "[{" or self.text[self.at] == "]":
            return True
        while (after := _JSON_BLANK.match(self.text, self.at + 1)) and (
            after.end() == len(self.text)
        ):
            if not self.more():
                return False
        return after is not None and self.text[after.end()] == opener

    def next_line(self) -> str:
        """What is left of the line, without its end; passes over it, too if it is too long."""
        searched = 0
        while (end := self.text.find("\n", self.at + searched)) < 0:
            searched = len(self.text) - self.at
            if searched > self.max_characters:
                self.at = len(self.text)
                while self.character() and (end := self.text.find("\n", self.at)) < 0:
                    self.at = len(self.text)
                self.at = end + 1 if end >= 0 else self.at
                raise self.too_long()
            if not self.more():
                end = len(self.text)
                break
        start, self.at = self.at, min(end + 1, len(self.text))
        if end - start > self.max_characters:
            raise self.too_long()
        return self.text[start:end]

    def each_line_is_a_list(self) -> bool:
        """Whether the list that starts here has its line for itself, and is not all there is."""
        lines = self._lines_ahead(2)
        return len(lines) == 2 and _is_json(lines[0])

    def first_line_is_damaged(self, wrong: int) -> bool:
        """Whether the value that starts here is a broken line of JSON Lines.

        Its syntax is wrong at character `wrong`. An object in a line of its own can follow in a
        single document too, but not when the mistake is in the line before, nor can two of them.
        """
        first, *others = [*self._lines_ahead(3), "", "", ""][:3]
        are_objects = [line.lstrip().startswith("{") and _is_json(line) for line in others]
        return are_objects[0] and (wrong <= len(first) or are_objects[1])

    def _lines_ahead(self, count: int) -> list[str]:
        """The next lines that are not blank, as far as it is reasonable to look ahead."""
        while len(self.text) - self.at < _LOOK_CHARACTERS and self.more():
            pass
        end = self.at + _LOOK_CHARACTERS
        whole_file = self.ended and len(self.text) <= end
        lines: list[str] = []
        position = self.at
        while len(lines) < count and position < min(end, len(self.text)):
            position += _length(_BLANK.match(self.text, position))
            line_end = self.text.find("\n", position, end)
            if line_end < 0 and not whole_file:
                break
            line = self.text[position : line_end if line_end >= 0 else len(self.text)]
            position += len(line) + 1
            if line:
                lines.append(line)
        return lines


def _length(match: re.Match[str] | None) -> int:
    return len(match[0]) if match else 0


def _check(value: Any, escapes_surrogates: bool) -> None:
    """Refuses what Python's parser lets through: depth, and halves of surrogate pairs."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            break
    else:
        raise _Refused(f"is nested more than {MAX_DEPTH} levels deep")
    if escapes_surrogates and any(map(_SURROGATE.search, _texts(value))):
        raise _Refused("has half of a surrogate pair, which is no character")


def _texts(value: Any) -> Iterator[str]:
    """The strings in a value that are not ASCII, keys among them."""
    rest = [value]
    while rest:
        part = rest.pop()
        if isinstance(part, str):
            if not part.isascii():
                yield part
        elif isinstance(part, dict):
            rest.extend(part)
            rest.extend(part.values())
        elif isinstance(part, list):
            rest.extend(part)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((most, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _Refused(f"has the key {reprlib.repr(most)} twice in one object")
    return found


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _Refused(f"has the number {reprlib.repr(text)}, which is too large to keep")
    return number


def _constant(word: str) -> NoReturn:
    raise _Refused(f"has {word}, which is not JSON")


def _reason(error: ValueError | RecursionError) -> str:
    """Why the parser stopped where the syntax was right."""
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, RecursionError):
        return f"is nested more than {MAX_DEPTH} levels deep"
    return "has a number with too many digits"


def _may_be_cut(error: json.JSONDecodeError, end: int) -> bool:
    """Whether the mistake could come from the text's going on behind `end`."""
    return error.msg.startswith("Unterminated string") or error.pos + _LONGEST_CUT > end


def _is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the text ends where a value could still go on."""
    if error.msg.startswith("Unterminated string"):
        return True
    if error.pos + _LONGEST_CUT < len(text.rstrip()):
        return False
    rest = text[error.pos :].strip()
    return any(word.startswith(rest) for word in ("true", "false", "null"))


def _mistake(error: json.JSONDecodeError, start: int = 0) -> str:
    """What is wrong, in words; the value starts at `start`."""
    found = error.doc[error.pos : error.pos + 1]
    before = error.doc[max(start, error.pos - _CHUNK_BYTES) : error.pos].rstrip()
    if found == "\ufeff":
        return "a byte order mark inside the text"
    if found == "\0":
        return "a NUL byte"
    if error.msg.startswith("Invalid control character"):
        return f"a control character (U+{ord(found):04X}) in a string"
    if (found and found in "}]" and before.endswith(",")) or "trailing comma" in error.msg:
        return _NOTHING_AFTER_COMMA
    return error.msg.removesuffix(" at")


def _not_json(what: str, line: int, column: int) -> str:
    return f"is not valid JSON: {what} at line {line}, column {column}"


def _is_json(line: str) -> bool:
    """Whether the syntax is right, whatever else may be wrong with the value."""
    try:
        _lenient.decode(line)
    except json.JSONDecodeError:
        return False
    except RecursionError:
        return True
    return True


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
_lenient = json.JSONDecoder(parse_int=len)
