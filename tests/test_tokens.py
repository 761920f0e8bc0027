from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.errors import RunnerError
from runner.model import load, packing, template, token_book, token_files, tokens
from tests.chat_tokenizers import CHATML, GEMMA2, LLAMA3, QWEN3, chat, tiny

disable_progress_bars()
LONG = chat("Hi", "Hello", "And?", "Да", "More", "12 345", "Bye", "Bye-bye")


def chain(
    conversation: str, first: int, weights: Mapping[int, float], split: str = "train"
) -> dict[str, Any]:
    listed = {str(index): weight for index, weight in weights.items()}
    return {"conversation": conversation, "first": first, "weights": listed, "split": split}


class Desk:
    """A folder with a base, conversations and chains, to write token arrays from."""

    def __init__(self, folder: Path, chat_template: str) -> None:
        self.base = folder / "base"
        self.folder = folder
        self.tokenizer = tiny(chat_template)
        self.tokenizer.save_pretrained(self.base)
        self.progress: list[tuple[int, int]] = []
        self.events: list[dict[str, Any]] = []

    def write(
        self,
        conversations: Mapping[str, Sequence[Mapping[str, str]]],
        chains: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int = 10_000,
        overflow: tokens.Overflow = "rebase",
        output: str = "tokens",
        packed: bool = False,
        scratch: Path | None = None,
        previous: Path | None = None,
        stop_after: int = 10**9,
    ) -> dict[str, Any]:
        def progress(done: int, total: int) -> None:
            self.progress.append((done, total))
            if done >= stop_after:
                raise KeyboardInterrupt

        records = [
            {"id": id, "source": {}, "messages": list(messages)}
            for id, messages in conversations.items()
        ]
        for name, lines in (("conversations", records), ("chains", chains)):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (self.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        self.output = self.folder / output
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        return tokens.write(
            base=self.base,
            conversations=self.folder / "conversations.jsonl",
            chains=self.folder / "chains.jsonl",
            output=self.output,
            max_tokens=max_tokens,
            overflow=overflow,
            progress=progress,
            packed=packed,
            scratch=scratch,
            previous=previous,
            emit=self.events.append,
        )

    @property
    def rows(self) -> list[token_files.Row]:
        return list(token_files.read(self.output / "train.arrow"))

    @property
    def dropped(self) -> list[dict[str, Any]]:
        lines = (self.output / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def learned(self, row: token_files.Row) -> list[tuple[str, float]]:
        """Runs of tokens that carry the same loss, as text with the weight."""
        runs: list[tuple[list[int], float]] = []
        before = 0.0
        for id, weight in zip(row.input_ids.tolist(), row.weights.tolist(), strict=True):
            if weight and weight == before:
                runs[-1][0].append(id)
            elif weight:
                runs.append(([id], weight))
            before = weight
        return [(self.tokenizer.decode(ids), weight) for ids, weight in runs]

    def text(self, row: token_files.Row) -> str:
        text = self.tokenizer.decode(row.input_ids.tolist())
        assert isinstance(text, str)
        return text


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, CHATML)


def test_each_reply_carries_its_weight_and_nothing_else_does(desk: Desk) -> None:
    desk.write({"a": LONG}, [chain("a", 0, {1: 1, 3: 2.5, 5: 0.5})])
    [row] = desk.rows
    assert desk.learned(row) == [
        ("Hello<|im_end|>", 1.0),
        ("Да<|im_end|>", 2.5),
        ("12 345<|im_end|>", 0.5),
    ]
    assert row.replies == 3
    assert row.weights[0] == 0
    assert row.weights.dtype == np.float32
    assert row.input_ids.dtype == np.int32


def test_a_chain_runs_from_its_first_message_to_its_last_weighted_reply(desk: Desk) -> None:
    desk.write({"a": LONG}, [chain("a", 2, {3: 1, 7: 0})])
    [row] = desk.rows
    assert desk.text(row) == (
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nДа<|im_end|>"
    )
    assert row.first == 2


def test_a_later_chain_keeps_the_leading_system_message(desk: Desk) -> None:
    messages = chat("Hi", "Hello", "And?", "ok", system="Be brief.")
    desk.write({"a": messages}, [chain("a", 3, {4: 1})])
    assert desk.text(desk.rows[0]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\nok<|im_end|>"
    )


def test_a_chain_has_the_tokens_of_the_conversation_it_is_cut_from(desk: Desk) -> None:
    desk.write({"a": LONG}, [chain("a", 0, {1: 1, 7: 1}), chain("a", 4, {5: 1})])
    whole, later = desk.rows
    encoding = template.encode(desk.tokenizer, LONG)
    assert whole.input_ids.tolist() == encoding.ids[: encoding.replies[-1].stop]
    alone = template.encode(desk.tokenizer, LONG[4:6])
    assert later.input_ids.tolist() == alone.ids[: alone.replies[-1].stop]


def test_each_content_is_tokenised_once_for_all_chains(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    tokenised = template.Encoder.tokenised

    def counted(self: template.Encoder, texts: Any) -> dict[str, template.Array]:
        found = tokenised(self, texts)
        asked.extend(found)
        return found

    monkeypatch.setattr(template.Encoder, "tokenised", counted)
    desk.write({"a": LONG}, [chain("a", first, {7: 1}) for first in (0, 2, 4, 6)], max_tokens=90)
    assert sorted(asked) == sorted({message["content"] for message in LONG})


def test_rows_come_in_the_order_of_conversations_then_chains(desk: Desk) -> None:
    desk.write(
        {"b": LONG, "unused": LONG, "a": LONG},
        [chain("a", 2, {3: 1}), chain("b", 0, {1: 1}), chain("a", 0, {1: 1})],
    )
    assert [(row.conversation, row.first) for row in desk.rows] == [("b", 0), ("a", 2), ("a", 0)]


def test_the_same_input_gives_the_same_bytes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    chains = [chain(id, first, {7: 1}) for id in "abc" for first in (0, 4)]
    conversations = dict.fromkeys("abc", LONG)
    desk.write(conversations, chains, output="one")
    monkeypatch.setattr(tokens, "_BLOCK_CHARS", 10)
    desk.write(conversations, chains, output="two")
    for name in ("train.arrow", "eval.arrow", "dropped.jsonl"):
        assert (desk.folder / "one" / name).read_bytes() == (
            desk.folder / "two" / name
        ).read_bytes()


def test_splits_are_written_apart_and_counted(desk: Desk) -> None:
    metrics = desk.write(
        {"a": LONG, "b": LONG},
        [chain("a", 0, {1: 1, 3: 1}), chain("a", 2, {3: 1}), chain("b", 0, {1: 1}, "eval")],
    )
    evaluated = token_files.read(desk.output / "eval.arrow")
    assert len(evaluated) == 1
    assert metrics == {
        "train_rows": 2,
        "train_replies": 3,
        "train_tokens": sum(len(row.input_ids) for row in desk.rows),
        "train_trained_tokens": sum(int((row.weights > 0).sum()) for row in desk.rows),
        "train_dropped": 0,
        "train_unstable_conversations": 0,
        "train_system_folded": 0,
        "train_refused_conversations": 0,
        "eval_rows": 1,
        "eval_replies": 1,
        "eval_tokens": len(evaluated[0].input_ids),
        "eval_trained_tokens": len("Hello") + 1,
        "eval_dropped": 0,
        "eval_unstable_conversations": 0,
        "eval_system_folded": 0,
        "eval_refused_conversations": 0,
    }
    assert desk.progress[-1] == (2, 2)


def test_datasets_reads_what_is_written(desk: Desk) -> None:
    desk.write({"a": LONG}, [chain("a", 0, {1: 1, 3: 0.5}), chain("a", 2, {3: 1})])
    read = Dataset.from_file(str(desk.output / "train.arrow"))
    assert read.column_names == ["conversation", "first", "input_ids", "weights", "replies"]
    assert [row["input_ids"] for row in read] == [row.input_ids.tolist() for row in desk.rows]
    assert [row["weights"] for row in read] == [row.weights.tolist() for row in desk.rows]


def test_rows_can_be_indexed_sliced_and_measured(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_book, "_BATCH_TOKENS", 60)
    desk.write({"a": LONG}, [chain("a", first, {7: 1}) for first in (0, 2, 4, 6, 0)])
    rows = token_files.read(desk.output / "train.arrow")
    assert len(rows) == 5
    assert [row.first for row in rows] == [0, 2, 4, 6, 0]
    assert rows[-2].first == 6
    assert [row.first for row in rows[1:3]] == [2, 4]
    assert rows.lengths.tolist() == [len(row.input_ids) for row in rows]
    with pytest.raises(IndexError):
        rows[5]


def length(desk: Desk, messages: Sequence[Mapping[str, str]]) -> int:
    encoding = template.encode(desk.tokenizer, messages)
    return encoding.replies[-1].stop


def test_a_chain_that_fits_exactly_stays_whole(desk: Desk) -> None:
    every = {1: 1.0, 3: 2.0, 5: 3.0, 7: 4.0}
    desk.write({"a": LONG}, [chain("a", 0, every)], max_tokens=length(desk, LONG))
    assert [row.replies for row in desk.rows] == [4]


def test_rebase_starts_anew_at_the_user_message_of_the_first_reply_that_is_left(
    desk: Desk,
) -> None:
    every = {1: 1.0, 3: 2.0, 5: 3.0, 7: 4.0}
    desk.write({"a": LONG}, [chain("a", 0, every)], max_tokens=length(desk, LONG) - 1)
    assert [(row.first, desk.learned(row)) for row in desk.rows] == [
        (
            0,
            [("Hello<|im_end|>", 1.0), ("Да<|im_end|>", 2.0), ("12 345<|im_end|>", 3.0)],
        ),
        (6, [("Bye-bye<|im_end|>", 4.0)]),
    ]


@pytest.mark.parametrize("max_tokens", range(40, 150, 7))
@pytest.mark.parametrize("chat_template", [CHATML, QWEN3, LLAMA3])
def test_rebase_keeps_each_reply_once_with_its_weight_or_reports_it(
    tmp_path: Path, max_tokens: int, chat_template: str
) -> None:
    desk = Desk(tmp_path, chat_template)
    messages = chat(*(text * n for n in range(1, 8) for text in ("ask", "tell")), system="S")
    weights = {index: float(index) for index in range(2, len(messages), 2)}
    desk.write(
        {"a": messages, "b": LONG},
        [chain("a", 0, weights), chain("b", 0, {1: 1})],
        max_tokens=max_tokens,
    )
    rows = [row for row in desk.rows if row.conversation == "a"]
    assert all(len(row.input_ids) <= max_tokens for row in rows)
    learned = [weight for row in rows for _, weight in desk.learned(row)]
    assert learned == sorted(set(learned))
    assert all("tell" in text for row in rows for text, _ in desk.learned(row))
    assert len(learned) + len(desk.dropped) == len(weights)
    assert all(lost["tokens"] > max_tokens for lost in desk.dropped)


def test_a_turn_that_fits_nowhere_is_dropped_with_a_reason(desk: Desk) -> None:
    messages = chat("Hi", "Hello", "Long?", "x" * 200, "Bye", "Bye")
    metrics = desk.write({"a": messages}, [chain("a", 0, {1: 1, 3: 1, 5: 1})], max_tokens=60)
    assert [(row.first, desk.learned(row)) for row in desk.rows] == [
        (0, [("Hello<|im_end|>", 1.0)]),
        (4, [("Bye<|im_end|>", 1.0)]),
    ]
    [lost] = desk.dropped
    assert lost == {
        "conversation": "a",
        "first": 2,
        "reason": "one turn longer than 60 tokens",
        "tokens": length(desk, messages[2:4]),
    }
    assert metrics["train_dropped"] == 1


def test_overflow_drop_leaves_the_whole_chain_out(desk: Desk) -> None:
    desk.write(
        {"a": LONG},
        [chain("a", 0, {1: 1, 7: 1}), chain("a", 6, {7: 1})],
        max_tokens=60,
        overflow="drop",
    )
    assert [row.first for row in desk.rows] == [6]
    [lost] = desk.dropped
    assert lost == {
        "conversation": "a",
        "first": 0,
        "reason": "chain longer than 60 tokens",
        "tokens": length(desk, LONG),
    }


def test_what_is_too_long_is_said_with_the_length_that_would_do(desk: Desk) -> None:
    chains = [chain("a", 0, {1: 1, 7: 1}), chain("a", 6, {7: 1})]
    desk.write({"a": LONG}, chains, max_tokens=60, overflow="drop")
    [warning] = [event["text"] for event in desk.events if event["event"] == "warning"]
    assert f"longer than max_tokens: 60, the longest has {length(desk, LONG)} tokens" in warning


def test_nothing_to_train_on_is_an_error_whatever_there_is_for_eval(desk: Desk) -> None:
    chains = [chain("a", 0, {7: 1}), chain("b", 0, {1: 1}, split="eval")]
    with pytest.raises(RunnerError, match=r"no token to train on .* longer than max_tokens: 60"):
        desk.write({"a": LONG, "b": LONG[:2]}, chains, max_tokens=60, overflow="drop")


def test_overflow_fail_names_the_conversation(desk: Desk) -> None:
    with pytest.raises(RunnerError, match=r"'a'.* takes \d+ tokens, more than max_tokens: 60"):
        desk.write({"a": LONG}, [chain("a", 0, {7: 1})], max_tokens=60, overflow="fail")


def test_an_unstable_template_gives_each_reply_its_own_row(tmp_path: Path) -> None:
    desk = Desk(tmp_path, QWEN3)
    metrics = desk.write(
        {"a": LONG, "b": LONG}, [chain("a", 0, {1: 1, 5: 2}), chain("b", 0, {1: 1})]
    )
    empty = "<think>\n\n</think>\n\n"
    assert [desk.learned(row) for row in desk.rows] == [
        [(f"{empty}Hello<|im_end|>", 1.0)],
        [(f"{empty}12 345<|im_end|>", 2.0)],
        [(f"{empty}Hello<|im_end|>", 1.0)],
    ]
    assert [row.first for row in desk.rows] == [0, 0, 0]
    assert metrics["train_unstable_conversations"] == 1


def test_a_folded_system_message_is_counted(tmp_path: Path) -> None:
    desk = Desk(tmp_path, GEMMA2)
    messages = chat("Hi", "Hello", "And?", "ok", system="Be brief.")
    metrics = desk.write({"a": messages}, [chain("a", 1, {2: 1}), chain("a", 3, {4: 1})])
    assert metrics["train_system_folded"] == 1
    assert "Be brief.\n\nAnd?" in desk.text(desk.rows[1])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (chain("a", 0, {}), "from message 0 of 'a' has no reply that carries loss"),
        (chain("a", 0, {1: 0}), "from message 0 of 'a' has no reply that carries loss"),
        (chain("a", 0, {1: -1}), "'a' has the weights"),
        (chain("a", 0, {2: 1}), "'a': .* loss on message 2, which is not a reply"),
        (chain("a", 4, {1: 1}), "'a': .* loss on message 1, which is not a reply"),
        (chain("z", 0, {1: 1}), "conversation 'z' is not in"),
        (chain("a", 0, {1: 1}, "test"), "'a' has split 'test'"),
    ],
)
def test_a_broken_chain_is_an_error_that_names_the_conversation(
    desk: Desk, broken: dict[str, Any], said: str
) -> None:
    with pytest.raises(RunnerError, match=said):
        desk.write({"a": LONG}, [broken])


