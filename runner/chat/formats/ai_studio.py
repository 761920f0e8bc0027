"""Google AI Studio: `{"runSettings", "systemInstruction", "chunkedPrompt": {"chunks": […]}}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runner.chat.conversation import Content, Message
from runner.chat.formats import exports
from runner.chat.formats.reading import Options, list_of, object_of, role_of, text_of


def claims(record: Mapping[str, Any]) -> bool:
    return "chunkedPrompt" in record


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    said = [Message("system", _text(record.get("systemInstruction"), "systemInstruction"))]
    prompt = object_of(record["chunkedPrompt"], "chunkedPrompt")
    for n, raw in enumerate(list_of(prompt.get("chunks"), "chunks")):
        chunk = object_of(raw, f"chunk {n}")
        role, text = role_of(chunk.get("role"), f"chunk {n}"), _text(chunk, f"chunk {n}")
        if chunk.get("isThought") is True:
            said.append(Message("assistant", "", thinking=text))
        else:
            said.append(Message(role, text))
    yield Content(tuple(exports.thoughts_joined(said)))


def _text(raw: object, what: str) -> str:
    """The text itself, or its parts, in which it came; files and images have none."""
    if raw is None or isinstance(raw, str):
        return raw or ""
    found = object_of(raw, what)
    if found.get("text") is not None:
        return text_of(found["text"], f"{what}'s text")
    parts = list_of(found.get("parts"), f"{what}'s parts")
    texts = [
        text_of(part.get("text"), f"a part of {what}")
        for part in parts
        if isinstance(part, dict) and part.get("thought") is not True
    ]
    return "".join(texts)
