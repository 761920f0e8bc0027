import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner import disk


def test_a_failed_write_leaves_the_old_file_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.lock"
    disk.write_whole(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        disk.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_published_with_all_that_is_in_it(tmp_path: Path) -> None:
    staged = tmp_path / "tmp" / "s"
    (staged / "deep").mkdir(parents=True)
    (staged / "deep" / "a").write_text("1")
    disk.publish(staged, tmp_path / "aa" / "final")
    assert (tmp_path / "aa" / "final" / "deep" / "a").read_text() == "1"
    assert not staged.exists()


def test_publishing_what_is_there_already_keeps_it(tmp_path: Path) -> None:
    for _ in range(2):
        staged = tmp_path / "s"
        staged.mkdir()
        (staged / "a").write_text("1")
        disk.publish(staged, tmp_path / "final")
    assert (tmp_path / "final" / "a").read_text() == "1"
    assert not (tmp_path / "s").exists()


def test_a_link_moves_from_one_target_to_the_next(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "store" / name).mkdir(parents=True)
        disk.point(tmp_path / "links" / "stage", tmp_path / "store" / name)
        assert (tmp_path / "links" / "stage").resolve().name == name
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["stage"]


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "file").write_text("x")
    scandir = os.scandir

    def refused(path: object) -> object:
        if str(path).endswith("inside"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refused)
    for work in (disk.sync_tree, disk.size, lambda folder: list(disk.files(folder))):
        with pytest.raises(PermissionError):
            work(tmp_path)


def test_names_that_killed_processes_left_are_cleared(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    for left in (f".other.{dead.pid}.tmp", f".x.lock.{os.getppid()}.tmp", ".x.lock.tmp"):
        (tmp_path / left).touch()
    disk.write_whole(tmp_path / "x.lock", b"whole")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"x.lock", f".x.lock.{os.getppid()}.tmp", ".x.lock.tmp"}
