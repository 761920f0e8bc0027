"""What the store holds that nobody needs any more.

Kept is what a lockfile names: any in the working tree, in git's index, in a stash, and in any
commit that a branch or tag leads to directly, of every workspace that uses the store; what the
links of a recipe lead to; and all that is younger than two weeks. What is trained goes only by
name: time alone does not bring it back. Where one of these cannot be asked, nothing goes.
"""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner import disk
from runner.engine import facts, lock, store, usage, worker
from runner.engine.facts import Made
from runner.engine.workspace import Workspace
from runner.errors import BusyError, PreconditionError, RecipeError, RunnerError

INDEXED = ("ingest", "clean", "window", "split")
"""Stages with a folder in the cache, of one index an output, which go one by one."""
YOUNG_S = 14 * 24 * 3600
"""Nothing goes that was made or used so shortly ago."""
NAME_DIGITS_MIN = 6
"""A shorter beginning of a hash is more likely a slip than a name."""
LOCATIONS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_NAMESPACE")
"""Variables by which git would answer for another repository, as they are set in its hooks."""

REFS = "--format=%(objectname) %(refname)"
SUBMODULE = "160000"

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
    needed = _needed(_projects(space))
    known: dict[str, list[Made]] = {}
    for made in facts.every(space):
        known.setdefault(made.output, []).append(made)
    objects = {path.name: path for path in store.objects(space)}
    asked = [_object_named(objects, name, needed) for name in named]
    there = objects.keys() - set(asked)
    found = []
    for output, path in objects.items():
        makers = known.get(output, [])
        size, newest = usage.measured(path)
        why: Why = "garbage"
        if output in needed:
            why = "needed"
        elif output in asked:
            why = "named"
        elif _is_young(newest):
            why = "young"
        elif not makers:
            why = "unknown"
        elif not any(_comes_back(made, known, there) for made in makers):
            why = "trained"
        what = makers[0].stage if makers else "unknown"
        found.append(Found(path, f"{what} {output[:12]}", size, why))
    return [*found, *_left(space)]


