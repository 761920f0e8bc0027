"""All the file operations that a promise hangs on: written beside, synced, renamed, and the order.

Nothing else in the runner calls fsync or renames into place, so that tests can make each of them
fail, and a full disk is one sentence wherever it is met.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.errors import PreconditionError

MARGIN_BYTES = 1_000_000
"""Left free, because file systems need some room for themselves."""

NAME_CHARS = 50
"""Of a name that a temporary one takes over: with four bytes each, it fits into 255."""

_TEMPORARY = re.compile(r"\..+\.([0-9]{1,9})\.tmp", re.DOTALL)
_NO_LINKS = {
    getattr(errno, name, None) for name in ("EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EMLINK")
}
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def write_whole(path: Path, data: bytes, *, staged: Path | None = None) -> None:
    """Replaces the file; a reader, or a crash, sees the old bytes or the new ones.

    It is written beside, or where `staged` says: on the same disk, where somebody clears up.
    """
    with being_written(path, staged=staged) as beside:
        beside.write_bytes(data)


def write_new(path: Path, data: bytes) -> bool:
    """Writes a file that is not there, whole or not at all; False where it is there already, or
    what was begun was taken away meanwhile."""
    beside = _beside(path)
    try:
        beside.write_bytes(data)
        sync_file(beside)
        _name_new(beside, path)
    except FileExistsError:
        return False
    except FileNotFoundError:  # taken for a dead process's by one that cannot see this one
        if path.parent.is_dir():
            return False
        raise
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


@contextmanager
def being_written(path: Path, *, staged: Path | None = None) -> Iterator[Path]:
    """A path to write to, beside `path`; takes that name when it is complete and on the disk."""
    beside = staged or _beside(path)
    try:
        yield beside
        sync_file(beside)
        beside.replace(path)
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Makes the folder and those above it, so durable that what is renamed into it stays."""
    made = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in made:
        sync_folder(one.parent)


def publish(staged: Path, final: Path) -> None:
    """Moves a finished folder to its place; when one is there already, it is the same: keep it."""
    for path in files(staged):
        path.chmod(0o644)  # libraries make some files readable for their owner alone
    sync_tree(staged)
    make_folder(final.parent)
    try:
        staged.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(staged)
        return
    sync_folder(final.parent)


def point(link: Path, target: Path) -> None:
    """Makes `link` lead to the folder `target`, atomically where the system has symbolic links."""
    if points(link, target):
        return
    relative = os.path.relpath(target, link.parent)
    make_folder(link.parent)
    if sys.platform != "win32" and link.exists() and not link.is_symlink():
        raise PreconditionError(
            f"{link} is in the place of the link to the results",
            hint="move it away: perhaps a copy of the workspace has made a folder of the link",
        )
    beside = _beside(link)
    beside.unlink(missing_ok=True)
    try:
        beside.symlink_to(relative, target_is_directory=True)
        beside.replace(link)
    except OSError:
        if sys.platform != "win32":
            raise
        _junction(link, target)


def sync_tree(folder: Path) -> None:
    """Makes the files of a folder durable, and then their names."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                sync_tree(Path(entry.path))
            else:
                sync_file(Path(entry.path))
    sync_folder(folder)


def sync_file(path: Path) -> None:
    """Makes the bytes of a file durable."""
    flags = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Makes renames in the folder durable; Windows has no such call and needs none."""
    if sys.platform != "win32":
        sync_file(path)


def points(link: Path, target: Path) -> bool:
    """Whether `link` leads to the folder `target`, which is there."""
    if link.is_symlink():
        return str(link.readlink()) == os.path.relpath(target, link.parent)
    return link.exists() and link.resolve() == target.resolve()  # a junction


def at_once(path: str, flags: int) -> int:
    """An opener that a pipe without a writer does not hold up, put there instead of a file."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def remove(path: Path) -> None:
    """Removes a folder or a file that may not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def files(folder: Path) -> Iterator[Path]:
    """All files below the folder, links to files among them.

    Raises OSError for a folder that cannot be read, which `rglob` and `os.walk` take for empty.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from files(Path(entry.path))
            elif entry.is_file():
                yield Path(entry.path)


def size(path: Path) -> int:
    """Bytes of all files below a folder, or of a file; 0 where there is none."""
    if not path.is_dir():
        return path.stat().st_size if path.exists() else 0
    found = 0
    for file in files(path):
        with suppress(FileNotFoundError):  # somebody has just deleted it
            found += file.stat().st_size
    return found


def check_room(folder: Path, needed: int) -> None:
    """Raises PreconditionError where `needed` bytes do not fit on the disk of the folder."""
    free = shutil.disk_usage(folder).free
    if free < needed + MARGIN_BYTES:
        raise _no_room(folder, free, needed)


def full(error: Exception, where: Path, needed: int = 0) -> PreconditionError | None:
    """What to tell the user where the error says that the disk is full; None where it does not."""
    # safetensors gives the error of the system as text: "(os error 28)"; 112 is Windows'.
    said = any(f"(os error {code})" in str(error) for code in (*_FULL, 112))
    said = said or "disk is full" in str(error)  # SQLite
    if getattr(error, "errno", None) not in _FULL and not said:
        return None
    place = existing(where)
    return _no_room(place, shutil.disk_usage(place).free, needed)


def _beside(path: Path) -> Path:
    """A hidden name in the same folder that only this process uses, never too long for a name.

    What processes that were killed have left under such names, for any file, is removed.
    """
    stem = path.name[:NAME_CHARS]
    with suppress(OSError):  # a folder that may be written to but not be listed
        for name in os.listdir(path.parent):  # noqa: PTH208
            found = _TEMPORARY.fullmatch(name)
            if found and not _is_alive(int(found[1])):
                path.with_name(name).unlink(missing_ok=True)
    return path.with_name(f".{stem}.{os.getpid()}.tmp")


def _name_new(beside: Path, path: Path) -> None:
    """Gives the file its name; unlike a rename, a link never takes the place of another file."""
    try:
        os.link(beside, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():  # a file system without links, and a name nobody else will think of
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        beside.rename(path)


def _is_alive(process: int) -> bool:
    if sys.platform == "win32":
        return True  # there is no harmless way to ask
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


def _no_room(folder: Path, free: int, needed: int) -> PreconditionError:
    wanted = f"{needed / 1e6:,.0f} MB are needed, " if needed else ""
    return PreconditionError(
        f"the disk is full: {wanted}{free / 1e6:,.0f} MB are free at {folder}",
        hint="free some space and run the same command again; what was finished is kept",
    )


def _junction(link: Path, target: Path) -> None:
    """Windows lets everybody make junctions, but not everybody symbolic links."""
    import _winapi  # type: ignore[import-not-found,unused-ignore]

    if link.exists():
        link.rmdir()
    _winapi.CreateJunction(str(target.absolute()), str(link))  # type: ignore[attr-defined,unused-ignore]
