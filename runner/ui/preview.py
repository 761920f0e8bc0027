"""The examples as the model sees them: every token, and how much of the loss falls on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby, islice
from typing import Any

from runner.engine.opened import Opened
from runner.engine.words import escaped
from runner.ui import artifacts

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def show(opened: Opened, count: int, *, as_json: bool, colour: bool) -> None:
    """Prints the first `count` training examples, what is learned in green or in ⟦brackets⟧."""
    folder = artifacts.of_kind(opened, "tokenize")
    from runner.model import load, token_files  # takes seconds, and what is missing is said before

    base = load.base_folder(opened.base_path(), opened.workspace.cache)
    tokenizer = load.tokenizer(base)
    for row in islice(token_files.read(folder / "train.arrow"), count):
        shown = token_files.shown(tokenizer, row)
        if as_json:
            record = {"conversation": row.conversation, "first": row.first, "tokens": shown}
            print(json.dumps(record, ensure_ascii=False))
        else:
            print(f"— conversation {row.conversation}, {summary(shown)}")
            print(painted(shown, colour=colour))
            print()


def summary(shown: Sequence[dict[str, Any]]) -> str:
    """`118 tokens, 71 with loss`, and the weights where they are not all 1."""
    weights = [token["weight"] for token in shown if token["weight"]]
    others = sorted({weight for weight in weights if weight != 1})
    words = f"{len(shown)} tokens, {len(weights)} with loss"
    return words + (f", weights 1 and {', '.join(f'{w:g}' for w in others)}" if others else "")


def painted(shown: Sequence[dict[str, Any]], *, colour: bool) -> str:
    """The text, its stretches with loss marked; a weight other than 1 stands behind its stretch."""
    begin, end = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    parts = []
    for weight, stretch in groupby(shown, key=lambda token: token["weight"]):
        lines = "".join(token["token"] for token in stretch).split("\n")
        text = "\n".join(escaped(line) for line in lines)
        factor = "" if weight in (0, 1) else f"×{weight:g}"
        parts.append(f"{begin}{text}{end}{factor}" if weight else text)
    return "".join(parts)
