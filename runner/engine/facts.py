"""What was made from what, by whom knows it: one file a fact, in the store beside the artifacts.

A stage with this key gave this output. The lockfile holds the same for people and git; here it is
for every recipe that uses the store, with what a run measured. A fact is true for ever, so facts
are only added; several outputs of one key are a training that was run again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from runner import disk
from runner.engine import key, log, words
from runner.engine.workspace import Workspace

HASH = re.compile("[0-9a-f]{64}")
BIGGEST = 2**53
"""What a time or size is below, so that no sum or date breaks."""


class Made(NamedTuple):
    """The stage `stage` with `parts` gave `output`, which took `seconds` and so many bytes.

    `env` has the versions and the GPU it was made with; `rebuilds` says that the same bytes come
    out again, as they do for data, but not for a training.
    """

    stage: str
    output: str
    parts: key.Components
    rebuilds: bool
    seconds: float
    bytes: int
    made_at: float
    metrics: dict[str, Any]
    env: dict[str, str]

    @property
    def key(self) -> str:
        return key.of(self.parts)


_TYPES: dict[str, Any] = {
    "stage": str,
    "output": str,
    "parts": dict,
    "rebuilds": bool,
    "seconds": int | float,
    "bytes": int,
    "made_at": int | float,
    "metrics": dict,
    "env": dict,
}


def of_key(workspace: Workspace, stage_key: str) -> list[Made]:
    """All that was made with this key, newest first."""
    try:
        paths = list(_folder(workspace, stage_key).glob("*.json"))
    except OSError:
        return []
    found = (_read(path) for path in paths)
    return sorted((m for m in found if m is not None), key=lambda made: -made.made_at)


def of_output(workspace: Workspace, stage_key: str, output: str) -> Made | None:
    return _read(_folder(workspace, stage_key) / f"{output}.json")


def every(workspace: Workspace) -> Iterator[Made]:
    """All facts of the store."""
    for path in (workspace.store / "facts").glob("*/*/*.json"):
        made = _read(path)
        if made is not None:
            yield made


def write(workspace: Workspace, made: Made, *, staged: Path | None = None) -> None:
    """Adds the fact; what it says is there must be in the store already."""
    path = _folder(workspace, made.key) / f"{made.output}.json"
    disk.make_folder(path.parent)
    disk.write_whole(path, as_json(made), staged=staged)
    disk.sync_folder(path.parent.parent)


def forget(workspace: Workspace, made: Made) -> None:
    (_folder(workspace, made.key) / f"{made.output}.json").unlink(missing_ok=True)


def as_json(made: Made) -> bytes:
    return (json.dumps(made._asdict(), ensure_ascii=True) + "\n").encode()


def parsed(data: bytes) -> Made:
    """The fact in `data`; raises ValueError where it is none."""
    try:
        made = Made(**json.loads(data))
        for name, kind in _TYPES.items():
            if not isinstance(getattr(made, name), kind):
                raise TypeError(f"{name} is {words.shown(getattr(made, name))}")
        for name in ("seconds", "bytes", "made_at"):
            if not 0 <= getattr(made, name) < BIGGEST:
                raise TypeError(f"{name} is {words.shown(getattr(made, name))}")
        if not HASH.fullmatch(made.output) or not isinstance(made.parts.get("inputs", {}), dict):
            raise TypeError("an output is no hash")
        if not all(isinstance(value, int | float | str) for value in made.metrics.values()):
            raise TypeError("a metric is no number")
        if not all(isinstance(value, str) for value in made.env.values()):
            raise TypeError("a version is no text")
        _ = made.key  # of parts that are nested too deep, or endless numbers, there is none
        return made
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"this is no fact: {error}") from error


def _folder(workspace: Workspace, stage_key: str) -> Path:
    return workspace.store / "facts" / stage_key[:2] / stage_key


def _read(path: Path) -> Made | None:
    """The fact in a file; a damaged one counts as none, which costs time and nothing else."""
    try:
        made = parsed(path.read_bytes())
        if (made.key, made.output) != (path.parent.name, path.stem):
            raise ValueError("it does not say what its name does")
        return made
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning(f"{path} is passed over: {error}")
        return None
