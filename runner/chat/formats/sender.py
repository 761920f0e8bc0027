"""One chat a file: a list of messages with `sender` and `userInput` or `claudeOutputText`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.chat.conversation import ROLE_WORDS, Content, Message
from runner.chat.formats.reading import Options, Unreadable, text_of
from runner.chat.json_parser import quoted
from runner.chat.json_values import Value

TEXT_KEYS = {"user": "userInput", "assistant": "claudeOutputText"}


def claims(record: Mapping[str, Any]) -> bool:
    return "sender" in record and ("userInput" in record or "claudeOutputText" in record)


def whole(records: Sequence[Value], options: Options) -> Iterator[tuple[Value, Content | str]]:
    said: list[Message] = []
    for item in records:
        try:
            said.append(_message(item.value))
        except Unreadable as error:
            yield item, str(error)
    if said:
        yield records[0], Content(tuple(said))


def _message(record: Mapping[str, Any]) -> Message:
    sender = record["sender"]
    role = ROLE_WORDS.get(sender.lower()) if isinstance(sender, str) else None
    if role not in ("user", "assistant"):
        raise Unreadable(f"sender is {quoted(sender)}; it must be 'User' or 'Claude'")
    # Both keys may be present, the other one empty; an absent or null text is an empty one.
    return Message(role, text_of(record.get(TEXT_KEYS[role]), TEXT_KEYS[role]))
