"""Telegram Desktop's `result.json`: one chat, or all of them under `chats.list`.

Chats between people have no model in them: the messages of one person are the replies to learn,
and all others are the user. A silence of more than six hours begins a new conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.chat.conversation import Content, Message
from runner.chat.formats import exports
from runner.chat.formats.reading import (
    Nothing,
    Options,
    Unreadable,
    list_of,
    object_of,
    shortened,
)
from runner.chat.json_parser import quoted
from runner.chat.json_values import Value

SILENCE_S = 6 * 3600
WITH_ONE = ("personal_chat", "bot_chat")
TYPES = (
    *WITH_ONE,
    "saved_messages",
    "replies",
    "verification_codes",
    "private_group",
    "private_supergroup",
    "public_supergroup",
    "private_channel",
    "public_channel",
)


def claims(record: Mapping[str, Any]) -> bool:
    if record.get("type") in TYPES:
        return "messages" in record
    chats = record.get("chats")
    return isinstance(chats, dict) and "list" in chats


def whole(records: Sequence[Value], options: Options) -> Iterator[tuple[Value, Content | str]]:
    for item in records:
        for found in _chats(item.value, options.persona):
            yield item, found


def _chats(record: Mapping[str, Any], persona: str) -> Iterator[Content | str]:
    if "chats" not in record:
        yield from _chat(record, persona, None)
        return
    about = record.get("personal_information")
    owner = _id(about.get("user_id")) if isinstance(about, dict) else None
    count = 0
    for list_name in ("chats", "left_chats"):
        inside = record.get(list_name)
        chats = inside.get("list") if isinstance(inside, dict) else None
        if not isinstance(chats, list):
            if list_name in record:
                yield f"{list_name}.list must be a list, not {quoted(chats)}"
            continue
        for n, raw in enumerate(chats):
            what = f"{list_name}.list, chat {n}"
            count += 1
            if not isinstance(raw, dict):
                yield f"{what} must be an object, not {quoted(raw)}"
                continue
            for found in _chat(raw, persona, owner):
                yield found if isinstance(found, Content) else type(found)(f"{what}: {found}")
    if not count:
        yield "has no chat"


def _chat(chat: Mapping[str, Any], persona: str, owner: str | None) -> Iterator[Content | str]:
    """The conversations of a chat, and why a message of it is none."""
    try:
        raw = list_of(chat.get("messages"), "messages")
    except Unreadable as error:
        yield str(error)
        return
    said: list[_Said] = []
    for n, message in enumerate(raw):
        try:
            if (found := _message(message, f"message {n}")) is not None:
                said.append(found)
        except Unreadable as error:
            yield str(error)
    if not any(one.text for one in said):
        yield Nothing("has no text message")
        return
    try:
        replies = _replies(chat, said, persona, owner)
    except Unreadable as error:
        yield error.args[0]
        return
    for talk in _talks(said):
        messages = tuple(
            Message("assistant" if one.sender in replies else "user", one.text)
            for one in talk
            if one.text
        )
        if messages:
            yield Content(messages, metadata=exports.about(chat.get("name"), talk[0].date))


@dataclass(frozen=True)
class _Said:
    sender: tuple[str | None, str | None]
    """Their id and their name."""
    text: str
    """"" for a picture, and for what somebody else had said: it is passed on."""
    date: object
    time: float | None


def _message(raw: object, what: str) -> _Said | None:
    """A message; None for a notice of the service, such as a call or a new member."""
    message = object_of(raw, what)
    if message.get("type") != "message":
        return None
    what = f"{what} (id {quoted(message.get('id'))})"
    is_passed_on = any(key in message for key in ("forwarded_from", "forwarded_from_id"))
    name, date = message.get("from"), message.get("date")
    time = exports.seconds(message.get("date_unixtime"))
    return _Said(
        (_id(message.get("from_id")), name if isinstance(name, str) else None),
        "" if is_passed_on else _text(message.get("text"), what),
        date,
        exports.seconds(date) if time is None else time,
    )


def _text(text: object, what: str) -> str:
    """A text, or the texts of a list, in which formatted words are objects."""
    if text is None or isinstance(text, str):
        return text if text and text.strip() else ""
    if not isinstance(text, list):
        raise Unreadable(f"{what} has text {quoted(text)}, which is no text and no list")
    parts: list[str] = []
    for raw in text:
        part = raw.get("text") if isinstance(raw, dict) else raw
        if not isinstance(part, str):
            raise Unreadable(f"{what} has {quoted(raw)} in its text")
        parts.append(part)
    return "".join(parts) if "".join(parts).strip() else ""


def _id(value: object) -> str | None:
    """`user123`; older exports have the number alone."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"user{value}"
    return value if isinstance(value, str) and value else None


def _replies(
    chat: Mapping[str, Any], said: Sequence[_Said], persona: str, owner: str | None
) -> set[tuple[str | None, str | None]]:
    """The sender whose messages are the replies, under each name; raises Unreadable, who it is."""
    senders = list(dict.fromkeys(one.sender for one in said))
    names = list(dict.fromkeys(str(name or id) for id, name in senders))
    here = ", ".join(map(shortened, names[:6]))
    if persona:
        if found := {sender for sender in senders if persona in sender}:
            return found
        raise Unreadable(Nothing(f"nobody here is {persona!r}, the `persona`; here are {here}"))
    if chat.get("type") == "saved_messages":
        raise Unreadable(Nothing("is Saved Messages: notes to oneself are no chat"))
    unknown = Unreadable(
        "does not tell who exported it; say whose messages are the replies with `persona:`; "
        f"here are {here}"
    )
    if owner is not None:
        found = {sender for sender in senders if sender[0] == owner}
    elif chat.get("type") in WITH_ONE:
        # The chat has the id of the other one.
        found = {sender for sender in senders if sender[0] != _id(chat.get("id"))}
    else:
        raise unknown
    if not found:
        raise Unreadable(Nothing(f"has no message of who exported it; here are {here}"))
    if len({id for id, _ in found}) > 1:
        raise unknown
    return found


def _talks(said: Sequence[_Said]) -> Iterator[list[_Said]]:
    """What was said without a long silence between."""
    talk: list[_Said] = []
    last: float | None = None
    for one in said:
        if last is not None and one.time is not None and one.time - last > SILENCE_S:
            yield talk
            talk = []
        talk.append(one)
        last = one.time if one.time is not None else last
    yield talk
