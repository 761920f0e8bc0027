"""Artifacts on disk, and a store that several processes, workspaces and users share."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.engine import facts, store, workspace
from runner.engine.workspace import Workspace
from runner.errors import PreconditionError, RecipeError
from tests import test_gc
from tests.workspaces import (
    DATA_RECIPE,
    apply,
    chat,
    git,
    grow_old,
    make,
    planned,
    ran,
    run,
    small_disk,
    states,
)

OTHER = 65534
"""A user that owns nothing."""


AS_OTHER = """
import contextlib, io, os, sys, tempfile
from pathlib import Path
from runner import cli
from tests import test_gc
from tests.workspaces import make
user, group, umask, store, *arguments = sys.argv[1:]
with tempfile.TemporaryDirectory() as warm, contextlib.redirect_stdout(io.StringIO()):
    recipe = str(make(Path(warm)))  # loads every module, which the other user may not be able to
    for command in ("apply", "status", "verify"):
        cli.main([command, recipe])
    cli.main(["gc", "--delete", "--workspace", warm])
if store:
    os.environ["RUNNER_STORE"] = store
os.setgroups([])
os.setgid(int(group))
os.setuid(int(user))
os.umask(int(umask))
sys.exit(cli.main(arguments))
"""


def as_other(
    *arguments: str, store: Path | None = None, group: int = OTHER, umask: int = 0o022
) -> subprocess.CompletedProcess[str]:
    """The command, run by another user with no rights of ours."""
    settings = [str(OTHER), str(group), str(umask), str(store or "")]
    return subprocess.run(
        [sys.executable, "-c", AS_OTHER, *settings, *arguments],
        env={name: value for name, value in os.environ.items() if name != "RUNNER_STORE"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=50,
    )


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can enter, where there is a right to become another user."""
    if sys.platform == "win32" or os.getuid() != 0:
        pytest.skip("needs the right to become another user")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNNER_STORE", str(tmp_path / "shared"))
    return tmp_path / "shared"


