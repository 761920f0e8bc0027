"""Careless surroundings: each of these once lost something, hung, or showed a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner import processes
from runner.chat import files
from runner.engine import events, state, store, worker
from runner.engine.workspace import Workspace
from runner.errors import PreconditionError, RecipeError, RunnerError
from tests.workspaces import DATA_RECIPE, apply, chat, make, planned, ran, rows, run, states


def test_two_applies_at_once_both_end_well(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=60)
    command = [sys.executable, "-m", "runner", "apply", str(recipe)]
    children = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [child.wait(50) for child in children] == [0, 0, 0]
    assert set(states(recipe).values()) == {"skip"}


def test_a_plan_can_be_asked_for_while_an_apply_is_inside_a_stage(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    records = [{"instruction": f"q{n}", "output": "a" * 50} for n in range(30_000)]
    (tmp_path / "chats" / "many.json").write_text(json.dumps(records))
    command = [sys.executable, "-m", "runner", "apply", str(recipe), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        while b"stage_started" not in child.stdout.readline():
            pass
        child.send_signal(signal.SIGSTOP)
        try:
            assert run("plan", str(recipe)).returncode == 0
            assert run("status", str(recipe)).returncode == 0
            assert run("apply", str(recipe), "--no-wait").returncode == 4
        finally:
            child.send_signal(signal.SIGCONT)
        child.stdout.read()
        assert child.wait(50) == 0


def test_what_init_writes_works_where_there_is_no_git(tmp_path: Path) -> None:
    assert run("init", "mine", cwd=tmp_path).returncode == 0
    chat(tmp_path / "data" / "mine" / "a.json", "q", "a")
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.write_text(recipe.read_text().split("  - stage: tokenize")[0])
    done = run("apply", str(recipe))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "artifacts" / "mine" / "split").exists()


def test_init_adds_a_whole_line_and_keeps_the_others(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_bytes(b"build/artifacts/\r\n")
    run("init", "mine", cwd=tmp_path)
    lines = (tmp_path / ".gitignore").read_bytes().split(b"\n")
    assert lines[:2] == [b"build/artifacts/\r", b"/artifacts/"]


def test_a_reader_that_leaves_does_not_stop_an_apply(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    command = f"{sys.executable} -m runner apply {recipe} | true"
    subprocess.run(["bash", "-c", command], check=True)
    assert set(states(recipe).values()) == {"skip"}


def test_a_damaged_artifact_is_replaced_when_it_is_made_again(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    output = planned(recipe)["ingest"].output
    assert output is not None
    (store.path_of(Workspace(tmp_path), output) / "conversations.jsonl").write_text("")
    apply(recipe, force=("ingest",))
    assert store.content_hash(store.path_of(Workspace(tmp_path), output)) == output


def test_a_damaged_state_is_put_aside_and_the_next_command_works(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=200)
    apply(recipe)
    path = tmp_path / "artifacts" / "state.db"
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)
    first = run("plan", str(recipe))
    assert "Traceback" not in first.stderr
    assert "a bug" not in first.stderr
    assert run("plan", str(recipe)).returncode == 0


def test_a_lockfile_cannot_name_a_folder_as_an_output(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    path = recipe.with_suffix(".lock")
    output = planned(recipe)["ingest"].output or ""
    path.write_text(path.read_text().replace(output, "/etc"))
    with pytest.raises(RecipeError, match="is no fact"):
        planned(recipe)


@pytest.mark.parametrize(
    "line",
    [
        b"- \xff",
        b'- {"stage": "a", "output": "x", "kind": "ingest"}',
        b'- {"stage": ["a"], "output": "' + b"0" * 64 + b'", "kind": "a", "version": 1}',
        b"- " + b"[" * 100_000,
    ],
)
def test_a_broken_lockfile_is_one_sentence(tmp_path: Path, line: bytes) -> None:
    recipe = make(tmp_path)
    recipe.with_suffix(".lock").write_bytes(b"# x\n" + line + b"\n")
    with pytest.raises(RecipeError, match=r"lock:2: this line of the lockfile is no fact"):
        planned(recipe)


@pytest.mark.parametrize("source", ["../outside", "chats/../../outside"])
def test_a_relative_source_stays_in_the_workspace(tmp_path: Path, source: str) -> None:
    chat(tmp_path / "outside" / "a.json", "q", "a")
    (tmp_path / "inside").mkdir()
    recipe = make(tmp_path / "inside", DATA_RECIPE.replace("chats", source))
    with pytest.raises(PreconditionError, match="leads out of the workspace"):
        apply(recipe)


def test_a_link_does_not_lead_out_of_the_workspace(tmp_path: Path) -> None:
    outside = chat(tmp_path / "outside.json", "q", "a")
    (tmp_path / "inside").mkdir()
    recipe = make(tmp_path / "inside")
    (tmp_path / "inside" / "chats" / "link.json").symlink_to(outside)
    with pytest.raises(PreconditionError, match="is a link that leads out"):
        apply(recipe)


def test_the_artifacts_are_no_source(tmp_path: Path) -> None:
    recipe = make(tmp_path, DATA_RECIPE.replace("[chats]", '["."]'))
    apply(recipe)
    assert set(states(recipe).values()) == {"skip"}


def test_odd_names_and_globs_of_sources_are_read(tmp_path: Path) -> None:
    recipe = make(tmp_path, DATA_RECIPE.replace("[chats]", '["chats/**"]'), chats=2)
    chat(tmp_path / "chats" / "c[1].json", "q", "a")
    path = chat(tmp_path / "chats" / "x.json", "qq", "aa")
    path.rename(os.fsdecode(os.fsencode(path.parent) + b"/\xff\xfe.json"))
    old = time.time() - 100
    for file in (tmp_path / "chats").iterdir():
        os.utime(file, (old, old))
    apply(recipe)
    names = [
        row["source"]["path"]
        for row in rows(tmp_path / "artifacts" / "small" / "ingest" / "conversations.jsonl")
    ]
    assert "chats/\\xff\\xfe.json" in names
    assert "chats/c[1].json" in names
    assert set(states(recipe).values()) == {"skip"}


def test_a_folder_that_may_not_be_entered_is_said(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    private = tmp_path / "chats" / "private"
    chat(private / "a.json", "q", "a")
    private.chmod(0o700)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o777 == 0o700 and os.getuid() == folder.stat().st_uid:
            folder.chmod(0o755)
    done = subprocess.run(
        [
            *("setpriv", "--reuid", "65534", "--clear-groups"),
            *(sys.executable, "-m", "runner", "plan", str(recipe)),
        ],
        capture_output=True,
        text=True,
    )
    if "setpriv" in done.stderr or "Permission denied: '/root" in done.stderr:
        pytest.skip("cannot become another user here")
    if "No module named" in done.stderr or "can't open file" in done.stderr:
        pytest.skip("the other user cannot run this Python")
    assert done.returncode == 3
    assert "Permission denied" in done.stderr


def test_a_reply_with_weight_0_is_not_learned(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=1)
    said = [("user", "a"), ("assistant", "bad"), ("user", "b"), ("assistant", "good")]
    messages = [{"role": role, "content": text} for role, text in said]
    messages[1]["weight"] = 0  # type: ignore[assignment]
    (tmp_path / "chats" / "w.json").write_text(json.dumps({"messages": messages}))
    apply(recipe)
    chains = rows(tmp_path / "artifacts" / "small" / "window" / "chains.jsonl")
    conversations = rows(tmp_path / "artifacts" / "small" / "ingest" / "conversations.jsonl")
    id = conversations[-1]["id"]
    weighted = {index for c in chains if c["conversation"] == id for index in c["weights"]}
    assert weighted == {"3"}


def test_alpaca_history_and_system_come_before() -> None:
    record = {
        "instruction": "c",
        "output": "d",
        "system": "s",
        "history": [["a", "b"]],
    }
    (found,) = files.read("f", json.dumps(record).encode())
    assert [m.content for m in found.messages] == ["s", "a", "b", "c", "d"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"instruction": "a", "output": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"[]", "is an empty list"),
        (b'{"a": 1}\n{"b": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
)
def test_odd_json_costs_only_itself(data: bytes, reason: str) -> None:
    assert any(reason in item.reason for item in files.read("f", data))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["store", "Runs", "state.db"])
def test_a_recipe_cannot_take_the_runners_own_folders(tmp_path: Path, name: str) -> None:
    recipe = make(tmp_path, DATA_RECIPE.replace("name: small", f"name: {name}"))
    with pytest.raises(RecipeError, match="is the runner's own"):
        planned(recipe)


def test_contradictions_are_found_before_anything_runs(tmp_path: Path) -> None:
    text = DATA_RECIPE + "  - stage: window\n    name: again\n    input: split\n"
    with pytest.raises(RecipeError, match="again cannot read 'split', which makes split"):
        planned(make(tmp_path, text))
    text = DATA_RECIPE.replace(
        "conversational",
        "conversational\n    pairs: false\n    expanding: false\n    sliding_turns: []",
    )
    with pytest.raises(RecipeError, match="makes no windows"):
        planned(make(tmp_path, text))


def test_a_huge_or_endless_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    assert run("validate", str(path)).returncode == 2
    assert run("validate", "/dev/zero").returncode == 2


def test_a_terminal_without_the_letters_gets_others(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    chat(tmp_path / "chats" / "ru.json", "Привет", "Здравствуй")
    env = {"PYTHONIOENCODING": "ascii"}
    assert run("validate", str(recipe), env=env).returncode == 0
    assert run("apply", str(recipe), env=env).returncode == 0
    assert r"\u" in run("cat", str(recipe), "ingest", env=env).stdout


def test_a_read_only_workspace_can_be_planned(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    mounted = subprocess.run(["mount", "--bind", str(tmp_path), str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path)], check=True)
        assert run("plan", str(recipe)).stdout == "nothing to do\n"
        chatless = run("apply", str(recipe))
        assert chatless.returncode == 0, chatless.stderr
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("obstacle", ["store", "runs", "small"])
def test_a_file_in_the_way_is_one_sentence(tmp_path: Path, obstacle: str) -> None:
    recipe = make(tmp_path)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / obstacle).write_text("x")
    done = run("apply", str(recipe))
    assert done.returncode == 3
    assert "a bug" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_workspace_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    assert run("plan", str(recipe), "--workspace", str(tmp_path / "none")).returncode == 2
    assert not (tmp_path / "none").exists()


def test_plan_check_with_json_prints_one_document(tmp_path: Path) -> None:
    done = run("plan", str(make(tmp_path)), "--check", "--json")
    assert done.returncode == 5
    assert len(json.loads(done.stdout)) == 3


def test_a_file_that_never_rests_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.engine import state

    recipe = make(tmp_path)
    counter = iter(range(10_000))
    signature = state._signature
    monkeypatch.setattr(state, "_signature", lambda status: (next(counter), *signature(status)[1:]))
    with pytest.raises(RunnerError, match="keeps changing while it is read"):
        apply(recipe)
    shutil.rmtree(tmp_path / "chats")


def test_a_damaged_output_is_made_again_before_it_is_read(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    ingested = planned(recipe)["ingest"].output
    assert ingested is not None
    path = store.path_of(Workspace(tmp_path), ingested) / "conversations.jsonl"
    whole = path.read_bytes()
    damages = (whole[: len(whole) // 2], whole.replace(b"chat 1", b"chat X"), None)
    for number, damage in enumerate(damages):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        turns = f"conversational\n    sliding_turns: [{2 * number + 2}]"
        recipe.write_text(DATA_RECIPE.replace("conversational", turns))
        apply(recipe)
        assert path.read_bytes() == whole


def test_a_link_that_leads_to_itself_is_passed_over(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    (tmp_path / "chats" / "self.json").symlink_to(tmp_path / "chats" / "self.json")
    apply(recipe)


def test_a_reader_that_is_killed_is_a_sentence() -> None:
    with pytest.raises(RunnerError, match="a process that was reading was killed"):
        list(processes.mapped(kill_myself, [1, 2]))


def kill_myself(task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_module_in_the_current_folder_is_not_run_by_a_stage(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise SystemExit('hijacked')")
    done = subprocess.run(
        worker.command(), input="{}", cwd=tmp_path, capture_output=True, text=True
    )
    assert "hijacked" not in done.stderr
    assert "KeyError" in done.stderr or "TypeError" in done.stderr
    assert worker.command()[1] == "-P"


@pytest.mark.parametrize(
    ("command", "code"), [(["plan", "--check"], 5), (["plan", "--locked"], 5), (["verify"], 3)]
)
def test_a_reader_that_leaves_does_not_change_the_answer(
    tmp_path: Path, command: list[str], code: int
) -> None:
    recipe = make(tmp_path)
    words = " ".join([sys.executable, "-m", "runner", command[0], str(recipe), *command[1:]])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words} 2>/dev/null | true"])
    assert done.returncode == code


def test_a_command_without_an_output_is_no_bug(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    command = f"{sys.executable} -m runner apply {recipe} >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forced_stage_runs_once_whatever_is_found_later(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    made = tmp_path / "artifacts" / "small" / "window" / "chains.jsonl"
    made.write_bytes(b"[" + made.read_bytes()[1:])
    log: list[events.Event] = []
    apply(recipe, log.append, force=("ingest", "split"))
    assert ran(log) == ["ingest", "window", "split"]


def test_a_glob_reads_neither_hidden_files_nor_what_was_made_of_others(tmp_path: Path) -> None:
    recipe = make(tmp_path, DATA_RECIPE.replace("[chats]", '["**/*.json*"]'))
    (tmp_path / ".hidden").mkdir()
    chat(tmp_path / ".hidden" / "h.json", "secret", "words")
    apply(recipe)
    before = recipe.with_suffix(".lock").read_bytes()
    assert b"secret" not in (tmp_path / "artifacts/small/ingest/conversations.jsonl").read_bytes()
    apply(recipe)
    assert recipe.with_suffix(".lock").read_bytes() == before


@pytest.mark.parametrize("source", ["out", "out/*.json", "*/private.json", "out/private.json"])
def test_a_link_to_a_folder_does_not_lead_out_of_the_workspace(tmp_path: Path, source: str) -> None:
    chat(tmp_path / "secret" / "private.json", "q", "a")
    recipe = make(tmp_path / "inside", DATA_RECIPE.replace("[chats]", f'["{source}"]'))
    (tmp_path / "inside" / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(PreconditionError, match="leads out of the workspace"):
        apply(recipe)


def test_a_pipe_in_the_place_of_a_source_does_not_hold_up_the_run(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    (tmp_path / "chats" / "chat-0.json").unlink()
    os.mkfifo(tmp_path / "chats" / "chat-0.json")
    apply(recipe)  # it is no file, so it is no source
    with pytest.raises(OSError, match="not a regular file"):
        state._hashed(str(tmp_path / "chats" / "chat-0.json"))
