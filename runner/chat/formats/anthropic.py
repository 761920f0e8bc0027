"""Anthropic's Messages API: requests, responses, and logs of `{"request", "response"}`.

A request's messages are read like OpenAI's. What tells them apart: `system` beside the messages,
blocks and keys that only Anthropic has. A request that ends with an assistant message asks the
model to go on with it: such a beginning carries no loss by itself, nor does a response that was cut
off by `max_tokens`. A record with neither `max_tokens` nor a Claude as `model` is no request but a
data set in that shape (as for fine-tuning on Bedrock), whose last reply is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from runner.chat.conversation import Content, Message
from runner.chat.formats import turns
from runner.chat.formats.reading import Options, Unreadable, list_of

_BLOCKS = {
    "tool_use",
    "tool_result",
    "thinking",
    "redacted_thinking",
    "server_tool_use",
    "mcp_tool_use",
}
_KEYS = {"anthropic_version", "anthropic_beta", "stop_sequences"}


def claims(record: Mapping[str, Any]) -> bool:
    fits = _is_response(record) or _is_log(record) or _is_request(record)
    return fits and not turns.is_preference(record)


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    if _is_response(record):
        yield Content(tuple(_response(record)))
    elif _is_log(record):
        asked = _request(record["request"], is_answered=True)
        answered = list(_response(record["response"]))
        yield replace(asked, messages=_answered(asked.messages, answered))
    else:
        yield _request(record, is_answered=False)


def _is_response(record: Mapping[str, Any]) -> bool:
    return record.get("type") == "message" and record.get("role") == "assistant"


def _is_log(record: Mapping[str, Any]) -> bool:
    asked, answered = record.get("request"), record.get("response")
    return (
        isinstance(asked, dict)
        and isinstance(answered, dict)
        and turns.list_with(asked, "role") == "messages"
        and answered.get("type") in ("message", "error")
    )


def _is_request(record: Mapping[str, Any]) -> bool:
    if turns.list_with(record, "role") != "messages":
        return False
    said = [turn for turn in record["messages"] if isinstance(turn, dict)]
    if any(turn.get("role") == "system" for turn in said):
        return False
    if isinstance(record.get("system"), str | list) or record.keys() & _KEYS:
        return True
    contents = [turn["content"] for turn in said if isinstance(turn.get("content"), list)]
    if any(_is_block(part) for content in contents for part in content):
        return True
    tools = record.get("tools")
    return isinstance(tools, list) and any(
        isinstance(tool, dict) and "input_schema" in tool for tool in tools
    )


def _is_block(part: object) -> bool:
    """Whether a part of a content is of a kind that only Anthropic has."""
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    has_source = kind in ("image", "document") and isinstance(part.get("source"), dict)
    return has_source or (isinstance(kind, str) and kind in _BLOCKS)


def _request(record: Mapping[str, Any], *, is_answered: bool) -> Content:
    found = turns.conversation(record, "messages")
    *before, last = found.messages or (Message("user", ""),)
    is_prefill = last.role == "assistant" and not last.tool_calls and not is_answered
    if is_prefill and _was_sent(record):
        return replace(found, messages=(*before, replace(last, learned=False)))
    return found


def _was_sent(record: Mapping[str, Any]) -> bool:
    """Whether a record is a request to the API, and not an example of a data set."""
    return "max_tokens" in record or "claude" in str(record.get("model")).lower()


def _response(record: Mapping[str, Any]) -> Iterator[Message]:
    if record.get("type") == "error":
        raise Unreadable("the response is an error, so the request has no answer")
    list_of(record.get("content"), "content of the response")
    is_cut = record.get("stop_reason") == "max_tokens"
    for said in turns.message({**record, "role": "assistant"}, "the response"):
        yield replace(said, learned=said.learned and not is_cut)


def _answered(asked: tuple[Message, ...], answered: list[Message]) -> tuple[Message, ...]:
    """Messages and the answer, which goes on in the text of a last assistant message."""
    last = asked[-1] if asked else None
    if last is None or last.role != "assistant" or not last.content or not answered:
        return (*asked, *answered)
    first = replace(answered[0], content=last.content + answered[0].content)
    return (*asked[:-1], first, *answered[1:])
