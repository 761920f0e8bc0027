"""Makes a recipe's outputs current: nothing where they are, else one run that holds the lock."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from runner import disk
from runner.engine import commit, release, store
from runner.engine.opened import Opened
from runner.engine.plan import EVERYTHING, Choice, Planned
from runner.engine.recipe import CURRENT
from runner.engine.release import Verdict
from runner.engine.workspace import Workspace
from runner.errors import BusyError, PreconditionError

Listener = Callable[[dict[str, Any]], None]


def apply(
    current: Opened, listen: Listener, *, choice: Choice = EVERYTHING, wait: bool = True
) -> tuple[Planned, ...]:
    """Makes every output of the recipe current; the plan that was carried out.

    With nothing to do it takes no lock and starts no run.
    """
    planned = current.plan(choice)
    _refuse(planned)
    if all(step.state == "skip" for step in planned) and not pending(current, planned, choice):
        store.register(current.workspace)
        for output in filter(None, (step.output for step in planned)):
            store.use(current.workspace, output)
        _clear_left(current)
        return planned
    with _locked(current, wait, listen) as waited:
        if waited:
            planned = current.plan(choice)  # another apply may have done it meanwhile
            _refuse(planned)
        store.register(current.workspace)
        if all(step.state == "skip" for step in planned):
            listen({"event": "switched", "stages": pending(current, planned, choice)})
            for step in planned:
                commit.output(current, step)
            commit.drop_links(current)
            release.consider(current, listen, decides=not choice.locked)
            _clear_left(current)
        else:
            from runner.engine import cost, run  # they take time, and there is often nothing to do

            cost.check(current, planned, listen)
            run.run(current, planned, choice, listen)
            commit.drop_links(current)
        return planned


def pending(current: Opened, planned: tuple[Planned, ...], choice: Choice) -> list[str]:
    """What an apply changes although no stage runs: stages of which lockfile or links say something
    else, and `current` where a release is not decided on, or the link does not lead to it."""
    found = commit.unsettled(current, planned)
    return found if choice.locked or release.is_settled(current) else [*found, CURRENT]


def _clear_left(current: Opened) -> None:
    """Removes what runs that were killed left in the store; a run does so by itself."""
    if store.has_left(current.workspace):
        with contextlib.suppress(OSError), store.staging(current.workspace):
            pass


def push(current: Opened) -> list[Planned]:
    """Copies what is known and here to the remote cache; the stages that are there now."""
    if not current.elsewhere.is_there:
        raise PreconditionError(
            "this workspace has no remote cache",
            hint="write `remote: s3://bucket/folder`, or a folder, into runner.yaml",
        )
    there = []
    for planned in current.plan():
        if planned.state == "skip":
            commit.keep_elsewhere(current, planned, thorough=True)
            if not current.elsewhere.is_there:
                raise PreconditionError("the remote cache could not be written", hint="try again")
            if planned.output and current.elsewhere.holds(planned.output):
                there.append(planned)
    return there


def promote(current: Opened, listen: Listener) -> Verdict:
    """Makes what was made last the current release."""
    release.refuse_without_retrain(current)
    with _locked(current, True, listen):
        return release.promote(current)


def rollback(current: Opened, listen: Listener, number: int | None = None) -> Verdict:
    """Makes the release before, or that of the number, the current one."""
    release.refuse_without_retrain(current)
    with _locked(current, True, listen):
        return release.rollback(current, number)


def _refuse(planned: tuple[Planned, ...]) -> None:
    """Raises what keeps the plan from being carried out, before anything is."""
    for step in planned:
        if step.problem is not None:
            raise step.problem


@contextlib.contextmanager
def _locked(current: Opened, wait: bool, listen: Listener) -> Iterator[bool]:
    """Holds the workspace for one apply, and says whether it had to wait for another one.

    The system frees it when the process dies; who holds it is written beside it for messages alone.
    """
    from filelock import FileLock, Timeout

    space = current.workspace
    disk.make_folder(space.artifacts)
    held = FileLock(space.artifacts / "apply.lock")
    waited = False
    try:
        held.acquire(timeout=0)
    except Timeout:
        waited = True
        holder = _holder(space)
        if not wait:
            raise BusyError(
                f"another apply{holder} is at work in {space.root}",
                hint="wait until it has ended, or leave out --no-wait",
            ) from None
        text = f"another apply{holder} is at work here; waiting for it"
        listen({"event": "warning", "text": text})
        held.acquire()
    try:
        with contextlib.suppress(OSError):
            about = {"pid": os.getpid(), "recipe": str(current.path), "since": time.time()}
            (space.artifacts / "apply.json").write_text(json.dumps(about), encoding="utf-8")
        yield waited
    finally:
        with contextlib.suppress(OSError):
            (space.artifacts / "apply.json").unlink()
        held.release()


def _holder(space: Workspace) -> str:
    try:
        about = json.loads((space.artifacts / "apply.json").read_bytes())
        since = time.strftime("%H:%M", time.localtime(about["since"]))
        return f" ({about['recipe']}, process {about['pid']}, since {since})"
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return ""
