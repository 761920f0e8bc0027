"""Chains to token arrays: the ids of each chain, and the weight of the loss on each of them.

A row is a chain cut after its last weighted reply. Nothing is ever cut inside a reply: a chain that
is too long is started anew at a later user message, left out, or refused. All chains of a
conversation are encoded together, so each content is tokenised once however many chains it is in.
A message without text, such as a call of a tool alone, is left out of what is encoded. What the
template refuses is set aside with its reason.

What was encoded before is taken over, from the stage's last output or from an interrupted run: the
tokens of a conversation depend on what is said in it, which its id stands for, and on its chains.
So `conversations.arrow` notes for each what its chains were and how many rows they gave. The bytes
are those of a build from nothing.
T tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from runner import disk
from runner.chat import jsonl
from runner.errors import RunnerError
from runner.model import load, packing, template

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

Emit = Callable[[dict[str, Any]], None]
Metrics = dict[str, float | int | str]

_BLOCK_CHARS = 1_000_000
_PART_CHARS = 4_000_000
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


@dataclass(frozen=True)
class _Columns:
    """Rows one after another, as flat columns."""

    conversations: list[str]
    firsts: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    input_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    replies: npt.NDArray[np.int32]


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

    def columns(self, start: int, stop: int) -> Iterator[_Columns]:
        """Rows `start` to `stop` (half open), piece by piece."""
        for batch, first in zip(self._batches, self._starts, strict=False):
            begin, end = max(start - first, 0), min(stop - first, batch.num_rows)
            if begin >= end:
                continue
            offsets = batch.column("input_ids").offsets.to_numpy()
            tokens = slice(offsets[begin], offsets[end])
            yield _Columns(
                conversations=batch.column("conversation").slice(begin, end - begin).to_pylist(),
                firsts=batch.column("first").to_numpy()[begin:end],
                lengths=np.diff(offsets[begin : end + 1]),
                input_ids=batch.column("input_ids").values.to_numpy()[tokens],
                weights=batch.column("weights").values.to_numpy()[tokens],
                replies=batch.column("replies").to_numpy()[begin:end],
            )


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
    packed: bool = False,
    scratch: Path | None = None,
    previous: Path | None = None,
    emit: Emit = lambda event: None,
) -> Metrics:
    """Writes `train.arrow`, `eval.arrow`, `conversations.arrow` and `dropped.jsonl` to `output`.

    With `packed` also `packs.arrow`. The same input gives the same bytes, whatever is taken over
    from `previous`, an earlier output of the same settings and base model, or from `scratch`, where
    finished parts are kept until all is done.
    """
    waiting = _read_chains(chains)
    total = len(waiting)
    with _Book(output) as book, _Parts(scratch) as parts:
        earlier = [*parts.found]
        if previous and _is_whole(previous):
            earlier.append(_Earlier(previous))
        done = 0
        for block, encoded in _encoded(base, _blocks(conversations, waiting, earlier)):
            for entry in block:
                if isinstance(entry, _Run):
                    book.take_over(entry)
                    done += entry.stop - entry.start
                else:
                    found = _conversation(entry, encoded, max_tokens, overflow)
                    book.add(found)
                    parts.add(found)
                    done += 1
            parts.finish(sum(entry.chars for entry in block if isinstance(entry, _New)))
            progress(done, total)
        book.finish()
    if waiting:
        missing = next(iter(waiting))
        raise RunnerError(
            f"{chains}: conversation {missing!r} is not in {conversations}",
            hint="the chains were cut from other conversations; run the stages between again",
        )
    if not sum(sheet.trained for sheet in book.sheets.values()):
        why = f": {book.refusal}" if book.refusal else ""
        raise RunnerError(
            f"no token to train on in {total} conversations{why}",
            hint="see dropped.jsonl for what was left out; a larger max_tokens keeps more",
        )
    if book.refused:
        text = (
            f"the chat template refuses {book.refused} of {total} conversations, or parts of them, "
            f"which are left out (see dropped.jsonl); most often: {book.refusal}"
        )
        emit({"event": "warning", "text": text})
    metrics = book.metrics()
    if packed:
        rows = read(output / "train.arrow")  # as training will read them
        packs = packing.write(output, rows.lengths, rows.conversations, max_tokens)
        fill = float(rows.lengths.sum()) / (packs * max_tokens) if packs else 0.0
        metrics |= {"train_packs": packs, "train_pack_fill": round(fill, 4)}
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


@dataclass(frozen=True)
class _New:
    """A conversation to encode, and its chains."""

    record: dict[str, Any]
    chains: list[Chain]
    chars: int


@dataclass
class _Run:
    """Conversations `start` to `stop` (half open) of an earlier output, taken over as they are."""

    earlier: _Earlier
    start: int
    stop: int


def _blocks(
    path: Path, waiting: dict[str, list[Chain]], earlier: Sequence[_Earlier]
) -> Iterator[list[_New | _Run]]:
    """Conversations that have chains, about as many new ones as keep the tokenizer busy."""
    block: list[_New | _Run] = []
    chars = 0
    with path.open("rb") as lines:
        for line in lines:
            id = _id(line)
            own = waiting.pop(id, None)
            if own is None:
                continue
            last = block[-1] if block else None
            known = _found(id, own, earlier)
            if known is None:
                record = json.loads(line)
                size = sum(len(message["content"]) for message in record["messages"])
                block.append(_New(record, own, size))
                chars += size
            elif isinstance(last, _Run) and (last.earlier, last.stop) == known:
                last.stop += 1
            else:
                block.append(_Run(known[0], known[1], known[1] + 1))
            if chars >= _BLOCK_CHARS:
                yield block
                block, chars = [], 0
    if block:
        yield block


_ID = re.compile(rb'\{"id": ?"([^"\\]+)"')


def _id(line: bytes) -> str:
    """The id of a conversation, which records begin with: the rest is not parsed for it."""
    found = _ID.match(line)
    return found[1].decode() if found else str(json.loads(line)["id"])


def _found(
    id: str, chains: Sequence[Chain], earlier: Sequence[_Earlier]
) -> tuple[_Earlier, int] | None:
    """The earlier output that has this conversation with these chains, and its place there."""
    for output in earlier:
        place = output.places.get(id)
        if place is not None and output.digests[place] == _digest(chains):
            return output, place
    return None


def _digest(chains: Sequence[Chain]) -> int:
    """64 bits that stand for the chains of a conversation."""
    facts = repr([(chain.first, sorted(chain.weights.items()), chain.split) for chain in chains])
    return int.from_bytes(hashlib.sha256(facts.encode()).digest()[:8], "big", signed=True)


def _encoded(
    base: Path, blocks: Iterable[list[_New | _Run]]
) -> Iterator[tuple[list[_New | _Run], _Encoded]]:
    """Each block with its encodings.

    While the tokenizer works on a block, in threads of its own, the one before is written and the
    next one is read.
    """
    encoder: template.Encoder | None = None
    before: tuple[list[_New | _Run], _Encoded, Future[None]] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        for block in blocks:
            new = [entry for entry in block if isinstance(entry, _New)]
            if new and encoder is None:
                encoder = template.encoder(load.tokenizer(base))
            own = _Encoded(encoder, new)
            after = block, own, pool.submit(own.tokenise)
            if before:
                before[2].result()
                yield before[:2]
            before = after
        if before:
            before[2].result()
            yield before[:2]


@dataclass(frozen=True)
class _Done:
    """What became of one conversation."""

    conversation: str
    chains: int
    rows: dict[Split, list[Row]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    dropped: list[tuple[Split, dict[str, Any]]] = field(default_factory=list)
    traits: set[tuple[Split, str]] = field(default_factory=set)


class _Encoded:
    """The encodings of a block, and the ids of its contents for chains that are made of them."""

    def __init__(self, encoder: template.Encoder | None, block: Iterable[_New]) -> None:
        """Plans all chains; an encoder is needed only where there are any."""
        self._known: dict[str, template.Array] = {}
        if encoder:
            self._encoder = encoder
        self._plans: dict[tuple[str, int, int], template.Plan | template.Refused] = {}
        for entry in block:
            for chain in entry.chains:
                _check_replies(entry.record, chain)
                self._try(entry.record, chain.first, max(chain.weights))

    def tokenise(self) -> None:
        plans = [plan for plan in self._plans.values() if isinstance(plan, template.Plan)]
        if plans:
            self._known = self._encoder.tokenised(text for plan in plans for text in plan.texts)

    def chain(
        self, record: Mapping[str, Any], first: int, last: int
    ) -> tuple[template.Array, tuple[template.Reply, ...], bool]:
        """The ids of messages `first` to `last`, behind the leading system message; their replies;
        and whether the system message was folded."""
        plan = self._plan(record, first, last)
        unknown = [text for text in plan.texts if text not in self._known]
        if unknown:
            self._known |= self._encoder.tokenised(unknown)
        return *self._encoder.joined_array(plan, self._known), plan.system_folded

    def is_stable(self, record: Mapping[str, Any], first: int, last: int) -> bool:
        """Whether the replies of this stretch can be learned in one pass."""
        return self._encoder.is_stable(self._plan(record, first, last))

    def at_least(self, record: Mapping[str, Any], index: int) -> int:
        """Tokens that message `index` takes at least, as far as it is known."""
        return len(self._known.get(record["messages"][index]["content"], ()))

    def _plan(self, record: Mapping[str, Any], first: int, last: int) -> template.Plan:
        plan = self._try(record, first, last)
        if isinstance(plan, template.Refused):
            raise plan
        return plan

    def _try(
        self, record: Mapping[str, Any], first: int, last: int
    ) -> template.Plan | template.Refused:
        key = (record["id"], first, last)
        if key not in self._plans:
            try:
                self._plans[key] = self._encoder.plan(_stretch(record, first, last))
            except template.Refused as refused:
                self._plans[key] = refused
            except RunnerError as error:
                raise RunnerError(
                    f"conversation {record['id']!r} from message {first}: {error.message}",
                    hint=error.hint,
                ) from error
        return self._plans[key]


def _stretch(record: Mapping[str, Any], first: int, last: int) -> list[dict[str, str]]:
    """What is shown of messages `first` to `last`, behind the leading system message."""
    messages: list[dict[str, str]] = record["messages"]
    leading = messages[:1] if first > 0 and messages[0]["role"] == "system" else []
    return [m for m in leading + messages[first : last + 1] if _is_shown(m)]


def _is_shown(message: Mapping[str, str]) -> bool:
    """A message with a thought or tool calls alone has no text to learn from."""
    return bool(message["content"].strip())


def _check_replies(record: Mapping[str, Any], chain: Chain) -> None:
    messages = record["messages"]
    for index in chain.weights:
        inside = chain.first <= index < len(messages)
        if not inside or messages[index]["role"] != "assistant" or not _is_shown(messages[index]):
            raise RunnerError(
                f"conversation {chain.conversation!r}: the chain from message {chain.first} puts "
                f"loss on message {index}, which is not a reply in it",
                hint="the chains were cut from other conversations; run the stages between again",
            )


def _conversation(entry: _New, encoded: _Encoded, max_tokens: int, overflow: Overflow) -> _Done:
    done = _Done(entry.record["id"], _digest(entry.chains))
    for chain in entry.chains:
        split = chain.split
        try:
            stable = encoded.is_stable(entry.record, chain.first, max(chain.weights))
            rows, dropped = _rows(entry.record, chain, encoded, max_tokens, overflow, stable)
        except template.Refused as refused:
            done.dropped.append((split, _lost(chain, chain.first, refused.message, None)))
            done.traits.add((split, "refused_conversations"))
            continue
        done.rows[split].extend(row for row, _ in rows)
        done.dropped.extend((split, lost) for lost in dropped)
        if any(folded for _, folded in rows):
            done.traits.add((split, "system_folded"))
        if not stable:
            done.traits.add((split, "unstable_conversations"))
    return done


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
        ids, replies, folded = encoded.chain(record, first, last)
        stops = _replies_by_message(record, replies, first, last)
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
            row = _row(chain.conversation, first, ids, spans)
            rows.append((row, folded))
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
        message = record["messages"][index]
        if message["role"] == "user" and _is_shown(message):
            return index
    return reply


def _replies_by_message(
    record: Mapping[str, Any], replies: Sequence[template.Reply], first: int, last: int
) -> dict[int, template.Reply]:
    messages = record["messages"]
    said = [
        index
        for index in range(first, last + 1)
        if messages[index]["role"] == "assistant" and _is_shown(messages[index])
    ]
    return dict(zip(said, replies, strict=True))


def _row(
    conversation: str, first: int, ids: template.Array, spans: Mapping[template.Reply, float]
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
    return Row(conversation, first, ids[:end], weights, len(spans))


def _lost(chain: Chain, first: int, reason: str, tokens: int | None) -> dict[str, Any]:
    lost = {"conversation": chain.conversation, "first": first, "reason": reason}
    return lost if tokens is None else {**lost, "tokens": tokens}


class _Earlier:
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


def _starts(counts: npt.NDArray[np.int32]) -> list[int]:
    starts: list[int] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).tolist()
    return starts


def _is_whole(folder: Path) -> bool:
    """Whether the folder is such an output; one of an older version is not."""
    names = ("conversations.arrow", "dropped.jsonl", *(f"{split}.arrow" for split in SPLITS))
    return all((folder / name).is_file() for name in names)


class _Parts:
    """Finished parts of a run in `scratch`; each is an output of its own, for some conversations.

    A part appears whole, so that a kill at any time leaves whole ones alone.
    """

    def __init__(self, scratch: Path | None) -> None:
        self._scratch = scratch
        self._next = 0
        self._book: _Book | None = None
        self._chars = 0
        self.found: list[_Earlier] = []
        if scratch:
            scratch.mkdir(parents=True, exist_ok=True)
            for staged in scratch.glob(".part-*"):
                shutil.rmtree(staged)
            whole = sorted(path for path in scratch.glob("part-*") if _is_whole(path))
            self.found = [_Earlier(path) for path in whole]
            if whole:
                self._next = int(whole[-1].name.removeprefix("part-")) + 1

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, *_: object) -> None:
        if self._book:
            self._book.__exit__()

    def add(self, done: _Done) -> None:
        if not self._scratch:
            return
        if not self._book:
            staged = self._scratch / f".part-{os.getpid()}"
            staged.mkdir()
            self._book = _Book(staged)
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


class _Book:
    """An output that is being written, conversation by conversation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sheets = {split: _Sheet(folder / f"{split}.arrow") for split in SPLITS}
        self._dropped = (folder / "dropped.jsonl").open("w", encoding="utf-8", newline="\n")
        self._columns: dict[str, list[Any]] = {name: [] for name in CONVERSATIONS.names}
        self._refusals: Counter[str] = Counter()
        self._refused: dict[str, str] = {}

    def __enter__(self) -> _Book:
        return self

    def __exit__(self, *_: object) -> None:
        for sheet in self.sheets.values():
            sheet.close()
        self._dropped.close()

    def add(self, done: _Done) -> None:
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

    def take_over(self, run: _Run) -> None:
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
        if "tokens" not in lost:
            self._refusals[lost["reason"]] += 1
            where = f"conversation {lost['conversation']!r} from message {lost['first']}"
            self._refused.setdefault(lost["reason"], where)


def _bit(split: Split, trait: str) -> int:
    return SPLITS.index(split) * len(TRAITS) + TRAITS.index(trait)


def _as_columns(row: Row) -> _Columns:
    return _Columns(
        [row.conversation],
        np.array([row.first], np.int32),
        np.array([len(row.input_ids)], np.int32),
        row.input_ids,
        row.weights,
        np.array([row.replies], np.int32),
    )


class _Sheet:
    """One Arrow file that is being written, in batches cut by tokens, so the bytes never differ."""

    def __init__(self, path: Path) -> None:
        self.rows = self.replies = self.tokens = self.trained = 0
        self._waiting: list[_Columns] = []
        self._waiting_tokens = 0
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)

    def add(self, piece: _Columns) -> None:
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


def _cut(piece: _Columns, rows: int) -> tuple[_Columns, _Columns]:
    """The first `rows` of a piece, and the others."""
    tokens = int(piece.lengths[:rows].sum())
    halves = (
        _Columns(
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


def _list_at(column: Any, place: int) -> Any:
    start, stop = column.offsets[place].as_py(), column.offsets[place + 1].as_py()
    return column.values[start:stop].to_numpy()
