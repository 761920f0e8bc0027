"""Every error the runner raises on purpose: what is wrong, what to do, and an exit code.

    RunnerError              1  the run or a check failed
    ├── RecipeError          2  the recipe, or the command line, cannot be understood
    ├── PreconditionError    3  something the run needs is not there: a file, a package, disk space
    ├── BusyError            4  another apply holds the workspace
    ├── DriftError           5  something would change, and the user asked that nothing may
    └── InterruptedRun      75  stopped by a signal; the state is saved, the same command continues
Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from typing import ClassVar


class RunnerError(Exception):
    """What is wrong (`message`: where, and the value) and what to do about it (`hint`)."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class RecipeError(RunnerError):
    exit_code = 2


class PreconditionError(RunnerError):
    exit_code = 3


class BusyError(RunnerError):
    exit_code = 4


class DriftError(RunnerError):
    exit_code = 5


class Stop(KeyboardInterrupt):
    """What a signal raises. Python ends itself by SIGINT at exit, whatever the exit code, when a
    KeyboardInterrupt itself leaves an `exec`, as it may while a class is built."""


class InterruptedRun(RunnerError):
    exit_code = 75
