"""What takes the space under `artifacts/` and in the store, by kind and by recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runner import disk
from runner.engine import store
from runner.engine.workspace import Workspace


@dataclass(frozen=True)
class Usage:
    """Bytes by kind; and by recipe and stage, of what its links lead to."""

    kinds: Mapping[str, int]
    recipes: Mapping[str, Mapping[str, int]]


def of(space: Workspace) -> Usage:
    sizes = {path.name: disk.size(path) for path in store.objects(space)}
    recipes: dict[str, dict[str, int]] = {}
    current: set[str] = set()
    for folder in sorted(path for path in space.artifacts.glob("*") if path.is_dir()):
        if folder.name in ("store", "runs", "scratch", "cache"):
            continue
        outputs = {link.name: link.resolve().name for link in sorted(folder.glob("*"))}
        recipes[folder.name] = {
            stage: sizes[output] for stage, output in outputs.items() if output in sizes
        }
        current |= {output for output in outputs.values() if output in sizes}
    kinds = {
        "current results": sum(sizes[output] for output in current),
        "earlier results": sum(size for output, size in sizes.items() if output not in current),
        "facts": disk.size(space.store / "facts"),
        "checkpoints": disk.size(space.scratch),
        "cache": disk.size(space.cache),
        "logs of runs": disk.size(space.runs),
    }
    return Usage(kinds, recipes)


def outputs_of_links(space: Workspace) -> set[Path]:
    """The artifacts that links of recipes lead to."""
    return {link.resolve() for link in space.artifacts.glob("*/*") if link.is_symlink()}
