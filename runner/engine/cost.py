"""What a plan will cost: files to read, time by what it took last, and room on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner import disk
from runner.engine import facts, key, plan, store, words
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
    """Of one stage: source files to read, seconds it took last, and what it writes.

    `bytes_there` were written by an interrupted run and are not written again.
    """

    stage: str
    files: int
    seconds: float | None
    written: tuple[Written, ...]
    bytes_there: int = 0

    @property
    def bytes_kept(self) -> int:
        return sum(one.bytes for one in self.written if not one.temporary)

    @property
    def bytes_meanwhile(self) -> int:
        temporary = sum(one.bytes for one in self.written if one.temporary)
        return max(0, temporary - self.bytes_there)


@dataclass(frozen=True)
class Room:
    """A disk that a run writes to: what it has free, and what the run needs there at one time."""

    place: Path
    free: int
    needed: int

    @property
    def is_enough(self) -> bool:
        return self.needed + disk.MARGIN_BYTES <= self.free

    @property
    def is_nearly_full(self) -> bool:
        return self.needed > FULL_FROM * self.free


def of(current: Opened, planned: Sequence[Planned]) -> tuple[Cost, ...]:
    """The cost of each stage that would run, may run, or is restored."""
    if all(one.state in ("skip", "blocked") for one in planned):
        return ()  # what stages say of themselves takes longer to load than such a plan
    return tuple(_costs(current, planned))


def rooms(current: Opened, costs: Sequence[Cost]) -> tuple[Room, ...]:
    """The disks that are written to: one, or two where the store has a disk of its own."""
    cached = sum(one.bytes for cost in costs for one in cost.written if one.once)
    kept = sum(cost.bytes_kept for cost in costs) - cached
    meanwhile = max((cost.bytes_meanwhile for cost in costs), default=0)
    space = current.workspace
    artifacts, shared = disk.existing(space.artifacts), disk.existing(space.store)
    if artifacts.stat().st_dev == shared.stat().st_dev:
        needed = {shared: kept + cached + meanwhile}
    else:
        needed = {shared: kept, artifacts: cached + meanwhile}
    return tuple(
        Room(place, shutil.disk_usage(place).free, count) for place, count in needed.items()
    )


def check(current: Opened, planned: Sequence[Planned], listen: Callable[[Event], None]) -> None:
    """Raises PreconditionError where it does not fit on the disk; warns where it nearly does."""
    costs = of(current, planned)
    for room in rooms(current, costs):
        if not room.is_enough:
            raise PreconditionError(
                f"the disk at {room.place} has {words.size(room.free)} free, and this run writes"
                f" about {words.size(room.needed)}: {_sum(costs)}",
                hint="free some space (`runner gc` shows what may go), or have it keep and export"
                " less",
            )
        if room.is_nearly_full:
            free = f"{words.size(room.free)} are free at {room.place}"
            text = f"this run writes about {words.size(room.needed)}, and {free}"
            listen({"event": "warning", "text": text})


def checkpoints_that_fit(current: Opened, stage: str) -> tuple[int, int] | None:
    """The size of one checkpoint of a training, and how many more of them the disk has room for."""
    from runner.stages import parsed

    world = current.world()
    step, planned = current.compiled.step(stage), plan.whole(current.compiled, world)
    sizes = {one.step.name: _size_of(current, one, world) for one in planned}
    (one,) = (one for one in planned if one.step == step)
    each = parsed(step.entry).checkpoint_bytes(_sizes(current, one, sizes, world))
    if not each:
        return None
    free = shutil.disk_usage(disk.existing(current.workspace.artifacts)).free
    return each, max(0, (free - disk.MARGIN_BYTES) // each)


def _costs(current: Opened, planned: Sequence[Planned]) -> Iterator[Cost]:
    from runner.stages import parsed

    world = current.world()
    sizes: dict[str, int | None] = {}  # of outputs, as they are or will be
    written_once: set[str] = set()
    for one in planned:
        step = one.step
        sizes[step.name] = _size_of(current, one, world)
        if one.state in ("run", "maybe"):
            scratch, last = _scratch(current, one), plan.last_made(step, world)
            all_written = parsed(step.entry).writes_bytes(_sizes(current, one, sizes, world))
            written = tuple(each for each in all_written if each.what not in written_once)
            written_once |= {each.what for each in written if each.once}
            there = disk.size(scratch) if scratch.is_dir() else 0
            cost = Cost(step.name, _to_read(one), last.seconds if last else None, written, there)
            sizes[step.name] = sum(w.bytes for w in written if not w.temporary and not w.once)
            yield cost
        elif one.state == "restore":
            yield Cost(step.name, 0, None, (_copy(one, sizes[step.name]),))


def _copy(one: Planned, size: int | None) -> Written:
    from runner.stages.stage import Written

    if size is None:
        return Written("a copy from the remote cache, of a size that is not known", 0)
    return Written("a copy from the remote cache", size)


def _sizes(
    current: Opened, one: Planned, known: Mapping[str, int | None], world: plan.World
) -> Sizes:
    """What is known of the sizes that a stage's output depends on; `known` are those of others."""
    from runner.stages.stage import Sizes

    step = one.step
    inputs = {kind: size for kind, name in step.inputs.items() if (size := known[name])}
    base = _base(current, world) if step.uses_base_model else None
    return Sizes(
        inputs=inputs,
        sources=sum(_file_size(file.path) for file in one.sources),
        previous=_size_of(current, one, world),
        base_model=base,
        base_converted=base is not None and _is_converted(current, base),
    )


def _size_of(current: Opened, one: Planned, world: plan.World) -> int | None:
    """The size of an output as it is, or as the stage's last one was."""
    if one.output is not None and store.holds(current.workspace, one.output):
        return disk.size(store.path_of(current.workspace, one.output))
    if one.state == "restore" and one.parts is not None:
        stage_key = key.of(one.parts)
        there = facts.of_output(current.workspace, stage_key, str(one.output))
        found = [there] if there else world.elsewhere.of_key(stage_key)
        return next((made.bytes for made in found if made.output == one.output), None)
    last = plan.last_made(one.step, world)
    return last.bytes if last else None


def _file_size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0  # gone since it was listed; the run says so


def _scratch(current: Opened, one: Planned) -> Path:
    """Where an interrupted run of the stage left what it goes on from."""
    stage_key = key.of(one.parts) if one.parts else "unknown"
    return current.workspace.scratch / stage_key[:32]


def _is_converted(current: Opened, base: Path) -> bool:
    """Whether the cache has the folder that model/load.py makes of a `.gguf`, by its content."""
    if not base.is_file():
        return False
    digest = current.state.hashes([str(base)])[str(base)]
    return (current.workspace.cache / f"{digest[:16]}-bf16").is_dir()


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
    parts = []
    for cost in costs:
        found = [f"{one.what} {words.size(one.bytes)}" for one in cost.written if one.bytes]
        if found and cost.bytes_there:
            found.append(f"less {words.size(cost.bytes_there)} that are there already")
        if found:
            parts.append(f"{cost.stage}: {', '.join(found)}")
    return "; ".join(parts)
