"""What the store holds that nobody needs any more.

Kept is what a lockfile names: any in the working tree, in any commit that a branch or tag leads to
directly, of every workspace that uses the store; what the links of a recipe lead to; and all that
is younger than two weeks. What is trained goes only by name: time alone does not bring it back.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner import disk
from runner.engine import facts, lock, store, usage
from runner.engine.facts import Made
from runner.engine.workspace import Workspace
from runner.errors import PreconditionError, RecipeError, RunnerError

YOUNG_S = 14 * 24 * 3600
"""Nothing goes that was made or used so shortly ago."""
LOCK_BYTES_MAX = 64 << 20

Why = Literal["needed", "young", "trained", "unknown", "garbage", "named"]


@dataclass(frozen=True)
class Found:
    """A folder or file, its size, and why it stays or goes: `garbage` and `named` go."""

    path: Path
    what: str
    bytes: int
    why: Why

    @property
    def goes(self) -> bool:
        return self.why in ("garbage", "named")


def find(space: Workspace, named: Sequence[str] = ()) -> list[Found]:
    """Everything in the store, in scratch and in the cache, with what is to become of it.

    Raises RunnerError where a workspace that uses the store cannot be asked.
    """
    projects = [
        space,
        *(project for project in store.projects(space) if project.root != space.root),
    ]
    needed = {output for project in projects for output in _named_by_lockfiles(project)}
    needed |= {path.name for project in projects for path in usage.outputs_of_links(project)}
    known: dict[str, Made] = {made.output: made for made in facts.every(space)}
    asked = [_object_named(space, name, needed) for name in named]
    found = []
    for path in store.objects(space):
        made = known.get(path.name)
        what = made.stage if made else "unknown"
        why: Why = "garbage"
        if path.name in needed:
            why = "needed"
        elif path in asked:
            why = "named"
        elif _is_young(path):
            why = "young"
        elif made is None:
            why = "unknown"
        elif not made.rebuilds:
            why = "trained"
        found.append(Found(path, f"{what} {path.name[:12]}", disk.size(path), why))
    stays = {one.path.name for one in found if not one.goes}
    return [*found, *_left(space, stays)]


def delete(space: Workspace, found: Sequence[Found]) -> None:
    """Removes what goes; each folder is out of sight before its first file is gone."""
    with store.staging(space) as staging:
        for number, one in enumerate(one for one in found if one.goes):
            beside = staging / str(number)
            try:
                one.path.rename(beside)
            except FileNotFoundError:
                continue
            except OSError:  # on another disk than the store
                disk.remove(one.path)
                continue
            if one.why == "garbage" and _is_young(beside):
                beside.rename(one.path)  # somebody has begun to use it
                continue
            disk.remove(beside)
    gone = {one.path.name for one in found if one.goes and not one.path.exists()}
    for made in list(facts.every(space)):
        if made.rebuilds and made.output in gone:
            facts.forget(space, made)


def _object_named(space: Workspace, name: str, needed: set[str]) -> Path:
    """The artifact whose hash begins so."""
    paths = [path for path in store.objects(space) if path.name.startswith(name)]
    if len(name) < 6 or len(paths) != 1:
        raise RecipeError(
            f"{name!r} names {len(paths)} artifacts of the store", hint="give more of its hash"
        )
    if paths[0].name in needed:
        raise RunnerError(
            f"{name} is named by a lockfile of a branch, tag or workspace, so it stays",
            hint="delete that branch or tag, or the line in the lockfile, first",
        )
    return paths[0]


def _named_by_lockfiles(space: Workspace) -> set[str]:
    """All outputs and inputs that the lockfiles of a workspace name, in any branch or tag."""
    texts = [path.read_bytes() for path in _lockfiles(space)]
    return {output for text in (*texts, *_lockfiles_in_git(space)) for output in lock.hashes(text)}


def _lockfiles(space: Workspace) -> Iterator[Path]:
    for folder, folders, names in os.walk(space.root):
        inside = Path(folder)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and inside / name not in (space.artifacts, space.store)
        ]
        yield from (inside / name for name in names if name.endswith(".lock"))


def _lockfiles_in_git(space: Workspace) -> Iterator[bytes]:
    if not (space.root / ".git").exists():
        inside = _git(space, "rev-parse", "--is-inside-work-tree")
        if inside is None:
            return
    listed = _git(space, "for-each-ref", "--format=%(objectname)")
    if listed is None:
        raise PreconditionError(
            f"git cannot say which branches {space.root} has, so nothing can be called unneeded",
            hint="check that `git for-each-ref` works there",
        )
    head = _git(space, "rev-parse", "--verify", "-q", "HEAD") or b""
    blobs: set[str] = set()
    for revision in dict.fromkeys([*listed.decode().split(), *head.decode().split()]):
        tree = _git(space, "ls-tree", "-r", "-z", "--full-tree", revision) or b""
        for entry in tree.split(b"\0"):
            about, _, name = entry.partition(b"\t")
            if name.endswith(b".lock"):
                blobs.add(about.split()[2].decode())
    for blob in sorted(blobs):
        text = _git(space, "cat-file", "blob", blob)
        if text is not None:
            yield text


def _git(space: Workspace, *arguments: str) -> bytes | None:
    """What git answers; None where it cannot."""
    try:
        command = ["git", "-C", str(space.root), *arguments]
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _left(space: Workspace, stays: set[str]) -> Iterator[Found]:
    """Of trainings that were never finished, and of caches for what is not there any more."""
    for path in sorted(space.scratch.glob("*")):
        if path.is_dir():
            why: Why = "young" if _is_young(path) else "garbage"
            what = f"unfinished training {path.name[:12]}"
            yield Found(path, what, disk.size(path), why)
    for path in sorted(space.cache.glob("*")):
        old = (one for one in (path.glob("*") if path.name == "ingest" else [path]))
        for one in old:
            why = "young" if _is_young(one) else "garbage"
            yield Found(one, f"cache {one.name[:12]}", disk.size(one), why)


def _is_young(path: Path) -> bool:
    newest = max((p.stat().st_mtime for p in (path, *path.rglob("*"))), default=0.0)
    return time.time() - newest < YOUNG_S
