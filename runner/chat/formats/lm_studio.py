"""LM Studio: one `.conversation.json` a chat, each message in one or several versions."""

from __future__ import annotations

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
from runner.chat.json_parser import quoted


def claims(record: Mapping[str, Any]) -> bool:
    messages = record.get("messages")
    if not isinstance(messages, list):
        return False
    if not messages:
        return "systemPrompt" in record
    return any(isinstance(message, dict) and "versions" in message for message in messages)


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    entries: dict[str, exports.Entry] = {}
    before: str | None = None
    for n, raw in enumerate(record["messages"]):
        versions, selected = _versions(raw, f"message {n}")
        for v, version in enumerate(versions):
            entries[f"{n}/{v}"] = exports.Entry(_message(version, f"message {n}"), before, n)
        before = f"{n}/{selected}"
    system = Message("system", text_of(record.get("systemPrompt"), "systemPrompt"))
    said = exports.branches(entries, options.branches, before)
    yield from exports.contents(
        [(system, *messages) for messages in said],
        options.branches,
        exports.fingerprint([record.get("createdAt"), record["messages"]]),
        exports.about(record.get("name"), record.get("createdAt")),
    )


def _versions(raw: object, what: str) -> tuple[list[Any], int]:
    found = object_of(raw, what)
    versions = list_of(found.get("versions"), f"{what}'s versions")
    selected = found.get("currentlySelected", len(versions) - 1)
    if isinstance(selected, bool) or not isinstance(selected, int):
        raise Unreadable(f"{what} has currentlySelected {quoted(selected)}, not a number")
    if not 0 <= selected < len(versions):
        raise Unreadable(f"{what} has {len(versions)} versions, and number {selected} selected")
    return versions, selected


def _message(raw: object, what: str) -> Message | Unreadable:
    try:
        version = object_of(raw, what)
        role = role_of(version.get("role"), what)
        texts: list[str] = []
        thinking: list[str] = []
        calls: list[dict[str, Any]] = []
        blocks = [version, *list_of(version.get("steps"), f"{what}'s steps")]
        for block in blocks:
            if not isinstance(block, dict) or block.get("type") == "debugInfoBlock":
                continue
            style = block.get("style")
            is_thought = isinstance(style, dict) and style.get("type") == "thinking"
            for part in list_of(block.get("content"), f"{what}'s content"):
                if not isinstance(part, dict):
                    continue
                if part.get("type") == "text":
                    text = text_of(part.get("text"), f"a part of {what}")
                    (thinking if is_thought else texts).append(text)
                elif part.get("type") == "toolCallRequest":
                    calls += _call(part)
    except Unreadable as error:
        return error
    return Message(role, joined(texts), thinking=joined(thinking), tool_calls=tuple(calls))


def _call(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The call in a part, where it lies flat in the app's files and nested in the API's."""
    inside = part.get("toolCallRequest")
    call = inside if isinstance(inside, dict) else part
    if not isinstance(call.get("name"), str):
        return []
    return [{"name": call["name"], "arguments": call.get("arguments", call.get("parameters"))}]
