"""One chat a file: a list of messages with `sender` and `userInput` or `claudeOutputText`."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from runner.chat.conversation import ROLE_WORDS, Conversation, Message, Rejected, Source, tidy
from runner.chat.json_values import Value

TEXT_KEYS = {"user": "userInput", "assistant": "claudeOutputText"}


def claims(record: Mapping[str, Any]) -> bool:
    return "sender" in record and ("userInput" in record or "claudeOutputText" in record)


def read(path: str, records: Iterable[Value]) -> Iterator[Conversation | Rejected]:
    messages: list[Message] = []
    for item in records:
        sender = item.value["sender"]
        role = ROLE_WORDS.get(sender.lower()) if isinstance(sender, str) else None
        if role not in ("user", "assistant"):
            yield item.rejected(
                path, f"sender is {reprlib.repr(sender)}; it must be 'User' or 'Claude'"
            )
            continue
        # Both keys may be present, the other one empty; an absent or null text is an empty one.
        text = item.value.get(TEXT_KEYS[role])
        if text is None:
            text = ""
        if not isinstance(text, str):
            yield item.rejected(path, f"{TEXT_KEYS[role]} must be a text, not {reprlib.repr(text)}")
            continue
        messages.append(Message(role, text))
    said = tidy(messages)
    if said:
        yield Conversation(Source(path, "sender", 0), said)
    elif messages:
        yield Rejected(path, "every message is empty", index=0)
