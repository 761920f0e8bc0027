import hashlib

from hypothesis import given
from hypothesis import strategies as st

from runner.stages.split import content_hash, eval_set


def ids(count: int) -> list[str]:
    return [hashlib.sha256(str(n).encode()).hexdigest()[:16] for n in range(count)]


def test_about_the_asked_share_is_held_out() -> None:
    assert 430 < len(eval_set(ids(10_000), 0.05)) < 570


@given(st.sets(st.text("abcdef0123456789", min_size=16, max_size=16), min_size=40), st.data())
def test_more_data_moves_no_conversation(contents: set[str], data: st.DataObject) -> None:
    fewer = set(data.draw(st.permutations(sorted(contents)))[: len(contents) // 2])
    before = eval_set(fewer, 0.3)
    after = eval_set(contents, 0.3)
    if len(before) > 1:  # the one that a small set is given by force may go back
        assert before == after & fewer


def test_a_small_set_keeps_one_for_eval_and_one_for_training() -> None:
    assert len(eval_set(ids(3), 0.001)) == 1
    assert len(eval_set(ids(2), 0.99)) == 1
    assert eval_set(ids(1), 0.5) == set()


def test_repeats_share_a_side() -> None:
    assert content_hash("0123456789abcdef~2") == "0123456789abcdef"


def test_no_eval_is_no_eval() -> None:
    assert eval_set(ids(10), 0) == set()
