"""What an apply would do and why, decided from hashes alone; it writes nothing but its cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runner.engine import key, lock, store, workspace
from runner.engine.recipe import Compiled, Step
from runner.engine.state import State
from runner.engine.workspace import Workspace
from runner.errors import PreconditionError
from runner.model import source
from runner.sources import SourceFile

logger = logging.getLogger(__name__)

Reason = Literal[
    "never run",
    "settings",
    "sources",
    "input",
    "base model",
    "seed",
    "stage version",
    "output missing",
    "upstream runs",
    "not pinned",
]


@dataclass(frozen=True)
class Cause:
    """Why a stage runs: which part of its key changed, and how, in words."""

    reason: Reason
    text: str


@dataclass(frozen=True)
class Planned:
    """What will become of a stage.

    `maybe`: a stage above runs, and this one too unless that gives the same output as before.
    `output` is known for a stage to skip, and foreseen for one that is only rebuilt.
    """

    step: Step
    state: Literal["skip", "run", "maybe"]
    causes: tuple[Cause, ...] = ()
    parts: key.Components | None = None
    output: str | None = None
    sources: tuple[SourceFile, ...] = ()


@dataclass(frozen=True)
class World:
    """What a plan is made from: the known facts, and the files as they are now."""

    workspace: Workspace
    state: State
    lock: lock.Lock
    base_model: str | None
    """The identity of the base model's files; None as long as a hub model has no pin."""


def whole(compiled: Compiled, world: World) -> tuple[Planned, ...]:
    """The plan of a recipe, stage by stage."""
    plan: dict[str, Planned] = {}
    for step in compiled.steps:
        plan[step.name] = decide(step, plan, world)
    return tuple(plan.values())


def decide(
    step: Step,
    above: Mapping[str, Planned],
    world: World,
    files: tuple[SourceFile, ...] | None = None,
) -> Planned:
    """What will become of one stage, given what becomes of those above it.

    `files` are its source files, where they have just been looked at.
    """
    before = world.lock.of_stage(step.name)
    files = source_files(step, world) if files is None else files
    manifest = key.of_files((file.name, file.sha256) for file in files) if files else None
    inputs = {kind: above[name].output for kind, name in step.inputs.items()}
    parts = key.components(
        kind=step.kind,
        version=step.version,
        settings=step.settings,
        inputs={kind: output for kind, output in inputs.items() if output is not None},
        sources=manifest,
        base_model=world.base_model if step.uses_base_model else None,
        seed=step.seed,
    )
    if manifest is not None:
        world.state.remember_manifest(manifest, {file.name: file.sha256 for file in files})
    changed = why(step, parts, before, world)

    unpinned = step.uses_base_model and world.base_model is None
    unknown = [name for name in step.inputs.values() if above[name].output is None]
    if unpinned or unknown:
        causes = [cause for cause in changed if cause.reason != "input"]
        if unpinned:
            causes.append(Cause("not pinned", "the hub decides which commit the base model is"))
        # What is only rebuilt may come out as it was; a new training gives a new model.
        certain = bool(causes) or any(
            above[name].state == "run" and not above[name].step.rebuilds for name in unknown
        )
        causes += [Cause("upstream runs", f"{name} runs first") for name in dict.fromkeys(unknown)]
        state: Literal["run", "maybe"] = "run" if certain else "maybe"
        return Planned(step, state, tuple(causes), None, None, files)

    outputs = known_outputs(key.of(parts), world)
    logger.debug("%s: key %s, known outputs %s", step.name, key.of(parts), outputs)
    for output in outputs:
        if store.holds(world.workspace, output):
            return Planned(step, "skip", (), parts, output, files)
    if outputs:
        text = "its output is not in the store"
        if not step.rebuilds:
            text += "; it is trained again and gives a different model"
        cause = Cause("output missing", text)
        foreseen = outputs[0] if step.rebuilds else None
        return Planned(step, "run", (cause,), parts, foreseen, files)
    text = "what it made last is not known any more"
    return Planned(step, "run", changed or (Cause("never run", text),), parts, None, files)


def known_outputs(stage_key: str, world: World) -> list[str]:
    """All outputs that are known for a key; the lockfile's first, because others share it."""
    locked = [fact.output for fact in world.lock.facts if fact.key == stage_key]
    return list(dict.fromkeys([*locked, *(made.output for made in world.state.made(stage_key))]))


def why(
    step: Step, now: key.Components, before: lock.Fact | None, world: World
) -> tuple[Cause, ...]:
    """Every difference between what was run last and what would run now."""
    if before is None:
        return (Cause("never run", "it has not run yet"),)
    then = before.parts
    causes: list[Cause] = []
    old, new = then.get("settings", {}), now.get("settings", {})
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            was, now_is = (_setting(settings, name) for settings in (old, new))
            causes.append(Cause("settings", f"{name} {was} → {now_is}"))
    if then.get("sources") != now.get("sources"):
        causes.append(Cause("sources", _sources_text(then.get("sources"), now, world)))
    for kind, output in now.get("inputs", {}).items():
        if then.get("inputs", {}).get(kind) != output:
            causes.append(Cause("input", f"{step.inputs[kind]} gave another output"))
    if step.uses_base_model and then.get("base_model") != now.get("base_model"):
        causes.append(Cause("base model", "the base model is another one"))
    if then.get("seed") != now.get("seed"):
        causes.append(Cause("seed", f"seed {then.get('seed')} → {now.get('seed')}"))
    if (then["kind"], then["version"]) != (now["kind"], now["version"]):
        causes.append(Cause("stage version", "this version of the runner does it differently"))
    return tuple(causes)


def source_files(step: Step, world: World) -> tuple[SourceFile, ...]:
    """The files that the stage's patterns name now, by name, each with its hash."""
    root = world.workspace.root
    if not step.sources:
        return ()
    found = {path for pattern in step.sources for path in workspace.matching(root, pattern)}
    if not found:
        raise PreconditionError(
            f"{step.name}: no files in {', '.join(step.sources)} (below {root})",
            hint="put chat exports or instruction data there, or correct `sources:`",
        )
    hashes = world.state.hashes(found)
    files = (SourceFile(p, workspace.named(root, p), hashes[p]) for p in found)
    return tuple(sorted(files, key=lambda file: (file.name, file.path)))


def base_identity(spec: str | None, root: Path, locked: lock.Lock, state: State) -> str | None:
    """The hash of the base model's files, `owner/name@commit` for the hub, None if not pinned."""
    if spec is None:
        return None
    if source.on_hub(spec, root):
        commit = locked.commit_of(spec)
        return f"{spec}@{commit}" if commit else None
    path = source.path_of(spec, root)
    files = source.model_files(path)
    hashes = state.hashes(str(file) for file in files)
    return key.of_files((f.name if path.is_dir() else "", hashes[str(f)]) for f in files)


def _setting(settings: Mapping[str, Any], name: str) -> str:
    return key.canonical(settings[name]) if name in settings else "default"


def _sources_text(then: str | None, now: key.Components, world: World) -> str:
    old = world.state.manifest(then) if then else None
    new = world.state.manifest(now["sources"]) if "sources" in now else {}
    if old is None or new is None:
        return "the source files are others"
    added = sorted(new.keys() - old.keys())
    removed = sorted(old.keys() - new.keys())
    edited = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    changes = [
        f"{len(names)} {'file' if len(names) == 1 else 'files'} {what}: {names[0]}"
        + (", …" if len(names) > 1 else "")
        for what, names in (("added", added), ("removed", removed), ("changed", edited))
        if names
    ]
    return "; ".join(changes)
