"""Preferences: a prompt with a better and a worse answer (DPO), or a reply with a label (KTO).

The prompt is `prompt`, a list of messages, or an instruction or question; where there is none, it
is what the two answers begin with. The answers are texts, a message, or lists of messages under
`chosen` and `rejected` or another pair of names (turns.py); `left_answer` and `right_answer` are
told apart by `result`. A label of true says that the conversation's last reply is a good one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from runner.chat.conversation import Content, Message, Role
from runner.chat.formats import anthropic, instruct, messages, prompt_completion, sharegpt, turns
from runner.chat.formats.reading import Options, Unreadable
from runner.chat.json_parser import quoted

Messages = tuple[Message, ...]
_Each = Callable[[Mapping[str, Any], Options], Iterator[Content]]

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def claims(record: Mapping[str, Any]) -> bool:
    if turns.pair(record) is not None:
        return True
    return turns.label_name(record) is not None and _reader(_without_label(record)) is not None


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    if (names := turns.pair(record)) is not None:
        yield _compared(record, *_by_result(record, names))
    else:
        yield from _labelled(record, options)


def _labelled(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    name = turns.label_name(record)
    plain = _without_label(record)
    read = _reader(plain)
    assert name is not None, "is claimed"
    assert read is not None, "is claimed"
    if not isinstance(record[name], bool | int | float):
        raise Unreadable(f"{name} must be true or false, not {quoted(record[name])}")
    for content in read(plain, options):
        spoken = [said for said in content.messages if not said.says_nothing]
        if not spoken or spoken[-1].role != "assistant":
            raise Unreadable(f"must end with the reply that {name} is about")
        yield replace(content, label=bool(record[name]))


def _without_label(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in record.items() if name not in turns.LABELS}


def _reader(record: Mapping[str, Any]) -> _Each | None:
    """What reads a record of which only the label made it a preference."""
    readers: list[tuple[Callable[[Mapping[str, Any]], bool], _Each]] = [
        (known.claims, known.each)
        for known in (messages, anthropic, sharegpt, prompt_completion, instruct)
    ]
    return next((each for claims, each in readers if claims(record)), None)


def _by_result(record: Mapping[str, Any], names: tuple[str, str]) -> tuple[str, str]:
    """The names of the better and the worse answer, where `result` says which."""
    left, right = names
    if left != "left_answer":
        return names
    result = record.get("result")
    if result not in ("left", "right"):
        raise Unreadable(f"result is {quoted(result)}, so neither answer is the better one")
    return (left, right) if result == "left" else (right, left)


def _compared(record: Mapping[str, Any], better: str, worse: str) -> Content:
    asked = _prompt(record)
    chosen, rejected = (_whole(record, name, asked) for name in (better, worse))
    if _said(chosen) == _said(rejected):
        raise Unreadable(f"{better} and {worse} say the same, so neither is the better one")
    # What both begin with is the prompt, where it is not written out or not the whole of it.
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if all(said.says_nothing for said in chosen[:shared]):
        raise Unreadable(f"has no prompt, and {better} and {worse} do not begin with the same one")
    for name, side in ((better, chosen[shared:]), (worse, rejected[shared:])):
        _check_reply(name, [said for said in side if not said.says_nothing])
    return Content(
        chosen[:shared],
        tools=turns.tools(record),
        metadata=turns.metadata(record),
        chosen=chosen[shared:],
        rejected=rejected[shared:],
    )


def _said(side: Messages) -> list[object]:
    return [(said.role, said.content.strip(), said.tool_calls) for said in side]


def _check_reply(name: str, side: list[Message]) -> None:
    if not side:
        raise Unreadable(f"{name} is empty")
    for place, said in (("begins", side[0]), ("ends", side[-1])):
        if said.role != "assistant":
            raise Unreadable(f"{name} {place} with role {said.role!r}; it must be a reply")


def _prompt(record: Mapping[str, Any]) -> Messages:
    """The messages before the answers; none where the answers begin with them."""
    name = turns.list_with(record, "role") or turns.list_with(record, "from", "value")
    asked = record.get("input")
    if record.get("prompt") is not None:
        if isinstance(record["prompt"], list):
            found = turns.messages(record, "prompt")
        else:
            text = instruct.wanted(record, "prompt")
            found = _transcript(text) or (Message("user", text),)
    elif name is not None:
        found = turns.messages(record, name)
    elif isinstance(asked, dict) and "messages" in asked:
        found = turns.messages(asked, "messages")
    elif record.keys() & {"instruction", "question"}:
        return instruct.asked(record)
    else:
        found = ()
    return (*turns.system(record), *found)


def _whole(record: Mapping[str, Any], name: str, asked: Messages) -> Messages:
    """The prompt and an answer, which may begin with the prompt itself."""
    value = record[name]
    if isinstance(value, str):
        answer = () if asked else _transcript(value)
        return answer or (*asked, Message("assistant", value))
    if not isinstance(value, list | dict):
        raise Unreadable(
            f"{name} must be a text, a message or a list of messages, not {quoted(value)}"
        )
    alone = {**record, name: [value]} if isinstance(value, dict) else record
    answer = turns.messages(alone, name)
    spoken = tuple(said for said in asked if said.role != "system")
    for start in (asked, spoken):
        if start and answer[: len(start)] == start:
            answer = answer[len(start) :]
            break
    return (*asked, *answer)


def _transcript(text: str) -> Messages:
    """The messages of a text such as "Human: …", a blank line, "Assistant: …", as of hh-rlhf."""
    if not text.lstrip("\n").startswith("Human:"):
        return ()
    _, *cut = _SPEAKER.split(text.strip())
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    said = (
        Message(roles[who], what.strip()) for who, what in zip(cut[::2], cut[1::2], strict=True)
    )
    return tuple(message for message in said if not message.says_nothing)
