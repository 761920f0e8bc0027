"""Marks each chain as train or eval, by a hash of its conversation, so that nothing ever moves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from runner.chat import jsonl
from runner.stages.stage import Dirs, Metrics, Stage


class Split(Stage):
    """Set conversations aside to measure on."""

    stage: Literal["split"]
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """The share of conversations that is kept out of training and measured on."""

    reads = ("chains",)
    writes = "split"
    shows: ClassVar[Mapping[str, str]] = {"": "chains.jsonl"}

    def run(self, dirs: Dirs) -> Metrics:
        source = dirs.inputs["chains"] / "chains.jsonl"
        contents = {content_hash(chain["conversation"]) for chain in jsonl.read(source)}
        held_out = eval_set(contents, self.eval_fraction)
        counts = {"train_chains": 0, "eval_chains": 0}

        def marked(chain: dict[str, object]) -> dict[str, object]:
            side = "eval" if content_hash(str(chain["conversation"])) in held_out else "train"
            counts[f"{side}_chains"] += 1
            return {**chain, "split": side}

        jsonl.write(dirs.output / "chains.jsonl", (marked(c) for c in jsonl.read(source)))
        if self.eval_fraction and len(held_out) < 5:
            text = (
                f"{len(held_out)} of {len(contents)} conversations are kept for eval: "
                "its loss will be noisy, and with one or two more data may choose others; "
                "more data or a larger eval_fraction would help"
            )
            dirs.emit({"event": "warning", "text": text})
        return {
            "train_conversations": len(contents) - len(held_out),
            "eval_conversations": len(held_out),
            **counts,
        }


def content_hash(conversation: str) -> str:
    """The part of an id that exact repeats of a conversation share."""
    return conversation.partition("~")[0]


def eval_set(contents: Iterable[str], eval_fraction: float) -> set[str]:
    """The conversations whose place on the hash circle lies below `eval_fraction`.

    At least one where there are two or more, but never all: the lowest, or all but the highest.
    """
    if not eval_fraction:
        return set()
    by_place = sorted(contents, key=_place)
    held_out = [content for content in by_place if _place(content) < eval_fraction]
    most = len(by_place) - 1
    return set((held_out or by_place[:1])[:most])


def _place(content: str) -> float:
    """A number from 0 to 1 that depends on the conversation alone."""
    digest = hashlib.sha256(f"split:{content}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
