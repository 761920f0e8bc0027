"""Events: one JSON object a line, the one interface between a run and whoever looks at it.

Every event has `event` and `time` (seconds since 1970); those of a stage have `stage`. The kinds:

    run_started       recipe, stages
    stage_started     causes
    stage_finished    output, seconds, and the stage's metrics
    stage_skipped     output
    stage_restored    output, bytes, origin
    switched          stages: what is known of them takes its place in the lockfile and the links
    progress          done, total, unit
    metrics           step, steps, loss, eval_loss, learning_rate, grad_norm, tokens_per_second, …
    checkpoint        step, path, bytes, eval_loss
    warning, verdict  text
    release           state: accepted | kept aside; release: the current one's number; text
    error             message, hint, exit_code
    run_finished      state: done | failed | interrupted
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runner import disk

Event = dict[str, Any]
Listener = Callable[[Event], None]

METRIC_COLUMNS = (
    "time",
    "stage",
    "step",
    "epoch",
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "trained_tokens_per_second",
    "memory_bytes",
)


class Log:
    """A run's `events.jsonl`, open for appending; each event also goes to the listeners.

    A line that the disk does not take is dropped, and the first of them is told of: whether there
    is room to go on is for the stage to find out, which may have a state to save.
    """

    def __init__(self, path: Path, *listeners: Listener) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer, which would try what it could not write again and again.
        self._file = path.open("ab", buffering=0)
        self._path = path
        self._listeners = listeners
        self._dropped = False
        self._broken = False

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, event: Event) -> None:
        event = {"event": event["event"], "time": round(time.time(), 3), **event}
        line = json.dumps(event, ensure_ascii=False) + "\n"
        problem = self._written(line.encode("utf-8", "backslashreplace"))
        for listener in self._listeners:
            listener(event)
        if problem is not None and not self._dropped:
            self._dropped = True
            text = f"{self._path} cannot be written ({problem}); lines of it will be missing"
            self.add({"event": "warning", "text": text})

    def _written(self, line: bytes) -> OSError | None:
        """Appends the line, or nothing of it; what kept it from being written."""
        if self._broken:
            return None
        before = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            while written < len(line):  # a disk that is nearly full takes a part of it
                written += self._file.write(line[written:])
        except OSError as error:
            try:
                self._file.truncate(before)
            except OSError:
                self._broken = True  # a cut line is the last one
            return error
        return None


def read(path: Path) -> Iterator[Event]:
    """The complete events of a log; a last line that is still being written is left out."""
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line)


def write_metrics_csv(log: Path, output: Path) -> bool:
    """The log's training curves as a table; False, and no file, when it has none."""
    rows = [event for event in read(log) if event["event"] == "metrics"]
    if not rows:
        return False
    with (
        disk.being_written(output) as beside,
        beside.open("w", encoding="utf-8", newline="") as file,
    ):
        table = csv.DictWriter(file, METRIC_COLUMNS, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return True
