"""Trains the base model on the tokens: an adapter (lora, qlora) or all of its weights (full)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from runner.stages.stage import Dirs, Metrics, Settings, Sizes, Stage, Written, base_made

if TYPE_CHECKING:
    from runner.model.weights import Weights

Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

RESUMABLE = 2
"""As in model/checkpoint.py: the newest checkpoints, which hold optimizer state."""
LONGEST_INTERVAL = 250
"""As in model/sft.py: the most steps between checkpoints where the recipe does not say."""
STATE_BYTES = 20_000
"""Of a checkpoint's random state, curve and manifests."""
LEAST_REPLY_BYTES = 80
"""Of tokens, for one reply: ten with its question and all markers."""


class Lora(Settings):
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Width of the adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale of the adapter; its effect is alpha / rank."""
    dropout: Share = 0.0
    """Share of the adapter's inputs dropped while training."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """The linear layers that get an adapter, by name, or all of them but the output head."""
    modules_to_save: tuple[str, ...] = ()
    """Layers trained whole beside the adapter, by name, such as embed_tokens and lm_head."""
    rslora: bool = False
    """Scale the adapter by alpha / √rank, so that high ranks learn as fast as low ones."""
    dora: bool = False
    """Train the length of each row of a weight apart from its direction; better, and slower."""


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
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the learning rate falls after the warmup; wsd: not at all, and at the end in a line."""
    warmup_fraction: Share = 0.05
    """The share of all steps in which the learning rate rises."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """With wsd, the share of all steps, at the end, in which the learning rate falls."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """8bit: its state takes a quarter of the memory; paged: where a GPU's memory runs out, its
    state moves to the computer's."""
    batch_size: Count = 16
    """Replies in one optimizer step."""
    micro_batch_size: Count | Literal["auto"] = "auto"
    """Examples in one pass through the model; does not change the result."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute activations twice, which takes less memory and a third more time; auto: only after
    memory has run out."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Pull of the trained weights towards zero."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Longer gradients are shortened to this norm."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the computation; auto takes the best that the hardware has."""
    float32_modules: Literal["auto"] | tuple[str, ...] = "auto"
    """Parts of layers' names that stay in float32, and unquantised, amid 4 bits or float16; auto:
    what the architecture is known to need."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Strength of the noise that is added to embeddings in training, 5 to 15; 0 adds none."""
    early_stopping: Count | Literal["off"] = 3
    """Stop after so many evaluations in a row without a better eval loss."""
    lora: Lora = Lora()
    """The adapter's shape, for lora and qlora."""
    checkpoints: Checkpoints = Checkpoints()
    """What is saved on the way, so that an interrupted training goes on."""
    report: tuple[Literal["tensorboard"], ...] = ()
    """tensorboard: also write the curves for TensorBoard, into the run's folder."""

    version: ClassVar[int] = 3
    outside_key = (*Stage.outside_key, "micro_batch_size", "gradient_checkpointing", "report")
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    uses_gpu = True
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

    @model_validator(mode="after")
    def _only_wsd_decays_at_the_end(self) -> Train:
        if self.schedule == "wsd":
            if self.warmup_fraction + self.decay_fraction > 1:
                raise ValueError(
                    f"has warmup_fraction: {self.warmup_fraction} and decay_fraction: "
                    f"{self.decay_fraction}, together more than 1; lower one of the two"
                )
        elif "decay_fraction" in self.model_fields_set:
            raise ValueError(
                f"has decay_fraction but schedule is {self.schedule}; delete it, or schedule: wsd"
            )
        return self

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        """The model, and all checkpoints that are there at one time: one more than are kept."""
        from runner.model import weights

        base, whole = weights.read(sizes.base_model), self.checkpoint_bytes(sizes)
        if base is None or whole is None:
            unknown = "{}checkpoints, not known before the base model is there"
            if sizes.previous is None:
                return (Written(unknown.format("model and "), 0),)
            last = Written("model, as large as last time", sizes.previous)
            return last, Written(unknown.format(""), 0, temporary=True)
        trained = self._trained_bytes(base)
        made = self._most_checkpoints(sizes)
        resumable = min(made, RESUMABLE + 1)
        best = min(made - resumable, self.checkpoints.keep_best)
        found = [Written("adapter", trained)]
        if self.method == "full":
            found = [Written("model", base.folder_bytes())]
        for count, each, having in ((resumable, whole, "with"), (best, trained, "without")):
            noun = "checkpoint" if count == 1 else "checkpoints"
            what = f"{count} {noun} {having} optimizer state, {each / 1e6:,.1f} MB each"
            if count:
                found.append(Written(what, count * each, temporary=True))
        return *found, *base_made(sizes)

    def checkpoint_bytes(self, sizes: Sizes) -> int | None:
        from runner.model import weights

        base = weights.read(sizes.base_model)
        # AdamW keeps two numbers for each that is trained, in float32 too; 8 bits may be fewer.
        return 3 * self._trained_bytes(base) + STATE_BYTES if base else None

    def _trained_bytes(self, base: Weights) -> int:
        if self.method == "full":
            return base.trained_bytes()
        # A layer's magnitudes (dora) are fewer than one more rank would add.
        adapter = base.adapter_bytes(self.lora.rank + self.lora.dora, self.lora.target_modules)
        return adapter + base.whole_bytes(self.lora.modules_to_save)

    def _most_checkpoints(self, sizes: Sizes) -> int:
        """How many are written in all, at most: a short training never has all that may be kept."""
        every, steps = self.checkpoints.every_steps, self.max_steps
        if steps is None:
            if (tokens := sizes.inputs.get("tokens")) is None:
                return self.checkpoints.keep_best + RESUMABLE + 1
            # Two steps that follow each other have more than batch_size replies.
            replies = tokens / LEAST_REPLY_BYTES
            steps = math.ceil(self.epochs * (1 + 2 * replies / self.batch_size))
        if every is not None:
            return math.ceil(steps / every)
        # Epochs are divided into steps anew, so that a later one may have a few more.
        by_epoch = self.max_steps or math.ceil(self.epochs) + (self.epochs > 1)
        return max(by_epoch, math.ceil(steps / LONGEST_INTERVAL))

    def run(self, dirs: Dirs) -> Metrics:
        from runner.model import quickly

        quickly.read_ahead(dirs.base)
        with quickly.importing():
            from runner.model import families, load, sft

        base = load.base_folder(dirs.base, dirs.cache)
        for text in families.choices(base, self.method, self.float32_modules):
            dirs.emit({"event": "verdict", "text": text})
        for text in families.warnings(
            base,
            method=self.method,
            learning_rate=self.learning_rate,
            warmup_fraction=self.warmup_fraction,
            float32_modules=self.float32_modules,
        ):
            dirs.emit({"event": "warning", "text": text})
        return sft.train(
            base=base,
            tokens=dirs.inputs["tokens"],
            output=dirs.output,
            scratch=dirs.scratch,
            parent=dirs.parent,
            replay=dirs.replay,
            method=self.method,
            epochs=self.epochs,
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup_fraction=self.warmup_fraction,
            decay_fraction=self.decay_fraction,
            optimizer=self.optimizer,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            gradient_checkpointing=self.gradient_checkpointing,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            precision=self.precision,
            float32_modules=self.float32_modules,
            neftune_alpha=self.neftune_alpha,
            rank=self.lora.rank,
            alpha=self.lora.alpha,
            dropout=self.lora.dropout,
            target_modules=self.lora.target_modules,
            modules_to_save=self.lora.modules_to_save,
            rslora=self.lora.rslora,
            dora=self.lora.dora,
            early_stopping=None if self.early_stopping == "off" else self.early_stopping,
            every_steps=self.checkpoints.every_steps,
            keep_best=self.checkpoints.keep_best,
            seed=dirs.seed,
            emit=dirs.emit,
        )
