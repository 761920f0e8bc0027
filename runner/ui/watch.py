"""A watch on the terminal: what happens as lines, and below them one line that says it is alive."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from runner.engine.words import escaped
from runner.ui import progress

Event = dict[str, Any]

TERMINAL_S = 5.0
ELSEWHERE_S = 600.0
"""Between two signs of life: on a terminal they take one another's place."""


class Lines:
    """A line for whatever happens, with the time and the recipe."""

    heartbeat_s = ELSEWHERE_S

    def __init__(self) -> None:
        self._shown = 0.0

    def show(self, recipe: str, event: Event) -> None:
        if event["event"] in ("progress", "metrics"):
            if time.monotonic() - self._shown < progress.SECONDS_BETWEEN_LINES:
                return
            self._shown = time.monotonic()
        for line in lines_of(event):
            self._print(f"{time.strftime('%H:%M:%S')}  {escaped(recipe)}: {line}")

    def close(self) -> None:
        pass

    def _print(self, line: str) -> None:
        try:
            print(line, flush=True)
        except OSError:
            self._print = lambda line: None  # type: ignore[method-assign]  # nobody looks any more


class Terminal(Lines):
    """The same, above a last line that is written again and again."""

    heartbeat_s = TERMINAL_S

    def show(self, recipe: str, event: Event) -> None:
        if event["event"] == "heartbeat":
            text = f"{time.strftime('%H:%M:%S')}  {escaped(recipe)}: {escaped(event['text'])}"
            sys.stdout.write(f"\r\x1b[K{text}")
            sys.stdout.flush()
        else:
            super().show(recipe, event)

    def close(self) -> None:
        sys.stdout.write("\r\x1b[K")
        sys.stdout.flush()

    def _print(self, line: str) -> None:
        super()._print(f"\r\x1b[K{line}")


class Json(Lines):
    """Each event as it is, with the recipe's name."""

    def show(self, recipe: str, event: Event) -> None:
        self._print(json.dumps({"recipe": recipe, **event}, ensure_ascii=False))


def view(*, terminal: bool, as_json: bool) -> Lines:
    if as_json:
        return Json()
    return Terminal() if terminal else Lines()


def lines_of(event: Event) -> list[str]:
    """What an event says to people: nothing, or a line, or what to do below it."""
    match event["event"]:
        case "watch":
            return [escaped(line) for line in f"{event['state']}: {event['text']}".splitlines()]
        case "heartbeat":
            return [escaped(event["text"])]
        case "run":
            return []
        case "training_waits" | "bad_files" | "failed" | "stage_skipped" | "release":
            return []  # the watch says it in its own words
    line = progress.line_of(event)
    return [line] if line else []


def release_of(release: dict[str, Any]) -> str:
    """`release 5 (release 3 again)`"""
    again = f" (release {release['from']} again)" if release["from"] else ""
    return f"release {release['number']}{again}"


def text_of(found: dict[str, Any], releases: dict[str, Any] | None = None) -> list[str]:
    """The state of a watch as `runner status` shows it, each thing said once.

    With `releases`, as they are now, that another one is current since the watch saw to it.
    """
    lines = [f"watch: {'running' if found['is_running'] else 'not running'} · {found['text']}"]
    if found.get("watching"):
        lines.append(f"  {found['watching']}")
    last = found.get("last")
    if last:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last["started"]))
        said = "" if last["text"] in found["text"] else f", {last['text']}"
        lines.append(f"  last run {when}: {last['state']}{said}")
        if last.get("hint"):
            lines.append(f"    {last['hint']}")
    now = releases and releases["current"]
    if now and found.get("release") and now["number"] != found["release"]:
        lines.append(f"  since then: {release_of(now)}, made current beside the watch")
    after = found.get("next")
    if after and found["is_running"]:
        why = "" if after["why"] in found["text"] else f": {after['why']}"
        if after["at"] is not None:
            lines.append(f"  next run {_clock(after['at'])}{why}")
        elif why:
            lines.append(f"  next run not before{why}")
    if found.get("recipe_problem"):
        lines.append(f"  the recipe: {found['recipe_problem']}")
    lines += [f"  set aside: {one['path']}: {one['reason']}" for one in found.get("aside", ())]
    for one in found.get("bad", ()):
        more = f" ({one['records']:,} records)" if one["records"] > 1 else ""
        lines.append(f"  cannot be read: {one['path']}: {one['reason']}{more}")
    return lines


def _clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
