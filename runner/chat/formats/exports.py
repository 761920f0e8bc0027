"""What the exports of chat programs share: branches, times, titles, and thoughts before a reply."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from runner.chat.conversation import Content, Message
from runner.chat.formats import tree
from runner.chat.formats.reading import Unreadable, joined

MILLISECONDS_FROM = 1e11
"""As seconds this is the year 5138, as milliseconds 1973: larger numbers are milliseconds."""


@dataclass(frozen=True)
class Entry:
    """One message of an export, read or not, and where it hangs in the tree."""

    said: Message | Unreadable | None
    """None for what is no message of a person or a model; raised where its branch is wanted."""
    parent: str | None = None
    time: float | None = None

    @property
    def speaks(self) -> bool:
        return isinstance(self.said, Unreadable) or bool(self.said and self.said.content.strip())


@dataclass(frozen=True)
class Listed:
    """One message of a list that may be out of order, and whose messages may tell their parents."""

    said: Message | Unreadable
    id: object
    parent: object
    time: float | None
    follows: bool
    """Whether it just follows the one before it in time, for want of a word on its parent."""


def entries(listed: Sequence[Listed]) -> dict[str, Entry]:
    """The tree of a list of messages, by time; equal times keep their order."""
    found: dict[str, Entry] = {}
    before: str | None = None
    for n in _in_time_order([one.time for one in listed]):
        one = listed[n]
        id = one.id if isinstance(one.id, str) and one.id not in found else f"message {n}"
        parent = before if one.follows else one.parent
        found[id] = Entry(one.said, parent if isinstance(parent, str) else None, one.time)
        before = id
    return found


def branches(
    entries: Mapping[str, Entry], which: Literal["newest", "all"], current: object = None
) -> list[tuple[Message, ...]]:
    """The messages of the newest branch, or of every one that says something else.

    `current` is the source's word on where the newest ends. Raises Unreadable for a message on
    these branches that cannot be read.
    """
    leaf = current if isinstance(current, str) else None
    nodes = {id: tree.Node(entry.parent, entry.speaks, entry.time) for id, entry in entries.items()}
    found = (
        tuple(thoughts_joined(_said(entries[id] for id in way)))
        for way in tree.branches(nodes, which, leaf)
    )
    return distinct(found)


def _said(entries: Iterable[Entry]) -> Iterator[Message]:
    for entry in entries:
        if isinstance(entry.said, Unreadable):
            raise entry.said
        if entry.said is not None:
            yield entry.said


def distinct(found: Iterable[tuple[Message, ...]]) -> list[tuple[Message, ...]]:
    """Each of the conversations once whose texts are the same."""
    first: dict[tuple[tuple[str, str], ...], tuple[Message, ...]] = {}
    for messages in found:
        said = tuple((each.role, each.content) for each in messages if each.content.strip())
        first.setdefault(said, messages)
    return list(first.values())


def thoughts_joined(messages: Iterable[Message]) -> Iterator[Message]:
    """Thoughts that stand as a message of their own join the reply after them; else they go."""
    thoughts: list[str] = []
    for message in messages:
        is_bare = not (message.content.strip() or message.tool_calls)
        if message.role == "assistant" and message.thinking and is_bare:
            thoughts.append(message.thinking)
            continue
        if message.role == "assistant" and thoughts:
            message = replace(message, thinking=joined([*thoughts, message.thinking]))
        thoughts = []
        yield message


def _in_time_order(times: Sequence[float | None]) -> list[int]:
    """Places in order of time; equal times keep their order, one without stays behind the last."""
    filled: list[float] = []
    for time in times:
        last = filled[-1] if filled else float("-inf")
        filled.append(last if time is None else time)
    return sorted(range(len(filled)), key=filled.__getitem__)


def cut_out(
    text: str, opening: re.Pattern[str], closing: str
) -> tuple[list[str], list[tuple[re.Match[str], str]]]:
    """What stands outside of all spans from `opening` to `closing`, and each opening and inside.

    Linear in the text where `opening` is, which a pattern for the whole span would not be.
    """
    outside: list[str] = []
    spans: list[tuple[re.Match[str], str]] = []
    at = 0
    while (start := opening.search(text, at)) is not None:
        end = text.find(closing, start.end())
        if end < 0:
            break
        outside.append(text[at : start.start()])
        spans.append((start, text[start.end() : end]))
        at = end + len(closing)
    return [*outside, text[at:]], spans


def about(title: object, created: object = None) -> dict[str, Any]:
    """The metadata of a conversation: its title and when it began, where the source says so."""
    found = {"title": title, "created_at": _date(created)}
    return {key: text for key, text in found.items() if isinstance(text, str) and text.strip()}


def _date(value: object) -> str | None:
    if isinstance(value, str) and _from_iso(value) is not None:
        return value
    time = seconds(value)
    try:
        return None if time is None else datetime.fromtimestamp(time, UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return None


def seconds(value: object) -> float | None:
    """A time as seconds since 1970: from a number, a text that holds one, or a date; else None."""
    if isinstance(value, str):
        as_date = _from_iso(value)
        if as_date is not None:
            return as_date
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if number != number or abs(number) == float("inf"):
        return None
    return number / 1000 if abs(number) >= MILLISECONDS_FROM else number


def _from_iso(text: str) -> float | None:
    if "-" not in text:  # 20240115 is a date by ISO 8601, and a number here
        return None
    try:
        date = datetime.fromisoformat(text)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def fingerprint(value: Any) -> str:
    """16 hex digits to know a conversation by whose source has no id for it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def contents(
    said: Sequence[tuple[Message, ...]],
    which: Literal["newest", "all"],
    group: str,
    metadata: Mapping[str, Any],
) -> Iterator[Content]:
    """A conversation for each branch; with all of them asked for, they share the group.

    No branch gives one without messages, so that its record is reported.
    """
    for messages in said or [()]:
        yield Content(messages, group=group if which == "all" else "", metadata=metadata)
