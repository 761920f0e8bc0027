"""What a plan will cost: files to read, time by what it took last, and room on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner import disk
from runner.engine import plan, store, words
from runner.engine.events import Event
from runner.engine.opened import Opened
from runner.engine.plan import Planned
from runner.errors import PreconditionError
from runner.model import source

if TYPE_CHECKING:
    from runner.stages.stage import Sizes, Written

FULL_FROM = 0.8
"""A run that fills more of the free space than this is warned about."""


@dataclass(frozen=True)
class Cost:
    """Of one stage: source files to read, seconds it took last, and what it writes."""

    stage: str
    files: int
    seconds: float | None
    written: tuple[Written, ...]

    @property
    def bytes_kept(self) -> int:
        return sum(one.bytes for one in self.written if not one.temporary)

    @property
    def bytes_meanwhile(self) -> int:
        return sum(one.bytes for one in self.written if one.temporary)


def of(current: Opened, planned: Sequence[Planned]) -> tuple[Cost, ...]:
    """The cost of each stage that would run, may run, or is restored."""
    return tuple(_costs(current, planned))


def check(current: Opened, planned: Sequence[Planned], listen: Callable[[Event], None]) -> None:
    """Raises PreconditionError where it does not fit on the disk; warns where it nearly does."""
    costs = of(current, planned)
    kept = sum(cost.bytes_kept for cost in costs)
    meanwhile = max((cost.bytes_meanwhile for cost in costs), default=0)
    space = current.workspace
    artifacts, shared = disk.existing(space.artifacts), disk.existing(space.store)
    if artifacts.stat().st_dev == shared.stat().st_dev:
        places = [(shared, kept + meanwhile)]
    else:
        places = [(shared, kept), (artifacts, meanwhile)]
    for place, needed in places:
        free = shutil.disk_usage(place).free
        if needed + disk.MARGIN_BYTES > free:
            raise PreconditionError(
                f"the disk at {place} has {words.size(free)} free, and this run writes about"
                f" {words.size(needed)}: {_sum(costs)}",
                hint="free some space (`runner gc` shows what may go), or have it keep and export"
                " less",
            )
        if needed > FULL_FROM * free:
            sizes = f"{words.size(needed)}, and {words.size(free)} are free at {place}"
            listen({"event": "warning", "text": f"this run writes about {sizes}"})


def checkpoints_that_fit(current: Opened, stage: str) -> tuple[int, int] | None:
    """The size of one checkpoint of a training, and how many more of them the disk has room for."""
    from runner.stages import parsed

    step = current.compiled.step(stage)
    each = parsed(step.entry).checkpoint_bytes(_sizes(current, step.name, current.plan()))
    if not each:
        return None
    free = shutil.disk_usage(disk.existing(current.workspace.artifacts)).free
    return each, max(0, (free - disk.MARGIN_BYTES) // each)


def _costs(current: Opened, planned: Sequence[Planned]) -> Iterator[Cost]:
    from runner.stages import parsed
    from runner.stages.stage import Written

    world = current.world()
    for one in planned:
        step = one.step
        last = plan.last_made(step, world)
        if one.state in ("run", "maybe"):
            written = parsed(step.entry).writes_bytes(_sizes(current, step.name, planned))
            yield Cost(step.name, _to_read(one), last.seconds if last else None, written)
        elif one.state == "restore":
            size = last.bytes if last and last.output == one.output else 0
            yield Cost(step.name, 0, None, (Written("a copy from the remote cache", size),))


def _sizes(current: Opened, stage: str, planned: Sequence[Planned]) -> Sizes:
    """What is known of the sizes that a stage's output depends on."""
    from runner.stages.stage import Sizes

    world = current.world()
    by_name = {one.step.name: one for one in planned}
    step = by_name[stage].step
    inputs = {}
    for kind, name in step.inputs.items():
        size = _size_of(current, by_name[name], world)
        if size is not None:
            inputs[kind] = size
    sources = sum(Path(file.path).stat().st_size for file in by_name[stage].sources)
    return Sizes(inputs, sources, _size_of(current, by_name[stage], world), _base(current, world))


def _size_of(current: Opened, one: Planned, world: plan.World) -> int | None:
    """The size of an output as it is, or as the stage's last one was."""
    if one.output is not None and store.holds(current.workspace, one.output):
        return disk.size(store.path_of(current.workspace, one.output))
    last = plan.last_made(one.step, world)
    return last.bytes if last else None


def _base(current: Opened, world: plan.World) -> Path | None:
    """The base model's folder or file, where it is on this machine."""
    spec, root = current.compiled.base_model, current.workspace.root
    if spec is None or world.base_model is None:
        return None
    if source.on_hub(spec, root):
        return source.cached(spec, world.base_model.rpartition("@")[2])
    return source.path_of(spec, root)


def _to_read(one: Planned) -> int:
    """How many source files are read: those that are new or changed, or all of them."""
    for cause in one.causes:
        if cause.reason == "sources" and isinstance(cause.new, dict) and len(one.causes) == 1:
            return int(cause.new["added"] + cause.new["changed"])
    return len(one.sources)


def _sum(costs: Sequence[Cost]) -> str:
    parts = [
        f"{cost.stage}: {one.what} {words.size(one.bytes)}"
        for cost in costs
        for one in cost.written
        if one.bytes
    ]
    return "; ".join(parts)
