"""A stage in a process of its own: started, listened to, asked to stop, and explained when it dies.

It is there for what torch brings: memory that is given back, signals that are obeyed while native
code works, and a crash that is an exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.engine import events, worker
from runner.engine.log import debug
from runner.engine.recipe import Step
from runner.errors import InterruptedRun, PreconditionError, RecipeError, RunnerError

CODES: dict[int, type[RunnerError]] = {
    kind.exit_code: kind for kind in (InterruptedRun, PreconditionError, RecipeError, RunnerError)
}
SAVED = InterruptedRun.exit_code
ORPHAN_WAIT_S = 120.0
"""How long a training that lost its parent may take to save before it is killed."""


def run(
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
        failure: Exception | None = None
        while True:
            try:
                line = child.stdout.readline()
                if not line.endswith(b"\n"):  # it has ended, perhaps amid a line
                    break
                event = json.loads(line)
                if event["event"] == "result":
                    result = event["metrics"]
                elif event["event"] == "error":
                    error = event
                elif failure is None:
                    emit(event)
            except KeyboardInterrupt:
                child.kill() if asked_to_stop else child.terminate()
                asked_to_stop = True
            except Exception as raised:  # of who listens; the child is heard out while it saves
                failure = raised
                child.terminate()
        code = child.wait()
        debug("%s: child %d ended with %d; its output: %s", step.name, child.pid, code, log_path)
    if failure is not None and not (isinstance(failure, OSError) and code == SAVED):
        raise failure
    if code == 0 and result is not None:
        return result
    if error is not None:
        raise CODES.get(code, RunnerError)(error["message"], hint=error["hint"])
    if asked_to_stop or code == SAVED:
        raise InterruptedRun(
            f"{step.name} was interrupted; what was finished is kept",
            hint="run the same command to continue",
        )
    raise RunnerError(crash(step.name, code, log_path), hint=f"all it said is in {log_path}")


def crash(stage: str, code: int, log_path: Path) -> str:
    lines = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "nothing was said"
    if code == -signal.SIGKILL:
        return f"{stage} was killed, as the system does when memory runs out; last words: {last}"
    return f"{stage} ended with exit code {code}: {last}"


def _child_environment() -> dict[str, str]:
    """Ours, without the threads and progress bars that libraries start by themselves."""
    quiet = {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**quiet, **os.environ, "PYTHONUNBUFFERED": "1"}


def end_orphan(scratch: Path, emit: Callable[[events.Event], None]) -> None:
    """Ends a child that outlived its parent and still writes to this scratch folder.

    It is asked to save and end, as a dying parent does; only one that does not is killed.
    """
    from filelock import FileLock, Timeout

    lock, pid_file = worker.lock_of(scratch)
    if not pid_file.exists():
        return
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        pid = int(pid_file.read_text() or 0)
        emit({"event": "warning", "text": f"process {pid} of a killed run is still at it; waiting"})
        _signal(pid, signal.SIGTERM)
        try:
            held.acquire(timeout=ORPHAN_WAIT_S)
        except Timeout:
            _signal(pid, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
            held.acquire()
    held.release()
    pid_file.unlink(missing_ok=True)


def _signal(pid: int, number: int) -> None:
    if pid > 1:
        with contextlib.suppress(OSError):
            os.kill(pid, number)
