"""`runner diff` says in words what changed since another version in git."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.workspaces import DATA_RECIPE, apply, chat, commit, committed, git, make, run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """An applied recipe that is committed with its lockfile."""
    return committed(tmp_path)


def test_with_no_change_it_says_so(recipe: Path) -> None:
    done = run("diff", recipe)
    assert (done.returncode, done.stdout) == (0, "nothing changed since HEAD\n")
    assert run("diff", recipe, "--json").stdout == "[]\n"


def test_settings_and_metrics_are_shown_from_old_to_new(recipe: Path) -> None:
    text = recipe.read_text()
    recipe.write_text(text.replace("conversational", "conversational\n    expanding: false"))
    apply(recipe)
    done = run("diff", recipe)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "window  another output: expanding default → false; windows 39 → 27",
        "split   another output: window gave another output",
    ]


def test_another_version_can_be_a_tag_a_branch_or_a_commit(recipe: Path) -> None:
    root = recipe.parents[1]
    git(root, "tag", "-am", "x", "v1")
    git(root, "branch", "other")
    chat(root / "chats" / "new.json", "new", "data")
    apply(recipe)
    commit(root)
    assert run("diff", recipe).stdout == "nothing changed since HEAD\n"
    for revision in ("v1", "other", "HEAD~1", "main~1", git(root, "rev-parse", "v1^{}").strip()):
        done = run("diff", recipe, revision)
        assert done.stdout.splitlines()[0].startswith(
            "ingest  another output: 1 file added: chats/new.json; "
        ), done.stderr


def test_stages_that_came_and_went_are_named(recipe: Path) -> None:
    text = recipe.read_text()
    renamed = text.replace("  - stage: split", "  - stage: split\n    name: parts")
    recipe.write_text(renamed)
    apply(recipe)
    assert run("diff", recipe).stdout.splitlines() == ["parts  new", "split  gone"]


def test_the_json_has_what_the_words_say(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("0.2", "0.5"))
    apply(recipe)
    (change,) = json.loads(run("diff", recipe, "--json").stdout)
    assert set(change) == {"stage", "output", "causes", "metrics"}
    assert (change["stage"], change["output"]) == ("split", "another output")
    assert change["causes"] == [
        {
            "reason": "settings",
            "text": "eval_fraction 0.2 → 0.5",
            "what": "eval_fraction",
            "old": 0.2,
            "new": 0.5,
        }
    ]
    assert all(len(pair) == 2 and pair[0] != pair[1] for pair in change["metrics"].values())
    assert change["metrics"]


def test_settings_that_do_not_change_what_comes_out_are_told_apart(recipe: Path) -> None:
    text = DATA_RECIPE.replace("conversational", "conversational\n    sliding_turns: [8, 4000]")
    recipe.write_text(text)
    apply(recipe)
    assert run("diff", recipe).stdout == ("window  same output: sliding_turns default → [8,4000]\n")


def test_without_facts_there_are_no_metrics(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("0.2", "0.5"))
    apply(recipe)
    shutil.rmtree(recipe.parents[1] / "artifacts" / "store" / "facts")
    assert run("diff", recipe).stdout == "split  another output: eval_fraction 0.2 → 0.5\n"


def test_the_same_parts_with_another_output_are_a_new_training(recipe: Path) -> None:
    path = recipe.with_suffix(".lock")
    last = path.read_text().splitlines()[-1]
    path.write_text(path.read_text().replace(last, last.replace('"output": "', '"output": "00')))
    line = path.read_text().splitlines()[-1]
    output = json.loads(line.removeprefix("- "))["output"]
    path.write_text(path.read_text().replace(output, output[:64]))
    assert run("diff", recipe).stdout == "split  another output from the same\n"


def test_a_recipe_in_a_subfolder_is_compared_with_itself(recipe: Path) -> None:
    other = recipe.parent / "deep" / "small.yaml"
    other.parent.mkdir()
    other.write_text(recipe.read_text().replace("name: small", "name: deep"))
    apply(other)
    done = run("diff", other)
    assert done.returncode == 3
    assert "there is no small.lock in 'HEAD'" in done.stderr


@pytest.mark.parametrize("revision", ["nothing", "HEAD~9", "", "HEAD:recipes", "../x", "a\x1bb"])
def test_a_version_that_git_does_not_know_is_a_sentence(recipe: Path, revision: str) -> None:
    done = run("diff", recipe, revision)
    assert done.returncode == 3
    assert done.stderr.startswith("runner: git knows no version '")
    assert f"name a commit, branch or tag: `runner diff {recipe} main`, say" in done.stderr
    assert "\x1b" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("revision", ["-x", "--output=pwned", "--all", "-"])
def test_a_version_that_begins_with_a_dash_is_no_option(recipe: Path, revision: str) -> None:
    before = sorted(recipe.parents[1].rglob("*"))
    done = run("diff", recipe, "--", revision)
    assert done.returncode == 3, done.stdout
    assert done.stderr.startswith("runner: git knows no version '")
    assert sorted(recipe.parents[1].rglob("*")) == before
    assert not Path("pwned").exists()


def test_a_folder_that_is_no_repository_is_a_sentence(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    env = {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    done = run("diff", recipe, env=env)
    assert done.returncode == 3
    assert f"{recipe} is in no git repository, so there is no other version" in done.stderr


def test_a_repository_without_commits_is_a_sentence(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    git(tmp_path, "init", "-q")
    done = run("diff", recipe)
    assert done.returncode == 3
    assert "git knows no version 'HEAD'" in done.stderr


def test_a_recipe_that_was_never_committed_is_a_sentence(recipe: Path) -> None:
    other = recipe.with_name("other.yaml")
    other.write_text(recipe.read_text().replace("name: small", "name: other"))
    apply(other)
    done = run("diff", other, "--json")
    assert done.returncode == 3
    error = json.loads(done.stdout)
    assert error["error"] == "there is no other.lock in 'HEAD'"
    assert error["hint"].startswith("commit it with its recipe; or name a commit")


def test_without_git_it_is_a_sentence(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("diff", recipe, env={"PATH": str(tmp_path / "empty")})
    assert done.returncode == 3
    assert done.stderr == "runner: git is not installed\n  install it to compare\n"


def test_a_broken_lockfile_of_another_version_is_named_with_it(recipe: Path) -> None:
    good = recipe.with_suffix(".lock").read_text()
    recipe.with_suffix(".lock").write_text("# x\n- nonsense\n")
    commit(recipe.parents[1])
    recipe.with_suffix(".lock").write_text(good)
    done = run("diff", recipe)
    assert done.returncode == 2
    assert "HEAD:small.lock:2: this line of the lockfile is no fact" in done.stderr
    assert run("diff", recipe, "HEAD~1").stdout == "nothing changed since HEAD~1\n"
