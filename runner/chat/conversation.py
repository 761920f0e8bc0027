"""A conversation: who said what, in order, and which file it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]

ROLE_WORDS: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "claude": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    learned: bool = True
    """False for a reply that carries no loss, because its source says so."""

    def record(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        return plain if self.learned else {**plain, "weight": 0}


@dataclass(frozen=True)
class Source:
    """Where a record stood: the file, the format it was read as, and its place in the file."""

    path: str
    format: str
    index: int


@dataclass(frozen=True)
class Conversation:
    source: Source
    messages: tuple[Message, ...]

    @property
    def content_hash(self) -> str:
        """16 hex digits that depend on roles and texts alone, so equal conversations share them."""
        parts = [[m.role, m.content, *([] if m.learned else [0])] for m in self.messages]
        said = json.dumps(parts, ensure_ascii=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def record(self, id: str) -> dict[str, Any]:
        return {
            "id": id,
            "source": {
                "path": self.source.path,
                "format": self.source.format,
                "index": self.source.index,
            },
            "messages": [message.record() for message in self.messages],
        }


@dataclass(frozen=True)
class Rejected:
    """A record, or with no place a whole file, that could not be read, and why."""

    path: str
    reason: str
    index: int | None = None
    line: int | None = None

    def record(self) -> dict[str, Any]:
        place: dict[str, Any] = {}
        if self.line is not None:
            place = {"line": self.line}
        elif self.index is not None:
            place = {"index": self.index}
        return {"path": self.path, **place, "reason": self.reason}


def tidy(messages: Iterable[Message]) -> tuple[Message, ...]:
    """Messages without empty ones; neighbours of one role become one, a blank line between."""
    kept: list[Message] = []
    for message in messages:
        if not message.content.strip():
            continue
        if kept and kept[-1].role == message.role:
            text = f"{kept[-1].content}\n\n{message.content}"
            kept[-1] = Message(message.role, text, kept[-1].learned and message.learned)
        else:
            kept.append(message)
    return tuple(kept)


def with_ids(conversations: Iterable[Conversation]) -> Iterable[tuple[str, Conversation]]:
    """Each conversation with its id: the content hash, and `~2`, `~3`, … for exact repeats.

    A repeat shares the hash before the `~`, by which `split` keeps repeats on one side.
    """
    seen: dict[str, int] = {}
    for conversation in conversations:
        content_hash = conversation.content_hash
        seen[content_hash] = count = seen.get(content_hash, 0) + 1
        yield content_hash if count == 1 else f"{content_hash}~{count}", conversation


def replies(messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """(user message, reply) as indices into `messages`, one for each reply that answers a user.

    What stands between the two (tool messages) belongs to the exchange. A leading assistant
    message answers nobody and a trailing user message has no answer: neither is in the list, nor is
    a reply with weight 0.
    """
    found: list[tuple[int, int]] = []
    asked: int | None = None
    for index, message in enumerate(messages):
        if message["role"] == "user":
            asked = index
        elif message["role"] == "assistant" and asked is not None:
            if message.get("weight") != 0:
                found.append((asked, index))
            asked = None
    return found
