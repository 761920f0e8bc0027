"""Checks what the lockfile says against what is there, and makes data again to see it come out."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from runner import disk
from runner.engine import child, key, look, plan, run, store, worker
from runner.engine.events import Event
from runner.engine.opened import Opened
from runner.engine.plan import Planned
from runner.engine.recipe import Step


@dataclass(frozen=True)
class Checked:
    """What was found about the output that the lockfile names for a stage."""

    stage: str
    output: str | None
    state: Literal["nothing", "missing", "damaged", "whole", "rebuilt", "differs"]
    text: str

    @property
    def is_right(self) -> bool:
        return self.state in ("nothing", "whole", "rebuilt")

    def record(self) -> dict[str, Any]:
        return asdict(self)


def outputs(current: Opened, *, rebuild: bool) -> Iterator[Checked]:
    """Each stage's output: whether it is there and has its hash, and for data whether the same
    bytes come out when it is made again from what it was made of."""
    world = current.world()
    planned = {one.step.name: one for one in plan.whole(current.compiled, world)}
    for name, one in planned.items():
        fact = world.lock.of_stage(name)
        if fact is None:
            yield Checked(name, None, "nothing", "the lockfile says nothing of it yet")
            continue
        path = store.path_of(current.workspace, fact.output)
        if one.step.transient and not path.is_dir():
            continue  # it is made again when something needs it
        if not path.is_dir():
            yield Checked(name, fact.output, "missing", "its output is not in the store")
        elif not store.is_whole(current.workspace, fact.output):
            text = f"its output is damaged: {path}"
            yield Checked(name, fact.output, "damaged", text)
        elif not rebuild or not one.step.rebuilds or _is_of_a_model(one.step, planned):
            yield Checked(name, fact.output, "whole", "its output is there and has its hash")
        elif one.output != fact.output or one.state != "skip":
            why = "; ".join(cause.text for cause in one.causes) or "the recipe changed"
            text = f"its output is there and has its hash; not made again: {why}"
            yield Checked(name, fact.output, "whole", text)
        else:
            yield _rebuilt(current, one, planned)


def _rebuilt(current: Opened, one: Planned, planned: dict[str, Planned]) -> Checked:
    assert one.output is not None
    name = one.step.name
    with store.staging(current.workspace) as staging:
        made, scratch = staging / "output", staging / "scratch"
        made.mkdir()
        outputs = {stage: above.output or "" for stage, above in planned.items()}
        inputs = {stage: store.path_of(current.workspace, o) for stage, o in outputs.items()}
        read = [outputs[stage] for stage in one.step.inputs.values()]
        if any(not store.is_whole(current.workspace, output) for output in read):
            text = "its output has its hash; not made again, because what it reads is not whole"
            return Checked(name, one.output, "whole", text)
        root, sources = current.workspace.root, one.step.sources
        files = look.files(one.step, root, current.state) if sources else ()
        if files and key.of_files((f.name, f.sha256) for f in files) != _manifest(one):
            text = "its output has its hash; not made again, because its sources are changing"
            return Checked(name, one.output, "whole", text)
        job = run.job_of(
            current,
            one._replace(sources=files),
            inputs,
            output=made,
            scratch=scratch,
            previous=None,
        )
        if one.step.own_process:
            child.run(job, one.step, _quiet, staging / "log")
        else:
            worker.run(job, _quiet)
        if store.content_hash(made) == one.output:
            return Checked(
                name, one.output, "rebuilt", "its output has its hash, and came out again"
            )
        differ = ", ".join(_other(made, store.path_of(current.workspace, one.output)))
    text = f"made again, it comes out different: {differ}; `runner plan` shows changed versions"
    return Checked(name, one.output, "differs", text)


def _is_of_a_model(step: Step, planned: dict[str, Planned]) -> bool:
    """Whether a trained model is among what it was made from: that takes long to do again."""
    above = [planned[name].step for name in step.inputs.values()]
    return "model" in step.inputs or any(_is_of_a_model(one, planned) for one in above)


def _manifest(one: Planned) -> str | None:
    return one.parts.get("sources") if one.parts else None


def _other(made: Path, kept: Path) -> list[str]:
    """The files that are not equal."""
    names = {
        path.relative_to(folder).as_posix()
        for folder in (made, kept)
        for path in disk.files(folder)
    }
    both = {name for name in names if (made / name).is_file() and (kept / name).is_file()}
    same = {name for name in both if filecmp.cmp(made / name, kept / name, shallow=False)}
    return sorted(names - same)


def _quiet(_: Event) -> None:
    """Events of a check are nobody's."""
