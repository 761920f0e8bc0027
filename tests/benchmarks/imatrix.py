"""What an importance matrix gains at each GGUF level: what `gguf_types.WITH_IMPORTANCE` is made of.

python -m tests.benchmarks.imatrix MODEL [--dither] [--levels q4_k_m …] [--tokens 4096]

A MODEL is a folder or a GGUF file. The matrix is measured on the conversations in data/quickstart;
the mean KL on the neutral texts, prose in two languages.
`--dither` is for a MODEL that was of four bits: noise as large as what these rounded away makes of
it one that was not, or quantisers find the old grid again and look far better than they are.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import cast, get_args

import libgguf
import numpy as np
import torch
from torch import nn

from runner.model import gguf, gguf_header, imatrix, importance, load, measure
from runner.model.gguf_types import Level
from runner.model.importance import Importance
from tests.benchmarks import parity as parity_benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dither", action="store_true")
    parser.add_argument("--tokens", type=int, default=imatrix.TOKENS)
    parser.add_argument("--levels", nargs="+", default=list(get_args(Level))[3:])
    options = parser.parse_args()
    imatrix.TOKENS = options.tokens
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = load.base_folder(options.model, Path(tempfile.gettempdir()) / "runner-test-models")
        if options.dither:
            model = _dithered(model, work / "dithered")
        _measure(model, work, options.levels)


@torch.no_grad()
def _measure(folder: Path, work: Path, levels: list[Level]) -> None:
    unquantised = work / "unquantised.gguf"
    gguf.convert(folder, unquantised, gguf.stored_dtype(folder), name="measured")
    started = time.monotonic()
    found = imatrix.collect(
        model=folder,
        unquantised=unquantised,
        tokens=parity_benchmark._tokens(folder, work),
        output=work / "importance.safetensors",
        emit=lambda _event: None,
    )
    print(f"importance in {time.monotonic() - started:.0f} s: {found}", flush=True)
    matrix = importance.read(work / "importance.safetensors")
    assert matrix is not None
    model = load.causal_lm(folder, dtype="float32", device="cpu")
    model.train(False)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = imatrix._names(model, unquantised, dict.fromkeys(linear, np.zeros(0, np.float32)))
    weights = {names[name]: linear[name].weight for name in names}
    weights["token_embd.weight"] = cast(nn.Embedding, model.get_input_embeddings()).weight
    before = {name: weight.clone() for name, weight in weights.items()}
    tokenizer = load.tokenizer(folder)
    texts = [
        torch.tensor([tokenizer(piece)["input_ids"][:256]])
        for path in measure.NEUTRAL.values()
        for piece in path.read_text(encoding="utf-8").split("\n\n")[:6]
    ]
    wanted = [model(input_ids=ids).logits[0].log_softmax(-1) for ids in texts]
    header = gguf_header.read(unquantised)

    def mean_kl(level: Level, used: Importance | None) -> float:
        types = gguf.tensor_types(header, level, importance=used is not None)
        for name, weight in weights.items():
            columns = used.matrices.get(name) if used else None
            encoded = libgguf.quantize_rows(before[name].numpy(), types[name], columns)
            weight.copy_(torch.from_numpy(libgguf.dequantize_rows(encoded, types[name])))
        found = [model(input_ids=ids).logits[0].log_softmax(-1) for ids in texts]
        each = [(p.exp() * (p - q)).sum(-1) for p, q in zip(wanted, found, strict=True)]
        return float(torch.cat(each).mean())

    print(f"mean KL at {sum(ids.numel() for ids in texts)} places", flush=True)
    for level in levels:
        plain, important = mean_kl(level, None), mean_kl(level, matrix)
        print(
            f"{level:7} {plain:.4f} → {important:.4f} ({1 - important / plain:.0%} less)",
            flush=True,
        )


@torch.no_grad()
def _dithered(base: Path, output: Path) -> Path:
    """The model with even noise of a step of Q4_1 (a fifteenth of what 32 weights span)."""
    torch.manual_seed(0)
    model = load.causal_lm(base, dtype="float32", device="cpu")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            blocks = module.weight.view(-1, 32)
            step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
            blocks += (torch.rand_like(blocks) - 0.5) * step
    model.save_pretrained(output)
    for path in base.iterdir():
        if not (output / path.name).exists() and path.suffix != ".safetensors":
            shutil.copyfile(path, output / path.name)
    return output


if __name__ == "__main__":
    main()
