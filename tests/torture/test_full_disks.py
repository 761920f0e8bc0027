"""R4: disks of forty sizes, disks that fill up in a run, full recipe folders, limited files."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable

import pytest

from tests import workspaces
from tests.torture import faults
from tests.torture.faults import Ended, Scene, Space, Warm

PARTS = faults.often(1, 4)
PAGE = 4096
NO_ROOM = (3,)
"""The exit code where the disk is full."""


@pytest.fixture(scope="module")
def larger(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A first run whose outputs are larger than the database and the logs."""
    root = tmp_path_factory.mktemp("larger")
    for number in range(40):
        texts = [f"{word} {number} " * 40 for word in ("asked", "said", "more", "and on")]
        workspaces.chat(root / "space" / "chats" / f"long-{number}.json", *texts)
    return faults.scene(root, warm, again=False)


def _judged(scene: Scene, warm: Warm, result: Ended) -> list[str]:
    """What does not hold after a run on a disk that was too small, once it is larger."""
    found = faults.clean_ending(result, (0, *NO_ROOM))
    if result.code and "disk" not in result.err + result.out:
        found.append(f"it does not say what is full: {result.err[:200]!r}")
    if scene.space.locked() not in scene.versions:
        found.append("the lockfile is no version of an undisturbed run")
    found += faults.torn(scene.space)
    faults.grow(scene.space.artifacts)
    return found + faults.recovers(scene.space, scene.after, warm)


def _on_a_small_disk(scene: Scene, warm: Warm, size: int, inodes: int = 0) -> tuple[int, list[str]]:
    """An apply on such a disk: its exit code, and what does not hold after it."""
    scene.space.restore(scene.saved)
    with faults.small_disk(scene.space.artifacts, size, inodes):
        result = faults.run("apply", scene.space.recipe)
        return result.code, _judged(scene, warm, result)


def _fitting(scene: Scene, warm: Warm) -> int:
    """A size of a disk, not much too large, on which the run ends well."""
    size = 256 * PAGE
    while _on_a_small_disk(scene, warm, size)[0] != 0:
        size *= 2
    return size


@pytest.mark.parametrize("part", range(PARTS))
def test_a_disk_too_small_is_a_sentence_and_the_next_apply_goes_on_when_there_is_room(
    larger: Scene, warm: Warm, part: int
) -> None:
    count = faults.often(3, 40)
    fits = _fitting(larger, warm)
    sizes = [PAGE + (fits - PAGE) * n // (count - 1) // PAGE * PAGE for n in range(count)]
    broken: dict[str, list[str]] = {}
    codes = set()
    for size in {*sizes[part::PARTS], PAGE, fits}:
        code, found = _on_a_small_disk(larger, warm, size)
        codes.add(code)
        if found:
            broken[f"{size // 1024} KiB of {fits // 1024}"] = found
    faults.must_hold(broken, len(sizes))
    assert codes == {0, *NO_ROOM}


@pytest.mark.parametrize("part", range(PARTS))
def test_a_disk_that_takes_no_more_files_is_a_sentence_and_the_next_apply_goes_on(
    larger: Scene, warm: Warm, part: int
) -> None:
    """No sum of bytes foresees this: each call that makes a file fails in its turn."""
    broken: dict[str, list[str]] = {}
    counts = faults.picked(range(2, 62), 3)[part::PARTS]
    for inodes in counts:
        _, found = _on_a_small_disk(larger, warm, 64 << 20, inodes)
        if found:
            broken[f"{inodes} files"] = found
    faults.must_hold(broken, len(counts))


@pytest.mark.parametrize("part", range(PARTS))
def test_room_that_vanishes_in_a_run_is_a_sentence_and_the_next_apply_goes_on(
    larger: Scene, warm: Warm, part: int
) -> None:
    """Another program fills the disk after the plan found it large enough."""
    space = larger.space
    broken: dict[str, list[str]] = {}
    rooms = faults.picked(range(0, 120, 3), 2)[part::PARTS]
    for pages in rooms:
        space.restore(larger.saved)
        with faults.small_disk(space.artifacts, 16 << 20):
            process = faults.started("apply", space.recipe, "--json")
            for line in process.stdout:
                if "run_started" in line or "stage_started" in line:
                    break
            process.send_signal(signal.SIGSTOP)
            ballast = space.artifacts / "ballast"
            room = os.statvfs(space.artifacts).f_bavail * PAGE
            ballast.write_bytes(bytes(max(0, room - pages * PAGE)))
            process.send_signal(signal.SIGCONT)
            result = faults.ended(process)
            ballast.unlink()
            found = _judged(larger, warm, result)
        if found:
            broken[f"{pages} pages left"] = found
    faults.must_hold(broken, len(rooms))


@pytest.mark.parametrize(
    ("pages", "inodes"), faults.picked([(p, i) for p in (1, 2, 3) for i in (2, 3, 4, 0)], 4)
)
def test_no_room_for_the_lockfile_leaves_the_one_before_or_none(
    next_run: Scene, warm: Warm, pages: int, inodes: int
) -> None:
    space = next_run.space
    space.restore(next_run.saved)
    kept = {path.name: path.read_bytes() for path in space.recipe.parent.iterdir()}
    shutil.rmtree(space.recipe.parent)
    with faults.small_disk(space.recipe.parent, 64 * PAGE):
        space.recipe.write_bytes(kept["small.yaml"])
        space.lock.write_bytes(kept["small.lock"])
        faults.grow(space.recipe.parent, (1 + pages) * PAGE, inodes + 1 if inodes else 0)
        result = faults.run("apply", space.recipe)
        found = faults.clean_ending(result, (0, *NO_ROOM))
        if space.locked() not in next_run.versions:
            found.append("the lockfile is no version of an undisturbed run")
        found += faults.torn(space)
        faults.grow(space.recipe.parent)
        found += faults.recovers(space, next_run.after, warm)
    faults.must_hold({f"{pages} pages, {inodes} inodes": found} if found else {}, 1)


def _limited(size: int) -> Callable[[], None]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return limit


@pytest.mark.parametrize(
    "size", faults.picked([0, 1, 500, 1_000, 4_096, 5_000, 10_000, 16_384, 40_000, 100_000], 4)
)
def test_files_that_may_not_grow_do_no_damage(larger: Scene, warm: Warm, size: int) -> None:
    """A write that passes the limit is short, and the next one fails with EFBIG."""
    space: Space = larger.space
    space.restore(larger.saved)
    result = faults.run("apply", space.recipe, preexec_fn=_limited(size))
    broken = larger.broken(result, warm)
    faults.must_hold({f"RLIMIT_FSIZE {size}": broken} if broken else {}, 1)
