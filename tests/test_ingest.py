import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.chat.formats import FORMATS
from runner.engine import opened, store
from runner.engine.workspace import Workspace
from runner.errors import PreconditionError, RunnerError
from runner.stages import ingest
from tests.workspaces import apply, chat, make, rows

SHARED = Path(__file__).parents[2] / "shared" / "data"
RECIPE = """\
name: small
stages:
  - stage: ingest
    sources: [chats]
"""


def output(root: Path) -> Path:
    return (root / "artifacts" / "small" / "ingest").resolve()


def metrics(log: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [e["metrics"] for e in log if e["event"] == "stage_finished"]
    return dict(found)


def from_nothing(tmp_path: Path, root: Path) -> str:
    """The hash of the output of the same files, without any memory of earlier runs."""
    other = tmp_path / f"fresh-{random.random()}"
    (other / "recipes").mkdir(parents=True)
    (other / "pyproject.toml").touch()
    (other / "chats").symlink_to(root / "chats")
    recipe = other / "recipes" / "small.yaml"
    recipe.write_text(RECIPE.replace("[chats]", f"['{root}/chats']"))
    apply(recipe)
    text = (output(other) / "conversations.jsonl").read_text()
    return text.replace(f"{root}/", "")


def test_one_new_file_opens_one_file(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE)
    apply(recipe)
    chat(tmp_path / "chats" / "chat-2b.json", "new", "reply")
    log: list[dict[str, Any]] = []
    apply(recipe, log.append)
    assert metrics(log)["files"] == 7
    assert metrics(log)["files_read"] == 1


def test_a_file_that_was_renamed_is_read_again_because_records_name_it(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE)
    apply(recipe)
    (tmp_path / "chats" / "chat-3.json").rename(tmp_path / "chats" / "other.json")
    apply(recipe)
    found = rows(output(tmp_path) / "conversations.jsonl")
    assert [c["source"]["path"] for c in found][-1] == "chats/other.json"


def test_another_setting_takes_nothing_over(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE)
    apply(recipe)
    recipe.write_text(RECIPE + "    format: sender\n")
    log: list[dict[str, Any]] = []
    apply(recipe, log.append)
    assert metrics(log)["files_read"] == 6


def test_a_damaged_earlier_output_is_not_taken_over(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE)
    apply(recipe)
    path = output(tmp_path) / "conversations.jsonl"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("chat 1", "chat X"))
    chat(tmp_path / "chats" / "new.json", "new", "reply")
    log: list[dict[str, Any]] = []
    apply(recipe, log.append)
    assert metrics(log)["files_read"] == 7
    assert "chat X" not in (output(tmp_path) / "conversations.jsonl").read_text()


@pytest.mark.parametrize("damage", ["", "[[", '[["chats/chat-0.json"]]', None])
def test_without_its_cache_it_reads_everything_again(tmp_path: Path, damage: str | None) -> None:
    recipe = make(tmp_path, RECIPE)
    apply(recipe)
    for path in (tmp_path / "artifacts" / "cache" / "ingest").iterdir():
        text = path.read_text()
        path.write_text(text.replace("0", "1", 1) if damage is None else damage)
    chat(tmp_path / "chats" / "new.json", "new", "reply")
    log: list[dict[str, Any]] = []
    apply(recipe, log.append)
    assert metrics(log)["files_read"] == 7


Change = tuple[str, int, int]


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "delete"]), st.integers(0, 5), st.integers(0, 2)),
        min_size=1,
        max_size=6,
    )
)
def test_any_history_of_changes_gives_what_a_build_from_nothing_gives(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Change]
) -> None:
    tmp_path = tmp_path_factory.mktemp("history")
    root = tmp_path / "root"
    root.mkdir()
    recipe = make(root, RECIPE, chats=3)
    apply(recipe)
    for what, number, said in changes:
        path = root / "chats" / f"chat-{number}.json"
        if what == "write":
            chat(path, f"question {said}", f"answer {said}")  # repeats of one another on purpose
        elif path.exists() and len(list((root / "chats").iterdir())) > 1:
            path.unlink()
        apply(recipe)
    assert (output(root) / "conversations.jsonl").read_text() == from_nothing(tmp_path, root)


