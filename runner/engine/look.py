"""The source files of a stage as they are now, looked at once: the hash of them all, and a list.

Where nothing changed since the last look, the hash is known from one digest of all names, sizes,
times and inodes, and no list is made.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import NamedTuple

from runner.engine import facts, key, state, store, workspace
from runner.engine.recipe import Step
from runner.engine.state import State
from runner.errors import PreconditionError
from runner.sources import SourceFile

LOOKS = 5
"""How often files are looked at again because one of them went away meanwhile."""


class Growing(NamedTuple):
    """How sources are looked at while files are still being put there.

    A file among `held`, or one that changed less than `settle_s` seconds ago, stays as it was
    taken last; one that was never taken is not there yet. Where more than the share `gone_max` of
    what was taken last is gone, that is an error.
    """

    held: frozenset[str] = frozenset()
    settle_s: float = 0.0
    gone_max: float = 1.0


class Vanished(PreconditionError):
    """So many source files are gone at once that a folder may be missing, and not its files."""


Signature = tuple[int, int, int, int]


def manifest(
    step: Step,
    root: Path,
    memory: State,
    *,
    paranoid: bool = False,
    growing: Growing | None = None,
    before: str | None = None,
) -> tuple[str, tuple[SourceFile, ...] | None]:
    """One hash over the files that the stage's patterns name, and their list if it was made.

    `before` is the hash of those that were taken last, which matters to growing sources alone.
    """
    if growing is not None:
        found = files(step, root, memory, paranoid=paranoid, growing=growing, before=before)
        return remembered(found, memory), found
    paths = _paths(step, root)
    patterns = key.canonical([str(root), *step.sources])
    digest = None if paranoid else state.looked_at(paths)
    last = memory.scanned(patterns)
    if digest is not None and last is not None and last[0] == digest:
        return last[1], None
    found = _hashed(paths, root, memory, paranoid)
    hash = remembered(found, memory)
    if digest is not None:
        memory.remember_scan(patterns, digest, hash)
    return hash, found


def files(
    step: Step,
    root: Path,
    memory: State,
    *,
    paranoid: bool = False,
    growing: Growing | None = None,
    before: str | None = None,
) -> tuple[SourceFile, ...]:
    """The files that the stage's patterns name, by name, each with its hash."""
    if growing is None:
        return _hashed(_paths(step, root), root, memory, paranoid)
    taken = _taken(before, root, memory)
    for attempt in range(LOOKS):
        try:
            return _ready(step, root, memory, paranoid, growing, taken)
        except FileNotFoundError:
            if attempt == LOOKS - 1:
                raise
    raise AssertionError


def remembered(found: Iterable[SourceFile], memory: State) -> str:
    """The hash of a list of files, which is kept, to say later what changed."""
    by_name = [(file.name, file.sha256) for file in found]
    hash = key.of_files(by_name)
    memory.remember_manifest(hash, dict(by_name))
    return hash


def signature(path: str) -> Signature:
    """What tells whether a file changed, without opening it."""
    status = os.stat(path)  # noqa: PTH116 (a Path would double the time)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def age_s(seen: Signature, now_ns: int) -> float:
    """The seconds since the file changed, by the clock of its file system.

    Where that clock is ahead of ours nothing can be told from it; then the file counts as old.
    """
    age = (now_ns - max(seen[1], seen[2])) / 1e9
    ctime_age = (now_ns - seen[2]) / 1e9  # a copied time of change may be anything, this one not
    age = ctime_age if age < 0 else age
    return age if age > -1 else float("inf")


def _hashed(paths: list[str], root: Path, memory: State, paranoid: bool) -> tuple[SourceFile, ...]:
    hashes = memory.hashes(paths, trust_stat=not paranoid)
    found = (SourceFile(p, workspace.named(root, p), sha256) for p, sha256 in hashes.items())
    return tuple(sorted(found, key=lambda file: (file.name, file.path)))


def _paths(step: Step, root: Path) -> list[str]:
    found = {path for pattern in step.sources for path in workspace.matching(root, pattern)}
    if not found:
        raise PreconditionError(
            f"{step.name}: no files in {', '.join(step.sources)} (below {root})",
            hint="put chat exports or instruction data there, or correct `sources:`",
        )
    return list(found)


