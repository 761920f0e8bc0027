"""An output of the tokenize stage that is being written, and earlier ones to take over from.

A conversation whose id and chains are those of an earlier output is copied from there with its
rows: `conversations.arrow` notes for each what its chains were and how many rows they gave. The
bytes are those of a build from nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from runner import disk
from runner.model.token_files import SCHEMA, SPLITS, Columns, Row, Split, read

CONVERSATIONS = pa.schema(
    [
        pa.field("conversation", pa.string(), nullable=False),
        pa.field("chains", pa.int64(), nullable=False),
        pa.field("train_rows", pa.int32(), nullable=False),
        pa.field("eval_rows", pa.int32(), nullable=False),
        pa.field("train_dropped", pa.int32(), nullable=False),
        pa.field("eval_dropped", pa.int32(), nullable=False),
        pa.field("traits", pa.int32(), nullable=False),
    ]
)
"""One line for each conversation that has chains; `chains` is a digest of them, and `traits` has a
bit for each of `TRAITS`."""
TRAITS = ("unstable_conversations", "system_folded", "refused_conversations")

Metrics = dict[str, float | int | str]

_PART_CHARS = 32_000_000
_BATCH_TOKENS = 1_000_000


@dataclass(frozen=True)
class Done:
    """What became of one conversation."""

    conversation: str
    chains: int
    rows: dict[Split, list[Row]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    dropped: list[tuple[Split, dict[str, Any]]] = field(default_factory=list)
    traits: set[tuple[Split, str]] = field(default_factory=set)


@dataclass
class Run:
    """Conversations `start` to `stop` (half open) of an earlier output, taken over as they are."""

    earlier: Earlier
    start: int
    stop: int


class Book:
    """An output that is being written, conversation by conversation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sheets = {split: _Sheet(folder / f"{split}.arrow") for split in SPLITS}
        self._dropped = (folder / "dropped.jsonl").open("w", encoding="utf-8", newline="\n")
        self._columns: dict[str, list[Any]] = {name: [] for name in CONVERSATIONS.names}
        self.too_long = self.longest = 0
        self._refusals: Counter[str] = Counter()
        self._refused: dict[str, str] = {}

    def __enter__(self) -> Book:
        return self

    def __exit__(self, *_: object) -> None:
        for sheet in self.sheets.values():
            sheet.close()
        self._dropped.close()

    def add(self, done: Done) -> None:
        for split in SPLITS:
            for row in done.rows[split]:
                self.sheets[split].add(_as_columns(row))
            self._columns[f"{split}_rows"].append([len(done.rows[split])])
            lost = sum(own == split for own, _ in done.dropped)
            self._columns[f"{split}_dropped"].append([lost])
        for _, line in done.dropped:
            self._drop(json.dumps(line, ensure_ascii=False))
        traits = sum(1 << _bit(split, name) for split, name in done.traits)
        self._columns["conversation"].append([done.conversation])
        self._columns["chains"].append([done.chains])
        self._columns["traits"].append([traits])

    def take_over(self, run: Run) -> None:
        earlier, places = run.earlier, slice(run.start, run.stop)
        for split in SPLITS:
            starts = earlier.row_starts[split]
            for piece in earlier.rows[split].columns(starts[run.start], starts[run.stop]):
                self.sheets[split].add(piece)
        lost = slice(earlier.dropped_starts[run.start], earlier.dropped_starts[run.stop])
        for line in earlier.dropped[lost]:
            self._drop(line)
        for name, counts in earlier.counts.items():
            self._columns[name].append(counts[places])
        self._columns["conversation"].append(earlier.conversations[places])
        self._columns["chains"].append(earlier.digests[places])
        self._columns["traits"].append(earlier.traits[places])

    def finish(self) -> None:
        """Writes what is left; a book that is closed without this is no output."""
        for sheet in self.sheets.values():
            sheet.finish()
        columns = [
            pa.array([value for piece in self._columns[name.name] for value in piece], name.type)
            for name in CONVERSATIONS
        ]
        path = str(self.folder / "conversations.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, CONVERSATIONS) as stream:
            stream.write_batch(pa.record_batch(columns, schema=CONVERSATIONS))

    @property
    def refused(self) -> int:
        """Conversations that the template refused, in whole or in part."""
        mask = sum(1 << _bit(split, "refused_conversations") for split in SPLITS)
        return sum(bool(traits & mask) for traits in self._all("traits"))

    @property
    def refusal(self) -> str:
        """The template's most frequent reason, with the first conversation that it holds for."""
        most = self._refusals.most_common(1)
        return f"{self._refused[most[0][0]]}: {most[0][0]}" if most else ""

    def metrics(self) -> Metrics:
        metrics: Metrics = {}
        for split, sheet in self.sheets.items():
            metrics |= {
                f"{split}_rows": sheet.rows,
                f"{split}_replies": sheet.replies,
                f"{split}_tokens": sheet.tokens,
                f"{split}_trained_tokens": sheet.trained,
                f"{split}_dropped": sum(self._all(f"{split}_dropped")),
            }
            for name in TRAITS:
                bit = 1 << _bit(split, name)
                metrics[f"{split}_{name}"] = sum(bool(t & bit) for t in self._all("traits"))
        return metrics

    def _all(self, name: str) -> Iterator[int]:
        return (int(value) for piece in self._columns[name] for value in piece)

    def _drop(self, line: str) -> None:
        self._dropped.write(line + "\n")
        lost = json.loads(line)
        if "tokens" in lost:
            self.too_long += 1
            self.longest = max(self.longest, lost["tokens"])
        else:
            self._refusals[lost["reason"]] += 1
            where = f"conversation {lost['conversation']!r} from message {lost['first']}"
            self._refused.setdefault(lost["reason"], where)


class Earlier:
    """An output that was written before, to take conversations from."""

    def __init__(self, folder: Path) -> None:
        with pa.memory_map(str(folder / "conversations.arrow")) as source:
            table = pa.ipc.open_stream(source).read_all()
        ids = table.column("conversation").to_pylist()
        self.conversations: list[str] = ids
        self.places = {id: place for place, id in enumerate(ids)}
        self.digests: list[int] = table.column("chains").to_pylist()
        self.traits: npt.NDArray[np.int32] = table.column("traits").to_numpy()
        self.counts = {
            name: table.column(name).to_numpy() for name in CONVERSATIONS.names if "_" in name
        }
        self.rows = {split: read(folder / f"{split}.arrow") for split in SPLITS}
        self.row_starts = {split: _starts(self.counts[f"{split}_rows"]) for split in SPLITS}
        lost = sum(self.counts[f"{split}_dropped"] for split in SPLITS)
        self.dropped_starts = _starts(lost)
        text = (folder / "dropped.jsonl").read_text(encoding="utf-8")
        self.dropped = text.split("\n")[:-1]


def is_whole(folder: Path) -> bool:
    """Whether the folder is such an output; one of an older version is not."""
    names = ("conversations.arrow", "dropped.jsonl", *(f"{split}.arrow" for split in SPLITS))
    return all((folder / name).is_file() for name in names)


class Parts:
    """Finished parts of a run in `scratch`; each is an output of its own, for some conversations.

    A part appears whole, so that a kill at any time leaves whole ones alone.
    """

    def __init__(self, scratch: Path | None) -> None:
        self._scratch = scratch
        self._next = 0
        self._book: Book | None = None
        self._chars = 0
        self.found: list[Earlier] = []
        if scratch:
            scratch.mkdir(parents=True, exist_ok=True)
            for staged in scratch.glob(".part-*"):
                shutil.rmtree(staged)
            whole = sorted(path for path in scratch.glob("part-*") if is_whole(path))
            self.found = [Earlier(path) for path in whole]
            if whole:
                self._next = int(whole[-1].name.removeprefix("part-")) + 1

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        if self._book:
            self._book.__exit__()

    def add(self, done: Done) -> None:
        if not self._scratch:
            return
        if not self._book:
            staged = self._scratch / f".part-{os.getpid()}"
            staged.mkdir()
            self._book = Book(staged)
        self._book.add(done)

    def finish(self, chars: int) -> None:
        """Publishes the part, if it has enough to be worth it."""
        self._chars += chars
        if self._scratch and self._book and self._chars >= _PART_CHARS:
            with self._book as book:
                book.finish()
            disk.publish(book.folder, self._scratch / f"part-{self._next:06}")
            self._next += 1
            self._book, self._chars = None, 0


class _Sheet:
    """One Arrow file that is being written, in batches cut by tokens, so the bytes never differ."""

    def __init__(self, path: Path) -> None:
        self.rows = self.replies = self.tokens = self.trained = 0
        self._waiting: list[Columns] = []
        self._waiting_tokens = 0
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)

    def add(self, piece: Columns) -> None:
        self.rows += len(piece.lengths)
        self.replies += int(piece.replies.sum())
        self.tokens += len(piece.input_ids)
        self.trained += int(np.count_nonzero(piece.weights))
        while len(piece.lengths):
            filled = self._waiting_tokens + np.cumsum(piece.lengths, dtype=np.int64)
            rows = int(np.searchsorted(filled, _BATCH_TOKENS)) + 1
            if rows > len(piece.lengths):
                self._waiting.append(piece)
                self._waiting_tokens = int(filled[-1])
                return
            full, piece = _cut(piece, rows)
            self._waiting.append(full)
            self._flush()

    def finish(self) -> None:
        self._flush()
        self._writer.close()

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        pieces = self._waiting
        if pieces:
            lengths = np.concatenate([piece.lengths for piece in pieces])
            offsets = pa.array(
                np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pa.int32()
            )
            ids = np.concatenate([piece.input_ids for piece in pieces])
            weights = np.concatenate([piece.weights for piece in pieces])
            names = [name for piece in pieces for name in piece.conversations]
            columns = [
                pa.array(names, pa.string()),
                pa.array(np.concatenate([piece.firsts for piece in pieces])),
                pa.ListArray.from_arrays(offsets, pa.array(ids)),
                pa.ListArray.from_arrays(offsets, pa.array(weights)),
                pa.array(np.concatenate([piece.replies for piece in pieces])),
            ]
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._waiting, self._waiting_tokens = [], 0


def _cut(piece: Columns, rows: int) -> tuple[Columns, Columns]:
    """The first `rows` of a piece, and the others."""
    tokens = int(piece.lengths[:rows].sum())
    halves = (
        Columns(
            piece.conversations[own],
            piece.firsts[own],
            piece.lengths[own],
            piece.input_ids[inside],
            piece.weights[inside],
            piece.replies[own],
        )
        for own, inside in (
            (slice(rows), slice(tokens)),
            (slice(rows, None), slice(tokens, None)),
        )
    )
    first, second = halves
    return first, second


def _as_columns(row: Row) -> Columns:
    return Columns(
        [row.conversation],
        np.array([row.first], np.int32),
        np.array([len(row.input_ids)], np.int32),
        row.input_ids,
        row.weights,
        np.array([row.replies], np.int32),
    )


def _bit(split: Split, trait: str) -> int:
    return SPLITS.index(split) * len(TRAITS) + TRAITS.index(trait)


def _starts(counts: npt.NDArray[np.int32]) -> list[int]:
    starts: list[int] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).tolist()
    return starts
