"""Self-Instruct seeds: `{"id", "instruction", "instances": [{"input", "output"}, …]}`.

Each instance is a conversation; those of one task are a group, so that split keeps them together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runner.chat.conversation import Content, Message
from runner.chat.formats import instruct, turns
from runner.chat.formats.reading import Options, Unreadable, list_of, object_of


def claims(record: Mapping[str, Any]) -> bool:
    return "instruction" in record and "instances" in record


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    instances = list_of(record["instances"], "instances")
    if not instances:
        raise Unreadable("instances has no example")
    name = record.get("id")
    group = str(name) if isinstance(name, str | int) else ""
    # All of them first: one that cannot be read costs the record, not what comes after it.
    found = [
        _messages(record["instruction"], object_of(raw, f"instance {index}"), index)
        for index, raw in enumerate(instances)
    ]
    for said in found:
        yield Content(said, group=group, metadata=turns.metadata(record, "name"))


def _messages(instruction: object, instance: Mapping[str, Any], index: int) -> tuple[Message, ...]:
    example = {**instance, "instruction": instruction}
    try:
        answer = instruct.wanted(example, "output")
        return (*instruct.asked(example), Message("assistant", answer))
    except Unreadable as error:
        raise Unreadable(f"instance {index}: {error}") from None
