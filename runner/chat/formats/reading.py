"""What all format readers share: their options, their error, and the text in content parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runner.chat.conversation import ROLE_WORDS, Role
from runner.chat.json_parser import Refused, quoted, text_value


@dataclass(frozen=True)
class Options:
    """What a recipe says of how to read; the defaults are those of `ingest`."""

    branches: Literal["newest", "all"] = "newest"
    """Of a conversation that was continued in several ways: the newest way, or every one."""
    sidechains: bool = False
    """Claude Code: also the sessions of sub-agents, each as a conversation of its own."""
    text_column: str = "text"
    """The column or key that holds the text of a document."""
    persona: str = ""
    """Chats between people: whose messages are the replies to learn; "" is who exported them."""


class Unreadable(Exception):
    """Why a record cannot be read, as the end of a sentence that begins with its place."""


class Nothing(str):
    """Why a record that was understood gives no conversation; it is reported, but is not bad."""

    __slots__ = ()


def role_of(word: object, what: str) -> Role:
    """The role that a source calls `word`; raises Unreadable with `what` (`message 3`) in it."""
    role = ROLE_WORDS.get(word.lower()) if isinstance(word, str) else None
    if role is None:
        raise Unreadable(f"{what} has role {quoted(word)}; roles are system, user, assistant, tool")
    return role


def text_of(value: object, what: str) -> str:
    """A text, or "" for null; raises Unreadable for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unreadable(f"{what} must be a text, not {quoted(value)}")
    return value


def object_of(value: object, what: str) -> Mapping[str, Any]:
    """A JSON object; raises Unreadable for anything else."""
    if not isinstance(value, dict):
        raise Unreadable(f"{what} must be an object, not {quoted(value)}")
    return value


def list_of(value: object, what: str) -> list[Any]:
    """A JSON list, or an empty one for null; raises Unreadable for anything else."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise Unreadable(f"{what} must be a list, not {quoted(value)}")
    return value


def shortened(name: str) -> str:
    """A name from a file as an error shows it: what is quoted, without the marks around it."""
    return quoted(name).replace("'", "")


def joined(texts: list[str]) -> str:
    """Parts of one message, a blank line between; parts that say nothing are left out."""
    return "\n\n".join(text for text in texts if text.strip())


def parsed_json(value: object) -> Any:
    """What a JSON text inside JSON says (arguments of tool calls); itself where it is none.

    It is none where a file would not be either: with NaN, half a character, or too deep.
    """
    if not isinstance(value, str):
        return value
    try:
        return text_value(value)
    except Refused:
        return value
