"""What a training wrote, opened beside its base: to be measured, or merged into one model."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from runner import disk
from runner.errors import RunnerError
from runner.model import identity, load, lora, merging
from runner.model.load import Dtype

_NOT_COPIED = re.compile(
    rf".*\.(safetensors|safetensors\.index\.json)|config\.json|{re.escape(identity.FILE)}"
)
_LAYER_OF_ADAPTER = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
_COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "additional_chat_templates/*")


def tuned(base: Path, model: Path, *, dtype: Dtype, device: str) -> tuple[nn.Module, bool]:
    """The trained model, and whether it is an adapter: then `disable_adapter()` gives the base.

    Raises where it was trained on another base model.
    """
    identity.check(base, model)
    if not is_adapter(model):
        return load.causal_lm(model, dtype=dtype, device=device), False
    return _opened(load.causal_lm(base, dtype=dtype, device=device), model), True


def merge(
    base: Path,
    model: Path,
    output: Path,
    *,
    dtype: Dtype,
    max_shard_bytes: int = merging.MAX_SHARD_BYTES,
) -> None:
    """Writes the trained model as one, in the layout of Hugging Face, with the base's tokenizer.

    The base is not quantised, whatever it was trained on: a base in 4 bits is taken for the numbers
    that those stand for. Each layer is added up in float32 and then rounded to `dtype`, once. One
    tensor at a time is in memory, but for adapters whose layers are not named as in the base's
    files: then it is the model and one layer.
    """
    identity.check(base, model)
    check_vocabulary(base, model)
    whole, adapter = (base, model) if is_adapter(model) else (model, None)
    tensors = merging.planned(whole, adapter, getattr(torch, dtype))
    if tensors is None:
        _refuse_quantised(base)
        adapted = _opened(load.causal_lm(base, dtype=stored_dtype(base), device="cpu"), model)
        lora.merge(adapted, getattr(torch, dtype))
        opened = lora.inner(adapted)
        write_model(opened, base, output, dtype=dtype, max_shard_bytes=max_shard_bytes)
        return
    output.mkdir(parents=True, exist_ok=True)
    with _tokenizer_copied(base, output):
        merging.write(tensors, output, max_shard_bytes=max_shard_bytes)
        merging.write_config(whole, output, dtype)


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
    if not is_adapter(model) and (said := _other_shape(base, model)):
        raise RunnerError(said, hint="export with the base model that it was trained on")
    if trained not in (None, rows):
        raise RunnerError(
            f"{model} was trained on {trained} tokens, the base model {base} has {rows}",
            hint="export with the base model that it was trained on",
        )


def write_model(
    model: PreTrainedModel,
    base: Path,
    output: Path,
    *,
    dtype: Dtype,
    max_shard_bytes: int = merging.MAX_SHARD_BYTES,
) -> None:
    """Writes the model, rounded to `dtype` in place, with the base's tokenizer files as they are.

    The bytes of tokenizer, chat template and generation settings are the base's: it raises where
    one of them is another afterwards.
    """
    output.mkdir(parents=True, exist_ok=True)
    whole = model.to(getattr(torch, dtype))  # type: ignore[arg-type, unused-ignore]
    whole.config.dtype = dtype
    # What the base says about generation is copied; what was loaded may not pass its own check.
    whole.generation_config = GenerationConfig.from_model_config(whole.config)
    needed = sum(parameter.nbytes for parameter in whole.parameters())
    disk.check_room(output, needed)
    with _tokenizer_copied(base, output):
        try:
            with _no_bars():
                whole.save_pretrained(output, max_shard_size=max_shard_bytes)
        except (OSError, SafetensorError) as error:
            raise disk.full(error, output, needed) or error from error


@contextmanager
def _tokenizer_copied(base: Path, output: Path) -> Iterator[None]:
    """Puts the base's tokenizer files beside what is written inside, and checks that neither they
    nor the base's have changed meanwhile."""
    copied = tokenizer_files(base)
    before = _digests(base, copied)
    yield
    for path in copied:
        target = output / path.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    check_untouched(base, output, before)


def _refuse_quantised(base: Path) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        raise RunnerError(
            f"{base}: its weights are quantised, and this adapter cannot be merged onto those",
            hint="set base_model to the unquantised model that it was made from",
        )


def tokenizer_files(folder: Path) -> list[Path]:
    """All that a model's folder holds beside weights, config and what it was trained on."""
    found = {path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not _NOT_COPIED.fullmatch(path.name))


def check_untouched(base: Path, output: Path, before: Mapping[str, str]) -> None:
    """Raises where a tokenizer's file in `base` or `output` has not the hash that it had before.

    `before` is the SHA-256 of each by its name. A pretrained tokenizer is never changed.
    """
    for folder in (base, output):
        now = _digests(folder, tokenizer_files(folder))
        expected = before if folder == output else before.keys() | now.keys()
        for name in sorted(expected):
            if before.get(name) != now.get(name):
                raise RunnerError(
                    f"{folder / name} is not what {base / name} was before the model was written: "
                    f"sha256 {_short(before.get(name))} then, {_short(now.get(name))} now",
                    hint="a tokenizer leaves as it came; let nothing write to the base model's "
                    "folder, and run again",
                )


def _short(digest: str | None) -> str:
    return f"{digest[:12]}…" if digest else "(no such file)"


def _digests(folder: Path, paths: list[Path]) -> dict[str, str]:
    found = {}
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = digest
    return found


def _opened(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the adapter of a folder; raises where layers of it have no place.

    PEFT leaves out in silence what belongs to a layer that the model does not have.
    """
    layers = dict(model.named_modules())
    with safe_open(folder / lora.WEIGHTS_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            found = _LAYER_OF_ADAPTER.fullmatch(name)
            if not found:
                continue
            layer = layers.get(found["layer"])
            if layer is None:
                raise _does_not_fit(folder, f"the base model has no layer {found['layer']}")
            features = getattr(layer, "in_features" if found["side"] == "A" else "out_features", 0)
            shape = file.get_slice(name).get_shape()
            width = shape[1] if found["side"] == "A" else shape[0]
            if features and width != features:
                what = "takes" if found["side"] == "A" else "gives"
                raise _does_not_fit(
                    folder,
                    f"{found['layer']} {what} {width} numbers there, {features} in the base model",
                )
    return lora.opened(model, folder)


def _does_not_fit(folder: Path, why: str) -> RunnerError:
    return RunnerError(
        f"the adapter {folder} does not fit the base model: {why}",
        hint="an adapter fits only the base model that it was trained on",
    )


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


def _other_shape(base: Path, model: Path) -> str:
    """In which of the numbers of its config a whole model differs from the base, in words."""
    ours, theirs = (_text_config(folder) for folder in (model, base))
    for key, words in (("model_type", "architecture"), ("hidden_size", "hidden size")):
        if ours.get(key) != theirs.get(key):
            return (
                f"{model} has the {words} {ours.get(key)}, the base model {base} has "
                f"{theirs.get(key)}"
            )
    return ""


def _text_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {**config, **(config.get("text_config") or {})}


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
