"""R1: kill -9 at random times, again and again, with a new source before each run."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import workspaces
from tests.torture import faults
from tests.torture.faults import Ended, Space, Warm

ROUNDS = faults.often(8, 20)
BATCHES = faults.often(1, 50)


@dataclass(frozen=True)
class Story:
    """What undisturbed runs write while sources are added one by one."""

    final: bytes
    lines: frozenset[bytes]
    seconds: float
    fork_seconds: float


def _add(space: Space, number: int) -> None:
    texts = [f"{what} {number}.{n}" for n in range(3) for what in ("asked", "said")]
    workspaces.chat(space.root / "chats" / f"added-{number}.json", *texts)


@pytest.fixture(scope="session")
def story(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Story:
    space = faults.make(tmp_path_factory.mktemp("story"))
    lines: set[bytes] = set()
    fork_seconds = 0.0
    for number in range(ROUNDS):
        _add(space, number)
        begun = time.monotonic()
        assert warm.runner("apply", space.recipe).code == 0
        fork_seconds = time.monotonic() - begun
        lines.update((space.locked() or b"").splitlines(keepends=True))
    final = space.locked() or b""
    space.clear()
    return Story(final, frozenset(lines), faults.timed(space), fork_seconds)


def _torn(space: Space, story: Story) -> list[str]:
    found = faults.torn(space)
    lines = (space.locked() or b"").splitlines(keepends=True)
    unknown = [line for line in lines if line not in story.lines]
    return found + [f"no undisturbed run writes this line: {line!r}" for line in unknown]


def _batch(
    root: Path, story: Story, warm: Warm, kill: Callable[[Space, float], Ended], seed: int
) -> int:
    """Kills in one workspace, then a run in peace; how many came before the end."""
    chance = random.Random(seed)
    space = faults.make(root)
    broken: dict[str, list[str]] = {}
    killed = 0
    for number in range(ROUNDS):
        _add(space, number)
        result = kill(space, chance.random())
        killed += result.code == -signal.SIGKILL
        found = faults.clean_ending(result, (0, -signal.SIGKILL)) + _torn(space, story)
        if found:
            broken[f"batch {seed}, kill {number}"] = found
    if found := faults.recovers(space, story.final, warm):
        broken[f"batch {seed}, the run after"] = found
    faults.must_hold(broken, ROUNDS)
    return killed


@pytest.mark.parametrize("batch", range(BATCHES))
def test_an_apply_killed_at_random_times_tears_nothing(
    tmp_path: Path, story: Story, warm: Warm, batch: int
) -> None:
    def kill(space: Space, moment: float) -> Ended:
        process = faults.started("apply", space.recipe)
        time.sleep(story.seconds * moment)
        process.kill()
        return faults.ended(process)

    assert _batch(tmp_path, story, warm, kill, batch) >= ROUNDS // 2


@pytest.mark.parametrize("batch", range(BATCHES))
def test_the_work_of_an_apply_killed_at_random_times_tears_nothing(
    tmp_path: Path, story: Story, warm: Warm, batch: int
) -> None:
    def kill(space: Space, moment: float) -> Ended:
        pid = warm.begin(faults.RUNNER, ["apply", str(space.recipe)])
        warm.go()
        time.sleep(story.fork_seconds * moment)
        warm.send(pid, signal.SIGKILL)
        return warm.wait(pid)

    assert _batch(tmp_path, story, warm, kill, 1000 + batch) >= ROUNDS // 3
