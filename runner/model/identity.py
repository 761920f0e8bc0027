"""Which base model a training was for, noted beside what it wrote and compared before it is used.

An adapter says nothing of its base: over another one of the same shape it opens, and talks
nonsense.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from runner.errors import RunnerError
from runner.model import load

FILE = "base.json"

_TENSORS = 64
_VALUES = 64
"""Of each tensor that is looked at: any training of a model changes nearly all of its weights."""
_HINT = "take the base model that it was trained on, or train again on this one"


@dataclass(frozen=True)
class Identity:
    """What has to be the same; hashes are SHA-256, shortened, and hold no paths and no versions."""

    architecture: str
    width: int
    layers: int
    vocabulary: int
    """Rows of the embeddings."""
    tokens: str
    """Hash of all tokens with their ids."""
    chat_template: str
    weights: str
    """Hash of names and shapes of all tensors, and of some values of some."""


def of(base: Path) -> Identity:
    """The identity of a base model's folder."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    text = {**config, **(config.get("text_config") or {})}
    tokenizer = load.tokenizer(base)
    return Identity(
        architecture=str((config.get("architectures") or [config.get("model_type")])[0]),
        width=int(text.get("hidden_size") or text.get("n_embd") or 0),
        layers=int(text.get("num_hidden_layers") or text.get("n_layer") or 0),
        vocabulary=int(text["vocab_size"]),
        tokens=_hash(sorted(tokenizer.get_vocab().items())),
        chat_template=_hash(_template(tokenizer)),
        weights=_weights(base),
    )


def write(base: Identity, folder: Path) -> None:
    """Notes the base model beside what was trained on it."""
    text = json.dumps(asdict(base), indent=2) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8", newline="\n")


def check(base: Path, model: Path, found: Identity | None = None) -> None:
    """Raises where `model` was trained on another base model, in a sentence that names both.

    What was trained before this was noted, or elsewhere, is not checked here. `found` is the
    identity of `base`, where it is known already.
    """
    path = model / FILE
    if not path.is_file():
        return
    try:
        noted = Identity(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunnerError(
            f"{path} does not say which base model it was: {error}", hint="train again"
        ) from error
    if text := difference(noted, found or of(base), str(model), str(base)):
        raise RunnerError(text, hint=_HINT)


def difference(noted: Identity, found: Identity, model: str, base: str) -> str:
    """The first thing in which two base models differ, in words; empty where there is none."""
    then = f"{model} was trained on"
    if noted.architecture != found.architecture:
        return f"{then} a {noted.architecture}, the base model {base} is a {found.architecture}"
    if noted.width != found.width:
        return (
            f"{then} a base model with a hidden size of {noted.width}, "
            f"the base model {base} has {found.width}"
        )
    if noted.layers != found.layers:
        return f"{then} {noted.layers} layers, the base model {base} has {found.layers}"
    if noted.vocabulary != found.vocabulary:
        return f"{then} {noted.vocabulary} tokens, the base model {base} has {found.vocabulary}"
    if noted.tokens != found.tokens:
        return (
            f"{then} another vocabulary: as many tokens as the base model {base} has, but not the "
            "same ones under the same ids"
        )
    if noted.chat_template != found.chat_template:
        return f"{then} another chat template than the base model {base} has now"
    if noted.weights != found.weights:
        return f"{then} other weights than the base model {base} has now"
    return ""


def _template(tokenizer: PreTrainedTokenizerBase) -> str | Mapping[str, str]:
    found: Any = tokenizer.chat_template
    return found or ""


def _weights(base: Path) -> str:
    """Independent of how the tensors lie in files."""
    paths = sorted(base.glob("*.safetensors"))
    found: dict[str, bytes] = {}
    try:
        names = sorted(name for path in paths for name in _names(path))
        looked_at = set(names[:: max(1, len(names) // _TENSORS)])
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in _names(path):
                    tensor = file.get_slice(name)
                    shape = tensor.get_shape()
                    found[name] = f"{name} {shape} {tensor.get_dtype()}\n".encode()
                    if name in looked_at and 0 not in (shape or [0]):
                        some = tensor[:1] if len(shape) > 1 else tensor[:_VALUES]
                        values = some.flatten()[:_VALUES].contiguous()
                        found[name] += values.view(torch.uint8).numpy().tobytes()
    except SafetensorError as error:
        raise RunnerError(
            f"{base}: its weights cannot be read: {error}", hint="get the model again"
        ) from error
    return hashlib.sha256(b"".join(found[name] for name in names)).hexdigest()[:32]


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _hash(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