def test_repeats_in_several_files_get_ids_of_their_own(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE, chats=1)
    for name in ("b", "c"):
        chat(tmp_path / "chats" / f"{name}.json", "same", "reply")
    apply(recipe)
    chat(tmp_path / "chats" / "a.json", "same", "reply")  # comes first and takes the plain id
    apply(recipe)
    found = {c["source"]["path"]: c["id"] for c in rows(output(tmp_path) / "conversations.jsonl")}
    plain = found["chats/a.json"]
    assert found["chats/b.json"] == f"{plain}~2"
    assert found["chats/c.json"] == f"{plain}~3"


def test_many_processes_give_the_bytes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tmp_path, RECIPE, chats=12)
    apply(recipe)
    alone = (output(tmp_path) / "conversations.jsonl").read_bytes()
    monkeypatch.setattr(ingest, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(ingest, "TASK_BYTES", 500)
    other = tmp_path / "other"
    other.mkdir()
    recipe = make(other, RECIPE, chats=12)
    apply(recipe)
    assert (output(other) / "conversations.jsonl").read_bytes() == alone


def test_a_file_that_another_process_finds_changed_is_planned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(ingest, "TASK_BYTES", 1)
    recipe = make(tmp_path, RECIPE)
    real, touched = ingest.parsed, []

    def change_once(*arguments: Any) -> Any:
        if not touched:
            touched.append(chat(tmp_path / "chats" / "chat-0.json", "changed", "meanwhile"))
        return real(*arguments)

    monkeypatch.setattr(ingest, "parsed", change_once)
    log: list[dict[str, Any]] = []
    apply(recipe, log.append)
    assert any("changed while it was being read" in e.get("text", "") for e in log)


def test_nothing_around_the_run_changes_the_output(tmp_path: Path) -> None:
    """Hash seed, locale, time zone, and the order in which a folder lists its files."""
    outputs = set()
    for number, (seed, locale) in enumerate([("0", "C"), ("1", "C.UTF-8"), ("77", "POSIX")]):
        root = tmp_path / str(number)
        root.mkdir()
        recipe = make(root, RECIPE, chats=0)
        names = [f"chat-{n}.json" for n in range(12)] + ["ключ.json", "Z.json", "a b.json"]
        random.Random(number).shuffle(names)
        for name in names:
            chat(root / "chats" / name, f"вопрос {name}", "ответ")
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": locale, "TZ": "Asia/Tokyo"}
        command = [sys.executable, "-m", "runner", "apply", str(recipe)]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        with opened.at(recipe) as current:
            (planned,) = current.plan()
        outputs.add(planned.output)
        assert planned.output is not None
        assert store.holds(Workspace(root), planned.output)
    assert len(outputs) == 1


def test_broken_files_cost_only_themselves(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE)
    (tmp_path / "chats" / "bad.json").write_text('{"sender": "User", ')
    (tmp_path / "chats" / "odd.json").write_text('{"shape": 1}')
    apply(recipe)
    rejected = rows(output(tmp_path) / "rejected.jsonl")
    assert [r["path"] for r in rejected] == ["chats/bad.json", "chats/odd.json"]
    assert len(rows(output(tmp_path) / "conversations.jsonl")) == 6


def test_too_many_bad_records_stop_the_run_with_the_first(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE + "    max_bad_fraction: 0.1\n")
    (tmp_path / "chats" / "bad.json").write_text(json.dumps([{"shape": 1}] * 3))
    with pytest.raises(RunnerError, match=r"3 of 9 records .*3 × no known .*bad\.json record 0"):
        apply(recipe)


def test_nothing_to_read_says_what_was_found_instead(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE, chats=0)
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "bad.json").write_text("[1]")
    with pytest.raises(PreconditionError, match=r"1 × a record must be .*chats/bad\.json record 0"):
        apply(recipe)


def test_what_says_nothing_is_reported_but_not_bad(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE + "    max_bad_fraction: 0.0\n", chats=1)
    empty = [{"uuid": str(n), "name": "", "chat_messages": []} for n in range(9)]
    (tmp_path / "chats" / "conversations.json").write_text(json.dumps(empty))
    log: list[dict[str, Any]] = []
    apply(recipe, log.append)
    assert (metrics(log)["rejected"], metrics(log)["left_out"]) == (0, 9)
    rejected = rows(output(tmp_path) / "rejected.jsonl")
    assert {r["reason"] for r in rejected} == {"has no message"}


