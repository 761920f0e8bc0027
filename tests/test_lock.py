import subprocess
from pathlib import Path

import pytest

from runner.engine import lock
from runner.errors import RecipeError

PARTS = {"kind": "split", "version": 1, "settings": {"eval_fraction": 0.1}}
FACT = lock.Fact("split", "ab" * 32, PARTS)


def test_the_bytes_of_the_file_are_frozen(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    lock.write(path, lock.Lock((FACT,), (lock.Pin("a/b", "c0ffee"),)))
    assert path.read_bytes().decode() == (
        "# Written by runner; commit it. "
        "Each line is a fact: this stage, made from this, gave that.\n"
        '- {"base_model": "a/b", "commit": "c0ffee"}\n'
        f'- {{"stage": "split", "output": "{"ab" * 32}", "kind": "split", "version": 1, '
        '"settings": {"eval_fraction": 0.1}}\n'
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    whole = lock.Lock((FACT,), (lock.Pin("a/b", "c0ffee"),))
    lock.write(path, whole)
    assert lock.read(path) == whole
    assert lock.read(tmp_path / "none.lock") == lock.Lock()


def test_an_unchanged_lockfile_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    lock.write(path, lock.Lock((FACT,)))
    before = path.stat()
    lock.write(path, lock.Lock((FACT,)))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_conflict_markers_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    line = lock.text_of(lock.Lock((FACT,)))
    path.write_text(f"<<<<<<< ours\n{line}=======\n{line}>>>>>>> theirs\n")
    assert lock.read(path).facts == (FACT, FACT)


@pytest.mark.parametrize("line", ["- {", "- {}", "- 5", "stages: x", '- {"stage": "a"}'])
def test_a_line_that_is_no_fact_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.lock"
    path.write_text(f"# ok\n{line}\n")
    with pytest.raises(RecipeError, match=r"x\.lock:2: this line of the lockfile is no fact"):
        lock.read(path)


@pytest.mark.parametrize("way", ["merge", "rebase"])
def test_two_branches_join_without_a_conflict_and_lose_no_fact(tmp_path: Path, way: str) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    def commit(*facts: lock.Fact) -> None:
        lock.write(tmp_path / "x.lock", lock.Lock(facts))
        git("add", "-A")
        git("commit", "-m", "x")

    ours, theirs = (lock.Fact("train", sign * 64, {"kind": "train", "version": 1}) for sign in "12")
    git("init", "-b", "main")
    (tmp_path / ".gitattributes").write_text("*.lock merge=union\n")
    commit(FACT, lock.Fact("train", "0" * 64, {"kind": "train", "version": 1}))
    git("checkout", "-b", "other")
    commit(FACT, theirs)
    git("checkout", "main")
    commit(FACT, ours)
    git("merge", "other", "-m", "merged") if way == "merge" else git("rebase", "other")
    facts = lock.read(tmp_path / "x.lock").facts
    assert all(fact in facts for fact in (FACT, ours, theirs))
