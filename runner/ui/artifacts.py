"""The current output of a stage, for people and programs to read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from runner.engine.execute import Opened
from runner.engine.recipe import Step
from runner.errors import PreconditionError, RecipeError


def current(opened: Opened, step: Step) -> Path:
    """The folder with what the stage made last; raises when it has made nothing yet."""
    folder = opened.workspace.links(opened.compiled.name) / step.name
    if not folder.is_dir():
        raise PreconditionError(
            f"{step.name} has made nothing yet", hint=f"run `runner apply {opened.path}` first"
        )
    return folder.resolve()


def of_kind(opened: Opened, kind: str) -> Path:
    """What the last stage of that kind made."""
    steps = [step for step in opened.compiled.steps if step.kind == kind]
    if not steps:
        raise PreconditionError(
            f"{opened.path} has no stage {kind}", hint=f"add `- stage: {kind}` to it"
        )
    return current(opened, steps[-1])


def rows(step: Step, artifact: Path, view: str) -> Iterator[str]:
    """The artifact as JSON lines."""
    from runner.stages import parsed

    stage = parsed(step.entry)
    if view and view not in stage.shows:
        raise RecipeError(f"{step.name} has no view --{view}", hint="ask without it")
    yield from stage.rows(artifact, view)