def test_every_format_can_be_forced_by_its_name() -> None:
    names = get_args(ingest.Ingest.model_fields["format"].annotation)
    assert sorted(names) == sorted(["auto", *FORMATS])


def test_an_export_is_read_out_of_its_archive(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE, chats=0)
    (tmp_path / "chats").mkdir()
    with zipfile.ZipFile(tmp_path / "chats" / "export.zip", "w") as archive:
        said = [{"sender": "User", "userInput": "q"}, {"sender": "Claude", "claudeOutputText": "a"}]
        archive.writestr("chats/one.json", json.dumps(said))
        archive.writestr("notes.md", "# Notes\n\nA document.")
        archive.writestr("users.json", '[{"uuid": "x"}]')
        archive.writestr("picture.png", b"\x89PNG")
    apply(recipe)
    found = {c["source"]["path"]: c for c in rows(output(tmp_path) / "conversations.jsonl")}
    assert found.keys() == {"chats/export.zip/chats/one.json", "chats/export.zip/notes.md"}
    assert found["chats/export.zip/notes.md"]["text"] == "# Notes\n\nA document."
    reasons = {r["path"]: r["reason"] for r in rows(output(tmp_path) / "rejected.jsonl")}
    assert "no known format" in reasons["chats/export.zip/users.json"]
    assert "(.png)" in reasons["chats/export.zip"]


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared test data")
def test_a_table_without_a_text_column_says_which_columns_it_has(tmp_path: Path) -> None:
    folder = SHARED / "DenisSud__TOS" / "data"
    recipe = make(tmp_path, RECIPE.replace("[chats]", f"['{folder}']"))
    with pytest.raises(PreconditionError, match=r"sentence, unfairness_level.*text_column"):
        apply(recipe)
    recipe.write_text(recipe.read_text() + "    text_column: sentence\n")
    apply(recipe)
    found = rows(output(tmp_path) / "conversations.jsonl")
    assert len(found) == 5378
    assert found[0]["source"]["format"] == "documents"
    assert found[0]["text"]


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared test data")
def test_all_the_real_files_together_are_read_or_reported(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE.replace("[chats]", f"['{SHARED}']"))
    log: list[dict[str, Any]] = []
    apply(recipe, log.append)
    found = rows(output(tmp_path) / "conversations.jsonl")
    rejected = rows(output(tmp_path) / "rejected.jsonl")
    files = {path for path in SHARED.rglob("*") if path.is_file()}
    named = {Path(record["source"]["path"]) for record in found}
    named |= {Path(record["path"]) for record in rejected}
    assert named == files
    assert {record["source"]["format"] for record in found} >= {
        "chatgpt",
        "claude_ai",
        "claude_code",
        "documents",
        "grok",
        "instruct",
        "messages",
        "oasst",
        "open_webui",
        "preferences",
        "self_instruct",
        "sender",
        "sharegpt",
    }


def test_a_failed_ingest_leaves_the_list_of_what_it_could_not_read(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE + "    max_bad_fraction: 0.1\n")
    (tmp_path / "chats" / "bad.json").write_text(json.dumps([{"shape": n} for n in range(9)]))
    with pytest.raises(RunnerError) as failed:
        apply(recipe)
    listed = Path(failed.value.hint.removeprefix("all are listed in ").partition(";")[0])
    assert len(rows(listed)) == 9


def test_what_lies_beside_chats_in_an_export_is_not_bad(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE + "    max_bad_fraction: 0.0\n", chats=1)
    (tmp_path / "chats" / "photo.JPG").write_bytes(b"\xff\xd8")
    (tmp_path / "chats" / "projects.json").write_text("[]")
    with zipfile.ZipFile(tmp_path / "chats" / "export.zip", "w") as archive:
        archive.writestr("users.json", '[{"uuid": "x", "full_name": "y"}]')
        archive.writestr("chat.html", "<html>")
    log: list[dict[str, Any]] = []
    apply(recipe, log.append)
    assert metrics(log)["rejected"] == 0
    assert metrics(log)["left_out"] == 4


def test_a_spreadsheet_says_what_to_save_it_as(tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE, chats=1)
    (tmp_path / "chats" / "data.csv").write_text("question,answer\n")
    apply(recipe)
    (rejected,) = rows(output(tmp_path) / "rejected.jsonl")
    assert rejected["reason"] == "is a table; save it as JSON Lines or Parquet"
