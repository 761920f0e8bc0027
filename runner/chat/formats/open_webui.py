"""Open WebUI: a chat with `history.messages`, by itself or in an exported row's `chat`."""

from __future__ import annotations

import html
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
    parsed_json,
    role_of,
    shortened,
    text_of,
)

_DETAILS = re.compile(r'<details type="(reasoning|tool_calls)"([^<>]*)>')
"""Thoughts and tool calls stand in the text, folded away."""
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


def claims(record: Mapping[str, Any]) -> bool:
    if isinstance(record.get("chat"), dict):
        return "history" in record["chat"] or "messages" in record["chat"]
    history = record.get("history")
    return isinstance(history, dict) and "messages" in history


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    chat: Mapping[str, Any] = record["chat"] if isinstance(record.get("chat"), dict) else record
    history = object_of(chat["history"], "history") if chat.get("history") is not None else {}
    if history.get("messages") is not None:
        messages = object_of(history["messages"], "history.messages")
        parents = {id: _parent(raw) for id, raw in messages.items()}
    else:
        row = list_of(chat.get("messages"), "messages")
        messages = {str(n): raw for n, raw in enumerate(row)}
        parents = {str(n): str(n - 1) if n else None for n in range(len(row))}
    entries = {
        id: exports.Entry(_message(raw, f"message {shortened(id)}"), parents[id], _time(raw))
        for id, raw in messages.items()
    }
    said = exports.branches(entries, options.branches, history.get("currentId"))
    system = _system(chat)
    said = [(*system, *messages) for messages in said]
    ids = [record.get("id"), chat.get("id")]
    group = next((id for id in ids if isinstance(id, str) and id), "")
    title = next((t for t in (chat.get("title"), record.get("title")) if isinstance(t, str)), "")
    created = next((t for t in (record.get("created_at"), chat.get("timestamp")) if t), None)
    yield from exports.contents(
        said,
        options.branches,
        group or exports.fingerprint(list(messages)),
        exports.about(title, created),
    )


def _parent(raw: object) -> str | None:
    parent = raw.get("parentId") if isinstance(raw, dict) else None
    return parent if isinstance(parent, str) else None


def _time(raw: object) -> float | None:
    return exports.seconds(raw.get("timestamp")) if isinstance(raw, dict) else None


def _system(chat: Mapping[str, Any]) -> tuple[Message, ...]:
    params = chat.get("params")
    text = params.get("system") if isinstance(params, dict) else None
    return (Message("system", text),) if isinstance(text, str) and text.strip() else ()


def _message(raw: object, what: str) -> Message | Unreadable:
    try:
        found = object_of(raw, what)
        role, content = role_of(found.get("role"), what), found.get("content")
        if isinstance(content, list):
            parts = [p for p in content if isinstance(p, dict) and p.get("type") == "text"]
            content = joined([text_of(p.get("text"), f"a part of {what}") for p in parts])
        text = text_of(content, f"{what}'s content")
    except Unreadable as error:
        return error
    return _unfolded(text) if role == "assistant" else Message(role, text)


def _unfolded(text: str) -> Message:
    """A reply with its thoughts and tool calls beside it."""
    outside, folded = exports.cut_out(text, _DETAILS, "</details>")
    thinking: list[str] = []
    calls: list[dict[str, Any]] = []
    for opening, inside in folded:
        if opening[1] == "reasoning":
            thinking.append(_unquoted(inside.split("</summary>", 1)[-1]))
        else:
            about = {key: html.unescape(value) for key, value in _ATTRIBUTE.findall(opening[2])}
            arguments = parsed_json(parsed_json(about.get("arguments")))
            calls.append({"name": about.get("name", ""), "arguments": arguments})
    content = joined([part.strip() for part in outside]) if folded else text
    return Message("assistant", content, thinking=joined(thinking), tool_calls=tuple(calls))


def _unquoted(quoted: str) -> str:
    lines = [html.unescape(line) for line in quoted.strip().split("\n")]
    return "\n".join(line.removeprefix(">").removeprefix(" ") for line in lines).strip()
