"""What says which output of a stage is the current one: the lockfile, and a link for people."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from runner import disk
from runner.engine import facts, key, lock, opened, store
from runner.engine.opened import Opened
from runner.engine.plan import Planned
from runner.engine.recipe import CURRENT


def output(current: Opened, planned: Planned) -> None:
    """Makes the lockfile and the link say that this is the stage's output."""
    if planned.is_left_out or planned.output is None or planned.parts is None or current.aside:
        return
    locked = lock.read(current.lock_path)
    fact = lock.Fact(planned.step.name, planned.output, planned.parts)
    names = [step.name for step in current.compiled.steps]
    lock.write(current.lock_path, lock.updated(locked, fact, names))
    if planned.step.transient:
        return
    opened.claim(current)
    folder = store.path_of(current.workspace, planned.output)
    for link, target in links(current.links, planned.step.name, folder):
        if link.parent.is_symlink():  # as the whole stage's output was linked once
            link.parent.unlink()
        disk.point(link, target)


def links(place: Path, name: str, output: Path) -> Iterator[tuple[Path, Path]]:
    """The links in `place` by which people find the output of a step, and what they lead to.

    To that of a whole stage leads one link; those of a stage's parts lie in one folder, where each
    file has its own. Hidden files have none.
    """
    stage, _, part = name.partition("/")
    if not part:
        yield place / stage, output
    elif output.is_dir():
        for file in sorted(os.listdir(output)):  # noqa: PTH208
            if not file.startswith("."):
                yield place / stage / file, output / file


def drop_links(current: Opened) -> None:
    """Removes the links of stages that the recipe does not have any more, and of their files."""
    for link in () if current.aside else _others(current):
        link.unlink(missing_ok=True)
        if link.parent != current.links and not any(link.parent.iterdir()):
            link.parent.rmdir()


def _others(current: Opened) -> list[Path]:
    """Links that no fact of a stage in the recipe asks for."""
    wholes = {step.name for step in current.compiled.steps} | {CURRENT}
    found = [p for p in current.links.glob("[!.]*") if p.is_symlink() and p.name not in wholes]
    parts = [step for step in current.compiled.steps if step.name != step.stage]
    locked = lock.read(current.lock_path)
    wanted = {
        link
        for step in parts
        if not step.transient and (fact := locked.of_stage(step.name)) is not None
        for link, _ in links(
            current.links, step.name, store.path_of(current.workspace, fact.output)
        )
    }
    for folder in sorted(current.links.glob("[!.]*")):
        if folder.is_dir() and not folder.is_symlink() and folder.name != CURRENT:
            found += [p for p in sorted(folder.iterdir()) if p.is_symlink() and p not in wanted]
    return found


def unsettled(current: Opened, planned: tuple[Planned, ...]) -> list[str]:
    """The stages whose known output is not the one that the lockfile and the links name, and the
    links that are left over."""
    if current.aside:
        return []
    locked = lock.read(current.lock_path)
    found = []
    for one in planned:
        if one.is_left_out or one.output is None or one.parts is None:
            continue
        fact = lock.Fact(one.step.name, one.output, one.parts)
        said = [known for known in locked.facts if known.stage == one.step.name]
        folder = store.path_of(current.workspace, one.output)
        expected = links(current.links, one.step.name, folder) if not one.step.transient else ()
        if said != [fact] or not all(disk.points(link, target) for link, target in expected):
            found.append(one.step.name)
    names = {step.name for step in current.compiled.steps}
    left = {link.relative_to(current.links).parts[0] for link in _others(current)}
    return found + sorted(({fact.stage for fact in locked.facts} - names) | left)


def keep_elsewhere(current: Opened, planned: Planned, *, thorough: bool = False) -> None:
    """Copies an output to the remote cache, where there is one that lacks it."""
    if not current.elsewhere.is_there or planned.parts is None or planned.output is None:
        return
    if planned.step.transient and not store.holds(current.workspace, planned.output):
        return
    made = facts.of_output(current.workspace, key.of(planned.parts), planned.output)
    if made is not None and not planned.is_left_out:
        folder = store.path_of(current.workspace, planned.output)
        current.elsewhere.keep(made, folder, thorough=thorough)
