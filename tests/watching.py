"""`runner watch` in a process of its own, at a pace for tests, and what it says."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PACE = {
    "settle_s": 0.2,
    "quiet_s": 0.3,
    "longest_s": 4.0,
    "rescan_s": 300.0,
    "poll_s": 1.0,
    "retry_s": 1.0,
    "retry_max_s": 2.0,
    "tick_s": 0.02,
    "heartbeat_s": 600.0,
}

SCRIPT = """\
import json, sys
from pathlib import Path
from runner.errors import RunnerError
from runner.ui import watch
from runner.watch import loop
from runner.watch.schedule import Pace
recipes, pace, once, accepts = json.loads(sys.argv[1])
try:
    code = loop.run(
        [Path(one) for one in recipes],
        watch.Json().show,
        once=once,
        accept_deletions=accepts,
        pace=Pace(**pace),
    )
except RunnerError as error:
    print(json.dumps({"event": "refused", "text": error.message}), flush=True)
    code = error.exit_code
sys.exit(code)
"""

Event = dict[str, Any]


class Watch:
    """A watch; use as a context manager, which ends it and all that it has started."""

    def __init__(
        self,
        recipe: Path | Sequence[Path],
        *,
        once: bool = False,
        accepts: bool = False,
        env: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
        **pace: float,
    ) -> None:
        recipes = [recipe] if isinstance(recipe, Path) else list(recipe)
        asked = json.dumps([[str(one) for one in recipes], {**PACE, **pace}, once, accepts])
        self.process = subprocess.Popen(
            [*within, sys.executable, "-c", SCRIPT, asked],
            stdout=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            text=True,
        )
        self.events: list[Event] = []
        self._new: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    def until(self, wanted: Callable[[Event], bool], timeout: float = 40) -> Event:
        """The next event that is wanted; everything before it is in `events`."""
        end = time.monotonic() + timeout
        while True:
            try:
                event = self._new.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                said = "\n".join(map(str, self.events[-15:]))
                raise AssertionError(f"it never came; what came last:\n{said}") from None
            self.events.append(event)
            if wanted(event):
                return event

    def says(self, state: str, timeout: float = 40) -> Event:
        return self.until(lambda e: e["event"] == "watch" and e["state"] == state, timeout)

    def runs(self, stage: str, timeout: float = 40) -> Event:
        return self.until(lambda e: e["event"] == "stage_started" and e["stage"] == stage, timeout)

    def is_silent(self, seconds: float) -> bool:
        """Whether no stage starts for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                event = self._new.get(timeout=0.05)
            except queue.Empty:
                continue
            self.events.append(event)
            if event["event"] == "stage_started":
                return False
        return True

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.end()

    def end(self, timeout: float = 40) -> int:
        code = self.process.wait(timeout)
        self._reader.join()
        while not self._new.empty():
            self.events.append(self._new.get())
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._new.put(json.loads(line))
        self.process.stdout.close()


def ingested(root: Path) -> list[str]:
    """The source file of each conversation that is there now."""
    path = root / "artifacts" / "small" / "ingest" / "conversations.jsonl"
    return [json.loads(line)["source"]["path"] for line in path.read_text().splitlines()]


def state(root: Path, recipe: str = "small") -> Event:
    found: Event = json.loads((root / "artifacts" / "watch" / f"{recipe}.json").read_bytes())
    return found


def becomes(found: Callable[[], bool], timeout: float = 20) -> bool:
    """Whether it is so within that time."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if found():
            return True
        time.sleep(0.05)
    return found()
