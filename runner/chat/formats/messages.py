"""OpenAI's shape: `{"messages": [{"role", "content"}, …]}`, one conversation a record.

The list may be called `conversations` or `conversation`; contents may be lists of parts, also those
of LLaMA-Factory (`{"type", "value"}`). What counts as text and what carries no loss: turns.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runner.chat.conversation import Content
from runner.chat.formats import anthropic, turns
from runner.chat.formats.reading import Options


def claims(record: Mapping[str, Any]) -> bool:
    # Preference data and tree exports carry a `messages` list too, and mean something else by it.
    if _name(record) is None or "history" in record:
        return False
    return not (turns.is_preference(record) or anthropic.claims(record))


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    name = _name(record)
    assert name is not None, "is claimed"
    yield turns.conversation(record, name)


def _name(record: Mapping[str, Any]) -> str | None:
    none = "messages" if turns.has_no_turns(record, "messages") else None
    return turns.list_with(record, "role") or none
