import pytest

from runner.engine.words import SHOWN_MAX, did_you_mean, escaped, shown


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("max_token", "'max_token'"),
        ("it's", '"it\'s"'),
        ("\x1b[31mred", r"'\x1b[31mred'"),
        ("a\nb\tc", r"'a\nb\tc'"),
        ("\u202egnp.exe", r"'\u202egnp.exe'"),
        ("\ud800", r"'\ud800'"),
        ("приветик", "'приветик'"),
        ("", "''"),
        (None, "null"),
        (True, "true"),
        (5e-6, "5e-06"),
        ([1, "a"], "[1, 'a']"),
        (b"\x1b", r"b'\x1b'"),
    ],
)
def test_a_value_is_shown_without_anything_a_terminal_obeys(value: object, expected: str) -> None:
    assert shown(value) == expected


def test_an_integer_that_python_refuses_to_write_is_shown_by_its_size() -> None:
    assert shown(10**5000) == "<16610-bit integer>"


@pytest.mark.parametrize(
    "value",
    ["x" * 61, "\x1b" * 1_000_000, "😀" * 60, ["x" * 1000] * 1000, {str(i): i for i in range(99)}],
    ids=["just too long", "escapes", "emoji", "list", "mapping"],
)
def test_a_long_value_is_shown_in_part(value: object) -> None:
    text = shown(value)
    assert len(text) <= SHOWN_MAX
    assert text.isprintable()


def test_a_text_that_just_fits_is_shown_whole() -> None:
    assert shown("x" * (SHOWN_MAX - 2)) == "'" + "x" * (SHOWN_MAX - 2) + "'"


def test_the_cut_is_marked() -> None:
    assert shown("x" * 100) == "'" + "x" * (SHOWN_MAX - 3) + "'…"


def test_a_value_nested_without_end_is_shown() -> None:
    endless: list[object] = []
    endless.append(endless)
    assert len(shown(endless)) <= SHOWN_MAX


def test_escaped_keeps_what_can_be_read() -> None:
    assert escaped("häßlich 文字 C:\\x") == "häßlich 文字 C:\\x"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x00b", r"a\x00b"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u2028b\u200bc", r"a\u2028b\u200bc"),
        ("\x7f\r", r"\x7f\r"),
    ],
)
def test_escaped_writes_controls_as_escapes(text: str, expected: str) -> None:
    assert escaped(text) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("max_token", "; did you mean 'max_tokens'?"),
        ("max-tokens", "; did you mean 'max_tokens'?"),
        ("QLoRA", "; did you mean 'qlora'?"),
        ("qlora", "; did you mean 'qlora'?"),
        ("colour", ""),
        ("", ""),
        ("x" * 1_000_000, ""),
    ],
)
def test_the_nearest_known_word_is_offered(word: str, expected: str) -> None:
    assert did_you_mean(word, iter(["max_tokens", "qlora", "sources"])) == expected