def delete(space: Workspace, found: Sequence[Found]) -> list[Found]:
    """Removes what goes, unless somebody has begun to need or use it since; what went.

    Each folder is out of sight before its first file is gone. Raises BusyError while an apply is at
    work, and PreconditionError where some of it may not be removed.
    """
    if not space.store.is_dir() and not any(one.goes for one in found):
        return []
    projects = _projects(space)
    refused: dict[Path, str] = {}
    with _alone(projects), store.staging(space) as staging:
        needed = _needed(projects)
        for number, one in enumerate(one for one in found if one.goes):
            newest = usage.measured(one.path)[1]
            if one.path.name in needed or _is_young(newest):
                continue
            try:
                disk.remove(_out_of_sight(one.path, staging / str(number)))
                if one.path.parent == space.scratch:
                    for path in worker.lock_of(one.path):
                        disk.remove(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                refused[one.path] = error.strerror or str(error)
        for made in facts.every(space):
            if made.rebuilds and made.output not in needed and not store.holds(space, made.output):
                facts.forget(space, made)
    if refused:
        path, why = next(iter(refused.items()))
        raise PreconditionError(
            f"{len(refused)} of what may go cannot be deleted; {path}: {why}",
            hint="perhaps it is another user's; the rest is deleted",
        )
    return [one for one in found if one.goes and not one.path.exists()]


def _projects(space: Workspace) -> list[Workspace]:
    """The workspaces that use the store."""
    return [space, *(project for project in store.projects(space) if project.root != space.root)]


@contextmanager
def _alone(projects: Sequence[Workspace]) -> Iterator[None]:
    """Keeps every apply from starting in the workspaces."""
    from filelock import FileLock, Timeout

    with ExitStack() as held:
        for project in projects:
            if not project.artifacts.is_dir():
                continue
            try:
                held.enter_context(FileLock(project.artifacts / "apply.lock", timeout=0))
            except Timeout:
                raise BusyError(
                    f"an apply is at work in {project.root}, so nothing is deleted",
                    hint="run the same command again when it has ended",
                ) from None
            except OSError as error:
                raise PreconditionError(
                    f"{project.root} cannot be kept from starting an apply: {error.strerror}",
                    hint="have a user delete who may write in every workspace of the store",
                ) from error
        yield


def _out_of_sight(path: Path, hidden: Path) -> Path:
    """Where the folder or file is now; beside its place, where the store is on another disk."""
    try:
        return path.rename(hidden)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return path.rename(path.with_name(f".{path.name}.gone"))


def _object_named(objects: Mapping[str, Path], name: str, needed: set[str]) -> str:
    """The artifact whose hash begins so, if it may go."""
    outputs = [output for output in objects if output.startswith(name)]
    if len(name) < NAME_DIGITS_MIN:
        hint = f"give {NAME_DIGITS_MIN} digits of its hash or more, as `runner gc` shows them"
        raise RecipeError(f"{name!r} is too short to name an artifact", hint=hint)
    if len(outputs) != 1:
        hint = "give more of its hash" if outputs else "`runner gc` shows what there is"
        raise RecipeError(f"{name!r} names {len(outputs)} artifacts of the store", hint=hint)
    if outputs[0] in needed:
        raise RunnerError(
            f"{name} is named by a lockfile of a branch, tag or workspace, so it stays",
            hint="delete that branch or tag, or the line in the lockfile, first",
        )
    if _is_young(usage.measured(objects[outputs[0]])[1]):
        raise RunnerError(
            f"{name} was made or used in the last two weeks, so it stays",
            hint=f"name it again later, or remove the folder yourself: {objects[outputs[0]]}",
        )
    return outputs[0]


def _comes_back(
    made: Made,
    known: Mapping[str, Sequence[Made]],
    there: Set[str],
    below: frozenset[str] = frozenset(),
) -> bool:
    """Whether the same is made again when it is gone: data is, what training gave is not.

    An export of a trained model is as long as that model is there, and no longer. `below` is what
    is made from it, and so does not help.
    """
    if not made.rebuilds or made.output in below:
        return False
    below |= {made.output}
    return all(
        output in there
        or any(_comes_back(one, known, there, below) for one in known.get(output, []))
        for output in made.parts.get("inputs", {}).values()
    )


def _needed(projects: Iterable[Workspace]) -> set[str]:
    """All outputs that the links and lockfiles of the workspaces name, in any branch or tag."""
    needed: set[str] = set()
    repositories: set[Path] = set()
    for project in projects:
        for outputs in usage.links(project).values():
            needed.update(outputs.values())
        applied = _applied_recipes(project)
        for path in (*_lockfiles(project), *map(lock.path_of, applied)):
            with suppress(FileNotFoundError):
                needed |= lock.hashes(path.read_bytes())
        for folder in (project.root, *(recipe.parent for recipe in applied)):
            repositories |= _repository(folder)
    for repository in sorted(repositories):
        needed |= _named_in(repository)
    return needed


def _lockfiles(space: Workspace) -> Iterator[Path]:
    """Those in the working tree."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise PreconditionError(
                f"{error.filename} cannot be looked into, and may hold a lockfile:"
                f" {error.strerror}",
                hint="make it readable, so that nothing is deleted that is needed",
            ) from error

    for folder, folders, names in os.walk(space.root, onerror=refuse):
        inside = Path(folder)
        folders[:] = [
            name
            for name in folders
            if name != ".git" and inside / name not in (space.artifacts, space.store)
        ]
        locks = (inside / name for name in names if name.endswith(".lock"))
        yield from (path for path in locks if path.is_file())


def _applied_recipes(space: Workspace) -> list[Path]:
    """The recipes whose results there are; they may lie outside of the workspace."""
    markers = space.artifacts.glob("*/.recipe")
    return [space.root / os.fsdecode(marker.read_bytes()) for marker in markers]


def _repository(folder: Path) -> set[Path]:
    """The folder with the git repository that this one belongs to, if it does."""
    folder = folder.resolve()
    above = [one for one in (folder, *folder.parents) if (one / ".git").exists()]
    return set(above[:1])


def _named_in(repository: Path) -> set[str]:
    """All hashes in lockfiles that git keeps: in branches, tags, stashes, HEAD and the index."""
    listed = [line.split() for line in _git(repository, "for-each-ref", REFS).splitlines()]
    revisions = {objectname for objectname, _ in listed}
    if any(name == "refs/stash" for _, name in listed):
        # A stash has its index as the second parent, and files unknown to git as the third.
        revisions |= set(_git(repository, "rev-list", "-g", "--parents", "refs/stash").split())
    head = _git(repository, "rev-parse", "-q", "--verify", "HEAD", none_is_1=True)
    revisions |= set(head.split())
    blobs = {entry.split()[1] for entry in _locks(_git(repository, "ls-files", "-s", "-z"))}
    for kind, name in _checked(repository, [f"{revision}^{{}}" for revision in revisions]):
        if kind != "blob":
            tree = _git(repository, "ls-tree", "-r", "-z", "--full-tree", name)
            blobs |= {entry.split()[2] for entry in _locks(tree)}
    files = [name for _, name in _checked(repository, blobs)]
    text = _git(repository, "cat-file", "--batch", lines=files)
    return lock.hashes(text.encode(errors="surrogateescape"))


def _locks(listing: str) -> Iterator[str]:
    """What git says of each lockfile in a NUL-separated listing, before its name."""
    for entry in listing.split("\0"):
        about, _, name = entry.partition("\t")
        if name.endswith(".lock") and not about.startswith(SUBMODULE):
            yield about


def _checked(repository: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Kind and name of each of git's objects; raises PreconditionError where one is missing."""
    kinds = "--batch-check=%(objecttype) %(objectname)"
    for answer in _git(repository, "cat-file", kinds, lines=names).splitlines():
        kind, _, name = answer.partition(" ")
        if name == "missing":
            raise _unknown(repository, f"{kind} is missing")
        yield kind, name


def _git(
    repository: Path, *arguments: str, lines: Iterable[str] = (), none_is_1: bool = False
) -> str:
    """What git answers; raises PreconditionError where it cannot, or only in part."""
    environment = {name: value for name, value in os.environ.items() if name not in LOCATIONS}
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments],
            env=environment | {"LC_ALL": "C", "GIT_DISCOVERY_ACROSS_FILESYSTEM": "1"},
            input="".join(f"{line}\n" for line in lines).encode(),
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        raise _unknown(repository, "git is not installed") from None
    said = done.stderr.decode(errors="replace")
    if done.returncode not in ((0, 1) if none_is_1 else (0,)) or "broken ref" in said:
        raise _unknown(repository, said)
    return done.stdout.decode(errors="surrogateescape")


def _unknown(repository: Path, said: str) -> PreconditionError:
    lines = said.strip().splitlines() or ["it says nothing"]
    return PreconditionError(
        f"git cannot say what the branches of {repository} need, so nothing is called unneeded:"
        f" {lines[0]}",
        hint="mend that, and run the same command again",
    )


def _left(space: Workspace) -> Iterator[Found]:
    """Of trainings that were never finished, and of caches for what is not there any more."""
    unfinished = [path for path in sorted(space.scratch.glob("*")) if path.is_dir()]
    indexes = [path for kind in INDEXED for path in sorted((space.cache / kind).glob("*"))]
    models = [path for path in sorted(space.cache.glob("*")) if path.name not in INDEXED]
    cached = [*models, *indexes]
    kinds = (("unfinished training", unfinished), ("cache", cached))
    for kind, paths in kinds:
        for path in paths:
            size, newest = usage.measured(path)
            why: Why = "young" if _is_young(newest) else "garbage"
            yield Found(path, f"{kind} {path.name[:12]}", size, why)


def _is_young(newest: float) -> bool:
    return time.time() - newest < YOUNG_S
