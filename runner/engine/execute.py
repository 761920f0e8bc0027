"""Runs what the plan lists, stage by stage, and records each output before the next one starts.

The order of a commit: the output is written in the store's `tmp`, synced and renamed into place;
then the fact goes into the state database, then into the lockfile, then the link that people
follow. A run that ends anywhere leaves the previous state or the next one, and the same command
goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import disk
from runner.engine import events, key, lock, plan, recipe, store, worker, workspace
from runner.engine.recipe import Compiled, Step
from runner.engine.state import State
from runner.engine.workspace import Workspace
from runner.errors import (
    BusyError,
    InterruptedRun,
    PreconditionError,
    RecipeError,
    RunnerError,
)
from runner.model import source

logger = logging.getLogger(__name__)

CODES: dict[int, type[RunnerError]] = {
    kind.exit_code: kind for kind in (InterruptedRun, PreconditionError, RecipeError, RunnerError)
}
REPLANS = 3
"""How often a run plans again because sources changed while they were read."""


@dataclass(frozen=True)
class Opened:
    """A recipe with its workspace, ready to be planned."""

    path: Path
    compiled: Compiled
    workspace: Workspace
    state: State

    @property
    def lock_path(self) -> Path:
        return lock.path_of(self.path)

    def world(self) -> plan.World:
        """The facts and files as they are now."""
        locked = lock.read(self.lock_path)
        wants_base = any(step.uses_base_model for step in self.compiled.steps)
        spec = self.compiled.base_model if wants_base else None
        base = plan.base_identity(spec, self.workspace.root, locked, self.state)
        return plan.World(self.workspace, self.state, locked, base)

    def plan(self) -> tuple[plan.Planned, ...]:
        return plan.whole(self.compiled, self.world())


@contextlib.contextmanager
def opened(path: Path, root: Path | None = None) -> Iterator[Opened]:
    """The recipe at `path`, checked; or from the cache when these bytes were checked before."""
    data = recipe.read_bytes(path)
    space = Workspace(root.absolute()) if root else workspace.around(path)
    if not space.root.is_dir():
        raise RecipeError(f"there is no folder {space.root}", hint="correct --workspace")
    recipe_hash = hashlib.sha256(data).hexdigest()
    cache_key = key.of({"recipe": recipe_hash, "code": _code_fingerprint()})
    if not space.state.exists():
        recipe.compile(data, str(path))  # a recipe with mistakes leaves no folder behind
    with State(space.state) as state:
        cached = state.compiled(cache_key)
        if cached is not None:
            compiled = Compiled.from_plain(cached)
        else:
            compiled = recipe.compile(data, str(path))
            state.remember_compiled(cache_key, compiled.plain())
        yield Opened(path, compiled, space, state)


def apply(
    current: Opened, listen: Callable[[events.Event], None], *, wait: bool = True
) -> tuple[plan.Planned, ...]:
    """Makes every output of the recipe current; the plan that was carried out.

    With nothing to do it takes no lock and starts no run.
    """
    planned = current.plan()
    if all(step.state == "skip" for step in planned):
        _settle(current, planned)
        return planned
    with _locked(current.workspace, wait, listen) as waited:
        if waited:
            planned = current.plan()  # another apply may have done it meanwhile
        if any(step.state != "skip" for step in planned):
            disk.remove(current.workspace.staging)
            _run(current, planned, listen)
        return planned


def _run(
    current: Opened, planned: tuple[plan.Planned, ...], listen: Callable[[events.Event], None]
) -> None:
    started = time.strftime("%Y%m%d-%H%M%S")
    folder = current.workspace.runs / f"{started}-{os.getpid()}-{current.compiled.name}"
    with events.Log(folder / "events.jsonl", listen) as log:
        names = [step.name for step in current.compiled.steps]
        log.add({"event": "run_started", "recipe": current.compiled.name, "stages": names})
        state = "failed"
        try:
            for attempt in range(REPLANS):
                try:
                    _stages(current, planned, log, folder)
                    break
                except _PlanAgain as changed:
                    if attempt == REPLANS - 1:
                        raise changed.error from None
                    planned = current.plan()
                    log.add(
                        {"event": "warning", "text": f"{changed.error.message}; planning again"}
                    )
            state = "done"
        except KeyboardInterrupt:
            state = "interrupted"
            raise InterruptedRun(
                "interrupted; what was finished is kept", hint="run the same command to continue"
            ) from None
        except InterruptedRun:
            state = "interrupted"
            raise
        except RunnerError as error:
            log.add({"event": "error", "message": error.message, "hint": error.hint})
            raise
        finally:
            log.add({"event": "run_finished", "state": state})
            with contextlib.suppress(OSError):
                events.write_metrics_csv(folder / "events.jsonl", folder / "metrics.csv")


class _PlanAgain(Exception):
    """What the plan was made from is not as it was."""

    def __init__(self, error: RunnerError) -> None:
        super().__init__(error.message)
        self.error = error


def _stages(
    current: Opened, before: tuple[plan.Planned, ...], log: events.Log, folder: Path
) -> None:
    """Runs the stages of a plan; each is decided anew, now that what it reads is there."""
    from runner.stages.ingest import SourceChanged

    _pin(current)
    done: dict[str, plan.Planned] = {}
    for foreseen in before:
        step = foreseen.step
        planned = plan.decide(step, done, current.world(), foreseen.sources)
        if planned.state == "skip":
            _commit(current, planned)
            log.add({"event": "stage_skipped", "stage": step.name, "output": planned.output})
        else:
            _check_inputs(current, planned, done)
            try:
                planned = _stage(current, planned, done, log, folder)
            except SourceChanged as error:
                raise _PlanAgain(error) from error
        done[step.name] = planned


def _check_inputs(current: Opened, planned: plan.Planned, done: dict[str, plan.Planned]) -> None:
    """Compares what the stage will read with its hash, so that no damage becomes a fact.

    A damaged output is removed, so that the next plan makes it again; a trained model never is.
    """
    for name in planned.step.inputs.values():
        output = done[name].output or ""
        path = store.path_of(current.workspace, output)
        if store.content_hash(path) == output:
            continue
        if not done[name].step.rebuilds:
            raise PreconditionError(
                f"the output of {name} is damaged: {path}",
                hint="put it back from a copy, or delete the folder and apply again to train anew",
            )
        disk.remove(path)
        raise _PlanAgain(RunnerError(f"the output of {name} was damaged and is made again"))


def _stage(
    current: Opened,
    planned: plan.Planned,
    done: dict[str, plan.Planned],
    log: events.Log,
    folder: Path,
) -> plan.Planned:
    """Runs one stage and records its output."""
    step, space = planned.step, current.workspace
    assert planned.parts is not None
    stage_key = key.of(planned.parts)
    causes = [cause.text for cause in planned.causes]
    log.add({"event": "stage_started", "stage": step.name, "causes": causes})
    logger.debug("%s: key %s from %s", step.name, stage_key, planned.parts)
    started = time.monotonic()
    scratch = space.scratch / stage_key[:32]
    try:
        staged = store.stage(space, step.name)
        job = worker.Job(
            entry=step.entry,
            recipe=current.compiled.name,
            seed=step.seed or 0,
            inputs={
                kind: str(store.path_of(space, done[name].output or ""))
                for kind, name in step.inputs.items()
            },
            sources=planned.sources,
            base_model=str(base_path(current)) if step.uses_base_model else None,
            output=str(staged),
            scratch=str(scratch),
            cache=str(space.cache),
            previous=_previous(current, planned),
        )

        def emit(event: events.Event) -> None:
            log.add({**event, "stage": step.name})

        if step.own_process:
            metrics = _in_child(job, step, emit, folder / f"{step.name}.log")
        else:
            metrics = worker.run(job, emit)
        output = store.publish(space, staged)
        seconds = round(time.monotonic() - started, 3)
        current.state.remember(stage_key, output, step.name, metrics, seconds)
        finished = plan.Planned(step, "skip", (), planned.parts, output, planned.sources)
        _commit(current, finished)
    except (OSError, sqlite3.OperationalError) as error:
        raise disk.full(error, space.artifacts) or error from error
    disk.remove(scratch)
    log.add(
        {
            "event": "stage_finished",
            "stage": step.name,
            "output": output,
            "seconds": seconds,
            "metrics": metrics,
        }
    )
    return finished


def _previous(current: Opened, planned: plan.Planned) -> str | None:
    """The stage's last output, where it differs from the one to make by what it was made from.

    Its content is checked: damage must not be carried into new outputs.
    """
    before = lock.read(current.lock_path).of_stage(planned.step.name)
    if before is None or planned.parts is None:
        return None
    then, now = (
        {name: value for name, value in parts.items() if name not in ("sources", "inputs")}
        for parts in (before.parts, planned.parts)
    )
    folder = store.path_of(current.workspace, before.output)
    if then != now or not folder.is_dir() or store.content_hash(folder) != before.output:
        return None
    return str(folder)


def _commit(current: Opened, planned: plan.Planned) -> None:
    """Makes the lockfile and the link say that this is the stage's output."""
    assert planned.output is not None
    assert planned.parts is not None
    locked = lock.read(current.lock_path)
    fact = lock.Fact(planned.step.name, planned.output, planned.parts)
    names = [step.name for step in current.compiled.steps]
    lock.write(current.lock_path, lock.updated(locked, fact, names))
    link = current.workspace.links(current.compiled.name) / planned.step.name
    disk.point(link, store.path_of(current.workspace, planned.output))


