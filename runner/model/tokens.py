"""Chains to token arrays: the ids of each chain, and the weight of the loss on each of them.

A row is a chain cut after its last weighted reply. Nothing is ever cut inside a reply: a chain that
is too long is started anew at a later user message, left out, or refused. All chains of a
conversation are encoded together, so each content is tokenised once however many chains it is in.
T tokens of a row.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from runner.chat import jsonl
from runner.errors import RunnerError
from runner.model import load, template

Overflow = Literal["rebase", "drop", "fail"]
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
_BLOCK_CHARS = 1_000_000
_BATCH_TOKENS = 1_000_000


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


@dataclass(frozen=True)
class Chain:
    """A conversation read from message `first`; `weights` by the index of the reply."""

    conversation: str
    first: int
    weights: Mapping[int, float]
    split: Split


def write(
    *,
    base: Path,
    conversations: Path,
    chains: Path,
    output: Path,
    max_tokens: int,
    overflow: Overflow,
    progress: Callable[[int, int], None],
) -> dict[str, float | int | str]:
    """Writes `train.arrow`, `eval.arrow` and `dropped.jsonl`; the same input, the same bytes."""
    encoder = template.encoder(load.tokenizer(base))
    waiting = _read_chains(chains)
    total = len(waiting)
    sheets = {split: _Sheet(output / f"{split}.arrow") for split in SPLITS}
    counts: Counter[str] = Counter()
    with (output / "dropped.jsonl").open("w", encoding="utf-8", newline="\n") as dropped:
        for block in _blocks(jsonl.read(conversations), waiting):
            encoded = _Encoded(encoder, block)
            for record, own in block:
                _write_conversation(
                    record, own, encoded, max_tokens, overflow, sheets, counts, dropped.write
                )
            progress(total - len(waiting), total)
    for sheet in sheets.values():
        sheet.close()
    if waiting:
        missing = next(iter(waiting))
        raise RunnerError(
            f"{chains}: conversation {missing!r} is not in {conversations}",
            hint="the chains were cut from other conversations; run the stages between again",
        )
    if not sum(sheet.trained for sheet in sheets.values()):
        raise RunnerError(
            f"no token to train on in {total} conversations",
            hint="see dropped.jsonl for what was left out; a larger max_tokens keeps more",
        )
    metrics: dict[str, float | int | str] = {}
    for split, sheet in sheets.items():
        metrics |= {
            f"{split}_rows": sheet.rows,
            f"{split}_replies": sheet.replies,
            f"{split}_tokens": sheet.tokens,
            f"{split}_trained_tokens": sheet.trained,
            f"{split}_dropped": counts[f"{split}_dropped"],
            f"{split}_unstable_conversations": counts[f"{split}_unstable"],
            f"{split}_system_folded": counts[f"{split}_folded"],
        }
    return metrics


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


Block = list[tuple[dict[str, Any], list[Chain]]]


def _read_chains(path: Path) -> dict[str, list[Chain]]:
    found: dict[str, list[Chain]] = defaultdict(list)
    for line, record in enumerate(jsonl.read(path), 1):
        listed = {int(index): float(weight) for index, weight in record["weights"].items()}
        weights = {index: weight for index, weight in listed.items() if weight}
        chain = Chain(record["conversation"], record["first"], weights, record["split"])
        where = f"{path}:{line}: the chain from message {chain.first} of {chain.conversation!r}"
        if not weights:
            raise RunnerError(
                f"{where} has no reply that carries loss",
                hint="leave such chains out: there is nothing to learn from them",
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()):
            raise RunnerError(f"{where} has the weights {weights}", hint="weights are 0 or above")
        if chain.split not in SPLITS:
            raise RunnerError(f"{where} has split {chain.split!r}", hint="train or eval")
        found[chain.conversation].append(chain)
    return dict(found)


def _blocks(records: Iterator[dict[str, Any]], waiting: dict[str, list[Chain]]) -> Iterator[Block]:
    """Conversations that have chains, about as many together as keep the tokenizer busy."""
    block: Block = []
    chars = 0
    for record in records:
        own = waiting.pop(record["id"], None)
        if own is None:
            continue
        block.append((record, own))
        chars += sum(len(message["content"]) for message in record["messages"])
        if chars >= _BLOCK_CHARS:
            yield block
            block, chars = [], 0
    if block:
        yield block


class _Encoded:
    """The encodings of a block, and the ids of its contents for chains that are made of them."""

    def __init__(self, encoder: template.Encoder, block: Block) -> None:
        self._encoder = encoder
        self._plans: dict[tuple[str, int, int], template.Plan] = {}
        for record, own in block:
            for chain in own:
                _check_replies(record, chain)
                self._plan(record, chain.first, max(chain.weights))
        texts = (text for plan in self._plans.values() for text in plan.texts)
        self._known = encoder.tokenised(texts)

    def chain(self, record: Mapping[str, Any], first: int, last: int) -> template.Encoding:
        """Messages `first` to `last`, behind the leading system message."""
        plan = self._plan(record, first, last)
        unknown = [text for text in plan.texts if text not in self._known]
        if unknown:
            self._known |= self._encoder.tokenised(unknown)
        return self._encoder.joined(plan, self._known)

    def is_stable(self, record: Mapping[str, Any], first: int, last: int) -> bool:
        """Whether the replies of this stretch can be learned in one pass."""
        return self._encoder.is_stable(self._plan(record, first, last))

    def at_least(self, record: Mapping[str, Any], index: int) -> int:
        """Tokens that message `index` takes at least, as far as it is known."""
        return len(self._known.get(record["messages"][index]["content"], ()))

    def _plan(self, record: Mapping[str, Any], first: int, last: int) -> template.Plan:
        key = (record["id"], first, last)
        if key not in self._plans:
            try:
                self._plans[key] = self._encoder.plan(_stretch(record, first, last))
            except RunnerError as error:
                raise RunnerError(
                    f"conversation {record['id']!r} from message {first}: {error.message}",
                    hint=error.hint,
                ) from error
        return self._plans[key]


def _stretch(record: Mapping[str, Any], first: int, last: int) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = record["messages"]
    leading = messages[:1] if first > 0 and messages[0]["role"] == "system" else []
    return leading + messages[first : last + 1]


def _check_replies(record: Mapping[str, Any], chain: Chain) -> None:
    messages = record["messages"]
    for index in chain.weights:
        if not chain.first <= index < len(messages) or messages[index]["role"] != "assistant":
            raise RunnerError(
                f"conversation {chain.conversation!r}: the chain from message {chain.first} puts "
                f"loss on message {index}, which is not a reply in it",
                hint="the chains were cut from other conversations; run the stages between again",
            )


def _write_conversation(
    record: Mapping[str, Any],
    chains: Sequence[Chain],
    encoded: _Encoded,
    max_tokens: int,
    overflow: Overflow,
    sheets: Mapping[Split, _Sheet],
    counts: Counter[str],
    drop: Callable[[str], object],
) -> None:
    seen: set[str] = set()
    for chain in chains:
        stable = encoded.is_stable(record, chain.first, max(chain.weights))
        rows, dropped = _rows(record, chain, encoded, max_tokens, overflow, stable)
        for row, folded in rows:
            sheets[chain.split].add(row)
            seen |= {f"{chain.split}_folded"} if folded else set()
        for lost in dropped:
            drop(json.dumps(lost, ensure_ascii=False) + "\n")
            counts[f"{chain.split}_dropped"] += 1
        seen |= set() if stable else {f"{chain.split}_unstable"}
    counts.update(seen)


def _rows(
    record: Mapping[str, Any],
    chain: Chain,
    encoded: _Encoded,
    max_tokens: int,
    overflow: Overflow,
    stable: bool,
) -> tuple[list[tuple[Row, bool]], list[dict[str, Any]]]:
    """The rows of a chain, each with whether its system message was folded; and what was dropped.

    As many replies as fit go into one row; the next one starts at the user message of the first
    reply that did not fit. Where the template is not stable, each reply has its own row.
    """
    rows: list[tuple[Row, bool]] = []
    dropped: list[dict[str, Any]] = []
    left = sorted(chain.weights)
    first = chain.first
    while left:
        last = _farthest(record, encoded, first, left, max_tokens, overflow) if stable else left[0]
        encoding = encoded.chain(record, first, last)
        stops = _replies_by_message(record, encoding, first, last)
        fits = [i for i in left if i <= last and stops[i].stop <= max_tokens]
        whole = last == left[-1] and len(fits) == len(left)
        if overflow != "rebase" and not whole and (stable or not fits):
            length = stops[last].stop
            lost = _lost(chain, chain.first, f"chain longer than {max_tokens} tokens", length)
            if overflow == "fail":
                raise RunnerError(
                    f"conversation {chain.conversation!r}: the chain from message {chain.first} "
                    f"takes {length} tokens, more than max_tokens: {max_tokens}",
                    hint="raise max_tokens, or choose overflow: rebase or drop",
                )
            return [], [lost]
        if fits:
            spans = {stops[i]: chain.weights[i] for i in fits}
            row = _row(chain.conversation, first, encoding.ids, spans)
            rows.append((row, encoding.system_folded))
            left = left[len(fits) :]
            if not stable or not left:
                continue
        own = _asked_at(record, first, left[0])
        if not fits and own == first:
            reason = f"one turn longer than {max_tokens} tokens"
            dropped.append(_lost(chain, first, reason, stops[left[0]].stop))
            left = left[1:]
            own = _asked_at(record, first, left[0]) if left else first
        first = own
    return rows, dropped


def _farthest(
    record: Mapping[str, Any],
    encoded: _Encoded,
    first: int,
    left: Sequence[int],
    max_tokens: int,
    overflow: Overflow,
) -> int:
    """The last reply worth encoding: without this, a very long chain would be encoded again whole
    for each row that it is split into."""
    if overflow != "rebase":
        return left[-1]
    tokens = 0
    index = first
    for reply in left:
        while index <= reply:
            tokens += encoded.at_least(record, index)
            index += 1
        if tokens > max_tokens:
            return reply
    return left[-1]


def _asked_at(record: Mapping[str, Any], first: int, reply: int) -> int:
    """The latest user message before a reply; where there is none, the reply itself."""
    for index in range(reply, first - 1, -1):
        if record["messages"][index]["role"] == "user":
            return index
    return reply


def _replies_by_message(
    record: Mapping[str, Any], encoding: template.Encoding, first: int, last: int
) -> dict[int, template.Reply]:
    messages = record["messages"]
    said = [i for i in range(first, last + 1) if messages[i]["role"] == "assistant"]
    return dict(zip(said, encoding.replies, strict=True))


def _row(
    conversation: str, first: int, ids: Sequence[int], spans: Mapping[template.Reply, float]
) -> Row:
    end = max(span.stop for span in spans)
    weights = np.zeros(end, np.float32)
    for span, weight in spans.items():
        weights[span.start : span.stop] = weight
    # Nothing stands before the first token that could predict it.
    weights[0] = 0
    if not weights.any():
        raise RunnerError(
            f"conversation {conversation!r}: no token to train on from message {first}",
            hint="look at it with `runner preview`",
        )
    return Row(conversation, first, np.array(ids[:end], np.int32), weights, len(spans))


def _lost(chain: Chain, first: int, reason: str, tokens: int) -> dict[str, Any]:
    return {
        "conversation": chain.conversation,
        "first": first,
        "reason": reason,
        "tokens": tokens,
    }


class _Sheet:
    """One Arrow file that is being written, in batches cut by tokens, so the bytes never differ."""

    def __init__(self, path: Path) -> None:
        self.rows = self.replies = self.tokens = self.trained = 0
        self._waiting: list[Row] = []
        self._waiting_tokens = 0
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)

    def add(self, row: Row) -> None:
        length = len(row.input_ids)
        self.rows += 1
        self.replies += row.replies
        self.tokens += length
        self.trained += int(np.count_nonzero(row.weights))
        self._waiting.append(row)
        self._waiting_tokens += length
        if self._waiting_tokens >= _BATCH_TOKENS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._file.close()

    def _flush(self) -> None:
        rows = self._waiting
        lengths = [len(row.input_ids) for row in rows]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pa.int32())
        if rows:
            ids = np.concatenate([row.input_ids for row in rows])
            weights = np.concatenate([row.weights for row in rows])
            columns = [
                pa.array([row.conversation for row in rows], pa.string()),
                pa.array([row.first for row in rows], pa.int32()),
                pa.ListArray.from_arrays(offsets, pa.array(ids)),
                pa.ListArray.from_arrays(offsets, pa.array(weights)),
                pa.array([row.replies for row in rows], pa.int32()),
            ]
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._waiting, self._waiting_tokens = [], 0


def _list_at(column: Any, place: int) -> Any:
    start, stop = column.offsets[place].as_py(), column.offsets[place + 1].as_py()
    return column.values[start:stop].to_numpy()
