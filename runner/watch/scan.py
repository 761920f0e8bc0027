"""All source files of a recipe as they are now: names, sizes, times and inodes; none is opened."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from runner.engine import look, workspace
from runner.engine.recipe import Compiled
from runner.errors import PreconditionError


@dataclass(frozen=True)
class Scan:
    """Two scans are equal where nothing changed between them.

    `files`: path → hash of what tells whether it changed; as numbers, because ten thousand of them
    are kept all the time. `aside`: path → why it cannot be read. `missing`: sources that are not
    there. `youngest_s` is how long ago the last file changed, `young` how many did so within the
    time that was asked for.
    """

    files: dict[str, int]
    aside: dict[str, str]
    missing: tuple[str, ...]
    youngest_s: float
    young: int

    def is_as(self, other: Scan | None) -> bool:
        """Whether nothing differs but ages."""
        return other is not None and (self.files, self.aside, self.missing) == (
            other.files,
            other.aside,
            other.missing,
        )

    def changed_since(self, other: Scan | None) -> int:
        """How many files are new, gone or others."""
        then = other.files if other else {}
        return len(dict(self.files.items() ^ then.items()))


def of(root: Path, compiled: Compiled, settle_s: float) -> Scan:
    """The sources of all stages; what one of them says of a missing folder is kept."""
    paths: set[str] = set()
    aside: dict[str, str] = {}
    missing: list[str] = []
    for pattern in {pattern for step in compiled.steps for pattern in step.sources}:
        try:
            paths.update(_matching(root, pattern, aside))
        except PreconditionError as error:
            missing.append(error.message)
    files: dict[str, int] = {}
    youngest, young, now = float("inf"), 0, time.time_ns()
    for path in sorted(paths):
        try:
            seen = look.signature(path)
        except OSError:
            continue  # it went away meanwhile
        if not os.access(path, os.R_OK):
            aside[path] = "it may not be read; check its permissions"
        files[path] = hash(seen)
        age = look.age_s(seen, now)
        youngest = min(youngest, age)
        young += age < settle_s
    return Scan(files, aside, tuple(sorted(missing)), youngest, young)


def folders(root: Path, recipe: Path, compiled: Compiled) -> frozenset[tuple[str, bool, int, int]]:
    """What to watch: folder, with all below it or not, and its identity.

    A folder does not tell of its own end: what it is in is watched too. Of a source that is not
    there, the nearest folder that is.
    """
    found: set[tuple[str, bool, int, int]] = set()
    for step in compiled.steps:
        for pattern in step.sources:
            source = _watched(_plain(root, pattern))
            found.add(source)
            found.add(_identified(Path(source[0]).parent, recursive=False))
    for path in recipe_files(recipe, compiled):
        if path.parent.is_dir():
            found.add(_identified(path.parent, recursive=False))
    return frozenset(found)


def recipe_files(recipe: Path, compiled: Compiled) -> tuple[Path, ...]:
    """The recipe, and the one that it extends."""
    own = recipe.absolute()
    base = compiled.extends
    return (own, own.parent / base) if base else (own,)


def _matching(root: Path, pattern: str, aside: dict[str, str]) -> list[str]:
    try:
        return workspace.matching(root, pattern, frozenset(aside))
    except workspace.LinksOut as error:
        reason = "it is a link that leads out of the workspace"
        aside.update(dict.fromkeys(error.paths, reason))
        return workspace.matching(root, pattern, frozenset(aside))


def _plain(root: Path, pattern: str) -> Path:
    """The source itself, or of a glob what is before its first wildcard."""
    path = root / pattern
    return path if path.exists() else root.joinpath(*workspace.before_glob(pattern))


def _watched(path: Path) -> tuple[str, bool, int, int]:
    if path.is_dir():
        return _identified(path, recursive=True)
    return _identified(next(one for one in path.parents if one.is_dir()), recursive=False)


def _identified(folder: Path, *, recursive: bool) -> tuple[str, bool, int, int]:
    status = folder.stat()
    # The links on the way are followed here, because the system would watch the link itself.
    return str(folder.resolve()), recursive, status.st_dev, status.st_ino
