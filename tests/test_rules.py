import subprocess
import sys
import time

import pytest
from pydantic import ValidationError

from runner.chat import rules
from runner.chat.rules import Rule, check
from runner.errors import RunnerError
from runner.stages.rule import RuleSettings

RULING = (
    "РЕШЕНИЕ\n\nСуд, рассмотрев дело, УСТАНОВИЛ:\nистец прав.\n\nСуд РЕШИЛ:\nиск удовлетворить."
)


def parts(*sections: str, in_order: bool = False) -> Rule:
    return Rule("parts", sections=sections, in_order=in_order)


def test_a_rule_is_kept_when_its_pattern_is_found() -> None:
    assert check(Rule("step", pattern="^Small step:"), "Well.\nSmall step: go") == ""
    assert check(Rule("step", pattern="^Small step:"), "a Small step: go") == (
        "its pattern is not found"
    )


def test_a_document_has_all_its_parts() -> None:
    assert check(parts("установил", "решил"), RULING) == ""
    assert check(parts("Установил", "Постановил"), RULING) == "it has no section 'Постановил'"


def test_a_section_is_a_whole_word() -> None:
    assert check(parts("решил"), "Суд разрешил спор.") == "it has no section 'решил'"


def test_a_heading_with_spaces_between_its_letters_is_the_heading() -> None:
    assert check(parts("УСТАНОВИЛ", "РЕШИЛ:"), "у с т а н о в и л :\nи\nР Е Ш И Л:\n") == ""


def test_a_section_may_be_broken_over_lines() -> None:
    assert check(parts("Мотивировочная часть"), "МОТИВИРОВОЧНАЯ\n  ЧАСТЬ") == ""


def test_order_counts_where_it_is_asked_for() -> None:
    assert check(parts("решил", "установил"), RULING) == ""
    assert check(parts("установил", "решил", in_order=True), RULING) == ""
    assert check(parts("решил", "установил", in_order=True), RULING) == (
        "it has no section 'установил' after the sections before it"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "its pattern is found 0 times, fewer than 2"),
        ("ст. 1", "its pattern is found 1 times, fewer than 2"),
        ("ст. 1, ст. 2", ""),
        ("ст. 1, ст. 2, ст. 3", ""),
        ("ст. 1, ст. 2, ст. 3, ст. 4", "its pattern is found more than 3 times"),
    ],
)
def test_a_pattern_may_be_counted(text: str, reason: str) -> None:
    assert check(Rule("law", pattern=r"ст\. \d", min_count=2, max_count=3), text) == reason


def test_a_length_may_be_asked_for() -> None:
    rule = Rule("length", min_chars=3, max_chars=5)
    assert [check(rule, text) for text in ("  ab  ", "abc", "abcde", "abcdef")] == [
        "it has 2 characters, fewer than 3",
        "",
        "",
        "it has 6 characters, more than 5",
    ]


def test_all_parts_of_a_rule_must_hold() -> None:
    rule = Rule("all", pattern="a", sections=("b",), min_chars=5)
    assert check(rule, "a b ccc") == ""
    assert check(rule, "a b")
    assert check(rule, "a ccccc")
    assert check(rule, "b ccccc")


def test_the_share_of_texts_that_keep_a_rule() -> None:
    assert rules.share(["abc", "", "xbx", "x"], Rule("b", pattern="b")) == 0.5
    assert rules.share([], "b") == 0


def test_a_text_is_searched_in_its_first_million_characters() -> None:
    assert rules.keeps("x" * 999_999 + "y", "y")
    assert not rules.keeps("x" * 1_000_000 + "y", "y")


