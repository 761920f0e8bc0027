import json
from pathlib import Path

import pytest

from runner.engine import store
from runner.engine.workspace import Workspace
from runner.errors import PreconditionError
from tests.workspaces import DATA_RECIPE, apply, causes, chat, make, planned, ran, states


def test_a_new_recipe_runs_all_of_it(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    assert states(recipe) == {"ingest": "run", "window": "run", "split": "run"}
    assert causes(recipe, "ingest") == ["it has not run yet"]


def test_after_an_apply_there_is_nothing_to_do(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    assert set(states(recipe).values()) == {"skip"}


def test_a_changed_setting_is_named_with_both_values(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    recipe.write_text(DATA_RECIPE.replace("0.2", "0.3"))
    assert states(recipe) == {"ingest": "skip", "window": "skip", "split": "run"}
    assert causes(recipe, "split") == ["eval_fraction 0.2 → 0.3"]
    recipe.write_text(DATA_RECIPE.replace("    eval_fraction: 0.2\n", ""))
    assert causes(recipe, "split") == ["eval_fraction 0.2 → default"]


def test_going_back_to_an_earlier_setting_runs_nothing(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    recipe.write_text(DATA_RECIPE.replace("0.2", "0.3"))
    apply(recipe)
    recipe.write_text(DATA_RECIPE)
    assert set(states(recipe).values()) == {"skip"}


def test_new_changed_and_removed_files_are_named(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    chat(tmp_path / "chats" / "new.json", "hello", "there")
    assert states(recipe) == {"ingest": "run", "window": "maybe", "split": "maybe"}
    assert causes(recipe, "ingest") == ["1 file added: chats/new.json"]
    assert causes(recipe, "window") == ["ingest runs first"]
    chat(tmp_path / "chats" / "chat-0.json", "other", "words")
    (tmp_path / "chats" / "chat-1.json").unlink()
    assert causes(recipe, "ingest") == [
        "1 file added: chats/new.json; 1 file removed: chats/chat-1.json; "
        "1 file changed: chats/chat-0.json"
    ]


def test_a_change_that_does_not_reach_the_output_stops_there(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    path = tmp_path / "chats" / "chat-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    log: list[dict[str, object]] = []
    apply(recipe, log.append)
    assert ran(log) == ["ingest"]


def test_a_missing_output_is_rebuilt_and_what_follows_is_not(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    output = apply(recipe) and planned(recipe)["window"].output
    assert output is not None
    object_ = store.path_of(Workspace(tmp_path), output)
    for file in object_.iterdir():
        file.unlink()
    object_.rmdir()
    assert states(recipe) == {"ingest": "skip", "window": "run", "split": "skip"}
    assert causes(recipe, "window") == ["its output is not in the store"]
    apply(recipe)
    assert store.holds(Workspace(tmp_path), output)


@pytest.mark.parametrize("name", [".hidden", "x.part", "x.tmp", "x.crdownload", "x.json~"])
def test_files_that_are_still_being_written_do_not_count(tmp_path: Path, name: str) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    (tmp_path / "chats" / name).write_text("[")
    assert set(states(recipe).values()) == {"skip"}


def test_a_source_that_is_not_there_says_where_it_was_looked_for(tmp_path: Path) -> None:
    recipe = make(tmp_path, DATA_RECIPE.replace("chats", "chatz"))
    (cause,) = causes(recipe, "ingest")
    assert cause.startswith("source 'chatz' is not there (looked for")
    assert causes(recipe, "split") == ["window, which it reads, cannot run"]
    assert set(states(recipe).values()) == {"blocked"}


def test_a_folder_without_files_says_so(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=0)
    (tmp_path / "chats").mkdir()
    with pytest.raises(PreconditionError, match="ingest: no files in chats"):
        apply(recipe)


def test_a_missing_base_model_is_found_before_anything_runs(tmp_path: Path) -> None:
    text = DATA_RECIPE.replace("name: small", "name: small\nbase_model: models/none")
    recipe = make(tmp_path, text + "  - stage: tokenize\n")
    (tmp_path / "models").mkdir()
    with pytest.raises(PreconditionError, match="base_model 'models/none' is not there"):
        apply(recipe)
    recipe.write_text(recipe.read_text().replace("models/none", "package:nope/x.gguf"))
    with pytest.raises(PreconditionError, match="package 'nope' is not installed"):
        apply(recipe)
    assert states(recipe) == {
        "ingest": "run",
        "window": "run",
        "split": "run",
        "tokenize": "blocked",
    }
    assert not (tmp_path / "artifacts" / "runs").exists()


def test_planning_writes_nothing_but_its_cache(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    planned(recipe)
    written = {path.name for path in (tmp_path / "artifacts").rglob("*")}
    assert written <= {"state.db", "state.db-journal"}


def test_another_workspace_gives_the_same_keys_and_outputs(tmp_path: Path) -> None:
    locks = []
    for name in ("one", "two/deeper"):
        root = tmp_path / name
        root.mkdir(parents=True)
        recipe = make(root)
        apply(recipe)
        locks.append(recipe.with_suffix(".lock").read_bytes())
    assert locks[0] == locks[1]
