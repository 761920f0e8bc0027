"""Which rows a training takes that goes on from a model: what is new, and a share of the rest.

A conversation is taken whole, by its id: new is what that model was not trained on. Which of the
others come again depends on their ids, the seed and what was learned so far, so that each training
of a chain sees other ones.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runner.chat import learned
from runner.chat.learned import Learned
from runner.model import packing
from runner.model.token_files import Row, Rows


class Some(Sequence[Row]):
    """Rows of a file, in their order."""

    def __init__(self, rows: Rows, places: Sequence[int]) -> None:
        self._rows = rows
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int | slice) -> Any:
        found = self._places[index]
        return self._rows[found] if isinstance(found, int) else [self._rows[n] for n in found]

    @property
    def conversations(self) -> list[str]:
        """The conversation of each row."""
        owners = self._rows.conversations
        return [owners[place] for place in self._places]


@dataclass(frozen=True)
class Chosen:
    """What a training takes, with the pack of each row where rows are packed.

    `learned` is what its model will have met. The numbers are of conversations: `new` ones, old
    ones that come `again` of so many that are `known`, and `gone` ones, which the data has no more.
    """

    rows: Some | Rows
    packs: list[int] | None
    learned: Learned
    new: int
    again: int = 0
    known: int = 0
    gone: int = 0
    mark: str = ""
    """Stands for the parent and the choice; empty where all is taken."""

    def words(self) -> str:
        """What is taken, for people."""
        new = f"{self.new:,} new conversation{'' if self.new == 1 else 's'}"
        text = f"it goes on from the model before: {new}, {self.again:,} of {self.known:,} again"
        return text if not self.gone else f"{text}; {self.forgets()}"

    def forgets(self) -> str:
        noun = "conversation is" if self.gone == 1 else "conversations are"
        return (
            f"{self.gone:,} {noun} in the data no more, which only a training anew forgets"
            " (retrain.mode: anew)"
        )


def everything(tokens: Path, rows: Rows, held_out: Rows) -> Chosen:
    """All rows, for a training that starts from the base model."""
    met = _met(Learned(), tokens, rows, held_out)
    return Chosen(rows, packing.read(tokens), met, len(met.train))


def chosen(
    tokens: Path, rows: Rows, held_out: Rows, *, parent: Path, replay: float, seed: int
) -> Chosen:
    """What is new to `parent`, and about the share `replay` of what it was trained on."""
    before = learned.read(parent) or Learned()
    owners = rows.conversations
    known = before.train.intersection(owners)
    digest = hashlib.sha256("\n".join(sorted(before.train)).encode()).hexdigest()
    again = learned.replayed(known, replay, {"seed": seed, "learned": digest})
    new = set(owners) - known
    places = [place for place, owner in enumerate(owners) if owner in new or owner in again]
    taken = hashlib.sha256(repr(places).encode()).hexdigest()
    return Chosen(
        rows=Some(rows, places),
        packs=_packs(tokens, rows, places),
        learned=_met(before, tokens, rows, held_out),
        new=len(new),
        again=len(again),
        known=len(known),
        gone=len(before.train - known - set(held_out.conversations)),
        mark=f"{digest} {taken}",
    )


def copy(parent: Path, output: Path) -> None:
    """Makes the output the parent, byte for byte, so that the store takes it for what it is."""
    shutil.copytree(parent, output, dirs_exist_ok=True, copy_function=shutil.copyfile)


def _met(before: Learned, tokens: Path, rows: Rows, held_out: Rows) -> Learned:
    return before.with_more(rows.conversations, held_out.conversations, learned.dropped(tokens))


def _packs(tokens: Path, rows: Rows, places: Sequence[int]) -> list[int] | None:
    """The rows that are left packed anew, into packs as long as the longest there was."""
    packs = packing.read(tokens)
    if packs is None or not places:
        return packs if packs is None else []
    lengths = rows.lengths
    capacity = int(np.bincount(packs, weights=lengths).max())
    owners = rows.conversations
    found = packing.packs(lengths[list(places)], [owners[place] for place in places], capacity)
    return [int(pack) for pack in found]
