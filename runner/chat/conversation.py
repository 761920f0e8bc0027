"""A conversation: who said what, in order, and which file it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]

ROLE_WORDS: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "me": "user",
    "prompter": "user",
    "assistant": "assistant",
    "claude": "assistant",
    "char": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
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
    thinking: str = ""
    """What the model thought before it answered; kept beside the text, not part of it."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """`{"name", "arguments"}` each; kept beside the text."""

    def record(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        if not self.learned:
            plain["weight"] = 0
        if self.thinking:
            plain["thinking"] = self.thinking
        if self.tool_calls:
            plain["tool_calls"] = [dict(call) for call in self.tool_calls]
        return plain

    @property
    def says_nothing(self) -> bool:
        return not (self.content.strip() or self.thinking.strip() or self.tool_calls)


@dataclass(frozen=True)
class Source:
    """Where a record stood: the file, the format it was read as, and its place in the file."""

    path: str
    format: str
    index: int


@dataclass(frozen=True)
class Content:
    """What a format reader finds: a conversation, a preference or a document, without its place.

    A preference is a prompt (`messages`) with a better and a worse reply, or a whole conversation
    with a `label`; a document has `text` and no messages.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    group: str = ""
    """What the branches of one conversation share, so that they are never split apart."""
    tools: tuple[Any, ...] = ()
    """Descriptions of the tools that could be called, as the source has them."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None

    def record(self) -> dict[str, Any]:
        """Plain data; parts that say nothing are left out."""
        plain: dict[str, Any] = {"text": self.text} if self.text else {}
        if not self.text:
            plain["messages"] = [message.record() for message in self.messages]
        for name in ("chosen", "rejected"):
            if said := getattr(self, name):
                plain[name] = [message.record() for message in said]
        if self.label is not None:
            plain["label"] = self.label
        if self.group:
            plain["group"] = self.group
        if self.tools:
            plain["tools"] = list(self.tools)
        if self.metadata:
            plain["metadata"] = dict(self.metadata)
        return plain


def content_hash(record: Mapping[str, Any]) -> str:
    """16 hex digits that depend on what is said alone, so equal conversations share them.

    `record` is what `Content.record` gives; its group, tools and metadata do not count.
    """
    if "text" in record:
        parts: list[Any] = ["text", record["text"]]
    else:
        parts = _said(record["messages"])
        for name in ("chosen", "rejected"):
            if name in record:
                parts.append([name, _said(record[name])])
        if "label" in record:
            parts.append(["label", record["label"]])
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:16]


def _said(messages: Iterable[Mapping[str, Any]]) -> list[Any]:
    found: list[Any] = []
    for message in messages:
        beside = [message[name] for name in ("thinking", "tool_calls") if name in message]
        weight = [message["weight"]] if "weight" in message else []
        found.append([message["role"], message["content"], *weight, *beside])
    return found


@dataclass(frozen=True)
class Conversation:
    source: Source
    content: Content
    merged: int = 0
    """How many messages were joined to the one before, because both had one role."""
    empty: int = 0
    """How many messages said nothing and are left out."""

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.content.messages

    def record(self) -> dict[str, Any]:
        """Plain data, without the id that it gets among the others."""
        counts = {"merged": self.merged, "empty": self.empty}
        return {
            "source": {
                "path": self.source.path,
                "format": self.source.format,
                "index": self.source.index,
            },
            **self.content.record(),
            **{name: count for name, count in counts.items() if count},
        }


@dataclass(frozen=True)
class Rejected:
    """A record, or with no place a whole file, of which there is no conversation, and why.

    `understood`: it was read right, but says nothing (a deleted chat, a sub-agent's session); all
    others are bad.
    """

    path: str
    reason: str
    index: int | None = None
    line: int | None = None
    understood: bool = False

    def record(self) -> dict[str, Any]:
        place: dict[str, Any] = {}
        if self.line is not None:
            place = {"line": self.line}
        elif self.index is not None:
            place = {"index": self.index}
        left_out = {"understood": True} if self.understood else {}
        return {"path": self.path, **place, "reason": self.reason, **left_out}


def tidy(messages: Iterable[Message]) -> tuple[tuple[Message, ...], int, int]:
    """Messages without empty ones, and neighbours of one role as one, a blank line between.

    Also how many were joined, and how many were empty.
    """
    kept: list[Message] = []
    merged = empty = 0
    for message in messages:
        if message.says_nothing:
            empty += 1
        elif kept and kept[-1].role == message.role:
            kept[-1] = _joined(kept[-1], message)
            merged += 1
        else:
            kept.append(message)
    return tuple(kept), merged, empty


def _joined(first: Message, second: Message) -> Message:
    def both(one: str, other: str) -> str:
        return "\n\n".join(text for text in (one, other) if text.strip())

    return Message(
        first.role,
        both(first.content, second.content),
        first.learned and second.learned,
        both(first.thinking, second.thinking),
        first.tool_calls + second.tool_calls,
    )


class Ids:
    """Gives each conversation its id: the content hash, and `~2`, `~3`, … for exact repeats.

    A repeat shares the hash before the `~`, by which `split` keeps repeats on one side.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def next(self, content_hash: str) -> str:
        self._seen[content_hash] = count = self._seen.get(content_hash, 0) + 1
        return content_hash if count == 1 else f"{content_hash}~{count}"


def replies(messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """(user message, reply) as indices into `messages`, one for each reply that answers a user.

    The reply is the last text of the assistant before the user speaks again: what it said while it
    called tools, and their results, belong to the exchange. A leading assistant message answers
    nobody and a trailing user message has no answer: neither is in the list, nor is a reply with
    weight 0.
    """
    found: list[tuple[int, int]] = []
    asked: int | None = None
    said: int | None = None
    for index, message in enumerate([*messages, {"role": "user"}]):
        if message["role"] == "user":
            if asked is not None and said is not None and messages[said].get("weight") != 0:
                found.append((asked, said))
            asked, said = index, None
        elif message["role"] == "assistant" and message["content"].strip():
            said = index
    return found
