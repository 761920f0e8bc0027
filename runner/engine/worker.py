"""Runs one stage from a job, here or in a child process of its own.

A child reads its job as JSON from standard input and writes events as JSON lines to what was its
standard output; whatever libraries print goes to standard error, which is the stage's log file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from runner import disk, processes
from runner.errors import InterruptedRun, PreconditionError, RunnerError, Stop
from runner.sources import SourceFile


@dataclass(frozen=True)
class Job:
    """A stage to run, as plain data. Paths are absolute."""

    entry: dict[str, Any]
    recipe: str
    seed: int
    inputs: dict[str, str]
    sources: tuple[SourceFile, ...]
    base_model: str | None
    output: str
    scratch: str
    cache: str
    previous: str | None = None
    parent: str | None = None
    replay: float = 0.0


def run(job: Job, emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Runs the stage; its metrics. A full disk becomes a sentence."""
    from runner.stages import parsed
    from runner.stages.stage import Dirs

    dirs = Dirs(
        inputs={kind: Path(path) for kind, path in job.inputs.items()},
        output=Path(job.output),
        scratch=Path(job.scratch),
        cache=Path(job.cache),
        sources=job.sources,
        base_model=Path(job.base_model) if job.base_model else None,
        recipe=job.recipe,
        seed=job.seed,
        emit=emit,
        previous=Path(job.previous) if job.previous else None,
        parent=Path(job.parent) if job.parent else None,
        replay=job.replay,
    )
    try:
        return dict(parsed(job.entry).run(dirs))
    except ModuleNotFoundError as error:
        raise missing_package(str(job.entry["stage"]), error) from error
    except OSError as error:
        raise disk.full(error, Path(job.output)) or error from error


def missing_package(what: str, error: ModuleNotFoundError) -> Exception:
    """A sentence for a package of an extra; a module of ours that is missing is a bug."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "runner"):
        return error
    return PreconditionError(
        f"{what} needs the Python package {package}", hint="pip install 'runner[all]'"
    )


def lock_of(scratch: Path) -> tuple[Path, Path]:
    """The lock that a child holds as long as it may write there, and the file with its process."""
    return scratch.with_suffix(".lock"), scratch.with_suffix(".pid")


def main() -> NoReturn:
    """The child process."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    processes.die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # ctrl-C reaches the whole group: the parent tells us

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    raw = json.load(sys.stdin)
    job = Job(**{**raw, "sources": tuple(SourceFile(*file) for file in raw["sources"])})
    try:
        with _held(Path(job.scratch)):
            emit({"event": "result", "metrics": run(job, emit)})
        code = 0
    except KeyboardInterrupt:
        code = InterruptedRun.exit_code
    except RunnerError as error:
        emit({"event": "error", "message": error.message, "hint": error.hint})
        code = error.exit_code
    sys.stderr.flush()
    events.flush()
    # Threads of native libraries may crash an orderly exit; all that matters is on disk.
    os._exit(code)


@contextmanager
def _held(scratch: Path) -> Iterator[None]:
    """Holds the scratch folder, so that the next run finds a child whose parent was killed."""
    from filelock import FileLock

    lock, pid = lock_of(scratch)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        pid.write_text(str(os.getpid()))
        yield


def command() -> list[str]:
    return [sys.executable, "-P", "-m", "runner.engine.worker", str(os.getpid())]


def as_json(job: Job) -> str:
    return json.dumps(asdict(job))


def _interrupt(*_: object) -> None:
    raise Stop


if __name__ == "__main__":
    main()
