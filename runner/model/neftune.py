"""Noise on the embeddings while training: NEFTune (arXiv:2310.05914), section 3.

B sequences, T tokens, D width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from runner.model import lora
from runner.model.token_files import Row


@contextmanager
def noise(
    model: nn.Module, sequences: Sequence[Sequence[Row]], alpha: float, seed: str
) -> Iterator[None]:
    """Inside, embeddings of these sequences get uniform noise of ±alpha / √(tokens · D).

    A row's noise follows from `seed` and the row alone, and goes by the row's own length. So how a
    step is divided into passes does not show in it, and nothing of it has to be in a checkpoint.
    """
    if not alpha:
        yield
        return

    def noisy(module: nn.Module, args: object, embedded: Tensor) -> Tensor:
        return embedded + _of(sequences, alpha, seed, embedded)

    hook = lora.inner(model).get_input_embeddings().register_forward_hook(noisy)
    try:
        yield
    finally:
        hook.remove()


def _of(sequences: Sequence[Sequence[Row]], alpha: float, seed: str, embedded: Tensor) -> Tensor:
    noise = torch.zeros_like(embedded)  # (B, T, D)
    width = embedded.shape[-1]
    generator = torch.Generator(embedded.device)
    for place, rows in enumerate(sequences):
        stop = 0
        for row in rows:
            start, stop = stop, stop + len(row.input_ids)
            digest = hashlib.sha256(f"{seed} {row.conversation} {row.first}".encode()).digest()
            generator.manual_seed(int.from_bytes(digest[:7], "big"))
            most = alpha / math.sqrt((stop - start) * width)
            shape = (stop - start, width)
            drawn = torch.rand(shape, generator=generator, device=embedded.device)
            noise[place, start:stop] = (2 * drawn - 1) * most
    return noise
