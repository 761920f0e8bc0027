import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner import cli
from runner.chat import files
from runner.chat.conversation import Conversation
from runner.chat.shapes import Shape, shaped
from runner.engine import opened
from runner.errors import PreconditionError, RunnerError
from runner.ui import export_data
from tests.workspaces import DATA_RECIPE, apply, make, rows

CALL = {"name": "weather", "arguments": {"city": "Rome"}}
TOOLS = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "Is it warm in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "content": "30"},
        {"role": "assistant", "content": "Yes.", "thinking": "30 is warm"},
        {"role": "user", "content": "And in Oslo?"},
        {"role": "assistant", "content": "No."},
    ],
    "tools": [{"type": "function", "function": {"name": "weather"}}],
}
PLAIN = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b"},
    ]
}


def read_back(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """What ingest makes of a record, but for where it stood."""
    (found,) = files.read("f.jsonl", json.dumps(record).encode())
    assert isinstance(found, Conversation), found
    return found.content.record()


@pytest.mark.parametrize("conversation", [PLAIN, TOOLS])
def test_messages_are_read_back_the_same(conversation: dict[str, Any]) -> None:
    made = shaped(conversation, "messages")
    assert read_back(made.record) == conversation
    assert made.lost == ()


def test_sharegpt_is_read_back_the_same_but_for_the_thinking() -> None:
    assert read_back(shaped(PLAIN, "sharegpt").record) == PLAIN
    made = shaped(TOOLS, "sharegpt")
    assert made.lost == ("weights", "thinking")
    messages = [
        {name: value for name, value in message.items() if name != "thinking"}
        for message in TOOLS["messages"]
    ]
    assert read_back(made.record) == {**TOOLS, "messages": messages}


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), TEXT | st.just(""))
def test_alpaca_is_read_back_the_same(turns: list[tuple[str, str]], system: str) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    made = shaped({"messages": messages}, "alpaca")
    assert read_back(made.record) == {"messages": messages}
    assert made.lost == ()


def test_alpaca_has_no_place_for_tools() -> None:
    made = shaped(TOOLS, "alpaca")
    assert made.record is None
    assert made.lost == ("no turns",)


def test_openai_gets_ids_for_calls_and_their_results() -> None:
    record = shaped(TOOLS, "messages").record
    assert record is not None
    _, _, call, result, *_ = record["messages"]
    assert call["tool_calls"] == [
        {
            "id": "call_2_0",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
        }
    ]
    assert result["tool_call_id"] == "call_2_0"


def made(path: Path, recipe: str = DATA_RECIPE) -> str:
    found = make(path, recipe)
    apply(found)
    return str(found)


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_each_window_is_a_record_and_no_chain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = made(tmp_path)
    assert cli.main(["cat", recipe, "window", "--as", "messages"]) == 0
    windows = printed(capsys)
    # Chats of 1 to 6 pairs: p pairs, p expanding, less the shared first one, and p - 4 sliding.
    assert len(windows) == sum(2 * p - 1 + max(0, p - 4) for p in range(1, 7))
    assert all(w["messages"][0]["role"] == "user" for w in windows)
    assert [w["messages"][-1].get("weight") for w in windows] == [None] * len(windows)
    assert all(m["weight"] == 0 for w in windows for m in w["messages"][1:-1:2])


def test_every_reply_of_a_window_is_learned_where_the_recipe_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = made(
        tmp_path, DATA_RECIPE.replace("conversational", "conversational\n    loss: every_reply")
    )
    assert cli.main(["cat", recipe, "window", "--as", "messages"]) == 0
    assert not any("weight" in m for w in printed(capsys) for m in w["messages"])


def test_windows_are_those_that_were_made_and_not_those_of_an_edited_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = made(tmp_path)
    assert cli.main(["cat", recipe, "window", "--as", "messages"]) == 0
    before = printed(capsys)
    edited = Path(recipe).read_text().replace("conversational", "instruct")
    Path(recipe).write_text(edited)
    assert cli.main(["cat", recipe, "window", "--as", "messages"]) == 0
    assert printed(capsys) == before


@pytest.mark.parametrize("shape", ["messages", "sharegpt", "alpaca"])
def test_train_and_eval_are_written_whole_and_read_back(tmp_path: Path, shape: Shape) -> None:
    recipe = made(tmp_path)
    lost = export_data.Lost()
    with opened.at(Path(recipe)) as current:
        counts = export_data.write(current, shape, tmp_path / "out", lost)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "eval_dataset.jsonl",
        "train_dataset.jsonl",
    ]
    chains = rows(tmp_path / "artifacts/small/split/chains.jsonl")
    for (path, count), side in zip(counts.items(), ("train", "eval"), strict=True):
        assert count == sum(sum(c["weights"].values()) for c in chains if c["split"] == side) > 0
        found = list(files.read("f.jsonl", path.read_bytes()))
        assert len(found) == count
        assert all(isinstance(one, Conversation) for one in found)
    assert bool(lost) == (shape != "messages")


def test_the_command_says_how_many_of_each_and_what_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = made(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export-data", recipe, "--as", "alpaca"]) == 0
    train, held_out, lost = capsys.readouterr().out.splitlines()
    assert train.startswith("wrote train_dataset.jsonl: ")
    assert held_out.startswith("wrote eval_dataset.jsonl: ")
    assert "windows: earlier replies carry no loss here" in lost
    assert cli.main(["export-data", recipe, "--json", "--to", "there"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [Path(one["path"]).parent.name for one in said["written"]] == ["there", "there"]
    assert said["lost"] == {}


def test_what_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make(tmp_path)
    assert cli.main(["export-data", str(recipe), "--to", str(tmp_path / "out")]) == 3
    assert "split has made nothing yet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    apply(recipe)
    assert cli.main(["cat", str(recipe), "ingest", "--as", "messages"]) == 2
    assert "ingest has no windows to show as messages" in capsys.readouterr().err
    recipe.write_text(DATA_RECIPE.partition("  - stage: split")[0])
    assert cli.main(["export-data", str(recipe)]) == 3
    assert "has no stage split" in capsys.readouterr().err


def test_a_lockfile_that_is_gone_asks_for_an_apply(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    recipe.with_suffix(".lock").unlink()
    with (
        opened.at(recipe) as current,
        pytest.raises(PreconditionError, match="the lockfile does not say what split was made"),
    ):
        export_data.write(current, "messages", tmp_path, export_data.Lost())


def test_chains_without_their_conversation_are_an_error() -> None:
    chain = {"conversation": "gone", "first": 0, "weights": {"1": 1}}
    with pytest.raises(RunnerError, match="windows of a conversation 'gone'"):
        list(export_data.windows([chain], [], every_reply=False))


def test_an_export_of_what_is_no_longer_current_says_so(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    command = [sys.executable, "-m", "runner", "export-data", str(recipe), "--to", str(tmp_path)]
    fresh = subprocess.run(command, check=True, capture_output=True, text=True)
    assert fresh.stderr == ""
    recipe.write_text(recipe.read_text().replace("0.2", "0.4"))
    stale = subprocess.run(command, check=True, capture_output=True, text=True)
    assert stale.stderr == "this is what was made last: `runner apply` would run split\n"
