"""What the formats of data sets share: one message of a list, tools, and what marks a preference.

OpenAI's, ShareGPT's, LLaMA-Factory's and Anthropic's messages have one reader, so that a record
that fits two of them says the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from runner.chat.conversation import Content, Message, Role
from runner.chat.formats.reading import (
    Unreadable,
    joined,
    list_of,
    object_of,
    parsed_json,
    role_of,
    text_of,
)
from runner.chat.json_parser import quoted

LISTS = ("messages", "conversations", "conversation")
"""The names that a record's list of messages goes by."""

LABELS = ("label", "kto_tag")
_PAIRS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),
    ("response_j", "response_k"),
    ("left_answer", "right_answer"),
)
PAIRED = frozenset(name for names in _PAIRS for name in names)
"""The keys of preference data."""
_CALL_ROLES = ("function_call", "tool_call")
_RESULT_ROLES = ("tool_result", "tool_response")
_TEXT_PARTS = ("text", "input_text", "output_text")
_TEXT_KEYS = ("text", "value", "content")
_THINKING_PARTS = ("thinking", "reasoning")
_CALL_PARTS = ("tool_use", "server_tool_use", "mcp_tool_use")


def list_with(record: Mapping[str, Any], *keys: str) -> str | None:
    """The name of the list that has a message with `keys` (`role`; `from`, `value`), or None."""
    for name in LISTS:
        turns = record.get(name)
        if isinstance(turns, list) and any(
            isinstance(turn, dict) and turn.keys() >= set(keys) for turn in turns
        ):
            return name
    return None


def has_no_turns(record: Mapping[str, Any], name: str) -> bool:
    """Whether a record is a conversation by all its keys, but has no message under `name`."""
    turns = record.get(name)
    if isinstance(turns, list) and any(isinstance(turn, dict) for turn in turns):
        return False
    return name in record and record.keys() <= {name, "id", "system", "tools", "metadata"}


