"""A recipe with all that is needed to plan it: its workspace, what is remembered, what is known."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from runner import disk
from runner.engine import key, lock, plan, recipe, workspace
from runner.engine.elsewhere import Elsewhere
from runner.engine.recipe import Compiled
from runner.engine.state import State
from runner.engine.workspace import Workspace
from runner.errors import PreconditionError, RecipeError
from runner.model import source


class Opened(NamedTuple):
    """A recipe, checked, in its workspace."""

    path: Path
    compiled: Compiled
    workspace: Workspace
    state: State
    elsewhere: Elsewhere
    aside: bool = False
    """Outputs are made and known, and lockfile and links stay as they are."""

    @property
    def lock_path(self) -> Path:
        return lock.path_of(self.path)

    @property
    def links(self) -> Path:
        """The folder in which people find the current output of each stage."""
        return self.workspace.links(self.compiled.name)

    def world(self, choice: plan.Choice = plan.EVERYTHING) -> plan.World:
        """The facts and files as they are now."""
        locked = lock.read(self.lock_path)
        wants_base = any(step.uses_base_model for step in self.compiled.steps)
        spec = self.compiled.base_model if wants_base else None
        base, problem = None, None
        try:
            base = plan.base_identity(
                spec, self.workspace.root, locked, self.state, trust_stat=not choice.paranoid
            )
        except PreconditionError as error:
            problem = error
        chosen = choice.stages(self.compiled) if choice != plan.EVERYTHING else None
        force = plan.names(self.compiled, choice.force)
        return plan.World(
            self.workspace,
            self.state,
            locked,
            self.elsewhere,
            base,
            base_problem=problem,
            choice=choice._replace(force=tuple(sorted(force))),
            chosen=chosen,
            steps=self.compiled.steps,
            retrain=self.compiled.retrain,
        )

    def plan(self, choice: plan.Choice = plan.EVERYTHING) -> tuple[plan.Planned, ...]:
        return plan.whole(self.compiled, self.world(choice))

    def base_path(self) -> Path:
        """The folder or .gguf file of the base model; a hub model is downloaded if need be."""
        spec = self.compiled.base_model
        assert spec is not None
        if not source.on_hub(spec, self.workspace.root):
            return source.path_of(spec, self.workspace.root)
        commit = lock.read(self.lock_path).commit_of(spec)
        if commit is None:
            raise PreconditionError(
                f"which commit base_model {spec!r} is has not been decided yet",
                hint=f"run `runner apply {self.path}` first",
            )
        return source.downloaded(spec, commit)


@contextlib.contextmanager
def at(path: Path, root: Path | None = None, overrides: Sequence[str] = ()) -> Iterator[Opened]:
    """The recipe at `path`, checked; or from the cache when these bytes were checked before."""
    data = recipe.read_bytes(path)
    space = workspace.at(root) if root else workspace.around(path)
    if not space.root.is_dir():
        raise RecipeError(f"there is no folder {space.root}", hint="correct --workspace")
    asked = {"recipe": hashlib.sha256(data).hexdigest(), "set": list(overrides)}
    cache_key = key.of({**asked, "code": _code_fingerprint()})
    if not space.state.exists():
        recipe.compile(data, str(path), overrides)  # one with mistakes leaves no folder behind
    with State(space.state) as state:
        cached = state.compiled(cache_key)
        compiled = Compiled.from_plain(cached) if cached is not None else None
        if compiled is None or not _is_current(compiled, path):
            compiled = recipe.compile(data, str(path), overrides)
            state.remember_compiled(cache_key, compiled.plain())
        current = Opened(path, compiled, space, state, Elsewhere(space.root))
        _refuse_a_second(current)
        yield current


def claim(current: Opened) -> None:
    """Writes down whose results the folder of links holds."""
    if _owner(current) != _own_name(current):
        disk.make_folder(current.links)
        disk.write_whole(current.links / ".recipe", os.fsencode(_own_name(current)))


def _is_current(compiled: Compiled, path: Path) -> bool:
    """Whether the recipe that this one extends is as it was."""
    if compiled.extends is None:
        return True
    try:
        base = recipe.read_bytes(path.parent / compiled.extends)
    except RecipeError:
        return False  # compiling says it with the line that names it
    return hashlib.sha256(base).hexdigest() == compiled.extends_sha256


def _refuse_a_second(current: Opened) -> None:
    """Two recipes of one name would take turns at one folder of results, or at one lockfile."""
    own = current.path
    for ending in (".yaml", ".yml"):
        other = own.with_suffix(ending)
        if other.name != own.name and own.suffix in (".yaml", ".yml") and other.exists():
            raise RecipeError(
                f"{own} and {other.name} would share the lockfile {current.lock_path.name}",
                hint="rename one of them",
            )
    owner = _owner(current)
    there = current.workspace.root / owner
    if owner not in ("", _own_name(current)) and there.exists() and not there.samefile(own):
        raise RecipeError(
            f"{owner} is called {current.compiled.name!r} too, and has its results in"
            f" {current.links}",
            hint="give one of the recipes another `name:`",
        )


def _owner(current: Opened) -> str:
    """The recipe whose results the folder of links holds, or nothing."""
    try:
        return os.fsdecode((current.links / ".recipe").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _own_name(current: Opened) -> str:
    return os.path.relpath(current.path.absolute(), current.workspace.root)


def _code_fingerprint() -> list[list[Any]]:
    """Changes with the runner's own code, so that a new version compiles recipes anew."""
    package = Path(__file__).parent.parent
    found = []
    for folder in (package, *(package / name for name in ("engine", "stages", "model", "chat"))):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".py"):
                    status = entry.stat()
                    found.append([entry.path, status.st_size, status.st_mtime_ns])
    return sorted(found)
