"""Instruction data: `{"instruction", "output"}`, `input` joined to the instruction.

Alpaca's `system` and `history` (`[[question, answer], …]`, whose answers are learned) come before.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from runner.chat.conversation import Conversation, Message, Rejected, Source, tidy
from runner.chat.json_values import Value


def claims(record: Mapping[str, Any]) -> bool:
    return "instruction" in record and "output" in record


def read(path: str, records: Iterable[Value]) -> Iterator[Conversation | Rejected]:
    for item in records:
        try:
            said = tidy(_messages(item.value))
        except _Unreadable as error:
            yield item.rejected(path, str(error))
        else:
            yield Conversation(Source(path, "instruct", item.index), said)


class _Unreadable(Exception):
    pass


def _messages(record: Mapping[str, Any]) -> Iterator[Message]:
    for name in ("instruction", "output"):
        if not (isinstance(record[name], str) and record[name].strip()):
            raise _Unreadable(f"{name} must be a text that is not empty")
    for name in ("system", "input"):
        if not isinstance(record.get(name), str | None):
            raise _Unreadable(f"{name} must be a text, not {reprlib.repr(record[name])}")
    yield Message("system", record.get("system") or "")
    for turn in record.get("history") or []:
        if not (isinstance(turn, list) and [type(text) for text in turn] == [str, str]):
            raise _Unreadable("history must be a list of [question, answer]")
        yield Message("user", turn[0])
        yield Message("assistant", turn[1])
    more = record.get("input") or ""
    asked = f"{record['instruction']}\n\n{more}" if more.strip() else record["instruction"]
    yield Message("user", asked)
    yield Message("assistant", record["output"])