def pair(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The names of the two answers in preference data, the better one first; left comes first."""
    for better, worse in _PAIRS:
        both = better in record and worse in record
        if both and (record[better] is not None or record[worse] is not None):
            return better, worse
    return None


def label_name(record: Mapping[str, Any]) -> str | None:
    """The name of the key that says whether a reply is a good one, or None.

    Such a label is true or false, perhaps as a number or a word; any other `label` is a class.
    """
    for name in LABELS:
        if name not in record:
            continue
        value = record[name]
        if isinstance(value, bool | int | float) and value in (0, 1):
            return name
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return name
    return None


def is_preference(record: Mapping[str, Any]) -> bool:
    return pair(record) is not None or label_name(record) is not None


def conversation(record: Mapping[str, Any], name: str) -> Content:
    """The conversation in the list `name` of a record, and what stands beside the list."""
    return Content(
        (*system(record), *messages(record, name)), tools=tools(record), metadata=metadata(record)
    )


def messages(record: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    """The messages in `record[name]`; raises Unreadable that names one by its index."""
    of = "" if name in LISTS else f" of {name}"
    turns = enumerate(list_of(record[name], name))
    return without_media(
        (said for index, raw in turns for said in message(raw, f"message {index}{of}")), record
    )


def system(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """What stands beside the messages as their system text: a text or a list of parts."""
    for name in ("system", "system_prompt"):
        text = _text(_parts(record.get(name), name))
        if text.strip():
            return (Message("system", text),)
    return ()


def tools(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """The descriptions of tools: a list, or the JSON text of one."""
    for name in ("tools", "functions"):
        value = record.get(name)
        if isinstance(value, str):
            value = parsed_json(value) if value.strip() else None
            if isinstance(value, str):
                raise Unreadable(f"{name} is a text that is not JSON: {quoted(value)}")
        if found := [value] if isinstance(value, dict) else list_of(value, name):
            return tuple(found)
    return ()


def metadata(record: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The record's `metadata`, where it is an object, and those of the keys `names` it has."""
    own = record.get("metadata")
    beside = {name: record[name] for name in names if record.get(name) is not None}
    return {**(own if isinstance(own, dict) else {}), **beside}


def without_media(messages: Iterable[Message], record: Mapping[str, Any]) -> tuple[Message, ...]:
    """Messages without the marks `<image>`, `<video>`, `<audio>` where the record has `images`, …

    LLaMA-Factory puts them where a picture stood; without it they are no text to learn.
    """
    marks = [f"<{kind}>" for kind in ("image", "video", "audio") if record.get(f"{kind}s")]
    found = tuple(messages)
    for mark in marks:
        found = tuple(
            replace(said, content=said.content.replace(f"{mark}\n", "").replace(mark, ""))
            for said in found
        )
    return found


def message(raw: object, what: str) -> Iterator[Message]:
    """One message, after the results of tools that stand in it as parts of their own.

    A reply with weight 0 carries no loss, nor does one of which a part has `train: false`. Any
    other weight counts as 1. A refusal is what the model said where it said nothing else.
    """
    found = object_of(raw, what)
    word = found["role"] if "role" in found else found.get("from")
    said = found["content"] if "content" in found else found.get("value")
    role = _role(word, what)
    if word in _CALL_ROLES:
        calls = tuple(_calls(parsed_json(said), what))
        yield Message("assistant", "", _is_learned(found, what), tool_calls=calls)
        return
    parts = _parts(said, what)
    results = [part for part in parts if part.kind == "result"]
    yield from (Message("tool", part.text) for part in results)
    rest = [part for part in parts if part.kind != "result"]
    if results and not rest:
        return
    text = _text(rest)
    if role != "assistant":
        yield Message(role, text)
        return
    yield Message(
        role,
        text if text.strip() else text_of(found.get("refusal"), f"{what}: refusal"),
        _is_learned(found, what) and all(part.learned for part in rest),
        _thinking(found, rest, what),
        (*(call for part in rest for call in part.calls), *_own_calls(found, what)),
    )


def _role(word: object, what: str) -> Role:
    if word in _CALL_ROLES:
        return "assistant"
    return "tool" if word in _RESULT_ROLES else role_of(word, what)


def _is_learned(found: Mapping[str, Any], what: str) -> bool:
    for name in ("weight", "loss_weight"):
        weight = found.get(name)
        if not isinstance(weight, int | float | None):
            raise Unreadable(f"{what} has {name} {quoted(weight)}; it must be 0 or 1")
        if weight == 0:
            return False
    return _is_trained(found, what)


def _is_trained(found: Mapping[str, Any], what: str) -> bool:
    train = found.get("train")
    if not isinstance(train, bool | None):
        raise Unreadable(f"{what} has train {quoted(train)}; it must be true or false")
    return train is not False


def _thinking(found: Mapping[str, Any], parts: list[_Part], what: str) -> str:
    thoughts = [part.text for part in parts if part.kind == "thinking"]
    names = ("thinking", "reasoning_content", "reasoning")
    thoughts += [text_of(found.get(name), f"{what}: {name}") for name in names]
    return joined(list(dict.fromkeys(thoughts)))


def _own_calls(found: Mapping[str, Any], what: str) -> Iterator[Mapping[str, Any]]:
    """The calls that a message of OpenAI's has beside its content, and the old `function_call`."""
    for call in list_of(found.get("tool_calls"), f"{what}: tool_calls"):
        yield from _calls(call, what)
    if found.get("function_call") is not None:
        yield from _calls(found["function_call"], what)


def _calls(value: object, what: str) -> Iterator[Mapping[str, Any]]:
    """A call of a tool, or each of a list: `{"name", "arguments"}`, the arguments out of JSON."""
    if isinstance(value, list) and value:
        for call in value:
            yield from _calls(call, what)
        return
    call = value if isinstance(value, dict) else {}
    for name in ("function", "custom"):
        if isinstance(call.get(name), dict):
            call = call[name]
    if not (isinstance(call.get("name"), str) and call["name"].strip()):
        raise Unreadable(f"{what} has a tool call without a name: {quoted(value)}")
    arguments = call["arguments"] if "arguments" in call else call.get("input")
    yield {"name": call["name"], "arguments": parsed_json(arguments)}


@dataclass(frozen=True)
class _Part:
    """A part of a message's content that is text, thinking, calls or the result of a tool."""

    kind: Literal["text", "thinking", "calls", "result"]
    text: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()
    learned: bool = True
    is_piece: bool = False
    """Whether the text goes on with no blank line: Anthropic cuts a text where it cites."""


def _text(parts: Iterable[_Part]) -> str:
    texts = [part for part in parts if part.kind == "text"]
    if any(part.is_piece for part in texts):
        return "".join(part.text for part in texts)
    # A single text stays as it is, white space too.
    return joined([part.text for part in texts]) if len(texts) != 1 else texts[0].text


def _parts(content: object, what: str) -> list[_Part]:
    """The parts of a content; those of other kinds, such as images, say nothing and are left out.

    A text is one part, null is none.
    """
    if content is None:
        return []
    if isinstance(content, str):
        return [_Part("text", content)]
    if not isinstance(content, list):
        raise Unreadable(f"{what} has content that is neither a text nor a list of parts")
    found = (_part(part, f"{what}, part {index}") for index, part in enumerate(content))
    return [part for part in found if part is not None]


def _part(raw: object, what: str) -> _Part | None:
    if isinstance(raw, str):
        return _Part("text", raw)
    part = object_of(raw, what)
    kind = part.get("type", "text")
    if not isinstance(kind, str):
        raise Unreadable(f"{what} has type {quoted(kind)}; it must be a word such as 'text'")
    if kind in _TEXT_PARTS:
        text = text_of(_first_of(part, _TEXT_KEYS, what), what)
        is_piece = bool(part.get("citations"))
        return _Part("text", text, learned=_is_trained(part, what), is_piece=is_piece)
    if kind == "refusal":
        return _Part("text", text_of(part.get("refusal"), what))
    if kind in _THINKING_PARTS:
        thought = _first_of(part, (*_THINKING_PARTS, *_TEXT_KEYS), what)
        return _Part("thinking", _text(_parts(thought, what)))
    if kind in _CALL_PARTS:
        return _Part("calls", calls=tuple(_calls(raw, what)))
    if kind == "tool_call":
        return _Part(
            "calls", calls=tuple(_calls(parsed_json(_first_of(part, _TEXT_KEYS, what)), what))
        )
    if kind == "tool_result":
        return _Part("result", _text(_parts(part.get("content"), what)))
    return None


def _first_of(part: Mapping[str, Any], names: Iterable[str], what: str) -> Any:
    """The value of the first of the keys `names` that the part has."""
    for name in names:
        if name in part:
            return part[name]
    raise Unreadable(f"{what} has none of the keys {', '.join(names)}")
