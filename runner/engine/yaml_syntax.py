"""Says in plain words what PyYAML's parser, the C one or the Python one, could not read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import yaml

from runner.engine.words import escaped, shown


def explained(error: yaml.MarkedYAMLError, rows: Sequence[str], innermost: int) -> tuple[int, str]:
    """The 1-based line to look at, and `what; what to do`.

    `rows` are the file's, `innermost` is the line of the list or mapping that is being read.
    """
    said = f"{error.context or ''}: {error.problem or ''}"
    at = error.problem_mark or error.context_mark
    start = error.context_mark or at
    if at is None or start is None:
        return 1, f"this is not YAML ({escaped(said)}); check the quotes and brackets"
    if "node content" in said and not "".join(rows[at.line : at.line + 1])[at.column :].strip():
        return innermost, "the '[' or '{' that opens here is never closed; close it"
    row = rows[at.line] if at.line < len(rows) else ""
    if "tab character" in said or re.match(r" *\t", row):
        return at.line + 1, "a tab indents this line; indent with spaces"
    if re.search("block (mapping|collection)", said) and row[: at.column].strip(" -"):
        return at.line + 1, _GOES_ON
    for pattern, is_at_start, sentence in _SENTENCES:
        if re.search(pattern, said):
            line = (start if is_at_start else at).line + 1
            here = row[at.column : at.column + 1]
            words = {"start": start.line + 1, "here": shown(here) if here else "the end of a line"}
            return line, sentence.format(**words)
    return at.line + 1, f"this is not YAML ({escaped(said)}); check the quotes and brackets above"


_GOES_ON: Final = (
    "the value ends before this line does; quote the whole value, and double a ' inside '…'"
)
# What the parsers say, whether to look where the construct starts, our words; first match counts.
_SENTENCES: Final = (
    (
        r"quoted scalar: found unexpected (end|document)",
        True,
        "the quote that opens here is never closed; close it",
    ),
    (
        r"(?i)escape|hexdecimal",
        False,
        "a backslash in double quotes begins an escape; double it, or use single quotes",
    ),
    (
        r"mapping values are not allowed",
        False,
        (
            "a ':' where no value can begin; quote text that holds ': ', and check the indentation"
            " and the line above"
        ),
    ),
    (
        r"sequence entries are not allowed",
        False,
        "a '-' where no list can begin; start the list on a line of its own, or quote the text",
    ),
    (r"mapping keys are not allowed", False, "a '?' where no key can begin; quote the text"),
    (
        r"could not find expected ':'",
        True,
        "this line has no 'key: value'; write a space after the ':', or indent or quote the text",
    ),
    (
        r"cannot start any token",
        False,
        "text cannot begin with {here}; quote it",
    ),
    (
        r"scanning an (alias|anchor)",
        True,
        "'*' and '&' begin a YAML alias or anchor; quote text that begins so, such as '*.zip'",
    ),
    (
        r"(scanning|parsing) a (tag|node: found undefined)",
        True,
        "'!' begins a YAML tag; quote the text",
    ),
    (
        r"scanning a block scalar",
        True,
        "after '|' or '>' nothing may follow but a comment; begin the text on the next line",
    ),
    (r"flow sequence", True, "the '[' that opens here lacks a ',' or its ']'; complete it"),
    (
        r"flow mapping",
        True,
        "the '{{' that opens here lacks a ',' or its '}}'; complete it, or quote the text",
    ),
    (
        r"parsing a block (mapping|collection)",
        False,
        (
            "this does not line up with what starts on line {start}; check the indentation here"
            " and the quotes above"
        ),
    ),
    (
        r"document start",
        False,
        "this does not belong to what stands above; check the indentation and the brackets",
    ),
    (r"node content", False, "no value can begin with {here}; quote it, or delete it"),
)
