"""Which rows are trained together: conversations into steps, rows into padded micro-batches.

B rows, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runner.model.tokens import Row

PASS_TOKENS = {"cpu": 2048, "mps": 4096, "cuda": 16384}
"""Tokens of one pass, with padding. A CPU gains nothing from more; a GPU that has no room halves
its own."""


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step, and how many epochs are done after it."""

    rows: tuple[int, ...]
    epoch: float


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    There is no attention mask: causal attention never looks at what stands to the right of a
    token, and padding has weight 0. Without a mask the fast attention kernels apply.
    """

    input_ids: Tensor  # (B, T)
    weights: Tensor  # (B, T)
    conversations: tuple[str, ...]


def planned(
    rows: Sequence[Row], *, batch_size: int, epochs: float, max_steps: int | None, seed: int
) -> list[Step]:
    """All steps of a training, `max_steps` if given, else `epochs`; the same seed, the same steps.

    A step holds whole conversations, as many as have `batch_size` replies, and at least one.
    """
    conversations: dict[str, list[int]] = {}
    replies: dict[str, int] = {}
    for index, row in enumerate(rows):
        conversations.setdefault(row.conversation, []).append(index)
        replies[row.conversation] = replies.get(row.conversation, 0) + row.replies
    steps: list[Step] = []
    epoch = 0
    while conversations and (epoch < epochs if max_steps is None else len(steps) < max_steps):
        order = sorted(conversations)
        random.Random(f"{seed} {epoch}").shuffle(order)
        groups = list(_groups(order, replies, batch_size))
        if max_steps is None:
            wanted = round(min(1.0, epochs - epoch) * len(groups)) or 1
        else:
            wanted = max_steps - len(steps)
        for place, group in enumerate(groups[:wanted], start=1):
            members = tuple(index for name in group for index in conversations[name])
            steps.append(Step(members, epoch + place / len(groups)))
        epoch += 1
    return steps


def micro_batches(
    lengths: Sequence[int], *, micro_batch_size: int | None, pass_tokens: int
) -> list[list[int]]:
    """Places of rows of like length, longest first, so that little is padded.

    With `micro_batch_size` so many rows each; else as many as have `pass_tokens` with padding.
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


def padded(rows: Sequence[Row], device: torch.device) -> Batch:
    """The rows as one rectangle."""
    longest = max(len(row.input_ids) for row in rows)
    # Any id will do for padding: nothing sees it, and nothing is learned from it.
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    weights = torch.zeros(len(rows), longest)
    for place, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[place, :length] = torch.tensor(row.input_ids, dtype=torch.long)
        weights[place, :length] = torch.tensor(row.weights)
    conversations = tuple(dict.fromkeys(row.conversation for row in rows))
    return Batch(input_ids.to(device), weights.to(device), conversations)


def _groups(order: Iterable[str], replies: dict[str, int], batch_size: int) -> Iterator[list[str]]:
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