def test_a_template_error_names_the_conversation(tmp_path: Path) -> None:
    desk = Desk(tmp_path, GEMMA2)
    messages = [{"role": "user", "content": "Hi"}, *chat("Hi?", "Hello")]
    with pytest.raises(RunnerError, match=r"conversation 'a' from message 0: .*must alternate"):
        desk.write({"a": messages}, [chain("a", 0, {2: 1})])


def test_nothing_left_to_train_on_is_an_error(desk: Desk) -> None:
    with pytest.raises(RunnerError, match="no token to train on in 1 conversations"):
        desk.write({"a": LONG}, [chain("a", 0, {1: 1})], max_tokens=16)


def test_shown_tokens_join_to_the_text_with_letters_whole(desk: Desk) -> None:
    desk.write({"a": LONG}, [chain("a", 2, {3: 0.5})])
    [row] = desk.rows
    shown = token_files.shown(desk.tokenizer, row)
    assert "".join(token["token"] for token in shown) == desk.text(row)
    assert [token["id"] for token in shown] == row.input_ids.tolist()
    learned = [(token["token"], token["weight"]) for token in shown if token["weight"]]
    assert learned == [("", 0.5), ("Д", 0.5), ("", 0.5), ("а", 0.5), ("<|im_end|>", 0.5)]


