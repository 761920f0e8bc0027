"""Random models of two layers with a byte tokenizer, and the token files to train them on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from transformers import Gemma3nTextConfig, Gemma3TextConfig, LlamaConfig, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from runner.model import sft
from runner.model.token_files import SCHEMA, Row
from tests import chat_tokenizers

Family = Literal["llama", "qwen3", "gemma3", "smollm2", "gemma3n"]

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def folder(path: Path, family: Family = "llama", *, tied: bool = True, **shape: int) -> Path:
    """A base model in the layout of Hugging Face."""
    tokenizer = chat_tokenizers.tiny(chat_tokenizers.CHATML)
    tokenizer.chat_template = chat_tokenizers.CHATML
    settings: dict[str, Any] = {
        **_SHAPE,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": None,
        **shape,
    }
    config: Any
    if family == "llama":
        config = LlamaConfig(**settings)
    elif family == "smollm2":
        # As SmolLM2-135M: tied, three queries for each key, heads that are a third of the width.
        few = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}
        rope = {"rope_type": "default", "rope_theta": 100_000.0}
        config = LlamaConfig(**{**settings, **few, **shape}, rope_parameters=rope)
    elif family == "qwen3":
        config = Qwen3Config(**settings)
    elif family == "gemma3n":
        # Of all that is special in it a little: layers of both kinds, some that share keys and
        # values, one with sparse activations.
        layers = 4
        config = Gemma3nTextConfig(
            **{**settings, "num_hidden_layers": layers, **shape},
            vocab_size_per_layer_input=settings["vocab_size"],
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=layers // 2,
            laurel_rank=4,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * (layers // 2),
            activation_sparsity_pattern=[0.95, *[0.0] * (layers - 1)],
        )
    else:
        # A window shorter than the rows, and soft-capped logits.
        config = Gemma3TextConfig(
            **settings, sliding_window=8, final_logit_softcapping=3.0, layer_types=None
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than at the start of a training, so that errors show.
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def row(conversation: str, length: int, replies: Sequence[tuple[int, int, float]]) -> Row:
    """A row of ids that look random but follow a rule; a reply is (start, stop, weight)."""
    places = np.arange(length)
    start = sum(conversation.encode()) % 7
    ids = (97 + (start + places * places // 3) % 11).astype(np.int32)
    weights = np.zeros(length, np.float32)
    for first, stop, weight in replies:
        weights[first:stop] = weight
    return Row(conversation, 0, ids, weights, len(replies))


def conversations(count: int, prefix: str = "c") -> list[Row]:
    """Rows of different lengths, one reply each."""
    return [row(f"{prefix}{i}", 12 + i * 5 % 17, [(6, 12 + i * 5 % 17, 1.0)]) for i in range(count)]


def token_files(path: Path, train: Sequence[Row], held_out: Sequence[Row] = ()) -> Path:
    """A folder as the tokenize stage writes it."""
    path.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("eval", held_out)):
        with (
            pa.OSFile(str(path / f"{name}.arrow"), "wb") as file,
            pa.ipc.new_stream(file, SCHEMA) as stream,
        ):
            columns = {field.name: [getattr(row, field.name) for row in rows] for field in SCHEMA}
            if rows:
                stream.write_batch(pa.record_batch(columns, schema=SCHEMA))
    return path


def trained(base: Path, files: Path, work: Path, **settings: Any) -> dict[str, Any]:
    """Trains with small settings; `output` and `scratch` are in `work`. The metrics, and events."""
    events: list[dict[str, Any]] = settings.pop("events", [])
    defaults: dict[str, Any] = {
        "method": "lora",
        "epochs": 2,
        "max_steps": None,
        "learning_rate": 1e-2,
        "schedule": "cosine",
        "warmup_fraction": 0.1,
        "decay_fraction": 0.2,
        "optimizer": "adamw",
        "batch_size": 4,
        "micro_batch_size": "auto",
        "gradient_checkpointing": "auto",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "precision": "float32",
        "neftune_alpha": 0.0,
        "rank": 4,
        "alpha": 8,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "modules_to_save": (),
        "rslora": False,
        "dora": False,
        "early_stopping": None,
        "every_steps": 2,
        "keep_best": 2,
        "seed": 1,
        "emit": events.append,
    }
    return sft.train(
        base=base,
        tokens=files,
        output=work / "output",
        scratch=work / "scratch",
        **{**defaults, **settings},
    )
