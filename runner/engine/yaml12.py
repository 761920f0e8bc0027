"""Reads a recipe: YAML 1.2 words and numbers, each mistake with its line, bounded work on any file.

PyYAML supplies the events; the nodes are ours, because its composer recurses, goes by YAML 1.1 and
stops at the first mistake. The price is `yaml_syntax`: its parser's errors in our words. Without
its C parser a load takes five times as long, the worst megabyte about a second, and a tab between
words is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import yaml

from runner.engine import yaml_syntax
from runner.engine.words import escaped, shown
from runner.errors import RecipeError

BYTES_MAX: Final = 1 << 20
"""Of the file, and of its text after aliases."""
DEPTH_MAX: Final = 32
"""Lists and mappings inside each other, after aliases."""
NODES_MAX: Final = 20_000
"""Keys, values, lists and mappings, after aliases."""
PROBLEMS_MAX: Final = 100

PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Path = tuple[str | int, ...]


class YamlProblems(RecipeError):
    """All that is wrong with one file, by line: each `name:line: what; what to do`.

    `sentences` are the same without name and line.
    """

    def __init__(self, name: str, found: Sequence[tuple[int, str]]) -> None:
        self.problems = tuple(f"{name}:{line}: {sentence}" for line, sentence in found)
        self.sentences = tuple(sentence for _, sentence in found)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Document:
    """Plain data, with the 1-based line of each value and of each key by path; `()` is the root."""

    data: Any
    lines: Mapping[Path, int]
    key_lines: Mapping[Path, int]


def load(text: bytes, *, name: str) -> Document:
    """The document in `text`, None when empty; `YamlProblems` has `name` before each line."""
    problems = _Problems(name)
    root = _Composer(problems).root(_decoded(text, problems))
    problems.raise_if_any()
    lines: dict[Path, int] = {}
    key_lines: dict[Path, int] = {}
    return Document(_plain(root, (), lines, key_lines), lines, key_lines)


def scalar(text: str) -> str | int | float | bool | None:
    """What a word without quotes means in the core schema (YAML 1.2.2, section 10.3.2).

    Raises ValueError, with a sentence, for a number that cannot be kept as written.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text[0] not in "0123456789+-.":
        return text
    for pattern, base in _INTEGERS:
        if pattern.fullmatch(text):
            return _integer(text, base)
    if _FLOAT.fullmatch(text):
        return _float(text)
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number; write one, or quote it if it is text")
    return text


_CONSTANTS: Final[Mapping[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGERS: Final = (
    (re.compile(r"[-+]?[0-9]+"), 10),
    (re.compile(r"0o[0-7]+"), 8),
    (re.compile(r"0x[0-9a-fA-F]+"), 16),
)
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE: Final = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_DIGITS_MAX: Final = 100


def _integer(text: str, base: int) -> int:
    if len(text) <= _DIGITS_MAX and -(2**63) <= (value := int(text, base)) < 2**63:
        return value
    raise ValueError(f"{shown(text)} needs more than 64 bits; write a smaller integer, or quote it")


def _float(text: str) -> float:
    if len(text) > _DIGITS_MAX:
        raise ValueError(f"{shown(text)} has {len(text):,} characters; round it, or quote it")
    value = float(text)
    if math.isinf(value):
        raise ValueError(
            f"{shown(text)} is too large for a number; check its exponent, or quote it"
        )
    if value == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
        raise ValueError(f"{shown(text)} is too close to 0; check its exponent, or quote it")
    return value


class _Problems:
    """What is wrong so far."""

    def __init__(self, name: str) -> None:
        self._name = escaped(name)
        self._found: list[tuple[int, str]] = []
        self._left_out = 0

    def add(self, line: int, sentence: str) -> None:
        if len(self._found) < PROBLEMS_MAX:
            self._found.append((line, sentence))
        else:
            self._left_out += 1

    def stop(self, line: int, sentence: str) -> NoReturn:
        """Raises all problems; this one makes it pointless to read on."""
        self._found.append((line, sentence))
        raise self._all()

    def raise_if_any(self) -> None:
        if self._found:
            raise self._all()

    def _all(self) -> YamlProblems:
        found = sorted(self._found, key=lambda problem: problem[0])
        if self._left_out:
            found.append((found[-1][0], f"{self._left_out:,} more problems; mend these first"))
        return YamlProblems(self._name, found)


# Bytes to text

_LINE_END: Final = re.compile(r"\r\n?|\n")
# What YAML calls not printable, marks of byte order, and the three line ends that YAML 1.2 gave up.
_INVISIBLE: Final = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]"
)
_DIRECTIVE: Final = re.compile(r"%(?!YAML[ \t]+1\.2[ \t]*(#|$))")


