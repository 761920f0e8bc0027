"""Lines that are as they were: what a stage found out about each, and what it made of it last time.

A stage that goes through conversations one by one keeps one index in the cache. It holds for each
line that was read a key, what was found out about it (as JSON), and which stretch of the output was
made of it. A line with the same bytes needs no second look. Nothing is taken on trust: an index
that is damaged, or of other settings or versions, is none; a stretch must have the hash that it had
when it was written; and what is not known is found out anew, so that to delete it costs only time.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import blake2b, sha256
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from runner import disk

VERSION = 1
KEY_DIGITS = 32
READ_BYTES = 1 << 18
"""At once, of lines that are often longer than what Python reads at once by itself."""


def read(path: Path) -> Iterator[bytes]:
    """The lines of a file, with their ends."""
    with path.open("rb", buffering=READ_BYTES) as lines:
        yield from lines


def key_of(data: bytes) -> bytes:
    """A hash; in hexadecimal digits, as the index has it."""
    return blake2b(data, digest_size=KEY_DIGITS // 2).hexdigest().encode()


def identity(settings: Mapping[str, Any], version: int, libraries: Iterable[str]) -> bytes:
    """A hash of all that decides what is found out about a line: what is installed as well."""
    installed = {name: _version(name) for name in libraries}
    decides = [VERSION, settings, version, installed, platform.python_version()]
    return sha256(json.dumps(decides).encode()).hexdigest().encode()


def index_of(cache: Path, stage: str, name: str, recipe: str) -> Path:
    """One file for each stage of a recipe; the next index takes the place of the one before."""
    return cache / stage / f"{sha256(json.dumps([recipe, name]).encode()).hexdigest()[:32]}.index"


class Lines:
    """What is known of lines, and what is noted of them for the next time."""

    def __init__(
        self, identity: bytes, notes: BinaryIO, index: BinaryIO | None, output: BinaryIO | None
    ) -> None:
        self._notes = notes
        self._index = index
        self._output = output
        self._places = _places(index, identity) if index else {}
        self._digest = sha256(identity)

    def found(self, key: bytes) -> bytes | None:
        """What was found out about the line of this key, as JSON; None where it is not known."""
        row = self._row(key)
        return row[3] if row else None

    def made(self, key: bytes) -> bytes | None:
        """What was made of the line, from the last output; None where it is not there any more."""
        row = self._row(key)
        if not row or not self._output:
            return None
        start, size, check = int(row[0]), int(row[1]), row[2]
        self._output.seek(start)
        data = self._output.read(size)
        return data if key_of(data) == check else None

    def note(self, key: bytes, found: bytes, start: int = 0, made: bytes = b"") -> None:
        """Writes down what was found out, and that `made` stands at `start` of the new output."""
        row = b"%b %d %d %b %b\n" % (key, start, len(made), key_of(made), found)
        self._notes.write(row)
        self._digest.update(row)

    def end(self) -> None:
        """An index without this is not whole."""
        self._notes.write(self._digest.hexdigest().encode())

    def _row(self, key: bytes) -> list[bytes] | None:
        """Where it stands, how long it is and the hash of what was made; what was found out."""
        place = self._places.get(key)
        if place is None or not self._index:
            return None
        self._index.seek(place)
        return self._index.readline()[KEY_DIGITS + 1 : -1].split(b" ", 3)


@contextmanager
def lines(index: Path, identity: bytes, output: Path | None) -> Iterator[Lines]:
    """What is known, where there is a last `output`; what is noted takes its place at the end."""
    index.parent.mkdir(parents=True, exist_ok=True)
    with disk.being_written(index) as beside, ExitStack() as files:
        notes = files.enter_context(beside.open("wb"))
        before: list[BinaryIO | None] = [None, None]
        if output and output.is_file() and index.is_file():
            before = [files.enter_context(path.open("rb")) for path in (index, output)]
        found = Lines(identity, notes, *before)
        yield found
        found.end()


def _places(index: BinaryIO, identity: bytes) -> dict[bytes, int]:
    """key → where its row starts; none where the index is not whole or has another identity."""
    places: dict[bytes, int] = {}
    digest = sha256(identity)
    position = 0
    for row in index:
        if not row.endswith(b"\n"):
            return places if row == digest.hexdigest().encode() else {}
        places[row[:KEY_DIGITS]] = position
        digest.update(row)
        position += len(row)
    return {}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
