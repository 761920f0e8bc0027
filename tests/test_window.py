from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.chat import jsonl
from runner.errors import RunnerError
from runner.stages.stage import Dirs
from runner.stages.window import Window, chains, merged, parted, stretch, windows


def conversation(pairs: int, **more: object) -> dict[str, object]:
    messages = [
        {"role": "assistant" if n % 2 else "user", "content": str(n)} for n in range(2 * pairs)
    ]
    return {"id": "c", "messages": messages, **more}


@pytest.mark.parametrize(("turns", "distinct"), [(10, 10), (50, 70), (200, 295)])
def test_the_number_of_distinct_windows_is_the_documented_one(turns: int, distinct: int) -> None:
    assert len(set(windows(turns // 2, True, True, (8,)))) == distinct


def test_a_short_conversation_has_no_sliding_window() -> None:
    assert windows(3, False, False, (8,)) == []


def test_windows_that_start_together_become_one_chain() -> None:
    spans = windows(3, True, True, ())
    assert {k: dict(v) for k, v in merged(set(spans), False).items()} == {
        0: {0: 1, 1: 1, 2: 1},
        1: {1: 1},
        2: {2: 1},
    }


def test_counted_duplicates_weigh_twice() -> None:
    assert merged(windows(2, True, True, ()), False)[0] == {0: 2, 1: 1}


def test_every_reply_weighs_once_for_each_window_it_is_in() -> None:
    assert merged(windows(3, False, True, ()), True)[0] == {0: 3, 1: 2, 2: 1}


SOURCE = {"path": "chats.json", "format": "messages", "index": 7}


def every_reply_of(pairs: int, *, expanding: bool, sliding_turns: tuple[int, ...]) -> int:
    """The number of weights of the chains of a conversation in which every reply is learned."""
    made = chains(
        [conversation(pairs, source=SOURCE)],
        pairs=False,
        expanding=expanding,
        sliding_turns=sliding_turns,
        every_reply=True,
        once=True,
        counts=Counter(),
    )
    return sum(len(chain["weights"]) for chain in made)


def test_a_very_long_conversation_expands_in_time_that_its_replies_take() -> None:
    assert every_reply_of(50_000, expanding=True, sliding_turns=()) == 50_000


def test_windows_with_more_weights_than_a_file_should_hold_are_refused() -> None:
    assert every_reply_of(5_000, expanding=False, sliding_turns=(100,)) == 4_951 * 50
    with pytest.raises(RunnerError) as caught:
        every_reply_of(10_000, expanding=False, sliding_turns=(10_000,))
    assert str(caught.value) == (
        "window: conversation c (chats.json, record 7) has 10,000 replies, and its windows would "
        "give 25,005,000 weights; at most 5,000,000 are possible\n"
        "  with `loss: every_reply` each window weighs all of its replies: set smaller "
        "`sliding_turns`, or `loss: last_reply`"
    )


def found(records: list[dict[str, object]]) -> tuple[list[dict[str, object]], Counter[str]]:
    """The chains of pairs, and what was counted."""
    counts: Counter[str] = Counter()
    made = chains(
        records,
        pairs=True,
        expanding=False,
        sliding_turns=(),
        every_reply=False,
        once=True,
        counts=counts,
    )
    return list(made), +counts


def test_a_chain_names_messages_not_pairs() -> None:
    made, counts = found([conversation(2)])
    assert made == [
        {"conversation": "c", "first": 0, "weights": {"1": 1}},
        {"conversation": "c", "first": 2, "weights": {"3": 1}},
    ]
    assert counts == {"conversations": 1, "windows": 2, "chains": 2}


PREFERENCE = conversation(1, chosen=[], rejected=[])
JUDGED = conversation(1, label=False)
DOCUMENT = {"id": "d", "text": "once upon a time"}


def test_preferences_and_documents_make_no_windows_and_are_counted() -> None:
    made, counts = found([PREFERENCE, conversation(1), DOCUMENT, JUDGED])
    assert len(made) == 1
    assert counts == {
        "conversations": 1,
        "windows": 1,
        "chains": 1,
        "preferences": 2,
        "documents": 1,
    }


def run(folder: Path, records: list[dict[str, object]]) -> tuple[Any, list[str]]:
    """The metrics of the stage, and its warnings."""
    jsonl.write(folder / "conversations.jsonl", records)
    warnings: list[str] = []
    dirs = Dirs(
        inputs={"conversations": folder},
        output=folder,
        scratch=folder,
        cache=folder,
        sources=(),
        base_model=None,
        recipe="r",
        seed=0,
        emit=lambda event: warnings.append(event["text"]),
    )
    return Window(stage="window").run(dirs), warnings


def test_records_that_make_no_windows_are_one_warning(tmp_path: Path) -> None:
    metrics, (warning,) = run(tmp_path, [DOCUMENT, PREFERENCE, JUDGED, conversation(1)])
    assert warning.startswith("1 document and 2 preferences make no windows: a document is text")
    assert metrics == {
        "conversations": 1,
        "windows": 1,
        "chains": 1,
        "without_reply": 0,
        "preferences": 2,
        "documents": 1,
    }
    assert run(tmp_path, [conversation(1)])[1] == []


def test_nothing_but_documents_and_preferences_is_an_error_that_says_their_use(
    tmp_path: Path,
) -> None:
    with pytest.raises(RunnerError, match="there is no conversation, only 2 documents") as caught:
        run(tmp_path, [DOCUMENT, DOCUMENT])
    assert "pretraining" in caught.value.hint
    with pytest.raises(RunnerError, match="there is no conversation, only 1 preference"):
        run(tmp_path, [PREFERENCE])
    with pytest.raises(RunnerError, match="no reply to learn from in 1 conversations"):
        run(tmp_path, [conversation(0), DOCUMENT])


@given(
    st.integers(1, 30),
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from([2, 4, 8, 16]), max_size=2),
    st.booleans(),
    st.booleans(),
)
def test_a_chain_gives_back_the_windows_it_was_made_of(
    pairs_count: int, pairs: bool, expanding: bool, sliding: list[int], every: bool, once: bool
) -> None:
    spans = windows(pairs_count, pairs, expanding, sliding)
    spans = sorted(set(spans)) if once else sorted(spans)
    back = [
        (first, last, learned)
        for first, weights in merged(spans, every).items()
        for last, learned in parted({"weights": {str(k): w for k, w in weights.items()}}, every)
    ]
    assert sorted(back) == [
        (first, last, list(range(first, last + 1)) if every else [last]) for first, last in spans
    ]


def test_a_window_stands_behind_the_system_message_with_the_loss_that_it_has() -> None:
    system = {"role": "system", "content": "s"}
    messages = [system, *conversation(3)["messages"]]  # type: ignore[misc]
    record = {"messages": messages, "tools": [{"name": "t"}]}
    window = stretch(record, 3, 6, [6])
    assert window == {
        "messages": [system, messages[3], {**messages[4], "weight": 0}, *messages[5:7]],
        "tools": [{"name": "t"}],
    }
    assert stretch(record, 0, 2, [2])["messages"] == messages[:3]
