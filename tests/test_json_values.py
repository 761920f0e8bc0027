from typing import Any

import pytest

from runner.chat.json_values import Broken, Value, values


def plain(data: bytes) -> list[Any]:
    return [item.value if isinstance(item, Value) else item.reason for item in values(data)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'[{"a": 1}, {"b": 2}]', [{"a": 1}, {"b": 2}]),
        (b'{"a": 1}', [{"a": 1}]),
        (b'\xef\xbb\xbf{"a": 1}', [{"a": 1}]),
        ('{"а": "я"}'.encode("utf-16"), [{"а": "я"}]),
        (b'{"a": 1}\n\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        (b'{"a": 1}\r\n{"a": 2}\r\n', [{"a": 1}, {"a": 2}]),
        (b'{"a":\n1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        (b'{"a": 1} {"a": 2}', [{"a": 1}, {"a": 2}]),
        ('{"a": "x\u2028y"}\n{"a": 2}'.encode(), [{"a": "x\u2028y"}, {"a": 2}]),
    ],
)
def test_every_way_of_writing_several_values_is_read(data: bytes, expected: list[Any]) -> None:
    assert plain(data) == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b'{"a": NaN}', "has NaN"),
        (b'{"a": -Infinity}', "has -Infinity"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (rb'{"a": "\ud83d"}', "half of a surrogate pair"),
        (b"[" * 100 + b"]" * 100, "nested more than 64"),
        (b"[" * 100_000, "nested more than 64"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        (b'[{"a": 1}, {"a"', "is not valid JSON"),
        (b"just words", "is not valid JSON"),
    ],
)
def test_what_cannot_be_read_says_why(data: bytes, reason: str) -> None:
    (item,) = values(data)
    assert isinstance(item, Broken)
    assert reason in item.reason


def test_a_bad_line_costs_that_line() -> None:
    found = list(values(b'{"a": 1}\n{"a": \n{"a": NaN}\n{"a": 4}\n'))
    assert [(type(item).__name__, item.line) for item in found] == [
        ("Value", 1),
        ("Broken", 2),
        ("Broken", 3),
        ("Value", 4),
    ]
