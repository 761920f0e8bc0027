"""Claude.ai's `conversations.json`, of 2024 to 2026, and the chats that browser extensions save.

`{"uuid", "name", "chat_messages": [{"uuid", "sender", "text", "content", "created_at", …}]}`: the
array is not always in order of time, so it is sorted, and stably, because a message and its answer
can have one time. Since 2026 `parent_message_uuid` tells the branches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from runner.chat.conversation import Content, Message
from runner.chat.formats import exports
from runner.chat.formats.reading import (
    Options,
    Unreadable,
    joined,
    list_of,
    object_of,
    role_of,
    text_of,
)

NOT_SHOWN = "This block is not supported on your current device yet."
"""Stands in `text`, in a fence, where a tool was used."""
_FENCE = re.compile(rf"(?:```[^\n`]*\n)?{re.escape(NOT_SHOWN)}(?:\n```)?")
_THINKING = re.compile("<antThinking>")
"""How thoughts stood inside the text in 2024."""


def claims(record: Mapping[str, Any]) -> bool:
    return "chat_messages" in record


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    raw = list_of(record["chat_messages"], "chat_messages")
    messages = [object_of(message, f"message {n}") for n, message in enumerate(raw)]
    entries = exports.entries(
        [
            exports.Listed(
                _message(message, f"message {n}"),
                message.get("uuid"),
                message.get("parent_message_uuid"),
                exports.seconds(message.get("created_at")),
                # null is a root: there are several when the first message was edited.
                follows="parent_message_uuid" not in message,
            )
            for n, message in enumerate(messages)
        ]
    )
    leaf = record.get("current_leaf_message_uuid")
    said = exports.branches(entries, options.branches, leaf)
    uuid = record.get("uuid")
    group = uuid if isinstance(uuid, str) and uuid else exports.fingerprint(raw)
    about = exports.about(record.get("name"), record.get("created_at"))
    yield from exports.contents(said, options.branches, group, about)


def _message(raw: Mapping[str, Any], what: str) -> Message | Unreadable:
    try:
        role = role_of(raw.get("sender"), what)
        blocks = raw.get("content")
        texts, thinking, calls = _blocks(blocks if isinstance(blocks, list) else [], what)
        if isinstance(blocks, str):
            texts = [blocks]
        text = joined(texts) or text_of(raw.get("text"), f"{what}'s text")
        text = without_placeholders(text)
        if role == "assistant":
            outside, thoughts = exports.cut_out(text, _THINKING, "</antThinking>")
            thinking += [inside for _, inside in thoughts]
            text = "".join([outside[0], *(rest.lstrip() for rest in outside[1:])])
        else:
            text = joined([text, *_attached(raw.get("attachments"))])
    except Unreadable as error:
        return error
    return Message(role, text, thinking=joined(thinking), tool_calls=tuple(calls))


def _blocks(blocks: list[Any], what: str) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """The texts, the thoughts and the tool calls; results, images and what is new say nothing."""
    texts: list[str] = []
    thinking: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        if isinstance(block, str):
            texts.append(block)
        if not isinstance(block, dict):
            continue
        match block.get("type"):
            case "text":
                texts.append(text_of(block.get("text"), f"a text block of {what}"))
            case "thinking" if isinstance(block.get("thinking"), str):
                thinking.append(block["thinking"])
            case "tool_use" if isinstance(block.get("name"), str):
                calls.append({"name": block["name"], "arguments": block.get("input")})
    return texts, thinking, calls


def without_placeholders(text: str) -> str:
    if NOT_SHOWN not in text:
        return text
    return joined([part.strip() for part in _FENCE.split(text)])


def _attached(attachments: object) -> list[str]:
    """Text that was pasted, which the page keeps as an attachment."""
    found = attachments if isinstance(attachments, list) else []
    texts = [each.get("extracted_content") for each in found if isinstance(each, dict)]
    return [text for text in texts if isinstance(text, str)]
