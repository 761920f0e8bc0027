"""What takes the space under `artifacts/` and in the store, by kind and by recipe."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runner.engine import store
from runner.engine.workspace import Workspace

NO_RECIPES = ("store", "runs", "scratch", "cache", "watch")
"""Folders under `artifacts/` that hold no links of a recipe."""


@dataclass(frozen=True)
class Usage:
    """Bytes by kind, which are all there are; and by recipe and stage, of what its links lead to.

    `earlier results` are all that no link of this workspace leads to: in a store that several
    workspaces share, those of the others too.
    """

    kinds: Mapping[str, int]
    recipes: Mapping[str, Mapping[str, int]]


def of(space: Workspace) -> Usage:
    sizes = {path.name: measured(path)[0] for path in store.objects(space)}
    linked = links(space)
    current = {output for outputs in linked.values() for output in outputs.values()}
    kinds = {
        "current results": sum(size for output, size in sizes.items() if output in current),
        "earlier results": sum(size for output, size in sizes.items() if output not in current),
        "facts": measured(space.store / "facts")[0],
        "being written": measured(space.store / "tmp")[0],
        "checkpoints": measured(space.scratch)[0],
        "cache": measured(space.cache)[0],
        "logs of runs": measured(space.runs)[0],
        "other": _other(space, set(sizes)),
    }
    recipes = {
        recipe: {stage: sizes[output] for stage, output in outputs.items() if output in sizes}
        for recipe, outputs in linked.items()
    }
    return Usage(kinds, recipes)


def links(space: Workspace) -> dict[str, dict[str, str]]:
    """For each recipe and stage, the output that its link leads to, whether that is there or not.

    On Windows a link may be a junction, which only where it leads to tells from a folder.
    """
    found: dict[str, dict[str, str]] = {}
    for folder in sorted(space.artifacts.glob("*")):
        if folder.is_dir() and folder.name not in NO_RECIPES:
            found[folder.name] = dict(_linked(folder, ""))
    return found


def _linked(folder: Path, within: str) -> Iterator[tuple[str, str]]:
    """Each link in the folder, and in those that are none, with the artifact that it leads to."""
    for path in sorted(folder.glob("*")):
        target = Path(os.path.realpath(path))
        named = [one.name for one in (target, target.parent) if store.HASH.fullmatch(one.name)]
        if named:
            yield within + path.name, named[0]
        elif path.is_dir() and not path.is_symlink():
            yield from _linked(path, f"{within}{path.name}/")


def measured(path: Path) -> tuple[int, float]:
    """Bytes of a file, or of all files in a folder; and when any of it was changed last.

    Nothing of what is not there; files may come and go meanwhile.
    """
    size, newest = 0, 0.0
    for status in _statuses(path):
        newest = max(newest, status.st_mtime)
        if stat.S_ISREG(status.st_mode):
            size += status.st_size
    return size, newest


def _statuses(path: Path) -> Iterator[os.stat_result]:
    """Of the folder or file and of all below it; follows no links."""
    try:
        top = path.lstat()
    except FileNotFoundError:
        return
    yield top
    folders = [str(path)] if stat.S_ISDIR(top.st_mode) else []
    while folders:
        # Plain texts, because `Path` objects take longer than looking at the files.
        with suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    yield entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)


def _other(space: Workspace, outputs: set[str]) -> int:
    """What is no artifact and nothing else that has a kind of its own: state, locks, markers."""
    size = 0
    for path in (*space.artifacts.glob("*"), *space.store.glob("*")):
        if path == space.store or path in (space.scratch, space.cache, space.runs):
            continue
        if path.parent == space.store and len(path.name) == 2:
            size += sum(measured(one)[0] for one in path.glob("*") if one.name not in outputs)
        elif path not in (space.store / "facts", space.store / "tmp"):
            size += measured(path)[0]
    return size
