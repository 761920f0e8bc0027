"""One run: the stages of a plan, one after the other, each recorded before the next one starts.

The order of a commit: the output is written in the store's `tmp`, synced and renamed into place;
then the fact goes into the store, then into the lockfile, then the link that people follow. A run
that ends anywhere leaves the previous state or the next one, and the same command goes on from
there.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from runner import disk
from runner.engine import (
    child,
    commit,
    environment,
    events,
    facts,
    key,
    lock,
    log,
    plan,
    release,
    reports,
    store,
    worker,
)
from runner.engine.facts import Made
from runner.engine.opened import Opened
from runner.engine.plan import Choice, Planned
from runner.engine.recipe import Step
from runner.errors import DriftError, InterruptedRun, PreconditionError, RunnerError
from runner.model import source

REPLANS = 3
"""How often a run plans again because what it was planned from changed meanwhile."""


def run(
    current: Opened,
    planned: tuple[Planned, ...],
    choice: Choice,
    listen: Callable[[events.Event], None],
) -> None:
    """Carries out a plan; raises what ended it."""
    started = time.strftime("%Y%m%d-%H%M%S")
    folder = current.workspace.runs / f"{started}-{os.getpid()}-{current.compiled.name}"
    reported = reports.Reports(folder, current.compiled.steps)
    with events.Log(folder / "events.jsonl", listen, reported) as log:
        names = [step.name for step in current.compiled.steps]
        log.add({"event": "run_started", "recipe": current.compiled.name, "stages": names})
        current.elsewhere.warn = lambda text: log.add({"event": "warning", "text": text})
        state = "failed"
        try:
            for attempt in range(REPLANS):
                try:
                    with store.staging(current.workspace) as staging:
                        one = Run(current, choice, log, folder, staging)
                        one.stages(planned)
                    break
                except _PlanAgain as changed:
                    # What was forced and has run is not run a second time: it may be a training.
                    left = plan.names(current.compiled, choice.force) - one.ran
                    choice = choice._replace(force=tuple(sorted(left)))
                    if attempt == REPLANS - 1:
                        raise changed.error from None
                    planned = current.plan(choice)
                    text = f"{changed.error.message}; planning again"
                    log.add({"event": "warning", "text": text})
            release.consider(current, log.add, decides=not choice.locked)
            state = "done"
        except KeyboardInterrupt:
            state = "interrupted"
            raise InterruptedRun(
                "interrupted; what was finished is kept", hint="run the same command to continue"
            ) from None
        except InterruptedRun:
            state = "interrupted"
            raise
        except RunnerError as error:
            with contextlib.suppress(OSError):  # a full disk
                log.add({"event": "error", "message": error.message, "hint": error.hint})
            raise
        except (OSError, sqlite3.OperationalError) as error:
            raise disk.full(error, current.workspace.artifacts) or error from error
        finally:
            with contextlib.suppress(OSError):
                log.add({"event": "run_finished", "state": state})
                events.write_metrics_csv(folder / "events.jsonl", folder / "metrics.csv")


class _PlanAgain(Exception):
    """What the plan was made from is not as it was."""

    def __init__(self, error: RunnerError) -> None:
        super().__init__(error.message)
        self.error = error


class _BaseChanged(RunnerError):
    """The base model is not the one that the stage was planned with."""


class Run:
    """The stages of a plan, each decided anew, now that what it reads is there."""

    def __init__(
        self, current: Opened, choice: Choice, log: events.Log, folder: Path, staging: Path
    ) -> None:
        self._current = current
        self._choice = choice
        self._log = log
        self._folder = folder
        self._staging = staging
        self._done: dict[str, Planned] = {}
        self._meanwhile: dict[str, Path] = {}
        """Outputs that are not kept, and where they are as long as this runs."""
        self.ran: set[str] = set()

    def stages(self, foreseen: tuple[Planned, ...]) -> None:
        from runner.stages.ingest import SourceChanged

        _pin(self._current)
        for before in foreseen:
            step = before.step
            world = self._current.world(self._choice)
            planned = plan.decide(step, self._done, world, before.sources or None)
            if planned.state == "restore" and not self._restored(planned):
                planned = plan.decide(step, self._done, world, before.sources or None)
            if planned.problem is not None:
                raise planned.problem
            if planned.state == "skip":
                commit.output(self._current, planned)
                if not planned.is_left_out and not step.transient:
                    self._add("stage_skipped", planned, output=planned.output)
            elif planned.state != "restore":
                self._check_inputs(planned)
                try:
                    planned = self._stage(planned)
                    self.ran.add(step.name)
                except SourceChanged as error:
                    raise _PlanAgain(error) from error
            self._done[step.name] = planned
            commit.keep_elsewhere(self._current, planned)

    def _stage(self, planned: Planned) -> Planned:
        """Runs one stage and records its output."""
        step, space = planned.step, self._current.workspace
        assert planned.parts is not None
        stage_key = key.of(planned.parts)
        log.debug("%s: key %s from %s", step.name, stage_key, planned.parts)
        self._add("stage_started", planned, causes=[cause.text for cause in planned.causes])
        started = time.monotonic()
        env = environment.of(step)
        scratch = space.scratch / stage_key[:32]
        job = job_of(
            self._current,
            planned,
            {name: self._place(done.output or "") for name, done in self._done.items()},
            output=self._fresh(step.name),
            scratch=scratch,
            previous=_previous(self._current, planned),
        )

        has_read_base = False

        def emit(event: events.Event) -> None:
            nonlocal has_read_base
            self._log.add({**event, "stage": step.name})
            if event["event"] == "metrics" and not has_read_base:
                # It computes, so it has read the base model: what becomes of that now is no matter.
                self._check_base(planned)
                has_read_base = True

        try:
            if step.own_process:
                child.end_orphan(scratch, emit)
                metrics = child.run(
                    job, step, emit, self._folder / f"{step.name.replace('/', '-')}.log"
                )
            else:
                metrics = worker.run(job, emit)
            self._check_base(planned, has_read_it=has_read_base)
        except _BaseChanged:
            disk.remove(scratch)
            raise
        output = self._published(step, Path(job.output))
        seconds = round(time.monotonic() - started, 3)
        made = Made(
            stage=step.name,
            output=output,
            parts=planned.parts,
            rebuilds=step.rebuilds,
            seconds=seconds,
            bytes=disk.size(self._place(output)),
            made_at=round(time.time(), 3),
            metrics=metrics,
            env=env,
        )
        facts.write(space, made, staged=self._staging / "fact")
        self._compare(planned, output)
        finished = Planned(step, "skip", (), planned.parts, output, planned.sources)
        commit.output(self._current, finished)
        for path in (scratch, *worker.lock_of(scratch)):
            disk.remove(path)
        self._add("stage_finished", planned, output=output, seconds=seconds, metrics=metrics)
        return finished

    def _published(self, step: Step, staged: Path) -> str:
        """Puts a finished output where those that read it find it; its hash."""
        if not step.transient:
            return store.publish(self._current.workspace, staged)
        output = store.content_hash(staged)
        self._meanwhile[output] = staged
        return output

    def _place(self, output: str) -> Path:
        return self._meanwhile.get(output) or store.path_of(self._current.workspace, output)

    def _restored(self, planned: Planned) -> bool:
        """Fetches the output from the remote cache; False where what came was not it."""
        assert planned.parts is not None
        assert planned.output is not None
        space, elsewhere = self._current.workspace, self._current.elsewhere
        staged = self._fresh(planned.step.name)
        if not elsewhere.fetch(planned.output, staged):
            return False
        output = store.publish(space, staged)
        for made in elsewhere.of_key(key.of(planned.parts)):
            if made.output == output:
                facts.write(space, made, staged=self._staging / "fact")
        commit.output(self._current, planned)
        size = disk.size(store.path_of(space, output))
        self._add("stage_restored", planned, output=output, bytes=size, origin=elsewhere.name)
        return True

    def _check_inputs(self, planned: Planned) -> None:
        """Compares what the stage will read with its hash, so that no damage becomes a fact.

        A damaged output is removed, so that the next plan makes it again; a trained model never is.
        """
        space = self._current.workspace
        for name in planned.step.inputs.values():
            output = self._done[name].output or ""
            store.use(space, output)
            path = self._place(output)
            if store.content_hash(path) == output:
                continue
            if not self._done[name].step.rebuilds:
                raise plan.damaged(name, path)
            disk.remove(path)
            raise _PlanAgain(RunnerError(f"the output of {name} was damaged and is made again"))
        if planned.parent is not None:
            self._check_parent(planned.step.name, planned.parent)

    def _check_parent(self, name: str, parent: str) -> None:
        """Fetches the model that a training goes on from, and compares it with its hash."""
        space = self._current.workspace
        path = store.path_of(space, parent)
        if not release.fetched(self._current, parent):
            raise PreconditionError(
                f"{name} continues from the model {parent[:12]}, which could not be fetched",
                hint="try again, or go back to another release with `runner rollback`",
            )
        store.use(space, parent)
        if store.content_hash(path) != parent:
            raise plan.damaged("the training that is continued", path)

    def _check_base(self, planned: Planned, *, has_read_it: bool = False) -> None:
        """Compares the base model with what was planned, so that no change of it becomes a fact.

        One that comes after the stage has read it is only said.
        """
        assert planned.parts is not None
        if not planned.step.uses_base_model:
            return
        world = self._current.world(self._choice)
        if world.base_problem is not None and not has_read_it:
            raise world.base_problem  # it cannot be asked now; checkpoints are kept
        if world.base_model == planned.parts.get("base_model"):
            return
        name = planned.step.name
        if not has_read_it:
            raise _BaseChanged(
                f"the base model changed while {name} ran; what it made is not kept",
                hint="run the same command again when nothing writes to the base model",
            )
        text = f"the base model changed after {name} had read it; {name} is of the old one"
        self._log.add({"event": "warning", "stage": name, "text": text})

    def _compare(self, planned: Planned, output: str) -> None:
        """What is made again must come out as it was."""
        if planned.output in (None, output):
            return
        if self._choice.locked:
            raise DriftError(
                f"{planned.step.name} gave {output[:12]}, and the lockfile says"
                f" {str(planned.output)[:12]}",
                hint="apply without --locked to go on with the new one",
            )
        text = (
            f"the same settings and inputs gave another output ({output[:12]}) than before"
            f" ({str(planned.output)[:12]}); `runner plan` shows whether versions changed"
        )
        self._log.add({"event": "warning", "stage": planned.step.name, "text": text})

    def _fresh(self, name: str) -> Path:
        """A new empty folder to write an output in."""
        folder = self._staging / name
        disk.remove(folder)
        folder.mkdir(parents=True)
        return folder

    def _add(self, kind: str, planned: Planned, **more: object) -> None:
        self._log.add({"event": kind, "stage": planned.step.name, **more})


def job_of(
    current: Opened,
    planned: Planned,
    outputs: Mapping[str, Path],
    *,
    output: Path,
    scratch: Path,
    previous: lock.Fact | None,
) -> worker.Job:
    """What a stage is to do, reading what those above it gave (stage name → folder)."""
    step, space = planned.step, current.workspace
    return worker.Job(
        entry=step.entry,
        recipe=current.compiled.name,
        seed=step.seed or 0,
        inputs={kind: str(outputs[name]) for kind, name in step.inputs.items()},
        sources=planned.sources,
        base_model=str(current.base_path()) if step.uses_base_model else None,
        output=str(output),
        scratch=str(scratch),
        cache=str(space.cache),
        previous=str(store.path_of(space, previous.output)) if previous else None,
        parent=str(store.path_of(space, planned.parent)) if planned.parent else None,
        replay=(planned.parts or {}).get("replay", 0.0),
    )


def _previous(current: Opened, planned: Planned) -> lock.Fact | None:
    """The stage's last output, where it differs from the one to make by what it was made from.

    Its content is checked: damage must not be carried into new outputs.
    """
    before = lock.read(current.lock_path).of_stage(planned.step.name)
    if before is None or planned.parts is None:
        return None
    then, now = (
        {name: value for name, value in parts.items() if name not in ("sources", "inputs")}
        for parts in (before.parts, planned.parts)
    )
    if then != now or not store.is_whole(current.workspace, before.output):
        return None
    return before


def _pin(current: Opened) -> None:
    """Asks the hub once which commit the base model is, and writes it down."""
    spec = current.compiled.base_model
    wanted = any(step.uses_base_model for step in current.compiled.steps)
    if spec is None or not wanted or not source.on_hub(spec, current.workspace.root):
        return
    locked = lock.read(current.lock_path)
    if locked.commit_of(spec) is None:
        pin = lock.Pin(spec, source.latest_commit(spec))
        lock.write(current.lock_path, locked._replace(pins=(pin,)))
