"""A plan for people and programs: what would run, why, what it costs, and what has drifted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runner.engine import cost, execute, plan, words
from runner.engine.cost import Cost, Room
from runner.engine.opened import Opened
from runner.engine.plan import Choice, Planned
from runner.engine.words import escaped

STATES = {
    "run": "run",
    "maybe": "run unless nothing changes above",
    "restore": "restore",
    "blocked": "cannot run",
}


SHOWN_BYTES = 1_000_000
"""Less than this is no cost worth a word."""


@dataclass(frozen=True)
class Shown:
    """A plan with all that is said about it."""

    planned: tuple[Planned, ...]
    costs: Mapping[str, Cost]
    rooms: tuple[Room, ...]
    drift: Mapping[str, Mapping[str, tuple[str, str]]]
    extends: str | None
    overrides: tuple[str, ...]
    memory: tuple[str, ...]
    """What the trainings that would run need of it."""
    unsettled: tuple[str, ...]
    """Stages whose known output is not the one that the lockfile and the links name now."""


def shown(current: Opened, choice: Choice) -> Shown:
    """The plan, its costs, and drift of the stages that stay as they are."""
    world = current.world(choice)
    planned = plan.whole(current.compiled, world)
    kept = (one for one in planned if one.state == "skip")
    drift = {one.step.name: found for one in kept if (found := plan.drift(one, world))}
    costs = cost.of(current, planned)
    return Shown(
        planned,
        {one.stage: one for one in costs},
        cost.rooms(current, costs) if costs else (),
        drift,
        current.compiled.extends,
        current.compiled.overrides,
        tuple(_memory(current, planned)),
        tuple(execute.pending(current, planned, choice)),
    )


def _memory(current: Opened, planned: Sequence[Planned]) -> Iterator[str]:
    running = (one.step for one in planned if one.state in ("run", "maybe"))
    trainings = [step.name for step in running if step.kind == "train"]
    if trainings:
        from runner.ui import doctor

        yield from doctor.lines(current, trainings)


def record(shown: Shown) -> list[dict[str, Any]]:
    """One object a stage."""
    return [
        {
            "stage": one.step.name,
            "state": one.state,
            "causes": [cause._asdict() for cause in one.causes],
            "problem": one.problem.message if one.problem else None,
            "output": one.output,
            "is_current": one.step.name not in shown.unsettled,
            "cost": _cost_record(shown.costs.get(one.step.name)),
            "drift": shown.drift.get(one.step.name, {}),
        }
        for one in shown.planned
    ]


def text(shown: Shown) -> str:
    """The stages that would run, each with its causes and cost; the others are one line."""
    return "\n".join(map(escaped, _lines(shown)))


def _lines(shown: Shown) -> Iterator[str]:
    if shown.extends:
        yield f"extends {shown.extends}"
    for override in shown.overrides:
        yield f"with --set {override}"
    width = max(len(one.step.name) for one in shown.planned)
    for one in shown.planned:
        if one.state != "skip":
            causes = "; ".join(cause.text for cause in one.causes)
            price = _price(shown.costs.get(one.step.name))
            yield f"{one.step.name:{width}}  {STATES[one.state]}: {causes}{price}"
    skipped = [one for one in shown.planned if one.state == "skip"]
    left_out = _stages([one for one in skipped if one.is_left_out], shown.planned)
    known = _stages([one for one in skipped if not one.is_left_out], shown.planned)
    if known and (left_out or len(skipped) < len(shown.planned)):
        yield f"nothing to do for {', '.join(known)}"
    elif known and shown.unsettled:
        names = ", ".join(shown.unsettled)
        yield f"nothing to run; the lockfile and the links change to what is known of {names}"
    elif known:
        yield "nothing to do"
    if left_out:
        yield f"left as made last: {', '.join(left_out)}"
    for room in shown.rooms:
        if room.needed >= SHOWN_BYTES or not room.is_enough:
            sizes = f"{words.size(room.needed)}; {words.size(room.free)} are free"
            full = "" if room.is_enough else ": too little, and apply will refuse"
            yield f"in all about {sizes} at {room.place}{full}"
    yield from shown.memory
    for stage, drift in shown.drift.items():
        what = ", ".join(f"{name} {then} → {now}" for name, (then, now) in drift.items())
        yield f"{stage} was made with others: {what} (`rerun_on: [env]` would make it count)"


def _stages(some: Sequence[Planned], planned: Sequence[Planned]) -> list[str]:
    """Their names; that of the stage alone, where all of its parts are among them."""
    others = {one.step.stage for one in planned} - {
        stage
        for stage in {one.step.stage for one in some}
        if all(one in some for one in planned if one.step.stage == stage)
    }
    names = (one.step.name if one.step.stage in others else one.step.stage for one in some)
    return list(dict.fromkeys(names))


def _price(cost: Cost | None) -> str:
    if cost is None:
        return ""
    parts = []
    if cost.files:
        parts.append(f"{cost.files:,} {'file' if cost.files == 1 else 'files'} to read")
    if cost.seconds is not None:
        parts.append(f"last time {words.duration(cost.seconds)}")
    if cost.bytes_kept >= SHOWN_BYTES:
        parts.append(f"about {words.size(cost.bytes_kept)}")
    if cost.bytes_meanwhile >= SHOWN_BYTES:
        parts.append(f"{words.size(cost.bytes_meanwhile)} more while it runs")
    parts += [one.what for one in cost.written if not one.bytes]
    return f" ({', '.join(parts)})" if parts else ""


def _cost_record(cost: Cost | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    return {
        "files": cost.files,
        "seconds": cost.seconds,
        "bytes": cost.bytes_kept,
        "bytes_meanwhile": cost.bytes_meanwhile,
        "written": [asdict(one) for one in cost.written],
    }