def _decoded(text: bytes, problems: _Problems) -> str:
    if len(text) > BYTES_MAX:
        problems.stop(1, f"the file has {len(text):,} bytes; a recipe has at most {BYTES_MAX:,}")
    if text[:2] in (b"\xff\xfe", b"\xfe\xff") or (0 in text[:2] and len(text) % 2 == 0):
        problems.stop(1, "the file is not UTF-8 but seems to be UTF-16 or UTF-32; save it as UTF-8")
    try:
        decoded = text.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = _lines_of(text[: error.start].decode("utf-8"))
        problems.stop(line, f"byte 0x{text[error.start]:02x} is not UTF-8; save the file as UTF-8")
    if _INVISIBLE.search(decoded) or re.search(r"(^|\r)%", decoded, re.MULTILINE):
        for line, row in enumerate(_LINE_END.split(decoded), start=1):
            _check_row(row, line, problems)
        problems.raise_if_any()
    return decoded


def _lines_of(text: str) -> int:
    return text.count("\n") + text.count("\r") - text.count("\r\n") + 1


def _check_row(row: str, line: int, problems: _Problems) -> None:
    if found := _INVISIBLE.search(row):
        what = f"invisible character U+{ord(found[0]):04X} in column {found.start() + 1}"
        problems.add(line, f"{what}; delete it")
    # Not left to libyaml: it compares each %TAG with all before it, 10 s for a megabyte of them.
    if _DIRECTIVE.match(row):
        problems.add(
            line, f"{shown(row)} is a YAML directive; delete it, or indent it if it is text"
        )


# Text to nodes


@dataclass(slots=True)
class _Node:
    """A scalar, list or mapping; its size, aliases included, is known once it is closed."""

    line: int
    value: Any  # a scalar, list[_Child] or dict[str, _Child]
    is_closed: bool = True
    nodes: int = 1
    characters: int = 0
    height: int = 0


@dataclass(frozen=True, slots=True)
class _Child:
    """A node as its parent has it: an alias has the line of the alias."""

    line: int
    node: _Node
    key_line: int = 0


@dataclass(slots=True)
class _Level:
    """A list or mapping that is being read, and the key that waits for its value."""

    node: _Node
    nodes_before: int
    characters_before: int
    key: str | None = None
    key_line: int = 0


class _Composer:
    def __init__(self, problems: _Problems) -> None:
        self._problems = problems
        self._levels: list[_Level] = []
        self._anchors: dict[str, _Node] = {}
        self._root: _Child | None = None
        self._nodes = 0
        self._characters = 0

    def root(self, text: str) -> _Child:
        """The graph of the one document in `text`."""
        documents = 0
        last_line = _lines_of(text.rstrip(" \t\r\n"))
        for event in self._events(text):
            # At the end of the file the parser counts one line more than there is.
            line = min(event.start_mark.line + 1, last_line)
            match event:
                case yaml.ScalarEvent():
                    node = _Node(line, self._value(event, line), characters=len(event.value))
                    self._name(event.anchor, node)
                    self._count(node, line)
                    is_merge = event.value == "<<" and _is_plain(event)
                    self._place(_Child(line, node), is_merge=is_merge)
                case yaml.SequenceStartEvent():
                    self._open(event, _Node(line, [], is_closed=False), "seq")
                case yaml.MappingStartEvent():
                    self._open(event, _Node(line, {}, is_closed=False), "map")
                case yaml.CollectionEndEvent():
                    self._close()
                case yaml.AliasEvent():
                    self._repeat(event, line)
                case yaml.DocumentStartEvent():
                    documents += 1
                    if documents > 1:
                        self._problems.stop(line, "a second document starts; keep one in a file")
        return self._root or _Child(1, _Node(1, None))

    def _events(self, text: str) -> Iterator[Any]:
        try:
            yield from yaml.parse(text, Loader=PARSER)
        except yaml.MarkedYAMLError as error:
            innermost = self._levels[-1].node.line if self._levels else 1
            rows = _LINE_END.split(text)
            line, sentence = yaml_syntax.explained(error, rows, innermost)
            self._problems.stop(min(line, len(rows)), sentence)
        except (ValueError, OverflowError):
            # PyYAML's Python parser gives the number of "\UFFFFFFFF" to chr() unchecked.
            found = _NO_CHARACTER.search(text)
            line = _lines_of(text[: found.start()] if found else "")
            self._problems.stop(line, "this escape names no character; double the backslash")

    def _open(self, event: Any, node: _Node, kind: str) -> None:
        if event.tag not in (None, _CORE + kind):
            self._refuse_tag(event.tag, node.line)
        if len(self._levels) == DEPTH_MAX:
            self._problems.stop(node.line, _TOO_DEEP)
        self._name(event.anchor, node)
        self._levels.append(_Level(node, self._nodes, self._characters))
        self._count(node, node.line)

    def _close(self) -> None:
        level = self._levels.pop()
        node = level.node
        node.is_closed = True
        node.nodes = self._nodes - level.nodes_before
        node.characters = self._characters - level.characters_before
        node.height += 1
        self._place(_Child(node.line, node))

    def _name(self, anchor: str | None, node: _Node) -> None:
        if anchor is None:
            return
        if before := self._anchors.get(anchor):
            sentence = f"the anchor &{anchor[:60]} is already on line {before.line}"
            self._problems.add(node.line, f"{sentence}; rename one of the two")
        self._anchors[anchor] = node

    def _repeat(self, event: Any, line: int) -> None:
        anchor: str = event.anchor
        node = self._anchors.get(anchor)
        word = f"*{anchor[:60]}"
        if node is None:
            sentence = f"{word} repeats something named &{word[1:]}, which is not above"
            self._problems.add(line, f"{sentence}; quote text that begins with '*'")
            node = _Node(line, "")
        elif not node.is_closed:
            self._problems.add(line, f"{word} repeats what it is part of; write the values out")
            node = _Node(line, "")
        if len(self._levels) + node.height > DEPTH_MAX:
            self._problems.stop(line, _TOO_DEEP)
        self._count(node, line)
        self._place(_Child(line, node))

    def _count(self, node: _Node, line: int) -> None:
        self._nodes += node.nodes
        self._characters += node.characters
        if self._nodes > NODES_MAX:
            self._problems.stop(
                line, f"more than {NODES_MAX:,} values; move lists to a file of data"
            )
        if self._characters > BYTES_MAX:
            self._problems.stop(
                line, f"aliases repeat more than {BYTES_MAX:,} characters; use fewer"
            )

    def _place(self, child: _Child, *, is_merge: bool = False) -> None:
        if not self._levels:
            self._root = child
            return
        level = self._levels[-1]
        level.node.height = max(level.node.height, child.node.height)
        if isinstance(level.node.value, list):
            level.node.value.append(child)
        elif level.key is None:
            level.key = self._key(child, is_merge)
            level.key_line = child.line
        else:
            self._set(level, level.key, child)
            level.key = None

    def _set(self, level: _Level, key: str, child: _Child) -> None:
        before = level.node.value.get(key)
        if before is None:
            level.node.value[key] = _Child(child.line, child.node, level.key_line)
        elif key != _REFUSED:
            sentence = f"{shown(key)} is already on line {before.key_line}; keep one of the two"
            self._problems.add(level.key_line, sentence)

    def _key(self, child: _Child, is_merge: bool) -> str:
        value = child.node.value
        if is_merge:
            self._problems.add(child.line, "merge keys (<<) are not read; write the settings out")
        elif isinstance(value, list | dict):
            sentence = "a list or mapping cannot be a key"
            self._problems.add(child.line, f"{sentence}; quote text that begins with '{{' or '['")
        elif not isinstance(value, str):
            self._problems.add(
                child.line, f"a key must be text, this one is {shown(value)}; quote it"
            )
        else:
            return value
        return _REFUSED

    def _value(self, event: Any, line: int) -> Any:
        """What a scalar event stands for; one that is refused is reported."""
        if event.tag not in _SCALAR_TAGS:
            self._refuse_tag(event.tag, line)
            return _REFUSED
        try:
            return _typed(event.value, event.tag, _is_plain(event))
        except ValueError as error:
            self._problems.add(line, str(error))
            return _REFUSED

    def _refuse_tag(self, tag: str, line: int) -> None:
        word = tag.replace(_CORE, "!!")
        sentence = f"a recipe takes no tag {shown(word)} here"
        self._problems.add(line, f"{sentence}; delete it, or quote text that begins with '!'")


