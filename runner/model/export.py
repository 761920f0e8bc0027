"""From a merged model to one GGUF file that says the same, and what its base had lost before.

Imports neither torch nor transformers: a process that only quantises starts at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.errors import RunnerError
from runner.model import gguf, gguf_header
from runner.model.gguf import About


def unquantised(whole: Path, output: Path, *, name: str, about: About) -> None:
    """The merged model in `whole` as one GGUF that loses nothing; programs show `name`.

    Raises where the file has another chat template than the model's folder: programs would show
    the model something else than it was trained on.
    """
    gguf.convert(whole, output, gguf.stored_dtype(whole), name=name, about=about)
    written = gguf_header.read(output).text("tokenizer.chat_template")
    template = _chat_template(whole)
    if template is not None and written != template:
        now = "another chat template than" if written else "no chat template, unlike"
        raise RunnerError(
            f"{output.name} has {now} the model {whole}",
            hint="programs would show the model something else than it was trained on; give the "
            "chat template in a file chat_template.jinja beside the base model's tokenizer",
        )


def say_what_was_lost(base: Path, emit: Callable[[dict[str, Any]], None]) -> None:
    """Warns where the base model had lost precision before it was trained."""
    if text := gguf.lost(base):
        emit({"event": "warning", "text": text})


def _chat_template(folder: Path) -> str | None:
    """As transformers finds it: the file of its own first."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    said = json.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
    return said if isinstance(said, str) else None
