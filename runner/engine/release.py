"""Which model is the current one, for a recipe with `retrain:`: the last that the gate let through.

A release is a line of the lockfile, and `artifacts/<recipe>/current` leads to what it names. A new
model takes its place unless it is worse: by its loss on the same eval conversations, by what it
forgot, or by a rule of the recipe that it keeps no more. One that is worse stays where it was made,
and `promote` takes it all the same; `rollback` goes back to an earlier release.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from runner import disk
from runner.engine import commit, key, lineage, lock, opened, store
from runner.engine.lock import Lock, Release
from runner.engine.opened import Opened
from runner.engine.recipe import CURRENT
from runner.errors import PreconditionError, RecipeError

USUAL_SHARE = 0.5
"""Of replies: a rule counts as kept from here on, where the recipe does not ask for more."""


class Verdict(NamedTuple):
    """What became of a model, in words; `number` is the current release after it."""

    is_accepted: bool
    number: int
    text: str

    def event(self) -> dict[str, Any]:
        state = "accepted" if self.is_accepted else "kept aside"
        return {"event": "release", "state": state, "release": self.number, "text": self.text}


class Compared(NamedTuple):
    """What a new model was found to be beside the current one, and what of it is worse."""

    found: tuple[str, ...]
    worse: tuple[str, ...]


def is_settled(current: Opened) -> bool:
    """Whether what was made last is decided on, and the link leads to the current release."""
    if current.compiled.retrain is None or current.aside:
        return True
    locked = lock.read(current.lock_path)
    return not _is_undecided(current, locked) and _is_linked(current, locked)


def consider(
    current: Opened, listen: Callable[[dict[str, Any]], None], *, decides: bool = True
) -> Verdict | None:
    """Makes what was made last the current release, or keeps it aside; None where that is decided.

    Each model is judged once. With `decides` false only the link is made to say what the lockfile
    does. Nothing happens where the recipe has no `retrain:`, or a part of it is still to be made.
    """
    if current.compiled.retrain is None or current.aside:
        return None
    locked = lock.read(current.lock_path)
    verdict = None
    if decides and _is_undecided(current, locked):
        verdict = _decided(current, locked)
    _link(current)
    if verdict is not None:
        listen(verdict.event())
    return verdict


def promote(current: Opened) -> Verdict:
    """Makes what was made last the current release, whatever the gate has against it."""
    locked = lock.read(current.lock_path)
    made, release = _made(current, locked), locked.release
    if not any(name in made for name in _trainings(current)):
        raise PreconditionError(
            f"nothing was trained yet by {current.path}", hint=f"runner apply {current.path}"
        )
    if release is not None and made == release.outputs:
        _link(current)
        text = f"release {release.number} is what was made last already"
        return Verdict(True, release.number, text)
    _fetch(current, made, "what was made last")
    compared = _compared(current, release.outputs if release else {}, made)
    number = _add(current, locked, made)
    against = f", although {'; '.join(compared.worse)}" if compared.worse else ""
    place = f" takes the place of release {release.number}" if release else " is the current one"
    return Verdict(True, number, f"release {number}{place}{against}")


def rollback(current: Opened, number: int | None = None) -> Verdict:
    """Makes an earlier release the current one again: the one before, or that of the number."""
    locked = lock.read(current.lock_path)
    release = locked.release
    if release is None:
        raise RecipeError(
            f"{current.path} has no release to go back from", hint=f"runner apply {current.path}"
        )
    wanted = _numbered(locked, number) if number is not None else _before(locked, release)
    if wanted is None:
        there = ", ".join(str(one) for one in sorted({r.number for r in _accepted(locked)}))
        what = f"no release {number}" if number is not None else "no release before this one"
        raise RecipeError(f"there is {what} of {current.path}", hint=f"there are {there}")
    if wanted.outputs == release.outputs:
        _link(current)
        text = f"release {release.number} is the same as release {wanted.number} already"
        return Verdict(True, release.number, text)
    _fetch(current, wanted.outputs, f"release {wanted.number}")
    new = Release(_highest(locked) + 1, wanted.outputs, wanted.models, origin=wanted.number)
    lock.write(current.lock_path, locked._replace(releases=(*locked.releases, new)))
    _link(current)
    text = f"release {new.number} is release {wanted.number} again, instead of {release.number}"
    return Verdict(True, new.number, text)


def fetched(current: Opened, output: str) -> bool:
    """Whether the artifact is in the store, after the remote cache was asked for what is not."""
    space = current.workspace
    if store.holds(space, output):
        return True
    if not current.elsewhere.holds(output):
        return False
    with store.staging(space) as staging:
        folder = staging / "output"
        folder.mkdir()
        return current.elsewhere.fetch(output, folder) and store.publish(space, folder) == output


# What was made, and whether it was decided on


def _made(current: Opened, locked: Lock) -> dict[str, str]:
    """The last model and what was made of just that, by stage; in the order of the recipe.

    What was made of another model, or not at all, is missing.
    """
    found: dict[str, str] = {}
    fitting: dict[str, str] = {}  # the same with what is not kept
    of_models = _of_models(current)
    for step in current.compiled.steps:
        fact = locked.of_stage(step.name)
        read = {kind: name for kind, name in step.inputs.items() if name in of_models}
        if fact is None or not (read or step.kind == "train"):
            continue
        inputs = fact.parts.get("inputs", {})
        if all(fitting.get(name) == inputs.get(kind) for kind, name in read.items()):
            fitting[step.name] = fact.output
            if not step.transient:
                found[step.name] = fact.output
    return found


def _of_models(current: Opened) -> set[str]:
    """The trainings, and all steps that read what comes of them."""
    found: set[str] = set()
    for step in current.compiled.steps:
        if step.kind == "train" or found & set(step.inputs.values()):
            found.add(step.name)
    return found


def _trainings(current: Opened) -> list[str]:
    return [step.name for step in current.compiled.steps if step.kind == "train"]


def _is_undecided(current: Opened, locked: Lock) -> bool:
    """Whether all is there of a model that was not accepted, kept aside or gone back from."""
    made, release = _made(current, locked), locked.release
    kept = {step.name for step in current.compiled.steps if not step.transient}
    trainings = _trainings(current)
    if not trainings or made.keys() != _of_models(current) & kept:
        return False
    if release is None:
        return True
    if made == release.outputs:
        return False
    judged = [*trainings, *_evaluations(current)]
    if any(one.kept_aside and _same(one.outputs, made, judged) for one in locked.releases):
        return False
    left = range(release.origin + 1, release.number) if release.origin is not None else ()
    passed_over = [one for one in _accepted(locked) if one.number in left]
    return _same(release.outputs, made, trainings) or not any(
        _same(one.outputs, made, trainings) for one in passed_over
    )


def _same(one: Mapping[str, str], other: Mapping[str, str], stages: list[str]) -> bool:
    return all(one.get(stage) == other.get(stage) for stage in stages)


def _evaluations(current: Opened) -> list[str]:
    return [step.name for step in current.compiled.steps if step.kind == "evaluate"]


# The gate


def _decided(current: Opened, locked: Lock) -> Verdict:
    made, release = _made(current, locked), locked.release
    if release is None:
        number = _add(current, locked, made)
        return Verdict(True, number, f"release {number}: the first model of {current.path.name}")
    if _same(release.outputs, made, _trainings(current)):
        number = _add(current, locked, made)
        text = f"release {number}: the model of release {release.number}, with what was made anew"
        return Verdict(True, number, text)
    compared = _compared(current, release.outputs, made)
    if compared.worse:
        aside = Release(release.number, made, kept_aside=True)
        lock.write(current.lock_path, locked._replace(releases=(*locked.releases, aside)))
        text = (
            f"the new model is kept aside, release {release.number} stays:"
            f" {'; '.join(compared.worse)} (`runner promote {current.path}` takes it all the same)"
        )
        return Verdict(False, release.number, text)
    number = _add(current, locked, made)
    text = f"release {number} takes the place of release {release.number}"
    return Verdict(True, number, f"{text}: {'; '.join(compared.found)}")


def _compared(current: Opened, before: Mapping[str, str], made: Mapping[str, str]) -> Compared:
    """The two models by the reports of the evaluate stages that both have."""
    retrain = current.compiled.retrain or {}
    found: list[str] = []
    worse: list[str] = []
    for stage in _evaluations(current):
        if stage not in before or stage not in made or not fetched(current, before[stage]):
            continue
        old, new = (store.path_of(current.workspace, of[stage]) for of in (before, made))
        loss, is_worse = _losses_compared(old, new, retrain.get("max_loss_increase", 0.0))
        (worse if is_worse else found).append(loss)
        worse += _lost(_report(old), _report(new))
    if not found and not worse:
        has_any = bool(_evaluations(current))
        found.append(
            "its measurements cannot be compared: one of the two is missing"
            if has_any
            else "nothing was measured, because the recipe has no evaluate stage"
        )
    return Compared(tuple(found), tuple(worse))


def _losses_compared(old: Path, new: Path, most: float) -> tuple[str, bool]:
    """In words, and whether it is worse: means per token over what both have measured alike."""
    before, after = _losses(old), _losses(new)
    same = [id for id in before if id in after and before[id][1] == after[id][1]]
    weight = sum(before[id][1] for id in same)
    if not weight:
        return "no eval conversation was measured with both models", False
    was, now = (sum(losses[id][0] for id in same) / weight for losses in (before, after))
    change = now / was - 1 if was else 0.0
    noun = "conversation" if len(same) == 1 else "conversations"
    text = f"eval loss {was:.3f} → {now:.3f} ({change:+.1%}) on the same {len(same)} {noun}"
    is_worse = now > was * (1 + most)
    return f"{text}, {most:.1%} more are allowed" if is_worse else text, is_worse


def _lost(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What the new model knows or keeps no more."""
    forgot, before = new.get("forgetting"), old.get("forgetting")
    most = new.get("max_forgetting", float("inf"))
    if forgot is not None and forgot > most and (before is None or forgot > before):
        was = f", the current model {before:+.1%}" if before is not None else ""
        yield (
            f"its loss on general text is {forgot:+.1%} of the base model's{was}; {most:.1%} are"
            " allowed"
        )
    asked = new.get("min_shares", {})
    old_shares, new_shares = (report["tuned"]["rules"] for report in (old, new))
    for name in sorted(old_shares.keys() & new_shares.keys()):
        least = asked.get(name) or USUAL_SHARE
        if new_shares[name] < least <= old_shares[name]:
            yield f"{name}: in {old_shares[name]:.0%} of replies before, {new_shares[name]:.0%} now"


