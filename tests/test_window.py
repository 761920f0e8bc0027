import pytest

from runner.stages.window import chains, merged, windows


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


def test_a_chain_names_messages_not_pairs() -> None:
    counts = {"conversations": 0, "windows": 0, "chains": 0, "without_reply": 0}
    found = list(
        chains(
            [conversation(2)],
            pairs=True,
            expanding=False,
            sliding_turns=(),
            every_reply=False,
            once=True,
            counts=counts,
        )
    )
    assert found == [
        {"conversation": "c", "first": 0, "weights": {"1": 1}},
        {"conversation": "c", "first": 2, "weights": {"3": 1}},
    ]
    assert counts == {"conversations": 1, "windows": 2, "chains": 2, "without_reply": 0}
