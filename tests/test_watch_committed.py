from pathlib import Path

from runner.watch import committed
from tests.workspaces import apply, chat, git
from tests.workspaces import committed as in_git


def changed(root: Path) -> Path:
    """A lockfile that differs from the one in git, and something else that is staged."""
    recipe = in_git(root)
    git(root, "config", "user.name", "a")
    git(root, "config", "user.email", "a@b")
    chat(root / "chats" / "new.json", "hello", "there")
    apply(recipe)
    git(root, "add", "chats")
    return recipe.with_suffix(".lock")


def test_the_lockfile_alone_is_committed(tmp_path: Path) -> None:
    lock = changed(tmp_path)
    assert committed.lockfile(lock, "small: accepted\n\ningest: 1 file added\n") == ""
    assert git(tmp_path, "show", "--name-only", "--format=%B", "HEAD").split("\n") == [
        *("small: accepted", "", "ingest: 1 file added", "", "", "recipes/small.lock", ""),
    ]


def test_what_else_is_staged_stays_staged(tmp_path: Path) -> None:
    committed.lockfile(changed(tmp_path), "x")
    assert git(tmp_path, "diff", "--cached", "--name-only") == "chats/new.json\n"


def test_a_lockfile_that_git_does_not_know_yet_is_added(tmp_path: Path) -> None:
    lock = changed(tmp_path)
    git(tmp_path, "rm", "--cached", "-q", "-f", str(lock))
    git(tmp_path, "commit", "-q", "-m", "without")
    assert committed.lockfile(lock, "x") == ""
    assert "recipes/small.lock" in git(tmp_path, "ls-files")


def test_a_lockfile_as_git_has_it_makes_no_commit(tmp_path: Path) -> None:
    lock = in_git(tmp_path).with_suffix(".lock")
    before = git(tmp_path, "rev-parse", "HEAD")
    assert committed.lockfile(lock, "x") == ""
    assert git(tmp_path, "rev-parse", "HEAD") == before


def test_a_hook_that_fails_is_said(tmp_path: Path) -> None:
    lock = changed(tmp_path)
    hook = tmp_path / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho no commits on fridays >&2\nexit 1\n")
    hook.chmod(0o755)
    assert committed.lockfile(lock, "x") == "no commits on fridays"


def test_an_ignored_lockfile_is_said(tmp_path: Path) -> None:
    lock = changed(tmp_path)
    git(tmp_path, "rm", "--cached", "-q", "-f", str(lock))
    git(tmp_path, "commit", "-q", "-m", "without")
    (tmp_path / ".gitignore").write_text("*.lock\n/artifacts/\n")
    assert committed.lockfile(lock, "x") == "small.lock is ignored by git"


def test_without_a_repository_that_is_said(tmp_path: Path) -> None:
    lock = tmp_path / "small.lock"
    lock.touch()
    assert "not a git repository" in committed.lockfile(lock, "x")
