"""What `runner gc` keeps, whoever may still need it, and that it deletes the rest whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.engine import facts, gc, store
from runner.engine.facts import Made
from runner.engine.workspace import Workspace
from runner.errors import BusyError, PreconditionError, RecipeError, RunnerError
from tests.workspaces import (
    apply,
    chat,
    commit,
    committed,
    git,
    grow_old,
    make,
    planned,
    run,
    states,
)

DAY_S = 24 * 3600


def artifact(
    space: Workspace,
    text: str,
    stage: str | None = "window",
    *,
    rebuilds: bool = True,
    inputs: dict[str, str] | None = None,
) -> str:
    """An old artifact in the store; with no stage, nobody knows where it comes from."""
    with store.staging(space) as staging:
        (staging / "x" / "deep").mkdir(parents=True)
        (staging / "x" / "text").write_text(text)
        (staging / "x" / "deep" / "more").write_text("more")
        output = store.publish(space, staging / "x")
    if stage is not None:
        parts = {"kind": stage, "version": 1, "settings": {"text": text}, "inputs": inputs or {}}
        facts.write(space, Made(stage, output, parts, rebuilds, 1.0, 9, time.time(), {}, {}))
    grow_old(store.path_of(space, output))
    return output


def there(space: Workspace) -> set[str]:
    return {path.name for path in store.objects(space)}


def delete(space: Workspace, *named: str) -> list[gc.Found]:
    return gc.delete(space, gc.find(space, named))


def whys(space: Workspace, *named: str) -> dict[str, str]:
    return {one.path.name: one.why for one in gc.find(space, named)}


def say(recipe: Path, text: str) -> set[str]:
    """Changes a chat and applies; the outputs that this gives."""
    chat(recipe.parents[1] / "chats" / "chat-0.json", text, f"answer to {text}")
    apply(recipe)
    return outputs(recipe)


def outputs(recipe: Path) -> set[str]:
    return {step.output or "" for step in planned(recipe).values()}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """An applied recipe in a git repository, committed with its data and its lockfile."""
    return committed(tmp_path)


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    """A workspace without git, and with nothing in it."""
    (tmp_path / "artifacts").mkdir()
    return Workspace(tmp_path)


def test_a_dry_run_shows_sizes_and_deletes_nothing(space: Workspace) -> None:
    output = artifact(space, "x" * 1496)
    done = run("gc", "--workspace", space.root)
    assert done.returncode == 0
    assert done.stdout == (
        f"   1.5 kB  window {output[:12]}\n1.5 kB may go; `runner gc --delete` deletes it\n"
    )
    assert there(space) == {output}
    done = run("gc", "--workspace", space.root, "--delete")
    assert done.stdout == f"   1.5 kB  window {output[:12]}\ndeleted 1.5 kB\n"
    assert there(space) == set()
    assert run("gc", "--workspace", space.root).stdout == "nothing to delete\n"


def test_the_json_of_a_dry_run_names_path_size_and_reason(space: Workspace) -> None:
    output = artifact(space, "x")
    done = run("gc", "--workspace", space.root, "--json")
    assert json.loads(done.stdout) == {
        "deleted": False,
        "bytes": 5,
        "found": [
            {
                "path": str(store.path_of(space, output)),
                "what": f"window {output[:12]}",
                "bytes": 5,
                "why": "garbage",
            }
        ],
    }


def test_where_there_is_no_store_nothing_is_made(tmp_path: Path) -> None:
    assert run("gc", "--workspace", tmp_path, "--delete").stdout == "deleted 0 B\n"
    assert list(tmp_path.iterdir()) == []


def in_a_branch(root: Path) -> None:
    git(root, "checkout", "-qb", "other")
    commit(root)
    git(root, "checkout", "-q", "main")


def in_a_tag(root: Path) -> None:
    in_a_branch(root)
    git(root, "tag", "one", "other")
    git(root, "branch", "-qD", "other")


def in_an_annotated_tag_of_a_tag(root: Path) -> None:
    in_a_tag(root)
    git(root, "tag", "-am", "x", "two", "one")
    git(root, "tag", "-am", "x", "three", "two")
    git(root, "tag", "-d", "one", "two")


def in_a_remote_tracking_branch(root: Path) -> None:
    in_a_branch(root)
    git(root, "clone", "-q", "--bare", ".", "artifacts/remote.git")
    git(root, "branch", "-qD", "other")
    git(root, "remote", "add", "origin", "artifacts/remote.git")
    git(root, "fetch", "-q", "origin")


def in_a_detached_head(root: Path) -> None:
    git(root, "checkout", "-q", "--detach")
    commit(root)
    git(root, "checkout", "main", "--", "recipes", "chats")


def in_the_stash(root: Path) -> None:
    git(root, "stash", "-q")


def in_an_older_stash(root: Path) -> None:
    git(root, "stash", "-q")
    (root / "chats" / "chat-1.json").write_text("[]")
    git(root, "stash", "-q")


def in_the_untracked_files_of_a_stash(root: Path) -> None:
    (root / "recipes" / "small.lock").rename(root / "recipes" / "new.lock")
    git(root, "stash", "-qu")


def in_the_index(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "checkout", "main^{tree}", "--", "chats")
    (root / "recipes" / "small.lock").write_text(git(root, "show", "main:recipes/small.lock"))


@pytest.mark.parametrize(
    "keep",
    [
        in_a_branch,
        in_a_tag,
        in_an_annotated_tag_of_a_tag,
        in_a_remote_tracking_branch,
        in_a_detached_head,
        in_the_stash,
        in_an_older_stash,
        in_the_untracked_files_of_a_stash,
        in_the_index,
    ],
)
def test_what_a_lockfile_names_anywhere_in_git_is_kept(
    recipe: Path, keep: Callable[[Path], None]
) -> None:
    root = recipe.parents[1]
    space = Workspace(root)
    first = outputs(recipe)
    lost = say(recipe, "forgotten")
    kept = say(recipe, "kept")
    keep(root)
    apply(recipe)
    assert outputs(recipe) == first
    assert not kept & outputs(recipe)
    grow_old(space.store)
    delete(space)
    assert there(space) == first | kept
    assert not lost & there(space)


def test_after_a_deletion_every_branch_has_nothing_to_do(recipe: Path) -> None:
    root = recipe.parents[1]
    for name in ("one", "two"):
        git(root, "checkout", "-qb", name)
        say(recipe, name)
        commit(root)
        say(recipe, f"{name} tried")
        git(root, "checkout", "-q", ".")
    grow_old(Workspace(root).store)
    apply(recipe)
    before = there(Workspace(root))
    assert run("gc", "--workspace", root, "--delete").returncode == 0
    assert len(before - there(Workspace(root))) >= 2
    for name in ("main", "one", "two"):
        git(root, "checkout", "-q", name)
        done = run("apply", recipe)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("nothing to do: everything is up to date\n")
        assert git(root, "status", "--porcelain") == ""


def test_what_links_lead_to_is_kept_without_any_lockfile(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    kept = outputs(recipe)
    recipe.with_suffix(".lock").unlink()
    grow_old(Workspace(tmp_path).store)
    delete(Workspace(tmp_path))
    assert there(Workspace(tmp_path)) == kept


def test_conflict_markers_and_broken_lines_still_protect_what_they_name(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    text = recipe.with_suffix(".lock").read_bytes()
    kept = outputs(recipe)
    shutil.rmtree(tmp_path / "artifacts" / "small")
    lines = text.replace(b'"stage"', b"\xff{").splitlines()
    broken = b"<<<<<<< HEAD\r\n" + b"\r\n=======\r\n".join(lines) + b">>>>>>>"
    recipe.with_suffix(".lock").write_bytes(broken)
    grow_old(Workspace(tmp_path).store)
    delete(Workspace(tmp_path))
    assert there(Workspace(tmp_path)) == kept


@pytest.mark.parametrize("touched", [".", "text", "deep", "deep/more"])
def test_what_was_touched_in_the_last_two_weeks_stays(space: Workspace, touched: str) -> None:
    output = artifact(space, "x")
    os.utime(store.path_of(space, output) / touched, (time.time() - 13.9 * DAY_S,) * 2)
    delete(space)
    assert whys(space) == {output: "young"}
    grow_old(store.path_of(space, output), days=14.1)
    assert [one.path.name for one in delete(space)] == [output]


def test_what_is_used_between_the_look_and_the_deletion_stays(space: Workspace) -> None:
    output = artifact(space, "x")
    found = gc.find(space)
    store.use(space, output)
    assert gc.delete(space, found) == []
    assert there(space) == {output}


def test_what_a_lockfile_comes_to_name_before_the_deletion_stays(space: Workspace) -> None:
    output = artifact(space, "x")
    found = gc.find(space)
    (space.root / "new.lock").write_text(output)
    assert gc.delete(space, found) == []
    assert there(space) == {output}


def test_a_trained_model_goes_only_when_it_is_named(space: Workspace) -> None:
    model = artifact(space, "model", "train", rebuilds=False)
    done = run("gc", "--workspace", space.root, "--delete")
    assert done.stdout.splitlines() == [
        "      9 B  stays: trained models: name one by its hash to let it go",
        f"          9 B  train {model[:12]}",
        "deleted 0 B",
    ]
    assert there(space) == {model}
    assert run("gc", model[:6], "--workspace", space.root).returncode == 0
    assert there(space) == {model}
    assert run("gc", model[:6], "--workspace", space.root, "--delete").returncode == 0
    assert there(space) == set()
    assert [made.output for made in facts.every(space)] == [model]  # `plan` tells of it


def test_an_export_stays_when_its_model_is_gone_or_going(space: Workspace) -> None:
    model = artifact(space, "model", "train", rebuilds=False)
    export = artifact(space, "export", "export", inputs={"model": model})
    assert whys(space) == {model: "trained", export: "garbage"}
    assert whys(space, model[:8]) == {model: "named", export: "trained"}
    delete(space, model[:8])
    assert there(space) == {export}
    assert whys(space) == {export: "trained"}
    delete(space, export)
    assert there(space) == set()


def test_data_comes_back_through_data_that_is_gone_too(space: Workspace) -> None:
    ingest = artifact(space, "ingest", "ingest")
    window = artifact(space, "window", inputs={"conversations": ingest})
    itself = artifact(space, "same")
    parts = {"kind": "clean", "version": 1, "inputs": {"conversations": itself}}
    facts.write(space, Made("clean", itself, parts, True, 1.0, 9, time.time(), {}, {}))
    shutil.rmtree(store.path_of(space, ingest))
    assert whys(space) == {window: "garbage", itself: "garbage"}


def test_what_was_made_from_something_that_only_itself_gives_does_not_come_back(
    space: Workspace,
) -> None:
    gone = "ab" * 32
    parts = {"kind": "clean", "version": 1, "inputs": {"conversations": gone}}
    facts.write(space, Made("clean", gone, parts, True, 1.0, 9, time.time(), {}, {}))
    window = artifact(space, "window", inputs={"conversations": gone})
    assert whys(space) == {window: "trained"}


def test_a_name_of_an_artifact_has_six_digits_and_one_meaning(space: Workspace) -> None:
    output = artifact(space, "x")
    with pytest.raises(RecipeError, match="too short to name an artifact"):
        gc.find(space, [output[:5]])
    with pytest.raises(RecipeError, match="'ffffff' names 0 artifacts"):
        gc.find(space, ["ffffff"])
    twin = output[:10] + "0" * 54
    store.path_of(space, twin).mkdir()
    with pytest.raises(RecipeError, match="names 2 artifacts"):
        gc.find(space, [output[:10]])
    assert run("gc", "abc", "--workspace", space.root).returncode == 2


def test_a_named_model_that_a_lockfile_needs_is_refused(space: Workspace) -> None:
    model = artifact(space, "model", "train", rebuilds=False)
    (space.root / "a.lock").write_text(f'- {{"output": "{model}"}}\n')
    done = run("gc", model[:6], "--workspace", space.root, "--delete")
    assert done.returncode == 1
    assert "is named by a lockfile" in done.stderr
    assert there(space) == {model}


def test_a_named_model_that_is_young_is_refused(space: Workspace) -> None:
    model = artifact(space, "model", "train", rebuilds=False)
    os.utime(store.path_of(space, model))
    with pytest.raises(RunnerError, match="in the last two weeks, so it stays"):
        gc.find(space, [model])


def test_what_is_of_unknown_origin_stays_until_it_is_named(space: Workspace) -> None:
    output = artifact(space, "x", None)
    delete(space)
    assert whys(space) == {output: "unknown"}
    delete(space, output)
    assert there(space) == set()


def test_an_artifact_whose_fact_is_damaged_is_of_unknown_origin(space: Workspace) -> None:
    output = artifact(space, "model", "train", rebuilds=False)
    path = next((space.store / "facts").rglob("*.json"))
    path.write_bytes(path.read_bytes().replace(b"false", b"true_"))
    assert whys(space) == {output: "unknown"}


def test_facts_of_data_that_went_go_too(space: Workspace) -> None:
    artifact(space, "a")
    kept = artifact(space, "b")
    (space.root / "a.lock").write_text(kept)
    delete(space)
    assert [made.output for made in facts.every(space)] == [kept]


KILLED = """
import os, sys
from pathlib import Path
from runner.engine import gc
from runner.engine.workspace import Workspace
space, left = Workspace(Path(sys.argv[1])), int(sys.argv[2])
found = gc.find(space)
def watch(event, arguments):
    global left
    if event in ("os.rename", "os.remove", "os.rmdir"):
        left -= 1
        if left < 0:
            os._exit(9)
