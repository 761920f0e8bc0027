"""Talking with the exported model, and with its base, through llama.cpp."""

from __future__ import annotations

import json
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from runner.chat import jsonl
from runner.engine.opened import Opened
from runner.engine.words import escaped
from runner.errors import PreconditionError
from runner.ui import artifacts

if TYPE_CHECKING:
    from runner.model.llama import Llama

Messages = list[dict[str, str]]


def exported(opened: Opened, level: str | None) -> Path:
    """The GGUF file of that level, or the smallest one."""
    folder = artifacts.of_kind(opened, "export")
    found = sorted(folder.glob("*.gguf"), key=lambda path: path.stat().st_size)
    chosen = [path for path in found if level is None or path.stem.endswith(f"-{level}")]
    if not chosen:
        have = ", ".join(path.name for path in found) or "none"
        raise PreconditionError(
            f"there is no {level or 'GGUF'} file in {folder} (there: {have})",
            hint=f"add `gguf: [{level or 'q4_k_m'}]` to the export stage and apply",
        )
    return chosen[0]


def base_gguf(opened: Opened) -> Path:
    """The base model as llama.cpp can open it."""
    path = opened.base_path()
    if path.is_file():
        return path
    cached = opened.workspace.cache / "gguf" / f"{path.name}-f16.gguf"
    if not cached.exists():
        from runner.model import gguf

        cached.parent.mkdir(parents=True, exist_ok=True)
        gguf.convert(path, cached, "f16", name=path.name)
    return cached


def talk(
    opened: Opened, model: Path | None, once: str | None, max_tokens: int, as_json: bool
) -> None:
    """One reply to `once`, or a conversation until the end of input; `/reset` begins anew."""
    with _llama(model or base_gguf(opened)) as llama:
        if once is not None:
            text = _reply(llama, [{"role": "user", "content": once}], max_tokens, show=not as_json)
            if as_json:
                print(json.dumps({"prompt": once, "reply": text}, ensure_ascii=False))
            return
        print("Write, and end with ctrl-D; /reset forgets what was said.")
        messages: Messages = []
        while True:
            try:
                said = input("> ").strip()
            except EOFError:
                print()
                return
            if said == "/reset":
                messages = []
            elif said:
                messages.append({"role": "user", "content": said})
                reply = _reply(llama, messages, max_tokens, show=True)
                messages.append({"role": "assistant", "content": reply})


def compare(opened: Opened, count: int, level: str | None, max_tokens: int, as_json: bool) -> None:
    """What base and tuned model answer to the first questions of held-out conversations."""
    prompts = list(islice(_held_out(opened), count))
    with ExitStack() as stack:
        base = stack.enter_context(_llama(base_gguf(opened)))
        tuned = stack.enter_context(_llama(exported(opened, level)))
        pairs = [
            (
                prompt,
                _reply(base, prompt, max_tokens, show=False),
                _reply(tuned, prompt, max_tokens, show=False),
            )
            for prompt in prompts
        ]
    if as_json:
        for prompt, before, after in pairs:
            record = {"prompt": prompt[-1]["content"], "base": before, "tuned": after}
            print(json.dumps(record, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for prompt, before, after in pairs:
        table = Table(title=Text(_clean(prompt[-1]["content"])), title_justify="left", expand=True)
        table.add_column("base", ratio=1)
        table.add_column("tuned", ratio=1)
        table.add_row(Text(_clean(before)), Text(_clean(after)))
        console.print(table)


def _held_out(opened: Opened) -> list[Messages]:
    """The first question of each eval conversation."""
    report = artifacts.of_kind(opened, "evaluate")
    rows = jsonl.read(report / "replies.jsonl")
    return [row["messages"] for row in rows]


def _llama(path: Path) -> Llama:
    from runner.model.llama import Llama

    return Llama(path)


def _reply(llama: Llama, messages: Messages, max_tokens: int, *, show: bool) -> str:
    pieces = []
    for piece in llama.reply(messages, max_tokens=max_tokens):
        pieces.append(piece)
        if show:
            print(_clean(piece), end="", flush=True)
    if show:
        print()
    return "".join(pieces)


def _clean(text: str) -> str:
    """Without what a terminal would obey; line ends stay."""
    return "\n".join(escaped(line) for line in text.split("\n"))
