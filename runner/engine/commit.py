"""What says which output of a stage is the current one: the lockfile, and a link for people."""

from __future__ import annotations

from pathlib import Path

from runner import disk
from runner.engine import facts, key, lock, opened, store
from runner.engine.opened import Opened
from runner.engine.plan import Planned


def output(current: Opened, planned: Planned) -> None:
    """Makes the lockfile and the link say that this is the stage's output."""
    if planned.is_left_out or planned.output is None or planned.parts is None:
        return
    locked = lock.read(current.lock_path)
    fact = lock.Fact(planned.step.name, planned.output, planned.parts)
    names = [step.name for step in current.compiled.steps]
    lock.write(current.lock_path, lock.updated(locked, fact, names))
    opened.claim(current)
    link = current.links / planned.step.name
    disk.point(link, store.path_of(current.workspace, planned.output))


def drop_links(current: Opened) -> None:
    """Removes the links of stages that the recipe does not have any more."""
    for link in _others(current):
        link.unlink(missing_ok=True)


def _others(current: Opened) -> list[Path]:
    names = {step.name for step in current.compiled.steps}
    return [p for p in current.links.glob("[!.]*") if p.is_symlink() and p.name not in names]


def is_settled(current: Opened, planned: tuple[Planned, ...]) -> bool:
    """Whether lockfile and links say what is known."""
    locked = lock.read(current.lock_path)
    if _others(current):
        return False
    for step in planned:
        if step.is_left_out:
            continue
        target = store.path_of(current.workspace, step.output or "")
        if not disk.points(current.links / step.step.name, target):
            return False
    wanted = tuple(
        lock.Fact(p.step.name, p.output, p.parts)
        for p in planned
        if p.output and p.parts and not p.is_left_out
    )
    left_out = {step.step.name for step in planned if step.is_left_out}
    return wanted == tuple(fact for fact in locked.facts if fact.stage not in left_out)


def keep_elsewhere(current: Opened, planned: Planned) -> None:
    """Copies an output to the remote cache, where there is one that lacks it."""
    if not current.elsewhere.is_there or planned.parts is None or planned.output is None:
        return
    made = facts.of_output(current.workspace, key.of(planned.parts), planned.output)
    if made is not None and not planned.is_left_out:
        current.elsewhere.keep(made, store.path_of(current.workspace, planned.output))