_CORE: Final = "tag:yaml.org,2002:"
_SCALAR_TAGS: Final[Mapping[str | None, type]] = {
    None: object,
    _CORE + "str": str,
    _CORE + "int": int,
    _CORE + "float": float,
    _CORE + "bool": bool,
    _CORE + "null": type(None),
}
_TOO_DEEP: Final = f"more than {DEPTH_MAX} lists and mappings inside each other; make it flatter"
_NO_CHARACTER: Final = re.compile(r"\\U(?!00(0|10))[0-9a-fA-F]{8}")
_REFUSED: Final = "\0"  # stands for what was reported, and cannot be written
# NUL ends a path in the system's eyes; half a surrogate pair cannot be written as UTF-8.
_NEVER_TEXT: Final = re.compile("[\0\ud800-\udfff]")


def _is_plain(event: Any) -> bool:
    return event.tag is None and event.style in (None, "")


def _typed(text: str, tag: str | None, is_plain: bool) -> Any:
    if found := _NEVER_TEXT.search(text):
        raise ValueError(f"text cannot hold U+{ord(found[0]):04X}; delete that escape")
    wanted = _SCALAR_TAGS[tag]
    if wanted is str or not (tag or is_plain):
        return text
    value = scalar(text)
    if wanted is float and type(value) is int:
        return float(value)
    if tag and type(value) is not wanted:
        word = tag.removeprefix(_CORE)
        raise ValueError(
            f"{shown(text)} is not of the type !!{word}; correct it, or delete the tag"
        )
    return value


# Nodes to data


def _plain(child: _Child, path: Path, lines: dict[Path, int], key_lines: dict[Path, int]) -> Any:
    """A copy of its own for every alias; recursion ends at DEPTH_MAX."""
    lines[path] = child.line
    value = child.node.value
    if isinstance(value, list):
        return [_plain(c, (*path, i), lines, key_lines) for i, c in enumerate(value)]
    if isinstance(value, dict):
        key_lines.update({(*path, key): c.key_line for key, c in value.items()})
        return {key: _plain(c, (*path, key), lines, key_lines) for key, c in value.items()}
    return value
