"""Conversations as records for other tools: OpenAI's `messages`, ShareGPT, alpaca.

`formats/` reads them back to the same messages, but for what a shape has no place for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Shape = Literal["messages", "sharegpt", "alpaca"]
Loss = Literal["no turns", "weights", "thinking", "tools"]

LOSSES: dict[Loss, str] = {
    "no turns": "left out, because alpaca has only questions and answers in turn, without tools",
    "weights": "earlier replies carry no loss here, but do in most tools that read this shape",
    "thinking": "the thinking before their replies is left out",
    "tools": "the descriptions of their tools are left out",
}
"""What a record of a shape does not say, in words that follow `3 windows:`."""

_FROM = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


@dataclass(frozen=True)
class Shaped:
    """A record, or None where the shape has no place for the conversation; and what it lacks."""

    record: dict[str, Any] | None
    lost: tuple[Loss, ...] = ()


def shaped(conversation: Mapping[str, Any], shape: Shape) -> Shaped:
    """A conversation (`messages`, perhaps `tools`, as ingest writes them) in another shape."""
    messages = conversation["messages"]
    tools = conversation.get("tools")
    if shape == "messages":
        record: dict[str, Any] = {"messages": list(_openai(messages))}
        return Shaped({**record, "tools": tools} if tools else record)
    lost: list[Loss] = []
    if any(message.get("weight") == 0 for message in messages):
        lost.append("weights")
    if any("thinking" in message for message in messages):
        lost.append("thinking")
    if shape == "sharegpt":
        return Shaped(_sharegpt(messages, tools), tuple(lost))
    found = _alpaca(messages)
    if found is None:
        return Shaped(None, ("no turns",))
    return Shaped(found, (*lost, "tools") if tools else tuple(lost))


def _openai(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Calls of tools get the ids that OpenAI wants; results answer them in turn."""
    waiting: list[str] = []
    for index, message in enumerate(messages):
        found = {"role": message["role"], "content": message["content"]}
        if "weight" in message:
            found["weight"] = message["weight"]
        if "thinking" in message:
            found["reasoning_content"] = message["thinking"]
        if "tool_calls" in message:
            waiting = [f"call_{index}_{number}" for number in range(len(message["tool_calls"]))]
            found["tool_calls"] = [
                {
                    "id": id,
                    "type": "function",
                    "function": {"name": call["name"], "arguments": _json(call.get("arguments"))},
                }
                for id, call in zip(waiting, message["tool_calls"], strict=True)
            ]
        if message["role"] == "tool" and waiting:
            found["tool_call_id"] = waiting.pop(0)
        yield found


def _sharegpt(messages: Sequence[Mapping[str, Any]], tools: Any) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if messages[0]["role"] == "system":
        record["system"] = messages[0]["content"]
        messages = messages[1:]
    record["conversations"] = [turn for message in messages for turn in _turns(message)]
    if tools:
        record["tools"] = _json(tools)
    return record


def _turns(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The message; its calls of tools are a turn of their own. A few tools know the weight."""
    weight = {"weight": message["weight"]} if "weight" in message else {}
    calls = [
        {"name": call["name"], "arguments": call.get("arguments")}
        for call in message.get("tool_calls", ())
    ]
    if message["content"].strip() or not calls:
        yield {"from": _FROM[message["role"]], "value": message["content"], **weight}
    if calls:
        value = _json(calls[0] if len(calls) == 1 else calls)
        yield {"from": "function_call", "value": value, **weight}


def _alpaca(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if system else messages
    roles = [message["role"] for message in turns]
    texts = [message["content"] for message in turns]
    in_turn = roles and roles == ["user", "assistant"] * (len(roles) // 2)
    if not in_turn or not all(map(str.strip, texts)) or any("tool_calls" in m for m in turns):
        return None
    *history, (instruction, output) = zip(texts[::2], texts[1::2], strict=True)
    record: dict[str, Any] = {"instruction": instruction, "input": "", "output": output}
    if system:
        record["system"] = system
    if history:
        record["history"] = [list(pair) for pair in history]
    return record


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
