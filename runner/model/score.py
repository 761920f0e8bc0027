"""How well a model predicts tokens: the loss that training lowers and that evaluation compares.

B rows, T tokens, N tokens that carry loss, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runner.errors import RunnerError
from runner.model import batches, lora
from runner.model.batches import Batch
from runner.model.token_files import Row

_LOGITS_AT_ONCE = 2**24
"""Elements of the logits that exist at one time: 64 MiB of float32."""


def summed_nll(model: nn.Module, batch: Batch) -> Tensor:
    """The sum over the batch of weight times negative log likelihood; logits where a weight is."""
    causal = lora.inner(model)
    carries = batch.weights[:, 1:] != 0
    hidden: Tensor = causal.base_model(input_ids=batch.input_ids, use_cache=False)[0]  # (B, T, D)
    hidden = hidden[:, :-1][carries]  # (N, D): what predicts the next token
    targets = batch.input_ids[:, 1:][carries]  # (N,)
    weights = batch.weights[:, 1:][carries]  # (N,)
    size = max(1, _LOGITS_AT_ONCE // _vocabulary(causal))
    pieces = [
        (hidden[first : first + size], targets[first : first + size], weights[first : first + size])
        for first in range(0, max(1, len(targets)), size)
    ]
    if _has_frozen_head(causal):
        losses = [_FrozenHeadNll.apply(causal, *piece) for piece in pieces]  # type: ignore[no-untyped-call]
    elif len(pieces) == 1 or not torch.is_grad_enabled():
        losses = [_piece_nll(causal, *piece) for piece in pieces]
    else:
        # Computed again on the way back, or the logits of all pieces would be kept until then.
        losses = [
            checkpoint(_piece_nll, causal, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in pieces
        ]
    return torch.stack(losses).sum()


def conversation_losses(
    model: nn.Module, rows: Sequence[Row], *, pass_tokens: int | None = None
) -> dict[str, tuple[float, float]]:
    """For each conversation the weighted sum of the negative log likelihood, and the weight."""
    device = next(model.parameters()).device
    groups = batches.micro_batches(
        [len(row.input_ids) for row in rows],
        micro_batch_size=None,
        pass_tokens=pass_tokens or batches.PASS_TOKENS[device.type],
    )
    nll = [0.0] * len(rows)
    with torch.no_grad(), _evaluating(model):
        for group in groups:
            batch = batches.padded([rows[place] for place in group], device)
            for place, loss in zip(group, _nll_of_rows(model, batch).tolist(), strict=True):
                nll[place] = loss
    found: dict[str, tuple[float, float]] = {}
    for row, loss in zip(rows, nll, strict=True):
        before = found.get(row.conversation, (0.0, 0.0))
        weight = float(row.weights[1:].sum(dtype=np.float64))
        found[row.conversation] = before[0] + loss, before[1] + weight
    return found


def mean_of(losses: Mapping[str, tuple[float, float]]) -> float | None:
    """The weighted mean over conversations, in nats per token; None where there are none."""
    weight = sum(each[1] for each in losses.values())
    return sum(each[0] for each in losses.values()) / weight if weight else None


def mean_loss(model: nn.Module, rows: Sequence[Row], *, pass_tokens: int | None = None) -> float:
    """Weighted mean of the negative log likelihood over all rows, in nats per token."""
    device = next(model.parameters()).device
    groups = batches.micro_batches(
        [len(row.input_ids) for row in rows],
        micro_batch_size=None,
        pass_tokens=pass_tokens or batches.PASS_TOKENS[device.type],
    )
    total = weight = 0.0
    with torch.no_grad(), _evaluating(model):
        for group in groups:
            batch = batches.padded([rows[place] for place in group], device)
            total += summed_nll(model, batch).item()
            weight += batch.weights.sum(dtype=torch.float64).item()
    return total / weight


def text_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_tokens: int,
) -> float:
    """Mean negative log likelihood per token of plain texts, each cut after `max_tokens`."""
    rows = []
    for text in texts:
        ids = np.array(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"])
        weights = np.ones(len(ids), np.float32)
        weights[:1] = 0
        if len(ids) > 1:
            rows.append(Row("", 0, ids, weights, 0))
    return mean_loss(model, rows)


def check_logits(model: nn.Module, row: Row) -> None:
    """Raises where the model computes its logits in another way than the loss does here."""
    causal = lora.inner(model)
    device = next(model.parameters()).device
    input_ids = torch.tensor(row.input_ids[:8], dtype=torch.long, device=device)[None]
    hidden: list[Tensor] = []
    hook = causal.base_model.register_forward_hook(lambda *ran: hidden.append(ran[-1][0]))
    try:
        with torch.no_grad(), _evaluating(model):
            theirs = causal(input_ids=input_ids, use_cache=False).logits.float()
            own = _logits(causal, hidden[0])
    finally:
        hook.remove()
    # Both come from the same kernels; what is between is rounding of the last few bits.
    if not torch.allclose(own, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item()):
        raise RunnerError(
            f"{type(causal).__name__} changes its logits after the output head in a way that is "
            "not known here",
            hint="the loss would be wrong; choose another base model, or report this one",
        )


def _nll_of_rows(model: nn.Module, batch: Batch) -> Tensor:
    """(B,): for each row the sum of weight times negative log likelihood, without a gradient."""
    causal = lora.inner(model)
    carries = batch.weights[:, 1:] != 0
    hidden: Tensor = causal.base_model(input_ids=batch.input_ids, use_cache=False)[0]  # (B, T, D)
    hidden = hidden[:, :-1][carries]  # (N, D)
    targets = batch.input_ids[:, 1:][carries]  # (N,)
    owners = carries.nonzero()[:, 0]  # (N,)
    size = max(1, _LOGITS_AT_ONCE // _vocabulary(causal))
    pieces = [
        functional.cross_entropy(
            _logits(causal, hidden[first : first + size]),
            targets[first : first + size],
            reduction="none",
        )
        for first in range(0, max(1, len(targets)), size)
    ]
    sums = torch.zeros(len(batch.weights), dtype=torch.float32, device=hidden.device)
    return sums.index_add_(0, owners, torch.cat(pieces) * batch.weights[:, 1:][carries])


def _piece_nll(causal: PreTrainedModel, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    nll = functional.cross_entropy(_logits(causal, hidden), targets, reduction="none")
    return (nll * weights).sum()


class _FrozenHeadNll(torch.autograd.Function):
    """`_piece_nll` that takes the gradient on the way forward, while the logits are there.

    So they are neither kept nor computed twice: Liger kernels (arXiv:2410.10989), section 3.2.
    """

    @staticmethod
    def forward(
        ctx: Any, causal: PreTrainedModel, hidden: Tensor, targets: Tensor, weights: Tensor
    ) -> Tensor:
        config = causal.config.get_text_config()
        head = causal.get_output_embeddings().weight  # type: ignore[no-untyped-call]  # (V, D)
        logits = _logits(causal, hidden)  # (N, V)
        likelihoods = functional.log_softmax(logits, -1)
        nll = -likelihoods.gather(1, targets[:, None])[:, 0]
        if ctx.needs_input_grad[1]:
            slope = likelihoods.exp_()  # of nll by logits: softmax - 1 at the target
            slope[torch.arange(len(targets), device=slope.device), targets] -= 1
            if cap := getattr(config, "final_logit_softcapping", None):
                slope *= 1 - (logits / cap) ** 2
            factor = weights * _logit_factor(config)
            gradient = (slope.to(head.dtype) @ head) * factor[:, None]
            ctx.save_for_backward(gradient.to(hidden.dtype))
        return (nll * weights).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * upstream[0], None, None


def _has_frozen_head(causal: PreTrainedModel) -> bool:
    head = causal.get_output_embeddings()  # type: ignore[no-untyped-call]
    return type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad


def _logits(causal: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(…, D) to (…, V) in float32, as the model's own forward does after its last norm."""
    head: Any = causal.get_output_embeddings()  # type: ignore[no-untyped-call]
    logits: Tensor = head(hidden.to(head.weight.dtype)).float()
    config = causal.config.get_text_config()
    if (factor := _logit_factor(config)) != 1:
        logits = logits * factor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 (arXiv:2408.00118), § 2
        logits = torch.tanh(logits / cap) * cap
    return logits


def _logit_factor(config: Any) -> float:
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    return float(scale / divisor)


def _vocabulary(causal: PreTrainedModel) -> int:
    return int(causal.config.get_text_config().vocab_size)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
