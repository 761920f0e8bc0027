"""The remote cache of a workspace: what one clone made, another one fetches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runner import cli
from runner.engine import elsewhere, execute, facts, opened, remote, store
from runner.engine.workspace import Workspace
from tests.test_plan_is_apply import copy_of_trained
from tests.workspaces import DATA_RECIPE, apply, causes, chat, make, planned, ran, states

DATA = ["ingest", "window", "split"]


def shared(root: Path, recipe: str = DATA_RECIPE, **more: Any) -> Path:
    """A workspace with a remote cache in a folder beside it; the path of its recipe."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "runner.yaml").write_text(f"remote: {root.parent / 'remote'}\n")
    return make(root, recipe, **more)


def clone(recipe: Path, name: str = "clone") -> Path:
    """What git would bring of the workspace, and its data; the path of the recipe there."""
    root = recipe.parents[1]
    there = root.parent / name
    shutil.copytree(root, there, ignore=shutil.ignore_patterns("artifacts"))
    return there / "recipes" / recipe.name


def logged(recipe: Path, **choice: Any) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    apply(recipe, log.append, **choice)
    return log


def of_kind(log: list[dict[str, Any]], kind: str) -> list[str]:
    return [event["stage"] for event in log if event["event"] == kind]


def warnings(log: list[dict[str, Any]]) -> list[str]:
    """Those that are not a stage's."""
    return [e["text"] for e in log if e["event"] == "warning" and "stage" not in e]


def object_of(recipe: Path, stage: str) -> Path:
    """Where the remote has the output of the stage."""
    output = planned(recipe)[stage].output
    assert output is not None
    return recipe.parents[2] / "remote" / "objects" / output[:2] / output


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("with_lockfile", [True, False])
def test_a_second_clone_restores_what_the_first_one_made(
    tmp_path: Path, with_lockfile: bool
) -> None:
    first = shared(tmp_path / "first")
    apply(first)
    second = clone(first)
    if not with_lockfile:
        second.with_suffix(".lock").unlink()
    assert states(second) == dict.fromkeys(DATA, "restore")
    log = logged(second)
    assert ran(log) == []
    assert of_kind(log, "stage_restored") == DATA
    assert {e["origin"] for e in log if e["event"] == "stage_restored"} == {
        f"the remote cache {tmp_path / 'remote'}"
    }
    assert second.with_suffix(".lock").read_bytes() == first.with_suffix(".lock").read_bytes()
    made = [files_below(recipe.parents[1] / "artifacts" / "store") for recipe in (first, second)]
    objects = [{n: b for n, b in files.items() if len(n.split("/")[0]) == 2} for files in made]
    assert objects[0] == objects[1] != {}
    assert set(states(second).values()) == {"skip"}
    assert logged(second) == []


def test_plan_says_what_is_restored_from_where_and_how_large_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = shared(tmp_path / "first")
    apply(first)
    second = clone(first)
    capsys.readouterr()
    assert cli.main(["plan", str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    where = f"it is in the remote cache {tmp_path / 'remote'}"
    assert lines == [f"{name:6}  restore: {where}" for name in DATA]
    assert cli.main(["plan", str(second), "--json"]) == 0
    (ingest, *_) = json.loads(capsys.readouterr().out)
    (made,) = (m for m in facts.every(Workspace(tmp_path / "first")) if m.stage == "ingest")
    assert ingest["output"] == made.output
    assert ingest["cost"]["bytes"] == made.bytes > 0


def test_restored_facts_are_kept_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = shared(tmp_path / "first")
    apply(first)
    second = clone(first)
    apply(second)
    shutil.rmtree(tmp_path / "remote")
    made = [
        sorted(facts.every(Workspace(recipe.parents[1])), key=lambda made: made.stage)
        for recipe in (first, second)
    ]
    assert made[0] == made[1]
    capsys.readouterr()
    assert cli.main(["status", str(second)]) == 0
    assert "conversations 6" in capsys.readouterr().out.splitlines()[0]


def test_a_clone_with_other_data_makes_only_what_is_not_known(tmp_path: Path) -> None:
    first = shared(tmp_path / "first")
    apply(first)
    second = clone(first)
    second.write_text(DATA_RECIPE.replace("0.2", "0.3"))
    assert states(second) == {"ingest": "restore", "window": "restore", "split": "run"}
    log = logged(second)
    assert ran(log) == ["split"]
    third = clone(second, "third")
    assert set(states(third).values()) == {"restore"}


def test_a_change_that_stops_early_restores_what_is_below(tmp_path: Path) -> None:
    first = shared(tmp_path / "first")
    apply(first)
    second = clone(first)
    path = second.parents[1] / "chats" / "chat-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    assert states(second) == {"ingest": "run", "window": "maybe", "split": "maybe"}
    log = logged(second)
    assert ran(log) == ["ingest"]
    assert of_kind(log, "stage_restored") == ["window", "split"]


def damaged(object_: Path) -> None:
    path = object_ / "chains.jsonl"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))