def test_rows_are_shown_as_json_lines(desk: Desk) -> None:
    desk.write({"a": LONG}, [chain("a", 0, {1: 1}), chain("a", 2, {3: 1}, "eval")])
    lines = [json.loads(line) for line in token_files.json_lines(desk.output)]
    assert [(line["split"], line["first"]) for line in lines] == [("train", 0), ("eval", 2)]
    assert lines[0]["input_ids"] == desk.rows[0].input_ids.tolist()


def test_real_chats_become_rows_of_smollm2(smollm2: Path, tmp_path: Path) -> None:
    desk = Desk(tmp_path, CHATML)
    desk.base = smollm2
    desk.tokenizer = load.tokenizer(smollm2)  # type: ignore[assignment]
    desk.write({"a": LONG}, [chain("a", 0, {1: 1, 5: 1})])
    [row] = desk.rows
    assert desk.learned(row) == [("Hello<|im_end|>", 1.0), ("12 345<|im_end|>", 1.0)]
    assert desk.text(row).startswith("<|im_start|>system\nYou are a helpful AI assistant")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_packing_adds_the_pack_of_each_row_and_changes_nothing_else(desk: Desk) -> None:
    conversations = {f"c{n}": LONG[: 2 * n % 8 + 2] for n in range(12)}
    chains = [chain(id, 0, {1: 1}) for id in conversations]
    desk.write(conversations, chains, max_tokens=200, output="plain")
    metrics = desk.write(conversations, chains, max_tokens=200, output="packed", packed=True)
    packs = packing.read(desk.output)
    assert packs is not None
    assert metrics["train_packs"] == max(packs) + 1 < 12
    filled = np.bincount(packs, weights=[len(row.input_ids) for row in desk.rows])
    assert filled.max() <= 200
    assert metrics["train_pack_fill"] == pytest.approx(filled.mean() / 200, abs=1e-4)
    plain, packed = bytes_of(desk.folder / "plain"), bytes_of(desk.output)
    assert packed.pop("packs.arrow")
    assert packed == plain