def two(tmp_path: Path, **asked: int) -> tuple[Path, Path]:
    """Recipes of the same stages under two names, in two workspaces with the same chats."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    second = make(tmp_path / "two", DATA_RECIPE.replace("name: small", "name: other"), **asked)
    return make(tmp_path / "one", **asked), second.rename(second.with_name("other.yaml"))


def damaged(space: Workspace) -> list[str]:
    return [path.name for path in store.objects(space) if not store.is_whole(space, path.name)]


def artifact(space: Workspace, text: str = "x") -> str:
    with store.staging(space) as staging:
        (staging / "a" / "deep").mkdir(parents=True)
        (staging / "a" / "deep" / "text").write_text(text)
        return store.publish(space, staging / "a")


def test_the_same_files_have_the_same_hash_whatever_their_order_and_times(tmp_path: Path) -> None:
    for name, files in (("a", "xyz"), ("b", "zyx")):
        (tmp_path / name / "deep").mkdir(parents=True)
        for file in files:
            (tmp_path / name / "deep" / file).write_text(file)
    os.utime(tmp_path / "a" / "deep" / "x", (0, 0))
    assert store.content_hash(tmp_path / "a") == store.content_hash(tmp_path / "b")
    (tmp_path / "b" / "deep" / "x").rename(tmp_path / "b" / "x")
    assert store.content_hash(tmp_path / "a") != store.content_hash(tmp_path / "b")


def test_publishing_twice_keeps_the_first(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    first = store.path_of(space, artifact(space)).stat().st_ino
    assert store.path_of(space, artifact(space)).stat().st_ino == first
    assert list((space.store / "tmp").iterdir()) == []


def test_what_is_not_ours_in_tmp_stays(tmp_path: Path) -> None:
    space = Workspace(tmp_path / "w", tmp_path / "home")
    for name in ("thesis", "2024-11", "x.lock"):
        (space.store / "tmp" / name).mkdir(parents=True)
    with store.staging(space):
        pass
    assert {p.name for p in (space.store / "tmp").iterdir()} == {"thesis", "2024-11", "x.lock"}


def test_a_store_among_the_sources_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNNER_STORE", str(tmp_path / "chats" / "store"))
    with pytest.raises(PreconditionError, match="among its sources"):
        workspace.at(tmp_path)
    monkeypatch.setenv("RUNNER_STORE", "~nobody-here/x")
    with pytest.raises(PreconditionError, match="there is no such home"):
        workspace.at(tmp_path)


def test_publishing_over_a_damaged_artifact_mends_it(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    output = artifact(space)
    (store.path_of(space, output) / "deep" / "text").write_text("y")
    assert damaged(space) == [output]
    assert artifact(space) == output
    assert damaged(space) == []


def test_an_artifact_is_marked_as_used_once_a_day(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    path = store.path_of(space, artifact(space))
    for hours, is_renewed in ((23, False), (25, True)):
        then = time.time() - hours * 3600
        os.utime(path, (then, then))
        store.use(space, path.name)
        assert (path.stat().st_mtime > then + 1) is is_renewed


def test_only_what_dead_processes_left_in_tmp_is_removed(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom runner.engine import store, workspace\n"
        "with store.staging(workspace.Workspace(Path(sys.argv[1]))) as folder:\n"
        "    (folder / 'half').mkdir()\n    print(folder, flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    alive, dead = (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    with alive, dead:
        assert alive.stdout is not None
        assert dead.stdout is not None
        folders = [Path(one.stdout.readline().strip()) for one in (alive, dead) if one.stdout]
        dead.kill()
        dead.wait()
        (space.store / "tmp" / "77-1700000000000000000").mkdir()
        assert all(folder.is_dir() for folder in folders)
        with store.staging(space) as own:
            left = {path for path in (space.store / "tmp").iterdir() if path.suffix != ".lock"}
            assert left == {folders[0], own}
            assert (folders[0] / "half").is_dir()
        assert alive.stdin is not None
        alive.stdin.close()
        assert alive.wait(20) == 0
    assert list((space.store / "tmp").iterdir()) == []


def test_a_second_workspace_skips_what_the_first_made(shared: Path, tmp_path: Path) -> None:
    one, other = two(tmp_path)
    apply(one)
    assert set(states(other).values()) == {"skip"}
    log: list[dict[str, object]] = []
    apply(other, log.append)
    assert ran(log) == []
    assert planned(one)["split"].output == planned(other)["split"].output
    link = tmp_path / "two" / "artifacts" / "other" / "split"
    assert (link / "split.jsonl").exists() or list(link.iterdir())
    assert link.resolve().is_relative_to(shared)
    assert not (tmp_path / "two" / "artifacts" / "store").exists()
    made = run("status", other, "--json").stdout
    assert '"made_at": 1' in made  # the facts of the first are known here


def test_many_applies_of_two_workspaces_at_once_damage_nothing(
    shared: Path, tmp_path: Path
) -> None:
    one, other = two(tmp_path, chats=60)
    commands = [[sys.executable, "-m", "runner", "apply", str(path)] for path in (one, other) * 4]
    children = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    assert [child.wait(100) for child in children] == [0] * 8
    space = workspace.around(one)
    assert space.store == shared
    assert damaged(space) == []
    assert len(list(store.objects(space))) == 3
    for recipe in (one, other):
        assert set(states(recipe).values()) == {"skip"}
    assert list((shared / "tmp").iterdir()) == []


def test_two_workspaces_with_different_data_do_not_get_in_each_others_way(
    shared: Path, tmp_path: Path
) -> None:
    one, other = two(tmp_path)
    chat(tmp_path / "two" / "chats" / "chat-0.json", "only", "here")
    apply(one)
    apply(other)
    assert set(states(one).values()) == set(states(other).values()) == {"skip"}
    assert planned(one)["split"].output != planned(other)["split"].output


def test_gc_keeps_what_another_workspace_needs(shared: Path, tmp_path: Path) -> None:
    one, other = two(tmp_path)
    apply(one)
    git(tmp_path / "two", "init", "-q", "-b", "main")
    kept = {step.output for step in apply(other)} | {step.output for step in apply(one)}
    for number in range(2):  # the first is in a commit alone, the second where the links lead
        chat(tmp_path / "two" / "chats" / "chat-0.json", f"text {number}", "answer")
        apply(other)
        kept |= {step.output for step in planned(other).values()}
        if number == 0:
            git(tmp_path / "two", "add", "recipes")
            git(tmp_path / "two", "commit", "-qm", "x")
    other.with_suffix(".lock").unlink()
    chat(tmp_path / "one" / "chats" / "chat-0.json", "to be forgotten", "answer")
    apply(one)
    lost = {step.output for step in planned(one).values()}
    chat(tmp_path / "one" / "chats" / "chat-0.json", "q0 of chat 0", "a1 of chat 0")
    apply(one)
    grow_old(shared)
    done = run("gc", "--workspace", tmp_path / "one", "--delete")
    assert done.returncode == 0, done.stderr
    there = {path.name for path in store.objects(workspace.around(one))}
    assert there == kept
    assert not lost & there


@pytest.mark.parametrize("is_a_mount_point", [False, True])
def test_a_workspace_that_is_not_there_makes_gc_refuse_until_it_is_forgotten(
    shared: Path, tmp_path: Path, is_a_mount_point: bool
) -> None:
    one, other = two(tmp_path)
    apply(one)
    chat(tmp_path / "two" / "chats" / "chat-0.json", "only", "here")
    apply(other)
    (tmp_path / "two").rename(tmp_path / "moved")
    if is_a_mount_point:
        (tmp_path / "two").mkdir()
    grow_old(shared)
    before = list(store.objects(workspace.around(one)))
    gc = ("gc", "--workspace", tmp_path / "one", "--delete")
    done = run(*gc)
    assert done.returncode == 3
    assert done.stderr == (
        f"runner: the workspace {tmp_path / 'two'} uses this store too, and is not there to be"
        f" asked\n  mount it, or if it is gone for good: runner gc --forget {tmp_path / 'two'}\n"
    )
    assert list(store.objects(workspace.around(one))) == before
    assert run(*gc, "--forget", tmp_path / "one" / ".." / "two").returncode == 0
    assert len(list(store.objects(workspace.around(one)))) < len(before)
    assert set(states(one).values()) == {"skip"}
    again = run(*gc, "--forget", tmp_path / "two")
    assert again.returncode == 2
    assert f"no workspace {tmp_path / 'two'} uses the store {shared}" in again.stderr


def test_while_another_workspace_applies_nothing_is_deleted(shared: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    one, other = two(tmp_path)
    apply(one)
    apply(other)
    with FileLock(tmp_path / "two" / "artifacts" / "apply.lock"):
        done = run("gc", "--workspace", tmp_path / "one", "--delete")
    assert done.returncode == 4
    assert f"an apply is at work in {tmp_path / 'two'}, so nothing is deleted" in done.stderr


def test_a_half_written_registration_is_passed_over(shared: Path, tmp_path: Path) -> None:
    one, _ = two(tmp_path)
    apply(one)
    (shared / "projects" / ".abc.123.tmp").write_bytes(b"/wor")
    space = workspace.around(one)
    assert [project.root for project in store.projects(space)] == [tmp_path / "one"]


def test_a_store_of_one_workspace_has_no_register(tmp_path: Path) -> None:
    apply(make(tmp_path))
    assert not (tmp_path / "artifacts" / "store" / "projects").exists()
    with pytest.raises(RecipeError, match="no workspace /nowhere uses the store"):
        store.forget(Workspace(tmp_path), Path("/nowhere"))


def test_a_missing_workspace_is_named(tmp_path: Path) -> None:
    space = Workspace(tmp_path, tmp_path / "shared")
    store.register(space)
    with pytest.raises(PreconditionError, match=f"the workspace {tmp_path} uses this store too"):
        list(store.projects(space))


def test_a_store_on_another_file_system_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = tmp_path / "mount"
    with small_disk(mount, "99m"):
        monkeypatch.setenv("RUNNER_STORE", str(mount / "store"))
        one, other = two(tmp_path)
        assert mount.stat().st_dev != one.stat().st_dev
        apply(one)
        apply(other)
        assert set(states(other).values()) == {"skip"}
        space = workspace.around(one)
        assert damaged(space) == []
        assert run("verify", one).returncode == 0
        chat(tmp_path / "one" / "chats" / "chat-0.json", "another", "answer")
        apply(one)
        grow_old(mount / "store")
        assert run("gc", "--workspace", tmp_path / "one", "--delete").returncode == 0
        assert damaged(space) == []
        assert list((mount / "store" / "tmp").iterdir()) == []


def given_to_other(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, OTHER, OTHER)


def test_another_user_reads_and_skips_but_cannot_write(
    public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = public / "shared"
    monkeypatch.setenv("RUNNER_STORE", str(shared))
    one, other = two(public)
    apply(one)
    given_to_other(public / "two")
    done = as_other("apply", str(other), store=shared)
    assert done.returncode == 0, done.stderr
    assert "cannot note that" in done.stderr
    assert set(states(other).values()) == {"skip"}
    assert as_other("verify", str(other), "--quick", store=shared).returncode == 0
    chat(public / "two" / "chats" / "new.json", "new", "data")
    done = as_other("apply", str(other), store=shared)
    assert done.returncode == 3
    assert f"Permission denied: {shared}" in done.stderr
    assert "check that it is there, and that you may read it, or write to it" in done.stderr
    assert "Traceback" not in done.stderr


def test_users_of_one_group_publish_into_the_same_folders(public: Path) -> None:
    shared = public / "shared"
    shared.mkdir()
    os.chown(shared, 0, 12345)
    shared.chmod(0o2775)
    one, other = two(public)
    given_to_other(public / "two")
    env = {"RUNNER_STORE": str(shared)}
    before = os.umask(0o002)
    try:
        # Folders for every beginning of a hash, so that both meet in them.
        assert run("apply", one, env=env).returncode == 0
        for number in range(256):
            (shared / f"{number:02x}").mkdir(exist_ok=True)
    finally:
        os.umask(before)
    for folder in shared.glob("[0-9a-f][0-9a-f]"):
        status = folder.stat()
        assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (12345, 0o2775)
    chat(public / "two" / "chats" / "new.json", "new", "data")
    done = as_other("apply", str(other), store=shared, group=12345, umask=0o002)
    assert (done.returncode, done.stderr) == (0, "")
    space = Workspace(public / "two", shared)
    outputs = list(store.objects(space))
    assert len(outputs) == 6
    assert {path.stat().st_uid for path in outputs} == {0, OTHER}
    assert damaged(space) == []
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in shared.rglob("*.jsonl"))
    assert {made.output for made in facts.every(space)} == {path.name for path in outputs}
    # What the other user left there keeps nobody from going on.
    chat(public / "one" / "chats" / "chat-1.json", "more", "data")
    before = os.umask(0o002)
    try:
        assert run("apply", one, env=env).returncode == 0
    finally:
        os.umask(before)


def test_left_folders_of_another_user_keep_nobody_from_working(public: Path) -> None:
    space = Workspace(public / "two", public / "store")
    tmp = space.store / "tmp"
    tmp.mkdir(parents=True)
    recipe = make(space.root)
    given_to_other(space.root)
    given_to_other(space.store)
    for name in ("1-1700000000001", "2-1700000000002"):
        (tmp / name / "deep").mkdir(parents=True)
    (tmp / "1-1700000000001.lock").touch(mode=0o600)
    (tmp / "2-1700000000002" / "deep").chmod(0o700)
    tmp.chmod(0o1777)
    done = as_other("apply", str(recipe), store=space.store)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp / "1-1700000000001" / "deep").is_dir()


def test_a_folder_that_may_not_be_looked_into_may_hold_a_lockfile(public: Path) -> None:
    space = Workspace(public / "w")
    (space.root / "closed").mkdir(parents=True)
    (space.root / "closed").chmod(0o700)
    output = test_gc.artifact(space, "x")
    done = as_other("gc", "--workspace", str(space.root))
    assert done.returncode == 3
    assert "closed cannot be looked into, and may hold a lockfile" in done.stderr
    assert test_gc.there(space) == {output}


def test_what_another_user_alone_may_delete_stays_and_is_named(public: Path) -> None:
    space = Workspace(public / "w")
    space.artifacts.mkdir(parents=True)
    own, others = (test_gc.artifact(space, text) for text in ("own", "other"))
    given_to_other(space.root)
    for path in (store.path_of(space, others), store.path_of(space, others).parent):
        os.chown(path, 0, 0)
    done = as_other("gc", "--workspace", str(space.root), "--delete")
    assert done.returncode == 3
    assert f"1 of what may go cannot be deleted; {store.path_of(space, others)}" in done.stderr
    assert test_gc.there(space) == {others}
    assert store.is_whole(space, others)
    assert [made.output for made in facts.every(space)] == [others]
    assert own != others
