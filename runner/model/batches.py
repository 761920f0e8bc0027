"""Which rows are trained together: conversations into steps, rows into padded micro-batches.

Without packing each row is a sequence of its own, and a step is made of whole conversations. With
packing the sequences are packs, rows one behind the other, and a step is made of whole packs: of
all that a conversation has rows in, so that its rows still share a step. Steps are counted in
replies either way. The price: a step has at least one pack, so that a `batch_size` below the
replies of one pack changes nothing.

B sequences, T tokens.
"""

from __future__ import annotations

import inspect
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from runner.model import lora
from runner.model.token_files import Row

PASS_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}
"""Tokens of one pass, with padding. A CPU gains nothing from more; a GPU that has no room halves
its own."""
_PROBE_TOKENS = 64
_BY_ROWS = "sdpa_by_rows"
"""Our name among transformers' kinds of attention."""


@dataclass(frozen=True)
class Step:
    """The sequences of one optimizer step, and how many epochs are done after it.

    A sequence is a pack, as the rows in it; without packing each row is one.
    """

    sequences: tuple[tuple[int, ...], ...]
    epoch: float

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(chain.from_iterable(self.sequences))


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right.

    There is no attention mask: causal attention never looks at what stands to the right of a
    token, and padding has weight 0. Without a mask the fast attention kernels apply. Only where
    rows are packed there are `positions`, which start anew with each row. Of them transformers
    makes a mask that keeps each row to itself, in layers with a sliding window too; on a CPU layers
    without one need no mask, because each row is attended to by itself (`attend_by_rows`).
    """

    input_ids: Tensor  # (B, T)
    weights: Tensor  # (B, T)
    conversations: tuple[str, ...]
    positions: Tensor | None = None  # (B, T)


def planned(
    rows: Sequence[Row],
    *,
    batch_size: int,
    epochs: float,
    max_steps: int | None,
    seed: int,
    packs: Sequence[int] | None = None,
) -> list[Step]:
    """All steps of a training, `max_steps` if given, else `epochs`; the same seed, the same steps.

    A step holds whole conversations, as many as have `batch_size` replies, and at least one. With
    `packs`, the pack of each row, it holds whole packs, together with those that share a
    conversation with them: as many as have `batch_size` replies, and at least one.
    """
    owners, counts = [], []
    for row in rows:
        owners.append(row.conversation)
        counts.append(row.replies)
    units = _conversations(owners) if packs is None else _linked_packs(owners, packs)
    replies = {
        name: sum(counts[index] for index in chain.from_iterable(sequences))
        for name, sequences in units.items()
    }
    steps: list[Step] = []
    epoch = 0
    while units and (epoch < epochs if max_steps is None else len(steps) < max_steps):
        order = sorted(units)
        random.Random(f"{seed} {epoch}").shuffle(order)
        groups = list(_groups(order, replies, batch_size))
        if max_steps is None:
            wanted = round(min(1.0, epochs - epoch) * len(groups)) or 1
        else:
            wanted = max_steps - len(steps)
        for place, group in enumerate(groups[:wanted], start=1):
            members = tuple(sequence for name in group for sequence in units[name])
            steps.append(Step(members, epoch + place / len(groups)))
        epoch += 1
    return steps


def micro_batches(
    lengths: Sequence[int], *, micro_batch_size: int | None, pass_tokens: int
) -> list[list[int]]:
    """Places of sequences of like length, longest first, so that little is padded.

    With `micro_batch_size` so many each; else as many as have `pass_tokens` with padding.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    groups: list[list[int]] = []
    for place in order:
        full = not groups or (
            len(groups[-1]) >= micro_batch_size
            if micro_batch_size
            else (len(groups[-1]) + 1) * lengths[groups[-1][0]] > pass_tokens
        )
        if full:
            groups.append([])
        groups[-1].append(place)
    return groups


def divided(rows: Sequence[Row], pass_tokens: int) -> list[list[Row]]:
    """A pack in pieces of at most `pass_tokens`, cut between rows; a longer row stands alone."""
    pieces: list[list[Row]] = []
    tokens = 0
    for row in rows:
        tokens += len(row.input_ids)
        if not pieces or tokens > pass_tokens:
            pieces.append([])
            tokens = len(row.input_ids)
        pieces[-1].append(row)
    return pieces


def padded(rows: Sequence[Row], device: torch.device) -> Batch:
    """The rows as one rectangle."""
    return packed([[row] for row in rows], device)


def packed(sequences: Sequence[Sequence[Row]], device: torch.device) -> Batch:
    """The sequences as one rectangle, each with its rows one behind the other."""
    longest = max(sum(len(row.input_ids) for row in rows) for rows in sequences)
    # Any id will do for padding: nothing sees it, and nothing is learned from it.
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    weights = torch.zeros(len(sequences), longest)
    positions = torch.arange(longest).repeat(len(sequences), 1)
    for place, rows in enumerate(sequences):
        stop = 0
        for row in rows:
            start, stop = stop, stop + len(row.input_ids)
            input_ids[place, start:stop] = torch.tensor(row.input_ids, dtype=torch.long)
            weights[place, start:stop] = torch.tensor(row.weights)
            weights[place, start] = 0  # what stands before it belongs to another row
            positions[place, start:] -= positions[place, start].item()
        positions[place, stop:] = torch.arange(longest - stop)
    conversations = tuple(dict.fromkeys(row.conversation for rows in sequences for row in rows))
    return Batch(
        input_ids.to(device),
        weights.to(device),
        conversations,
        positions.to(device) if any(len(rows) > 1 for rows in sequences) else None,
    )


