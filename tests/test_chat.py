from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runner.engine import opened
from runner.errors import RecipeError, RunnerError
from runner.model.llama import Llama
from runner.ui import chat
from runner.ui.chat import Saved, Talk
from tests.workspaces import DATA_RECIPE, apply, make, rows, run

RECIPE = "name: small\nbase_model: {model}\nstages:\n  - stage: ingest\n    sources: [chats]\n"
TWO = Talk("be kind").and_then("q0", "a0").and_then("q1", "a1")


@contextmanager
def saving(root: Path, recipe: str = DATA_RECIPE) -> Iterator[Saved]:
    with opened.at(make(root, recipe, chats=1)) as current:
        yield Saved(current, "small-q8_0.gguf")


def saved(root: Path) -> list[Any]:
    """The records in the files that a chat has saved."""
    return [json.loads(path.read_text()) for path in sorted((root / "chats").glob("2*"))]


@contextmanager
def chatting(recipe: Path, *arguments: str, **env: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "runner", "chat", str(recipe), "--base", *arguments]
    environment = {**os.environ, "TERM": "dumb", "EDITOR": "", "VISUAL": "", **env}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        terminal = Terminal(ours, process)
        terminal.until("> ")
        try:
            yield terminal
        finally:
            process.kill()
            os.close(ours)


class Terminal:
    """Types, and reads what a person would see."""

    def __init__(self, descriptor: int, process: subprocess.Popen[bytes]) -> None:
        self._descriptor = descriptor
        self.process = process

    def says(self, line: str) -> str:
        """What is answered to a line, up to the next prompt."""
        self.types(line)
        return self.until("\n> ").partition("\n")[2].removesuffix("\n> ")

    def types(self, line: str) -> None:
        os.write(self._descriptor, f"{line}\n".encode())

    def until(self, end: str) -> str:
        seen = ""
        limit = time.monotonic() + 60
        while end not in seen:
            assert time.monotonic() < limit, seen
            if select.select([self._descriptor], [], [], 1)[0]:
                seen += os.read(self._descriptor, 1000).decode().replace("\r", "")
        return seen

    def ends(self) -> int:
        os.write(self._descriptor, b"\x04")
        return self.process.wait(20)


def roles(messages: list[Mapping[str, Any]]) -> list[tuple[str, str, int]]:
    return [(said["role"], said["content"], said.get("weight", 1)) for said in messages]


def test_only_corrected_replies_are_learned() -> None:
    assert roles(TWO.corrected("b1").messages(learn_all=False)) == [
        ("system", "be kind", 1),
        ("user", "q0", 1),
        ("assistant", "a0", 0),
        ("user", "q1", 1),
        ("assistant", "b1", 1),
    ]


def test_all_replies_are_learned_where_the_user_says_so() -> None:
    assert [said[2] for said in roles(TWO.messages(learn_all=True))] == [1] * 5


def test_a_reply_that_says_nothing_is_not_saved() -> None:
    said = Talk().and_then("q0", " ").and_then("q1", "a1")
    assert [message["content"] for message in said.messages(learn_all=True)] == ["q1", "a1"]


def test_undo_takes_back_the_last_exchange() -> None:
    assert TWO.without_last() == Talk("be kind").and_then("q0", "a0")


def test_the_model_is_asked_with_what_was_corrected() -> None:
    assert TWO.corrected("b1").prompt("q2")[-2:] == [
        {"role": "assistant", "content": "b1"},
        {"role": "user", "content": "q2"},
    ]


def test_save_says_how_much_was_corrected(tmp_path: Path) -> None:
    with saving(tmp_path) as target:
        text = target.save(TWO.corrected("b1"), learn_all=False)
    assert text.startswith(f"saved to {tmp_path / 'chats'}/2")
    assert text.endswith(": 1 of 2 replies corrected, 1 to be learned")


def test_the_next_apply_reads_what_was_saved(tmp_path: Path) -> None:
    with saving(tmp_path) as target:
        target.save(TWO.corrected("b1"), learn_all=False)
    apply(tmp_path / "recipes" / "small.yaml", only=("ingest",))
    found = rows(tmp_path / "artifacts" / "small" / "ingest" / "conversations.jsonl")[0]
    assert roles(found["messages"]) == roles(TWO.corrected("b1").messages(learn_all=False))
    assert found["metadata"].keys() == {"provider", "mode", "version", "timestamp"}


def test_a_conversation_without_a_correction_is_not_saved_blindly(tmp_path: Path) -> None:
    with saving(tmp_path) as target:
        with pytest.raises(RecipeError, match="no reply was corrected"):
            target.save(TWO, learn_all=False)
        assert saved(tmp_path) == []
        assert "0 of 2 replies corrected, 2 to be learned" in target.save(TWO, learn_all=True)
    assert len(saved(tmp_path)) == 1


def test_nothing_said_is_nothing_saved(tmp_path: Path) -> None:
    with saving(tmp_path) as target, pytest.raises(RecipeError, match="nothing was said"):
        target.save(Talk("be kind"), learn_all=True)


def test_a_longer_conversation_takes_the_place_of_its_beginning(tmp_path: Path) -> None:
    with saving(tmp_path) as target:
        target.save(TWO, learn_all=True)
        assert "has it already" in target.save(TWO, learn_all=True)
        target.save(TWO.and_then("q2", "a2"), learn_all=True)
    (record,) = saved(tmp_path)
    assert [said["content"] for said in record["messages"]][-1] == "a2"


