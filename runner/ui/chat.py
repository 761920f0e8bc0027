"""Talking with the exported model, and with its base, through llama.cpp.

What is said can be put right and saved into the recipe's source folder, for the next apply to learn
from. A reply that nobody has corrected is the model's own: it is saved to be read and not learned,
unless the user says that all of them are good.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from runner import collect
from runner.chat import intake, jsonl
from runner.engine.opened import Opened
from runner.engine.words import escaped
from runner.errors import PreconditionError, RecipeError, RunnerError
from runner.ui import artifacts

if TYPE_CHECKING:
    from runner.model.llama import Llama

Messages = list[dict[str, str]]

HELP = """\
/edit [TEXT]  put the last reply right: TEXT, or in $EDITOR, or in lines that end with a single .
/undo         take back the last question and its reply
/save         save the conversation for the next apply, which learns the replies you corrected
/save all     the same, and learn every reply
/reset        forget what was said
/help         this list; ctrl-C ends a reply, ctrl-D the conversation
Begin with a space to say something that begins with a slash."""


def exported(opened: Opened, level: str | None) -> Path:
    """The GGUF file of that level, or at that path; else the smallest one."""
    if not any(step.kind.startswith("export/") for step in opened.compiled.steps):
        raise PreconditionError(
            f"{opened.path} has no stage export", hint="add `- stage: export` to it"
        )
    if level is not None and level.endswith(".gguf"):
        if not Path(level).is_file():
            raise PreconditionError(f"there is no {level}", hint="check the path")
        return Path(level)
    found = artifacts.gguf_files(opened)
    for known, path in found.items():
        if level in (None, known):
            return path
    if not found:
        has_any = any(step.kind == "export/gguf" for step in opened.compiled.steps)
        raise PreconditionError(
            f"{opened.path} has no exported GGUF file yet",
            hint=f"run `runner apply {opened.path}`"
            if has_any
            else "add `gguf: [q4_k_m]` to the export stage, and apply",
        )
    raise PreconditionError(
        f"there is no {level} file of {opened.path}; there is {', '.join(found)}",
        hint=f"add {level} to `gguf:` of the export stage and apply, or name a .gguf file",
    )


def base_gguf(opened: Opened) -> Path:
    """The base model as llama.cpp can open it."""
    if opened.compiled.base_model is None:
        raise PreconditionError(
            f"{opened.path} has no base model", hint="add `base_model:` to the recipe"
        )
    path = opened.base_path()
    if path.is_file():
        return path
    cached = opened.workspace.cache / "gguf" / f"{path.name}-f16.gguf"
    if not cached.exists():
        from runner.model import gguf

        cached.parent.mkdir(parents=True, exist_ok=True)
        gguf.convert(path, cached, "f16", name=path.name)
    return cached


@dataclass(frozen=True)
class Exchange:
    """A question and its reply; `corrected` where a person wrote the reply."""

    user: str
    reply: str
    corrected: bool = False


@dataclass(frozen=True)
class Talk:
    """What was said so far; every change gives a new one."""

    system: str | None = None
    exchanges: tuple[Exchange, ...] = ()

    def and_then(self, user: str, reply: str) -> Talk:
        return replace(self, exchanges=(*self.exchanges, Exchange(user, reply)))

    def corrected(self, text: str) -> Talk:
        """With another last reply."""
        *before, last = self.exchanges
        return replace(self, exchanges=(*before, replace(last, reply=text, corrected=True)))

    def without_last(self) -> Talk:
        return replace(self, exchanges=self.exchanges[:-1])

    def prompt(self, user: str, first: int = 0) -> Messages:
        """What the model is asked with, from the exchange number `first` on."""
        said = self._system()
        for exchange in self.exchanges[first:]:
            said.append({"role": "user", "content": exchange.user})
            said.append({"role": "assistant", "content": exchange.reply})
        return [*said, {"role": "user", "content": user}]

    def messages(self, *, learn_all: bool) -> list[dict[str, Any]]:
        """What is saved: replies that nobody corrected have weight 0, unless all are learned."""
        said: list[dict[str, Any]] = [*self._system()]
        for exchange in self.exchanges:
            if not exchange.reply.strip():
                continue  # the model said nothing
            said.append({"role": "user", "content": exchange.user})
            learned = {} if learn_all or exchange.corrected else {"weight": 0}
            said.append({"role": "assistant", "content": exchange.reply, **learned})
        return said

    def _system(self) -> Messages:
        return [] if self.system is None else [{"role": "system", "content": self.system}]


class Saved:
    """What this chat has saved, so that a longer one takes the place of its own beginning."""

    def __init__(self, opened: Opened, model: str) -> None:
        self._opened = opened
        self._metadata = {"provider": "runner", "mode": "chat", "version": model}
        self._path: Path | None = None
        self._data = b""
        self._messages: list[dict[str, Any]] = []

    def save(self, talk: Talk, *, learn_all: bool) -> str:
        """Writes the conversation into the recipe's source folder; what to tell the user."""
        corrected = sum(exchange.corrected for exchange in talk.exchanges)
        count = len(talk.exchanges)
        if not count:
            raise RecipeError("nothing was said yet", hint="ask something first")
        if not (corrected or learn_all):
            raise RecipeError(
                "no reply was corrected, so there is nothing to learn",
                hint="put one right with /edit, or say that all are good with /save all",
            )
        messages = talk.messages(learn_all=learn_all)
        if self._path is not None and messages == self._messages and self._path.exists():
            return f"{self._path} has it already"
        place = collect.place_in(self._opened)
        data = intake.as_bytes(place, messages, self._metadata)
        path = intake.write(place, data)
        self._forget_beginning()
        self._path, self._data, self._messages = path, data, messages
        learned = count if learn_all else corrected
        return (
            f"saved to {path}: {corrected} of {_replies(count)} corrected, {learned} to be learned"
        )

    def begin_anew(self) -> None:
        self._path = None

    def _forget_beginning(self) -> None:
        """Removes what this chat saved before, where nobody has changed it since."""
        if self._path is not None:
            with suppress(FileNotFoundError):
                if self._path.read_bytes() == self._data:
                    self._path.unlink()


