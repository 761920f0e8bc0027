"""The source files of a stage as they are now, looked at once: the hash of them all, and a list.

Where nothing changed since the last look, the hash is known from one digest of all names, sizes,
times and inodes, and no list is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from runner.engine import key, state, workspace
from runner.engine.recipe import Step
from runner.engine.state import State
from runner.errors import PreconditionError
from runner.sources import SourceFile


def manifest(
    step: Step, root: Path, memory: State, *, paranoid: bool = False
) -> tuple[str, tuple[SourceFile, ...] | None]:
    """One hash over the files that the stage's patterns name, and their list if it was made."""
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
    step: Step, root: Path, memory: State, *, paranoid: bool = False
) -> tuple[SourceFile, ...]:
    """The files that the stage's patterns name, by name, each with its hash."""
    return _hashed(_paths(step, root), root, memory, paranoid)


def remembered(found: Iterable[SourceFile], memory: State) -> str:
    """The hash of a list of files, which is kept, to say later what changed."""
    by_name = [(file.name, file.sha256) for file in found]
    hash = key.of_files(by_name)
    memory.remember_manifest(hash, dict(by_name))
    return hash


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
