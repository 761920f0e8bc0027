from functools import partial
from typing import Any

import pytest

from runner.chat.statistics import Statistics, estimated_tokens, learned_texts, numbers, verdict


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)],
        **more,
    }


def added(*records: dict[str, Any], chars: int = 10) -> Statistics:
    found = Statistics(chars)
    for record in records:
        found.add(numbers(record, chars), partial(dict, record))
    return found


def test_conversations_turns_and_replies_are_counted() -> None:
    summary = added(chat("q", "a", "q", "a"), chat("q"), {"text": "книга"}).summary()
    counts = ("conversations", "documents", "turns", "replies", "characters")
    assert [summary[name] for name in counts] == [3, 1, 5, 2, 10]


def test_the_share_of_each_script_is_by_letters() -> None:
    assert added(chat("привет", "hi")).summary()["scripts"] == {"Cyrillic": 0.75, "Latin": 0.25}


def test_tokens_are_estimated_by_script() -> None:
    assert estimated_tokens(400, {"Latin": 300}) == 100
    assert estimated_tokens(270, {"Cyrillic": 200}) == 100
    assert estimated_tokens(0, {}) == 0


def test_the_better_reply_of_a_preference_is_what_is_learned() -> None:
    better = [{"role": "assistant", "content": "good"}]
    worse = [{"role": "assistant", "content": "bad"}]
    assert list(learned_texts(chat("q", chosen=better, rejected=worse))) == ["good"]
    assert list(learned_texts(chat("q", "a", label=False))) == []


def test_a_beginning_that_many_replies_share_is_found() -> None:
    records = [chat("q", f"Конечно, с радостью помогу: {n}") for n in range(6)]
    records += [chat("q", f"Вопрос {n} решается просто и быстро") for n in range(14)]
    found = added(*records).templates(0.2)
    assert ("begins", "Конечно, с", 6) in found
    assert added(*records).templates(0.9) == [("ends", "о и быстро", 14)][:0]


def test_stretches_that_overlap_are_one_template() -> None:
    closing = "Если остались вопросы, обращайтесь, я всегда рад помочь вам."
    records = [chat("q", f"Ответ. Итог {n % 4}. {closing}") for n in range(40)]
    assert len({r["messages"][1]["content"][-70:] for r in records}) == 4
    assert [count for _, _, count in added(*records, chars=70).templates(0.05)] == [10]


def test_a_beginning_and_an_end_apart_are_two_templates() -> None:
    records = [chat("q", f"Конечно, помогу! {str(n) * 60} Обращайтесь ещё!") for n in range(9)]
    places = [place for place, _, _ in added(*records, chars=15).templates(0.5)]
    assert places == ["begins", "ends"]


def test_a_few_copies_are_chance() -> None:
    assert added(*[chat("q", "the very same reply again")] * 4).templates(0.1) == []


def test_a_quoted_stretch_holds_no_half_of_a_secret() -> None:
    token = "sk" + "-abcdefghijklmnopqrstuvwxyz0123456789"
    found = added(*[chat("q", f"{token} is the key")] * 9, chars=20).templates(0.1)
    assert [text for place, text, _ in found if place == "begins"] == ["[key] is the key"]
    assert "vwxyz0123456789" not in str(found)


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        (1, "1 reply to learn from: "),
        (12, "12 replies to learn from: 1,000 are advised at least"),
        (1000, "enough to begin with"),
        (4000, "a good number"),
        (10_000, "as many as can be wished for"),
    ],
)
def test_the_advice_is_by_how_much_there_is(examples: int, words: str) -> None:
    assert words in verdict(examples)


def test_preferences_and_documents_are_no_replies() -> None:
    better = [{"role": "assistant", "content": "good"}]
    summary = added(
        chat("q", chosen=better, rejected=better),
        chat("q", "a", label=True),
        {"text": "книга"},
        chat("q", "a"),
    ).summary()
    assert [summary[name] for name in ("replies", "preferences", "documents")] == [1, 2, 1]


def test_the_verdict_names_preferences_and_documents_by_themselves() -> None:
    assert verdict(12, 3, 1).startswith(
        "12 replies to learn from (and 3 preferences and 1 document, which make no windows): 1,000"
    )
    assert verdict(0, 1) == "no replies to learn from, but 1 preference, which makes no windows"
