"""What each stage of a recipe made last, how large it is, and what takes the space."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runner import disk
from runner.engine import commit, cost, plan, store, usage, words, workspace
from runner.engine.lock import Lock, Release
from runner.engine.opened import Opened
from runner.engine.plan import Planned
from runner.engine.recipe import CURRENT
from runner.ui import watch
from runner.watch.record import Folder, of_file


def record(opened: Opened) -> dict[str, Any]:
    """The stages, each with its state as in `plan`; the space by kind; which release is current."""
    world = opened.world()
    planned = plan.whole(opened.compiled, world)
    unsettled = commit.unsettled(opened, planned)
    space = usage.of(opened.workspace)
    return {
        "stages": [
            {**_stage(opened, one, world), "is_current": one.step.name not in unsettled}
            for one in planned
            if not one.step.transient
        ],
        "space": {
            "free": shutil.disk_usage(disk.existing(opened.workspace.store)).free,
            "kinds": space.kinds,
            "recipes": {name: _of_stages(sizes) for name, sizes in space.recipes.items()},
        },
        "checkpoints": _checkpoints(opened),
        "releases": _releases(opened, world.lock),
        "watch": _watch(opened),
    }


def watch_of(recipe: Path, root: Path | None) -> dict[str, Any] | None:
    """What the watch of a recipe file wrote down, also where the recipe is broken by now."""
    space = workspace.at(root) if root else workspace.around(recipe)
    folder = of_file(space, recipe)
    return {**folder.read(), "is_running": folder.is_watched()} if folder else None


def text(found: dict[str, Any]) -> str:
    """The record as lines for people."""
    lines = []
    width = max(len(stage["stage"]) for stage in found["stages"])
    for stage in found["stages"]:
        state = {"skip": "up to date", "blocked": "cannot run"}.get(stage["state"], "would run")
        if not stage["is_current"] and stage["state"] == "skip":
            state = "made with other settings; apply takes what is known with these"
        parts = [f"{stage['stage']:{width}}  {state}"]
        if stage["made_at"]:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(stage["made_at"]))
            parts.append(f"made {when} in {words.duration(stage['seconds'])}")
        if stage["bytes"]:
            parts.append(words.size(stage["bytes"]))
        if stage["metrics"]:
            parts.append(words.metrics(stage["metrics"]))
        lines.append(" · ".join(parts))
    space = found["space"]
    taken = [f"{kind} {words.size(size)}" for kind, size in space["kinds"].items() if size]
    lines.append(f"space: {', '.join(taken) or 'none'}; {words.size(space['free'])} free")
    for recipe, kinds in space["recipes"].items():
        parts = [f"{stage} {words.size(size)}" for stage, size in kinds.items() if size]
        if parts:
            lines.append(f"  {recipe}: {', '.join(parts)}")
    for stage, room in found["checkpoints"].items():
        size = words.size(room["bytes"])
        lines.append(f"{stage}: room for {room['more']:,} more checkpoints of {size}")
    lines += _release_lines(found["releases"])
    if found["watch"]:
        lines += watch.text_of(found["watch"], found["releases"])
    return _escaped(lines)


def watch_text(found: dict[str, Any]) -> str:
    """What a watch wrote down as lines for people."""
    return _escaped(watch.text_of(found))


def _escaped(lines: Iterable[str]) -> str:
    return "\n".join(line for text in lines for line in map(words.escaped, text.splitlines()))


def _release_lines(found: dict[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    current, aside = found["current"], found["kept_aside"]
    yield f"current: {watch.release_of(current)}" if current else "current: no release yet"
    if aside:
        models = ", ".join(f"{stage} {output[:12]}" for stage, output in aside["models"].items())
        end = f"; `{aside['promote']}` takes it all the same" if aside["promote"] else ""
        worse = f"found worse than release {aside['worse_than']}"
        yield f"  kept aside last: {models}, {worse}{end}"


def _releases(opened: Opened, locked: Lock) -> dict[str, Any] | None:
    """The current release and the model that was kept aside last; None without `retrain:`."""
    if opened.compiled.retrain is None:
        return None
    now = locked.release
    accepted = [one.outputs for one in locked.releases if not one.kept_aside]
    asides = [one for one in locked.releases if one.kept_aside and one.outputs not in accepted]
    aside = max(reversed(asides), default=None, key=lambda one: one.number)
    return {
        "current": now and {"number": now.number, "from": now.origin, "outputs": now.outputs},
        "kept_aside": aside and _kept_aside(opened, locked, aside),
    }


def _kept_aside(opened: Opened, locked: Lock, aside: Release) -> dict[str, Any]:
    trainings = [step.name for step in opened.compiled.steps if step.kind == "train"]
    models = {name: aside.outputs[name] for name in trainings if name in aside.outputs}
    facts = {name: locked.of_stage(name) for name in models}
    last = {name: fact.output for name, fact in facts.items() if fact}
    command = f"runner promote {opened.path}" if last == models else None
    return {"worse_than": aside.number, "models": models, "promote": command}


def _of_stages(sizes: Mapping[str, int]) -> dict[str, int]:
    """Without what the folder of the current release leads to, whose name is not for people."""
    own = f".{CURRENT}-"
    return {stage: size for stage, size in sizes.items() if not stage.startswith(own)}


def _stage(opened: Opened, planned: Planned, world: plan.World) -> dict[str, Any]:
    step = planned.step
    fact = world.lock.of_stage(step.name)
    output = planned.output or (fact.output if fact else None)
    made = plan.last_made(step, world)
    artifact = store.path_of(opened.workspace, output) if output else None
    there = artifact is not None and artifact.is_dir()
    return {
        "stage": step.name,
        "state": planned.state,
        "causes": [cause.text for cause in planned.causes],
        "output": output,
        "path": str(opened.links / step.name) if there else None,
        "bytes": usage.measured(artifact)[0] if artifact else 0,
        "made_at": made.made_at if made else None,
        "seconds": made.seconds if made else None,
        "metrics": made.metrics if made else {},
    }


def _watch(opened: Opened) -> dict[str, Any] | None:
    """What `runner watch` wrote down last; None where the recipe was never watched."""
    folder = Folder(opened.workspace, opened.compiled.name)
    found = folder.read()
    return {**found, "is_running": folder.is_watched()} if found else None


def _checkpoints(opened: Opened) -> dict[str, dict[str, int]]:
    """For each training, the size of one checkpoint and how many more of them fit."""
    trainings = (step.name for step in opened.compiled.steps if step.kind == "train")
    found = ((name, cost.checkpoints_that_fit(opened, name)) for name in trainings)
    return {
        name: {"bytes": sizes[0], "more": sizes[1]} for name, sizes in found if sizes is not None
    }
