import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from runner import cli
from runner.engine import environment, facts, plan, store
from runner.engine.workspace import Workspace
from runner.errors import PreconditionError
from tests.test_plan_is_apply import copy_of_trained
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


def test_a_plan_with_nothing_to_do_imports_nothing_heavy(tmp_path: Path) -> None:
    recipe = make(tmp_path, DATA_RECIPE + "    rerun_on: [env]\n")
    (tmp_path / "runner.yaml").write_text("remote: remote\n")
    apply(recipe)
    for command in ("plan", "apply"):
        code = (
            f"from runner import cli; cli.main([{command!r}, {str(recipe)!r}])\n"
            "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.startswith("nothing to do")
        loaded = set(done.stdout.split("\n")[-2].split())
        assert not loaded & {"pydantic", "yaml", "fsspec", "rich", "numpy", "pyarrow", "torch"}


# Why a stage is in its state: what is done to a workspace, the stage it is said of, and how


def replaced(before: str, after: str) -> Callable[[Path], None]:
    def change(recipe: Path) -> None:
        text = recipe.read_text()
        assert before in text
        recipe.write_text(text.replace(before, after))

    return change


def with_a_new_chat(recipe: Path) -> None:
    chat(recipe.parents[1] / "chats" / "new.json", "hello", "there")


def with_new_conversations(recipe: Path) -> None:
    with_a_new_chat(recipe)
    apply(recipe, only=("ingest",))


def with_other_weights(recipe: Path) -> None:
    path = recipe.parents[1] / "base" / "config.json"
    path.write_text(path.read_text() + "\n")


def with_a_release(recipe: Path) -> None:
    replaced("name: small", "name: small\nretrain: {mode: continue}")(recipe)
    apply(recipe)
    replaced("0.0001", "0.0002")(recipe)


def made_by_an_older_version(recipe: Path) -> None:
    lockfile = recipe.with_suffix(".lock")
    said = lockfile.read_text()
    lockfile.write_text(
        said.replace('"kind": "split", "version": 2', '"kind": "split", "version": 1')
    )
    assert lockfile.read_text() != said
    shutil.rmtree(recipe.parents[1] / "artifacts" / "store" / "facts")


def without_the_windows(recipe: Path) -> None:
    shutil.rmtree((recipe.parents[1] / "artifacts" / "small" / "window").resolve())


def with_a_model_of_the_hub(recipe: Path) -> None:
    replaced("name: small", "name: small\nbase_model: owner/name")(recipe)
    replaced("    eval_fraction: 0.2", "    eval_fraction: 0.2\n  - stage: tokenize")(recipe)


HASH = "a hash"
WHY: dict[str, tuple[Callable[[Path], None], str, list[str], str, Any, Any]] = {
    "never run": (
        lambda recipe: recipe.with_suffix(".lock").write_text(""),
        *("ingest", ["--force", "ingest"], "it has not run yet", None, None),
    ),
    "settings": (replaced("0.2", "0.3"), "split", [], "eval_fraction 0.2 → 0.3", 0.2, 0.3),
    "sources": (
        with_a_new_chat,
        *("ingest", [], "1 file added: chats/new.json"),
        *({"files": 6}, {"files": 7, "added": 1, "removed": 0, "changed": 0}),
    ),
    "input": (with_new_conversations, "window", [], "ingest gave another output", HASH, HASH),
    "base model": (
        with_other_weights,
        *("tokenize", [], "the base model is another one", HASH, HASH),
    ),
    "parent": (with_a_release, "train", [], "it continues from release 1", None, HASH),
    "seed": (
        replaced("name: small", "name: small\nseed: 18"),
        *("train", [], "seed 17 → 18", 17, 18),
    ),
    "stage version": (
        made_by_an_older_version,
        *("split", [], "this version of the runner does it differently", 1, 2),
    ),
    "environment": (
        lambda recipe: None,
        *("split", [], "rensa 1.0 → 2.0", {"rensa": "1.0"}, {"rensa": "2.0"}),
    ),
    "output missing": (
        without_the_windows,
        *("window", [], "its output is not in the store", HASH, None),
    ),
    "forced": (lambda recipe: None, "window", ["--force", "window"], "--force", None, None),
    "upstream runs": (with_a_new_chat, "window", [], "ingest runs first", None, None),
    "not pinned": (
        with_a_model_of_the_hub,
        *("tokenize", [], "the hub decides which commit the base model is", None, None),
    ),
    "left out": (
        lambda recipe: None,
        *("ingest", ["--only", "window"], "it stays as it was made last", None, None),
    ),
    "blocked": (
        replaced("[chats]", "[chatz]"),
        *("ingest", [], "source 'chatz' is not there", None, None),
    ),
}


def test_every_reason_of_the_list_is_tested() -> None:
    assert set(WHY) == set(get_args(plan.Reason))


@pytest.mark.parametrize("reason", WHY)
def test_every_reason_is_in_the_json_with_both_values_and_a_sentence_in_the_text(
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, stage, arguments, sentence, old, new = WHY[reason]
    rensa = ["1.0"]
    monkeypatch.setattr(environment, "_version", lambda name: rensa[-1])
    if reason in ("base model", "parent", "seed"):
        recipe = copy_of_trained(tmp_path)
    else:
        counted = "    rerun_on: [env]\n" if reason == "environment" else ""
        recipe = make(tmp_path, DATA_RECIPE + counted)
        apply(recipe)
    rensa.append("2.0")
    change(recipe)
    capsys.readouterr()
    cli.main(["plan", str(recipe), "--json", *arguments])
    said = json.loads(capsys.readouterr().out)
    reasons = {cause["reason"] for one in said for cause in one["causes"]}
    assert reasons <= set(get_args(plan.Reason))
    (cause,) = (
        cause
        for one in said
        if one["stage"] == stage
        for cause in one["causes"]
        if cause["reason"] == reason
    )
    assert cause["text"].startswith(sentence)
    for value, wanted in ((cause["old"], old), (cause["new"], new)):
        if wanted is HASH:
            assert len(value) == 64
        else:
            assert value == wanted
    assert (cause["old"] is None and cause["new"] is None) or cause["old"] != cause["new"]
    cli.main(["plan", str(recipe), *arguments])
    text = capsys.readouterr().out
    assert (sentence in text) or (reason == "left out" and f"left as made last: {stage}" in text)


def test_a_stage_of_another_kind_under_the_old_name_says_so(tmp_path: Path) -> None:
    recipe = make(tmp_path, DATA_RECIPE.replace("stage: window", "stage: window\n    name: middle"))
    apply(recipe)
    recipe.write_text(
        DATA_RECIPE.replace(
            "stage: window\n    mode: conversational",
            "stage: clean\n    name: middle\n  - stage: window",
        )
    )
    assert causes(recipe, "middle")[0] == "stage window → clean"


def test_a_reason_has_no_effect_on_facts_that_are_known(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    (made,) = (made for made in facts.every(Workspace(tmp_path)) if made.stage == "split")
    recipe.with_suffix(".lock").unlink()
    assert planned(recipe)["split"].output == made.output
