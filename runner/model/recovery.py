"""The gradient of a step, whatever it takes: memory that runs out, float16 that overflows.

The step is computed again in smaller passes, or with another scale, and comes out the same but for
rounding. Only what cannot be helped, a loss that is not a number, ends the training, in words.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from runner.errors import PreconditionError, RunnerError
from runner.model import batches, lora, memory, neftune, score
from runner.model.token_files import Row

Recompute = Literal["auto", "on", "off"]
Emit = Callable[[dict[str, Any]], None]

NAMED_MAX = 5
"""Conversations that a message names."""

# What a CPU, Apple's GPU, cuBLAS and C++ say; of CUDA there is torch.OutOfMemoryError.
_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc"
    r"|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Limits:
    """How a step is cut into passes, and what its loss is multiplied by.

    None of these changes the gradient but for rounding.
    """

    micro_batch_size: int | None
    pass_tokens: int
    loss_scale: float = 1.0
    eval_tokens: int = batches.PASS_TOKENS["cpu"]
    recompute: Recompute = "auto"


@dataclass(frozen=True)
class Noise:
    """NEFTune's alpha, 0 for none, and what the noise of this step follows from."""

    alpha: float = 0.0
    seed: str = ""


@dataclass(frozen=True)
class Part:
    """One pass: its shares of the step's loss and of its weight, and whose conversations."""

    loss: float
    weight: float
    conversations: tuple[str, ...]
    tokens: int = 0
    """With padding."""


def fitted(
    asked: Limits,
    model: memory.Model | None,
    training: memory.Training,
    available: int | None,
    emit: Emit,
) -> tuple[Limits, bool]:
    """The limits to begin with, by the estimate of what there is memory for; whether activations
    are to be computed again.

    A micro-batch that the recipe says stays as it is. `training.max_tokens` is the longest row's.
    """
    recomputes = asked.recompute == "on"
    if model is None or available is None:
        return asked, recomputes
    rows = asked.micro_batch_size
    found = memory.first_pass(
        model,
        replace(training, recompute=recomputes),
        available,
        most=rows * training.max_tokens if rows else asked.pass_tokens,
        may_recompute=asked.recompute == "auto",
    )
    if rows is None and found.is_smaller:
        text = f"passes of {found.tokens} tokens, by the estimate of what there is memory for"
        emit({"event": "verdict", "text": text})
        asked = replace(asked, pass_tokens=found.tokens)
    if found.recompute and not recomputes:
        text = "activations are computed twice, by the estimate of what there is memory for"
        emit({"event": "verdict", "text": text})
    return asked, found.recompute


def gradients(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    rows: Sequence[Row],
    sizes: Sequence[int],
    step: int,
    limits: Limits,
    mixed: torch.autocast,
    max_grad_norm: float,
    noise: Noise,
    emit: Emit,
) -> tuple[list[Part], float, Limits]:
    """Leaves the clipped gradient of a step in the parameters; (its passes, its norm, new limits).

    Out of memory halves the passes, and a float16 overflow the loss scale; then the same step is
    computed again, from the same random state.
    """
    before = random_state(next(iter(trained.values())).device)
    while True:
        parts: list[Part] | None = None
        try:
            parts = backward(model, rows, limits, mixed, sizes, noise)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        # Here the error is gone, and with it the tensors that its frames held.
        if parts is None:
            limits = _smaller(model, rows, sizes, limits, emit)
        else:
            for parameter in trained.values():
                if parameter.grad is not None and limits.loss_scale != 1:
                    parameter.grad /= limits.loss_scale
            norm = float(nn.utils.clip_grad_norm_(trained.values(), max_grad_norm))
            loss = sum(part.loss for part in parts)
            if math.isfinite(loss) and math.isfinite(norm):
                return parts, norm, limits
            if limits.loss_scale <= 1 or not math.isfinite(loss):
                raise _not_finite(step, parts, loss, norm)
            limits = replace(limits, loss_scale=limits.loss_scale / 2)
        for parameter in trained.values():
            parameter.grad = None
        restore_random(before)


def backward(
    model: nn.Module,
    rows: Sequence[Row],
    limits: Limits,
    mixed: torch.autocast,
    sizes: Sequence[int] = (),
    noise: Noise = Noise(),
) -> list[Part]:
    """Adds up the gradient, pass by pass.

    The loss of a step is sum(weight · nll) / sum(weight) over all of its rows, so the division
    into passes does not show in it. `sizes` are the rows of each pack in turn, where rows are
    packed; a pack with more tokens than a pass is cut between its rows.
    """
    device = next(model.parameters()).device
    total_weight = sum(float(row.weights.sum(dtype="float64")) for row in rows)
    losses: list[Tensor] = []
    parts: list[Part] = []
    for sequences in _passes(rows, sizes, limits):
        batch = batches.packed(sequences, device)
        with (
            mixed,
            batches.isolated(model, batch),
            neftune.noise(model, sequences, noise.alpha, noise.seed),
        ):
            loss = score.summed_nll(model, batch) / total_weight
        (loss * limits.loss_scale).backward()  # type: ignore[no-untyped-call]
        weight = sum(float(row.weights.sum(dtype="float64")) for s in sequences for row in s)
        losses.append(loss.detach())  # not asked for yet: a GPU would be waited for
        size = batch.input_ids.numel()
        parts.append(Part(0.0, weight / total_weight, batch.conversations, size))
    return [replace(part, loss=loss.item()) for part, loss in zip(parts, losses, strict=True)]


