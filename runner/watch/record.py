"""What a watch writes down: its state for `runner status`, its log, and the lock that it holds.

artifacts/watch/<recipe>.json      the state, written whole
artifacts/watch/<recipe>.log       what happened; ten files of 1 MB at most
artifacts/watch/<recipe>.accept    that `--accept-deletions` was said beside a running watch
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner import disk
from runner.engine.workspace import Workspace
from runner.errors import BusyError

LOG_BYTES = 1_000_000
LOGS = 9

Record = dict[str, Any]


def of_file(space: Workspace, recipe: Path) -> Folder | None:
    """What the watch of a recipe file wrote down, whatever the recipe is called in it."""
    for path in sorted((space.artifacts / "watch").glob("*.json")):
        found = Folder(space, path.name.removesuffix(".json"))
        if found.read().get("path") == str(recipe.absolute()):
            return found
    return None


class Folder:
    """The files of one watched recipe."""

    def __init__(self, space: Workspace, recipe: str) -> None:
        self.path = space.artifacts / "watch"
        self._recipe = recipe
        self._written: Record = {}

    def file(self, ending: str) -> Path:
        return self.path / f"{self._recipe}{ending}"

    def read(self) -> Record:
        """The last state; nothing where there is none."""
        try:
            found = json.loads(self.file(".json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, record: Record) -> None:
        """Replaces the state, where it says something else; a full disk does not end a watch."""
        if record != self._written:
            with contextlib.suppress(OSError):
                text = json.dumps({**record, "written": round(time.time(), 3)}, indent=1)
                disk.write_whole(self.file(".json"), text.encode())
                self._written = record

    def accept(self) -> None:
        """Tells the running watch that what is gone is meant to be gone."""
        disk.write_whole(self.file(".accept"), b"")

    def is_accepted(self) -> bool:
        """Whether that was said; it is said once."""
        try:
            self.file(".accept").unlink()
        except FileNotFoundError:
            return False
        return True

    def is_watched(self) -> bool:
        """Whether a watch holds the lock now."""
        from filelock import FileLock, Timeout

        if not self.file(".lock").exists():
            return False
        try:
            with FileLock(self.file(".lock"), timeout=0):
                return False
        except (Timeout, OSError):
            return True

    @contextlib.contextmanager
    def held(self, recipe: Path) -> Iterator[None]:
        """Holds the lock, which the system frees when the process dies.

        `recipe` is the file, for whom is refused because another watch holds it.
        """
        from filelock import FileLock, Timeout

        disk.make_folder(self.path)
        lock = FileLock(self.file(".lock"))
        try:
            lock.acquire(timeout=1)  # `runner status` holds it for a moment when it looks
        except Timeout:
            pid = self.read().get("pid")
            by = f" by process {pid}" if pid else ""
            raise BusyError(
                f"{self._recipe} is being watched already{by}",
                hint=f"`runner status {recipe}` says what it does; stop it, or leave it to it",
            ) from None
        try:
            yield
        finally:
            lock.release()

    def log(self) -> logging.Logger:
        """The log file, as a logger that nobody else knows."""
        found = logging.Logger(f"watch {self._recipe}")
        handler = logging.handlers.RotatingFileHandler(
            self.file(".log"),
            maxBytes=LOG_BYTES,
            backupCount=LOGS,
            encoding="utf-8",
            errors="backslashreplace",
            delay=True,
        )
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        handler.handleError = lambda record: None  # type: ignore[method-assign]
        found.addHandler(handler)
        return found
