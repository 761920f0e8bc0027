"""Where things are: the workspace around a recipe, its `artifacts/`, and the store, which
`RUNNER_STORE` may put in another place that several workspaces share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from runner.errors import PreconditionError

SETTINGS = "runner.yaml"
"""The settings of a workspace that are not a recipe's: where the remote cache is."""
MARKERS = (".git", "pyproject.toml", SETTINGS, "artifacts")
PASSED_OVER_ENDINGS = ("~", ".part", ".tmp", ".crdownload", ".lock")


class Workspace(NamedTuple):
    """The folder that paths in recipes are relative to; all that the runner writes is in it."""

    root: Path
    shared_store: Path | None = None

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def store(self) -> Path:
        return self.shared_store or self.artifacts / "store"

    @property
    def state(self) -> Path:
        return self.artifacts / "state.db"

    @property
    def runs(self) -> Path:
        return self.artifacts / "runs"

    @property
    def scratch(self) -> Path:
        """Checkpoints of trainings that have not ended, by key, so that they can go on."""
        return self.artifacts / "scratch"

    @property
    def cache(self) -> Path:
        """What can be made again from files elsewhere, like a GGUF base model as safetensors."""
        return self.artifacts / "cache"

    def links(self, recipe: str) -> Path:
        """The folder in which people find the current output of each stage."""
        return self.artifacts / recipe


def at(root: Path) -> Workspace:
    """The workspace of a folder, with the store that `RUNNER_STORE` names, if it does."""
    root = Path(os.path.abspath(root))  # noqa: PTH100 (`a/../b` is `b`; links stay as they are)
    shared = os.environ.get("RUNNER_STORE")
    if not shared:
        return Workspace(root)
    try:
        store = Path(os.path.abspath(Path(shared).expanduser()))  # noqa: PTH100
    except RuntimeError:
        raise PreconditionError(
            f"RUNNER_STORE is {shared!r}, and there is no such home", hint="write where that is"
        ) from None
    if store.is_relative_to(root) and not store.is_relative_to(root / "artifacts"):
        raise PreconditionError(
            f"RUNNER_STORE is {store}, which is in the workspace {root}, among its sources",
            hint="put it outside, or unset RUNNER_STORE: then it is in artifacts/",
        )
    return Workspace(root, store)


def around(recipe: Path) -> Workspace:
    """The nearest folder at or above the recipe's that holds a marker; else the one that holds the
    folder `recipes/`, else the recipe's own."""
    folder = Path(os.path.abspath(recipe)).parent  # noqa: PTH100
    for candidate in (folder, *folder.parents):
        if any((candidate / marker).exists() for marker in MARKERS):
            return at(candidate)
    above = (one.parent for one in (folder, *folder.parents) if one.name == "recipes")
    return at(next(above, folder))


class LinksOut(PreconditionError):
    """Links among the sources that lead out of the workspace."""

    def __init__(self, message: str, *, hint: str, paths: tuple[str, ...]) -> None:
        super().__init__(message, hint=hint)
        self.paths = paths


def matching(root: Path, pattern: str, without: frozenset[str] = frozenset()) -> list[str]:
    """The files that one source names: a file, all files below a folder, or a glob.

    Dot files, lockfiles and what another program is still writing (`.part`, `.tmp`, …) do not
    count, nor does `artifacts/`. Only an absolute path may lead out of the workspace. Paths are
    plain texts, because ten thousand `Path` objects take longer than looking at the files. The
    files `without` are passed over, wherever they lead.
    """
    path = root / pattern
    if not Path(pattern).is_absolute() and ".." in Path(pattern).parts:
        raise PreconditionError(
            f"source {pattern!r} leads out of the workspace {root}",
            hint="write an absolute path if that is meant",
        )
    links: list[str] = []
    if path.is_dir():
        found = list(_below(str(path), str(root / "artifacts"), links))
    elif path.is_file():
        found = [str(path)]
    elif any(char in pattern for char in "*?["):
        # of the pattern alone: the folder of the workspace may be called `chats [old]`
        start = len(path.parts) - len(Path(pattern).parts) + len(before_glob(pattern))
        found = [
            str(file)
            for file in _globbed(root, pattern)
            if wanted(file.name)
            and not any(part.startswith(".") for part in file.parts[start:])
            and not file.is_relative_to(root / "artifacts")
            and file.is_file()
        ]
    else:
        raise PreconditionError(
            f"source {pattern!r} is not there (looked for {path})",
            hint="paths in a recipe are relative to the workspace; correct it or put it there",
        )
    if without:
        found, links = ([one for one in ones if one not in without] for ones in (found, links))
    if not Path(pattern).is_absolute():
        _refuse_links_out(root, [str(path), *links] if path.is_dir() else found)
    return found


def before_glob(pattern: str) -> tuple[str, ...]:
    """The parts of a source before the first one with a wildcard."""
    return tuple(takewhile(lambda part: not any(c in part for c in "*?["), Path(pattern).parts))


def _below(folder: str, without: str, links: list[str]) -> Iterator[str]:
    """All regular files below the folder, the links among them also in `links`.

    A folder that may not be entered is an error; a link to a folder is not followed.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith(".") and not _is_same(entry, without):
                    yield from _below(entry.path, without, links)
            elif wanted(entry.name) and _is_file(entry):
                if entry.is_symlink():
                    links.append(entry.path)
                yield entry.path


def _is_same(entry: os.DirEntry[str], folder: str) -> bool:
    """By whatever path the entry was come to."""
    if entry.name != os.path.basename(folder):  # noqa: PTH119
        return False
    return os.path.realpath(entry.path) == os.path.realpath(folder)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False  # a link that leads to itself


def _globbed(root: Path, pattern: str) -> list[Path]:
    start = Path(Path(pattern).anchor) if Path(pattern).is_absolute() else root
    relative = str(Path(pattern).relative_to(start)) if start != root else pattern
    try:
        return list(start.glob(f"{relative}/*" if relative.endswith("**") else relative))
    except ValueError as error:
        raise PreconditionError(
            f"source {pattern!r} is no glob: {error}", hint="** stands alone between slashes"
        ) from error


def _refuse_links_out(root: Path, found: list[str]) -> None:
    inside = root.resolve()
    folders: dict[Path, bool] = {}
    out: list[Path] = []
    for path in map(Path, found):
        if path.parent not in folders:
            folders[path.parent] = path.parent.resolve().is_relative_to(inside)
        if (path.is_symlink() and not path.resolve().is_relative_to(inside)) or not (
            path == root or folders[path.parent]
        ):
            out.append(path)
    if out:
        raise LinksOut(
            f"{out[0]} is a link that leads out of the workspace, to {out[0].resolve()}",
            hint="name the file it leads to by an absolute path in `sources:`",
            paths=tuple(map(str, out)),
        )


def wanted(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(PASSED_OVER_ENDINGS)


def named(root: Path, path: str) -> str:
    """How records call a file: relative to the workspace with forward slashes, if it is inside."""
    name = path.removeprefix(f"{root}{os.sep}").replace(os.sep, "/")
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")