def cut_off(object_: Path) -> None:
    path = object_ / "chains.jsonl"
    path.write_bytes(path.read_bytes()[:-1])


def without_a_file(object_: Path) -> None:
    (object_ / "chains.jsonl").unlink()


def with_another_manifest(object_: Path) -> None:
    path = object_.with_name(f"{object_.name}.json")
    path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))


@pytest.mark.parametrize("harm", [damaged, cut_off, without_a_file, with_another_manifest])
def test_a_damaged_object_is_not_used_but_made_anew(tmp_path: Path, harm: Any) -> None:
    first = shared(tmp_path / "first")
    apply(first)
    harm(object_of(first, "window"))
    second = clone(first)
    assert states(second)["window"] == "restore"
    log = logged(second)
    assert ran(log) == ["window"]
    assert of_kind(log, "stage_restored") == ["ingest", "split"]
    (warning,) = warnings(log)
    assert "has no good copy of" in warning
    assert warning.endswith("; it is made anew")
    assert second.with_suffix(".lock").read_bytes() == first.with_suffix(".lock").read_bytes()


def test_a_damaged_fact_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    first = shared(tmp_path / "first")
    apply(first)
    second = clone(first)
    second.with_suffix(".lock").unlink()
    for path in (tmp_path / "remote" / "facts").rglob("*.json"):
        path.write_text("{}")
    log = logged(second)
    assert ran(log) == DATA
    assert any("this is no fact" in text for text in warnings(log))


def test_a_remote_that_cannot_be_reached_is_left_alone_after_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = shared(tmp_path / "first")
    (tmp_path / "remote").write_text("a file, and no folder")
    log = logged(recipe)
    assert ran(log) == DATA
    said = [*warnings(log), *capsys.readouterr().err.splitlines()]
    (warning,) = said
    assert f"remote {tmp_path / 'remote'} cannot be" in warning
    assert warning.endswith("; going on without it")
    assert set(states(recipe).values()) == {"skip"}


def test_a_remote_that_cannot_be_opened_is_left_alone_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = shared(tmp_path / "first")
    (tmp_path / "first" / "runner.yaml").write_text("remote: ssh://localhost:1/cache\n")
    log = logged(recipe)
    assert ran(log) == DATA
    said = [*warnings(log), *capsys.readouterr().err.splitlines()]
    assert len([text for text in said if "going on without it" in text]) == 1


def test_the_data_is_there_before_the_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = shared(tmp_path / "first")
    written: list[str] = []
    place = remote.Remote._place

    def seen(self: remote.Remote, path: str, write: Any) -> None:
        place(self, path, write)
        written.append(path.removeprefix(f"{tmp_path / 'remote'}/"))

    monkeypatch.setattr(remote.Remote, "_place", seen)
    apply(recipe)
    kinds = [f"{path.partition('/')[0]} {path[-4:]}" for path in written]
    assert kinds == [
        *["objects sonl", "objects sonl", "objects json", "facts json"],
        *["objects sonl", "objects json", "facts json"] * 2,
    ]


def test_no_fact_is_published_without_its_data(tmp_path: Path) -> None:
    recipe = shared(tmp_path / "first")
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / "objects").write_text("in the way")
    log = logged(recipe)
    assert ran(log) == DATA
    assert len(warnings(log)) == 1
    assert not (tmp_path / "remote" / "facts").exists()


def test_what_is_damaged_here_is_not_uploaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = shared(tmp_path / "first")
    (tmp_path / "first" / "runner.yaml").unlink()
    apply(recipe)
    made = tmp_path / "first" / "artifacts" / "small" / "window" / "chains.jsonl"
    made.write_bytes(b"[" + made.read_bytes()[1:])
    (tmp_path / "first" / "runner.yaml").write_text(f"remote: {tmp_path / 'remote'}\n")
    assert cli.main(["push", str(recipe)]) == 3
    assert not object_of(recipe, "window").exists()


