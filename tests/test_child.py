import subprocess
import sys
from pathlib import Path

import pytest

from runner.engine import child, worker

HOLDER = """
import os, signal, sys, time
from pathlib import Path
from runner.engine import worker
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with worker._held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def orphan(scratch: Path, hearing: str) -> subprocess.Popen[str]:
    """A process that writes to the scratch folder, as a child does whose parent was killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(scratch), hearing], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("hearing", ["listens", "deaf"])
def test_a_child_that_outlived_its_parent_is_ended_before_another_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hearing: str
) -> None:
    monkeypatch.setattr(child, "ORPHAN_WAIT_S", 0.5)
    scratch = tmp_path / "scratch" / "abc"
    with orphan(scratch, hearing) as process:
        said: list[str] = []
        child.end_orphan(scratch, lambda event: said.append(event["text"]))
        assert process.poll() is not None or process.wait(10) < 0
    assert said == [f"process {process.pid} of a killed run is still at it; waiting"]


def test_what_a_dead_child_left_is_no_reason_to_wait(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch" / "abc"
    scratch.parent.mkdir()
    for path in worker.lock_of(scratch):
        path.write_text("1")
    child.end_orphan(scratch, lambda event: pytest.fail("waited"))
    assert not worker.lock_of(scratch)[1].exists()