def _losses(report: Path) -> dict[str, tuple[float, float]]:
    """Summed loss and weight of each eval conversation; nothing where it was not noted yet."""
    path = report / "losses.jsonl"
    if not path.exists():
        return {}
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {one["conversation"]: (one["nll"], one["weight"]) for one in records}


def _report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


# Releases


def _add(current: Opened, locked: Lock, made: dict[str, str]) -> int:
    """A release of what was made last; its number."""
    models = {}
    for name in _trainings(current):
        fact = locked.of_stage(name)
        if fact is not None and name in made:
            models[name] = lineage.shape(fact.parts)
            if "parent" in fact.parts:
                models[name]["parent"] = fact.parts["parent"]
    new = Release(_highest(locked) + 1, made, models)
    lock.write(current.lock_path, locked._replace(releases=(*locked.releases, new)))
    _link(current)
    return new.number


def _accepted(locked: Lock) -> list[Release]:
    return [one for one in locked.releases if not one.kept_aside]


def _highest(locked: Lock) -> int:
    return max((one.number for one in _accepted(locked)), default=0)


def _numbered(locked: Lock, number: int) -> Release | None:
    """The release of that number; of several, as clones make them, one that is not current."""
    found = tuple(one for one in _accepted(locked) if one.number == number)
    others = tuple(one for one in found if one != locked.release)
    return Lock(releases=others or found).release


