"""What a training wrote, opened beside its base: to be measured, or merged into one model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from runner import disk
from runner.errors import RunnerError
from runner.model import load, lora
from runner.model.load import Dtype

_WEIGHTS_AND_CONFIG = re.compile(r".*\.(safetensors|safetensors\.index\.json)|config\.json")
_COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "additional_chat_templates/*")


def tuned(base: Path, model: Path, *, dtype: Dtype, device: str) -> tuple[nn.Module, bool]:
    """The trained model, and whether it is an adapter: then `disable_adapter()` gives the base."""
    if not is_adapter(model):
        return load.causal_lm(model, dtype=dtype, device=device), False
    return lora.opened(load.causal_lm(base, dtype=dtype, device=device), model), True


def merge(base: Path, model: Path, output: Path, *, dtype: Dtype) -> None:
    """Writes the trained model as one, in the layout of Hugging Face, with the base's tokenizer.

    The base is not quantised, whatever it was trained on. Each layer is added up in float32 and
    then rounded to `dtype`, once; no more than the model and one layer is in memory.
    """
    check_vocabulary(base, model)
    if is_adapter(model):
        adapted = lora.opened(load.causal_lm(base, dtype=stored_dtype(base), device="cpu"), model)
        lora.merge(adapted, getattr(torch, dtype))
        whole = lora.inner(adapted)
    else:
        whole = load.causal_lm(model, dtype=stored_dtype(model), device="cpu")
    write_model(whole, base, output, dtype=dtype)


def is_adapter(model: Path) -> bool:
    return (model / lora.CONFIG_FILE).is_file()


def stored_dtype(folder: Path) -> Dtype:
    """The number format of a folder's weights, as its config says."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or {}
    said = [c.get(key) for c in (config, text) for key in ("dtype", "torch_dtype")]
    for dtype in ("bfloat16", "float16"):
        if dtype in said:
            return dtype  # type: ignore[return-value, unused-ignore]
    return "float32"


def check_vocabulary(base: Path, model: Path) -> None:
    """Raises where the tokenizer, the base and the trained model do not count the same tokens."""
    rows = _vocabulary(base)
    known = len(load.tokenizer(base))
    if known > rows:
        raise RunnerError(
            f"{base}: the tokenizer knows {known} tokens, the model {rows}",
            hint="take the tokenizer files that came with the model",
        )
    trained = _trained_vocabulary(model) if is_adapter(model) else _vocabulary(model)
    if trained not in (None, rows):
        raise RunnerError(
            f"{model} was trained on {trained} tokens, the base model {base} has {rows}",
            hint="export with the base model that it was trained on",
        )


def write_model(model: PreTrainedModel, base: Path, output: Path, *, dtype: Dtype) -> None:
    """Writes the model, rounded to `dtype` in place, with the base's tokenizer files as they are.

    The bytes of tokenizer, chat template and generation settings are the base's.
    """
    output.mkdir(parents=True, exist_ok=True)
    copied = tokenizer_files(base)
    whole = model.to(getattr(torch, dtype))  # type: ignore[arg-type, unused-ignore]
    whole.config.dtype = dtype
    # What the base says about generation is copied; what was loaded may not pass its own check.
    whole.generation_config = GenerationConfig.from_model_config(whole.config)
    needed = sum(parameter.nbytes for parameter in whole.parameters())
    disk.check_room(output, needed)
    try:
        with _no_bars():
            whole.save_pretrained(output, max_shard_size="5GB")
    except (OSError, SafetensorError) as error:
        raise disk.full(error, output, needed) or error from error
    for path in copied:
        target = output / path.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def tokenizer_files(folder: Path) -> list[Path]:
    """All that a model's folder holds beside weights and config."""
    found = {path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not _WEIGHTS_AND_CONFIG.fullmatch(path.name))


@contextmanager
def _no_bars() -> Iterator[None]:
    """Events show how far a run is; transformers' own progress bars would break into them."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _vocabulary(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])


def _trained_vocabulary(folder: Path) -> int | None:
    """Rows of the embeddings that an adapter brings along; None where it brings none."""
    with safe_open(folder / lora.WEIGHTS_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.lora_B.weight")):
                return int(file.get_slice(name).get_shape()[0])
    return None
