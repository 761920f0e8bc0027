"""Cuts conversations into the windows that are trained, as chains: spans and weights, no copies.

All windows of a conversation that start at the same turn share one pass through the model, in
which the loss of each reply has a weight; this gives the gradient of the separate windows, for a
causal model whose positions start at 0. A chain therefore names the conversation, the message it
starts from, and the weight of each reply. Turns are messages; a pair is a user turn and its reply.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from runner.chat import jsonl
from runner.chat.conversation import replies
from runner.errors import RunnerError
from runner.stages.stage import Dirs, Metrics, Stage

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
        kinds = self.pairs or self.expanding or self.sliding_turns
        if self.mode == "conversational" and not kinds:
            raise ValueError("makes no windows; leave pairs or expanding on, or give sliding_turns")
        return self

    def run(self, dirs: Dirs) -> Metrics:
        instruct = self.mode == "instruct"
        counts = {"conversations": 0, "windows": 0, "chains": 0, "without_reply": 0}
        records = chains(
            jsonl.read(dirs.inputs["conversations"] / "conversations.jsonl"),
            pairs=instruct or self.pairs,
            expanding=not instruct and self.expanding,
            sliding_turns=() if instruct else self.sliding_turns,
            every_reply=self.loss == "every_reply",
            once=self.duplicates == "one",
            counts=counts,
        )
        jsonl.write(dirs.output / "chains.jsonl", records)
        if not counts["chains"]:
            raise RunnerError(
                f"window: no reply to learn from in {counts['conversations']} conversations",
                hint="training needs a user message that is followed by an assistant's reply",
            )
        return {**counts}


def chains(
    conversations: Iterable[Mapping[str, Any]],
    *,
    pairs: bool,
    expanding: bool,
    sliding_turns: Sequence[int],
    every_reply: bool,
    once: bool,
    counts: dict[str, int],
) -> Iterator[dict[str, Any]]:
    """The chains of each conversation; `counts` is added up on the way."""
    for conversation in conversations:
        exchanges = replies(conversation["messages"])
        counts["conversations"] += 1
        counts["without_reply"] += not exchanges
        found = windows(len(exchanges), pairs, expanding, sliding_turns)
        spans = sorted(set(found)) if once else sorted(found)
        counts["windows"] += len(spans)
        for first, weights in merged(spans, every_reply).items():
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
    found: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for first, last in spans:
        for pair in range(first, last + 1) if every_reply else (last,):
            found[first][pair] += 1
    return found