SLOW = [
    r"(a+)+$",
    r"(a|aa)+$",
    r"(a|a?)+$",
    r"(.*)*\1$b",
    r"([a-z]+)*=",
    r"(\w+\s?)*[!]$",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r"(x+x+)+y",
    r"(.*?,){30}P",
    r"(a*)*b",
    r"(a*)*(b*)*c",
    r"((a+)*)+[^ab ]",
    r"(?:a?){200}a{200}!",
    r"(?i)(a|A|aa)+!",
    r"(?=(a+))\1*(a|aa)+!",
    r"(?<=(a|aa)+)(a|aa)+!",
    r"(a|b|ab)*(ba)*!",
    r"\A(?:(?:a|ab)(?:b|))*\z!",
    r"(?:a+){10}(?:a+){10}!",
    r"(?:[ab]+[ab]+)+!",
    r"(?:foo|a|b){e<=30}(?:a|aa)+!",
    r"(?b)(?:abbaabbaabba!){e}",
    r"(?e)(?:(?:a|b)+!){e<=20}",
    r"(?:a(?=.*b)|b(?=.*a))*!",
    r".*.*.*.*.*.*!",
    r"(?:.|\n)*(?:.|\n)*(?:.|\n)*!",
    r"(?s)(?:.*a){15}!",
    r"((ab)*|(ba)*)*!",
    r"(?V1)(?:[[a-c]--[b]]|a|b)+(?:a|b)+(?:a|aa|b)+!",
    r"(\p{L}+\p{L}*)+\d!",
]


@pytest.mark.parametrize("pattern", SLOW)
def test_no_pattern_outlasts_its_time(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "TIMEOUT_S", 0.2)
    text = "ab" * 3000 + "a" * 3000 + "b" + "x" * 40 + " a,b," * 100
    started = time.monotonic()
    try:
        check(Rule("slow", pattern=pattern), text)
        check(Rule("slow", pattern=pattern, min_count=0, max_count=10**9), text)
    except TimeoutError:
        pass
    assert time.monotonic() - started < 2


def test_a_slow_rule_is_named() -> None:
    rule = Rule("ends in a", pattern=r"(a|aa)+$")
    with pytest.raises(RunnerError, match=r"the rule 'ends in a': the pattern .* more than 1 s"):
        rules.share(["a" * 5000 + "b"], rule)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "is not a regular expression: missing )"),
        ("[a", "is not a regular expression: "),
        ("a**", "is not a regular expression: multiple repeat"),
        (r"\L<words>", "is not a regular expression: undefined named list"),
        ("(?:a{1000}){1000}", "repeats too much"),
        ("a{1000000000}", "repeats too much"),
        ("(?:(?:(?:a?){1000}){1000}){10}", "repeats too much"),
        ("(a{3}b{4}){5}{99999}", "repeats too much"),
        ("(?R)?a", "calls itself"),
        ("(a(?1)?b)+", "calls itself"),
        ("(?P<x>a(?&x)?)", "calls itself"),
        ("(" * 499 + ")" * 499, "has too many groups inside one another"),
    ],
)
def test_an_unusable_pattern_is_refused_with_the_reason(pattern: str, reason: str) -> None:
    with pytest.raises(rules.UnusablePatternError, match=f"^{reason[:30].replace('(', '.')}"):
        rules.refuse_unsafe(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^Small step: \S.*\Z",
        r"\d{1,4}(?:[ -]\d{2,4}){3}",
        r"\{{2}\w{1,1000}\}{2}",
        r"ст\.\s*\d+",
        r"(?:[A-ZА-Я]{3,30}\s?){2,20}",
    ],
)
def test_ordinary_patterns_are_taken(pattern: str) -> None:
    rules.refuse_unsafe(pattern)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "asks for nothing"),
        ({"max_count": 3, "sections": ("a",)}, "no pattern to count"),
        ({"pattern": "a", "max_count": 0}, "max_count 0 below min_count 1"),
        ({"min_chars": 9, "max_chars": 8}, "max_chars 8 below min_chars 9"),
        ({"sections": (" ",)}, "a section of spaces alone"),
        ({"pattern": "a("}, "is not a regular expression"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        RuleSettings.model_validate({"name": "x", **settings})


def test_settings_give_the_plain_rule() -> None:
    settings = RuleSettings(name="x", pattern="a", min_count=0, max_count=2)
    assert settings.plain() == Rule("x", pattern="a", min_count=0, max_count=2)


def test_rules_need_nothing_heavy() -> None:
    code = (
        "import sys, runner.stages.clean, runner.stages.rule; "
        "print([m for m in ('numpy', 'torch', 'py3langid', 'rensa') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
