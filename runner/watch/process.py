"""A run of `work` as the watch sees it: started, listened to, asked to stop."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from runner import disk
from runner.engine import child
from runner.errors import InterruptedRun
from runner.watch import work

Event = dict[str, Any]


class Process:
    """One run. A thread reads what it says, so that the watch never waits for it."""

    def __init__(self, job: work.Job, output: Path, wake: Callable[[], None]) -> None:
        self.started = time.time()
        self._output = output
        self._wake = wake
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.was_stopped = False
        self._logs = True
        with contextlib.ExitStack() as stack:
            log: IO[bytes] | int = subprocess.DEVNULL
            try:
                disk.make_folder(output.parent)
                log = stack.enter_context(output.open("wb"))
            except OSError:
                self._logs = False  # a run without a log is better than none
            self._child = subprocess.Popen(
                work.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # ctrl-C reaches it through us, so that it saves once and is not asked twice
                start_new_session=sys.platform != "win32",
            )
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._child.stdin as stdin:
            stdin.write(work.as_json(job).encode())
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def said(self) -> list[Event]:
        """The events since they were last asked for."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._events.get_nowait())
        return found

    def is_done(self) -> bool:
        return not self._reader.is_alive() and self._child.poll() is not None

    def stop(self) -> None:
        """Asks it to save and end; asked again it is no faster."""
        if not self.was_stopped:
            self.was_stopped = True
            with contextlib.suppress(OSError):
                self._child.terminate()

    def kill(self) -> None:
        """Ends it at once."""
        self.was_stopped = True
        with contextlib.suppress(OSError):
            self._child.kill()

    def failure(self, said: Event | None) -> Event | None:
        """How it ended, where that was not well; `said` is what it said of it."""
        code = self._child.returncode
        if code == 0:
            return None
        if said is not None:
            return said
        if code == InterruptedRun.exit_code or self.was_stopped:
            return _failure("interrupted; what was finished is kept", "", 75)
        hint = f"all it said is in {self._output}"
        try:
            text = child.crash("the run", code, self._output) if self._logs else ""
        except OSError:
            text = ""
        if not text:
            text = f"the run ended with exit code {code}"
            hint = f"{self._output} could not be written, so nothing it said is kept"
        return _failure(text, hint, 1)

    def _read(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # cut off where it was killed
                    self._events.put(json.loads(line))
        self._child.wait()
        self._wake()


def _failure(message: str, hint: str, exit_code: int) -> Event:
    return {"message": message, "hint": hint, "exit_code": exit_code}
