import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner import cli
from runner.engine import child, cost, events, execute, look, opened, worker
from runner.errors import BusyError, PreconditionError, RunnerError
from runner.stages import ingest
from tests.workspaces import (
    DATA_RECIPE,
    apply,
    chat,
    grow,
    make,
    planned,
    ran,
    rows,
    small_disk,
    states,
)


def test_every_record_comes_out_or_is_reported(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    (tmp_path / "chats" / "broken.json").write_text('[{"sender": "User"')
    (tmp_path / "chats" / "mixed.jsonl").write_text(
        '{"instruction": "a", "output": "b"}\n{"what": 1}\n'
    )
    apply(recipe)
    made = tmp_path / "artifacts" / "small" / "ingest"
    conversations = rows(made / "conversations.jsonl")
    assert len(conversations) == 7
    assert conversations[0]["source"] == {
        "path": "chats/chat-0.json",
        "format": "sender",
        "index": 0,
    }
    assert [set(row) for row in rows(made / "rejected.jsonl")] == [{"path", "line", "reason"}] * 2


def test_too_many_bad_records_stop_the_run(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=1)
    for number in range(2):
        (tmp_path / "chats" / f"bad-{number}.json").write_text("{")
    with pytest.raises(RunnerError, match="2 of 3 records cannot be read"):
        apply(recipe)


def test_data_without_a_reply_says_so(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=0)
    chat(tmp_path / "chats" / "a.json", "only a question")
    with pytest.raises(RunnerError, match="no reply to learn from in 1 conversations"):
        apply(recipe)
    assert states(recipe) == {"ingest": "skip", "window": "run", "split": "run"}


def test_a_failed_stage_leaves_nothing_half_written(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=0)
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "a.json").write_text("nothing")
    with pytest.raises(PreconditionError, match=r"no conversation in the sources: 1 × is not"):
        apply(recipe)
    assert not recipe.with_suffix(".lock").exists()
    assert not (tmp_path / "artifacts" / "small").exists()
    objects = [
        p for p in (tmp_path / "artifacts" / "store").iterdir() if p.is_dir() and p.name != "tmp"
    ]
    assert objects == []
    log = next((tmp_path / "artifacts" / "runs").glob("*/events.jsonl"))
    assert list(events.read(log))[-1]["state"] == "failed"


def test_outputs_do_not_depend_on_the_order_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    before = recipe.with_suffix(".lock").read_bytes()
    shutil.rmtree(tmp_path / "artifacts")
    found = look.workspace.matching
    monkeypatch.setattr(
        look.workspace, "matching", lambda *arguments: list(reversed(found(*arguments)))
    )
    apply(recipe)
    assert recipe.with_suffix(".lock").read_bytes() == before


def test_a_deleted_lockfile_comes_back_without_running(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    lockfile = recipe.with_suffix(".lock")
    before = lockfile.read_bytes()
    lockfile.unlink()
    log: list[events.Event] = []
    apply(recipe, log.append)
    assert ran(log) == []
    assert lockfile.read_bytes() == before


def test_deleted_state_costs_nothing_but_time(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    (tmp_path / "artifacts" / "state.db").unlink()
    assert set(states(recipe).values()) == {"skip"}


def test_a_source_that_changes_while_it_is_read_is_planned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tmp_path)
    read, touched = ingest.parsed, []

    def change_once(*arguments: object) -> object:
        if not touched:
            touched.append(chat(tmp_path / "chats" / "chat-0.json", "changed", "meanwhile"))
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ingest, "parsed", change_once)
    log: list[events.Event] = []
    apply(recipe, log.append)
    assert any("changed while it was being read" in e.get("text", "") for e in log)
    made = rows(tmp_path / "artifacts" / "small" / "ingest" / "conversations.jsonl")
    assert made[0]["messages"][0]["content"] == "changed"
    assert set(states(recipe).values()) == {"skip"}


def test_a_full_disk_is_a_sentence_and_the_next_run_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tmp_path)
    mount = tmp_path / "artifacts"
    with small_disk(mount, "160k"):
        for number in range(60):
            chat(tmp_path / "chats" / f"long-{number}.json", "q" * 3000, f"a{number}" * 1500)
        with pytest.raises(PreconditionError, match=r"kB free, and this run writes about .* kB"):
            apply(recipe)
        monkeypatch.setattr(cost, "check", lambda *arguments: None)
        with pytest.raises(PreconditionError, match="the disk is full") as caught:
            apply(recipe)
        assert "free some space" in caught.value.hint
        assert not recipe.with_suffix(".lock").exists()
        grow(mount)
        apply(recipe)
        assert set(states(recipe).values()) == {"skip"}


