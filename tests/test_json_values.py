import codecs
import io
import itertools
import json
import random
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.chat.json_values import Broken, Value, values
from runner.chat.text_window import Unreadable

SHARED = Path(__file__).parents[2] / "shared" / "data"


def plain(data: bytes) -> list[Any]:
    return [item.value if isinstance(item, Value) else item.reason for item in values(data)]


def good(data: bytes) -> list[Any]:
    return [item.value for item in values(data) if isinstance(item, Value)]


def broken(data: bytes) -> list[Broken]:
    return [item for item in values(data) if isinstance(item, Broken)]


class Pipe:
    """A binary file that cannot be sought and gives as little as it likes."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self.parts = parts
        self.left = b""
        self.given = 0

    def read(self, size: int = -1) -> bytes:
        while not self.left:
            part = next(self.parts, None)
            if part is None:
                return b""
            self.left = part
        data, self.left = self.left[:size], self.left[size:]
        self.given += len(data)
        return data


def pipe(parts: Iterator[bytes]) -> BinaryIO:
    return cast(BinaryIO, Pipe(parts))


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
        (b'[{"a"', "is not valid JSON"),
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


@pytest.mark.parametrize(
    ("data", "reason", "line"),
    [
        # the whole file
        (b"\xef\xbb\xbf", "is empty", None),
        (b"\xff\xfe", "is empty", None),
        (b"[]", "is an empty list", None),
        (b" [ \n ] \n", "is an empty list", None),
        ('{"a": 1}'.encode("utf-16-le"), "is UTF-16 text without a byte order mark", None),
        ('[{"a": 1}]'.encode("utf-16-be"), "is UTF-16 text without a byte order mark", None),
        ('{"a": 1}'.encode("utf-32"), "is UTF-32 text; save it as UTF-8", None),
        (b"PK\x03\x04rest", "is a ZIP archive", None),
        (b"\x1f\x8b\x08rest", "is a gzip file; unpack it", None),
        (b"PAR1rest", "is a Parquet file", None),
        (b"%PDF-1.7", "is a PDF file", None),
        # syntax
        (b'{"a": 1,}', "a comma with nothing after it at line 1, column 9", 1),
        (b'{"a": [1,\n\n]}', "a comma with nothing after it at line 3, column 1", 1),
        (b'{"a": "x\ny"}', "a control character (U+000A) in a string at line 1, column 9", 1),
        (b'{"a": "x\x00y"}', "a NUL byte at line 1, column 9", 1),
        (b"\x00\x00\x00\x00\x00", "a NUL byte at line 1, column 1", 1),
        (b'{"a": "\\x"}', "Invalid \\\\escape", 1),
        (b'{"a": "\\u12g4"}', "Invalid \\\\uXXXX escape", 1),
        (b"{'a': 1}", "Expecting property name enclosed in double quotes at line 1, column 2", 1),
        (b'\n\n{"a":\n 01}', "Expecting ',' delimiter at line 4, column 3", 3),
        (b'{"a": tru}', "Expecting value at line 1, column 7", 1),
        (b"\xef\xbb\xbf" * 2 + b'{"a": 1}', "a byte order mark inside the text at line 1", 1),
        # cut short
        (b'{"a": "x', "the file ends inside a value at line 1, column 7", 1),
        (b'{"a": tru', "the file ends inside a value at line 1, column 7", 1),
        (b'{"a": {"b": 1\n', "the file ends inside a value at line 2, column 1", 1),
        (b'{"a": 1, ', "the file ends inside a value", 1),
        (b'{"a": "\xe2\x82', "the file ends inside a value", 1),
        # right syntax, no JSON that could be kept
        (b'{"a": Infinity}', "has Infinity, which is not JSON", 1),
        (b'{"a": 1e999}', "has the number '1e999', which is too large to keep", 1),
        (b'{"a": ' + b"1" * 5000 + b"}", "has a number with too many digits", 1),
        (rb'{"\ude00": "a"}', "half of a surrogate pair", 1),
        (rb'{"a": ["\uDE00\uD83D"]}', "half of a surrogate pair", 1),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested more than 64", 1),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested more than 64", 1),
        # bytes that are no text
        (b'{"a":\n"\xff"}', "is not UTF-8 text: byte 0xFF at line 2, column 2 is not valid", 1),
        (b'{"a": "\xed\xa0\xbd"}', "is not UTF-8 text: byte 0xED", 1),
        (b'{"a": "\xc0\x80"}', "is not UTF-8 text: byte 0xC0", 1),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 20, "is not UTF-8 text: byte 0x89", 1),
        ('{"a": "я"}'.encode("utf-16")[:-1], "is not UTF-16 text: half a character", 1),
        (b"\xff\xfe" + '{"a": "\ud83d"}'.encode("utf-16-le", "surrogatepass"), "half a", 1),
    ],
)
def test_one_sentence_for_what_is_wrong_with_a_whole_file(
    data: bytes, reason: str, line: int | None
) -> None:
    (item,) = values(data)
    assert isinstance(item, Broken)
    assert reason.replace("\\\\", "\\") in item.reason
    assert item.line == line


@pytest.mark.parametrize(
    ("data", "kept", "reasons"),
    [
        # the end of the element can be told
        (b'[1, {"a": NaN},\n2]', [1, 2], [("element 1 has NaN, which is not JSON", 1)]),
        (b'[1,\n{"a": [NaN, "]}"]}, 2]', [1, 2], [("element 1 has NaN", 2)]),
        (b'[{"a" 1}, {"b": 2}]', [{"b": 2}], [("element 0 is not valid JSON: Expecting ':'", 1)]),
        (b'[{"a": "x\ny"},\n{"b": 2}]', [{"b": 2}], [("control character (U+000A)", 1)]),
        (b"[1, nope, 2]", [1, 2], [("element 1 is not valid JSON: Expecting value", 1)]),
        (b'[{"a": 1}\n{"b": 2}, {"c": 3}]', [{"a": 1}, {"c": 3}], [("element 1 is not val", 2)]),
        (b"[1, , 2]", [1, 2], [("element 1 is not valid JSON: Expecting value", 1)]),
        (b"[[[" + b"[" * 90 + b"]" * 90 + b']], {"a": 1}]', [{"a": 1}], [("nested more", 1)]),
        (b'[{"a": "\xff\xfe"},\n{"b": "\xff"}, 3]', [3], [("element 0 is not U", 1), ("1", 2)]),
        # a mistake beside the elements
        (b"[1, 2,\n]", [1, 2], [("a comma with nothing after it at line 2, column 1", 2)]),
        (b"[1,\n2]\n]", [1, 2], [("is not valid JSON: Expecting value at line 3, column 1", 3)]),
        # the end cannot be told
        (b'[{"a": 1}, {"a"', [{"a": 1}], [("element 1 is not valid JSON: the file ends", 1)]),
        (b'[{"a": 1},\n{"b": 2}', [{"a": 1}, {"b": 2}], [("list of line 1 is not closed", 2)]),
        (b'[{"a": 1},', [{"a": 1}], [("element 1 is not valid JSON: the file ends", 1)]),
        (b"[1, 2", [1], [("element 1 is not valid JSON: the file ends inside a value", 1)]),
        (b"[", [], [("the file ends inside a value at line 1, column 2", 1)]),
        (
            b'[{"a": 1},\n{"a": "6" tall"},\n{"b": "x"}]',
            [{"a": 1}],
            [("element 1 is not valid JSON: Expecting ',' delimiter at line 2, column 11; the", 2)],
        ),
        (b'[{"a": [1}, {"b": 1}]', [], [("; the rest of the file is lost", 1)]),
        (
            b'[{"a": "6" tall"}, {"b": "} , 5, {"}, {"c": 1}]',
            [],
            [("element 0 is not valid JSON", 1)],
        ),
    ],
)
def test_a_broken_element_costs_itself_where_its_end_can_be_told(
    data: bytes, kept: list[Any], reasons: list[tuple[str, int]]
) -> None:
    assert good(data) == kept
    assert [item.line for item in broken(data)] == [line for _, line in reasons]
    for item, (reason, _) in zip(broken(data), reasons, strict=True):
        assert reason in item.reason


def test_the_elements_after_a_broken_one_keep_their_index() -> None:
    found = [item for item in values(b"[0, NaN, 2, nope, 4]") if isinstance(item, Value)]
    assert [(item.value, item.index, item.line) for item in found] == [
        (0, 0, None),
        (2, 2, None),
        (4, 4, None),
    ]


@pytest.mark.parametrize(
    ("data", "kept", "lines"),
    [
        (b'{"a": NaN}\n{"a": 2}\n', [{"a": 2}], [1]),
        (b'{"a": 1}\n\n{"a": 2,}\n{"a": 3}', [{"a": 1}, {"a": 3}], [3]),
        (b'{"a": 1}\n\xef\xbb\xbf{"a": 2}\n{"a": 3}\n', [{"a": 1}, {"a": 3}], [2]),
        (b'{"a": 1}\n\x00\x00\x00\n{"a": 3}\n', [{"a": 1}, {"a": 3}], [2]),
        (b'{"a": 1}\n{"a": "\xff"}\n{"a": 3}\n', [{"a": 1}, {"a": 3}], [2]),
        (b'{"a": 1}\n{"a": 2}{"a": 3}\n{"a": 4}\n', [{"a": 1}, {"a": 4}], [2]),
        (b'{"a": 1}\n{"a": 2}\n{"a": 3', [{"a": 1}, {"a": 2}], [3]),
        (b"[1]\n[NaN]\n[3]\n", [[1], [3]], [2]),
        (b"[NaN]\n[2]\n", [[2]], [1]),
        (b'{"a" 1}\n{"a": 2}\n', [{"a": 2}], [1]),
        (b'cut": 1}\n{"a": 2}\n{"a": 3}\n', [{"a": 2}, {"a": 3}], [1]),
        (b'{"a": "cut\n{"a": 2}\n{"a": 3}\n', [{"a": 2}, {"a": 3}], [1]),
        (b'{"a":\n{"a": 2}\n{"a": 3}\n', [{"a": 2}, {"a": 3}], [1]),
    ],
)
def test_json_lines_are_known_by_their_first_lines(
    data: bytes, kept: list[Any], lines: list[int]
) -> None:
    assert good(data) == kept
    assert [item.line for item in broken(data)] == lines
    assert all(item.line is not None for item in values(data))


def test_the_place_in_a_broken_line_is_the_one_in_the_file() -> None:
    (item,) = broken(b'{"a": 1}\n{"a": 2}\n{"a": }\n')
    assert item.reason == "is not valid JSON: Expecting value at line 3, column 7"


def test_an_object_in_a_damaged_document_is_no_line() -> None:
    assert not good(b'{"a":\n{"b": 1}\n,}')


@pytest.mark.parametrize(
    ("data", "kept", "reason"),
    [
        (b'{"a":\n1}\n{"a": NaN}\n{"a": 3}', [{"a": 1}, {"a": 3}], "has NaN"),
        (b'{"a":\n1}\n{"a" 2}\n{"a": 3}', [{"a": 1}, {"a": 3}], "Expecting ':' delimiter"),
        (b'{"a": 1} [2, 3]\n{"a": 4} x', [{"a": 1}, 2, 3, {"a": 4}], "is not valid JSON"),
        (b'[{"a": 1},\n2]\n[3]', [{"a": 1}, 2, 3], ""),
    ],
)
def test_among_values_one_after_another_each_is_read_for_itself(
    data: bytes, kept: list[Any], reason: str
) -> None:
    assert good(data) == kept
    assert all(reason in item.reason for item in broken(data))
    assert len(broken(data)) == bool(reason)


def test_sixty_four_levels_are_read_and_one_more_is_not() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a":' * levels + b"1" + b"}" * levels

    assert len(good(nested(64))) == 1
    assert "nested more than 64" in broken(nested(65))[0].reason


def test_an_object_that_wraps_a_list_stays_one_value() -> None:
    assert good(b'{"conversations": [{"a": 1}]}') == [{"conversations": [{"a": 1}]}]


SEVERAL = [
    b'[{"a": "x\\u00e9\\ud83d\\ude00 \xd1\x8f"}, [1.5e-3, -2, true, null], "s", {"b": {}}]',
    b'{"a": "\xe2\x82\xac\xf0\x9f\x98\x80"}\n{"a": [1, {"b": "\\\\\\""}]}\n\n{"a": 3}\n',
    b'{"a":\n {"b": [1, 2]}}\n{"c": "}{"} [{"d": 4}, {"e": 5}]',
    '[{"a": "я€😀"},\n {"b": ["\\n", ""]}]'.encode("utf-16"),
    '[{"a": "я"}, {"b": 1}]'.encode("utf-8-sig"),
]


@pytest.mark.parametrize("data", SEVERAL)
def test_cut_at_any_byte_only_whole_values_come_out(data: bytes) -> None:
    whole = good(data)
    for end in range(len(data)):
        found = good(data[:end])
        assert found == whole[: len(found)], data[:end]
        assert len(found) == len(whole) or broken(data[:end]) or found == whole[: len(found)]


def pieces() -> st.SearchStrategy[bytes]:
    """Files of every kind, most with something wrong."""
    wrong = [b"NaN", b"-Infinity", b"1e999", rb'"\ud83d"', b'{"a":1,"a":2}', b"nope", b"\xff"]
    marks = [b"[", b"]", b"{", b"}", b",", b":", b"\n", b" ", b"\r\n", b'"', b"\\", b"\x00"]
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=6,
    )
    encoded = st.builds(
        lambda value, escaped: json.dumps(value, ensure_ascii=escaped).encode("utf-8", "replace"),
        value,
        st.booleans(),
    )
    part = encoded | st.sampled_from(wrong + marks) | st.sampled_from(marks)
    listed = st.lists(encoded | st.sampled_from(wrong), max_size=5).map(
        lambda values: b"[" + b", ".join(values) + b"]"
    )
    lines = st.lists(encoded | st.sampled_from(wrong), max_size=5).map(b"\n".join)
    return st.one_of(st.lists(part, max_size=8).map(b"".join), listed, lines)


def found(data: bytes, chunk: int, limit: int) -> list[Value | Broken]:
    return list(values(pipe(iter([data])), _chunk_bytes=chunk, _max_characters=limit))


@settings(max_examples=400, deadline=None)
@given(pieces(), st.integers(1, 40), st.sampled_from([10**9, 10**9, 30, 7]), st.booleans())
def test_the_size_of_the_chunks_changes_nothing(
    data: bytes, chunk: int, limit: int, utf_16: bool
) -> None:
    if utf_16:
        data = data.decode("utf-8", "replace").encode("utf-16")
    assert found(data, chunk, limit) == found(data, 2**18, limit)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(), st.text() | st.integers(), min_size=1, max_size=3), min_size=1
    )
)
def test_what_json_writes_is_read_in_every_layout(records: list[Any]) -> None:
    def written(**layout: Any) -> list[str]:
        return [json.dumps(record, **layout) for record in records]

    texts = [
        json.dumps(records),
        json.dumps(records, indent=1, ensure_ascii=False),
        "\n".join(written(ensure_ascii=False)),
        "\r\n".join(written()) + "\r\n",
        "".join(written()),
        "\n".join(written(indent=2)),
    ]
    for text in texts:
        for data in (text.encode(), text.encode("utf-8-sig"), text.encode("utf-16")):
            assert plain(data) == records


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (b'[{"a": 1}, {"a": "' + b"x" * 100 + b'"}, {"b": 2}]', [{"a": 1}, {"b": 2}]),
        (b'[{"a": 1}, [' + b"[]," * 100 + b'[]], {"b": 2}]', [{"a": 1}, {"b": 2}]),
        (b'{"a": 1}\n{"a": "' + b"x" * 100 + b'"}\n{"b": 2}\n', [{"a": 1}, {"b": 2}]),
        (b'{"a": 1}\n' + b"x" * 100 + b'\n{"b": 2}\n', [{"a": 1}, {"b": 2}]),
        (b'{"a":\n"' + b"x" * 100 + b'"}\n{"b": 2}', [{"b": 2}]),
        (b'{"a": "' + b"x" * 100 + b'"}', []),
        (b'{"a": "' + b"x" * 100, []),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_value_over_the_limit_costs_itself(data: bytes, kept: list[Any], chunk: int) -> None:
    items = found(data, chunk, 50)
    assert [item.value for item in items if isinstance(item, Value)] == kept
    (reason,) = [item.reason for item in items if isinstance(item, Broken)]
    assert "is longer than 50 characters" in reason


def test_values_come_out_before_the_file_is_at_its_end() -> None:
    source = Pipe(itertools.repeat(b'[{"a": 1}' + b', {"a": 1}' * 1000, 1))
    endless = pipe(itertools.chain([b"["], itertools.repeat(b'{"a": "some text"},\n')))
    assert len(list(itertools.islice(values(endless), 1000))) == 1000
    assert next(iter(values(cast(BinaryIO, source)))) == Value({"a": 1}, 0)


RECORD = json.dumps(
    {"messages": [{"role": "user", "content": "что-то длинное " * 40}] * 4}
).encode()


def many_records(kind: str, total: int) -> Iterator[bytes]:
    """About `total` bytes of records, never in memory at once."""
    count = total // len(RECORD)
    first, between, last = {
        "list": (b"[", b",\n", b"]"),
        "list in a line": (b"[", b", ", b"]"),
        "lines": (b"", b"\n", b"\n"),
        "in a line": (b"", b" ", b""),
        "without blanks": (b"", b"", b""),
        "blanks": (b"", b" \n" * 10, b""),
    }[kind]
    yield first + RECORD
    yield from itertools.repeat(between + RECORD, count - 1)
    yield last


@pytest.mark.parametrize(
    "kind", ["list", "list in a line", "lines", "in a line", "without blanks", "blanks"]
)
def test_a_large_file_takes_little_memory(kind: str) -> None:
    tracemalloc.start()
    try:
        count = sum(
            isinstance(item, Value) for item in values(pipe(many_records(kind, 40_000_000)))
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 40_000_000 // len(RECORD)
    assert peak < 40_000_000


@pytest.mark.parametrize(
    "endless",
    [
        (b"[", b'{"a": ['),
        (b"[NaN, ", b"x" * 1000),
        (b'[{"a" "', b"x\\\\" * 1000),
        (b"[", b"[" * 1000),
        (b"", b" " * 1000),
        (b"[", b"\n" * 1000),
        (b'{"a": 1}\n', b"x" * 1000),
        (b"", b"\x00" * 1000),
    ],
)
def test_what_never_ends_costs_little_memory_too(endless: tuple[bytes, bytes]) -> None:
    first, rest = endless
    source = pipe(itertools.chain([first], itertools.repeat(rest, 30_000_000 // len(rest))))
    tracemalloc.start()
    try:
        items = list(values(source, _max_characters=2_000_000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert any(isinstance(item, Broken) for item in items)
    assert peak < 80_000_000


def test_a_record_of_many_megabytes_is_not_read_again_and_again() -> None:
    data = json.dumps([{"a": ["some text"] * 1_500_000}]).encode()
    started = time.process_time()
    json.loads(data)
    once = time.process_time() - started
    started = time.process_time()
    (item,) = values(data)
    assert isinstance(item, Value)
    assert time.process_time() - started < 12 * once + 1


def test_many_mistakes_take_time_in_proportion() -> None:
    data = b"[" + b", ".join([b'{"a" 1, "b": "some text that is here"}'] * 50_000) + b"]"
    started = time.process_time()
    assert len(broken(data)) == 50_000
    assert time.process_time() - started < 15


def test_a_file_that_stops_being_readable_keeps_what_was_read() -> None:
    def parts() -> Iterator[bytes]:
        yield b'{"a": 1}\n{"a": 2}\n{"a": '
        raise Unreadable("is damaged here")

    assert list(values(pipe(parts()))) == [
        Value({"a": 1}, 0, 1),
        Value({"a": 2}, 1, 2),
        Broken("is damaged here", 3),
    ]


def test_a_file_that_cannot_be_read_at_all_has_no_line() -> None:
    def parts() -> Iterator[bytes]:
        raise Unreadable("is damaged")
        yield b""

    assert list(values(pipe(parts()))) == [Broken("is damaged")]


def test_damage_of_any_kind_gives_values_or_sentences() -> None:
    chance = random.Random(5)
    started = time.process_time()
    rounds = 0
    while time.process_time() - started < 3:
        data = bytearray(chance.choice(SEVERAL) * chance.randrange(1, 4))
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    del data[at : at + chance.randrange(1, 9)]
                case 2:
                    data[at:at] = chance.choice(
                        [b"\x00", b"\xff", b"NaN", b'"', b"[", b"}", b",", codecs.BOM_UTF8, b"\n"]
                    )
                case _:
                    del data[at:]
            data = data or bytearray(b"x")
        items = found(bytes(data), chance.choice([1, 3, 64, 2**18]), 10**9)
        assert items == list(values(io.BytesIO(data)))
        for item in items:
            if isinstance(item, Value):
                json.dumps(item.value, allow_nan=False, ensure_ascii=False).encode()
            else:
                assert item.reason.splitlines() == [item.reason]
        rounds += 1
    assert rounds > 100


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared test data")
def test_real_files_give_what_json_gives() -> None:
    for path in sorted(SHARED.rglob("*.json")):
        data = path.read_bytes()
        try:
            expected = json.loads(data)
        except ValueError:
            continue
        items = found(data, 1000, 10**9)
        expected = expected if isinstance(expected, list) else [expected]
        assert [item.value for item in items if isinstance(item, Value)] == expected, path


@pytest.mark.parametrize("kind", ["{%s}", '{"a":1}\n{%s}\n{"a":2}', '[{"a":1},{%s},{"a":2}]'])
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_a_value_of_very_many_parts_is_refused_and_costs_only_itself(kind: str, chunk: int) -> None:
    data = (kind % f'"m":[{"[]," * 30}0]').encode()
    items = list(values(data, _chunk_bytes=chunk, _max_parts=40))
    (item,) = [item for item in items if isinstance(item, Broken)]
    assert "has more than 40 lists, objects and elements, the most for one record" in item.reason
    assert len(items) == (1 if kind == "{%s}" else 3)


@pytest.mark.parametrize("kind", ["{%s}", '{"a":1}\n{%s}\n{"a":2}', '[{"a":1},{%s},{"a":2}]'])
def test_commas_and_brackets_in_texts_are_no_parts(kind: str) -> None:
    text = json.dumps({"m": '[{,\\"' * 100})
    data = kind.replace("{%s}", text).encode()
    assert not [item for item in values(data, _max_parts=40) if isinstance(item, Broken)]


def test_many_small_values_are_not_counted_together() -> None:
    data = json.dumps([{"a": [1, 2, 3]}] * 100).encode()
    assert len(list(values(data, _max_parts=10))) == 100


def test_a_value_that_is_too_long_is_to_be_made_chat_by_chat() -> None:
    (item,) = values(b'{"a": "' + b"x" * 100 + b'"}', _max_characters=50)
    assert isinstance(item, Broken)
    assert "is longer than 50 characters, the most for one record; export it chat by chat" in (
        item.reason
    )


def test_a_record_of_very_many_lists_takes_little_memory() -> None:
    data = b'{"metadata": [' + b"[]," * 1_000_000 + b"0]}"
    tracemalloc.start()
    try:
        (item,) = values(data, _max_parts=100_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(item, Broken)
    assert peak < 20_000_000
