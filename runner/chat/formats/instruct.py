"""Instruction data: `{"instruction", "output"}`, `input` joined to the instruction.

Dialects: `question` for instruction; `context` for input; `response` or `answer` for output;
`{"input", "output"}` alone. Alpaca's `system` and `history` (`[[question, answer], …]`, whose
answers are learned) come before; its `text` is the same once more and is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runner.chat.conversation import Content, Message
from runner.chat.formats import turns
from runner.chat.formats.reading import Options, Unreadable, list_of, text_of

_ASKED = ("instruction", "question")
_MORE = ("input", "context")
_ANSWERED = ("output", "response", "answer")


def claims(record: Mapping[str, Any]) -> bool:
    if "instruction" in record or "question" in record:
        fits = any(name in record for name in _ANSWERED)
    else:
        fits = "input" in record and "output" in record
    return fits and turns.label_name(record) is None


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    answer = Message("assistant", wanted(record, _only(record, _ANSWERED)))
    metadata = turns.metadata(record, "category", "source", "subset")
    yield Content((*asked(record), answer), metadata=metadata)


def asked(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """All that comes before the answer: system, history, and the instruction with its input."""
    is_alone = not any(name in record for name in _ASKED)
    instruction = wanted(record, "input" if is_alone else _only(record, _ASKED))
    name = "context" if is_alone else _only(record, _MORE)
    more = text_of(record.get(name), name)
    question = f"{instruction}\n\n{more}" if more.strip() else instruction
    return (*turns.system(record), *_history(record), Message("user", question))


def wanted(record: Mapping[str, Any], name: str) -> str:
    """The text under a key; raises Unreadable where it says nothing."""
    text = record.get(name)
    if not (isinstance(text, str) and text.strip()):
        raise Unreadable(f"{name} must be a text that is not empty")
    return text


def _only(record: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The one of several names for the same thing that the record has."""
    found = [name for name in names if record.get(name) is not None]
    if len(found) > 1:
        raise Unreadable(f"has {' and '.join(found)}, which mean the same; keep one of them")
    return (found or [name for name in names if name in record] or list(names))[0]


def _history(record: Mapping[str, Any]) -> Iterator[Message]:
    for turn in list_of(record.get("history"), "history"):
        if not (isinstance(turn, list) and [type(text) for text in turn] == [str, str]):
            raise Unreadable("history must be a list of [question, answer]")
        yield Message("user", turn[0])
        yield Message("assistant", turn[1])