def test_messages_without_text_are_left_out_and_indices_stay_those_of_the_record(
    desk: Desk,
) -> None:
    messages = [
        *chat("Hi", "", "And?", "Да", system="S"),
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "7"},
        *chat("More", "ok"),
    ]
    desk.write({"a": messages}, [chain("a", 1, {4: 1, 8: 2}), chain("a", 3, {4: 1, 8: 1})])
    whole, later = desk.rows
    assert desk.learned(whole) == [("Да<|im_end|>", 1.0), ("ok<|im_end|>", 2.0)]
    assert [line.split("<")[0] for line in desk.text(whole).split("<|im_start|>")[1:]] == [
        "system\nS",
        "user\nHi",
        "user\nAnd?",
        "assistant\nДа",
        "tool\n7",
        "user\nMore",
        "assistant\nok",
    ]
    assert "Hi" not in desk.text(later)


def test_loss_on_a_message_without_text_is_an_error(desk: Desk) -> None:
    with pytest.raises(RunnerError, match="loss on message 1, which is not a reply"):
        desk.write({"a": chat("Hi", " ", "And?", "ok")}, [chain("a", 0, {1: 1})])


TOOLS = [*chat("Hi"), {"role": "tool", "content": "7"}, {"role": "assistant", "content": "ok"}]


