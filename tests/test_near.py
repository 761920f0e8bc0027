import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rensa import RMinHash

from runner.chat.near import _SEED, MINIMA, RUN, _read, components

LONG = " ".join(f"word{n}" for n in range(60))
RUSSIAN = (
    "Мой дядя самых честных правил, когда не в шутку занемог, он уважать себя заставил и лучше "
    "выдумать не мог. Его пример другим наука; но, боже мой, какая скука с больным сидеть и день и "
    "ночь, не отходя ни шагу прочь! Какое низкое коварство полуживого забавлять, ему подушки "
    "поправлять, печально подносить лекарство, вздыхать и думать про себя: когда же чёрт возьмёт "
    "тебя!"
)
CHINESE = "今天天气很好我们一起去公园散步然后在湖边的小餐馆吃午饭下午再去图书馆看书晚上回家写作业"


def groups(*texts: str, similarity: float = 0.8) -> list[str]:
    """The group of each text, by letters: a is the first."""
    names = "abcdefghijklmnop"[: len(texts)]
    return list(components(zip(names, texts, strict=True), similarity).values())


def test_texts_that_differ_in_a_word_are_near() -> None:
    assert groups(LONG, LONG.replace("word30", "other"), LONG[::-1]) == ["a", "a", "c"]


def test_case_spaces_and_punctuation_do_not_count() -> None:
    assert groups("Hello,  World!", "hello world", similarity=1) == ["a", "a"]


def test_short_texts_are_near_only_when_they_are_the_same() -> None:
    assert groups("hi", "hello", "Hi!", "a b c", "a b d", "2", "3", "") == list("abadefgh")


def test_signs_alone_are_told_apart() -> None:
    assert groups("👍", "👎", "👍", "...", "!!!", "2+2", "2<2") == list("abadefg")


def test_russian_and_chinese_are_found() -> None:
    assert groups(RUSSIAN, RUSSIAN.replace("честных", "умных"), RUSSIAN[::-1]) == ["a", "a", "c"]
    assert groups(CHINESE, CHINESE.replace("业", "文"), CHINESE[::-1]) == ["a", "a", "c"]


def test_composed_letters_are_the_decomposed_ones() -> None:
    assert groups("й ё", "и\u0306 е\u0308") == ["a", "a"]


def test_a_chain_of_near_texts_is_one_group() -> None:
    steps = [LONG]
    for n in range(5, 60, 12):
        steps.append(steps[-1].replace(f"word{n} ", f"new{n} "))
    assert groups(*steps) == ["a"] * len(steps)


def test_below_the_asked_similarity_nothing_is_joined() -> None:
    half = " ".join([*LONG.split()[:30], *(f"other{n}" for n in range(30))])
    assert groups(LONG, half) == ["a", "b"]
    assert groups(LONG, half, similarity=0.2) == ["a", "a"]


def test_1_joins_only_the_same_words() -> None:
    assert groups(LONG, LONG.replace("word30", "other"), LONG, similarity=1) == ["a", "b", "a"]


def test_a_lone_surrogate_is_no_reason_to_stop() -> None:
    assert groups("\ud83d", "\ud83d \ud83d", "a \ud83d") == ["a", "b", "c"]


WORDS = st.lists(st.sampled_from("abcdefgh"), max_size=12).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=8), WORDS, st.randoms())
def test_order_does_not_count_and_more_texts_part_no_group(
    texts: list[str], more: str, dice: random.Random
) -> None:
    named = [(str(n), text) for n, text in enumerate(texts)]

    def pairs(found: dict[str, str]) -> set[tuple[str, str]]:
        return {(a, b) for a in found for b in found if found[a] == found[b]}

    before = components(named, 0.6)
    shuffled = dice.sample(named, len(named))
    assert pairs(components(shuffled, 0.6)) == pairs(before)
    assert pairs(before) <= pairs(components([("more", more), *shuffled], 0.6))


