import os
import time
from pathlib import Path

import pytest

from runner.engine import state as states
from runner.engine.state import State


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    """A file that was last touched long enough ago to be trusted."""
    path = tmp_path / "data.json"
    path.write_text("one")
    past = time.time_ns() - 10**10
    os.utime(path, ns=(past, past))
    return path


def test_an_unchanged_file_is_not_opened_again(
    tmp_path: Path, old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "RACY_NS", 0)
    with State(tmp_path / "state.db") as state:
        before = state.hashes([str(old_file)])
    monkeypatch.setattr(states, "_hashed", lambda path: pytest.fail(f"{path} was opened"))
    with State(tmp_path / "state.db") as state:
        assert state.hashes([str(old_file)]) == before


def test_a_file_of_the_same_size_and_time_is_seen_by_its_ctime(
    tmp_path: Path, old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "RACY_NS", 0)
    with State(tmp_path / "state.db") as state:
        before = state.hashes([str(old_file)])[str(old_file)]
        times = old_file.stat()
        old_file.write_text("two")
        os.utime(old_file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert state.hashes([str(old_file)])[str(old_file)] != before


def test_a_file_that_has_just_changed_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "new"
    path.write_text("x")
    with State(tmp_path / "state.db") as state:
        state.hashes([str(path)])
        assert state._db.execute("SELECT count(*) FROM files").fetchone() == (0,)


def test_a_damaged_database_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"this is no database" * 100)
    with State(path) as state:
        assert state.manifest("k") is None
    assert path.with_suffix(".damaged").exists()