def test_a_conversation_that_the_template_refuses_is_set_aside_with_the_reason(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, GEMMA2)
    metrics = desk.write(
        {"a": LONG, "tools": TOOLS, "b": LONG},
        [chain("a", 0, {1: 1}), chain("tools", 0, {2: 1}), chain("b", 0, {1: 1}, "eval")],
    )
    reason = (
        "the chat template refuses these messages (user, tool, assistant): "
        "Conversation roles must alternate"
    )
    assert [row.conversation for row in desk.rows] == ["a"]
    assert desk.dropped == [{"conversation": "tools", "first": 0, "reason": reason}]
    assert metrics["train_dropped"] == metrics["train_refused_conversations"] == 1
    assert metrics["eval_refused_conversations"] == 0
    [warning] = desk.events
    assert warning == {
        "event": "warning",
        "text": "the chat template refuses 1 of 3 conversations, or parts of them, which are left "
        f"out (see dropped.jsonl); most often: conversation 'tools' from message 0: {reason}",
    }


def test_only_the_chains_that_the_template_refuses_are_set_aside(tmp_path: Path) -> None:
    desk = Desk(tmp_path, GEMMA2)
    messages = [*TOOLS, *chat("And?", "Да")]
    desk.write({"a": messages}, [chain("a", 0, {4: 1}), chain("a", 3, {4: 1})])
    assert [row.first for row in desk.rows] == [3]
    assert [lost["first"] for lost in desk.dropped] == [0]


