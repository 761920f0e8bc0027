"""`{"prompt", "completion"}` (or `response`): two texts, or lists of messages, as TRL has them.

Of messages, only those of the completion are learned: replies in the prompt carry no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from runner.chat.conversation import Content, Message
from runner.chat.formats import turns
from runner.chat.formats.instruct import wanted
from runner.chat.formats.reading import Options, Unreadable

_COMPLETIONS = ("completion", "response")


def claims(record: Mapping[str, Any]) -> bool:
    if "prompt" not in record or not any(name in record for name in _COMPLETIONS):
        return False
    return turns.label_name(record) is None


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    completion = next(name for name in _COMPLETIONS if name in record)
    asked, answered = _side(record, "prompt", "user"), _side(record, completion, "assistant")
    if answered[0].role != "assistant":
        raise Unreadable(f"{completion} begins with role {answered[0].role!r}, not 'assistant'")
    asked = tuple(replace(said, learned=said.role != "assistant") for said in asked)
    yield Content(
        (*turns.system(record), *asked, *answered),
        tools=turns.tools(record),
        metadata=turns.metadata(record),
    )


def _side(
    record: Mapping[str, Any], name: str, role: Literal["user", "assistant"]
) -> tuple[Message, ...]:
    if not isinstance(record[name], list):
        return (Message(role, wanted(record, name)),)
    found = turns.messages(record, name)
    if all(said.says_nothing for said in found):
        raise Unreadable(f"{name} has no message that says something")
    return found
