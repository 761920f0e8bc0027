"""One watched recipe: what came, what was taken, what is next. It decides; `loop` runs it.

Events only mark that something happened. What is to be done follows from a scan, compared with the
scan that the last run started from.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runner.engine import look, opened
from runner.engine.recipe import Compiled
from runner.engine.workspace import Workspace
from runner.errors import InterruptedRun, RunnerError
from runner.watch import committed, notify, scan, work
from runner.watch.arrivals import Arrivals
from runner.watch.process import Event, Process
from runner.watch.record import Folder, Record
from runner.watch.scan import Scan
from runner.watch.schedule import Batch, Pace, retry_after

Tell = Callable[[str, Event], None]

GOES_ON = (
    "the training under way goes on with the old one; ctrl-C and a new start of the watch"
    " train with the new one at once"
)


class Watched:
    """A recipe from the start of its watch to the end."""

    def __init__(
        self,
        path: Path,
        root: Path | None,
        overrides: Sequence[str],
        *,
        pace: Pace,
        tell: Tell,
        listens: bool,
        accept_deletions: bool,
    ) -> None:
        self.path = path
        self._asked_root = root
        self._overrides = tuple(overrides)
        self._pace = pace
        self._listens = listens
        self._accepts = accept_deletions
        self.compiled, self.space = self._opened()
        self.name = self.compiled.name
        self.folder = Folder(self.space, self.name)
        self._tell = tell
        self._recipe_seen = self._recipe_new = self._recipe_signatures()
        self._recipe_new_at = 0.0
        self._recipe_waits = False

    def begin(self) -> None:
        """The first scan; what the last watch left is read. The lock is held by now."""
        self._log = self.folder.log()
        before = self.folder.read()
        self._record: Record = {
            "recipe": str(self.path),
            "path": str(self.path.absolute()),
            "pid": os.getpid(),
            "since": round(time.time()),
            "state": "starting",
            "text": "",
            "watching": "",
            "files": 0,
            "queue": 0,
            "next": None,
            "last": before.get("last"),
            "bad": before.get("bad", []),
            "recipe_problem": "",
            "training_since": before.get("training_since"),
            "uncommitted": before.get("uncommitted"),
            "release": before.get("release"),
        }
        self._folders: frozenset[tuple[str, bool, int, int]] = frozenset()
        self._arrivals: Arrivals | None = None
        self._batch: Batch | None = None
        self._scan: Scan | None = None
        self._taken: Scan | None = None
        self._wants = True
        self._process: Process | None = None
        self._coming: Compiled | None = None
        self._failures = 0
        self._stuck: Scan | None = None
        self._retry_at: float | None = None
        self._train_at: float | None = None
        self._waits_for = ""
        self._is_held = False
        self._next_scan = self._blocked_until = self._scanned_at = 0.0
        self._problem = ""
        self._notices: list[Any] = []
        self.exit_code = 0
        now = time.monotonic()
        found = self._look(now)
        youngest = found.youngest_s if found else 0.0
        self._batch = Batch(now - youngest, now - youngest) if found and found.young else None
        self._say("started", f"watching {len(found.files) if found else 0:,} files")
        self._state()

    def close(self) -> None:
        """The watch ends."""
        if self._arrivals is not None:
            self._arrivals.close()
        for notice in self._notices:
            notice.join(2)
        self._record["pid"] = None
        self._say("stopped", "the watch has ended")
        self._state("stopped")

    # --- while nothing runs

    def tick(self, now: float, *, is_running: bool) -> None:
        """Takes note of what was marked, and scans when it is time to."""
        arrivals = self._arrivals
        marked = arrivals.marks.taken() if arrivals is not None else None
        is_news = marked is not None and self._batch is None
        if marked is not None:
            self._batch = self._batch.extended(*marked) if self._batch else Batch(*marked)
        if arrivals is not None and arrivals.is_dead():
            arrivals.close()
            self._poll("the system has ceased to tell of changes")
            self._next_scan = now
        elif arrivals is not None and arrivals.is_elsewhere():
            self._folders = frozenset()
            self._next_scan = now
        if self._is_held and self._is_accepted():
            self._accept()
        if self._process is not None:
            self._check_recipe(now)
        if not is_running and (is_news or now >= self._next_scan):
            self._look(now)
            self._state()

    def is_due(self, now: float) -> bool:
        """Whether a run starts now."""
        if now < self._blocked_until:
            return False
        if self._batch is not None and not self._batch.is_due(now, self._pace):
            return False
        if self._retry_at is not None and now >= self._retry_at:
            return True
        if self._train_at is not None and time.time() >= self._train_at:
            return True
        if self._batch is None:
            return self._wants
        found = self._look(now)
        if found is None:
            return False
        if found.youngest_s < self._pace.quiet_s and now < self._batch.first + self._pace.longest_s:
            self._batch = self._batch._replace(last=now - max(found.youngest_s, 0))
            if not self._batch.is_due(now, self._pace):
                return False
        if self._wants:
            return True
        if not found.is_as(self._taken) and not found.is_as(self._stuck):
            return True
        if found.is_as(self._taken) and self._is_held:  # what was gone is back
            self._is_held, self._failures, self._stuck, self._problem = False, 0, None, ""
            self._say("back", "what was gone is there again")
        self._batch = None
        self._state()
        return False

    def is_quiet(self) -> bool:
        """Whether nothing is to be done before something changes."""
        return not self._wants and self._batch is None

    def start(self, now: float, wake: Callable[[], None]) -> Process | None:
        """Starts a run with what is there now; None where the sources cannot be looked at."""
        found = self._scan if self._scanned_at == now else self._look(now)
        if found is None:
            self._blocked_until = now + self._pace.poll_s
            self._state()
            return None
        self._started_with = found
        self._batch, self._retry_at, self._train_at, self._wants = None, None, None, False
        self._failure: Event | None = None
        self._causes: list[str] = []
        self._release: Event | None = None
        self._did = self._trains = False
        self._waits_for = ""
        job = work.Job(
            path=str(self.path.absolute()),
            root=str(self.space.root),
            compiled=self.compiled.plain(),
            held=tuple(found.aside),
            settle_s=self._pace.settle_s,
            accept_deletions=self._accepts,
            trains_anyway=self._record["training_since"] is not None,
        )
        self._process = Process(job, self.folder.file(".run.log"), wake)
        self._state()
        self._tell(self.name, {"event": "run", "started": self._process.started})
        return self._process

    # --- while something runs

    def stopping(self) -> None:
        """A signal came: the run is asked to save and end, which may take a while."""
        self._say("stopping", "what is under way is saved first; ctrl-C again does not wait")

    def hear(self, event: Event) -> None:
        """An event of the run."""
        match event["event"]:
            case "failed":
                self._failure = event
            case "bad_files":
                self._record["bad"] = event["files"]
            case "training_waits":
                self._waits_for = event["text"]
                self._train_at = event["until"]
            case "stage_started":
                self._did = True
                self._causes.append(f"{event['stage']}: {'; '.join(event['causes'])}")
                if self._is_training(event["stage"]):
                    self._trains = True
                    self._record["training_since"] = event["time"]
                    self._state()
            case "stage_finished" if self._is_training(event["stage"]):
                self._record["training_since"] = None
                self._state()
            case "stage_restored" | "switched":
                self._did = True
            case "release":
                self._release = event
        if line := _line(event):
            self._log.info(line)
        self._tell(self.name, event)

    def finish(self, process: Process) -> None:
        """The run has ended; a recipe that was changed meanwhile is the one from here on."""
        self._process = None
        seconds = round(time.time() - process.started, 1)
        failure = process.failure(self._failure)
        last = {"started": round(process.started, 1), "seconds": seconds}
        now = time.monotonic()
        if failure is None:
            self._succeeded(last)
        elif failure["exit_code"] == InterruptedRun.exit_code and process.was_stopped:
            self._wants = True
            if self._coming is None or self._trains:
                text = failure["message"]
                self._record["last"] = {**last, "state": "interrupted", "text": text}
                self.exit_code = InterruptedRun.exit_code
        else:
            self._failed(failure, last, now)
        if self._coming is not None:
            self._adopt(self._coming, now)
        found = self._look(now)
        if found is not None and failure is None:
            if self._started_with.young:
                self._wants = True
            if self._wants or not found.is_as(self._started_with):
                self._batch = self._batch or Batch(now, now - min(found.youngest_s, 0))
            else:
                self._batch = None
        self._state()

    def _succeeded(self, last: dict[str, Any]) -> None:
        self._taken, self._stuck = self._started_with, None
        self._failures, self._is_held, self._accepts = 0, False, False
        self.exit_code = 0
        self._record["training_since"] = None
        text = "everything is up to date" if not self._did else "; ".join(self._causes)
        if self._release is not None:
            text = self._release["text"]
        if self._did or self._record["last"] is None:
            self._record["last"] = {**last, "state": "done", "text": text}
        if self._release is not None:
            self._record["release"] = self._release["release"]
        if self._did:
            self._say("done", text)
            self._notify("done", text, last)
        if self._waits_for:
            self._say("waiting", f"no training yet: {self._waits_for}")
        settings = self.compiled.retrain or {}
        if settings.get("commit") and self._release and self._release["state"] == "accepted":
            lines = "\n".join(self._causes)
            self._record["uncommitted"] = f"{self.name}: {text}\n\n{lines}\n"
            self._state()
        self._commit()

    def _failed(self, failure: Event, last: dict[str, Any], now: float) -> None:
        same = self._started_with.is_as(self._stuck)
        self._failures = self._failures + 1 if same else 1
        self._stuck = self._started_with
        self._is_held = bool(failure.get("vanished"))
        self.exit_code = failure["exit_code"]
        state = "held" if self._is_held else "failed"
        text = failure["message"]
        if failure["exit_code"] != InterruptedRun.exit_code:
            self._record["training_since"] = None
        self._record["last"] = {**last, "state": state, "text": text, "hint": failure["hint"]}
        self._problem = text
        if not self._is_held:
            self._taken = None
            self._retry_at = now + retry_after(self._failures, self._pace)
        else:
            self._is_accepted()  # what was accepted earlier is not this
        self._say(state, f"{text}\n  {failure['hint']}" if failure["hint"] else text)
        if self._failures == 1:
            self._notify(state, text, last)

    # --- looking

    def _look(self, now: float) -> Scan | None:
        """Scans, and follows a recipe or a folder that is another one; None where it may not."""
        self._check_recipe(now)
        try:
            found = scan.of(self.space.root, self.compiled, self._pace.settle_s)
            self._watch_folders()
        except OSError as error:
            what = f"{error.strerror or error}: {error.filename}"
            self._scanned_at = 0.0
            if self._problem != what:
                self._say("failed", f"the sources cannot be looked at: {what}")
            self._problem = what
            self._next_scan = now + self._pace.poll_s
            self.exit_code = 3
            return None
        if self._scan is not None and not found.is_as(self._scan) and self._batch is None:
            self._batch = Batch(now, now)
        if not self._is_held and not self._failures:
            self._problem = ""
        self._scan, self._scanned_at = found, now
        self._check_listening(found)
        often = self._is_polling or found.missing or self._is_held
        self._next_scan = now + (self._pace.poll_s if often else self._pace.rescan_s)
        if self._recipe_waits:
            self._next_scan = now + self._pace.settle_s
        return found

    @property
    def _is_polling(self) -> bool:
        return self._arrivals is None or bool(self._arrivals.why_polling)

    def _watch_folders(self) -> None:
        """Listens to the folders that there are now: others, or mounted anew, are listened to."""
        if not self._listens:
            return
        folders = scan.folders(self.space.root, self.path, self.compiled)
        if folders == self._folders and self._arrivals is not None:
            return
        if self._arrivals is not None:
            self._arrivals.close()
        self._folders = folders
        wanted = {(folder, below) for folder, below, _, _ in folders}
        self._arrivals = Arrivals(wanted, self.space.artifacts)
        why = self._arrivals.why_polling
        self._record["watching"] = f"a scan every {self._pace.poll_s:.0f} s: {why}" if why else ""
        if why:
            self._say("polling", self._record["watching"])

    def _check_listening(self, found: Scan) -> None:
        """Scans more often where the system does not tell of some of the folders."""
        arrivals = self._arrivals
        if arrivals is None or arrivals.why_polling:
            return
        if arrivals.lacks({path.rpartition(os.sep)[0] for path in found.files}):
            self._poll("the system watches no more folders (on Linux: fs.inotify.max_user_watches)")

    def _poll(self, why: str) -> None:
        """Nothing that is told is relied on any more."""
        assert self._arrivals is not None
        self._arrivals.why_polling = why
        self._record["watching"] = f"a scan every {self._pace.poll_s:.0f} s: {why}"
        self._say("polling", self._record["watching"])

    def _check_recipe(self, now: float) -> None:
        """Reads the recipe again where it changed; keeps the last good one where that is broken.

        A run with the recipe as it was is ended to start anew, but for one that trains.
        """
        seen = self._recipe_signatures()
        self._recipe_waits = False
        if seen == self._recipe_seen:
            return
        if seen != self._recipe_new:
            self._recipe_new, self._recipe_new_at = seen, now
        ages = [look.age_s(one, time.time_ns()) for one in seen if one is not None]
        is_young = min(ages, default=float("inf")) < self._pace.settle_s / 4
        # An editor may take the file away for a moment before it puts the new one there.
        if is_young or (None in seen and now < self._recipe_new_at + self._pace.settle_s):
            self._recipe_waits = True
            if self._process is None:
                self._batch = self._batch or Batch(now, now)
            return
        self._recipe_seen = seen
        try:
            compiled, _ = self._opened()
        except (RunnerError, OSError) as error:
            problem = error.message if isinstance(error, RunnerError) else str(error)
            self._record["recipe_problem"] = problem
            self._say("recipe", f"{problem}\n  the recipe as it was before goes on")
            self._state()
            return
        was_broken = bool(self._record["recipe_problem"])
        self._record["recipe_problem"] = ""
        if compiled.name != self.name:
            text = f"the recipe is called {compiled.name} now; start the watch again"
            self._record["recipe_problem"] = text
            self._say("recipe", text)
            self._state()
            return
        before = self._coming or self.compiled
        if json.dumps(compiled.plain()) == json.dumps(before.plain()):
            if was_broken:
                self._say("recipe", "the recipe is mended, and is as it was before")
                self._state()
            return
        text = "the recipe is mended, and has changed" if was_broken else "the recipe has changed"
        if self._process is None:
            self._say("recipe", text)
            self._adopt(compiled, now)
            return
        self._coming = compiled
        if self._trains:
            self._say("recipe", f"{text}; {GOES_ON}")
        else:
            self._say("recipe", f"{text}; the run under way ends and starts anew with it")
            self._process.stop()
        self._state()

    def _adopt(self, compiled: Compiled, now: float) -> None:
        """Goes on with another recipe."""
        self.compiled, self._coming = compiled, None
        self._wants, self._failures, self._stuck, self._taken = True, 0, None, None
        self._batch = self._batch or Batch(now, now)
        # The recipe itself may be another one again by now; which files it extends is new.
        self._recipe_seen = (*self._recipe_seen[:1], *self._recipe_signatures()[1:])

    def _recipe_signatures(self) -> tuple[look.Signature | None, ...]:
        found: list[look.Signature | None] = []
        for path in scan.recipe_files(self.path, self.compiled):
            try:
                found.append(look.signature(str(path)))
            except OSError:
                found.append(None)
        return tuple(found)

    def _opened(self) -> tuple[Compiled, Workspace]:
        with opened.at(self.path, self._asked_root, self._overrides) as current:
            return current.compiled, current.workspace

    def _is_accepted(self) -> bool:
        try:
            return self.folder.is_accepted()
        except OSError:
            return False  # a folder that cannot be used does not end a watch

    def _accept(self) -> None:
        self._accepts, self._wants, self._is_held = True, True, False
        self._failures, self._stuck = 0, None
        self._say("accepted", "what is gone is meant to be gone; going on without it")

    def _is_training(self, stage: str) -> bool:
        return any(s.name == stage and s.kind == "train" for s in self.compiled.steps)

    # --- saying

    def heartbeat(self) -> None:
        """One line that says that it is alive, and what it waits for."""
        self._tell(self.name, {"event": "heartbeat", "text": self._record["text"]})

    def _state(self, state: str = "") -> None:
        """Writes down what `runner status` says."""
        record, found = self._record, self._scan
        if found is not None:
            record["files"] = len(found.files)
            changed = found.changed_since(self._taken)
            record["queue"] = changed if self._taken else 0
            aside = [{"path": path, "reason": why} for path, why in sorted(found.aside.items())]
            record["aside"] = aside[: work.BAD_FILES_MAX]
        if not state:
            state = "waiting" if self._batch or self._wants else "idle"
            if self._process is not None:
                state = "running"
            elif self._is_held:
                state = "held"
            elif self._failures or self._problem:
                state = "failed"
        record["state"] = state
        record["next"] = self._next()
        record["text"] = _text(record, self._problem)
        self.folder.write(dict(record))

    def _next(self) -> dict[str, Any] | None:
        wall = time.time() - time.monotonic()
        if self._batch is not None:
            last = self._batch.last + max(self._pace.quiet_s, self._pace.settle_s)
            at = wall + min(last, self._batch.first + self._pace.longest_s)
            return {"at": round(at), "why": "files have come"}
        if self._retry_at is not None:
            return {"at": round(wall + self._retry_at), "why": "the last run failed"}
        if self._waits_for:
            at_clock = round(self._train_at) if self._train_at is not None else None
            return {"at": at_clock, "why": self._waits_for}
        return None

    def _say(self, state: str, text: str) -> None:
        self._log.info("%s: %s", state, text)
        self._tell(self.name, {"event": "watch", "state": state, "text": text})

    def _warn(self, text: str) -> None:
        self._say("warning", text)

    def _notify(self, state: str, text: str, last: dict[str, Any]) -> None:
        settings = (self.compiled.retrain or {}).get("notify") or {}
        notice = {"recipe": self.name, "state": state, "text": text, **last}
        thread = notify.start(settings, notice, self._warn)
        if thread is not None:
            self._notices = [one for one in self._notices if one.is_alive()] + [thread]

    def _commit(self) -> None:
        message = self._record["uncommitted"]
        if message is None:
            return
        problem = committed.lockfile(self.path.with_suffix(".lock"), message)
        if problem:
            self._warn(f"the lockfile could not be committed: {problem}")
        self._record["uncommitted"] = None


def _line(event: Event) -> str:
    """The event as a line of the log, or nothing."""
    match event["event"]:
        case "stage_started":
            return f"{event['stage']}: runs, because {'; '.join(event['causes'])}"
        case "stage_finished":
            return f"{event['stage']}: done in {event['seconds']} s"
        case "warning" | "verdict":
            return f"{event.get('stage', event['event'])}: {event['text']}"
    return ""


def _text(record: Record, problem: str) -> str:
    """The state as one line."""
    files = f"{record['files']:,} files"
    text = {
        "running": "a run is under way",
        "waiting": f"{record['queue']:,} changes wait until it is quiet",
        "idle": "everything is up to date",
        "stopped": "the watch has ended",
    }.get(record["state"], problem or record["state"])
    parts = [files, text]
    if record["state"] == "idle" and record["next"]:
        parts[1] = f"no training yet: {record['next']['why']}"
    if record["bad"] or record.get("aside"):
        count = len(record["bad"]) + len(record.get("aside", ()))
        parts.append(f"{count:,} cannot be read")
    if record["recipe_problem"]:
        parts.append("the recipe is broken")
    return " · ".join(parts)
