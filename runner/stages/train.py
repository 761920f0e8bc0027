"""Trains the base model on the tokens: an adapter (lora, qlora) or all of its weights (full)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from runner.stages.stage import Dirs, Metrics, Settings, Stage

Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Lora(Settings):
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Width of the adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale of the adapter; its effect is alpha / rank."""
    dropout: Share = 0.0
    """Share of the adapter's inputs dropped while training."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """The linear layers that get an adapter, by name, or all of them but the output head."""


class Checkpoints(Settings):
    every_steps: Count | None = None
    """Steps between checkpoints; once an epoch where nothing is said."""
    keep_best: Count = 2
    """How many of the best by eval loss are kept, beside the last."""


class Train(Stage):
    """Teach the model."""

    stage: Literal["train"]
    method: Literal["lora", "qlora", "full"] = "lora"
    """lora: a small adapter; qlora: the same over 4-bit weights; full: every weight."""
    epochs: Annotated[float, Field(gt=0, le=1000)] = 3
    """How often each conversation is seen."""
    max_steps: Count | None = None
    """Stop after so many optimizer steps, whatever `epochs` says."""
    learning_rate: Rate = 2e-4
    """The highest learning rate, reached after the warmup."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup."""
    warmup_fraction: Share = 0.05
    """The share of all steps in which the learning rate rises."""
    batch_size: Count = 16
    """Replies in one optimizer step."""
    micro_batch_size: Count | Literal["auto"] = "auto"
    """Examples in one pass through the model; does not change the result."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Pull of the trained weights towards zero."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Longer gradients are shortened to this norm."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the computation; auto takes the best that the hardware has."""
    lora: Lora = Lora()
    """The adapter's shape, for lora and qlora."""
    checkpoints: Checkpoints = Checkpoints()
    """What is saved on the way, so that an interrupted training goes on."""

    outside_key = ("micro_batch_size",)
    reads = ("tokens",)
    writes = "model"
    uses_base_model = True
    uses_seed = True
    own_process = True
    rebuilds = False
    shows: ClassVar[Mapping[str, str]] = {"": "metrics.jsonl"}

    @model_validator(mode="after")
    def _adapter_settings_have_an_adapter(self) -> Train:
        if self.method == "full" and "lora" in self.model_fields_set:
            raise ValueError("has lora settings but method is full; delete one of the two")
        return self

    def run(self, dirs: Dirs) -> Metrics:
        from runner.model import load, sft

        return sft.train(
            base=load.base_folder(dirs.base, dirs.cache),
            tokens=dirs.inputs["tokens"],
            output=dirs.output,
            scratch=dirs.scratch,
            method=self.method,
            epochs=self.epochs,
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup_fraction=self.warmup_fraction,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            precision=self.precision,
            rank=self.lora.rank,
            alpha=self.lora.alpha,
            dropout=self.lora.dropout,
            target_modules=self.lora.target_modules,
            every_steps=self.checkpoints.every_steps,
            keep_best=self.checkpoints.keep_best,
            seed=dirs.seed,
            emit=dirs.emit,
        )
