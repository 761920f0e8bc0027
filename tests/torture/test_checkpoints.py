"""R1, R2, R3 and R15 for checkpoints: each save and each prune is whole or has not happened."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from runner.model import checkpoint
from tests.torture import faults, saving
from tests.torture.faults import Call, Ended, Warm

SAVING = "tests.torture.saving:main"
STEPS = 5
VALUES = 200
PARTS = faults.often(1, 4)
KILLS = faults.often(12, 200)
MANY_VALUES = 750_000
"""Of a real training's size: 18 MB a checkpoint, so that a kill lands amid its writing."""


@dataclass(frozen=True)
class Saved:
    """What an undisturbed loop leaves, and its calls."""

    folder: Path
    tree: dict[str, bytes]
    calls: list[Call]
    log: Path


def _tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def undisturbed(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("saving")
    result = warm.call(SAVING, str(root / "learnt"), 2, 10, learn=True)
    assert result.code == 0, result.err
    folder, log = root / "scratch", root / "calls"
    strace = faults.logging(log, (*faults.CHANGING, *faults.OPENING))
    result = warm.call(SAVING, str(folder), STEPS, VALUES, strace=strace)
    assert result.code == 0, result.err
    return Saved(folder, _tree(folder), faults.calls_of(log, [folder]), log)


def _lost(folder: Path, result: Ended) -> list[str]:
    """What a process that died has damaged, or had committed and lost."""
    whole, damaged = checkpoint.published(folder)
    found = [f"{path.name} is not whole" for path in damaged]
    steps = {one.step for one in whole}
    committed = [int(line) for line in result.out.split("\n")[:-1]]
    best = sorted(committed, key=lambda step: (saving.loss(step), step))[: saving.KEEP_BEST]
    for step in {*committed[-1:], *best} - steps:
        # A later one, published but not yet told of, may have taken its place among the best.
        if step not in best or not any(saving.loss(n) < saving.loss(step) for n in steps - {*best}):
            found += [f"step {step} was committed and is not there; there are {sorted(steps)}"]
    newest = whole[-1:]
    if any(not checkpoint.can_resume(one) for one in newest):
        found.append("one cannot go on from the newest checkpoint")
    for one in newest:
        try:
            checkpoint.state_of(one)
        except checkpoint.DamagedCheckpoint as error:
            found.append(f"the state to go on from is damaged: {error}")
    return found


def _continues(folder: Path, warm: Warm, tree: dict[str, bytes]) -> list[str]:
    result = warm.call(SAVING, str(folder), STEPS, VALUES)
    found = [f"next start: {what}" for what in faults.clean_ending(result, [0])]
    now = _tree(folder)
    if not found and now != tree:
        names = sorted(name for name in now.keys() | tree.keys() if now.get(name) != tree.get(name))
        found.append(f"after the next run these files are others: {names}")
    return found + [f"left behind: {path.name}" for path in folder.glob(".*")]


@pytest.mark.parametrize("part", range(PARTS))
def test_a_training_killed_at_any_call_of_its_saving_loses_no_checkpoint(
    undisturbed: Saved, warm: Warm, part: int
) -> None:
    calls = [call for call in undisturbed.calls if not faults.reading(call)]
    chosen = faults.picked(calls, 12)[part::PARTS]
    broken: dict[str, list[str]] = {}
    for call in chosen:
        shutil.rmtree(undisturbed.folder)
        strace = faults.killed_at(call)
        result = warm.call(SAVING, str(undisturbed.folder), STEPS, VALUES, strace=strace)
        found = faults.clean_ending(result, [-signal.SIGKILL])
        found += _lost(undisturbed.folder, result)
        found += _continues(undisturbed.folder, warm, undisturbed.tree)
        if found:
            broken[str(call)] = found
    faults.must_hold(broken, len(chosen))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES"])
def test_a_failing_call_of_a_training_that_saves_loses_no_checkpoint(
    undisturbed: Saved, warm: Warm, error: str, for_ever: bool, part: int
) -> None:
    calls = [call for call in undisturbed.calls if not faults.reading(call)]
    if error in ("EROFS", "EACCES"):
        calls = [c for c in calls if c.name not in ("write", "fsync", "fdatasync", "ftruncate")]
    if for_ever:
        calls = [call for call in calls if call.name != "write"]  # not even a message comes out
    chosen = faults.picked(calls, 3)[part::PARTS]
    broken: dict[str, list[str]] = {}
    for call in chosen:
        shutil.rmtree(undisturbed.folder)
        strace = faults.failing_at(call, error, for_ever=for_ever)
        result = warm.call(SAVING, str(undisturbed.folder), STEPS, VALUES, strace=strace)
        found = faults.clean_ending(result)
        found += _lost(undisturbed.folder, result)
        found += _continues(undisturbed.folder, warm, undisturbed.tree)
        if found:
            broken[f"{error} at {call}"] = found
    faults.must_hold(broken, len(chosen))


@pytest.mark.parametrize("part", range(faults.often(1, 4)))
def test_a_training_killed_at_random_times_of_its_saving_loses_no_checkpoint(
    undisturbed: Saved, warm: Warm, tmp_path: Path, part: int
) -> None:
    chance = random.Random(part)
    begun = time.monotonic()
    assert warm.call(SAVING, str(tmp_path / "timed"), 3, MANY_VALUES).code == 0
    seconds = time.monotonic() - begun
    broken: dict[str, list[str]] = {}
    folder = tmp_path / "scratch"
    committed: list[int] = []
    kills = KILLS // faults.often(1, 4)
    for kill in range(kills):
        pid = warm.begin(SAVING, [str(folder), 10_000, MANY_VALUES])
        warm.go()
        time.sleep(seconds * chance.random())
        warm.send(pid, signal.SIGKILL)
        result = warm.wait(pid)
        committed += [int(line) for line in result.out.split("\n")[:-1]]
        found = faults.clean_ending(result, [-signal.SIGKILL])
        said = "".join(f"{step}\n" for step in committed)
        found += _lost(folder, Ended(result.code, said, ""))
        if found:
            broken[f"kill {kill} of part {part}"] = found
    assert committed
    faults.must_hold(broken, kills)


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(undisturbed: Saved) -> None:
    durable = faults.Durable()
    wrong = []
    published = 0
    newest = ""
    for call in undisturbed.calls:
        if call.name == "fsync" and f"<{undisturbed.folder}>" in call.text:
            newest = ""
        if names := faults.renamed(call.text):
            old, new = map(Path, names)
            if re.fullmatch(r"step-\d+", new.name):
                published += 1
                wrong += [f"not synced at {call}: {path}" for path in durable.below(str(old))]
                newest = new.name
            elif re.fullmatch(r"step-\d+", old.name) and newest:
                wrong.append(f"{newest} may vanish yet, and {call} removes an older one")
        durable.add(call)
    assert wrong == []
    assert published == STEPS
