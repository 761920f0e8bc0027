"""The forms in which a trained model leaves: adapter, merged safetensors, GGUF, Modelfile."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runner.errors import RunnerError
from runner.model import adapter as adapters
from runner.model import gguf, gguf_header, load, ollama

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write(
    *,
    base: Path,
    model: Path,
    output: Path,
    name: str,
    adapter: bool,
    merged: bool,
    levels: Sequence[gguf.Level],
    modelfile: bool,
    context_tokens: int,
    system: str | None,
    emit: Callable[[dict[str, Any]], None],
) -> None:
    """Writes what is asked for into `output`; the GGUF files are `<name>-<level>.gguf`."""
    total = adapter + merged + bool(levels) + len(levels) + modelfile
    done = 0

    def step(what: str) -> None:
        nonlocal done
        emit({"event": "progress", "done": done, "total": total, "unit": f"files; now {what}"})
        done += 1

    if adapter and (model / ADAPTER_FILES[0]).exists():
        step("the adapter")
        (output / "adapter").mkdir()
        for file in ADAPTER_FILES:
            shutil.copyfile(model / file, output / "adapter" / file)
    # Beside the output, on its file system: what is not wanted there goes when this is done.
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        whole = output / "merged" if merged else Path(folder) / "merged"
        if merged:
            step("the merged model")
        adapters.merge(base, model, whole, dtype="bfloat16")
        if levels:
            step("GGUF")
            unquantised = Path(folder) / "unquantised.gguf"
            gguf.convert(whole, unquantised, gguf.stored_dtype(whole), name=name)
            check_gguf(base, unquantised)
            for level in levels:
                step(level)
                target = output / f"{name}-{level}.gguf"
                gguf.quantize(unquantised, target, level, lambda _done, _total: None)
        if modelfile:
            step("the Modelfile")
            smallest = min(output.glob("*.gguf"), key=lambda path: path.stat().st_size).name
            text = ollama.modelfile(whole, smallest, num_ctx=context_tokens, system=system)
            (output / "Modelfile").write_text(text, encoding="utf-8")


def check_gguf(base: Path, converted: Path) -> None:
    """Raises where a GGUF file speaks to the model otherwise than it was trained."""
    written = gguf_header.read(converted).text("tokenizer.chat_template")
    template: Any = load.tokenizer(base).chat_template
    if isinstance(template, str) and written != template:
        now = "another chat template than" if written else "no chat template, unlike"
        raise RunnerError(
            f"{converted.name} has {now} the base model {base}",
            hint="programs would show the model something else than it was trained on; give the "
            "chat template in a file chat_template.jinja beside the base model's tokenizer",
        )
