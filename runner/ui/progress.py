"""A run as it goes, from its events: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Protocol

from runner.engine import words
from runner.engine.words import escaped

if TYPE_CHECKING:
    from rich.progress import TaskID

Event = dict[str, Any]

SECONDS_BETWEEN_LINES = 10.0


class View(Protocol):
    def show(self, event: Event) -> None: ...
    def close(self) -> None: ...


class Lines:
    """One line for what happens; of a progress, one every ten seconds."""

    def __init__(self) -> None:
        self._last = 0.0

    def show(self, event: Event) -> None:
        kind = event["event"]
        if kind in ("progress", "metrics"):
            if time.monotonic() - self._last < SECONDS_BETWEEN_LINES and "eval_loss" not in event:
                return
            self._last = time.monotonic()
        if kind == "stage_started":
            self._last = time.monotonic()
        text = line_of(event)
        if text:
            print(text, flush=True)

    def close(self) -> None:
        pass


class Bar:
    """The same lines above a bar with loss, speed and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(),
            transient=True,
        )
        self._progress.start()
        self._task: TaskID | None = None

    def show(self, event: Event) -> None:
        kind = event["event"]
        if kind == "stage_started":
            self._task = self._progress.add_task(event["stage"], total=None, text="")
        if kind == "progress" and self._task is not None:
            text = f"{event['done']} of {event['total']} {event['unit']}"
            self._progress.update(
                self._task, completed=event["done"], total=event["total"], text=text
            )
        elif kind == "metrics" and "steps" in event and self._task is not None:
            self._progress.update(
                self._task, completed=event["step"], total=event["steps"], text=training(event)
            )
        elif text := line_of(event):
            self._progress.console.print(text, markup=False, highlight=False)
        if kind in ("stage_finished", "error", "run_finished") and self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None

    def close(self) -> None:
        self._progress.stop()


def view(*, terminal: bool) -> View:
    """The bar for a person at a terminal; lines for files, pipes and CI."""
    plain = not terminal or os.environ.get("CI") or os.environ.get("TERM") == "dumb"
    return Lines() if plain else Bar()


def line_of(event: Event) -> str:
    """The event as one line, or nothing for one that is not for people."""
    return escaped(_line_of(event))


def _line_of(event: Event) -> str:
    stage = event.get("stage", "")
    match event["event"]:
        case "stage_started":
            return f"{stage}: runs, because {'; '.join(event['causes'])}"
        case "stage_finished":
            spent = words.duration(event["seconds"])
            found = words.metrics(event["metrics"])
            return f"{stage}: done in {spent}" + (f" ({found})" if found else "")
        case "stage_skipped":
            return f"{stage}: nothing to do"
        case "switched" if event["stages"]:
            return f"{', '.join(event['stages'])}: lockfile and links changed to what is known"
        case "stage_restored":
            return f"{stage}: {words.size(event['bytes'])} from {event['origin']}"
        case "progress":
            return f"{stage}: {event['done']} of {event['total']} {event['unit']}"
        case "metrics" if "eval_loss" in event:
            return f"{stage}: step {event['step']}, eval loss {event['eval_loss']:.4f}"
        case "metrics" if "steps" in event:
            return f"{stage}: step {event['step']} of {event['steps']}, {training(event)}"
        case "warning":
            return f"{stage + ': ' if stage else ''}warning: {event['text']}"
        case "verdict":
            return f"{stage}: {event['text']}"
        case "release":
            return str(event["text"])
    return ""


def training(event: Event) -> str:
    """`loss 1.234, 412 tokens/s, 3:10 left`"""
    left = words.duration(event.get("seconds_left", 0))
    return f"loss {event['loss']:.3f}, {event['tokens_per_second']:,.0f} tokens/s, {left} left"
