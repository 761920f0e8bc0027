"""Cuts conversations into the windows that are trained, as chains: spans and weights, no copies.

All windows of a conversation that start at the same turn share one pass through the model, in
which the loss of each reply has a weight; this gives the gradient of the separate windows, for a
causal model whose positions start at 0. A chain therefore names the conversation, the message it
starts from, and the weight of each reply. Turns are messages; a pair is a user turn and its reply.
Documents and preferences are no conversations in this sense: they are counted, and make no windows.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, groupby, repeat
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from runner.chat import known
from runner.chat.conversation import replies
from runner.errors import RunnerError
from runner.stages.stage import Dirs, Metrics, Stage

PREFERENCE = frozenset(("chosen", "rejected", "label"))
"""A record with one of these compares or judges replies; it says nothing of which to learn."""
COUNTS = ("conversations", "windows", "chains", "without_reply", "preferences", "documents")
USE = (
    "a document is text to train on as it is (pretraining), and a preference says which of two "
    "replies is better, or whether one is good (DPO, KTO)"
)

MAX_WEIGHTS = 5_000_000
"""Of one conversation; some 60 MB of chains.jsonl."""

Turns = Annotated[int, Field(ge=2, le=10_000, multiple_of=2)]


class Window(Stage):
    """Cut conversations into the windows to train on."""

    stage: Literal["window"]
    mode: Literal["instruct", "conversational"] = "instruct"
    """instruct: a user message and the next reply; conversational: also longer stretches."""
    pairs: bool = True
    """conversational: windows of one user message and its reply."""
    expanding: bool = True
    """conversational: windows from the first turn to each reply (2 turns, then 4, 6, …)."""
    sliding_turns: tuple[Turns, ...] = (8,)
    """conversational: windows of these fixed numbers of turns, one from each user message."""
    loss: Literal["last_reply", "every_reply"] = "last_reply"
    """Which replies of a window are learned."""
    duplicates: Literal["one", "count"] = "one"
    """one: a window found in two ways is trained once; count: as often as it was found."""

    reads = ("conversations",)
    writes = "chains"
    shows: ClassVar[Mapping[str, str]] = {"": "chains.jsonl"}

    @model_validator(mode="after")
    def _makes_windows(self) -> Window:
        longer = {"pairs", "expanding", "sliding_turns"} & self.model_fields_set
        if self.mode == "instruct" and longer:
            names = " and ".join(sorted(longer))
            raise ValueError(f"has {names}, but mode is instruct; add `mode: conversational`")
        kinds = self.pairs or self.expanding or self.sliding_turns
        if self.mode == "conversational" and not kinds:
            raise ValueError("makes no windows; leave pairs or expanding on, or give sliding_turns")
        return self

    def run(self, dirs: Dirs) -> Metrics:
        instruct = self.mode == "instruct"
        cut = partial(
            chains,
            pairs=instruct or self.pairs,
            expanding=not instruct and self.expanding,
            sliding_turns=() if instruct else self.sliding_turns,
            every_reply=self.loss == "every_reply",
            once=self.duplicates == "one",
        )
        with known.lines(
            known.index_of(dirs.cache, self.kind(), self.name, dirs.recipe),
            known.identity(self.model_dump(mode="json"), self.version, self.libraries),
            dirs.previous / "chains.jsonl" if dirs.previous else None,
        ) as before:
            counts = write(
                dirs.inputs["conversations"] / "conversations.jsonl",
                before,
                cut,
                dirs.output / "chains.jsonl",
            )
        if (others := counts["preferences"] + counts["documents"]) and counts["conversations"]:
            makes = "makes" if others == 1 else "make"
            dirs.emit({"event": "warning", "text": f"{_others(counts)} {makes} no windows: {USE}"})
        if others and not counts["conversations"]:
            raise RunnerError(
                f"window: there is no conversation, only {_others(counts)}",
                hint=f"{USE}; add conversations to the sources, or leave window out",
            )
        if not counts["chains"]:
            raise RunnerError(
                f"window: no reply to learn from in {counts['conversations']} conversations",
                hint="training needs a user message that is followed by an assistant's reply",
            )
        return {name: counts[name] for name in COUNTS}


def write(
    conversations: Path,
    before: known.Lines,
    cut: Callable[..., Iterator[dict[str, Any]]],
    output: Path,
) -> Counter[str]:
    """Writes the chains of all conversations, of those that are as they were the same bytes again;
    the counts. `cut` is `chains` with its settings.
    """
    counts: Counter[str] = Counter()
    start = 0
    with output.open("wb") as out:
        for line in known.read(conversations):
            key = known.key_of(line)
            found, made = before.found(key), before.made(key)
            if found is None or made is None:
                own: Counter[str] = Counter()
                made = b"".join(_line(chain) for chain in cut([json.loads(line)], counts=own))
                found = json.dumps([own[name] for name in COUNTS], separators=(",", ":")).encode()
            before.note(key, found, start, made)
            start += out.write(made)
            for name, count in zip(COUNTS, json.loads(found.decode()), strict=True):
                counts[name] += count
    return counts


def chains(
    conversations: Iterable[Mapping[str, Any]],
    *,
    pairs: bool,
    expanding: bool,
    sliding_turns: Sequence[int],
    every_reply: bool,
    once: bool,
    counts: Counter[str],
) -> Iterator[dict[str, Any]]:
    """The chains of each conversation; `counts`, by the names in `COUNTS`, grow on the way."""
    for conversation in conversations:
        if "text" in conversation:
            counts["documents"] += 1
            continue
        if not PREFERENCE.isdisjoint(conversation):
            counts["preferences"] += 1
            continue
        exchanges = replies(conversation["messages"])
        counts["conversations"] += 1
        counts["without_reply"] += not exchanges
        found = windows(len(exchanges), pairs, expanding, sliding_turns)
        spans = sorted(set(found)) if once else sorted(found)
        counts["windows"] += len(spans)
        if every_reply and (count := _weights(spans)) > MAX_WEIGHTS:
            raise _too_many(conversation, len(exchanges), count)
        for _, together in groupby(spans, key=itemgetter(0)):  # one chain in memory at a time
            for first, weights in merged(together, every_reply).items():
                counts["chains"] += 1
                yield {
                    "conversation": conversation["id"],
                    "first": exchanges[first][0],
                    "weights": {str(exchanges[pair][1]): w for pair, w in sorted(weights.items())},
                }


def windows(
    pairs_count: int, pairs: bool, expanding: bool, sliding_turns: Sequence[int]
) -> list[tuple[int, int]]:
    """Each window of a conversation of `pairs_count` pairs as (first pair, last pair)."""
    spans: list[tuple[int, int]] = []
    if pairs:
        spans += [(pair, pair) for pair in range(pairs_count)]
    if expanding:
        spans += [(0, pair) for pair in range(pairs_count)]
    for turns in sliding_turns:
        width = turns // 2
        spans += [(first, first + width - 1) for first in range(pairs_count - width + 1)]
    return spans


def merged(spans: Iterable[tuple[int, int]], every_reply: bool) -> dict[int, dict[int, int]]:
    """Windows that start at one pair as one chain: first pair → {pair: weight of its reply}."""
    ends: dict[int, Counter[int]] = defaultdict(Counter)
    for first, last in spans:
        ends[first][last] += 1
    if not every_reply:
        return {first: dict(lasts) for first, lasts in ends.items()}
    found: dict[int, dict[int, int]] = {}
    for first, lasts in ends.items():
        pairs = range(
            max(lasts), first - 1, -1
        )  # a reply is in all windows that end at or after it
        found[first] = dict(zip(pairs, accumulate(lasts[pair] for pair in pairs), strict=True))
    return found


def parted(chain: Mapping[str, Any], every_reply: bool) -> Iterator[tuple[int, list[int]]]:
    """The windows that were merged into a chain, as (last message, replies that are learned).

    A window that was counted several times comes as often.
    """
    weights = {int(reply): weight for reply, weight in chain["weights"].items()}
    ends = sorted(weights)
    for place, last in enumerate(ends):
        further = weights[ends[place + 1]] if every_reply and last != ends[-1] else 0
        if times := weights[last] - further:
            learned = ends[: place + 1] if every_reply else [last]
            yield from repeat((last, learned), times)


def stretch(
    conversation: Mapping[str, Any], first: int, last: int, learned: Iterable[int]
) -> dict[str, Any]:
    """A window as a conversation of its own: messages `first` to `last` behind the leading system
    message, with weight 0 for the replies that it does not learn.
    """
    messages = conversation["messages"]
    found = list(messages[:1]) if first > 0 and messages[0]["role"] == "system" else []
    trained = set(learned)
    for index in range(first, last + 1):
        message = messages[index]
        if message["role"] == "assistant":
            plain = {name: value for name, value in message.items() if name != "weight"}
            message = plain if index in trained else {**plain, "weight": 0}
        found.append(message)
    tools = {"tools": conversation["tools"]} if conversation.get("tools") else {}
    return {"messages": found, **tools}


def _line(chain: Mapping[str, Any]) -> bytes:
    return json.dumps(chain, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _weights(spans: Iterable[tuple[int, int]]) -> int:
    """How many weights the chains of these windows have where every reply is learned."""
    lasts: dict[int, int] = {}
    for first, last in spans:
        lasts[first] = max(last, lasts.get(first, last))
    return sum(last - first + 1 for first, last in lasts.items())


def _too_many(conversation: Mapping[str, Any], replies: int, count: int) -> RunnerError:
    source = conversation["source"]
    return RunnerError(
        f"window: conversation {conversation['id']} ({source['path']}, record {source['index']}) "
        f"has {replies:,} replies, and its windows would give {count:,} weights; "
        f"at most {MAX_WEIGHTS:,} are possible",
        hint="with `loss: every_reply` each window weighs all of its replies: set smaller "
        "`sliding_turns`, or `loss: last_reply`",
    )


def _others(counts: Mapping[str, int]) -> str:
    """`1 document and 3 preferences`, as far as there are some."""
    found = [(counts[name], name) for name in ("documents", "preferences") if counts[name]]
    return " and ".join(f"{n} {name.removesuffix('s') if n == 1 else name}" for n, name in found)
