"""The token files that training reads: rows in Arrow tables, taken from the disk one by one.

T tokens of a row.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

Split = Literal["train", "eval"]

SPLITS: tuple[Split, ...] = ("train", "eval")
SCHEMA = pa.schema(
    [
        pa.field("conversation", pa.string(), nullable=False),
        pa.field("first", pa.int32(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("weights", pa.list_(pa.float32()), nullable=False),
        pa.field("replies", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Row:
    """One example: `weights[t]` is the weight of predicting `input_ids[t]`; both have shape (T,).

    `first` is the message it starts from, beside a leading system message; `replies` counts the
    replies that carry loss.
    """

    conversation: str
    first: int
    input_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    replies: int


def read(path: Path) -> Rows:
    """The rows of `train.arrow` or `eval.arrow`, memory mapped."""
    return Rows(path)


def shown(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[dict[str, Any]]:
    """Each token as text with its weight; the texts joined are the text of the row.

    A letter that takes several tokens stands at the last of them.
    """
    tokens: list[dict[str, Any]] = []
    held: list[int] = []
    for id, weight in zip(row.input_ids.tolist(), row.weights.tolist(), strict=True):
        held.append(id)
        text = cast(str, tokenizer.decode(held, clean_up_tokenization_spaces=False))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(held) < 4:
            text = ""
        else:
            held = []
        tokens.append({"token": text, "id": id, "weight": weight})
    return tokens


def json_lines(artifact: Path) -> Iterator[str]:
    """The rows of both splits as JSON lines, without line ends."""
    for split in SPLITS:
        for row in read(artifact / f"{split}.arrow"):
            yield json.dumps(
                {
                    "split": split,
                    "conversation": row.conversation,
                    "first": row.first,
                    "replies": row.replies,
                    "input_ids": row.input_ids.tolist(),
                    "weights": row.weights.tolist(),
                },
                ensure_ascii=False,
                separators=(",", ":"),
            )


class Rows(Sequence[Row]):
    """The rows of one split, read from the disk as they are asked for."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            self._batches = [batch for batch in stream if batch.num_rows]
        self._starts = [0]
        for batch in self._batches:
            self._starts.append(self._starts[-1] + batch.num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        which = bisect_right(self._starts, place) - 1
        batch, inside = self._batches[which], place - self._starts[which]
        return Row(
            conversation=batch.column("conversation")[inside].as_py(),
            first=batch.column("first")[inside].as_py(),
            input_ids=_list_at(batch.column("input_ids"), inside),
            weights=_list_at(batch.column("weights"), inside),
            replies=batch.column("replies")[inside].as_py(),
        )

    def __iter__(self) -> Iterator[Row]:
        return (self[place] for place in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each row, for packing."""
        found = [np.diff(batch.column("input_ids").offsets.to_numpy()) for batch in self._batches]
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    @property
    def conversations(self) -> list[str]:
        """The conversation of each row."""
        return [id for batch in self._batches for id in batch.column("conversation").to_pylist()]

    def columns(self, start: int, stop: int) -> Iterator[Columns]:
        """Rows `start` to `stop` (half open), piece by piece."""
        for batch, first in zip(self._batches, self._starts, strict=False):
            begin, end = max(start - first, 0), min(stop - first, batch.num_rows)
            if begin >= end:
                continue
            offsets = batch.column("input_ids").offsets.to_numpy()
            tokens = slice(offsets[begin], offsets[end])
            yield Columns(
                conversations=batch.column("conversation").slice(begin, end - begin).to_pylist(),
                firsts=batch.column("first").to_numpy()[begin:end],
                lengths=np.diff(offsets[begin : end + 1]),
                input_ids=batch.column("input_ids").values.to_numpy()[tokens],
                weights=batch.column("weights").values.to_numpy()[tokens],
                replies=batch.column("replies").to_numpy()[begin:end],
            )


@dataclass(frozen=True)
class Columns:
    """Rows one after another, as flat columns."""

    conversations: list[str]
    firsts: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    input_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    replies: npt.NDArray[np.int32]


def _list_at(column: Any, place: int) -> Any:
    """The numbers of one row, as they lie on the disk.

    Not by pyarrow's to_numpy, which imports pandas where it is installed: half a second.
    """
    start, stop = column.offsets[place].as_py(), column.offsets[place + 1].as_py()
    values = column.values
    dtype = np.dtype(values.type.to_pandas_dtype())
    if start == stop:
        return np.zeros(0, dtype)
    begin = (values.offset + start) * dtype.itemsize
    return np.frombuffer(values.buffers()[1], dtype, stop - start, begin)
