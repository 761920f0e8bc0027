"""ChatGPT's `conversations.json`, whole or in shards, and one chat as browser extensions save it.

`{"title", "create_time", "current_node", "mapping": {id: {"parent", "message": {…}}}}`: a tree, of
which the branch that ends in `current_node` is what the page shows.
"""

from __future__ import annotations

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

_REFERENCE = re.compile("\ue200([^\ue200\ue201]*)\ue201")
"""What the page draws as a link or a name: its kind and its arguments, each after U+E202."""
_MARK = re.compile("[\ue200-\ue206]")


def claims(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("mapping"), dict) or (
        "mapping" in record and "current_node" in record
    )


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    nodes = object_of(record["mapping"], "mapping")
    parents = _parents(nodes)
    entries = {
        id: exports.Entry(_message(node, f"message {shortened(id)}"), parents[id], _time(node))
        for id, node in nodes.items()
    }
    said = exports.branches(entries, options.branches, record.get("current_node"))
    ids = [record.get("conversation_id"), record.get("id")]
    group = next((id for id in ids if isinstance(id, str) and id), "")
    about = exports.about(record.get("title"), record.get("create_time"))
    yield from exports.contents(
        said, options.branches, group or exports.fingerprint(list(nodes)), about
    )


def _parents(nodes: Mapping[str, Any]) -> dict[str, str | None]:
    """Each node's parent by its own word, or by that of the parent."""
    found: dict[str, str | None] = {}
    for id, node in nodes.items():
        parent = node.get("parent") if isinstance(node, dict) else None
        found[id] = parent if isinstance(parent, str) else None
    for id, node in nodes.items():
        children = node.get("children") if isinstance(node, dict) else None
        for child in children if isinstance(children, list) else []:
            if isinstance(child, str) and child in found and found[child] is None:
                found[child] = id
    return found


def _time(node: object) -> float | None:
    message = node.get("message") if isinstance(node, dict) else None
    return exports.seconds(message.get("create_time")) if isinstance(message, dict) else None


def _message(node: object, what: str) -> Message | Unreadable | None:
    try:
        raw = object_of(node, what).get("message")
        if raw is None:
            return None
        return _said(object_of(raw, what), what)
    except Unreadable as error:
        return error


def _said(raw: Mapping[str, Any], what: str) -> Message | None:
    """What a person or the model said to the other; None for all that the page does not show."""
    metadata = raw.get("metadata")
    if isinstance(metadata, dict) and metadata.get("is_visually_hidden_from_conversation"):
        return None
    if raw.get("recipient", "all") not in ("all", None):
        return None
    content = raw.get("content")
    if content is None:
        return None
    kind = content.get("content_type") if isinstance(content, dict) else "text"
    if kind not in ("text", "multimodal_text", "thoughts"):
        return None
    author = raw.get("author")
    role = role_of(author.get("role") if isinstance(author, dict) else author, what)
    if role not in ("user", "assistant"):
        return None
    if kind == "thoughts":
        thoughts = content.get("thoughts")
        return Message("assistant", "", thinking=_thoughts(thoughts)) if thoughts else None
    return Message(role, without_marks(_text(content, what)))


def _text(content: object, what: str) -> str:
    if isinstance(content, str):
        return content
    found = object_of(content, f"{what}'s content")
    if "parts" not in found:
        return text_of(found.get("text"), f"{what}'s text")
    parts = list_of(found["parts"], f"{what}'s parts")
    if any(not isinstance(part, str | dict | None) for part in parts):
        raise Unreadable(f"{what} has a part that is neither a text nor an object")
    return joined([_part(part) for part in parts])


def _part(part: object) -> str:
    """A text; of what was spoken, the text that it was heard as; of images nothing."""
    if isinstance(part, dict) and part.get("content_type") == "audio_transcription":
        part = part.get("text")
    return part if isinstance(part, str) else ""


def _thoughts(thoughts: object) -> str:
    found = thoughts if isinstance(thoughts, list) else []
    texts = [each.get("content") for each in found if isinstance(each, dict)]
    return joined([text for text in texts if isinstance(text, str)])


def without_marks(text: str) -> str:
    """The text as a person sees it, without references to sources; names and links keep theirs."""
    if not _MARK.search(text):
        return text
    return _MARK.sub("", _REFERENCE.sub(_shown, text))


def _shown(reference: re.Match[str]) -> str:
    kind, *arguments = reference[1].split("\ue202")
    if kind == "url" and arguments:
        return arguments[0]
    if kind == "entity" and arguments:
        about = parsed_json(arguments[0])
        if isinstance(about, list) and len(about) > 1 and isinstance(about[1], str):
            return about[1]
    return ""
