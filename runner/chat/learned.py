"""Which conversations a model has met: `conversations.txt` beside its weights, an id a line.

`train ID` was trained on, `eval ID` was measured on; of `dropped ID` something could not be
learned: it was too long, say. A model that goes on from another one lists what that one met, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from runner.chat import jsonl
from runner.errors import RunnerError

FILE = "conversations.txt"
FIELDS = ("train", "eval", "dropped")


@dataclass(frozen=True)
class Learned:
    """Ids of conversations; each is in one of the three, `train` before `eval` before `dropped`."""

    train: frozenset[str] = frozenset()
    eval: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()

    @property
    def all(self) -> frozenset[str]:
        return self.train | self.eval | self.dropped

    def with_more(
        self, train: Iterable[str], eval: Iterable[str], dropped: Iterable[str]
    ) -> Learned:
        """What was learned before and what is learned now; what was ever trained on stays so."""
        trained = self.train.union(train)
        measured = self.eval.union(eval) - trained
        return Learned(trained, measured, self.dropped.union(dropped) - trained - measured)


def write(folder: Path, learned: Learned) -> None:
    """Writes the file into a model's folder; the same ids, the same bytes."""
    lines = sorted(f"{field} {id}\n" for field in FIELDS for id in getattr(learned, field))
    (folder / FILE).write_text("".join(lines), encoding="utf-8", newline="\n")


def read(folder: Path) -> Learned | None:
    """What the model of a folder has met; None where nobody noted it."""
    path = folder / FILE
    found: dict[str, set[str]] = {field: set() for field in FIELDS}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return None
    for number, line in enumerate(lines, 1):
        field, _, id = line.partition(" ")
        if not line:
            continue
        if field not in found or not id:
            raise RunnerError(
                f"{path}:{number}: {line[:60]!r} is not `train ID`, `eval ID` or `dropped ID`",
                hint="put the model back from a copy, or train anew",
            )
        found[field].add(id)
    return Learned(**{field: frozenset(ids) for field, ids in found.items()})


def dropped(tokens: Path) -> frozenset[str]:
    """The conversations of a tokens artifact of which something was left out."""
    path = tokens / "dropped.jsonl"
    if not path.exists():
        return frozenset()
    return frozenset(str(record["conversation"]) for record in jsonl.read(path))


def count_new(split_artifact: Path, model_artifact: Path | None) -> int:
    """How many conversations of a split the model has not met; all of them where there is none.

    One that turned from eval to train is not new: it is a matter of the split, not of the data.
    """
    known = read(model_artifact) if model_artifact else None
    ids = {str(chain["conversation"]) for chain in jsonl.read(split_artifact / "chains.jsonl")}
    return len(ids - known.all) if known else len(ids)


def replayed(ids: Iterable[str], fraction: float, salt: Mapping[str, object]) -> set[str]:
    """A share of the ids, the same for the same `salt`, whatever other ids there are."""
    start = hashlib.sha256(json.dumps(salt, sort_keys=True).encode())
    return {id for id in ids if _place(start, id) < fraction}


def _place(start: hashlib._Hash, id: str) -> float:
    """From 0 up to 1, by the id alone."""
    own = start.copy()
    own.update(id.encode())
    return int.from_bytes(own.digest()[:7], "big") / 2**56
