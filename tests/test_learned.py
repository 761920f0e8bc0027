"""What a model has met, as its folder says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.chat import learned
from runner.chat.learned import Learned
from runner.errors import RunnerError

MET = Learned(frozenset("ab"), frozenset("c"), frozenset({"d~2"}))


def split(folder: Path, *ids: str) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"conversation": id, "split": "train"}) + "\n" for id in (*ids, *ids)]
    (folder / "chains.jsonl").write_text("".join(lines))
    return folder


def test_the_file_is_sorted_lines_of_a_word_and_an_id(tmp_path: Path) -> None:
    learned.write(tmp_path, MET)
    text = (tmp_path / "conversations.txt").read_text()
    assert text == "dropped d~2\neval c\ntrain a\ntrain b\n"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    learned.write(tmp_path, MET)
    assert learned.read(tmp_path) == MET


def test_where_nothing_was_noted_nothing_is_known(tmp_path: Path) -> None:
    assert learned.read(tmp_path) is None


@pytest.mark.parametrize("line", ["train", "learned a", "train "])
def test_a_line_that_says_something_else_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "conversations.txt").write_text(f"train a\n{line}\n")
    with pytest.raises(RunnerError, match=r"conversations\.txt:2: .* is not `train ID`"):
        learned.read(tmp_path)


def test_what_was_trained_once_stays_trained() -> None:
    found = MET.with_more(train=["c"], eval=["a", "e"], dropped=["b", "f"])
    assert found.train == frozenset("abc")
    assert found.eval == frozenset("e")
    assert found.dropped == frozenset({"d~2", "f"})


def test_each_new_conversation_counts_once(tmp_path: Path) -> None:
    learned.write(tmp_path, MET)
    assert learned.count_new(split(tmp_path / "split", "a", "c", "d~2", "x", "y"), tmp_path) == 2


def test_without_a_model_all_are_new(tmp_path: Path) -> None:
    assert learned.count_new(split(tmp_path / "split", "a", "b"), None) == 2


def test_a_model_that_says_nothing_has_met_nothing(tmp_path: Path) -> None:
    assert learned.count_new(split(tmp_path / "split", "a", "b"), tmp_path) == 2
