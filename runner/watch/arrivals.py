"""What the system tells about folders. It only marks that something happened: a scan decides.

Where it cannot tell (network file systems, no inotify watches left) nothing is marked, and the
folders are scanned more often instead.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from runner.engine import workspace

if TYPE_CHECKING:
    from watchdog.observers.api import BaseObserver

NETWORK = ("nfs", "cifs", "smb", "9p", "fuse.", "vboxsf", "afs", "ceph", "glusterfs", "virtiofs")
"""Beginnings of the names of file systems whose changes from elsewhere the system does not see."""

MOUNTS = Path("/proc/self/mounts")
PATIENCE_S = 1.0
"""How long it may take until a new folder is listened to."""


class Marks:
    """When something was first and last told of since they were taken; for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._first: float | None = None
        self._last = 0.0
        self._lost = False

    def add(self) -> None:
        now = time.monotonic()
        with self._lock:
            self._first = now if self._first is None else self._first
            self._last = now

    def lose(self) -> None:
        """Nothing more can be told."""
        self._lost = True

    def taken(self) -> tuple[float, float] | None:
        """First and last mark, which are forgotten."""
        with self._lock:
            found = None if self._first is None else (self._first, self._last)
            self._first = None
            return found

    @property
    def is_lost(self) -> bool:
        return self._lost


class Arrivals:
    """The folders of one recipe, watched; `why_polling` says why they are not, where they are not.

    `wanted_names` are names, in whatever folder, that count though sources are passed over there.
    """

    def __init__(self, folders: Iterable[tuple[str, bool]], artifacts: Path) -> None:
        self.marks = Marks()
        self.why_polling = ""
        self._observer: BaseObserver | None = None
        self._mounts: select.poll | None = None
        self._mounts_file: TextIO | None = None
        if sys.platform == "linux":
            self._mounts_file = MOUNTS.open()
            self._mounts_file.read(1)
            self._mounts = select.poll()
            self._mounts.register(self._mounts_file, select.POLLPRI)
        wanted = dict(sorted(folders))
        remote = next((name for folder in wanted if (name := network(folder))), None)
        if remote:
            self.why_polling = f"{remote} does not tell of changes"
            return
        from watchdog.observers import Observer

        observer: BaseObserver = Observer()
        handler = _handler(self.marks, str(artifacts.resolve()) + os.sep)
        try:
            for folder, recursive in wanted.items():
                observer.schedule(handler, folder, recursive=recursive, event_filter=_kinds())
            observer.start()
        except OSError as error:
            self.why_polling = f"the system watches no more folders ({error.strerror or error})"
            _ended(observer)
            return
        self._observer = observer
        self._log = _Complaints(self.marks)
        logging.getLogger("watchdog").addHandler(self._log)

    def is_dead(self) -> bool:
        """Whether it has ceased to tell: a thread of it has ended, or has said so."""
        if self._observer is None:
            return False
        threads = (self._observer, *self._observer.emitters)
        return self.marks.is_lost or not all(thread.is_alive() for thread in threads)

    def lacks(self, folders: Iterable[str]) -> bool:
        """Whether one of the folders is not listened to, though it has been there for a while.

        Where the system has no watches left, watchdog passes over folders without a word.
        """
        if self._observer is None or sys.platform != "linux":
            return False
        watched = _watched_inodes()
        now = time.time()
        for folder in folders:
            try:
                status = os.stat(folder)  # noqa: PTH116 (a Path would double the time)
            except OSError:
                continue
            if status.st_ino not in watched and now - status.st_ctime > PATIENCE_S:
                return True
        return False

    def is_elsewhere(self) -> bool:
        """Whether something was mounted or unmounted, after which other folders may be meant."""
        return bool(self._mounts is not None and self._mounts.poll(0))

    def close(self) -> None:
        if self._mounts_file is not None:
            self._mounts_file.close()
            self._mounts = self._mounts_file = None
        if self._observer is not None:
            logging.getLogger("watchdog").removeHandler(self._log)
            _ended(self._observer)
            self._observer = None


def network(folder: str, mounts: Path = MOUNTS) -> str | None:
    """The kind of file system that the folder is on, where that is one of another machine."""
    if sys.platform != "linux":
        return None
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    longest, kind = "", ""
    for line in lines:
        place, name = line.split(" ")[1:3]
        place = place.replace("\\040", " ").rstrip("/")
        if (folder + "/").startswith(place + "/") and len(place) >= len(longest):
            longest, kind = place, name
    return kind if kind.startswith(NETWORK) else None


def _watched_inodes() -> set[int]:
    """What this process listens to, as the system lists it."""
    found: set[int] = set()
    for path in Path("/proc/self/fdinfo").iterdir():
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue  # closed meanwhile
        for line in lines:
            if line.startswith("inotify "):
                fields = dict(field.partition(":")[::2] for field in line.split()[1:])
                found.add(int(fields["ino"], 16))
    return found


def _kinds() -> list[type[Any]]:
    """Only what changes something: reading opens files too."""
    from watchdog import events

    return [
        events.FileCreatedEvent,
        events.FileModifiedEvent,
        events.FileMovedEvent,
        events.FileDeletedEvent,
        events.FileClosedEvent,
        events.FileAttribEvent,
        events.DirCreatedEvent,
        events.DirMovedEvent,
        events.DirDeletedEvent,
    ]


def _handler(marks: Marks, artifacts: str) -> Any:
    from watchdog.events import FileSystemEvent, FileSystemEventHandler

    class Marking(FileSystemEventHandler):
        def dispatch(self, event: FileSystemEvent) -> None:
            for path in (event.dest_path, event.src_path):
                name = os.fsdecode(path)
                if name and not name.startswith(artifacts):
                    if workspace.wanted(name.rpartition(os.sep)[2]):
                        marks.add()
                    return

    return Marking()


class _Complaints(logging.Handler):
    """What watchdog logs: that events were lost is a mark, an error that it is of no more use."""

    def __init__(self, marks: Marks) -> None:
        super().__init__(logging.WARNING)
        self._marks = marks

    def emit(self, record: logging.LogRecord) -> None:
        self._marks.add()
        if record.levelno >= logging.ERROR:
            self._marks.lose()


def _ended(observer: BaseObserver) -> None:
    observer.stop()
    if observer.is_alive():
        observer.join(5)
