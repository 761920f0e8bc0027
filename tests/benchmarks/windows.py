"""What windows cost that are trained as chains, beside the same windows as copies, in one run.

python -m tests.benchmarks.windows [--rounds 3]

One conversation of 10, 50 and 200 turns, with the windows that users ask for: expanding ones, and
all three kinds (pairs, expanding, sliding over 8 turns), each window once. Both sides go through
the same trainer, with all windows of the conversation in one step; the copies have one row for each
window. First it is asserted that both have the same gradient, then whole steps are timed in turn.
A tiny random model on a CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.chat import jsonl
from runner.model import load, lora, recovery, token_files, tokens
from runner.stages import window
from tests import tiny_models

TURNS = (10, 50, 200)
WORDS = {10: 24, 50: 8, 200: 3}
"""Of a message: the fewer turns, the longer messages, so that a step can be measured. A token is a
letter here."""
STEPS = 2
"""Of each training; the first warms up and is not counted."""
GRADIENTS_APART_MAX = 1e-5
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "head_dim": 16,
    "max_position_embeddings": 16384,
}
EXACT = torch.autocast("cpu", enabled=False)


@dataclass(frozen=True)
class Kinds:
    """Which windows are asked for, and how much faster chains should be for each of `TURNS`."""

    name: str
    pairs: bool
    expanding: bool
    sliding_turns: tuple[int, ...]
    goals: tuple[float, ...]


KINDS = (
    Kinds("expanding", False, True, (), (2.5, 10, 30)),
    Kinds("all three", True, True, (8,), (2.3, 3.3, 9)),
)


@dataclass(frozen=True)
class Side:
    """The same windows in one form, as a folder of token files."""

    folder: Path

    @property
    def rows(self) -> Sequence[token_files.Row]:
        return token_files.read(self.folder / "train.arrow")

    @property
    def tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = tiny_models.folder(root / "base", **SHAPE)
        for kinds in KINDS:
            for turns, goal in zip(TURNS, kinds.goals, strict=True):
                work = root / f"{kinds.name} {turns}"
                chains, copies = written(work, base, kinds, turns)
                apart = difference(gradient(base, chains.rows), gradient(base, copies.rows))
                assert apart <= GRADIENTS_APART_MAX, f"the gradients are {apart:.1e} apart"
                print(
                    f"{kinds.name}, {turns} turns: {len(copies.rows)} windows, "
                    f"{copies.tokens:,} tokens as copies, {chains.tokens:,} in "
                    f"{len(chains.rows)} chains ({copies.tokens / chains.tokens:.1f} × fewer); "
                    f"gradients {apart:.0e} apart",
                    flush=True,
                )
                ours, theirs = in_turn(base, (chains, copies), work, options.rounds)
                print(
                    f"  {compared(ours, theirs, goal)}; load {os.getloadavg()[0]:.1f}", flush=True
                )


def written(work: Path, base: Path, kinds: Kinds, turns: int) -> tuple[Side, Side]:
    """The windows of one conversation as chains, and as copies that share a step too."""
    record = conversation(turns)
    found = list(
        window.chains(
            [record],
            pairs=kinds.pairs,
            expanding=kinds.expanding,
            sliding_turns=kinds.sliding_turns,
            every_reply=False,
            once=True,
            counts=Counter(),
        )
    )
    chains = tokenised(work / "chains", base, [record], found)
    spans = window.windows(turns // 2, kinds.pairs, kinds.expanding, kinds.sliding_turns)
    cut = [
        {**record, "id": f"{number:016}", "messages": record["messages"][2 * first : 2 * last + 2]}
        for number, (first, last) in enumerate(sorted(set(spans)))
    ]
    alone = [
        {"conversation": own["id"], "first": 0, "weights": {str(len(own["messages"]) - 1): 1}}
        for own in cut
    ]
    separate = tokenised(work / "separate", base, cut, alone)
    rows = [replace(row, conversation=record["id"]) for row in separate.rows]
    assert len(rows) == len(cut)
    return chains, Side(tiny_models.token_files(work / "copies", rows))


def conversation(turns: int) -> dict[str, Any]:
    def text(turn: int) -> str:
        return " ".join(
            f"{'qa'[turn % 2]}{turn * word % 97}" for word in range(1, WORDS[turns] + 1)
        )

    messages = [
        {"role": ("user", "assistant")[turn % 2], "content": text(turn)} for turn in range(turns)
    ]
    source = {"path": "chat.json", "format": "messages", "index": 0}
    return {"id": "c" * 16, "source": source, "messages": messages}


def tokenised(
    folder: Path, base: Path, records: Sequence[Any], chains: Sequence[dict[str, Any]]
) -> Side:
    for name in ("tokens", "scratch"):
        (folder / name).mkdir(parents=True)
    jsonl.write(folder / "conversations.jsonl", records)
    jsonl.write(folder / "chains.jsonl", ({**chain, "split": "train"} for chain in chains))
    tokens.write(
        base=base,
        conversations=folder / "conversations.jsonl",
        chains=folder / "chains.jsonl",
        output=folder / "tokens",
        max_tokens=1_000_000,
        overflow="fail",
        progress=lambda done, total: None,
        scratch=folder / "scratch",
        previous=None,
    )
    return Side(folder / "tokens")


def gradient(base: Path, rows: Sequence[token_files.Row]) -> Tensor:
    """Of one step, in float32, by an adapter that is not zero; as one vector."""
    model: Any = load.causal_lm(base, dtype="float32", device="cpu")
    torch.manual_seed(0)
    model = lora.attach(model, rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    recovery.backward(model, list(rows), recovery.Limits(None, 2048), EXACT)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def in_turn(base: Path, sides: Sequence[Side], work: Path, rounds: int) -> list[list[float]]:
    """The seconds of a step of each side, one of each round: a short training of each in turn."""
    spent: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        for place, side in enumerate(sides):
            spent[place].append(step_s(base, side, work / f"round {number} {place}"))
    return spent


def step_s(base: Path, side: Side, work: Path) -> float:
    """From the end of a step to the end of the next, with the optimizer and the clipping."""
    ends: list[float] = []

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "metrics" and "loss" in event:
            ends.append(time.perf_counter())

    tiny_models.trained(
        base, side.folder, work, max_steps=STEPS, batch_size=10**6, every_steps=10**6, emit=emit
    )
    assert len(ends) == STEPS
    return (ends[-1] - ends[0]) / (STEPS - 1)


def compared(chains: Sequence[float], copies: Sequence[float], goal: float) -> str:
    ratios = [copy / chain for chain, copy in zip(chains, copies, strict=True)]
    return (
        f"a step takes {spread(chains)} as chains, {spread(copies)} as copies: "
        f"{statistics.median(ratios):.1f} × ({min(ratios):.1f} to {max(ratios):.1f}) faster, "
        f"goal {goal}"
    )


def spread(seconds: Sequence[float]) -> str:
    milliseconds = [1000 * one for one in seconds]
    return (
        f"{statistics.median(milliseconds):.0f} ms "
        f"({min(milliseconds):.0f} to {max(milliseconds):.0f})"
    )


if __name__ == "__main__":
    main()