@pytest.mark.parametrize("share", [0.9, 0.85])
def test_nearly_every_near_pair_is_found(share: float) -> None:
    dice = random.Random(0)
    texts: list[tuple[str, str]] = []
    for n in range(200):
        words = [str(dice.randrange(10**6)) for _ in range(200)]
        changed = round((1 - share) / (1 + share) * 204 / 5)
        other = list(words)
        for place in dice.sample(range(5, 195, 6), changed):
            other[place] = "x"
        texts += [(f"{n}a", " ".join(words)), (f"{n}b", " ".join(other))]
    found = components(texts, 0.8)
    assert sum(found[f"{n}b"] == f"{n}a" for n in range(200)) >= (198 if share == 0.9 else 180)
    assert len(set(found.values())) >= 200


def test_a_template_in_all_texts_takes_no_square_of_comparisons() -> None:
    texts = [(str(n), f"{LONG} {LONG[::-1]} {n}") for n in range(3000)]
    assert set(components(texts, 0.8).values()) == {"0"}


def templated(count: int, own: int, dice: random.Random) -> list[str]:
    """Texts of a template's 200 words and some of their own."""
    template = [f"word{n}" for n in range(200)]
    return [
        " ".join([*template, *(str(dice.randrange(10**9)) for _ in range(own))])
        for _ in range(count)
    ]


def test_in_a_crowd_that_shares_a_template_only_the_near_are_joined() -> None:
    texts = templated(300, 80, random.Random(0))
    twins = [text.replace("word100 ", "other ") for text in texts]
    named = [
        (f"{n}{twin}", text)
        for twin, all in enumerate((texts, twins))
        for n, text in enumerate(all)
    ]
    found = components(named, 0.8)
    assert found == {id: f"{id[:-1]}0" for id, _ in named}


def test_in_a_crowd_order_does_not_count_and_more_texts_part_no_group() -> None:
    dice = random.Random(1)
    named = [(str(n), text) for n, text in enumerate(templated(300, 30, dice))]

    def parts(named: list[tuple[str, str]]) -> set[frozenset[str]]:
        found = components(named, 0.8)
        return {frozenset(a for a in found if found[a] == b) for b in set(found.values())}

    whole = parts(named)
    assert 1 < len(whole) < 300
    assert parts(dice.sample(named, 300)) == whole
    for part in parts(named[:200]):
        assert any(part <= group for group in whole)


def test_the_words_of_a_long_text_count_to_its_last_one() -> None:
    text = " ".join(str(n) for n in range(50_000))
    spaced = text.replace(" ", " . ")
    assert groups(text, spaced, f"{text} 1", similarity=1) == ["a", "a", "c"]
    assert groups("…" * 200_000, "…" * 200_001, similarity=1) == ["a", "b"]


def test_the_runs_of_a_long_text_go_on_from_piece_to_piece() -> None:
    words = [str(n) for n in range(50_000)]
    padded = [*[""] * (RUN - 1), *words, *[""] * (RUN - 1)]
    runs = [" ".join(padded[n : n + RUN]) for n in range(len(padded) - RUN + 1)]
    whole = RMinHash(MINIMA, _SEED)
    whole.update(runs)
    assert _read(" ".join(words))[1].digest() == whole.digest()


def test_memory_does_not_grow_with_the_length_of_the_texts() -> None:
    def texts() -> Iterator[tuple[str, str]]:
        for n in range(12):
            yield str(n), " ".join(str(word) for word in range(n * 10**6, n * 10**6 + 15_000))
        yield "long", "word " * 400_000

    tracemalloc.start()
    try:
        components(texts(), 0.8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 15e6


def test_groups_do_not_depend_on_the_process() -> None:
    code = (
        "from runner.chat.near import components;"
        "t = ' '.join(f'w{n}' for n in range(60));"
        "print(components([(str(n), t.replace('w30', f'x{n}', n % 2)) for n in range(9)], 0.83))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    ]
    assert said[0] == said[1]