def _before(locked: Lock, release: Release) -> Release | None:
    """The release before this one with another model or other results; before the one that a
    rollback went back to, so that two of them go back twice."""
    number = release.origin if release.origin is not None else release.number
    while number > 1:
        number -= 1
        found = _numbered(locked, number)
        if found is not None and found.outputs != release.outputs:
            return _numbered(locked, found.origin) if found.origin is not None else found
    return None


def _fetch(current: Opened, outputs: Mapping[str, str], what: str) -> None:
    for stage, output in outputs.items():
        if not fetched(current, output):
            raise PreconditionError(
                f"{what} cannot be had: the output {output[:12]} of {stage} is not in the store",
                hint="put it back from a copy, or name another release",
            )


def refuse_without_retrain(current: Opened) -> None:
    """Raises RecipeError where the recipe has no releases to choose from."""
    if current.compiled.retrain is None:
        raise RecipeError(
            f"{current.path} has no `retrain:`, and so no releases: what was made last counts",
            hint="add `retrain: {}` to the recipe, and apply it",
        )


# The link for people


def _link(current: Opened) -> None:
    """Has `current` lead to what the current release names, at one blow; the folder before goes."""
    locked = lock.read(current.lock_path)
    release = locked.release
    if release is None or _is_linked(current, locked):
        return
    opened.claim(current)
    folder = _folder(current, release)
    disk.make_folder(folder)
    for output in release.outputs.values():
        fetched(current, output)
    for link, target in _links(current, release):
        disk.make_folder(link.parent)
        disk.point(link, target)
    disk.point(current.links / CURRENT, folder)
    for other in current.links.glob(f".{CURRENT}-*"):
        if other != folder:
            disk.remove(other)


def _is_linked(current: Opened, locked: Lock) -> bool:
    """Whether `current` leads to all of the current release that is in the store."""
    release = locked.release
    if release is None:
        return True
    folder = _folder(current, release)
    return disk.points(current.links / CURRENT, folder) and all(
        disk.points(link, target) for link, target in _links(current, release)
    )


def _links(current: Opened, release: Release) -> Iterator[tuple[Path, Path]]:
    """The links in the release's folder to what there is of it."""
    for name, output in release.outputs.items():
        artifact = store.path_of(current.workspace, output)
        if artifact.is_dir():
            yield from commit.links(_folder(current, release), name, artifact)


def _folder(current: Opened, release: Release) -> Path:
    outputs = hashlib.sha256(key.canonical(release.outputs).encode()).hexdigest()
    return current.links / f".{CURRENT}-{release.number}-{outputs[:8]}"
