"""The JSON values in a file's bytes: one document, JSON Lines or objects one after another.

A top-level list counts as its elements. What cannot be read costs the line or the rest of the
file it stands in, and says why; the rest is kept.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from runner.chat.conversation import Rejected

MAX_DEPTH = 64
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_SURROGATE = re.compile("[\ud800-\udfff]")


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


class _Unreadable(ValueError):
    pass


def values(data: bytes) -> Iterator[Value | Broken]:
    """The values in `data` in order; `Broken` where there is none to be read."""
    if data.startswith(LFS_POINTER):
        yield Broken("is a Git LFS pointer, not the data itself; run `git lfs pull`")
        return
    try:
        text = _decoded(data)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield Broken(f"is not UTF-8 text: byte {error.start} in line {line} is not valid")
        return
    if not text.strip():
        yield Broken("is empty")
        return
    try:
        whole = _parsed(text)
    except _Unreadable as error:
        yield Broken(str(error))
        return
    except json.JSONDecodeError as error:
        yield from _several(text, error)
        return
    if whole == []:
        yield Broken("is an empty list")
    elif isinstance(whole, list):
        yield from (Value(value, index) for index, value in enumerate(whole))
    else:
        yield Value(whole, 0)


def _decoded(data: bytes) -> str:
    """UTF-8 with or without a byte order mark, or UTF-16 with one."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def _several(text: str, whole: json.JSONDecodeError) -> Iterator[Value | Broken]:
    """JSON Lines, where the first line is a value by itself; else values one after another."""
    lines = text.split("\n")  # on 0x0A alone: str.splitlines also cuts at U+2028
    first = next(number for number, line in enumerate(lines) if line.strip())
    try:
        _parsed(lines[first])
    except ValueError:
        yield from _concatenated(text, whole)
        return
    index = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield Value(_parsed(line), index, number)
            index += 1
        except json.JSONDecodeError as error:
            yield Broken(_syntax(error), number)
        except _Unreadable as error:
            yield Broken(str(error), number)


def _concatenated(text: str, whole: json.JSONDecodeError) -> Iterator[Value | Broken]:
    position, index = 0, 0
    while True:
        while position < len(text) and text[position].isspace():
            position += 1
        if position == len(text):
            return
        try:
            value, position = _decoder.raw_decode(text, position)
            _check(value)
        except json.JSONDecodeError as error:
            yield Broken(_syntax(error if index else whole), error.lineno)
            return
        except (ValueError, RecursionError) as error:
            yield Broken(_reason(error), text.count("\n", 0, position) + 1)
            return
        yield Value(value, index)
        index += 1


def _parsed(text: str) -> Any:
    try:
        value = _decoder.decode(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise _Unreadable(_reason(error)) from None
    _check(value)
    return value


def _check(value: Any) -> None:
    """Refuses what Python's parser lets through: depth, and halves of surrogate pairs."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if any(isinstance(child, str) and _SURROGATE.search(child) for child in level):
            raise _Unreadable("has half of a surrogate pair, which is no character")
        if not level:
            return
    raise _Unreadable(f"is nested more than {MAX_DEPTH} levels deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((most, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _Unreadable(f"has the key {reprlib.repr(most)} twice in one object")
    return found


def _reason(error: ValueError | RecursionError) -> str:
    """Why the parser stopped where the syntax was right."""
    if isinstance(error, _Unreadable):
        return str(error)
    if isinstance(error, RecursionError):
        return f"is nested more than {MAX_DEPTH} levels deep"
    return "has a number with too many digits"


def _constant(word: str) -> NoReturn:
    raise _Unreadable(f"has {word}, which is not JSON")


def _syntax(error: json.JSONDecodeError) -> str:
    return f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
