"""What is asked for beside the recipe: --only, --from, --force, --paranoid and --locked."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from runner import cli
from runner.engine import lock
from tests.test_plan_is_apply import copy_of_trained
from tests.workspaces import DATA_RECIPE, apply, chat, make, planned, ran

OTHER_WINDOWS = DATA_RECIPE.replace("mode: conversational", "mode: instruct")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; its exit code, and all that it printed."""

    def command(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = int(str(stopped.code))
        said = capsys.readouterr()
        return code, said.out + said.err

    return command


def facts(recipe: Path) -> dict[str, lock.Fact]:
    return {fact.stage: fact for fact in lock.read(lock.path_of(recipe)).facts}


def flip_a_byte(artifact: Path) -> None:
    """Damages the largest file of an artifact; its size and times stay."""
    file = max(
        (path for path in artifact.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


# --only and --from


def test_only_one_stage_runs_and_the_others_stay_as_made_last(tmp_path: Path, run: Any) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    before = facts(recipe)
    chat(tmp_path / "chats" / "new.json", "a new", "chat")
    recipe.write_text(OTHER_WINDOWS)
    code, said = run("plan", recipe, "--only", "window")
    assert code == 0
    assert 'window  run: mode "conversational" → default' in said
    assert "left as made last: ingest, split" in said
    code, said = run("apply", recipe, "--only", "window")
    assert code == 0, said
    assert "ingest" not in said.partition("done;")[0]
    after = facts(recipe)
    assert after["ingest"] == before["ingest"]
    assert after["split"] == before["split"]
    assert after["window"].parts["inputs"] == before["window"].parts["inputs"]
    assert after["window"].output != before["window"].output
    code, said = run("apply", recipe, "--only", "window")
    assert (code, said) == (0, "nothing to do for the stages that were asked for\n")


def test_only_may_name_several_stages(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    recipe.write_text(OTHER_WINDOWS)
    log: list[dict[str, Any]] = []
    apply(recipe, log.append, only=("split", "window"))
    assert ran(log) == ["window", "split"]


def test_from_a_stage_it_and_what_follows_run(tmp_path: Path, run: Any) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    before = facts(recipe)
    chat(tmp_path / "chats" / "new.json", "a new", "chat")
    recipe.write_text(OTHER_WINDOWS)
    code, said = run("apply", recipe, "--from", "window")
    assert code == 0, said
    assert facts(recipe)["ingest"] == before["ingest"]
    assert facts(recipe)["split"] != before["split"]
    code, said = run("plan", recipe, "--from", "window")
    assert said == "nothing to do for window, split\nleft as made last: ingest\n"


def test_a_stage_that_nothing_reads_is_left_out_without_having_run(
    tmp_path: Path, run: Any
) -> None:
    recipe = make(tmp_path)
    code, said = run("apply", recipe, "--only", "ingest")
    assert code == 0, said
    assert list(facts(recipe)) == ["ingest"]
    assert not (tmp_path / "artifacts" / "small" / "window").exists()


def test_what_a_left_out_stage_lacks_is_a_sentence(tmp_path: Path, run: Any) -> None:
    recipe = make(tmp_path)
    for command in ("plan", "apply"):
        code, said = run(command, recipe, "--only", "split")
        assert code == 3
        assert "split reads window, which has made nothing yet or is not in the store" in said
    assert not recipe.with_suffix(".lock").exists()
    code, said = run("apply", recipe, "--from", "window")
    assert code == 3
    assert "window reads ingest, which has made nothing yet" in said


def test_chains_are_not_read_beside_conversations_that_they_are_not_of(
    tmp_path: Path, run: Any
) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    chat(tmp_path / "chats" / "chat-0.json", "other", "words")
    assert run("apply", recipe, "--only", "ingest")[0] == 0
    before = facts(recipe)
    for command in ("plan", "apply"):
        code, said = run(command, recipe, "--only", "split")
        assert code == 3
        assert "split reads ingest and window, but window was made from an earlier output" in said
        assert "apply with --from window" in said
    assert facts(recipe) == before
    assert run("apply", recipe, "--from", "window")[0] == 0
    assert {one.state for one in planned(recipe).values()} == {"skip"}


def test_a_left_out_stage_whose_data_is_damaged_is_not_read(tmp_path: Path, run: Any) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    flip_a_byte(tmp_path / "artifacts" / "small" / "ingest")
    recipe.write_text(OTHER_WINDOWS)
    code, said = run("apply", recipe, "--only", "window", "--paranoid")
    assert code == 3
    assert "window reads ingest, which is damaged" in said
    code, said = run("apply", recipe, "--only", "window")
    assert code == 3
    assert "window reads ingest, which has made nothing yet or is not in the store" in said


@pytest.mark.parametrize("option", ["--only", "--from", "--force"])
@pytest.mark.parametrize("command", ["plan", "apply"])
def test_a_name_that_is_no_stage_exits_2(
    tmp_path: Path, run: Any, option: str, command: str
) -> None:
    recipe = make(tmp_path)
    code, said = run(command, recipe, option, "windw")
    assert code == 2
    assert "the recipe has no stage 'windw'; did you mean 'window'?" in said
    assert not (tmp_path / "artifacts" / "runs").exists()


def test_only_and_from_exclude_each_other(tmp_path: Path, run: Any) -> None:
    code, said = run("apply", make(tmp_path), "--only", "window", "--from", "split")
    assert code == 2
    assert "not allowed with argument" in said


@pytest.mark.parametrize("option", ["--only", "--from"])
def test_what_is_left_out_cannot_be_forced(tmp_path: Path, run: Any, option: str) -> None:
    code, said = run("apply", make(tmp_path), option, "split", "--force", "window")
    assert code == 2
    assert f"--force window: {option} leaves this stage out" in said


# --force


def test_data_that_is_forced_comes_out_as_it_was(tmp_path: Path, run: Any) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    before = facts(recipe)
    said = run("plan", recipe, "--force", "window", "--force", "ingest")[1]
    assert said.count("run: --force") == 2
    assert "nothing to do for split" in said
    log: list[dict[str, Any]] = []
    apply(recipe, log.append, force=("window", "ingest"))
    assert ran(log) == ["ingest", "window"]
    assert facts(recipe) == before


def test_a_training_that_is_forced_runs_again_and_its_model_is_the_lockfiles(
    tmp_path: Path,
) -> None:
    recipe = copy_of_trained(tmp_path)
    before = facts(recipe)["train"]
    states = {name: one.state for name, one in planned(recipe, force=("train",)).items()}
    assert [name for name, state in states.items() if state == "run"] == ["train"]
    assert planned(recipe, force=("train",))["train"].output is None
    log: list[dict[str, Any]] = []
    apply(recipe, log.append, force=("train",))
    (finished,) = (event for event in log if event["event"] == "stage_finished")
    after = facts(recipe)["train"]
    assert after.parts == before.parts
    assert after.output == finished["output"]
    assert {one.state for one in planned(recipe).values()} == {"skip"}
    assert planned(recipe)["train"].output == after.output


# --paranoid


def test_paranoid_notices_a_file_that_was_edited_under_its_old_dates(
    tmp_path: Path, run: Any
) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    path = tmp_path / "chats" / "chat-0.json"
    old = sha256(path.read_bytes()).hexdigest()
    path.write_text(path.read_text().replace("chat 0", "chat X"))
    status = path.stat()
    with sqlite3.connect(tmp_path / "artifacts" / "state.db") as db:
        row = (str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", (*row, old))
    db.close()
    assert run("plan", recipe)[1] == "nothing to do\n"
    code, said = run("plan", recipe, "--paranoid")
    assert "ingest  run: 1 file changed: chats/chat-0.json" in said
    code, said = run("apply", recipe, "--paranoid")
    assert code == 0, said
    made = tmp_path / "artifacts" / "small" / "ingest" / "conversations.jsonl"
    assert "chat X" in made.read_text()


def test_paranoid_makes_damaged_data_again(tmp_path: Path, run: Any) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    before = facts(recipe)
    flip_a_byte(tmp_path / "artifacts" / "small" / "window")
    assert run("plan", recipe)[1] == "nothing to do\n"
    said = run("plan", recipe, "--paranoid")[1]
    assert "window  run: its output is damaged" in said
    assert "nothing to do for ingest, split" in said
    assert run("apply", recipe, "--paranoid")[0] == 0
    assert run("plan", recipe, "--paranoid")[1] == "nothing to do\n"
    assert facts(recipe) == before


def test_paranoid_refuses_a_damaged_model(tmp_path: Path, run: Any) -> None:
    recipe = copy_of_trained(tmp_path)
    before = facts(recipe)
    model = (tmp_path / "artifacts" / "small" / "train").resolve()
    flip_a_byte(model)
    for command in ("plan", "apply"):
        code, said = run(command, recipe, "--paranoid")
        assert code == 3
        assert f"the output of train is damaged: {model}" in said
        assert "put it back from a copy, or delete the folder" in said
    assert model.is_dir()
    assert facts(recipe) == before


# --locked


def new_chat(root: Path) -> None:
    chat(root / "chats" / "new.json", "a new", "chat")


def setting(root: Path) -> None:
    path = root / "recipes" / "small.yaml"
    path.write_text(path.read_text().replace("0.2", "0.3"))


def new_stage(root: Path) -> None:
    path = root / "recipes" / "small.yaml"
    path.write_text(path.read_text() + "  - {stage: clean, name: more}\n")


def stage_gone(root: Path) -> None:
    path = root / "recipes" / "small.yaml"
    path.write_text(path.read_text().partition("  - stage: split")[0])


def other_name(root: Path) -> None:
    path = root / "recipes" / "small.yaml"
    path.write_text(path.read_text().replace("stage: split", "stage: split\n    name: halves"))


def no_lockfile(root: Path) -> None:
    (root / "recipes" / "small.lock").unlink()


@pytest.mark.parametrize(
    "change", [new_chat, setting, new_stage, stage_gone, other_name, no_lockfile]
)
def test_locked_exits_5_for_every_kind_of_change(tmp_path: Path, run: Any, change: Any) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    change(tmp_path)
    lockfile = recipe.with_suffix(".lock")
    before = lockfile.read_bytes() if lockfile.exists() else None
    runs = sorted((tmp_path / "artifacts" / "runs").iterdir())
    code, said = run("apply", recipe, "--locked")
    assert code == 5, said
    assert "apply without --locked, and commit the lockfile" in said
    assert (lockfile.read_bytes() if lockfile.exists() else None) == before
    assert sorted((tmp_path / "artifacts" / "runs").iterdir()) == runs


def test_locked_says_what_would_change(tmp_path: Path, run: Any) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    setting(tmp_path)
    said = run("apply", recipe, "--locked")[1]
    assert "split would give something else than" in said
    assert "says: eval_fraction 0.2 → 0.3" in said


def test_plan_says_what_locked_would_refuse(tmp_path: Path, run: Any) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    setting(tmp_path)
    assert run("plan", recipe)[0] == 0
    for arguments in ([], ["--json"]):
        code, said = run("plan", recipe, "--locked", *arguments)
        assert code == 5
        assert "eval_fraction 0.2 → 0.3" in said


def test_locked_with_nothing_to_do_exits_0(tmp_path: Path, run: Any) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    assert run("apply", recipe, "--locked") == (0, "nothing to do: everything is up to date\n")
    assert run("plan", recipe, "--locked") == (0, "nothing to do\n")


def test_locked_rebuilds_missing_data(tmp_path: Path, run: Any) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    before = recipe.with_suffix(".lock").read_bytes()
    shutil.rmtree(tmp_path / "artifacts")
    code, said = run("apply", recipe, "--locked")
    assert code == 0, said
    assert "window: done" in said
    assert recipe.with_suffix(".lock").read_bytes() == before


def test_locked_takes_no_data_that_comes_out_different(tmp_path: Path, run: Any) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    lockfile = recipe.with_suffix(".lock")
    said = lockfile.read_text().replace(facts(recipe)["split"].output, "0" * 64)
    lockfile.write_text(said)
    shutil.rmtree(tmp_path / "artifacts")
    code, text = run("apply", recipe, "--locked")
    assert code == 5
    assert "and the lockfile says 000000000000" in text
    assert lockfile.read_text() == said


def test_locked_refuses_to_train(tmp_path: Path, run: Any) -> None:
    recipe = copy_of_trained(tmp_path)
    before = recipe.with_suffix(".lock").read_bytes()
    assert run("apply", recipe, "--locked")[0] == 0
    shutil.rmtree((tmp_path / "artifacts" / "small" / "train").resolve())
    code, said = run("apply", recipe, "--locked")
    assert code == 5
    assert "it is trained again and gives a different model" in said
    code, said = run("apply", recipe, "--locked", "--force", "train")
    assert code == 5
    assert recipe.with_suffix(".lock").read_bytes() == before


def test_locked_takes_either_model_of_a_lockfile_that_git_merged(tmp_path: Path, run: Any) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    lockfile = recipe.with_suffix(".lock")
    *lines, last = lockfile.read_text().splitlines()
    output = json.loads(last.removeprefix("- "))["output"]
    lockfile.write_text("\n".join([*lines, last, last.replace(output, "0" * 64), ""]))
    assert run("apply", recipe, "--locked")[0] == 0


def test_a_stage_below_clean_runs_alone(tmp_path: Path) -> None:
    text = DATA_RECIPE.replace("  - stage: window", "  - stage: clean\n  - stage: window")
    recipe = make(tmp_path, text)
    apply(recipe)
    assert {one.state for one in planned(recipe, only=("window",)).values()} == {"skip"}
    assert planned(recipe, start="split", force=("split",))["split"].state == "run"
    apply(recipe, start="split", force=("split",))
