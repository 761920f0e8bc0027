"""Replies of a model to prompts: the most likely token each time, many prompts at once.

B prompts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from runner.model import lora


@dataclass(frozen=True)
class Generated:
    """A reply without control tokens; `stopped` where the model ended it by itself."""

    text: str
    stopped: bool


def replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """One reply per prompt, in order; a prompt ends where the assistant's turn is open."""
    ends = end_ids(model, tokenizer)
    # Prompts of like length go together, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    found: dict[int, Generated] = {}
    was_training = model.training
    model.eval()
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        batch = [prompts[place] for place in places]
        for place, ids in zip(places, greedy(model, batch, ends, max_new_tokens), strict=True):
            stopped = bool(ids) and ids[-1] in ends
            text = tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
            found[place] = Generated(str(text), stopped)
        if progress:
            progress(len(found), len(prompts))
    model.train(was_training)
    return [found[place] for place in range(len(prompts))]


def end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a reply, as the model's files and the tokenizer's say."""
    config = lora.inner(model).generation_config
    said = config.eos_token_id if config is not None else None
    listed = said if isinstance(said, list) else [said]
    ids = {*listed, tokenizer.eos_token_id}
    return frozenset(int(id) for id in ids if id is not None)


@torch.inference_mode()
def greedy(
    model: nn.Module, prompts: Sequence[list[int]], ends: frozenset[int], max_new_tokens: int
) -> list[list[int]]:
    """The new ids of each prompt, up to and with the one that ends it."""
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    # On the left, so that the next token of every prompt is in the same column.
    pads = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]
    input_ids = torch.tensor(rows, device=device)  # (B, T)
    mask = (torch.arange(longest)[None] >= torch.tensor(pads)[:, None]).long().to(device)  # (B, T)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    end = torch.tensor(sorted(ends), device=device, dtype=torch.long)
    open_rows = torch.ones(len(prompts), dtype=torch.bool, device=device)
    cache = None
    columns: list[Tensor] = []
    for _ in range(max_new_tokens):
        seen = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = seen.past_key_values
        input_ids = seen.logits[:, -1:].argmax(-1)  # (B, 1)
        columns.append(input_ids)
        open_rows &= ~torch.isin(input_ids[:, 0], end)
        if not open_rows.any():
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
        position_ids = position_ids[:, -1:] + 1
    if not columns:
        return [[] for _ in prompts]
    return [_until_end(row, ends) for row in torch.cat(columns, 1).tolist()]


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    for place, id in enumerate(ids):
        if id in ends:
            return ids[: place + 1]
    return ids
