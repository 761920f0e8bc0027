"""OpenAI's shape: `{"messages": [{"role", "content"}, …]}`, one conversation a record."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from runner.chat.conversation import ROLE_WORDS, Conversation, Message, Rejected, Source, tidy
from runner.chat.json_values import Value


def claims(record: Mapping[str, Any]) -> bool:
    messages = record.get("messages")
    # Preference data and tree exports carry a `messages` list too, and mean something else by it.
    others = {"chosen", "rejected", "label", "history"}
    return isinstance(messages, list) and not others & record.keys() and "role" in _first(messages)


def read(path: str, records: Iterable[Value]) -> Iterator[Conversation | Rejected]:
    for item in records:
        try:
            said = tidy(_message(n, raw) for n, raw in enumerate(item.value["messages"]))
        except _Unreadable as error:
            yield item.rejected(path, str(error))
            continue
        if said:
            yield Conversation(Source(path, "messages", item.index), said)
        else:
            yield item.rejected(path, "every message is empty")


class _Unreadable(Exception):
    pass


def _first(messages: list[object]) -> Mapping[str, object]:
    return messages[0] if messages and isinstance(messages[0], dict) else {}


def _message(index: int, raw: object) -> Message:
    if not isinstance(raw, dict):
        raise _Unreadable(f"message {index} must be an object with role and content")
    word, content = raw.get("role"), raw.get("content")
    role = ROLE_WORDS.get(word.lower()) if isinstance(word, str) else None
    if role is None:
        raise _Unreadable(
            f"message {index} has role {reprlib.repr(word)}; "
            "roles are system, user, assistant, tool"
        )
    if content is None:
        return Message(role, "")
    if isinstance(content, list):
        parts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
        content = "\n\n".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str):
        raise _Unreadable(f"message {index} has content that is neither a text nor a list of parts")
    return Message(role, content, learned=raw.get("weight") != 0 and raw.get("train") is not False)
