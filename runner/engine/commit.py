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
    return not _others(current) and not unsettled(current, planned)


def unsettled(current: Opened, planned: tuple[Planned, ...]) -> list[str]:
    """The stages whose known output is not the one that the lockfile and the links name."""
    locked = lock.read(current.lock_path)
    found = []
    for one in planned:
        if one.is_left_out or one.output is None or one.parts is None:
            continue
        fact = lock.Fact(one.step.name, one.output, one.parts)
        said = [known for known in locked.facts if known.stage == one.step.name]
        target = store.path_of(current.workspace, one.output)
        if said != [fact] or not disk.points(current.links / one.step.name, target):
            found.append(one.step.name)
    names = {step.name for step in current.compiled.steps}
    return found + sorted({fact.stage for fact in locked.facts} - names)


def keep_elsewhere(current: Opened, planned: Planned, *, thorough: bool = False) -> None:
    """Copies an output to the remote cache, where there is one that lacks it."""
    if not current.elsewhere.is_there or planned.parts is None or planned.output is None:
        return
    made = facts.of_output(current.workspace, key.of(planned.parts), planned.output)
    if made is not None and not planned.is_left_out:
        folder = store.path_of(current.workspace, planned.output)
        current.elsewhere.keep(made, folder, thorough=thorough)