def talk(
    opened: Opened,
    model: Path | None,
    once: str | None,
    max_tokens: int,
    as_json: bool,
    system: str | None = None,
) -> None:
    """One reply to `once`, or a conversation until the end of input."""
    if once is not None and not once.strip():
        raise RecipeError("--once has nothing to say", hint="runner chat RECIPE --once 'Hello'")
    path = model or base_gguf(opened)
    with _llama(path) as llama:
        begun = Talk(system if system and system.strip() else None)
        if once is not None:
            text = _reply(llama, begun.prompt(once), max_tokens, show=not as_json)
            if as_json:
                print(json.dumps({"prompt": once, "reply": text}, ensure_ascii=False))
            return
        with suppress(ImportError):
            import readline  # noqa: F401 (arrow keys move, and are no part of what is said)
        print("Write, and end with ctrl-D; /help lists what else there is.")
        saved = Saved(opened, path.name)
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            if line.startswith("/"):
                try:
                    begun = _obey(line.strip(), begun, saved)
                except RunnerError as error:
                    print(_clean(str(error)))
            elif line.strip():
                begun = _asked(llama, begun, line.strip(), max_tokens)


def _obey(line: str, said: Talk, saved: Saved) -> Talk:
    """What a line that begins with a slash asks for; the conversation after it."""
    command, _, rest = line.partition(" ")
    if command == "/help":
        print(HELP)
    elif command == "/reset":
        saved.begin_anew()
        return Talk(said.system)
    elif command == "/save" and rest in ("", "all"):
        print(_clean(saved.save(said, learn_all=rest == "all")))
    elif command in ("/edit", "/undo") and not said.exchanges:
        raise RecipeError("nothing was said yet", hint="ask something first")
    elif command == "/undo" and not rest:
        print(f"taken back: {_clean(said.exchanges[-1].user)}")
        return said.without_last()
    elif command == "/edit":
        return _edited(said, rest)
    else:
        raise RecipeError(f"there is no {line[:60]}", hint="/help lists what there is")
    return said


def _edited(said: Talk, typed: str) -> Talk:
    last = said.exchanges[-1].reply
    text = typed or (_in_editor(last) if _editor() else _in_lines(input))
    if not text.strip() or text == last:
        print("it stays as it was")
        return said
    print("corrected")
    return said.corrected(text)


def _editor() -> str:
    return os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""


def _in_editor(text: str) -> str:
    """The text as the user's editor left it."""
    descriptor, name = tempfile.mkstemp(suffix=".txt", prefix="reply-")
    path = Path(name)
    try:
        os.close(descriptor)
        path.write_text(text, encoding="utf-8")
        code = subprocess.run(
            [*shlex.split(_editor(), posix=os.name != "nt"), name], check=False
        ).returncode
        if code:
            raise RunnerError(
                f"{_editor()} ended with exit code {code}", hint="the reply stays as it was"
            )
        return path.read_text(encoding="utf-8").removesuffix("\n" if text[-1:] != "\n" else "")
    except (OSError, ValueError) as error:
        raise RunnerError(
            f"{_editor()} cannot be used: {error}", hint="set EDITOR, or type /edit TEXT"
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _in_lines(read: Callable[[str], str]) -> str:
    """Lines up to one with a full stop alone, or the end of input."""
    print("Type the reply; a line with . alone ends it.")
    lines: list[str] = []
    with suppress(EOFError):
        while (line := read("")) != ".":
            lines.append(line)
    return "\n".join(lines)


def _asked(llama: Llama, said: Talk, user: str, max_tokens: int) -> Talk:
    """The conversation with the reply; what the model cannot hold any more it is not asked with."""
    for first in range(len(said.exchanges) + 1):
        try:
            reply = _reply(llama, said.prompt(user, first), max_tokens, show=True)
        except RunnerError as error:
            if not _is_full(error):
                raise
            continue
        if first:
            print(f"(the context is full: the model sees this from question {first + 1} on)")
        return said.and_then(user, reply)
    print("that alone is longer than what the model can read at once; say it shorter")
    return said


def _is_full(error: RunnerError) -> bool:
    """Whether llama.cpp refused because the messages are longer than its context."""
    return "context size" in error.message


def _replies(count: int) -> str:
    return f"{count} {'reply' if count == 1 else 'replies'}"


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


def _reply(llama: Llama, messages: Sequence[dict[str, str]], max_tokens: int, *, show: bool) -> str:
    pieces: list[str] = []
    with _stoppable() as stopped, closing(llama.reply(messages, max_tokens=max_tokens)) as reply:
        for piece in reply:
            pieces.append(piece)
            if show:
                print(_clean(piece), end="", flush=True)
            if stopped:
                break
    if show:
        print()
    return "".join(pieces)


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """What ctrl-C fills for the first time, to end a reply; the second time it ends the program."""
    stopped: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped and callable(before):
            before(number, frame)
        stopped.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _clean(text: str) -> str:
    """Without what a terminal would obey; line ends stay."""
    return "\n".join(escaped(line) for line in text.split("\n"))