def _settle(current: Opened, planned: tuple[plan.Planned, ...]) -> None:
    """With nothing to run: mends a lockfile or links that do not say what is known."""
    locked = lock.read(current.lock_path)
    facts = tuple(
        lock.Fact(p.step.name, p.output, p.parts) for p in planned if p.output and p.parts
    )
    lock.write(current.lock_path, lock.Lock(facts, locked.pins))
    folder = current.workspace.links(current.compiled.name)
    for step in planned:
        disk.point(folder / step.step.name, store.path_of(current.workspace, step.output or ""))


def _pin(current: Opened) -> None:
    """Asks the hub once which commit the base model is, and writes it down."""
    spec = current.compiled.base_model
    wanted = any(step.uses_base_model for step in current.compiled.steps)
    if spec is None or not wanted or not source.on_hub(spec, current.workspace.root):
        return
    locked = lock.read(current.lock_path)
    if locked.commit_of(spec) is None:
        pin = lock.Pin(spec, source.latest_commit(spec))
        lock.write(current.lock_path, lock.Lock(locked.facts, (pin,)))


def base_path(current: Opened) -> Path:
    """The folder or .gguf file of the base model; a hub model is downloaded if need be."""
    spec = current.compiled.base_model
    assert spec is not None
    if not source.on_hub(spec, current.workspace.root):
        return source.path_of(spec, current.workspace.root)
    commit = lock.read(current.lock_path).commit_of(spec)
    if commit is None:
        raise PreconditionError(
            f"which commit base_model {spec!r} is has not been decided yet",
            hint=f"run `runner apply {current.path}` first",
        )
    return source.downloaded(spec, commit)


