"""R3: an error from every k-th call that changes or opens a file, once and for ever."""

from __future__ import annotations

import pytest

from tests.torture import faults
from tests.torture.faults import Call, Scene, Warm

PARTS = faults.often(1, 6)

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES", "EINTR", "EMFILE")

# Nobody can say anything when every write fails, not even Python: that is its exit code then.
UNSPEAKABLE = 120

NO_RECIPE = 2
"""The exit code where the recipe itself, the first file of all, cannot be read."""


def _may(call: Call, error: str) -> bool:
    """Whether the system gives this error from this call."""
    if error == "EMFILE":
        return call.name in faults.OPENING
    if error == "EINTR":
        return call.name in ("openat", "write", "pwrite64", "fsync", "fdatasync", "ftruncate")
    if faults.reading(call):
        return error in ("EIO", "EACCES")
    written = call.name in ("write", "pwrite64", "fsync", "fdatasync", "ftruncate")
    return error not in ("EROFS", "EACCES") if written else True


def _failing(
    scene: Scene, warm: Warm, error: str, chosen: list[Call], how: str
) -> dict[str, list[str]]:
    broken: dict[str, list[str]] = {}
    for call in chosen:
        if how == "disk":
            strace = faults.all_failing_from(
                [c for c in scene.calls if _may(c, error)], call, error
            )
        else:
            strace = faults.failing_at(call, error, for_ever=how == "kind")
        scene.space.restore(scene.saved)
        result = warm.runner("apply", scene.space.recipe, strace=strace)
        speechless = how != "once" and result.err == ""
        codes = {*faults.DOCUMENTED, *([UNSPEAKABLE] if speechless else [])}
        if call == scene.calls[0]:
            codes.add(NO_RECIPE)
        if found := scene.broken(result, warm, codes):
            broken[f"{error} {how} at {call}"] = found
    return broken


def _check(scene: Scene, warm: Warm, error: str, how: str, part: int, sample: int) -> None:
    calls = [call for call in scene.calls if _may(call, error)]
    chosen = faults.picked(calls, sample)[part::PARTS]
    faults.must_hold(_failing(scene, warm, error, chosen, how), len(chosen))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("error", ERRORS)
def test_one_failing_call_of_a_first_run_does_no_damage(
    first_run: Scene, warm: Warm, error: str, part: int
) -> None:
    _check(first_run, warm, error, "once", part, 2)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("error", ERRORS)
def test_one_failing_call_of_a_next_run_does_no_damage(
    next_run: Scene, warm: Warm, error: str, part: int
) -> None:
    _check(next_run, warm, error, "once", part, 2)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EACCES", "EMFILE"])
def test_a_kind_of_call_that_fails_from_some_point_on_does_no_damage(
    next_run: Scene, warm: Warm, error: str, part: int
) -> None:
    _check(next_run, warm, error, "kind", part, 2)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EIO", "EROFS"])
def test_a_disk_that_fails_from_some_point_on_does_no_damage(
    first_run: Scene, warm: Warm, error: str, part: int
) -> None:
    _check(first_run, warm, error, "disk", part, 2)