def test_a_fault_of_the_template_itself_stays_an_error(tmp_path: Path) -> None:
    desk = Desk(tmp_path, CHATML.replace("<|im_end|>", ""))
    with pytest.raises(RunnerError, match=r"conversation 'a' from message 0: .*no end of turn"):
        desk.write({"a": LONG, "b": LONG}, [chain("a", 0, {1: 1}), chain("b", 0, {1: 1})])


# One more of each kind that takes another way through the code.
KINDS = [LONG, LONG[:2], chat("Hi", "x" * 300, "And?", "ok", system="S"), TOOLS, LONG[2:6]]


def many(kinds: Sequence[int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A conversation of each of these kinds, and its chains."""
    conversations = {f"c{place}-{kind}": KINDS[kind] for place, kind in enumerate(kinds)}
    chains = []
    for id, messages in conversations.items():
        own = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        split = "eval" if id.endswith("1") else "train"
        chains.append(chain(id, 0, dict.fromkeys(own, 1.0), split))
        if messages is not TOOLS:
            chains.append(chain(id, own[-1] - 1, {own[-1]: 2.0}, split))
    return conversations, chains


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("gemma"), GEMMA2)


kinds = st.lists(st.integers(0, len(KINDS) - 1), max_size=12)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(before=kinds, after=kinds, batch_tokens=st.sampled_from([40, 300, 10**6]))
def test_what_is_taken_over_from_an_earlier_output_gives_the_bytes_of_a_build_from_nothing(
    gemma: Desk,
    monkeypatch: pytest.MonkeyPatch,
    before: list[int],
    after: list[int],
    batch_tokens: int,
) -> None:
    monkeypatch.setattr(token_book, "_BATCH_TOKENS", batch_tokens)
    gemma.write(*many([0, *before]), max_tokens=150, output="before")
    expected = gemma.write(*many([0, *after]), max_tokens=150, output="anew", packed=True)
    previous = gemma.folder / "before"
    found = gemma.write(
        *many([0, *after]), max_tokens=150, output="over", packed=True, previous=previous
    )
    assert bytes_of(gemma.folder / "over") == bytes_of(gemma.folder / "anew")
    assert found == expected


def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the tokenizer is given from now on."""
    texts: list[str] = []
    tokenised = template.Encoder.tokenised

    def counted(self: template.Encoder, wanted: Any) -> dict[str, template.Array]:
        found = tokenised(self, wanted)
        texts.extend(found)
        return found

    monkeypatch.setattr(template.Encoder, "tokenised", counted)
    return texts


def test_only_conversations_that_are_new_or_have_other_chains_are_encoded(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations = {"a": chat("a", "A"), "b": chat("b", "B"), "c": chat("c", "C")}
    desk.write(
        conversations, [chain(id, 0, {1: 1}) for id in "abc"], max_tokens=99, output="before"
    )
    texts = asked(monkeypatch)
    chains = [chain("a", 0, {1: 1}), chain("b", 0, {1: 2}), chain("d", 0, {1: 1})]
    desk.write(
        {"d": chat("d", "D"), **conversations},
        [*chains, chain("c", 0, {1: 1}, "eval")],
        max_tokens=99,
        previous=desk.folder / "before",
    )
    assert sorted(texts) == ["B", "C", "D", "b", "c", "d"]


def test_an_earlier_output_of_another_version_is_not_taken(desk: Desk, tmp_path: Path) -> None:
    desk.write({"a": LONG}, [chain("a", 0, {1: 1})], output="before")
    (desk.output / "conversations.arrow").unlink()
    desk.write({"a": LONG}, [chain("a", 0, {1: 1})], previous=desk.folder / "before")
    assert len(desk.rows) == 1


@pytest.mark.parametrize("stop_after", [2, 7, 11])
def test_an_interrupted_run_goes_on_where_it_was_and_ends_in_the_same_bytes(
    gemma: Desk, monkeypatch: pytest.MonkeyPatch, stop_after: int, tmp_path: Path
) -> None:
    everything = many([0, 1, 2, 3, 4] * 3)
    gemma.write(*everything, max_tokens=150, output="anew")
    monkeypatch.setattr(tokens, "_BLOCK_CHARS", 1)
    monkeypatch.setattr(token_book, "_PART_CHARS", 1)
    scratch = tmp_path / "scratch"
    with pytest.raises(KeyboardInterrupt):
        gemma.write(
            *everything, max_tokens=150, output="cut", scratch=scratch, stop_after=stop_after
        )
    (scratch / ".part-1").mkdir()
    gemma.progress.clear()
    gemma.write(*everything, max_tokens=150, output="cut", scratch=scratch)
    assert bytes_of(gemma.folder / "cut") == bytes_of(gemma.folder / "anew")
    assert gemma.progress[0][0] == stop_after + 1
    assert not list(scratch.glob(".*"))


KILLED = """
import os, signal, sys
from pathlib import Path
from runner.model import token_book, tokens

def progress(done, total):
    if done >= 5:
        os.kill(os.getpid(), signal.SIGKILL)

tokens._BLOCK_CHARS = token_book._PART_CHARS = 1
folder = Path(sys.argv[1])
tokens.write(
    base=folder / "base",
    conversations=folder / "conversations.jsonl",
    chains=folder / "chains.jsonl",
    output=folder / "cut",
    max_tokens=150,
    overflow="rebase",
    progress=progress,
    scratch=folder / "scratch",
)
"""


def test_a_killed_process_has_lost_no_finished_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, GEMMA2)
    everything = many([0, 1, 2, 3, 4] * 2)
    desk.write(*everything, max_tokens=150, output="anew")
    (tmp_path / "cut").mkdir()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    monkeypatch.setattr(tokens, "_BLOCK_CHARS", 1)
    desk.write(*everything, max_tokens=150, output="cut", scratch=tmp_path / "scratch")
    assert desk.progress[-1] == (10, 10)
    resumed = [done for done, _ in desk.progress[1:]]
    assert resumed[0] >= 5
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "anew")
