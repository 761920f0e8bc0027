from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.engine import child, worker
from runner.engine.recipe import Step
from runner.errors import InterruptedRun
from tests.test_events import fill
from tests.test_plan_is_apply import TRAINING
from tests.workspaces import make, small_disk

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

SAVER = """
import json, os, signal, sys, time
from pathlib import Path

def save(*_):
    for step in range(2000):  # more than a pipe holds
        print(json.dumps({"event": "progress", "done": step, "text": "x" * 99}), flush=True)
    Path(sys.argv[1]).touch()
    print(json.dumps({"event": "error", "message": "all is saved", "hint": ""}), flush=True)
    os._exit(75)

signal.signal(signal.SIGTERM, save)
sys.stdin.read()
print(json.dumps({"event": "progress", "done": 0}), flush=True)
time.sleep(60)
"""
JOB = worker.Job({"stage": "train"}, "small", 0, {}, (), None, "output", "scratch", "cache")
STEP = Step("train", "train", 1, {}, {}, {}, (), True, 1, True, False)


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


# The lines of 25 steps are more than what is left of the log's last page.
LONG = TRAINING.replace("max_steps: 2", "max_steps: 100, checkpoints: {every_steps: 25}").replace(
    "epochs: 1,", "epochs: 1000, early_stopping: 'off',"
)


def test_a_training_on_a_disk_without_a_free_byte_pauses_with_its_state_saved(
    tmp_path: Path,
) -> None:
    from runner.model import checkpoint
    from tests import tiny_models

    tiny_models.folder(tmp_path / "base")
    recipe = make(tmp_path, LONG)
    scratches = tmp_path / "artifacts" / "scratch"
    said = ""
    with small_disk(tmp_path / "artifacts", "20m"):
        command = [sys.executable, "-m", "runner", "apply", str(recipe), "--json"]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said += line
                if json.loads(line).get("event") == "checkpoint" and "ballast" not in said:
                    fill(tmp_path / "artifacts")
                    said += json.dumps({"event": "ballast"}) + "\n"
        assert process.returncode == 75, said[-2000:]
        assert "events.jsonl cannot be written" in said
        [scratch] = (path for path in scratches.iterdir() if path.is_dir())
        saved, _ = checkpoint.published(scratch)
        told = [one for one in map(json.loads, said.splitlines()) if one.get("path")]
        assert [one.step for one in saved] == [event["step"] for event in told]
        assert checkpoint.can_resume(saved[-1])


def test_a_child_is_heard_out_when_who_listens_to_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = tmp_path / "saved"
    monkeypatch.setattr(worker, "command", lambda: [sys.executable, "-c", SAVER, str(done)])

    def emit(event: dict[str, Any]) -> None:
        raise LookupError("nobody listens")

    with pytest.raises(LookupError, match="nobody listens"):
        child.run(JOB, STEP, emit, tmp_path / "log")
    assert done.exists()


def test_a_child_that_has_saved_decides_how_a_run_without_room_for_its_words_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        worker, "command", lambda: [sys.executable, "-c", SAVER, tmp_path / "saved"]
    )

    def emit(event: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InterruptedRun, match="all is saved"):
        child.run(JOB, STEP, emit, tmp_path / "log")