def _in_child(
    job: worker.Job, step: Step, emit: Callable[[events.Event], None], log_path: Path
) -> dict[str, Any]:
    """Runs the stage in a process of its own; its metrics, or the error that it reported."""
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    with (
        log_path.open("ab") as log,
        subprocess.Popen(
            worker.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_child_environment(),
            start_new_session=sys.platform != "win32",
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
            stdin.write(worker.as_json(job).encode())
        # The child is in a session of its own: ctrl-C reaches it through us, whatever we are at.
        asked_to_stop = False
        while True:
            try:
                line = child.stdout.readline()
                if not line:
                    break
                event = json.loads(line)
                if event["event"] == "result":
                    result = event["metrics"]
                elif event["event"] == "error":
                    error = event
                else:
                    emit(event)
            except KeyboardInterrupt:
                child.kill() if asked_to_stop else child.terminate()
                asked_to_stop = True
        code = child.wait()
        logger.debug(
            "%s: child %d ended with %d; its output: %s", step.name, child.pid, code, log_path
        )
    if code == 0 and result is not None:
        return result
    if error is not None:
        raise CODES.get(code, RunnerError)(error["message"], hint=error["hint"])
    if asked_to_stop or code == InterruptedRun.exit_code:
        raise InterruptedRun(
            f"{step.name} was interrupted; what was finished is kept",
            hint="run the same command to continue",
        )
    raise RunnerError(_crash(step.name, code, log_path), hint=f"all it said is in {log_path}")


def _crash(stage: str, code: int, log_path: Path) -> str:
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "nothing was said"
    if code == -signal.SIGKILL:
        return f"{stage} was killed, as the system does when memory runs out; last words: {last}"
    return f"{stage} ended with exit code {code}: {last}"


def _child_environment() -> dict[str, str]:
    """Ours, without the threads and progress bars that libraries start by themselves."""
    quiet = {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**quiet, **os.environ, "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def _locked(space: Workspace, wait: bool, listen: Callable[[events.Event], None]) -> Iterator[bool]:
    """Holds the workspace for one apply, and says whether it had to wait for another one.

    The system frees it when the process dies.
    """
    from filelock import FileLock, Timeout

    space.artifacts.mkdir(parents=True, exist_ok=True)
    held = FileLock(space.artifacts / "apply.lock")
    waited = False
    try:
        held.acquire(timeout=0)
    except Timeout:
        waited = True
        if not wait:
            raise BusyError(
                f"another apply is at work in {space.root}",
                hint="wait until it has ended, or leave out --no-wait",
            ) from None
        listen({"event": "warning", "text": "another apply is at work here; waiting for it"})
        held.acquire()
    try:
        yield waited
    finally:
        held.release()


def _code_fingerprint() -> list[list[Any]]:
    """Changes with the runner's own code, so that a new version compiles recipes anew."""
    package = Path(__file__).parent.parent
    found = []
    for folder in (package, package / "engine", package / "stages", package / "chat"):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".py"):
                    status = entry.stat()
                    found.append([entry.path, status.st_size, status.st_mtime_ns])
    return sorted(found)
