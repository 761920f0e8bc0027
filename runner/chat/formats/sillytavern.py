"""SillyTavern: JSON Lines, a header, then a message a line; `swipes` are its other versions.

The character speaks first. Messages of several characters in a group chat are all replies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.chat.conversation import Content, Message, Role
from runner.chat.formats import exports
from runner.chat.formats.reading import Nothing, Options, Unreadable, text_of
from runner.chat.json_parser import quoted
from runner.chat.json_values import Value


def claims(record: Mapping[str, Any]) -> bool:
    is_message = "is_user" in record and ("mes" in record or "swipes" in record)
    return is_message or _is_header(record)


def _is_header(record: Mapping[str, Any]) -> bool:
    return "user_name" in record and "character_name" in record


def whole(records: Sequence[Value], options: Options) -> Iterator[tuple[Value, Content | str]]:
    """A chat from each header on; a file without one is a chat too."""
    start = 0
    for end in range(1, len(records) + 1):
        if end == len(records) or _is_header(records[end].value):
            yield from _chat(records[start:end], options)
            start = end


def _chat(records: Sequence[Value], options: Options) -> Iterator[tuple[Value, Content | str]]:
    header = records[0].value if _is_header(records[0].value) else {}
    entries: dict[str, exports.Entry] = {}
    before: str | None = None
    for n, item in enumerate(records[1:] if header else records):
        try:
            versions, selected = _versions(item.value)
        except Unreadable as error:
            yield item, str(error)
            continue
        for v, message in enumerate(versions):
            entries[f"{n}/{v}"] = exports.Entry(message, before, n)
        if versions:
            before = f"{n}/{selected}"
    if not entries:
        yield records[0], Nothing("has no message")
        return
    name = header.get("character_name")
    about = exports.about(None if name == "unused" else name, header.get("create_date"))
    group = exports.fingerprint([header, records[min(1, len(records) - 1)].value])
    said = exports.branches(entries, options.branches, before)
    for content in exports.contents(said, options.branches, group, about):
        yield records[0], content


def _versions(record: Mapping[str, Any]) -> tuple[list[Message], int]:
    """What was said, in each of its versions, and which one the chat went on from."""
    if record.get("is_system") is True:  # help, and what was hidden from the model
        return [], 0
    extra = record.get("extra")
    extra = extra if isinstance(extra, dict) else {}
    if record["is_user"] not in (True, False):
        raise Unreadable(f"is_user is {quoted(record['is_user'])}, not true or false")
    role: Role = "user" if record["is_user"] else "assistant"
    if extra.get("type") == "narrator":
        role = "system"
    thinking = extra.get("reasoning")
    thinking = thinking if isinstance(thinking, str) and role == "assistant" else ""
    swipes, selected = record.get("swipes"), record.get("swipe_id", 0)
    texts = [_text(swipe) for swipe in swipes] if isinstance(swipes, list) else []
    has_one = type(selected) is int and 0 <= selected < len(texts)
    now = _text(record.get("mes"))
    if not has_one:
        return [Message(role, now, thinking=thinking)], 0
    # `mes` is the swipe that is shown, and the one that an edit has changed.
    texts[selected] = now if now.strip() else texts[selected]
    return [
        Message(role, text, thinking=thinking if n == selected else "")
        for n, text in enumerate(texts)
    ], selected


def _text(mes: object) -> str:
    """A text, or Chub's object around one."""
    return text_of(mes["message"] if isinstance(mes, dict) and "message" in mes else mes, "mes")
