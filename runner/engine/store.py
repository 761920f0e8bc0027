"""The artifacts on disk: folders named by the hash of their content, written once."""

from __future__ import annotations

from hashlib import file_digest
from pathlib import Path

from runner import disk
from runner.engine import key
from runner.engine.workspace import Workspace


def path_of(workspace: Workspace, output: str) -> Path:
    return workspace.store / output[:2] / output


def holds(workspace: Workspace, output: str) -> bool:
    return path_of(workspace, output).is_dir()


def content_hash(folder: Path) -> str:
    """The hash of all files in the folder with their names; order and times do not matter."""
    hashes: list[tuple[str, str]] = []
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                sha256 = file_digest(file, "sha256").hexdigest()
            hashes.append((path.relative_to(folder).as_posix(), sha256))
    return key.of_files(hashes)


def stage(workspace: Workspace, name: str) -> Path:
    """A new empty folder to write an output in."""
    folder = workspace.staging / name
    disk.remove(folder)
    folder.mkdir(parents=True)
    return folder


def publish(workspace: Workspace, staged: Path) -> str:
    """Makes a finished output part of the store; its hash."""
    output = content_hash(staged)
    final = path_of(workspace, output)
    if final.is_dir() and content_hash(final) != output:
        disk.remove(final)  # damaged; the same content is at hand
    disk.publish(staged, final)
    return output
