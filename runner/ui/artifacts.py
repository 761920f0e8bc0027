"""The current output of a stage, for people and programs to read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from runner.engine import lock, store
from runner.engine.opened import Opened
from runner.engine.recipe import Step
from runner.errors import PreconditionError, RecipeError


def current(opened: Opened, step: Step) -> Path:
    """The folder with what the stage made last; raises when it has made nothing yet."""
    folder = opened.links / step.name
    is_linked = step.name == step.stage and folder.is_dir()
    fact = lock.read(opened.lock_path).of_stage(step.name)
    if not is_linked and fact is not None:
        folder = store.path_of(opened.workspace, fact.output)
    if not folder.is_dir():
        raise PreconditionError(
            f"{step.name} has made nothing yet, or it is not in the store any more",
            hint=f"run `runner apply {opened.path}` first",
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


def gguf_files(opened: Opened) -> dict[str, Path]:
    """The exported GGUF files that are there, by level, from the smallest on: those of the current
    release, where the recipe has such, else those made last."""
    release = lock.read(opened.lock_path).release if opened.compiled.retrain else None
    found = {}
    for step in opened.compiled.steps:
        if step.kind == "export/gguf":
            with contextlib.suppress(PreconditionError, StopIteration):
                if release is None:
                    folder = current(opened, step)
                else:
                    output = release.outputs.get(step.name, "")
                    folder = store.path_of(opened.workspace, output)
                found[str(step.entry["level"])] = next(folder.glob("*.gguf"))
    return dict(sorted(found.items(), key=lambda one: one[1].stat().st_size))


def fact_of(opened: Opened, stage: str, output: str) -> lock.Fact:
    """From which settings and inputs an output was made, by the lockfile."""
    for fact in lock.read(opened.lock_path).facts:
        if fact.stage == stage and fact.output == output:
            return fact
    raise _not_together(opened, f"the lockfile does not say what {stage} was made from")


def kept(opened: Opened, stage: str, output: str) -> Path:
    """The folder of an output that the stage was made from; raises where it is gone."""
    folder = store.path_of(opened.workspace, output)
    if not folder.is_dir():
        raise _not_together(opened, f"what {stage} was made from is not in the store any more")
    return folder


def rows(step: Step, artifact: Path, view: str) -> Iterator[str]:
    """The artifact as JSON lines."""
    from runner.stages import parsed

    stage = parsed(step.entry)
    if view and view not in stage.shows:
        raise RecipeError(f"{step.name} has no view --{view}", hint="ask without it")
    yield from stage.rows(artifact, view)


def _not_together(opened: Opened, what: str) -> PreconditionError:
    return PreconditionError(what, hint=f"run `runner apply {opened.path}` first")
