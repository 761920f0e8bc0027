"""The artifacts on disk: folders named by the hash of their content, written once.

    <store>/<2>/<hash>/   an artifact
    <store>/facts/        what was made from what (`facts`)
    <store>/tmp/          outputs that are being written, one folder a run, held by a lock
    <store>/projects/     the workspaces that use this store, so that none loses what it needs

Several processes, workspaces and users may share one store: nothing in it is ever changed, and
everything appears whole.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import file_digest
from pathlib import Path

from runner import disk
from runner.engine import key, log
from runner.engine.workspace import Workspace
from runner.errors import PreconditionError, RecipeError

HASH = re.compile("[0-9a-f]{64}")
STAGED = re.compile(r"[0-9]+-[0-9]{10,}")
"""A folder of `staging`: nothing else in the store's `tmp` is ours to remove."""
USED_AFTER_S = 24 * 3600
"""How old the mark of an artifact's last use may be before it is renewed."""


def path_of(workspace: Workspace, output: str) -> Path:
    return workspace.store / output[:2] / output


def holds(workspace: Workspace, output: str) -> bool:
    return path_of(workspace, output).is_dir()


def is_whole(workspace: Workspace, output: str) -> bool:
    """Whether the artifact is there and its files are what its name says."""
    path = path_of(workspace, output)
    return path.is_dir() and content_hash(path) == output


def content_hash(folder: Path) -> str:
    """The hash of all files in the folder with their names; order and times do not matter."""
    hashes: list[tuple[str, str]] = []
    for path in disk.files(folder):
        with path.open("rb") as file:
            sha256 = file_digest(file, "sha256").hexdigest()
        hashes.append((path.relative_to(folder).as_posix(), sha256))
    return key.of_files(hashes)


@contextmanager
def staging(workspace: Workspace) -> Iterator[Path]:
    """A folder to write outputs in, on the store's file system; what is left in it goes again.

    The folders of processes that have died are removed on the way: their locks are free.
    """
    from filelock import FileLock

    parent = workspace.store / "tmp"
    disk.make_folder(parent)
    folder = parent / f"{os.getpid()}-{time.time_ns()}"
    own = FileLock(folder.with_suffix(".lock"))
    # Held so that nobody takes a folder for left that is just begun.
    with FileLock(workspace.store / "lock"):
        _remove_left(parent)
        own.acquire()
        folder.mkdir()
    try:
        yield folder
    finally:
        disk.remove(folder)
        own.release()
        folder.with_suffix(".lock").unlink(missing_ok=True)


def has_left(workspace: Workspace) -> bool:
    """Whether somebody writes an output now, or died before it could clear up."""
    try:
        return any(True for _ in os.scandir(workspace.store / "tmp"))
    except OSError:
        return False


def _remove_left(parent: Path) -> None:
    """Removes what dead processes left; what is another user's to remove stays."""
    from filelock import FileLock, Timeout

    for path in sorted(parent.glob("*.lock")):
        if not STAGED.fullmatch(path.stem):
            continue
        with suppress(Timeout, OSError), FileLock(path, timeout=0):
            disk.remove(path.with_suffix(""))
            path.unlink()
    for folder in parent.iterdir():
        if STAGED.fullmatch(folder.name) and not folder.with_suffix(".lock").exists():
            with suppress(OSError):
                disk.remove(folder)


def publish(workspace: Workspace, staged: Path) -> str:
    """Makes a finished output part of the store; its hash."""
    output = content_hash(staged)
    final = path_of(workspace, output)
    if final.is_dir() and content_hash(final) != output:
        # Damaged, and the same content is at hand. It goes at one blow, because others may read.
        damaged = staged.with_name(f"{staged.name}.damaged")
        final.rename(damaged)
        disk.remove(damaged)
    disk.publish(staged, final)
    return output


def use(workspace: Workspace, output: str) -> None:
    """Marks the artifact as used now, so that it does not count as old (see `gc`)."""
    path = path_of(workspace, output)
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > USED_AFTER_S:
            os.utime(path)


def objects(workspace: Workspace) -> Iterator[Path]:
    """All artifacts in the store."""
    for folder in sorted(workspace.store.glob("[0-9a-f][0-9a-f]")):
        yield from sorted(path for path in folder.iterdir() if HASH.fullmatch(path.name))


def register(workspace: Workspace) -> None:
    """Has a shared store know this workspace, so that what it needs is kept."""
    if workspace.shared_store is None:
        return
    own = _project_file(workspace, workspace.root)
    try:
        if not own.exists():
            disk.make_folder(own.parent)
            disk.write_whole(own, os.fsencode(workspace.root))
    except OSError as error:
        # Reading needs no right to write.
        log.warning(
            f"the store {workspace.store} cannot note that {workspace.root} uses it"
            f" ({error.strerror}): `runner gc` of others may delete what only this workspace needs"
        )


def forget(workspace: Workspace, root: Path) -> None:
    """Has the store forget a workspace that is gone for good."""
    root = Path(os.path.abspath(root))  # noqa: PTH100 (as in `workspace.at`)
    own = _project_file(workspace, root)
    if not own.exists():
        raise RecipeError(
            f"no workspace {root} uses the store {workspace.store}",
            hint=f"the files in {own.parent} name those that do",
        )
    if (root / "artifacts").is_dir():
        raise RecipeError(f"{root} is still there", hint="--forget is for a workspace that is gone")
    own.unlink()


def projects(workspace: Workspace) -> Iterator[Workspace]:
    """The workspaces that use the store; raises PreconditionError for one that is not there."""
    for path in sorted((workspace.store / "projects").glob("[!.]*")):
        other = Workspace(Path(os.fsdecode(path.read_bytes())), workspace.shared_store)
        if not other.artifacts.is_dir():  # a place where nothing is mounted is a folder too
            raise PreconditionError(
                f"the workspace {other.root} uses this store too, and is not there to be asked",
                hint=f"mount it, or if it is gone for good: runner gc --forget {other.root}",
            )
        yield other


def _project_file(workspace: Workspace, root: Path) -> Path:
    return workspace.store / "projects" / key.of_files([(str(root), "")])[:32]
