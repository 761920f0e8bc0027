"""Cuts what a template renders at markers that stand in place of the contents.

Between the cuts are the literals, which the template writes; the slots at the cuts say how it puts
a content there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Message = Mapping[str, str]
Trim = Literal["keep", "newlines", "space"]

PAD = "\n \n"
"""White space to put around markers, to see what the template takes off."""
_SENTINEL = re.compile(r"Qz7(\d+)y([012])Zq")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_THINKS = "+thought"


@dataclass(frozen=True)
class Slot:
    """Where the template puts a content (`part` 0), or its thought (1) and its answer (2)."""

    message: int
    part: int
    left: Trim
    right: Trim
    space: str
    """A space that the template writes right before: words are tokens together with theirs."""


def shape(messages: Sequence[Message], thoughts: bool) -> tuple[str, ...]:
    """What a skeleton depends on: the roles, and where asked for, which replies begin with a
    thought, because templates that know thoughts move or drop them."""
    if not thoughts:
        return tuple([message["role"] for message in messages])
    return tuple(
        message["role"] + _THINKS
        if message["role"] == "assistant" and _THOUGHT.fullmatch(message["content"])
        else message["role"]
        for message in messages
    )


def role(name: str) -> str:
    """The role that a name in a shape stands for."""
    return name.removesuffix(_THINKS)


def is_reply(name: str) -> bool:
    return role(name) == "assistant"


def has_thought(name: str) -> bool:
    return name.endswith(_THINKS)


def marked(shape: tuple[str, ...], pad: str) -> list[Message]:
    """Messages of this shape with markers for contents, `pad` on both sides of each."""
    messages: list[Message] = []
    for index, name in enumerate(shape):
        whole, thought, answer = (f"{pad}Qz7{index}y{part}Zq{pad}" for part in range(3))
        if has_thought(name):
            whole = f"<think>\n{thought}\n</think>\n\n{answer}"
        messages.append({"role": role(name), "content": whole})
    return messages


def at_markers(rendered: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The literals between the markers, and the (message, part) of each marker."""
    literals: list[str] = []
    places: list[tuple[int, int]] = []
    end = 0
    for found in _SENTINEL.finditer(rendered):
        literals.append(rendered[end : found.start()])
        places.append((int(found[1]), int(found[2])))
        end = found.end()
    literals.append(rendered[end:])
    return literals, places


def trims(literals: Sequence[str], padded: Sequence[str]) -> dict[int, tuple[Trim, Trim]]:
    """Which white space the template takes off each content, seen on contents that are padded."""
    remains: tuple[tuple[Trim, str, str], ...] = (
        ("keep", PAD, PAD),
        ("newlines", PAD.rstrip("\n"), PAD.lstrip("\n")),
        ("space", "", ""),
    )
    lefts: list[Trim] = []
    rights: list[Trim] = []
    last = len(literals) - 1
    for place, (literal, found) in enumerate(zip(literals, padded, strict=True)):
        fits = [
            (right, left)
            for right, after, _ in (remains if place else remains[2:])
            for left, _, before in (remains if place < last else remains[2:])
            if found == after + literal + before
        ]
        right, left = fits[0] if fits else ("keep", "keep")
        rights.append(right)
        lefts.append(left)
    return {place: (lefts[place], rights[place + 1]) for place in range(last)}


def text(content: str, slot: Slot) -> str:
    """What the template writes of a content in this slot."""
    if slot.part:
        found = _THOUGHT.fullmatch(content)
        assert found, "a shape with thoughts is made from contents that have them"
        content = found[1].strip("\n") if slot.part == 1 else found[2].lstrip("\n")
    if slot.left != "keep":
        content = content.lstrip("\n" if slot.left == "newlines" else None)
    if slot.right != "keep":
        content = content.rstrip("\n" if slot.right == "newlines" else None)
    return slot.space + content if slot.space else content


def interleaved(literals: Sequence[str], texts: Sequence[str]) -> str:
    """The rendering again, with these texts in the slots."""
    parts = [literals[0]]
    for text, literal in zip(texts, literals[1:], strict=True):
        parts.append(text)
        parts.append(literal)
    return "".join(parts)
