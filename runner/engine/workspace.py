"""Where things are: the workspace around a recipe, and the folders under its `artifacts/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runner.errors import PreconditionError

MARKERS = (".git", "pyproject.toml", "artifacts")
TEMPORARY_ENDINGS = ("~", ".part", ".tmp", ".crdownload")


@dataclass(frozen=True)
class Workspace:
    """The folder that paths in recipes are relative to; all that the runner writes is in it."""

    root: Path

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def store(self) -> Path:
        return self.artifacts / "store"

    @property
    def staging(self) -> Path:
        """Outputs that are being written; on the same file system as the store."""
        return self.artifacts / "store" / "tmp"

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


def around(recipe: Path) -> Workspace:
    """The nearest folder at or above the recipe's that holds a marker, else the recipe's own."""
    folder = recipe.absolute().parent
    for candidate in (folder, *folder.parents):
        if any((candidate / marker).exists() for marker in MARKERS):
            return Workspace(candidate)
    return Workspace(folder)


def matching(root: Path, pattern: str) -> list[Path]:
    """The files that one source names: a file, all files below a folder, or a glob.

    Dot files and files that another program is still writing (`.part`, `.tmp`, …) do not count.
    """
    if any(char in pattern for char in "*?["):
        found = root.glob(pattern) if not Path(pattern).is_absolute() else _absolute_glob(pattern)
        return [path for path in found if path.is_file() and wanted(path.name)]
    path = root / pattern
    if path.is_dir():
        return [
            file
            for file in path.rglob("*")
            if wanted(file.name) and not _hidden(file.relative_to(path)) and file.is_file()
        ]
    if path.is_file():
        return [path]
    raise PreconditionError(
        f"source {pattern!r} is not there (looked for {path})",
        hint="paths in a recipe are relative to the workspace; correct it or put the file there",
    )


def wanted(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(TEMPORARY_ENDINGS)


def named(root: Path, path: Path) -> str:
    """How records call a file: relative to the workspace with forward slashes, if it is inside."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _absolute_glob(pattern: str) -> list[Path]:
    anchor = Path(Path(pattern).anchor)
    return list(anchor.glob(str(Path(pattern).relative_to(anchor))))
