"""The loop of `runner watch`: one thread, one run at a time, until a signal ends it.

A signal sets a flag and nothing else, so that it is obeyed between two steps in every state. A run
that is under way is asked to save and to end; a second signal kills it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from runner.errors import BusyError, InterruptedRun
from runner.watch.process import Process
from runner.watch.schedule import Pace
from runner.watch.watched import Tell, Watched

PACE = Pace()


def run(
    recipes: Sequence[Path],
    tell: Tell,
    *,
    root: Path | None = None,
    overrides: Sequence[str] = (),
    once: bool = False,
    accept_deletions: bool = False,
    pace: Pace = PACE,
) -> int:
    """Watches the recipes; the exit code when a signal has come, or, `once`, when all is done."""
    with Signals() as signals, contextlib.ExitStack() as stack:
        everyone = [
            Watched(
                path,
                root,
                overrides,
                pace=pace,
                tell=tell,
                listens=not once,
                accept_deletions=accept_deletions,
            )
            for path in recipes
        ]
        others: list[Watched] = []
        for one in everyone:
            try:
                stack.enter_context(one.folder.held(one.path))
            except BusyError:
                if not accept_deletions:
                    raise
                others.append(one)
                one.folder.accept()
                text = "the watch that is running goes on without what is gone"
                tell(one.name, {"event": "watch", "state": "accepted", "text": text})
        if others:
            everyone = [one for one in everyone if one not in others]
            if not everyone:
                return 0
        for one in everyone:
            one.begin()
            stack.callback(one.close)
        _turn(everyone, signals, pace, once=once)
        if signals.count:
            return InterruptedRun.exit_code if once else 0
        return max(one.exit_code for one in everyone)


class Signals:
    """How many of the signals that end a process have come. `wake` is set by them too."""

    def __init__(self) -> None:
        self.count = 0
        self.wake = threading.Event()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # not the main thread
                    self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _came(self, *_: object) -> None:
        self.count += 1
        self.wake.set()


def _turn(everyone: Sequence[Watched], signals: Signals, pace: Pace, *, once: bool) -> None:
    """Goes round until a signal comes, or, `once`, until nothing is left to do."""
    running: tuple[Watched, Process] | None = None
    stopped = 0
    beats = time.monotonic() + pace.heartbeat_s
    done: set[str] = set()
    while True:
        now = time.monotonic()
        if running is not None:
            running, ended = _heard(*running)
            done |= ended
        if signals.count and running is None:
            return
        if signals.count > stopped and running is not None:
            if stopped:
                running[1].kill()
            else:
                running[0].stopping()
                running[1].stop()
            stopped = signals.count
        for one in everyone:
            one.tick(now, is_running=running is not None)
        if running is None:
            running = next(_started(everyone, signals, now, done if once else set()), None)
        if once and running is None and _all_quiet(everyone, done):
            return
        if now >= beats:
            beats = now + pace.heartbeat_s
            for one in everyone:
                one.heartbeat()
        if signals.wake.wait(pace.tick_s):
            signals.wake.clear()


def _heard(one: Watched, process: Process) -> tuple[tuple[Watched, Process] | None, set[str]]:
    """Passes on what the run said; nothing runs any more where it has ended.

    The names of those that have failed are given back too: `once` tries nothing twice.
    """
    is_done = process.is_done()
    for event in process.said():
        one.hear(event)
    if not is_done:
        return (one, process), set()
    one.finish(process)
    return None, {one.name} if one.exit_code else set()


def _started(
    everyone: Sequence[Watched], signals: Signals, now: float, without: set[str]
) -> Iterator[tuple[Watched, Process]]:
    for one in everyone:
        if one.name not in without and one.is_due(now):
            process = one.start(now, signals.wake.set)
            if process is not None:
                yield one, process
            else:
                without.add(one.name)


def _all_quiet(everyone: Sequence[Watched], done: set[str]) -> bool:
    """Whether nothing is left to do for any of them."""
    return all(one.is_quiet() or one.name in done for one in everyone)
