"""Chains to token arrays: the ids of each chain, and the weight of the loss on each of them.

A row is a chain cut after its last weighted reply. Nothing is ever cut inside a reply: a chain that
is too long is started anew at a later user message, left out, or refused. All chains of a
conversation are encoded together, so each content is tokenised once however many chains it is in.
A message without text, such as a call of a tool alone, is left out of what is encoded. What the
template refuses is set aside with its reason.

What was encoded before is taken over, from the stage's last output or from an interrupted run: the
tokens of a conversation depend on what is said in it, which its id stands for, and on its chains.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runner.chat import jsonl
from runner.errors import RunnerError
from runner.model import load, packing, template
from runner.model.token_book import Book, Done, Earlier, Metrics, Parts, Run, is_whole
from runner.model.token_files import SPLITS, Row, Split, read

Overflow = Literal["rebase", "drop", "fail"]
Emit = Callable[[dict[str, Any]], None]

_BLOCK_CHARS = 1_000_000


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
    with Book(output) as book, Parts(scratch) as parts:
        earlier = [*parts.found]
        if previous and is_whole(previous):
            earlier.append(Earlier(previous))
        done = 0
        for block, encoded in _encoded(base, _blocks(conversations, waiting, earlier)):
            for entry in block:
                if isinstance(entry, Run):
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
    too_long = (
        f"{book.too_long} stretches are longer than max_tokens: {max_tokens}, "
        f"the longest has {book.longest} tokens"
    )
    if not book.sheets["train"].trained:
        reasons = [book.refusal] if book.refusal else []
        reasons += [too_long] if book.too_long else []
        raise RunnerError(
            f"no token to train on in {total} conversations"
            + (f": {'; '.join(reasons)}" if reasons else ""),
            hint="raise max_tokens, or use another chat template or other data"
            if reasons
            else "all conversations are kept for eval; lower eval_fraction or add data",
        )
    if book.too_long:
        text = f"{too_long}; they are left out (runner cat RECIPE tokenize --dropped)"
        emit({"event": "warning", "text": text})
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


def _blocks(
    path: Path, waiting: dict[str, list[Chain]], earlier: Sequence[Earlier]
) -> Iterator[list[_New | Run]]:
    """Conversations that have chains, about as many new ones as keep the tokenizer busy."""
    block: list[_New | Run] = []
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
            elif isinstance(last, Run) and (last.earlier, last.stop) == known:
                last.stop += 1
            else:
                block.append(Run(known[0], known[1], known[1] + 1))
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
    id: str, chains: Sequence[Chain], earlier: Sequence[Earlier]
) -> tuple[Earlier, int] | None:
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
    base: Path, blocks: Iterable[list[_New | Run]]
) -> Iterator[tuple[list[_New | Run], _Encoded]]:
    """Each block with its encodings.

    While the tokenizer works on a block, in threads of its own, the one before is written and the
    next one is read.
    """
    encoder: template.Encoder | None = None
    before: tuple[list[_New | Run], _Encoded, Future[None]] | None = None
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


def _conversation(entry: _New, encoded: _Encoded, max_tokens: int, overflow: Overflow) -> Done:
    done = Done(entry.record["id"], _digest(entry.chains))
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
