"""What changed between the lockfile of another version in git and the one that is here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runner.engine import facts, gc, lock, plan
from runner.engine.opened import Opened
from runner.engine.words import escaped, shown
from runner.errors import PreconditionError

MEASURED = (int, float)


@dataclass(frozen=True)
class Change:
    """Of one stage: `output` says whether it gives something else; `causes` is every difference."""

    stage: str
    output: str
    causes: tuple[plan.Cause, ...]
    metrics: dict[str, tuple[Any, Any]]


def since(current: Opened, revision: str) -> list[Change]:
    """The stages that differ from what the lockfile said in that commit, branch or tag."""
    world = current.world()
    then = lock.parsed(_at(current, revision), f"{revision}:{current.lock_path.name}")
    found = []
    for step in current.compiled.steps:
        old, new = then.of_stage(step.name), world.lock.of_stage(step.name)
        if old == new:
            continue
        if old is None or new is None:
            word = "new" if old is None else "gone"
            found.append(Change(step.name, word, (), {}))
            continue
        word = "same output" if old.output == new.output else "another output"
        if old.parts == new.parts:
            word = "another output from the same"
        causes = plan.why(step, new.parts, old, world)
        found.append(Change(step.name, word, causes, _metrics(current, old, new)))
    names = {step.name for step in current.compiled.steps}
    left = dict.fromkeys(fact.stage for fact in then.facts if fact.stage not in names)
    return found + [Change(name, "gone", (), {}) for name in left]


def records(changes: Sequence[Change]) -> list[dict[str, Any]]:
    return [
        {**asdict(change), "causes": [cause._asdict() for cause in change.causes]}
        for change in changes
    ]


def text(changes: Sequence[Change], revision: str) -> str:
    if not changes:
        return f"nothing changed since {escaped(revision)}"
    lines = []
    width = max(len(change.stage) for change in changes)
    for change in changes:
        because = "; ".join(cause.text for cause in change.causes)
        measured = ", ".join(
            f"{name.replace('_', ' ')} {_number(was)} → {_number(now)}"
            for name, (was, now) in change.metrics.items()
        )
        parts = [part for part in (because, measured) if part]
        lines.append(
            f"{change.stage:{width}}  {change.output}{': ' if parts else ''}{'; '.join(parts)}"
        )
    return "\n".join(map(escaped, lines))


def _metrics(current: Opened, old: lock.Fact, new: lock.Fact) -> dict[str, tuple[Any, Any]]:
    """What both runs measured and came out different, where the store still knows both."""
    made = [facts.of_output(current.workspace, one.key, one.output) for one in (old, new)]
    before, after = (one.metrics if one else {} for one in made)
    both = [
        name
        for name in before
        if isinstance(before[name], MEASURED) and isinstance(after.get(name), MEASURED)
    ]
    return {name: (before[name], after[name]) for name in both if before[name] != after[name]}


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _at(current: Opened, revision: str) -> bytes:
    """The lockfile's bytes in that revision."""
    name = current.lock_path.name
    hint = f"name a commit, branch or tag: `runner diff {current.path} main`, say"
    # git reads nothing from a name that begins with `-`, and an empty one would be its index.
    asked = ("rev-parse", "--verify", "--end-of-options", f"{revision or '-'}^{{commit}}")
    code, commit, said = _git(current, *asked)
    if code:
        what = f"git knows no version {shown(revision)} of {current.path}"
        if "not a git repository" in said:
            what = f"{current.path} is in no git repository, so there is no other version of it"
        elif "dubious ownership" in said:
            what = f"git does not trust this repository: {said}"
        raise PreconditionError(what, hint=hint)
    code, data, said = _git(current, "cat-file", "blob", f"{commit.decode().strip()}:./{name}")
    if code:
        raise PreconditionError(
            f"there is no {name} in {shown(revision)}",
            hint="commit it with its recipe; or " + hint,
        )
    return data


def _git(current: Opened, *arguments: str) -> tuple[int, bytes, str]:
    """git's exit code, its answer, and the first line of what it says besides."""
    folder = current.lock_path.absolute().parent
    try:
        command = ["git", "-C", str(folder), *arguments]
        kept = {name: text for name, text in os.environ.items() if name not in gc.LOCATIONS}
        environment = {**kept, "LC_ALL": "C"}
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
    except FileNotFoundError:
        raise PreconditionError("git is not installed", hint="install it to compare") from None
    said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
    return done.returncode, done.stdout, said
