"""Grok's export: `{"conversations": [{"conversation": {…}, "responses": [{"response": {…}}]}]}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.chat.conversation import Content, Message
from runner.chat.formats import exports
from runner.chat.formats.reading import (
    Options,
    Unreadable,
    list_of,
    object_of,
    role_of,
    text_of,
)
from runner.chat.json_values import Value


def claims(record: Mapping[str, Any]) -> bool:
    chats = record.get("conversations")
    return isinstance(chats, list) and any(
        isinstance(chat, dict) and "responses" in chat for chat in chats
    )


def whole(records: Sequence[Value], options: Options) -> Iterator[tuple[Value, Content | str]]:
    for item in records:
        for n, chat in enumerate(item.value["conversations"]):
            try:
                for content in _contents(object_of(chat, f"conversation {n}"), options):
                    yield item, content
            except Unreadable as error:
                yield item, f"conversation {n}: {error}"


def _contents(chat: Mapping[str, Any], options: Options) -> Iterator[Content]:
    raw = list_of(chat.get("responses"), "responses")
    if not raw:
        raise Unreadable("has no message")
    responses = [_response(response, f"message {n}") for n, response in enumerate(raw)]
    is_tree = any(isinstance(each.get("parent_response_id"), str) for each in responses)
    entries = exports.entries(
        [
            exports.Listed(
                _message(response, f"message {n}"),
                response.get("response_id"),
                response.get("parent_response_id"),
                _time(response),
                follows=not is_tree,
            )
            for n, response in enumerate(responses)
        ]
    )
    about = chat.get("conversation")
    about = about if isinstance(about, dict) else {}
    said = exports.branches(entries, options.branches, about.get("leaf_response_id"))
    id = about.get("conversation_id")
    group = id if isinstance(id, str) and id else exports.fingerprint(raw)
    metadata = exports.about(about.get("title"), about.get("create_time"))
    yield from exports.contents(said, options.branches, group, metadata)


def _response(raw: object, what: str) -> Mapping[str, Any]:
    found = object_of(raw, what)
    return object_of(found["response"], what) if "response" in found else found


def _time(response: Mapping[str, Any]) -> float | None:
    time = response.get("create_time")
    # Some exports are dumps of MongoDB: {"$date": {"$numberLong": "1750534101194"}}
    while isinstance(time, dict) and len(time) == 1:
        (time,) = time.values()
    return exports.seconds(time)


def _message(response: Mapping[str, Any], what: str) -> Message | Unreadable:
    try:
        role = role_of(response.get("sender"), what)
        text = text_of(response.get("message"), f"{what}'s text")
    except Unreadable as error:
        return error
    thinking = response.get("thinking_trace")
    return Message(role, text, thinking=thinking if isinstance(thinking, str) else "")
