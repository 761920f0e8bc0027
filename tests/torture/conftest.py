"""What the tests of this folder share: one warm process, and the two scenes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.torture import faults

if sys.platform != "linux":
    collect_ignore_glob = ["test_*.py"]  # faults are injected with Linux's tools


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Warm]:
    folder = tmp_path_factory.mktemp("warm")
    process = faults.Warm(folder)
    space = faults.make(folder / "first")
    result = process.call(faults.RUNNER, "apply", str(space.recipe), learn=True)
    assert result.code == 0, result.err
    yield process
    process.close()


@pytest.fixture(scope="session")
def first_run(warm: faults.Warm, tmp_path_factory: pytest.TempPathFactory) -> faults.Scene:
    """A recipe that has never been applied."""
    return faults.scene(tmp_path_factory.mktemp("first-run"), warm, again=False)


@pytest.fixture(scope="session")
def next_run(warm: faults.Warm, tmp_path_factory: pytest.TempPathFactory) -> faults.Scene:
    """A recipe that was applied before, and has a new source."""
    return faults.scene(tmp_path_factory.mktemp("next-run"), warm, again=True)