sys.addaudithook(watch)
gc.delete(space, found)
"""


def test_a_deletion_that_is_killed_at_any_moment_leaves_whole_artifacts(tmp_path: Path) -> None:
    codes = []
    for moment in range(60):
        space = Workspace(tmp_path / str(moment))
        space.scratch.joinpath("abc").mkdir(parents=True)
        space.scratch.joinpath("abc", "state").touch()
        grow_old(space.scratch)
        needed = artifact(space, "needed")
        space.root.joinpath("a.lock").write_text(needed)
        for number in range(3):
            artifact(space, f"garbage {number}")
        command = [sys.executable, "-c", KILLED, str(space.root), str(moment)]
        codes.append(subprocess.run(command).returncode)
        assert all(store.is_whole(space, output) for output in there(space))
        assert needed in there(space)
        delete(space)  # which finds what was left behind
        assert there(space) == {needed}
        assert list((space.store / "tmp").iterdir()) == []
        assert list(space.scratch.iterdir()) == []
        assert [made.output for made in facts.every(space)] == [needed]
        if codes[-1] == 0:
            break
    assert codes == [9] * (len(codes) - 1) + [0]
    assert len(codes) > 12


def without_git(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "empty").mkdir(exist_ok=True)
    return {"PATH": str(tmp_path / "empty")}


def test_without_git_a_repository_is_left_alone(recipe: Path) -> None:
    root = recipe.parents[1]
    say(recipe, "other")
    before = there(Workspace(root))
    grow_old(Workspace(root).store)
    done = run("gc", "--workspace", root, "--delete", env=without_git(root))
    assert done.returncode == 3
    assert "nothing is called unneeded: git is not installed" in done.stderr
    assert there(Workspace(root)) == before


def test_a_workspace_without_a_repository_needs_no_git(space: Workspace) -> None:
    artifact(space, "x")
    done = run("gc", "--workspace", space.root, "--delete", env=without_git(space.root))
    assert (done.returncode, done.stderr) == (0, "")
    assert there(space) == set()


def a_head_that_is_none(root: Path) -> None:
    (root / ".git" / "HEAD").write_text("?")


def an_empty_branch(root: Path) -> None:
    (root / ".git" / "refs" / "heads" / "other").write_text("")


def a_branch_without_commit(root: Path) -> None:
    (root / ".git" / "refs" / "heads" / "other").write_text("12" * 20 + "\n")


def a_lost_lockfile(root: Path) -> None:
    blob = git(root, "rev-parse", "HEAD:recipes/small.lock").strip()
    (root / ".git" / "objects" / blob[:2] / blob[2:]).unlink()


def a_lost_folder(root: Path) -> None:
    tree = git(root, "rev-parse", "HEAD:recipes").strip()
    (root / ".git" / "objects" / tree[:2] / tree[2:]).unlink()


def a_damaged_index(root: Path) -> None:
    (root / ".git" / "index").write_bytes(b"DIRC nonsense")


def a_repository_elsewhere_that_is_gone(root: Path) -> None:
    shutil.rmtree(root / ".git")
    (root / ".git").write_text("gitdir: /nowhere\n")


@pytest.mark.parametrize(
    "breaks",
    [
        a_head_that_is_none,
        an_empty_branch,
        a_branch_without_commit,
        a_lost_lockfile,
        a_lost_folder,
        a_damaged_index,
        a_repository_elsewhere_that_is_gone,
    ],
)
def test_a_broken_repository_makes_it_refuse(recipe: Path, breaks: Callable[[Path], None]) -> None:
    root = recipe.parents[1]
    space = Workspace(root)
    say(recipe, "other")
    before = there(space)
    grow_old(space.store)
    breaks(root)
    with pytest.raises(PreconditionError, match="nothing is called unneeded: "):
        gc.find(space)
    done = run("gc", "--workspace", root, "--delete")
    assert done.returncode == 3, done.stdout
    assert "Traceback" not in done.stderr
    assert there(space) == before


def test_a_link_of_a_remote_to_a_branch_that_is_gone_is_no_harm(recipe: Path) -> None:
    root = recipe.parents[1]
    git(root, "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/gone")
    git(root, "tag", "blob", "HEAD:recipes/small.yaml")
    gc.find(Workspace(root))


def test_a_repository_without_commits_is_no_harm(space: Workspace) -> None:
    git(space.root, "init", "-q")
    artifact(space, "x")
    delete(space)
    assert there(space) == set()


def test_a_workspace_inside_a_repository_is_asked_like_its_root(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    root = tmp_path / "deep" / "inside"
    root.mkdir(parents=True)
    recipe = make(root)
    first = say(recipe, "first")
    git(tmp_path, "add", "deep/inside/recipes")
    git(tmp_path, "commit", "-qm", "x")
    second = say(recipe, "second")
    assert first != second
    grow_old(Workspace(root).store)
    delete(Workspace(root))
    assert there(Workspace(root)) == first | second


def test_variables_of_a_git_hook_do_not_lead_to_another_repository(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = recipe.parents[1]
    kept = outputs(recipe) | say(recipe, "kept")
    in_a_branch(root)
    apply(recipe)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    git(elsewhere, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(elsewhere / ".git"))
    grow_old(Workspace(root).store)
    delete(Workspace(root))
    assert there(Workspace(root)) == kept


def test_the_lockfile_of_a_recipe_outside_of_the_workspace_counts(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    make(tmp_path / "inside")
    outside = tmp_path / "outside" / "x.yaml"
    outside.parent.mkdir()
    (tmp_path / "inside" / "recipes" / "small.yaml").rename(outside)
    workspace = ("--workspace", tmp_path / "inside")
    git(outside.parent, "init", "-q", "-b", "main")
    assert run("apply", outside, *workspace).returncode == 0
    commit(outside.parent)
    space = Workspace(tmp_path / "inside")
    first = there(space)
    chat(tmp_path / "inside" / "chats" / "chat-0.json", "another", "answer")
    assert run("apply", outside, *workspace).returncode == 0
    both = there(space)
    assert len(both) > len(first)
    for link in space.links("small").glob("[a-z]*"):
        link.unlink()
    grow_old(space.store)
    delete(space)
    assert there(space) == both


def test_unfinished_trainings_and_caches_go_when_they_are_old(space: Workspace) -> None:
    old, new = space.scratch / "old", space.scratch / "new"
    for folder in (old, new, space.cache / "gguf", space.cache / "ingest"):
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "checkpoint" / "state").write_bytes(b"12345")
    for ending in (".lock", ".pid"):
        old.with_suffix(ending).touch()
    grow_old(space.scratch, space.cache)
    os.utime(new / "checkpoint" / "state")
    done = run("gc", "--workspace", space.root, "--delete")
    assert done.stdout.splitlines() == [
        "      5 B  unfinished training old",
        "      5 B  cache gguf",
        "      5 B  cache checkpoint",
        "      5 B  stays: made or used in the last two weeks",
        "deleted 15 B",
    ]
    assert [path.name for path in space.scratch.iterdir()] == ["new"]
    assert [path.name for path in space.cache.iterdir()] == ["ingest"]


def test_scratch_on_another_disk_than_the_store_goes_too(tmp_path: Path) -> None:
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    shared = Path(subprocess.check_output(["mktemp", "-d", "-p", "/dev/shm"], text=True).strip())
    try:
        space = Workspace(tmp_path, shared)
        (space.scratch / "old").mkdir(parents=True)
        grow_old(space.scratch)
        delete(space)
        assert list(space.scratch.iterdir()) == []
    finally:
        shutil.rmtree(shared)


def test_while_an_apply_is_at_work_nothing_is_deleted(space: Workspace) -> None:
    from filelock import FileLock

    output = artifact(space, "x")
    with FileLock(space.artifacts / "apply.lock"):
        assert run("gc", "--workspace", space.root).returncode == 0
        done = run("gc", "--workspace", space.root, "--delete")
        assert done.returncode == 4
        assert done.stderr == (
            f"runner: an apply is at work in {space.root}, so nothing is deleted\n"
            "  run the same command again when it has ended\n"
        )
        with pytest.raises(BusyError):
            delete(space)
    assert there(space) == {output}


def test_an_apply_beside_deletions_loses_nothing(recipe: Path) -> None:
    root = recipe.parents[1]
    first = outputs(recipe)
    for number in range(6):
        chat(root / "chats" / "chat-0.json", f"text {number}", "answer")
        if number % 2:
            grow_old(Workspace(root).store)
        command = [sys.executable, "-m", "runner"]
        with (
            subprocess.Popen([*command, "apply", str(recipe)], stdout=subprocess.DEVNULL) as one,
            subprocess.Popen(
                [*command, "gc", "--workspace", str(root), "--delete"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ) as other,
        ):
            time.sleep(0.02 * number)
        assert one.returncode == 0
        assert other.returncode in (0, 4)
        assert set(states(recipe).values()) == {"skip"}
        assert all(store.is_whole(Workspace(root), output) for output in outputs(recipe) | first)