def _ready(
    step: Step,
    root: Path,
    memory: State,
    paranoid: bool,
    growing: Growing,
    taken: Mapping[str, str | None],
) -> tuple[SourceFile, ...]:
    """The files that nobody is writing to, and the others as they were taken last.

    A file is hashed between two looks at it, and only counts where both saw the same.
    """
    there = set(_growing_paths(step, root, growing.held, taken))
    now = time.time_ns()
    seen = {path: signature(path) for path in there}
    settled = [path for path in there if age_s(seen[path], now) >= growing.settle_s]
    hashes = memory.hashes(settled, trust_stat=not paranoid)
    ready = [path for path in settled if signature(path) == seen[path]]
    found = [SourceFile(path, workspace.named(root, path), hashes[path]) for path in ready]
    names = {file.name for file in found}
    for path in (there - set(ready)) | growing.held:
        name = workspace.named(root, path)
        names.add(name)
        if sha256 := taken.get(name):
            found.append(SourceFile(path, name, sha256))
    _refuse_vanished(step, root, found, names, taken, growing.gone_max)
    if not found:
        raise PreconditionError(
            f"{step.name}: nothing in {', '.join(step.sources)} can be read yet (below {root})",
            hint="put chat exports or instruction data there, or wait until they are written",
        )
    return tuple(sorted(found, key=lambda file: (file.name, file.path)))


def _taken(before: str | None, root: Path, memory: State) -> Mapping[str, str | None]:
    """What was taken last, name → hash; without hashes where only the output still tells of it.

    Nothing but that list tells a folder that is missing from one that was never there, so it must
    not be lost with the state database, which anybody may delete.
    """
    if before is None:
        return {}
    known = memory.manifest(before)
    if known is not None:
        return known
    space = workspace.at(root)
    names: set[str] = set()
    for made in facts.every(space):
        if made.parts.get("sources") == before and not names:
            names = _named_in(store.path_of(space, made.output))
    return dict.fromkeys(names)


def _named_in(output: Path) -> set[str]:
    """The files that the records of an ingested output are from."""
    found: set[str] = set()
    try:
        with (output / "conversations.jsonl").open("rb") as lines:
            found.update(json.loads(line)["source"]["path"] for line in lines)
        with (output / "rejected.jsonl").open("rb") as lines:
            found.update(json.loads(line)["path"] for line in lines)
    except (OSError, ValueError, LookupError, TypeError):
        pass  # as much as can still be read
    return found


def _growing_paths(
    step: Step, root: Path, held: frozenset[str], taken: Mapping[str, str | None]
) -> list[str]:
    """The files there; none for a folder that was there when files were taken and is gone."""
    found: set[str] = set()
    for pattern in step.sources:
        try:
            found.update(workspace.matching(root, pattern, held))
        except workspace.LinksOut:
            raise
        except PreconditionError:
            if not taken:
                raise
    return list(found)


def _refuse_vanished(
    step: Step,
    root: Path,
    found: Iterable[SourceFile],
    names: Set[str],
    taken: Mapping[str, str | None],
    gone_max: float,
) -> None:
    """Raises where too much is gone; `names` are there, read or not.

    A file that has only another name now is not gone, nor is one that the recipe does not name.
    """
    if len(taken.keys() - names) <= gone_max * len(taken):
        return
    starts = tuple(_start(root, pattern) for pattern in step.sources)
    wanted = {name for name in taken if name.startswith(starts)}
    moved = {file.sha256 for file in found if file.name not in taken}
    gone = sorted(name for name in wanted - names if taken[name] not in moved)
    if len(gone) > gone_max * len(wanted):
        few = ", ".join(gone[:3]) + (", …" if len(gone) > 3 else "")
        raise Vanished(
            f"{len(gone):,} of the {len(wanted):,} source files of {step.name} are gone since they"
            f" were taken last: {few}",
            hint="bring back the folder, if one is missing (a share that is not mounted?);"
            " or `runner watch RECIPE --accept-deletions` to go on without them",
        )


def _start(root: Path, pattern: str) -> str:
    """What the names of all files that the pattern names begin with."""
    name = workspace.named(root, str(root.joinpath(*workspace.before_glob(pattern))))
    return "" if name in (".", str(root)) else name