@contextmanager
def isolated(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Inside, the model reads the rows of each pack apart from one another."""
    if batch.positions is None:
        yield
        return

    def with_positions(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "position_ids": batch.positions}

    body = lora.inner(model).base_model
    hook = body.register_forward_pre_hook(with_positions, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def keeps_apart(model: nn.Module, rows: Sequence[Row]) -> bool:
    """Whether the model can keep the rows of a pack apart, by the fastest way that it knows.

    From now on it goes that way.
    """
    attend_by_rows(model)
    if isolates(model, rows):
        return True
    attend_as_ever(model)
    return isolates(model, rows)


def attend_by_rows(model: nn.Module) -> None:
    """On a CPU, packed rows are from now on attended to one by one, where there is no window.

    Attention over a pack with a mask costs the square of the pack's tokens, and on a CPU the kernel
    for masks is slow. Anything but causal attention over a whole row keeps its mask.
    """
    config = lora.inner(model).config.get_text_config()
    if next(model.parameters()).device.type == "cpu" and config._attn_implementation == "sdpa":
        AttentionInterface.register(_BY_ROWS, _attention_by_rows)
        AttentionMaskInterface.register(_BY_ROWS, _mask_by_rows)
        config._attn_implementation = _BY_ROWS


def attend_as_ever(model: nn.Module) -> None:
    """Takes `attend_by_rows` back."""
    config = lora.inner(model).config.get_text_config()
    if config._attn_implementation == _BY_ROWS:
        config._attn_implementation = "sdpa"


def _mask_by_rows(
    *, local_size: int | None = None, use_vmap: bool = False, **settings: Any
) -> Tensor | None:
    """None where attention is causal and no more, which `_attention_by_rows` sees to."""
    if local_size is None and not use_vmap and settings.get("attention_mask") is None:
        return None
    return sdpa_mask(local_size=local_size, use_vmap=use_vmap, **settings)


def _attention_by_rows(
    module: nn.Module,
    query: Tensor,  # (B, heads, T, head width), as key and value
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each row of each sequence to itself; (B, T, heads, head width)."""
    if attention_mask is not None or position_ids is None or not (position_ids[:, 1:] == 0).any():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    found = []
    for place, positions in enumerate(position_ids):
        starts = (positions == 0).nonzero()[:, 0].tolist()
        sizes = [stop - start for start, stop in pairwise([*starts, len(positions)])]
        # Split and not sliced: the way back then puts the parts together once.
        parts = (torch.split(one[place : place + 1], sizes, 2) for one in (query, key, value))
        outputs = [
            sdpa_attention_forward(module, q, k, v, None, **settings)[0]
            for q, k, v in zip(*parts, strict=True)
        ]
        found.append(torch.cat(outputs, dim=1))
    return torch.cat(found), None


def isolates(model: nn.Module, rows: Sequence[Row]) -> bool:
    """Whether the model can keep the rows of a pack apart, tried on the first two.

    Attention can; recurrent layers and convolutions carry a state from row to row.
    """
    if len(rows) < 2:
        return True
    body = lora.inner(model).base_model
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return False
    device = next(model.parameters()).device
    first, second = (_beginning(row) for row in rows[:2])
    pack = packed([[first, second]], device)
    start = len(first.input_ids)
    others = pack.input_ids.clone()
    others[:, :start] = torch.where(others[:, :start] == 0, 1, 0)
    training = model.training
    model.eval()
    with torch.no_grad():
        alone = body(input_ids=pack.input_ids[:, start:], use_cache=False)[0]
        with isolated(model, pack):
            beside, beside_others = (
                body(input_ids=ids, use_cache=False)[0][:, start:]
                for ids in (pack.input_ids, others)
            )
    model.train(training)
    scale = alone.abs().max().item()
    rounding = 2 * torch.finfo(alone.dtype).eps * scale
    # With a mask other kernels compute, so what is equal to the row alone differs by more.
    return torch.allclose(beside, beside_others, rtol=0, atol=rounding) and torch.allclose(
        beside, alone, rtol=0.05, atol=0.05 * scale
    )


def _beginning(row: Row) -> Row:
    ids, weights = row.input_ids[:_PROBE_TOKENS], row.weights[:_PROBE_TOKENS]
    return Row(row.conversation, row.first, ids, weights, row.replies)


Sequences = list[tuple[int, ...]]


def _conversations(owners: Sequence[str]) -> dict[str, Sequences]:
    found: dict[str, Sequences] = defaultdict(list)
    for index, owner in enumerate(owners):
        found[owner].append((index,))
    return dict(found)


def _linked_packs(owners: Sequence[str], packs: Sequence[int]) -> dict[str, Sequences]:
    """The packs that have to share a step, by a name that sorts as the packs do."""
    linked = list(range(max(packs, default=-1) + 1))

    def root(pack: int) -> int:
        while linked[pack] != pack:
            linked[pack] = pack = linked[linked[pack]]
        return pack

    members: list[list[int]] = [[] for _ in linked]
    pack_of: dict[str, int] = {}
    for index, (owner, pack) in enumerate(zip(owners, packs, strict=True)):
        members[pack].append(index)
        one, other = root(pack), root(pack_of.setdefault(owner, pack))
        linked[max(one, other)] = min(one, other)
    found: dict[str, Sequences] = defaultdict(list)
    for pack, held in enumerate(members):
        found[f"{root(pack):012}"].append(tuple(held))
    return dict(found)


def _groups(
    order: Iterable[str], replies: Mapping[str, int], batch_size: int
) -> Iterator[list[str]]:
    group: list[str] = []
    total = 0
    for name in order:
        if group and total + replies[name] > batch_size:
            yield group
            group, total = [], 0
        group.append(name)
        total += replies[name]
    if group:
        yield group
