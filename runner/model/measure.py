"""Measures base and tuned model on the same: eval tokens, replies to prompts, general text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from runner.errors import PreconditionError
from runner.model import adapter, generate, load, score, sft, template, token_files

_FOLDER = Path(__file__).parent / "retention"
NEUTRAL: Mapping[str, Path] = {
    "English": _FOLDER / "english.txt",
    "Russian": _FOLDER / "russian.txt",
}
"""General text, written for this project."""

PIECE_TOKENS = 512
"""Longest piece of general text that is scored at once."""

KNOWN_BITS = 2.0
"""Per character of general text: a model that needs more does not know the language. Measured with
SmolLM2-135M, which has learned English alone: 1.13 for English and 2.87 for Russian. By tokens it
could not be told: there each letter of Russian is one, so that its loss per token is the lower."""


@dataclass(frozen=True)
class Kept:
    """How well a model predicts one general text."""

    loss: float
    """Mean per token, in nats."""
    bits_per_character: float


@dataclass(frozen=True)
class Measured:
    """What was found for one model; losses are means per token, in nats."""

    eval_loss: float | None
    retention: Mapping[str, Kept]
    """By the name of the text."""
    replies: tuple[str, ...]
    ended_replies: float
    """The share of replies that the model ended by itself."""
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """For each eval conversation the weighted sum of its tokens' losses, and the weight."""


def both(
    *,
    base: Path,
    model: Path,
    eval_tokens: Path,
    asked: Sequence[Sequence[dict[str, str]]],
    reply_tokens: int,
    texts: Mapping[str, Path],
    emit: Callable[[dict[str, Any]], None],
) -> tuple[Measured, Measured]:
    """(base, tuned), from one load of the weights where the tuned model is an adapter.

    `texts` are general texts by name. Without any, those in `NEUTRAL` are taken; of these the tuned
    model is measured on what the base knows.
    """
    tokenizer = load.tokenizer(base)
    prompts = [template.prompt(tokenizer, messages) for messages in asked]
    pieces = {name: _pieces(path) for name, path in (texts or NEUTRAL).items()}
    rows = token_files.read(eval_tokens)

    def one(loaded: nn.Module, side: str, names: Sequence[str]) -> Measured:
        def progress(done: int, total: int) -> None:
            unit = f"replies of the {side} model"
            emit({"event": "progress", "done": done, "total": total, "unit": unit})

        said = generate.replies(
            cast(Any, loaded), tokenizer, prompts, max_new_tokens=reply_tokens, progress=progress
        )
        losses = score.conversation_losses(loaded, rows)
        return Measured(
            eval_loss=score.mean_of(losses),
            losses=losses,
            retention={name: kept(loaded, tokenizer, pieces[name]) for name in names},
            replies=tuple(reply.text for reply in said),
            ended_replies=sum(reply.stopped for reply in said) / max(1, len(said)),
        )

    def measured_again(before: Measured) -> Sequence[str]:
        return list(pieces) if texts else known(before.retention)

    device = load.device()
    dtype = sft.precision_of(device)
    if adapter.is_adapter(model):
        tuned, _ = adapter.tuned(base, model, dtype=dtype, device=device)
        with cast(PeftModel, tuned).disable_adapter():
            before = one(tuned, "base", list(pieces))
        return before, one(tuned, "tuned", measured_again(before))
    before = one(load.causal_lm(base, dtype=dtype, device=device), "base", list(pieces))
    # Not before the base is out of memory.
    tuned, _ = adapter.tuned(base, model, dtype=dtype, device=device)
    return before, one(tuned, "tuned", measured_again(before))


def kept(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> Kept:
    """How well the model predicts a text, of which long pieces are cut."""
    loss = score.text_loss(model, tokenizer, pieces, max_tokens=PIECE_TOKENS)
    tokens = characters = 0
    for piece in pieces:
        ids = tokenizer(piece, truncation=True, max_length=PIECE_TOKENS)["input_ids"]
        tokens += len(ids) - 1
        characters += len(str(tokenizer.decode(ids[1:])))
    return Kept(loss, loss * tokens / max(1, characters) / math.log(2))


def known(retention: Mapping[str, Kept]) -> list[str]:
    """The texts in whose language the model is at home."""
    return [name for name, found in retention.items() if found.bits_per_character < KNOWN_BITS]


def _pieces(path: Path) -> list[str]:
    """The paragraphs of a text file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PreconditionError(
            f"retention: {path} is not UTF-8 text (byte {error.start})", hint="save it as UTF-8"
        ) from None
    pieces = [piece for piece in text.split("\n\n") if len(piece.split()) > 1]
    if not pieces:
        raise PreconditionError(
            f"retention: {path} holds no text", hint="name a file with some paragraphs of prose"
        )
    return pieces
