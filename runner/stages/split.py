"""Marks each chain as train or eval, so that nothing like what is measured on was ever trained.

A conversation has a place on a circle: a hash of its opening exchange, or of its group where it is
one of several branches. So a chat that has grown since, and branches that part later, fall where
they fell before, whatever else there is. Conversations that belong together are joined first: the
same place, group, content or long exchange, and near duplicates. What is joined is kept for eval
only if each of its conversations lies below `eval_fraction`: what is near to something trained is
trained, and so new data can never turn what was trained into eval.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from runner.chat import known, near
from runner.chat.conversation import replies
from runner.errors import RunnerError
from runner.stages.stage import Dirs, Metrics, Stage

LONG_EXCHANGE = 200
"""Characters from which on an exchange that two conversations share is no chance."""
FEW = 5
"""Fewer conversations than this give a noisy eval loss."""

_CHAIN = b'{"conversation":"'
_MARK = b',"split":"%b"}\n'
"""How the line of a chain begins, and how it ends when it is marked."""

SHARED = {
    "content": "are exact repeats",
    "group": "are branches of one conversation",
    "opening": "open with the same exchange",
    "exchange": f"share an exchange of {LONG_EXCHANGE} characters or more",
    "near": "are near duplicates, or joined by some",
}
"""Why two conversations belong together, in words."""


class Split(Stage):
    """Set conversations aside to measure on; what belongs together stays on one side."""

    stage: Literal["split"]
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """The share of conversations that is kept out of training and measured on."""
    near_duplicates: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Conversations that share this much of their runs of words stay on one side; 1: all words."""

    version = 2
    libraries = ("rensa",)
    reads = ("chains", "conversations")
    writes = "split"
    shows: ClassVar[Mapping[str, str]] = {"": "chains.jsonl"}

    def run(self, dirs: Dirs) -> Metrics:
        chains = dirs.inputs["chains"] / "chains.jsonl"
        conversations = dirs.inputs["conversations"] / "conversations.jsonl"
        marked = dirs.output / "chains.jsonl"
        ids = {_id(chain, _CHAIN) for chain in known.read(chains)}
        if not self.eval_fraction:
            return _counts(_mark(chains, marked, set()), ids, set())
        with known.lines(
            known.index_of(dirs.cache, self.kind(), self.name, dirs.recipe),
            known.identity(self.model_dump(mode="json"), self.version, self.libraries),
            dirs.previous / "chains.jsonl" if dirs.previous else None,
        ) as before:
            members, joined = belonging(conversations, ids, self.near_duplicates, before)
        groups = together(members, joined)
        held_out = eval_set(groups, self.eval_fraction)
        sides = _mark(chains, marked, held_out)
        refuse_leaks(marked, members, joined)
        for text in doubts(groups, held_out, self.eval_fraction):
            dirs.emit({"event": "warning", "text": text})
        near_duplicates = sum(content(id) != content(first) for id, first in joined.items())
        counts = _counts(sides, ids - held_out, held_out)
        return {**counts, "components": len(groups), "near_duplicates": near_duplicates}


@dataclass(frozen=True)
class Member:
    """What decides a conversation's side: its own place from 0 to 1, and what joins it to others.

    `marks` are `kind:hash`, with the kinds of `SHARED`; `where` is how messages name it.
    """

    id: str
    where: str
    place: float
    marks: tuple[str, ...]


def member(conversation: Mapping[str, Any]) -> Member:
    """The conversation's place and marks, from its record alone."""
    id, source = conversation["id"], conversation["source"]
    messages = conversation["messages"]
    said = [_exchange(messages, *pair) for pair in _exchanges(messages)]
    marks = [f"content:{content(id)}"]
    if said:
        marks.insert(0, f"opening:{_hash(said[0])}")
    if conversation.get("group"):
        marks.insert(0, f"group:{_hash(conversation['group'])}")
    place = int(_hash(f"split:{marks[0]}"), 16) / 2**64
    long = {f"exchange:{_hash(text)}" for text in said if len(text) >= LONG_EXCHANGE}
    where = f"{id} ({source['path']}, record {source['index']})"
    return Member(id, where, place, (*marks, *sorted(long)))


