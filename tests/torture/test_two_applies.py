"""R8: two applies at once, and what a killed one leaves behind."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.torture import faults
from tests.torture.faults import Space, Warm


def _space(root: Path) -> tuple[Space, bytes]:
    """A workspace to work on, and the lockfile that it will have."""
    space = faults.make(root)
    assert faults.run("apply", space.recipe).code == 0
    after = space.locked() or b""
    space.clear()
    return space, after


def _ran(result: faults.Ended) -> list[str]:
    events = [json.loads(line) for line in result.out.splitlines()]
    return [event["stage"] for event in events if event["event"] == "stage_started"]


def _stopped_amid_a_stage(space: Space) -> Any:
    """An apply that holds the workspace and does not go on."""
    process = faults.started("apply", space.recipe, "--json")
    for line in process.stdout:
        if json.loads(line)["event"] == "stage_started":
            break
    os.kill(process.pid, signal.SIGSTOP)
    return process


@pytest.mark.parametrize("part", range(faults.often(1, 4)))
def test_of_two_applies_at_once_one_runs_and_the_other_waits_and_skips(
    tmp_path: Path, warm: Warm, part: int
) -> None:
    space, after = _space(tmp_path)
    chance = random.Random(part)
    broken: dict[str, list[str]] = {}
    pairs = faults.often(2, 5)
    for pair in range(pairs):
        space.clear()
        first = faults.started("apply", space.recipe, "--json")
        time.sleep(chance.random() * 0.1)
        second = faults.started("apply", space.recipe, "--json")
        results = [faults.ended(first), faults.ended(second)]
        found = [what for result in results for what in faults.clean_ending(result, [0])]
        ran = sorted(len(_ran(result)) for result in results if result.code == 0)
        if ran != [0, 4]:
            found.append(f"stages run by the two: {ran}")
        found += faults.torn(space) + faults.recovers(space, after, warm)
        if found:
            broken[f"pair {pair} of part {part}"] = found
    faults.must_hold(broken, pairs)


def test_no_wait_exits_4_at_once_while_another_apply_works(tmp_path: Path) -> None:
    space, after = _space(tmp_path)
    holder = _stopped_amid_a_stage(space)
    try:
        result = faults.run("apply", space.recipe, "--no-wait")
    finally:
        os.kill(holder.pid, signal.SIGCONT)
        holder.communicate()
    assert faults.clean_ending(result, [4]) == []
    assert "another apply" in result.err
    assert holder.returncode == 0
    assert space.locked() == after


def test_the_lock_of_a_killed_apply_needs_no_hand(tmp_path: Path, warm: Warm) -> None:
    space, after = _space(tmp_path)
    holder = _stopped_amid_a_stage(space)
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    result = faults.run("apply", space.recipe, "--no-wait")
    assert faults.clean_ending(result, [0]) == []
    assert faults.recovers(space, after, warm) == []


def test_looking_takes_no_lock(tmp_path: Path) -> None:
    space, _ = _space(tmp_path)
    holder = _stopped_amid_a_stage(space)
    try:
        results = [faults.run(command, space.recipe) for command in ("plan", "status")]
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    assert [faults.clean_ending(result, [0]) for result in results] == [[], []]
