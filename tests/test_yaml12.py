import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.engine import yaml12
from runner.engine.yaml12 import Document, YamlProblems, load
from runner.errors import RecipeError

PARSERS = [yaml.SafeLoader, *([yaml.CSafeLoader] if yaml.__with_libyaml__ else [])]


def data(text: str | bytes) -> Any:
    return load(text if isinstance(text, bytes) else text.encode(), name="r.yaml").data


def problems(text: str | bytes) -> tuple[str, ...]:
    with pytest.raises(YamlProblems) as caught:
        data(text)
    return caught.value.problems


@pytest.fixture(params=PARSERS, ids=lambda parser: parser.__name__)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both parsers of PyYAML, whichever `load` prefers."""
    monkeypatch.setattr(yaml12, "PARSER", request.param)


SCALARS: list[tuple[str, Any]] = [
    # numbers
    ("0", 0),
    ("17", 17),
    ("+3", 3),
    ("-3", -3),
    ("-0", 0),
    ("017", 17),
    ("089", 89),
    ("0o17", 15),
    ("0x1f", 31),
    ("0XFF", "0XFF"),
    ("-0x1f", "-0x1f"),
    ("0o8", "0o8"),
    ("0b11", "0b11"),
    ("1_000", "1_000"),
    ("1,000", "1,000"),
    ("9223372036854775807", 2**63 - 1),
    ("-9223372036854775808", -(2**63)),
    ("2e-5", 2e-5),
    ("2e-4", 2e-4),
    ("5E-6", 5e-6),
    ("1e4", 1e4),
    ("1e+4", 1e4),
    (".5", 0.5),
    ("-.5", -0.5),
    ("+.5", 0.5),
    ("1.", 1.0),
    ("1.e3", 1e3),
    ("0.05", 0.05),
    ("-0.0", -0.0),
    ("0e999", 0.0),
    ("1.7976931348623157e308", 1.7976931348623157e308),
    ("5e-324", 5e-324),
    ("e5", "e5"),
    (".", "."),
    ("..", ".."),
    ("+", "+"),
    ("-", [None]),
    ("--", "--"),
    ("1e", "1e"),
    ("1.2.3", "1.2.3"),
    ("- 1", [1]),
    ("1 2", "1 2"),
    ("١٢", "١٢"),
    ("inf", "inf"),
    ("nan", "nan"),
    (".INFINITY", ".INFINITY"),
    # words
    ("true", True),
    ("True", True),
    ("TRUE", True),
    ("false", False),
    ("False", False),
    ("FALSE", False),
    ("tRUE", "tRUE"),
    ("yes", "yes"),
    ("no", "no"),
    ("No", "No"),
    ("on", "on"),
    ("off", "off"),
    ("y", "y"),
    ("n", "n"),
    ("null", None),
    ("Null", None),
    ("NULL", None),
    ("~", None),
    ("", None),
    ("none", "none"),
    ("None", "None"),
    ("nULL", "nULL"),
    # dates and times are text
    ("2024-01-01", "2024-01-01"),
    ("2024-01-01T12:30:00Z", "2024-01-01T12:30:00Z"),
    ("12:30:00", "12:30:00"),
    ("12:30", "12:30"),
    ("190:20:30.15", "190:20:30.15"),
    # what YAML 1.1 gave a meaning
    ("=", "="),
    ("<<", "<<"),
    # quoted is text
    ("'1'", "1"),
    ('"2e-5"', "2e-5"),
    ("'true'", "true"),
    ("''", ""),
    ('"null"', "null"),
    ("'<<'", "<<"),
    ("'it''s'", "it's"),
    (r'"\t\n\x41\u00e9\U0001F600"', "\t\nAé😀"),
    (r'"\e"', "\x1b"),
    (r"'C:\path'", r"C:\path"),
    (r"C:\path", r"C:\path"),
    ('"a\n  b"', "a b"),
    # blocks are text
    ("|\n  1\n", "1\n"),
    (">-\n  a\n  b\n", "a b"),
    ("|\n  a\n  \tb\n", "a\n\tb\n"),
    ("|2-\n    a\n", "  a"),
    # plain text
    ("google/gemma-3n-E2B-it", "google/gemma-3n-E2B-it"),
    ("http://localhost:80/x", "http://localhost:80/x"),
    ("a#b", "a#b"),
    ("a # comment", "a"),
    ("привет мир", "привет мир"),
    ("a\n  b", "a b"),
    # core tags
    ("!!str 12", "12"),
    ("!!str", ""),
    ("!!str true", "true"),
    ("!!int '12'", 12),
    ("!!int 0x10", 16),
    ("!!float 1", 1.0),
    ("!!float '2e-5'", 2e-5),
    ("!!bool 'true'", True),
    ("!!null ''", None),
    ("!<tag:yaml.org,2002:str> 1", "1"),
    ("!!seq [1]", [1]),
    ("!!map {b: 1}", {"b": 1}),
    # collections
    ("[]", []),
    ("{}", {}),
    ("[1, two, 3.0, ]", [1, "two", 3.0]),
    ("{b, c: }", {"b": None, "c": None}),
    ('{"b":1}', {"b": 1}),
    ("[b: 1]", [{"b": 1}]),
    ("[[8], {b: [no]}]", [[8], {"b": ["no"]}]),
    ("{no: 1, y: 2, '1': 3, 'true': 4}", {"no": 1, "y": 2, "1": 3, "true": 4}),
    ("{? b : 1}", {"b": 1}),
    ("{'<<': 1}", {"<<": 1}),
    ("[&x 1, *x]", [1, 1]),
    ("[&x {b: [1]}, *x]", [{"b": [1]}, {"b": [1]}]),
    ("{&k b: *k}", {"b": "b"}),
    ("{&k b: 1, c: {*k : 2}}", {"b": 1, "c": {"b": 2}}),
]


@pytest.mark.parametrize(("text", "expected"), SCALARS)
def test_a_value_means_what_yaml_1_2_says(parser: None, text: str, expected: Any) -> None:
    value = data(f"a: {text}" if text != "-" and not text.startswith("- ") else f"a:\n{text}")["a"]
    assert value == expected
    assert type(value) is type(expected)


WHOLE: list[tuple[str | bytes, Any]] = [
    ("", None),
    ("# only a comment\n", None),
    ("---\n", None),
    ("---\na: 1\n...\n", {"a": 1}),
    ("%YAML 1.2\n---\na: 1\n", {"a": 1}),
    ("just text", "just text"),
    ("- 1\n- 2\n", [1, 2]),
    ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
    ("a: 1\rb: 2\r", {"a": 1, "b": 2}),
    (b"\xef\xbb\xbfa: 1\n", {"a": 1}),
    ("a:\n- 1\n- 2\n", {"a": [1, 2]}),
    ("a: |\n  %TAG is text here\n", {"a": "%TAG is text here\n"}),
    ("a:1", "a:1"),
    ("? a\n? b\n", {"a": None, "b": None}),
]


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="the Python parser takes no tab there")
@pytest.mark.parametrize("text", ["a: 1\t# x\n", "a:\t1\n", "a: [\n\t1]\n"])
def test_a_tab_may_stand_between_words(text: str) -> None:
    assert data(text) in ({"a": 1}, {"a": [1]})


@pytest.mark.parametrize(("text", "expected"), WHOLE)
def test_a_file_is_read(parser: None, text: str | bytes, expected: Any) -> None:
    assert data(text) == expected


BAD: list[tuple[str | bytes, int, str]] = [
    # numbers that cannot be kept
    ("a: 9223372036854775808", 1, "'9223372036854775808' needs more than 64 bits"),
    ("a: -9223372036854775809", 1, "needs more than 64 bits"),
    ("a: 0xffffffffffffffffff", 1, "needs more than 64 bits"),
    ("a: " + "9" * 5000, 1, "'… needs more than 64 bits"),
    ("a: 1e999", 1, "'1e999' is too large for a number"),
    ("a: -1e999", 1, "too large"),
    ("a: 1e-999", 1, "'1e-999' is too close to 0"),
    ("a: 0." + "1" * 200, 1, "has 202 characters; round it"),
    ("a: .inf", 1, ".inf is not a finite number"),
    ("a: -.INF", 1, "not a finite number"),
    ("a: +.Inf", 1, "not a finite number"),
    ("a: .nan", 1, ".nan is not a finite number"),
    ("a: .NaN", 1, "not a finite number"),
    ("a: !!float .inf", 1, "not a finite number"),
    # tags
    ("a: !foo x", 1, "a recipe takes no tag '!foo' here; delete it, or quote text that begins"),
    ("a: !", 1, "no tag '!'"),
    ("a: ! 12", 1, "no tag '!'"),
    ("a: !!python/object/apply:os.system [id]", 1, "no tag '!!python/object/apply:os.system'"),
    ("a: !!python/name:os.system", 1, "no tag '!!python/name:os.system'"),
    ("!!python/object:x.Y {a: 1}", 1, "no tag '!!python/object:x.Y'"),
    ("a: !!binary aGk=", 1, "no tag '!!binary'"),
    ("a: !!timestamp 2024-01-01", 1, "no tag '!!timestamp'"),
    ("a: !!set {b}", 1, "no tag '!!set'"),
    ("a: !!omap [b: 1]", 1, "no tag '!!omap'"),
    ("!!merge <<: {a: 1}", 1, "no tag '!!merge'"),
    ("a: !!map [1]", 1, "no tag '!!map'"),
    ("a: !!seq x", 1, "no tag '!!seq'"),
    ("a: !!int {b: 1}", 1, "no tag '!!int'"),
    ("a: !!int x", 1, "'x' is not of the type !!int"),
    ("a: !!int 1.5", 1, "not of the type !!int"),
    ("a: !!bool yes", 1, "'yes' is not of the type !!bool"),
    ("a: !!null x", 1, "not of the type !!null"),
    ("a: !!float x", 1, "not of the type !!float"),
    ("a: !<!\u202e> x", 1, ""),
    ("a: !x!y z", 1, "'!' begins a YAML tag"),
    ("a: !" + "x" * 5000 + " y", 1, "…"),
    # keys
    ("a: 1\nb: 2\na: 3\n", 3, "'a' is already on line 1; keep one of the two"),
    ("b:\n  a: 1\n  'a': 2\n", 3, "'a' is already on line 2"),
    ("{a: 1, a: 1}", 1, "'a' is already on line 1"),
    ("stages:\n- x: 1\n  y: 2\n  x: 1\n", 4, "'x' is already on line 2"),
    ('{"\\e[31m": 1, "\\e[31m": 2}', 1, r"'\x1b[31m' is already"),
    ("<<: {a: 1}", 1, "merge keys (<<) are not read; write the settings out"),
    ("a: &a {b: 1}\nc:\n  <<: *a\n", 3, "merge keys"),
    ("a: {<<: [{b: 1}, {c: 1}]}", 1, "merge keys"),
    ("1: a", 1, "a key must be text, this one is 1; quote it"),
    ("a: {2e-5: x}", 1, "this one is 2e-05"),
    ("true: a", 1, "this one is true"),
    ("null: a", 1, "this one is null"),
    ("~: a", 1, "this one is null"),
    ("?\n: b\n", 1, "this one is null"),
    ("!!int '1': a", 1, "this one is 1"),
    ("{a: &k 1, *k : 2}", 1, "this one is 1"),
    ("? [a]\n: b\n", 1, "a list or mapping cannot be a key"),
    ("? {a: 1}\n: b\n", 1, "a list or mapping cannot be a key"),
    ("a: {{ x }}", 1, "quote text that begins with '{' or '['"),
    ("[a]: b", 1, "a list or mapping cannot be a key"),
    # aliases
    ("a: *b", 1, "*b repeats something named &b, which is not above; quote text that begins"),
    ("a: *b\nb: &b 1\n", 1, "which is not above"),
    ("a: *" + "b" * 5000, 1, "which is not above"),
    ("a: &a [*a]", 1, "*a repeats what it is part of"),
    ("&a {b: *a}", 1, "*a repeats what it is part of"),
    ("&a [&b [*a, *b]]", 1, "*b repeats what it is part of"),
    ("a: &x 1\nb: &x 2\n", 2, "the anchor &x is already on line 1"),
    ("sources: *.zip", 1, "quote text that begins so, such as '*.zip'"),
    ("sources: [**/x]", 1, "such as '*.zip'"),
    ("a: & b", 1, "'*' and '&' begin a YAML alias or anchor"),
    # several documents, directives
    ("a: 1\n---\nb: 2\n", 2, "a second document starts; keep one in a file"),
    ("---\n---\n", 2, "a second document"),
    ("a: 1\n...\nb: 2\n", 3, "this does not belong to what stands above"),
    ("%YAML 1.1\n---\na: 1\n", 1, "'%YAML 1.1' is a YAML directive; delete it"),
    ("%YAML 2.0\n---\na: 1\n", 1, "directive"),
    ("%YAML 1.22\n---\na: 1\n", 1, "directive"),
    ("# x\n%TAG ! tag:x,2000:\n---\na: !y 1\n", 2, "'%TAG ! tag:x,2000:' is a YAML directive"),
    ("a: 1\n...\r%TAG !a! b\r---\r", 3, "directive"),
    ("%YAML 1.2\n%YAML 1.2\n---\na: 1\n", 2, "this is not YAML"),
    # bytes and characters
    (b"\xff\xfea\x00:\x00", 1, "seems to be UTF-16 or UTF-32; save it as UTF-8"),
    ("a: 1".encode("utf-16-be"), 1, "save it as UTF-8"),
    ("a: 1".encode("utf-16-le"), 1, "save it as UTF-8"),
    ("a: 1".encode("utf-32"), 1, "save it as UTF-8"),
    ("a: 1".encode("utf-32-be"), 1, "save it as UTF-8"),
    ("a: 1\nb: é".encode("latin-1"), 2, "byte 0xe9 is not UTF-8; save the file as UTF-8"),
    ("a: 1\r\nb: 2\rc: привет".encode("cp1251"), 3, "byte 0xef is not UTF-8"),
    (b"a: \xed\xa0\x80", 1, "byte 0xed is not UTF-8"),
    (b"a: \xc0\xaf", 1, "byte 0xc0 is not UTF-8"),
    (b"a: \xf4\x90\x80\x80", 1, "byte 0xf4 is not UTF-8"),
    (b"a: \xe2\x82", 1, "byte 0xe2 is not UTF-8"),
    ("abc: 1\nb: \0", 2, "invisible character U+0000 in column 4; delete it"),
    ("a: \x1b[31mred", 1, "invisible character U+001B in column 4"),
    ("a: 'x\x07'", 1, "U+0007"),
    ("a: \x7f", 1, "U+007F"),
    ("a: b\x85c: d", 1, "U+0085"),
    ("a: \x9b31m", 1, "U+009B"),
    ("a: b\u2028c: d", 1, "U+2028"),
    ("a: b\u2029", 1, "U+2029"),
    ("a: \ufeffb", 1, "U+FEFF"),
    ("a: \ufffe", 1, "U+FFFE"),
    ("a: \x0c", 1, "U+000C"),
    (r'a: "\0"', 1, "text cannot hold U+0000; delete that escape"),
    (r'{"\0": 1}', 1, "text cannot hold U+0000"),
    (r'a: "\ud83d\ude00"', 1, "escape"),
    (r'a: "\UFFFFFFFF"', 1, "escape"),
    (r"x: 1" "\n" r'a: "\U00110000"', 2, "escape"),
    # what the parser cannot read
    ("a:\n\t- b\n", 2, "a tab indents this line; indent with spaces"),
    ("a:\n\tb: 1\n", 2, "a tab indents this line"),
    ("a: 1\n\tb: 2\n", 2, "a tab indents this line"),
    ("a:\n  b: 1\n\tc: 2\n", 3, "a tab indents this line"),
    ("a:\n  b: 1\n  \tc: 2\n", 3, "a tab indents this line"),
    ("a: 1\n\t\n", 2, "a tab indents this line"),
    ("a: |\n\tb\n", 2, "a tab indents this line"),
    ("a: b: c", 1, "a ':' where no value can begin; quote text that holds ': '"),
    ("a: 1 b: 2", 1, "a ':' where no value can begin"),
    ("a: 1\n  b: 2\n", 2, "check the indentation"),
    ("a:1\nb: 2\n", 2, "the line above"),
    ("b: 2\na:1\nc: 3\n", 2, "this line has no 'key: value'; write a space after the ':'"),
    ("b: 2\na\n", 2, "this line has no 'key: value'"),
    ("a: - b", 1, "a '-' where no list can begin"),
    ("a: ? b", 1, "a '?' where no key can begin"),
    ("a: @b", 1, "text cannot begin with '@'; quote it"),
    ("a: `b`", 1, "text cannot begin with '`'"),
    ("a: %b", 1, "text cannot begin with '%'"),
    ("x: 1\na: 'b\nc: 2\n", 2, "the quote that opens here is never closed; close it"),
    ('a: "b', 1, "never closed"),
    ('a: "b\n---\nc"', 1, "never closed"),
    (r'a: "C:\path"', 1, "a backslash in double quotes begins an escape"),
    (r'a: "C:\users"', 1, "a backslash in double quotes"),
    (r'a: "\xZZ"', 1, "a backslash in double quotes"),
    ("a: 'it's'", 1, "the value ends before this line does; quote the whole value"),
    ('x: 1\na: "b" c', 2, "the value ends before this line does"),
    ("a: [b]]", 1, "the value ends before this line does"),
    ("x: 1\na: [1, 2\nb: 3\n", 2, "the '[' that opens here lacks a ',' or its ']'; complete it"),
    ("a: [", 1, "the '[' or '{' that opens here is never closed; close it"),
    ("x: 1\na: [b,\n\n", 2, "never closed"),
    ("a: {b: 1\nc: 2\n", 1, "the '{' that opens here lacks a ',' or its '}'"),
    ("a: ]", 1, "no value can begin with ']'"),
    ("a: , b", 1, "no value can begin with ','"),
    ("a: [b,,c]", 1, "no value can begin with ','"),
    ("a: {b: }}", 1, "the value ends before this line does"),
    ("- a\nb: 1\n", 2, "this does not line up with what starts on line 1"),
    ("a: 1\n- b\n", 2, "this does not line up with what starts on line 1"),
    ("a:\n    b: 1\n  c: 2\n", 3, "this does not line up"),
    ("- - a\n -b", 2, "this does not line up"),
    ("a: 1\n}\n", 2, "this does not line up"),
    ("[a]\nb", 2, "this does not belong to what stands above"),
    ("a: |x\n y\n", 1, "after '|' or '>' nothing may follow but a comment"),
    ("a: |0\n y\n", 1, "after '|' or '>'"),
    # too much
    ("[" * 33 + "]" * 33, 1, "more than 32 lists and mappings inside each other"),
    ("[" * 100_000, 1, "more than 32 lists and mappings"),
    ("- " * 33 + "a", 1, "more than 32 lists and mappings"),
    ("".join(" " * i + "a:\n" for i in range(34)), 33, "more than 32 lists and mappings"),
    ("a: &a " + "[" * 20 + "]" * 20 + "\nb: " + "[" * 20 + "*a", 2, "more than 32 lists"),
    ("[" + "a," * 20_000 + "]", 1, "more than 20,000 values; move lists to a file of data"),
    (b"#" * (2**20 + 1), 1, "the file has 1,048,577 bytes; a recipe has at most 1,048,576"),
    (
        f"a: &a {'x' * 1000}\nb: [{'*a,' * 1100}]",
        2,
        "aliases repeat more than 1,048,576 characters",
    ),
]


@pytest.mark.parametrize(
    ("text", "line", "fragment"), BAD, ids=[f"{i}-{case[2][:30]}" for i, case in enumerate(BAD)]
)
def test_a_bad_file_is_refused_with_its_line(
    parser: None, text: str | bytes, line: int, fragment: str
) -> None:
    found = problems(text)
    assert any(p.startswith(f"r.yaml:{line}: ") and fragment in p for p in found), found
    assert all("; " in problem for problem in found)
    assert all(problem.isprintable() and len(problem) < 250 for problem in found)


def test_all_problems_are_reported_at_once_by_line() -> None:
    text = "a: 1e999\nb: !foo x\nno: 1\nno: 2\n<<: {}\nc: *d\n7: x\nd: [\n"
    assert problems(text) == (
        "r.yaml:1: '1e999' is too large for a number; check its exponent, or quote it",
        "r.yaml:2: a recipe takes no tag '!foo' here; delete it, or quote text that begins with"
        " '!'",
        "r.yaml:4: 'no' is already on line 3; keep one of the two",
        "r.yaml:5: merge keys (<<) are not read; write the settings out",
        "r.yaml:6: *d repeats something named &d, which is not above; quote text that begins with"
        " '*'",
        "r.yaml:7: a key must be text, this one is 7; quote it",
        "r.yaml:8: the '[' or '{' that opens here is never closed; close it",
    )


def test_every_repeat_of_a_key_is_reported() -> None:
    assert [p.split("; ")[0] for p in problems("a: 1\na: 2\nb: 1\na: 3\nb: 2\n")] == [
        "r.yaml:2: 'a' is already on line 1",
        "r.yaml:4: 'a' is already on line 1",
        "r.yaml:5: 'b' is already on line 3",
    ]


def test_refused_keys_are_not_taken_for_one_another() -> None:
    assert len(problems("!x a: 1\n!x b: 2\n1: c\n2: d\n")) == 4


def test_thousands_of_problems_are_counted_after_the_first_hundred() -> None:
    found = problems("a: 1\n" * 5000)
    assert len(found) == yaml12.PROBLEMS_MAX + 1
    assert found[-1].endswith("4,899 more problems; mend these first")


def test_every_row_with_an_invisible_character_is_reported() -> None:
    assert [p.split(";")[0] for p in problems("a: \x01\nb: 1\nc: \x02\x03\n")] == [
        "r.yaml:1: invisible character U+0001 in column 4",
        "r.yaml:3: invisible character U+0002 in column 4",
    ]


def test_the_error_is_a_recipe_error_whose_message_is_the_problems() -> None:
    with pytest.raises(RecipeError) as caught:
        load(b"1: a\n2: b\n", name="r.yaml")
    assert isinstance(caught.value, YamlProblems)
    assert caught.value.message == "\n".join(caught.value.problems)
    assert caught.value.exit_code == 2


def test_the_name_of_the_file_is_escaped() -> None:
    with pytest.raises(YamlProblems, match=r"^a\\x1b\[31m\\u202e:1: "):
        load(b"1: a", name="a\x1b[31m\u202e")


RECIPE = """\
# yaml-language-server: $schema=../schemas/recipe.schema.json
name: my-style
seed:
stages:
  - stage: train
    learning_rate: 5e-6   # small
    lora:
      target_modules: [q,
        v]
    prompt: |
      line
  -
    stage: export
