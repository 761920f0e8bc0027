"""Instruction data: `{"instruction", "output"}`, `input` joined to the instruction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from runner.chat.conversation import Conversation, Message, Rejected, Source
from runner.chat.json_values import Value


def claims(record: Mapping[str, Any]) -> bool:
    return "instruction" in record and "output" in record


def read(path: str, records: Iterable[Value]) -> Iterator[Conversation | Rejected]:
    for item in records:
        instruction, output = item.value["instruction"], item.value["output"]
        more = item.value.get("input")
        if not (isinstance(instruction, str) and instruction.strip()):
            yield item.rejected(path, "instruction must be a text that is not empty")
        elif not (isinstance(output, str) and output.strip()):
            yield item.rejected(path, "output must be a text that is not empty")
        elif not (more is None or isinstance(more, str)):
            yield item.rejected(path, f"input must be a text, not {more!r}")
        else:
            asked = f"{instruction}\n\n{more}" if more and more.strip() else instruction
            said = (Message("user", asked), Message("assistant", output))
            yield Conversation(Source(path, "instruct", item.index), said)
