"""What each stage of a recipe made last: when, from what reasons it would run again, how large."""

from __future__ import annotations

import time
from typing import Any

from runner import disk
from runner.engine import key as keys
from runner.engine import plan, store
from runner.engine.execute import Opened
from runner.ui import words


def records(opened: Opened) -> list[dict[str, Any]]:
    """One record a stage, with its state as in `plan`."""
    found = []
    world = opened.world()
    for planned in plan.whole(opened.compiled, world):
        step = planned.step
        link = opened.workspace.links(opened.compiled.name) / step.name
        fact = world.lock.of_stage(step.name)
        output = planned.output or (fact.output if fact else None)
        made = opened.state.made(keys.of(fact.parts)) if fact else []
        last = next((m for m in made if m.output == output), None)
        artifact = store.path_of(opened.workspace, output) if output else None
        there = artifact is not None and artifact.is_dir()
        found.append(
            {
                "stage": step.name,
                "state": planned.state,
                "causes": [cause.text for cause in planned.causes],
                "output": output,
                "path": str(link) if there else None,
                "bytes": disk.size(artifact) if artifact and there else 0,
                "made_at": last.made_at if last else None,
                "seconds": last.seconds if last else None,
                "metrics": last.metrics if last else {},
            }
        )
    return found


def text(found: list[dict[str, Any]]) -> str:
    """The records as a table for people."""
    lines = []
    width = max(len(record["stage"]) for record in found)
    for record in found:
        state = "up to date" if record["state"] == "skip" else "would run"
        parts = [f"{record['stage']:{width}}  {state}"]
        if record["made_at"]:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["made_at"]))
            parts.append(f"made {when} in {words.duration(record['seconds'])}")
        if record["bytes"]:
            parts.append(words.size(record["bytes"]))
        if record["metrics"]:
            parts.append(words.metrics(record["metrics"]))
        lines.append(" · ".join(parts))
    return "\n".join(lines)