def test_a_beginning_that_somebody_changed_stays(tmp_path: Path) -> None:
    with saving(tmp_path) as target:
        target.save(TWO, learn_all=True)
        (path,) = (tmp_path / "chats").glob("2*")
        path.write_text(path.read_text().replace("a0", "better"))
        target.save(TWO.and_then("q2", "a2"), learn_all=True)
    assert len(saved(tmp_path)) == 2


def test_after_reset_a_second_conversation_is_saved_beside_the_first(tmp_path: Path) -> None:
    with saving(tmp_path) as target:
        target.save(TWO, learn_all=True)
        target.begin_anew()
        target.save(TWO.and_then("q2", "a2"), learn_all=True)
    assert len(saved(tmp_path)) == 2


def test_a_recipe_without_a_folder_cannot_save(tmp_path: Path) -> None:
    recipe = DATA_RECIPE.replace("[chats]", "[chats/chat-0.json]")
    with saving(tmp_path, recipe) as target, pytest.raises(RecipeError, match="no source"):
        target.save(TWO, learn_all=True)


def test_a_chat_is_put_right_and_saved(smollm2_gguf: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE.format(model=smollm2_gguf), chats=1)
    with chatting(recipe, "--max-tokens", "8", "--system", "be kind") as terminal:
        assert "/undo" in terminal.says("/help")
        assert "nothing was said yet" in terminal.says("/edit x")
        assert "there is no /sav" in terminal.says("/sav")
        terminal.says("first")
        terminal.says("second")
        assert terminal.says("/undo") == "taken back: second"
        terminal.says(" /third")
        assert "no reply was corrected" in terminal.says("/save")
        assert terminal.says("/edit put right") == "corrected"
        assert "1 of 2 replies corrected, 1 to be learned" in terminal.says("/save")
        terminal.says("/reset")
        assert "nothing was said yet" in terminal.says("/save all")
        assert terminal.ends() == 0
    (record,) = saved(tmp_path)
    first = record["messages"].pop(2)
    assert first["weight"] == 0
    assert record["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "first"},
        {"role": "user", "content": "/third"},
        {"role": "assistant", "content": "put right"},
    ]


def test_a_reply_is_typed_in_lines_where_no_editor_is_set(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    recipe = make(tmp_path, RECIPE.format(model=smollm2_gguf), chats=1)
    with chatting(recipe, "--max-tokens", "2") as terminal:
        terminal.says("hello")
        assert "corrected" in terminal.says("/edit\none\ntwo\n.")
        terminal.says("/save")
    (record,) = saved(tmp_path)
    assert (record["instruction"], record["output"]) == ("hello", "one\ntwo")


def test_a_reply_is_put_right_in_the_editor(smollm2_gguf: Path, tmp_path: Path) -> None:
    editor = tmp_path / "ed it"
    editor.write_text('#!/bin/sh\necho from the editor > "$2"\nexit $1\n')
    editor.chmod(0o755)
    recipe = make(tmp_path, RECIPE.format(model=smollm2_gguf), chats=1)
    with chatting(recipe, "--max-tokens", "2", EDITOR=f"'{editor}' 0") as terminal:
        terminal.says("hello")
        assert terminal.says("/edit") == "corrected"
        terminal.says("/save")
    assert saved(tmp_path)[0]["output"] == "from the editor"


@pytest.mark.parametrize("editor", ["false", "true", "/no/such/editor", "'"])
def test_an_editor_that_fails_or_changes_nothing_leaves_the_reply(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], editor: str
) -> None:
    monkeypatch.setenv("VISUAL", editor)
    if editor == "true":
        assert chat._edited(TWO, "") == TWO
        assert "it stays as it was" in capsys.readouterr().out
        return
    with pytest.raises(RunnerError):
        chat._edited(TWO, "")


def test_what_a_context_cannot_hold_is_left_out_with_a_word(
    smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Talk()
    for number in range(3):
        said = said.and_then(f"question {number} {'sea ' * 150}", "a")
    with Llama(smollm2_gguf, context=512, threads=1) as llama:
        after = chat._asked(llama, said, "And now?", 4)
        assert (
            "the context is full: the model sees this from question 2 on" in capsys.readouterr().out
        )
        assert len(after.exchanges) == 4
        assert chat._asked(llama, after, "sea " * 600, 4) == after
        assert "say it shorter" in capsys.readouterr().out


def test_an_interrupt_ends_the_reply_and_not_the_chat(smollm2_gguf: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE.format(model=smollm2_gguf), chats=1)
    with chatting(recipe, "--max-tokens", "2000") as terminal:
        terminal.types("Tell me a very long story about the sea.")
        terminal.until("sea.\n")
        terminal.until(" ")  # the reply has begun
        terminal.process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        terminal.until("\n> ")
        assert time.monotonic() - begin < 5
        assert "taken back" in terminal.says("/undo")
        assert terminal.ends() == 0


def test_one_reply_to_a_prompt_as_json(smollm2_gguf: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path, RECIPE.format(model=smollm2_gguf), chats=1)
    asked = ("--once", "What is the capital of France?", "--system", "You are a helpful assistant.")
    done = run("chat", recipe, "--base", *asked, "--max-tokens", "32", "--json")
    assert "Paris" in json.loads(done.stdout)["reply"]


def test_a_prompt_without_a_word_is_refused(tmp_path: Path) -> None:
    done = run("chat", make(tmp_path, chats=1), "--base", "--once", " ")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--once has nothing to say" in done.stderr


def test_without_a_base_model_there_is_none_to_talk_with(tmp_path: Path) -> None:
    done = run("chat", make(tmp_path, chats=1), "--base", "--once", "hi")
    assert (done.returncode, done.stdout) == (3, "")
    assert "has no base model" in done.stderr