last: "x
  y"
"""


def test_every_value_and_key_has_its_line(parser: None) -> None:
    document = load(RECIPE.encode(), name="r.yaml")
    train = ("stages", 0)
    assert document.lines == {
        (): 2,
        ("name",): 2,
        ("seed",): 3,
        ("stages",): 5,
        train: 5,
        (*train, "stage"): 5,
        (*train, "learning_rate"): 6,
        (*train, "lora"): 8,
        (*train, "lora", "target_modules"): 8,
        (*train, "lora", "target_modules", 0): 8,
        (*train, "lora", "target_modules", 1): 9,
        (*train, "prompt"): 10,
        ("stages", 1): 13,
        ("stages", 1, "stage"): 13,
        ("last",): 14,
    }
    assert document.key_lines == {
        ("name",): 2,
        ("seed",): 3,
        ("stages",): 4,
        (*train, "stage"): 5,
        (*train, "learning_rate"): 6,
        (*train, "lora"): 7,
        (*train, "lora", "target_modules"): 8,
        (*train, "prompt"): 10,
        ("stages", 1, "stage"): 13,
        ("last",): 14,
    }


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_lines_do_not_depend_on_how_they_end(parser: None, end: str) -> None:
    document = load(RECIPE.replace("\n", end).encode(), name="r.yaml")
    assert document.lines[("last",)] == 14


def test_an_alias_has_its_own_line_and_its_inside_the_one_it_was_written_on() -> None:
    document = load(b"a: &a\n  b: 1\nc: *a\n", name="r.yaml")
    assert document.data == {"a": {"b": 1}, "c": {"b": 1}}
    assert (document.lines[("c",)], document.lines[("c", "b")]) == (3, 2)
    assert document.key_lines[("c", "b")] == 2


def test_an_alias_is_a_copy() -> None:
    copied = data("a: &a [1]\nb: *a\n")
    copied["a"].append(2)
    assert copied["b"] == [1]


def test_the_bounds_themselves_are_allowed() -> None:
    assert load(b"[" * 32 + b"]" * 32, name="r.yaml").data
    assert len(data("[" + "a," * 19_999 + "]")) == 19_999
    assert data(b"#" * 2**20) is None


def paths(value: Any, path: yaml12.Path = ()) -> dict[yaml12.Path, Any]:
    items: Any = ()
    if isinstance(value, list):
        items = enumerate(value)
    elif isinstance(value, dict):
        items = value.items()
    return {path: value} | {p: v for k, c in items for p, v in paths(c, (*path, k)).items()}


def written(value: Any) -> str:
    """JSON is YAML, once what YAML cannot hold as it is has been escaped; block style outside."""

    def flow(inner: Any) -> str:
        text = json.dumps(inner, ensure_ascii=False)
        return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)

    if isinstance(value, dict) and value:
        return "".join(f"{flow(key)}:\n    {flow(inner)}\n" for key, inner in value.items())
    if isinstance(value, list) and value:
        return "".join(f"- {flow(inner)}\n" for inner in value)
    return flow(value)


def dumped_with_tags(value: Any) -> str:
    """As `!!int "1"`; None, bool and numbers all carry the core tags."""
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, sort_keys=False)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
ODD_WORDS = st.sampled_from([case[0] for case in SCALARS])
PLAIN_DATA = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | TEXT | ODD_WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize("writer", [written, dumped_with_tags])
@settings(deadline=None, max_examples=60)
@given(value=PLAIN_DATA)
def test_plain_data_survives_being_written(writer: Callable[[Any], str], value: Any) -> None:
    document = load(writer(value).encode(), name="r.yaml")
    assert repr(document.data) == repr(value)
    assert document.lines.keys() == paths(value).keys()
    assert document.key_lines.keys() == {p for p in paths(value) if p and isinstance(p[-1], str)}


@settings(deadline=None, max_examples=300)
@given(value=FLOATS)
def test_every_float_that_python_writes_is_read_as_itself(value: float) -> None:
    read = data(f"a: {value!r}")["a"]
    assert (read, math.copysign(1, read)) == (value, math.copysign(1, value))


def holds(text: bytes) -> None:
    """Either plain data within the bounds, with lines that exist, or problems in one line each."""
    rows = text.count(b"\n") + text.count(b"\r") + 1
    try:
        document = load(text, name="r.yaml")
    except YamlProblems as caught:
        error = caught
    else:
        assert isinstance(document, Document)
        assert document.lines.keys() == paths(document.data).keys()
        assert all(1 <= line <= rows for line in document.lines.values())
        assert all(1 <= line <= rows for line in document.key_lines.values())
        json.dumps(document.data, allow_nan=False, ensure_ascii=False).encode()
        return
    assert error.problems
    assert all(p.startswith("r.yaml:") and p.isprintable() for p in error.problems)
    assert all(1 <= int(p.split(":")[1]) <= rows for p in error.problems)


@settings(deadline=None, max_examples=300)
@given(text=st.binary(max_size=200))
def test_any_bytes_give_a_document_or_problems(text: bytes) -> None:
    holds(text)


PIECES = [
    *"[]{},:-?|>&*!%@`'\"#~ \n\t\r\\",
    *(
        "a",
        "b: ",
        "- ",
        "? ",
        ": ",
        "<<: ",
        "&a ",
        "*a",
        "!!str ",
        "!x ",
        "!!int ",
        "---\n",
        "...\n",
    ),
    *("\n  ", "\n    ", "1", ".5", "0x", "null", '"\\', "|2\n", "%YAML 1.2\n", "%TAG !a! b\n", "é"),
    *("\u2028", "\ufeff", "\0", "'a'", '"b"', "{c: d}", "[e, f]", '"\\U00110000"', '"\\ud800"'),
]


@pytest.mark.parametrize("preferred", PARSERS)
@settings(deadline=None, max_examples=400)
@given(text=st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_any_mixture_of_yaml_gives_a_document_or_problems(preferred: Any, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml12, "PARSER", preferred)
        holds(text.encode())


LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
LAUGHS_IN_KEYS = "a0: &a0 {k: v, l: v}\n" + "".join(
    f"a{i}: &a{i} {{k: *a{i - 1}, l: *a{i - 1}}}\n" for i in range(1, 31)
)
MERGES = "a0: &a0 {k: v}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 14)
)
MIB = 1 << 20
BOMBS = {
    "billion laughs": LAUGHS,
    "billion laughs in mappings": LAUGHS_IN_KEYS,
    "merge keys": MERGES,
    "merge keys, quadratic": "a: &a {"
    + ",".join(f"k{i}: 1" for i in range(3000))
    + "}\nb: {<<: ["
    + "*a," * 3000
    + "]}",
    "brackets": "[" * MIB,
    "braces": "{" * MIB,
    "brackets and keys": "[a: " * (MIB // 4),
    "dashes": "- " * (MIB // 2),
    "question marks": "? " * (MIB // 2),
    "indentation": "\n".join(" " * i + "a:" for i in range(1400)),
    "a huge integer": "a: " + "9" * (MIB - 8),
    "a huge hexadecimal": "a: 0x" + "f" * (MIB - 8),
    "a huge float": "a: 0." + "1" * (MIB - 8),
    "a huge exponent": "a: 1e" + "9" * (MIB - 8),
    "many huge integers": "[" + ("9" * 99 + ",") * 10_000 + "]",
    "almost numbers": "a: " + "1" * (MIB - 8) + "x",
    "many anchors": "".join(f"- &a{i} x\n" for i in range(80_000)),
    "anchors and aliases": "".join(f"- [&a{i} x, *a{i}]\n" for i in range(4_900)),
    "a long text repeated": "a: &a " + "x" * 900_000 + "\nb: [" + "*a," * 19_000 + "]",
    "directives": "".join(f"%TAG !a{i}! x\n" for i in range(60_000)) + "---\na: 1\n",
    "directives of a second document": "a: 1\n...\n" + "%TAG !a! x\n" * 90_000,
    "documents": "---\n" * (MIB // 4),
    "one key again and again": "a: 1\n" * (MIB // 5),
    "many keys": "".join(f"key{i}: {i}\n" for i in range(9_900)),
    "wrong tags": "- !x\n" * (MIB // 5),
    "unknown aliases": "- *x\n" * (MIB // 5),
    "invisible characters": "\x01\n" * (MIB // 2),
    "directives everywhere": "%\n" * (MIB // 2),
    "comments": "#\n" * (MIB // 2),
    "empty lines": "\n" * MIB,
    "one text": "a: " + "b " * (MIB // 2 - 8),
    "one text in many lines": "a:" + " b\n" * (MIB // 3 - 8),
    "one block": "a: |\n" + " b\n" * (MIB // 3 - 8),
    "escapes": 'a: "' + "\\x41" * (MIB // 4 - 8) + '"',
    "open quote": '"' + "\n" * (MIB - 8),
    "emoji": "a: " + "😀" * (MIB // 4 - 8),
    "spaces": "a:" + " " * (MIB - 8) + "b",
    "a long tag": "a: !<" + "x" * (MIB - 16) + "> b",
    "a long key": "? " + "x" * (MIB - 16) + "\n: b",
    "keys without end": "".join(f"x{i}\n" for i in range(100_000)),
}

# Each bomb may use one second and what is left of the one begun; the whole process 200 MB.
DETONATE = """
import json, resource, sys, time
from runner.engine.yaml12 import NODES_MAX, YamlProblems, load
resource.setrlimit(resource.RLIMIT_AS, (200 << 20, 200 << 20))
most = resource.getrlimit(resource.RLIMIT_CPU)[1]
for name, text in json.load(sys.stdin).items():
    print(name, end=": ", flush=True)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 3, most))
    try:
        document = load(text.encode(), name="bomb")
        assert len(document.lines) <= NODES_MAX
        print(len(document.lines))
    except YamlProblems as error:
        assert len(error.problems) <= 102
        print(error.problems[-1][:60])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time are Linux's")
@pytest.mark.skipif(not yaml.__with_libyaml__, reason="the bound in time is the C parser's")
def test_no_megabyte_takes_more_than_a_second_or_200_mb() -> None:
    assert all(len(text.encode()) <= MIB for text in BOMBS.values())
    done = subprocess.run(
        [sys.executable, "-c", DETONATE], input=json.dumps(BOMBS), capture_output=True, text=True
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-300:], done.stderr[-2000:])
    assert len(done.stdout.splitlines()) == len(BOMBS)
