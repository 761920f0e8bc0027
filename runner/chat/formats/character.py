"""Characters to play: `{"name", "context", "greeting", "example_dialogue": [{"role", "content"}]}`.

The context is the system text, the greeting the character's first message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runner.chat.conversation import Content, Message
from runner.chat.formats import turns
from runner.chat.formats.reading import Options, text_of


def claims(record: Mapping[str, Any]) -> bool:
    return "example_dialogue" in record and "context" in record


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    before = (
        Message("system", text_of(record["context"], "context")),
        Message("assistant", text_of(record.get("greeting"), "greeting")),
    )
    dialogue = turns.messages(record, "example_dialogue")
    said = (*(first for first in before if first.content.strip()), *dialogue)
    yield Content(said, metadata=turns.metadata(record, "name"))