def mean_loss(
    model: nn.Module, rows: Sequence[Row], limits: Limits, mixed: torch.autocast, emit: Emit
) -> tuple[float, Limits]:
    """The mean loss over all rows, and the limits with which there was memory for it."""
    while True:
        try:
            with mixed:
                return score.mean_loss(model, rows, pass_tokens=limits.eval_tokens), limits
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        longest = max(len(row.input_ids) for row in rows)
        if limits.eval_tokens <= longest:
            raise _too_large(longest)
        limits = replace(limits, eval_tokens=limits.eval_tokens // 2)
        _let_go()
        text = f"out of memory: eval measures {limits.eval_tokens} tokens at a time from now on"
        emit({"event": "warning", "text": text})


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error)))


@contextmanager
def memory_in_words(what: str, hint: str) -> Iterator[None]:
    """An allocation that fails in here becomes a PreconditionError: there is no room for `what`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        raise PreconditionError(f"out of memory: there is no room for {what}", hint=hint) from error


def recompute(model: nn.Module) -> None:
    """From now on activations are computed again on the way back, and not kept.

    Gradient checkpointing (arXiv:1604.06174), section 4: a third more work.
    """
    causal: Any = lora.inner(model)
    if not can_recompute(model):
        raise PreconditionError(
            f"gradient_checkpointing: {type(causal).__name__} cannot compute activations again",
            hint="leave the setting out",
        )
    causal.activation_checkpointing_enable({"use_reentrant": False})


def can_recompute(model: nn.Module) -> bool:
    return bool(lora.inner(model).supports_gradient_checkpointing)


def is_recomputing(model: nn.Module) -> bool:
    return bool(lora.inner(model).is_activation_checkpointing)


def named(conversations: Sequence[str]) -> str:
    """`a, b, c and 4 more`"""
    names = list(dict.fromkeys(conversations))
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return f"{', '.join(names[:NAMED_MAX])}{more}"


def random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU and, if it computes there, of the GPU."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if device.type == "cuda" else states


def restore_random(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


Pack = list[Row]


def _passes(rows: Sequence[Row], sizes: Sequence[int], limits: Limits) -> list[list[Pack]]:
    """The sequences of each pass."""
    left = iter(rows)
    packs = [list(islice(left, size)) for size in sizes or [1] * len(rows)]
    if limits.micro_batch_size is None:
        packs = [piece for pack in packs for piece in batches.divided(pack, limits.pass_tokens)]
    groups = batches.micro_batches(
        [_tokens(pack) for pack in packs],
        micro_batch_size=limits.micro_batch_size,
        pass_tokens=limits.pass_tokens,
    )
    return [[packs[place] for place in group] for group in groups]


def _tokens(pack: Pack) -> int:
    return sum(len(row.input_ids) for row in pack)


def _smaller(
    model: nn.Module, rows: Sequence[Row], sizes: Sequence[int], limits: Limits, emit: Emit
) -> Limits:
    """Half the tokens of a pass; at one row a pass, recomputation instead of kept activations."""
    _let_go()
    passes = _passes(rows, sizes, limits)
    longest = max(len(row.input_ids) for row in rows)
    sequences = max(len(packs) for packs in passes)
    # With padding, which takes memory too.
    tokens = max(len(packs) * max(_tokens(pack) for pack in packs) for packs in passes)
    if limits.micro_batch_size is not None and sequences > 1:
        smaller = replace(limits, micro_batch_size=sequences // 2)
        text = f"out of memory: {sequences // 2} examples at a time from now on"
    elif tokens > longest:
        # Also where one pack is a pass: it is cut between its rows.
        smaller = replace(limits, micro_batch_size=None, pass_tokens=max(longest, tokens // 2))
        text = f"out of memory: {smaller.pass_tokens} tokens at a time from now on"
    elif limits.recompute == "auto" and can_recompute(model) and not is_recomputing(model):
        recompute(model)
        smaller = limits
        text = "out of memory: activations are computed again from now on, not kept"
    else:
        raise _too_large(longest, recompute_would_help=limits.recompute == "off")
    emit({"event": "warning", "text": text})
    return smaller


def _let_go() -> None:
    """Gives up what failed passes still hold."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _too_large(longest: int, *, recompute_would_help: bool = False) -> PreconditionError:
    first = "gradient_checkpointing: auto, " if recompute_would_help else ""
    return PreconditionError(
        f"one example of {longest} tokens does not fit into the memory of the device",
        hint=f"{first}method: qlora, or a smaller max_tokens in tokenize",
    )


def _not_finite(step: int, parts: Sequence[Part], loss: float, norm: float) -> RunnerError:
    bad = [part for part in parts if not math.isfinite(part.loss)] or parts
    names = named([name for part in bad for name in part.conversations])
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
    return RunnerError(
        f"step {step}: the {what}; conversations: {names}",
        hint="look at them with `runner preview`; else a lower learning_rate, or precision: "
        "float32. The checkpoints before this step are kept",
    )
