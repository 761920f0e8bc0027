"""Takes new conversations from a program of yours: one call, one file in the source folder.

    from runner.collect import collect

    collect("data/my-style", user="…", reply="…", metadata={"provider": "my-app", "version": "2"})

The next `runner apply` learns from it. Threads and processes may call it at once; a file is there
whole or not at all, whatever ends the program.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.chat import intake
from runner.chat.intake import NotAConversation, Place

if TYPE_CHECKING:
    from runner.engine.opened import Opened

__all__ = ["NotAConversation", "Place", "collect", "pair", "place_in", "place_of"]


def collect(
    where: str | Path | Place,
    messages: Iterable[Mapping[str, Any]] | None = None,
    *,
    user: str | None = None,
    reply: str | None = None,
    system: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one conversation into a folder, or the source folder of a recipe; the file's path.

    Either `messages`, `[{"role", "content"}, …]`, where a reply with `"weight": 0` is only read; or
    `user` and `reply`, and perhaps `system`. `metadata` is kept beside it: provider, mode, version,
    and timestamp, which is now where you give none.

    Raises NotAConversation (a ValueError) for what cannot be learned from, RecipeError where the
    recipe names no folder, PreconditionError where it cannot be written; all are
    `runner.errors.RunnerError`. A folder is fastest: a recipe is read again for each call, unless
    you keep what `place_of` gives.
    """
    if messages is None:
        messages = pair(user, reply, system)
    elif not (user is None and reply is None and system is None):
        raise NotAConversation(
            "there are messages, and user, reply or system beside them", hint="give one of both"
        )
    return intake.add(where if isinstance(where, Place) else place_of(where), messages, metadata)


def pair(user: str | None, reply: str | None, system: str | None = None) -> list[dict[str, Any]]:
    """A question and its reply as messages; what is None is refused later, by name."""
    first = [{"role": "system", "content": system}] if system is not None else []
    asked = {"role": "user", "content": user}
    return [*first, asked, {"role": "assistant", "content": reply}]


def place_of(where: str | Path) -> Place:
    """The place that a folder is, or where a recipe finds new files."""
    path = Path(where)
    if path.is_dir():
        return Place(path)
    if path.suffix not in (".yaml", ".yml"):
        from runner.errors import PreconditionError

        raise PreconditionError(f"there is no folder {path}", hint="make it, or name a recipe")
    from runner.engine import opened

    with opened.at(path) as current:
        return place_in(current)


def place_in(current: Opened) -> Place:
    """Where the recipe's first ingest stage finds new files."""
    steps = [step for step in current.compiled.steps if step.kind == "ingest"]
    if not steps:
        return intake.place(current.workspace.root, (), "auto")
    format = steps[0].entry.get("format", "auto")
    return intake.place(current.workspace.root, steps[0].sources, format)
