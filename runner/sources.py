"""A file that a stage reads from outside the store."""

from __future__ import annotations

from typing import NamedTuple


class SourceFile(NamedTuple):
    """A file as it was when the run was planned: where it is, its name in records, its SHA-256."""

    path: str
    name: str
    sha256: str