def words(conversation: Mapping[str, Any]) -> str:
    """What the people and the model said, by which near duplicates are found. System messages and
    results of tools do not count: they are often the same in conversations that are not.
    """
    said = (m["content"] for m in conversation["messages"] if m["role"] in ("user", "assistant"))
    return "\n".join(said)


def content(conversation: str) -> str:
    """The part of an id that exact repeats of a conversation share."""
    return conversation.partition("~")[0]


def together(members: Sequence[Member], joined: Mapping[str, str]) -> list[list[Member]]:
    """The conversations in groups that may not be parted. `joined`: id → the first near to it."""
    groups = near.Joined()
    first: dict[str, int] = {}
    for number, one in enumerate(members):
        for mark in (*one.marks, f"near:{joined.get(one.id, one.id)}"):
            groups.join(number, first.setdefault(mark, number))
    found: dict[int, list[Member]] = defaultdict(list)
    for number, one in enumerate(members):
        found[groups.first(number)].append(one)
    return list(found.values())


def eval_set(groups: Iterable[Sequence[Member]], eval_fraction: float) -> set[str]:
    """The ids of the groups that lie below `eval_fraction` with all of their conversations.

    Where there are two groups or more, at least one: the lowest of those that are no more than half
    of everything; but never all: the highest is trained.
    """
    by_height = sorted(groups, key=_height)
    if not eval_fraction or len(by_height) < 2:
        return set()
    below = [group for group in by_height if _height(group) < eval_fraction]
    if not below:
        half = sum(map(len, by_height)) / 2
        below = [next(group for group in by_height if len(group) <= half)]
    elif len(below) == len(by_height):
        below.pop()
    return {one.id for group in below for one in group}


def refuse_leaks(chains: Path, members: Sequence[Member], joined: Mapping[str, str]) -> None:
    """Raises when a split that was written has what belongs together on both sides.

    It looks at each mark by itself, and so at none of the decisions that made the split.
    """
    sides: dict[str, str] = {}
    for line in known.read(chains):
        id, side = _id(line, _CHAIN), _side(line)
        if sides.setdefault(id, side) != side:
            raise _leak(f"conversation {id} is in train and in eval")
    seen: dict[str, Member] = {}
    for one in members:
        for mark in (*one.marks, f"near:{joined[one.id]}"):
            other = seen.setdefault(mark, one)
            if sides[other.id] != sides[one.id]:
                trained, held = sorted((one, other), key=lambda m: sides[m.id], reverse=True)
                raise _leak(
                    f"conversation {trained.where} is in train and {held.where} in eval, but they "
                    + SHARED[mark.partition(":")[0]]
                )


def doubts(
    groups: Sequence[Sequence[Member]], held_out: set[str], eval_fraction: float
) -> Iterator[str]:
    """What a user should know of the split: too few for eval, or not the share that was asked."""
    sizes = [len(group) for group in groups]
    total, kept = sum(sizes), len(held_out)
    if total > 1 and len(groups) == 1:
        yield (
            f"no conversation is kept for eval: all {total} belong together, because they "
            f"{_reasons(groups[0])}; add other conversations"
        )
    elif total == 1:
        yield "the only conversation is trained, and none is kept for eval; add others"
    elif kept < FEW and eval_fraction * total < 2 * FEW:
        yield (
            f"{kept} of {total} conversations are kept for eval: its loss will be noisy, and with "
            "one or two more data may choose others; more conversations would help"
        )
    elif not eval_fraction / 2 <= kept / total <= eval_fraction * 2:
        size, largest = max(zip(sizes, groups, strict=True), key=lambda pair: pair[0])
        why = "by chance"
        if size > 1:
            why = (
                "because those that belong together stay on one side; the largest group has "
                f"{size}, which {_reasons(largest)}"
            )
        yield (
            f"{kept} of {total} conversations ({kept / total:.1%}) are kept for eval, where "
            f"{eval_fraction:.1%} was asked, {why}"
        )


