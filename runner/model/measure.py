"""Measures base and tuned model on the same: eval tokens, replies to prompts, general text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel

from runner.errors import PreconditionError
from runner.model import adapter, generate, load, score, sft, template, token_files

NEUTRAL_ENGLISH = Path(__file__).parent / "retention" / "english.txt"

PIECE_TOKENS = 512
"""Longest piece of general text that is scored at once."""


@dataclass(frozen=True)
class Measured:
    """What was found for one model; losses are means per token, in nats."""

    eval_loss: float | None
    retention_loss: float
    replies: tuple[str, ...]
    ended_replies: float
    """The share of replies that the model ended by itself."""


def both(
    *,
    base: Path,
    model: Path,
    eval_tokens: Path,
    asked: Sequence[Sequence[dict[str, str]]],
    reply_tokens: int,
    texts: Sequence[Path],
    emit: Callable[[dict[str, Any]], None],
) -> tuple[Measured, Measured]:
    """(base, tuned), from one load of the weights where the tuned model is an adapter."""
    tokenizer = load.tokenizer(base)
    prompts = [template.prompt(tokenizer, messages) for messages in asked]
    pieces = [piece for path in texts for piece in _pieces(path)]
    rows = token_files.read(eval_tokens)
    device = load.device()
    dtype = sft.precision_of(device)

    def one(loaded: Any, side: str) -> Measured:
        def progress(done: int, total: int) -> None:
            unit = f"replies of the {side} model"
            emit({"event": "progress", "done": done, "total": total, "unit": unit})

        said = generate.replies(
            loaded, tokenizer, prompts, max_new_tokens=reply_tokens, progress=progress
        )
        return Measured(
            eval_loss=score.mean_loss(loaded, rows) if len(rows) else None,
            retention_loss=score.text_loss(loaded, tokenizer, pieces, max_tokens=PIECE_TOKENS),
            replies=tuple(reply.text for reply in said),
            ended_replies=sum(reply.stopped for reply in said) / max(1, len(said)),
        )

    tuned, is_adapter = adapter.tuned(base, model, dtype=dtype, device=device)
    after = one(tuned, "tuned")
    if is_adapter:
        with cast(PeftModel, tuned).disable_adapter():
            return one(tuned, "base"), after
    del tuned
    return one(load.causal_lm(base, dtype=dtype, device=device), "base"), after


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
