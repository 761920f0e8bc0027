"""All the file operations that a promise hangs on: written beside, synced, renamed, and the order.

Nothing else in the engine calls fsync, rename or unlink, so that tests can make each of them fail.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Replaces the file; a reader, or a crash, sees the old bytes or the new ones."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish(staged: Path, final: Path) -> None:
    """Moves a finished folder to its place; when one is there already, it is the same: keep it."""
    for folder, _, names in os.walk(staged, topdown=False):
        for name in names:
            sync_file(Path(folder, name))
        sync_folder(Path(folder))
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        shutil.rmtree(staged)
        return
    staged.rename(final)
    sync_folder(final.parent)
    sync_folder(final.parent.parent)


def point(link: Path, target: Path) -> None:
    """Makes `link` lead to the folder `target`, atomically where the system has symbolic links."""
    relative = os.path.relpath(target, link.parent)
    if link.is_symlink() and str(link.readlink()) == relative:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    beside = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    try:
        beside.symlink_to(relative, target_is_directory=True)
        beside.replace(link)
    except OSError:
        if sys.platform != "win32":
            raise
        _junction(link, target)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Makes renames in the folder durable; Windows has no such call and needs none."""
    if sys.platform != "win32":
        sync_file(path)


def remove(path: Path) -> None:
    """Removes a folder or a file that may not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size(folder: Path) -> int:
    """Bytes of all files below the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _junction(link: Path, target: Path) -> None:
    """Windows lets everybody make junctions, but not everybody symbolic links."""
    import _winapi  # type: ignore[import-not-found,unused-ignore]

    if link.exists():
        link.rmdir()
    _winapi.CreateJunction(str(target.absolute()), str(link))  # type: ignore[attr-defined,unused-ignore]
