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
    error             message, hint, exit_code
    run_finished      state: done | failed | interrupted
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

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
    """A run's `events.jsonl`, open for appending; each event also goes to the listeners."""

    def __init__(self, path: Path, *listeners: Listener) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open(
            "a", encoding="utf-8", errors="backslashreplace", newline="\n"
        )
        self._listeners = listeners

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, event: Event) -> None:
        event = {"event": event["event"], "time": round(time.time(), 3), **event}
        self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._file.flush()
        for listener in self._listeners:
            listener(event)


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
