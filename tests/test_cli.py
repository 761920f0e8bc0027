import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner import cli
from tests.workspaces import DATA_RECIPE, apply, chat, make, run

COMMANDS = ("init", "validate", "plan", "apply", "cat", "preview", "chat", "status", "schema")
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "numpy", "pyarrow", "bitsandbytes")


def imported(code: str) -> set[str]:
    """The top-level modules that a program has imported when it ends."""
    code = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")[-2].split())


def test_help_lists_every_command_and_exit_code() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in (*COMMANDS, "75"):
        assert word in done.stdout


def test_wrong_usage_exits_2() -> None:
    assert run("aply").returncode == 2
    assert run("apply").returncode == 2


def test_a_command_that_is_spelt_wrong_gets_the_nearest_one() -> None:
    last = run("aply").stderr.splitlines()[-1]
    assert last == "runner: error: there is no command 'aply'; did you mean 'apply'?"


def test_what_a_command_does_not_know_is_said_with_its_own_usage() -> None:
    said = run("status", "x.yaml", "--foo").stderr
    assert said.startswith("usage: runner status ")
    assert said.endswith("runner status: error: unrecognized arguments: --foo\n")


@pytest.mark.parametrize("command", ["validate", "plan", "apply", "status", "preview"])
def test_no_recipe_is_one_sentence(tmp_path: Path, command: str) -> None:
    done = run(command, "none.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "runner: there is no recipe none.yaml\n"
        "  check the path, or make a recipe with `runner init`\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the recipe is empty"), ("name: x\n", "needs `stages:`"), ("name: {", "x.yaml:")],
)
def test_a_recipe_with_mistakes_leaves_nothing_behind(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "x.yaml").write_text(text)
    done = run("apply", "x.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_the_version_is_printed() -> None:
    assert run("--version").stdout.startswith("runner 0.")


def test_the_whole_of_a_data_recipe_by_command(tmp_path: Path) -> None:
    recipe = str(make(tmp_path))
    assert "ingest → window → split" in run("validate", recipe).stdout
    plan = run("plan", recipe).stdout.splitlines()
    assert plan[0] == "ingest  run: it has not run yet (6 files to read)"
    assert run("plan", recipe, "--check").returncode == 5
    done = run("apply", recipe)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == "ingest: runs, because it has not run yet"
    assert run("apply", recipe).stdout == "nothing to do: everything is up to date\n"
    assert run("plan", recipe, "--check").returncode == 0
    rows = [json.loads(line) for line in run("cat", recipe, "ingest").stdout.splitlines()]
    assert [set(row) for row in rows] == [{"id", "source", "messages"}] * 6
    splits = [json.loads(line) for line in run("cat", recipe, "split").stdout.splitlines()]
    assert {row["split"] for row in splits} == {"train", "eval"}
    status = run("status", recipe).stdout.splitlines()
    assert status[0].startswith("ingest  up to date · made ")


def test_json_is_json_for_every_command_that_has_it(tmp_path: Path) -> None:
    recipe = str(make(tmp_path))
    for command in ("validate", "plan", "apply", "apply", "status"):
        for line in run(command, recipe, "--json").stdout.splitlines():
            json.loads(line)
    error = json.loads(run("cat", recipe, "trian", "--json").stdout)
    assert error["exit_code"] == 2
    assert error["error"] == "the recipe has no stage 'trian'"


def test_what_has_not_been_made_cannot_be_shown(tmp_path: Path) -> None:
    recipe = str(make(tmp_path))
    done = run("cat", recipe, "ingest")
    assert done.returncode == 3
    assert done.stderr.startswith("runner: ingest has made nothing yet")
    done = run("preview", recipe)
    assert done.returncode == 3
    assert "has no stage tokenize" in done.stderr
    done = run("chat", recipe, "--once", "hi")
    assert done.returncode == 3
    assert "has no stage export" in done.stderr


def test_rejected_records_are_shown_with_their_reasons(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    (tmp_path / "chats" / "bad.json").write_text("{\x1b[31m")
    apply(recipe)
    done = run("cat", str(recipe), "ingest", "--rejected")
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert row["path"] == "chats/bad.json"
    assert "is not valid JSON" in row["reason"]


def test_a_file_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    chat(tmp_path / "chats" / "x\x1b[2Jy.json", "q", "a")
    for command in ("plan", "apply"):
        done = run(command, str(recipe))
        assert "\x1b" not in done.stdout
        assert r"x\x1b[2Jy.json" in done.stdout


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=0)
    (tmp_path / "chats").mkdir()
    records = [{"instruction": f"q{n}", "output": "a" * 500} for n in range(2000)]
    (tmp_path / "chats" / "many.json").write_text(json.dumps(records))
    apply(recipe)
    command = f"{sys.executable} -m runner cat {recipe} ingest | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_a_bug_is_one_sentence_and_a_traceback_only_with_debug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(make(tmp_path))
    monkeypatch.setattr("runner.engine.plan.whole", lambda *arguments: 1 / 0)
    assert cli.main(["plan", recipe]) == 1
    assert capsys.readouterr().err.startswith("runner: a bug in runner: ZeroDivisionError")
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan", recipe, "--debug"])


def test_init_writes_a_recipe_that_is_right(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.log")
    done = run("init", "mine", cwd=tmp_path)
    assert done.returncode == 0
    assert run("validate", "recipes/mine.yaml", cwd=tmp_path).returncode == 0
    assert (tmp_path / "data" / "mine").is_dir()
    ignored = (tmp_path / ".gitignore").read_text().splitlines()
    assert ignored == ["*.log", "/artifacts/", "/train_dataset.jsonl", "/eval_dataset.jsonl"]
    again = run("init", "mine", cwd=tmp_path)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert run("init", "../evil", cwd=tmp_path).returncode == 2


def test_help_and_a_run_with_nothing_to_do_import_nothing_heavy(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    code = f"from runner import cli; cli.main(['apply', {str(recipe)!r}])"
    light = imported(code)
    assert not light & {*HEAVY, "pydantic", "yaml", "rich"}
    code = "from runner import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass"
    assert not imported(code) & {*HEAVY, "pydantic", "yaml", "rich", "sqlite3"}


def test_the_data_stages_import_nothing_heavy(tmp_path: Path) -> None:
    recipe = make(tmp_path, DATA_RECIPE)
    code = f"from runner import cli; cli.main(['apply', {str(recipe)!r}])"
    assert not imported(code) & set(HEAVY)


def test_a_count_is_a_number_from_1_up() -> None:
    done = run("preview", "r.yaml", "-n", "-3")
    assert done.returncode == 2
    assert "is not a number from 1 up" in done.stderr


def test_debug_says_which_keys_and_outputs_are_known(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    done = run("plan", str(recipe), "--debug")
    assert "runner: ingest: key " in done.stderr