def test_a_second_apply_waits_or_says_that_it_may_not(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with (
        opened.at(recipe) as current,
        execute._locked(current, True, lambda event: None),
    ):
        with pytest.raises(
            BusyError, match=rf"another apply \({recipe}, process \d+, since .*\) is"
        ):
            execute.apply(current, lambda event: None, wait=False)
        second = subprocess.Popen([sys.executable, "-m", "runner", "apply", str(recipe)])
        time.sleep(1)
        assert second.poll() is None
    assert second.wait(60) == 0
    assert set(states(recipe).values()) == {"skip"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_apply_exits_75_and_goes_on_next_time(
    tmp_path: Path, number: signal.Signals
) -> None:
    recipe = make(tmp_path)
    for count in range(2000):
        chat(tmp_path / "chats" / f"many-{count}.json", *[f"text {count} {n}" for n in range(40)])
    command = [sys.executable, "-m", "runner", "apply", str(recipe), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "stage_started":
                process.send_signal(number)
                break
        last = process.stdout.read().decode().splitlines()[-1]
        assert process.wait(60) == 75
    assert json.loads(last)["exit_code"] == 75
    apply(recipe)
    assert set(states(recipe).values()) == {"skip"}
    assert list((tmp_path / "artifacts" / "store" / "tmp").iterdir()) == []


def test_kills_at_any_moment_lose_nothing(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=200)
    for attempt in range(12):
        chat(tmp_path / "chats" / f"new-{attempt}.json", "more", f"data {attempt}")
        process = subprocess.Popen(
            [sys.executable, "-m", "runner", "apply", str(recipe)],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(0.1 + 0.04 * attempt)
        process.kill()
        process.wait()
        for link in (tmp_path / "artifacts" / "small").glob("[!.]*"):
            assert link.is_symlink()
            assert link.exists()
    apply(recipe)
    assert set(states(recipe).values()) == {"skip"}
    output = planned(recipe)["split"].output
    shutil.rmtree(tmp_path / "artifacts")
    apply(recipe)
    assert planned(recipe)["split"].output == output


def test_events_end_with_the_state_and_metrics_become_a_table(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with events.Log(path) as log:
        log.add({"event": "metrics", "step": 1, "loss": 2.5, "stage": "train", "steps": 9})
        log.add({"event": "run_finished", "state": "done"})
    path.write_bytes(path.read_bytes() + b'{"event": "cut o')
    assert [event["event"] for event in events.read(path)] == ["metrics", "run_finished"]
    assert events.write_metrics_csv(path, tmp_path / "metrics.csv")
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.split(",")[:5] == ["time", "stage", "step", "epoch", "loss"]
    assert row.split(",")[1:5] == ["train", "1", "", "2.5"]


def test_a_stage_in_a_process_of_its_own_reports_its_error(tmp_path: Path) -> None:
    text = DATA_RECIPE.replace("name: small", "name: small\nbase_model: ./model")
    recipe = make(tmp_path, text + "  - stage: tokenize\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x02pickle")
    with pytest.raises(PreconditionError, match=r"pytorch_model\.bin"):
        apply(recipe)
    assert states(recipe)["split"] == "skip"


def test_a_killed_child_is_explained(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("loading\n\n")
    assert "memory runs out; last words: loading" in child.crash("train", -9, log)
    assert child.crash("train", 3, log) == "train ended with exit code 3: loading"


def test_a_missing_package_of_an_extra_is_a_sentence() -> None:
    error = worker.missing_package("train", ModuleNotFoundError("no", name="torch.nn"))
    assert str(error) == "train needs the Python package torch\n  pip install 'runner[all]'"
    bug = ModuleNotFoundError("no", name="runner.model.nothing")
    assert worker.missing_package("train", bug) is bug


def test_the_lock_and_the_data_are_not_opened_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    (tmp_path / "artifacts" / "apply.lock").unlink()
    assert all(step.state == "skip" for step in apply(recipe))
    assert not (tmp_path / "artifacts" / "apply.lock").exists()


def test_an_apply_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    for count in range(1000):
        chat(tmp_path / "chats" / f"many-{count}.json", *[f"text {count} {n}" for n in range(40)])
    command = ["nohup", sys.executable, "-m", "runner", "apply", str(recipe), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        process.stdout.read()
        assert process.wait(60) == 0


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15])
def test_an_interrupt_as_the_command_starts_prints_no_traceback(
    tmp_path: Path, delay: float
) -> None:
    recipe = make(tmp_path)
    command = [sys.executable, "-m", "runner", "apply", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    # Until Python has read its own modules it may show where; that is before any line of ours.
    assert "runner/" not in said.decode()
    assert process.returncode in (0, 1, 75, -signal.SIGINT)


@pytest.mark.parametrize("place", ["wrapped", "swallowed"])
def test_an_interrupt_in_an_awkward_place_still_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    recipe = make(tmp_path)

    class Swallows:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.001)

    def interrupted(*_: object, **__: object) -> None:
        if place == "swallowed":
            Swallows()
            time.sleep(5)
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RuntimeError("a library's own words") from error

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    hook = sys.unraisablehook
    monkeypatch.setattr(execute, "apply", interrupted)
    try:
        assert cli.main(["apply", str(recipe)]) == 75
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "runner: interrupted\n"
