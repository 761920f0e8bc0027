"""One run for `runner watch`, in a process of its own, so that its memory is given back.

It reads its job as JSON from standard input and writes events as JSON lines. Whatever the training
reads is always made current; the training, and what follows from it, only where `retrain:` allows.
It ends when the watch does, by a signal too, and saves before.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from runner import disk, processes
from runner.engine import execute, lock, plan, store, workspace
from runner.engine.elsewhere import Elsewhere
from runner.engine.look import Growing, Vanished
from runner.engine.opened import Opened
from runner.engine.plan import Choice, Planned
from runner.engine.recipe import Compiled, Step
from runner.engine.state import State
from runner.errors import InterruptedRun, RunnerError, Stop
from runner.watch.schedule import Conditions, Wait

BAD_FILES_MAX = 200
"""Of the files that cannot be read, so many are named."""
GONE_MAX = 0.2
"""A larger share of the sources that is gone at once is taken for a folder that is missing."""

OF_NEW_DATA = {"input", "upstream runs", "never run"}
"""Causes of a training that new conversations explain; any other is a change that is wanted."""

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """What is to be applied. The recipe is given as it was checked: its file may be broken now.

    `held` files are not looked at. With `trains_anyway` a training was due already, and was
    interrupted.
    """

    path: str
    root: str
    compiled: dict[str, Any]
    held: tuple[str, ...]
    settle_s: float
    accept_deletions: bool
    trains_anyway: bool


def run(job: Job, emit: Emit) -> None:
    """Applies the recipe; the last event says what came of it."""
    compiled = Compiled.from_plain(job.compiled)
    growing = Growing(frozenset(job.held), job.settle_s, 1 if job.accept_deletions else GONE_MAX)
    space = workspace.at(Path(job.root))
    with State(space.state) as state:
        current = Opened(Path(job.path), compiled, space, state, Elsewhere(space.root))
        try:
            _run(current, Choice(growing=growing), emit, anyway=job.trains_anyway)
        finally:
            emit({"event": "bad_files", "files": bad_files(current)})


def _run(current: Opened, choice: Choice, emit: Emit, *, anyway: bool) -> None:
    prepares = before_training(current.compiled.steps)
    if len(prepares) < len(current.compiled.steps):
        execute.apply(current, emit, choice=choice._replace(only=prepares))
        wait = None if anyway else why_wait(current, choice)
        if wait is not None:
            emit({"event": "training_waits", "text": wait.text, "until": wait.until})
            return
    execute.apply(current, emit, choice=choice)


def before_training(steps: Iterable[Step]) -> tuple[str, ...]:
    """The stages that are no training and read none."""
    after: set[str] = set()
    found = []
    for step in steps:
        if step.kind == "train" or after & set(step.inputs.values()):
            after.add(step.name)
        else:
            found.append(step.name)
    return tuple(found)


def why_wait(current: Opened, choice: Choice) -> Wait | None:
    """What keeps the trainings that would run from starting; nothing where none would run."""
    world = current.world(choice)
    planned = plan.whole(current.compiled, world)
    trainings = [one for one in planned if one.step.kind == "train" and one.state != "skip"]
    if not trainings:
        return None
    conditions = Conditions.of(current.compiled.retrain)
    made = [plan.last_made(one.step, world) for one in trainings]
    starts = [one.made_at - one.seconds for one in made if one is not None]
    counts = [_new_conversations(current, one, planned) for one in trainings]
    new = None if None in counts else max(count for count in counts if count is not None)
    return conditions.wait(new, max(starts, default=None), time.time())


def _new_conversations(
    current: Opened, training: Planned, planned: Iterable[Planned]
) -> int | None:
    """How many conversations the last training has not seen; None where it is not about them."""
    if {cause.reason for cause in training.causes} - OF_NEW_DATA:
        return None
    from runner.chat import learned

    split = _split_of(training.step, {one.step.name: one for one in planned})
    if split is None or split.output is None:
        return None
    last = lock.read(current.lock_path).of_stage(training.step.name)
    model = store.path_of(current.workspace, last.output) if last else None
    if model is not None and not model.is_dir():
        model = None
    return learned.count_new(store.path_of(current.workspace, split.output), model)


def _split_of(step: Step, by_name: Mapping[str, Planned]) -> Planned | None:
    """The nearest split that the step was made from."""
    level = list(step.inputs.values())
    while level:
        for name in level:
            if by_name[name].step.kind == "split":
                return by_name[name]
        level = [above for name in level for above in by_name[name].step.inputs.values()]
    return None


def bad_files(current: Opened) -> list[dict[str, Any]]:
    """The source files with records that could not be read: path, hash, how many, the first reason.

    Of the last output of each ingest, or of the last attempt where that ended by them.
    """
    locked = lock.read(current.lock_path)
    found: dict[str, dict[str, Any]] = {}
    for step in current.compiled.steps:
        fact = locked.of_stage(step.name)
        if not step.sources or fact is None:
            continue
        hashes = current.state.manifest(fact.parts.get("sources", "")) or {}
        rejected = store.path_of(current.workspace, fact.output) / "rejected.jsonl"
        for record in _rejected(rejected):
            name = record["path"]
            if name in found:
                found[name]["records"] += 1
            elif len(found) < BAD_FILES_MAX:
                found[name] = {
                    "path": name,
                    "sha256": hashes.get(name),
                    "records": 1,
                    "reason": record["reason"],
                }
    return list(found.values())


def _rejected(path: Path) -> Iterable[dict[str, Any]]:
    try:
        with path.open("rb") as lines:
            for line in lines:
                record = json.loads(line)
                if "understood" not in record:
                    yield record
    except (FileNotFoundError, NotADirectoryError):
        return


def as_json(job: Job) -> str:
    return json.dumps(asdict(job))


def command() -> list[str]:
    return [sys.executable, "-P", "-m", "runner.watch.work", str(os.getpid())]


def main() -> NoReturn:
    """The child process."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    processes.die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the watch tells us

    def emit(event: dict[str, Any]) -> None:
        try:
            events.write(json.dumps(event) + "\n")
            events.flush()
        except BrokenPipeError:
            pass  # the watch was killed, and so are we in a moment

    code = 0
    try:
        run(Job(**json.load(sys.stdin)), emit)
    except KeyboardInterrupt:
        code = InterruptedRun.exit_code
    except RunnerError as error:
        code = error.exit_code
        emit(_said(error.message, error.hint, code, vanished=isinstance(error, Vanished)))
    except (OSError, sqlite3.OperationalError) as error:
        full = disk.full(error, Path.cwd())
        place = getattr(error, "filename", None)
        what = full.message if full else f"{error}" + (f": {place}" if place else "")
        code = full.exit_code if full else RunnerError.exit_code
        emit(_said(what, full.hint if full else "check that it is there and may be read", code))
    sys.stderr.flush()
    os._exit(code)  # threads of native libraries may crash an orderly exit; all is on disk


def _said(message: str, hint: str, code: int, *, vanished: bool = False) -> dict[str, Any]:
    return {
        "event": "failed",
        "message": message,
        "hint": hint,
        "exit_code": code,
        "vanished": vanished,
    }


def _interrupt(*_: object) -> None:
    raise Stop


if __name__ == "__main__":
    main()
