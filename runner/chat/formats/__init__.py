"""The chat formats that `ingest` understands, told by a record's shape, never by file name.

A format is one module here and one line in `FORMATS`. It has two functions: `claims(record)` says
whether a record (one JSON object) has its shape; `read(path, records)` turns all records of one
file that it claimed into conversations and rejected records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.chat.conversation import Conversation, Rejected
from runner.chat.formats import instruct, messages, sender
from runner.chat.json_values import Broken, Value, values

Reader = Callable[[str, Iterable[Value]], Iterator[Conversation | Rejected]]


@dataclass(frozen=True)
class Format:
    claims: Callable[[Mapping[str, Any]], bool]
    read: Reader


FORMATS: dict[str, Format] = {
    "sender": Format(sender.claims, sender.read),
    "instruct": Format(instruct.claims, instruct.read),
    "messages": Format(messages.claims, messages.read),
}


def read_file(path: str, data: bytes, format: str) -> Iterator[Conversation | Rejected]:
    """Every conversation in one file, and every record that could not be read, with the reason.

    `format` is a name in `FORMATS`, or `auto` to tell it by shape.
    """
    claimed: dict[str, list[Value]] = {}
    for item in values(data):
        if isinstance(item, Broken):
            yield Rejected(path, item.reason, line=item.line)
            continue
        if not isinstance(item.value, dict):
            reason = f"a record must be a JSON object, this one is {_json_type(item.value)}"
            yield item.rejected(path, reason)
            continue
        fits = [name for name, known in FORMATS.items() if known.claims(item.value)]
        if format != "auto":
            fits = [format] if format in fits else []
        if len(fits) == 1:
            claimed.setdefault(fits[0], []).append(item)
        elif fits:
            yield item.rejected(path, f"fits {' and '.join(fits)}; say which with `format:`")
        else:
            keys = ", ".join(repr(key) for key in list(item.value)[:6]) or "none"
            wanted = "no known format" if format == "auto" else f"not in the format {format!r}"
            yield item.rejected(path, f"{wanted}; its keys are {keys}")
    for name, records in claimed.items():
        yield from FORMATS[name].read(path, records)


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {str: "a string", bool: "true or false", list: "a list", int: "a number"}
    return names.get(type(value), "a number")
