"""What the workspace remembers to be fast: file hashes, manifests, checked recipes.

Deleting it costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runner import disk
from runner.errors import PreconditionError, RunnerError

RACY_NS = 2_000_000_000
"""A file that changed so shortly before it was hashed may change again within one clock tick."""

HASH_TRIES = 3

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY, size INT, mtime INT, ctime INT, inode INT, sha256 TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scans (
    patterns TEXT PRIMARY KEY, digest BLOB, manifest TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS manifests (hash TEXT PRIMARY KEY, files TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS recipes (hash TEXT PRIMARY KEY, compiled TEXT) WITHOUT ROWID;
"""


class State:
    """An open state database; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            disk.make_folder(path.parent)
            self._db = _opened(path)
        except (OSError, sqlite3.OperationalError):
            # No right to write here: who only looks needs no memory.
            self._db = _opened(Path(":memory:"))
        except sqlite3.DatabaseError:
            self._put_aside()
            self._db = _opened(path)

    def __enter__(self) -> State:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._db.close()
        damaged = isinstance(error, sqlite3.DatabaseError) and "full" not in str(error)
        if damaged and "locked" not in str(error) and "readonly" not in str(error):
            self._put_aside()
            raise RunnerError(
                f"{self._path} was damaged ({error}) and has been put aside",
                hint="run the same command again: it held nothing that cannot be found out anew",
            ) from None

    def _put_aside(self) -> None:
        self._path.replace(self._path.with_suffix(".damaged"))

    def hashes(self, paths: Iterable[str], *, trust_stat: bool = True) -> dict[str, str]:
        """The SHA-256 of each file; one that has not changed since it was hashed is not opened."""
        # One statement is one transaction: nobody holds the database while a stage is at work.
        rows = self._ask("SELECT path, size, mtime, ctime, inode, sha256 FROM files")
        known = {row[0]: row[1:] for row in rows}
        found: dict[str, str] = {}
        fresh: list[tuple[Any, ...]] = []
        for path in paths:
            now = _signature(os.stat(path))  # noqa: PTH116 (a Path would double the time)
            before = known.get(_spelled(path))
            if trust_stat and before is not None and before[:4] == now:
                found[path] = before[4]
                continue
            found[path], now = _hashed(path)
            if time.time_ns() - max(now[1], now[2]) > RACY_NS:
                fresh.append((_spelled(path), *now, found[path]))
        if fresh:
            with self._quietly():
                self._db.execute("BEGIN")
                self._db.executemany(
                    "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", fresh
                )
                self._db.execute("COMMIT")
        return found

    def scanned(self, patterns: str) -> tuple[bytes, str] | None:
        """The digest of what `looked_at` last saw there, and the hash of those files' manifest."""
        query = "SELECT digest, manifest FROM scans WHERE patterns = ?"
        rows = self._ask(query, patterns)
        return (rows[0][0], rows[0][1]) if rows else None

    def remember_scan(self, patterns: str, digest: bytes, manifest: str) -> None:
        with self._quietly():
            row = (patterns, digest, manifest)
            self._db.execute("INSERT OR REPLACE INTO scans VALUES (?, ?, ?)", row)

    def manifest(self, hash: str) -> dict[str, str] | None:
        """The files of a manifest seen before: name → SHA-256."""
        rows = self._ask("SELECT files FROM manifests WHERE hash = ?", hash)
        return json.loads(rows[0][0]) if rows else None

    def remember_manifest(self, hash: str, files: dict[str, str]) -> None:
        if not self._ask("SELECT 1 FROM manifests WHERE hash = ?", hash):
            with self._quietly():
                row = (hash, json.dumps(files))
                self._db.execute("INSERT OR IGNORE INTO manifests VALUES (?, ?)", row)

    def compiled(self, hash: str) -> dict[str, Any] | None:
        rows = self._ask("SELECT compiled FROM recipes WHERE hash = ?", hash)
        return json.loads(rows[0][0]) if rows else None

    def remember_compiled(self, hash: str, compiled: dict[str, Any]) -> None:
        with self._quietly():
            row = (hash, json.dumps(compiled))
            self._db.execute("INSERT OR REPLACE INTO recipes VALUES (?, ?)", row)

    def _ask(self, query: str, *values: str) -> list[Any]:
        """The rows; where the database cannot be used, it is gone on without."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.OperationalError:  # no room or no right for its journal
            self._db.close()
            self._db = _opened(Path(":memory:"))
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """What is only remembered to be fast may be forgotten: a read-only or busy database."""
        try:
            yield
        except sqlite3.OperationalError:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")


def _opened(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        db.executescript(SCHEMA)
    except sqlite3.Error:
        db.close()
        raise
    return db


def looked_at(paths: Iterable[str]) -> bytes | None:
    """One digest of what tells whether any of the files changed, which opens none of them.

    None where one of them changed so shortly ago that it may change again unseen.
    """
    digest = hashlib.sha256()
    young = time.time_ns() - RACY_NS
    for path in sorted(paths):
        status = os.stat(path)  # noqa: PTH116 (a Path would double the time)
        if status.st_mtime_ns > young or status.st_ctime_ns > young:
            return None
        digest.update(
            b"%s\0%d %d %d %d\n"
            % (
                os.fsencode(path),
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                status.st_ino,
            )
        )
    return digest.digest()


def _signature(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _hashed(path: str) -> tuple[str, tuple[int, int, int, int]]:
    """The hash of a file that did not change meanwhile, with its signature."""
    for _ in range(HASH_TRIES):
        with open(path, "rb", opener=disk.at_once) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise OSError(f"{path} is not a regular file")
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
        if _signature(before) == _signature(after):
            return sha256, _signature(after)
    raise PreconditionError(
        f"{path} keeps changing while it is read", hint="run again when nothing writes to it"
    )


def _spelled(path: str) -> str:
    """The path as text that a database takes, whatever bytes are in it."""
    if path.isascii():
        return path
    return os.fsencode(path).decode("utf-8", "backslashreplace")