def test_push_brings_what_was_made_before_there_was_a_remote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = shared(tmp_path / "first")
    (tmp_path / "first" / "runner.yaml").unlink()
    apply(recipe)
    assert cli.main(["push", str(recipe)]) == 3
    assert "this workspace has no remote cache" in capsys.readouterr().err
    (tmp_path / "first" / "runner.yaml").write_text(f"remote: {tmp_path / 'remote'}\n")
    assert cli.main(["push", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert said == f"ingest, window, split: now in the remote cache {tmp_path / 'remote'}\n"
    assert set(states(clone(recipe)).values()) == {"restore"}


def test_push_brings_what_an_interrupted_run_did_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = shared(tmp_path / "first")

    def stop(event: dict[str, Any]) -> None:
        if (event["event"], event.get("stage")) == ("stage_finished", "window"):
            raise KeyboardInterrupt

    with pytest.raises(Exception, match="interrupted"):
        apply(recipe, stop)
    assert object_of(recipe, "ingest").is_dir()
    assert not object_of(recipe, "window").exists()
    assert cli.main(["push", str(recipe)]) == 0
    assert object_of(recipe, "window").is_dir()
    assert states(clone(recipe)) == {"ingest": "restore", "window": "restore", "split": "run"}


def test_a_left_out_stage_is_fetched_only_where_it_is_read(tmp_path: Path) -> None:
    first = shared(tmp_path / "first")
    apply(first)
    second = clone(first)
    second.write_text(DATA_RECIPE.replace("mode: conversational", "mode: instruct"))
    found = states(second, only=("window",))
    assert found == {"ingest": "restore", "window": "run", "split": "skip"}
    log = logged(second, only=("window",))
    assert of_kind(log, "stage_restored") == ["ingest"]
    assert ran(log) == ["window"]


def test_paranoid_takes_a_good_copy_for_a_damaged_one(tmp_path: Path) -> None:
    recipe = shared(tmp_path / "first")
    apply(recipe)
    made = tmp_path / "first" / "artifacts" / "small" / "window" / "chains.jsonl"
    made.write_bytes(made.read_bytes() + b"\n")
    assert states(recipe, paranoid=True)["window"] == "restore"
    log = logged(recipe, paranoid=True)
    assert of_kind(log, "stage_restored") == ["window"]
    assert set(states(recipe, paranoid=True).values()) == {"skip"}


def test_nothing_is_asked_where_everything_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = shared(tmp_path / "first")
    apply(recipe)
    asked: list[object] = []
    monkeypatch.setattr(elsewhere.Elsewhere, "_asked", lambda *question: asked.append(question))
    apply(recipe)
    planned(recipe)
    assert asked == []


def test_a_trained_model_is_fetched_and_not_trained_again(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    first = copy_of_trained(tmp_path / "first")
    (tmp_path / "first" / "runner.yaml").write_text(f"remote: {tmp_path / 'remote'}\n")
    assert cli.main(["push", str(first)]) == 0
    second = clone(first)
    second.with_suffix(".lock").unlink()
    assert set(states(second).values()) == {"restore"}
    log = logged(second)
    assert ran(log) == []
    assert second.with_suffix(".lock").read_bytes() == first.with_suffix(".lock").read_bytes()
    assert planned(second)["train"].output == planned(first)["train"].output
    third = clone(first, "third")
    manifest = object_of(first, "train")
    manifest.with_name(f"{manifest.name}.json").write_text("{}")
    with opened.at(third) as current, pytest.raises(Exception, match="--locked") as caught:
        execute.apply(current, lambda event: None, choice=opened.plan.Choice(locked=True))
    assert "it is trained again and gives a different model" in str(caught.value)


def test_the_lockfiles_model_is_fetched_before_another_one_of_its_key_is_taken(
    tmp_path: Path,
) -> None:
    recipe = shared(tmp_path / "first")
    apply(recipe)
    space = Workspace(tmp_path / "first")
    (split,) = (made for made in facts.every(space) if made.stage == "split")
    other = facts.parsed(facts.as_json(split).replace(split.output.encode(), b"a" * 64))
    store.path_of(space, other.output).mkdir(parents=True)
    facts.write(space, other)
    shutil.rmtree(store.path_of(space, split.output))
    assert states(recipe)["split"] == "restore"
    assert planned(recipe)["split"].output == split.output
    assert causes(recipe, "split") == [f"it is in the remote cache {tmp_path / 'remote'}"]


def test_what_is_new_in_one_workspace_is_uploaded_as_it_is_made(tmp_path: Path) -> None:
    recipe = shared(tmp_path / "first")
    apply(recipe)
    before = files_below(tmp_path / "remote")
    chat(tmp_path / "first" / "chats" / "new.json", "a new", "chat")
    apply(recipe)
    after = files_below(tmp_path / "remote")
    assert before.items() < after.items()
    assert len([name for name in after if name.startswith("facts/")]) == 6


def test_a_damaged_copy_at_the_remote_is_replaced_by_what_is_made_anew(tmp_path: Path) -> None:
    recipe = shared(tmp_path / "first")
    apply(recipe)
    good = object_of(recipe, "window") / "chains.jsonl"
    data = good.read_bytes()
    good.write_bytes(data + b"junk")
    shutil.rmtree(tmp_path / "first" / "artifacts")
    assert any("it is made anew" in text for text in warnings(logged(recipe)))
    assert good.read_bytes() == data


def test_push_replaces_a_copy_whose_size_is_wrong(tmp_path: Path) -> None:
    recipe = shared(tmp_path / "first")
    apply(recipe)
    good = object_of(recipe, "window") / "chains.jsonl"
    data = good.read_bytes()
    good.write_bytes(data[:-5])
    assert cli.main(["push", str(recipe)]) == 0
    assert good.read_bytes() == data
