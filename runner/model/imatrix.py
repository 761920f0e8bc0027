"""Measures the importance matrix of a model: what goes into each of its linear layers while it
reads the recipe's own training rows.

Training rows and not held-out ones: what is made with the matrix is measured on those (`parity`).

T tokens, W width of a layer's input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from runner.model import gguf, gguf_header, importance, load, measure, reference, token_files
from runner.model.importance import Importance, Matrix
from runner.model.parity import Emit, Metrics

TOKENS = 4096
"""How much is read; every figure of `tests/benchmarks/imatrix.py` is from so much."""
TOKENS_FEW = 1024
"""With fewer of the recipe's own, neutral texts are read beside them."""
ROW_TOKENS = 512
"""Of each row."""


def collect(
    *, model: Path, unquantised: Path, tokens: Path | None, output: Path, emit: Emit
) -> Metrics:
    """Writes the importance matrix of a merged model to the file `output`.

    `model` is its folder, `unquantised` what that was converted to, whose names it gets. `tokens`
    is the folder of an output of tokenize; without it neutral texts are read.
    """
    tokenizer = load.tokenizer(model)
    rows, dataset = _rows(tokens, tokenizer)
    device = load.device()
    loaded = load.causal_lm(model, dtype=reference.precision(model, device), device=device)
    loaded.train(False)
    squares = _squares(loaded, rows, emit)
    names = _names(loaded, unquantised, squares)
    matrices = {names[layer]: _floored(found) for layer, found in squares.items() if layer in names}
    if not matrices:
        said = "no layer of the model was found in its GGUF file: levels of few bits lose more"
        emit({"event": "warning", "text": f"{said} than they would with an importance matrix"})
    found = Importance(matrices, "", dataset, len(rows))
    importance.write(found, output)
    return {"layers": len(matrices), "tokens": sum(len(row) for row in rows)}


def _rows(tokens: Path | None, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], str]:
    """What is read, and what to call it: some of the training rows, always the same of the same."""
    path = tokens / "train.arrow" if tokens else None
    own = _bounded(_own(path)) if path and path.is_file() else []
    if sum(map(len, own)) >= TOKENS_FEW:
        return own, "training rows of the recipe"
    neutral = (
        list(tokenizer(piece)["input_ids"])
        for piece in "\n\n".join(
            path.read_text(encoding="utf-8") for path in measure.NEUTRAL.values()
        ).split("\n\n")
    )
    both = _bounded(iter([*own, *neutral]))
    return both, "training rows of the recipe and neutral texts" if own else "neutral texts"


def _own(path: Path) -> Iterator[list[int]]:
    rows = token_files.read(path)
    names = rows.conversations
    ranked = sorted(
        range(len(rows)),
        key=lambda place: hashlib.sha256(f"{names[place]} {place}".encode()).digest(),
    )
    return (rows[place].input_ids.tolist() for place in ranked)


def _bounded(rows: Iterator[list[int]]) -> list[list[int]]:
    found: list[list[int]] = []
    left = TOKENS
    for row in rows:
        if piece := row[: min(left, ROW_TOKENS)]:
            found.append(piece)
            left -= len(piece)
        if not left:
            break
    return found


@torch.inference_mode()
def _squares(model: nn.Module, rows: list[list[int]], emit: Emit) -> Mapping[str, Matrix]:
    """By layer the mean square of each of its inputs, (W,)."""
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def add(name: str, inputs: Tensor) -> None:
        each = inputs.detach().reshape(-1, inputs.shape[-1])  # (T, W)
        one = each.float().square().sum(0).cpu().double()
        sums[name] = sums[name] + one if name in sums else one
        seen[name] = seen.get(name, 0) + len(each)

    with _listening(model, add):
        device = next(model.parameters()).device
        for done, row in enumerate(rows):
            emit({"event": "progress", "done": done, "total": len(rows), "unit": "texts"})
            ids = torch.tensor([row], device=device)
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return {name: (sums[name] / seen[name]).float().numpy() for name in sums}


@contextmanager
def _listening(model: nn.Module, add: Any) -> Iterator[None]:
    """Calls `add` with the name of each linear layer and what goes into it."""

    def hook(name: str) -> Any:
        return lambda _module, inputs: add(name, inputs[0])

    hooks = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _names(
    model: nn.Module, unquantised: Path, measured: Mapping[str, Matrix]
) -> Mapping[str, str]:
    """Each measured layer's name in the GGUF file, found by its weights: the sums of squares of
    their columns are the same there, however a converter orders the rows. Where it reorders
    columns, or puts several layers into one tensor, the layer is not found.
    """
    by_shape: dict[tuple[int, ...], list[tuple[str, Matrix]]] = {}
    for tensor in gguf_header.read(unquantised).tensors:
        # The head is left out, as by llama.cpp: it is stored in six bits at every level.
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            energies = gguf.column_squares(unquantised, tensor)
            by_shape.setdefault(tensor.shape, []).append((tensor.name, energies))
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if name not in measured or not isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach()
        own = weight.float().square().sum(0).cpu().numpy()
        candidates = by_shape.get(tuple(reversed(weight.shape)), [])
        differing = [(_differing(own, theirs), their) for their, theirs in candidates]
        least, their = min(differing, default=(np.inf, ""))
        if least < _SAME and their not in found.values():
            found[name] = their
    return found


_SAME = 0.01
"""Weights in another number format differ by less, other weights by more."""


def _differing(own: Matrix, theirs: Matrix) -> float:
    return float(np.abs(own - theirs).max() / max(float(own.mean()), 1e-30))


def _floored(matrix: Matrix) -> Matrix:
    """Inputs that were always zero matter a little too, or their weights could become anything."""
    least = max(1e-6 * float(matrix.mean()), 1e-18)
    return np.maximum(matrix, np.float32(least))
