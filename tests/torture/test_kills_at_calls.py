"""R2: SIGKILL just before every call that changes the disk, of a first apply and of a next one."""

from __future__ import annotations

import signal

import pytest

from tests.torture import faults
from tests.torture.faults import Scene, Warm

PARTS = faults.often(1, 8)


def _killed_everywhere(scene: Scene, warm: Warm, part: int) -> None:
    calls = [call for call in scene.calls if not faults.reading(call)]
    chosen = faults.picked(calls, 12)[part::PARTS]
    broken: dict[str, list[str]] = {}
    killed = 0
    for call in chosen:
        scene.space.restore(scene.saved)
        result = warm.runner("apply", scene.space.recipe, strace=faults.killed_at(call))
        killed += result.code == -signal.SIGKILL
        if found := scene.broken(result, warm, (0, -signal.SIGKILL)):
            broken[str(call)] = found
    faults.must_hold(broken, len(chosen))
    assert killed >= 0.9 * len(chosen)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_first_run_killed_at_any_call_goes_on_next_time(
    first_run: Scene, warm: Warm, part: int
) -> None:
    _killed_everywhere(first_run, warm, part)


@pytest.mark.parametrize("part", range(PARTS))
def test_a_next_run_killed_at_any_call_goes_on_next_time(
    next_run: Scene, warm: Warm, part: int
) -> None:
    _killed_everywhere(next_run, warm, part)