def _reasons(group: Sequence[Member]) -> str:
    """Why most of a group belongs together, the most frequent reason first."""
    by_mark = Counter(mark for one in group for mark in one.marks)
    joins: Counter[str] = Counter()
    for mark, count in by_mark.items():
        joins[mark.partition(":")[0]] += count - 1
    frequent = [kind for kind, count in joins.most_common() if 2 * count >= len(group)]
    return " and ".join(SHARED[kind] for kind in frequent) or SHARED["near"]


def belonging(
    conversations: Path, ids: Iterable[str], near_duplicates: float, before: known.Lines
) -> tuple[list[Member], dict[str, str]]:
    """The conversations of those ids, and for each id the first one that it is a near duplicate
    of. Memory never holds the texts.
    """
    wanted = set(ids)
    members: list[Member] = []

    def said() -> Iterator[tuple[str, near.Read]]:
        for line in known.read(conversations):
            if _id(line, b'{"id":"') not in wanted:
                continue
            key = known.key_of(line)
            found = before.found(key)
            if found is None:
                found = _found(json.loads(line), near_duplicates)
            before.note(key, found)
            id, where, place, marks, read = json.loads(found.decode())
            members.append(Member(id, where, place, tuple(marks)))
            yield id, near.Read.of(read)

    joined = near.grouped(said(), near_duplicates)
    return members, joined


def _found(conversation: Mapping[str, Any], near_duplicates: float) -> bytes:
    """The fields of its `Member`, and what `near` reads of it."""
    read = near.read(words(conversation), near_duplicates)
    fields = [*vars(member(conversation)).values(), read.plain()]
    return json.dumps(fields, separators=(",", ":")).encode()


def _mark(chains: Path, marked: Path, held_out: set[str]) -> Counter[str]:
    """Writes the chains with their sides; how many are on each."""
    counts: Counter[str] = Counter(train=0, eval=0)
    with marked.open("wb") as out:
        for line in known.read(chains):
            side = "eval" if _id(line, _CHAIN) in held_out else "train"
            counts[side] += 1
            out.write(line[: line.rindex(b"}")] + _MARK % side.encode())
    return counts


def _side(line: bytes) -> str:
    """The side with which a chain that was marked ends."""
    for side in ("train", "eval"):
        if line.endswith(_MARK % side.encode()):
            return side
    raise _leak(f"a chain is on no side: {line[-40:]!r}")


def _id(line: bytes, begin: bytes) -> str:
    """The id with which the line begins, without reading what follows."""
    if not line.startswith(begin):
        raise ValueError(f"a line begins with {line[:20]!r}, not with {begin!r}")
    return line[len(begin) : line.index(b'"', len(begin))].decode()


def _counts(chains: Mapping[str, int], train: Set[str], held_out: Set[str]) -> Metrics:
    return {
        "train_conversations": len(train),
        "eval_conversations": len(held_out),
        "train_chains": chains["train"],
        "eval_chains": chains["eval"],
    }


def _height(group: Sequence[Member]) -> float:
    return max(one.place for one in group)


def _exchanges(messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """As `replies`, but what is said counts also where it carries no loss."""
    if any("weight" in message for message in messages):
        messages = [{**message, "weight": 1} for message in messages]
    return replies(messages)


def _exchange(messages: Sequence[Mapping[str, Any]], asked: int, reply: int) -> str:
    """A user message and its reply; case and white space do not count."""
    question, answer = (
        " ".join(messages[index]["content"].casefold().split()) for index in (asked, reply)
    )
    return f"{question}\n{answer}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _leak(what: str) -> RunnerError:
    return RunnerError(
        f"split: {what}", hint="this is a fault of the runner: nothing was kept; please report it"
    )
