"""The part of a file's text that is in memory: decoded, with its lines and columns counted.

The encoding is told by the file's first bytes; what is no text does not stop the reading.
"""

from __future__ import annotations

import codecs
import re
from typing import BinaryIO

CHUNK_BYTES = 2**18
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character; in what a window decoded it stands for a byte that is no text."""


class Unreadable(Exception):
    """Raised by the `read` of a file whose bytes cannot be had, as in a damaged archive: why."""


class Window:
    """The part of a file's text that is in memory; what stands before `at` is done with.

    Reading on moves `at`, so a position in `text` lives no longer than to the next `more`.
    """

    def __init__(
        self, file: BinaryIO, chunk_bytes: int, max_characters: int, max_parts: int
    ) -> None:
        self.file = file
        self.chunk_bytes = chunk_bytes
        self.max_characters = max_characters
        """No line and no value may be longer."""
        self.max_parts = max_parts
        """No value may have more brackets that open, and commas."""
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
        self._dense: bool | None = None
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
        """Reads on, as much as is kept, but not far beyond the longest value; False at the end."""
        if self.ended:
            return False
        self.forget()
        room = max(0, self.max_characters - len(self.text))
        data = self._read(max(self.chunk_bytes, min(len(self.text), 2 * room)))
        self.ended = not data
        self.text += self._decoded(data)
        self._dense = None
        return True

    def place(self) -> tuple[int, int]:
        """The line and column of what comes next, both from 1."""
        return self.located(self.at)[1:]

    def line(self) -> int:
        return self.place()[0]

    def located(self, position: int) -> tuple[int, int, int]:
        """A position with its line and column, both from 1; counts on from the last one."""
        known, line, column = self._known if self._known[0] <= position else self._start
        if breaks := self.text.count("\n", known, position):
            line += breaks
            column = position - self.text.rfind("\n", known, position)
        else:
            column += position - known
        self._known = (position, line, column)
        return self._known

    def character(self) -> str:
        """The next character; empty at the end of the file."""
        while self.at == len(self.text):
            if not self.more():
                return ""
        return self.text[self.at]

    def skip(self, blank: re.Pattern[str]) -> str:
        """Passes over what is blank; the character after it, empty at the end of the file."""
        while True:
            self.at += length(blank.match(self.text, self.at))
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def not_text(self, wrong: str, line: int, column: int) -> str:
        place = f"at line {line}, column {column}"
        if self._utf16:
            return f"is not UTF-16 text: half a character {place}"
        return f"is not UTF-8 text: byte 0x{ord(wrong) - 0xDC00:02X} {place} is not valid"

    def is_dense(self) -> bool:
        """Whether the text has more brackets that open, and commas, than one value may have."""
        if self._dense is None:
            self._dense = sum(map(self.text.count, "[{,")) > self.max_parts
        return self._dense

    def forget(self) -> None:
        """Drops what is done with."""
        if self.at:
            _, line, column = self.located(self.at)
            self._start = self._known = (0, line, column)
            self.text = self.text[self.at :]
            self.at = 0

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
            self.undecodable = self.undecodable or SURROGATE.search(text) is not None
            return text
        try:
            text, used = codecs.utf_8_decode(data, "strict", self.ended)
        except UnicodeDecodeError:
            self.undecodable = True
            text, used = codecs.utf_8_decode(data, "surrogateescape", self.ended)
        self._undecoded = data[used:]
        return text


def length(match: re.Match[str] | None) -> int:
    """How far a pattern goes that is found everywhere, if only with nothing."""
    return len(match[0]) if match else 0
