"""R7: SIGINT, SIGTERM and SIGHUP at random times of an apply, its first 100 ms among them."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.torture import faults
from tests.torture.faults import Ended, Space, Warm

TIMES = faults.often(3, 30)
ENDED_OR_INTERRUPTED = (0, 75)


def _violations(result: Ended, number: signal.Signals, *, at_work: bool) -> list[str]:
    """Before the command is at work a signal may end it as it ends every program.

    Python itself prints a traceback for ctrl-C while it starts, before any of our code runs.
    """
    if at_work:
        return faults.clean_ending(result, ENDED_OR_INTERRUPTED)
    if "Traceback" in result.err and f"{faults.REPOSITORY / 'runner'}/" not in result.err:
        return []
    return faults.clean_ending(result, (*ENDED_OR_INTERRUPTED, -number))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_time_ends_in_order_and_the_next_apply_goes_on(
    tmp_path: Path, warm: Warm, number: signal.Signals
) -> None:
    space: Space = faults.make(tmp_path)
    seconds = faults.timed(space)
    after = space.locked() or b""
    chance = random.Random(number)
    broken: dict[str, list[str]] = {}
    for turn in range(TIMES):
        space.clear()
        moment = chance.uniform(0, 0.1 if turn % 3 == 0 else seconds)
        process = faults.started("apply", space.recipe)
        time.sleep(moment)
        at_work = space.artifacts.exists()
        process.send_signal(number)
        result = faults.ended(process)
        found = _violations(result, number, at_work=at_work)
        found += faults.torn(space) + faults.recovers(space, after, warm)
        if found:
            broken[f"{number.name} after {moment:.3f} s of {seconds:.3f} s"] = found
    faults.must_hold(broken, TIMES)


@pytest.mark.parametrize("part", range(faults.often(1, 4)))
def test_a_signal_while_stages_run_ends_in_order_and_the_next_apply_goes_on(
    tmp_path: Path, warm: Warm, part: int
) -> None:
    space = faults.make(tmp_path)
    begun = time.monotonic()
    assert warm.runner("apply", space.recipe).code == 0
    seconds = time.monotonic() - begun
    after = space.locked() or b""
    chance = random.Random(part)
    broken: dict[str, list[str]] = {}
    for turn in range(TIMES):
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[turn % 3]
        space.clear()
        pid = warm.begin(faults.RUNNER, ["apply", str(space.recipe)])
        warm.go()
        moment = chance.uniform(0, seconds)
        time.sleep(moment)
        at_work = space.artifacts.exists()
        warm.send(pid, number)
        result = warm.wait(pid)
        found = _violations(result, number, at_work=at_work)
        found += faults.torn(space) + faults.recovers(space, after, warm)
        if found:
            broken[f"{number.name} after {moment:.4f} s of {seconds:.4f} s"] = found
    faults.must_hold(broken, TIMES)
