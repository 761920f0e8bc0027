"""New conversations from the command line, or from a file, into a recipe's source folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner import collect, disk
from runner.chat import intake
from runner.chat.intake import NotAConversation
from runner.chat.json_parser import Refused, text_value
from runner.engine import opened
from runner.errors import RecipeError

Given = tuple[list[Mapping[str, Any]], Mapping[str, Any]]
"""The messages of a conversation and its metadata."""

BYTES_MAX = 64 << 20
"""Of a file with conversations; it is read as a whole."""

_SHAPES = (
    'give {"messages": [{"role", "content"}, …]}, such a list alone,'
    ' or {"instruction", "input", "output"}, each with "metadata" if there is some'
)


def conversations(
    recipe: Path,
    root: Path | None,
    overrides: Sequence[str],
    *,
    user: str | None,
    reply: str | None,
    system: str | None,
    metadata: Sequence[str],
    file: str | None,
) -> list[Path]:
    """Writes what was given, one file each; nothing where one of them cannot be learned from."""
    said = [user, reply, system]
    if file is not None and said != [None] * 3:
        raise RecipeError(
            "--from-file stands alone, without --user, --reply and --system", hint="give one"
        )
    if file is None and (user is None or reply is None):
        raise RecipeError("--user and --reply are both needed", hint="or give --from-file FILE")
    common = dict(map(_pair, metadata))
    if file is None:
        given: list[Given] = [(list(collect.pair(user, reply, system)), {})]
    else:
        given = list(_read(file))
    with opened.at(recipe, root, overrides) as current:
        place = collect.place_in(current)
    made: list[bytes] = []
    for number, (messages, own) in enumerate(given, 1):
        try:
            made.append(intake.as_bytes(place, messages, {**own, **common}))
        except NotAConversation as error:
            if len(given) == 1:
                raise
            what = f"conversation {number} of {len(given)}: {error.message}"
            raise NotAConversation(what, hint=error.hint) from None
    return [intake.write(place, data) for data in made]


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (sign and key.strip()):
        raise RecipeError(f"--metadata {text[:60]!r} is not KEY=VALUE", hint="provider=my-app, say")
    return key.strip(), value


def _read(file: str) -> Iterator[Given]:
    """The conversations in a JSON or JSON Lines file."""
    name = "standard input" if file == "-" else file
    data = _bytes(file)
    if len(data) > BYTES_MAX:
        raise NotAConversation(
            f"{name} has more than {BYTES_MAX:,} bytes",
            hint="put the file into the source folder yourself: `ingest` reads files of any size",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotAConversation(f"{name} is not UTF-8 at byte {error.start}", hint=_SHAPES) from None
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise NotAConversation(f"{name} is empty", hint=_SHAPES)
    # A whole record on the first line, and more lines: JSON Lines.
    if len(lines) > 1 and _mistake(lines[0]) is None:
        values = [
            (f"{name}: line {n}", _value(line, f"{name}: line {n}"))
            for n, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    else:
        values = [(name, _value(text, name))]
    for where, value in values:
        yield _given(value, where)


def _bytes(file: str) -> bytes:
    """What the file holds, up to one byte more than is taken; a pipe nobody writes to is empty."""
    if file == "-":
        return sys.stdin.buffer.read(BYTES_MAX + 1)
    with open(file, "rb", opener=disk.at_once) as opened_file:
        if sys.platform != "win32":
            os.set_blocking(opened_file.fileno(), True)  # a slow writer is waited for
        return opened_file.read(BYTES_MAX + 1)


def _mistake(text: str) -> str | None:
    """What is wrong with the syntax of a JSON text."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    except (ValueError, RecursionError):
        pass  # the syntax is right
    return None


def _value(text: str, where: str) -> Any:
    mistake = _mistake(text)
    if mistake is not None:
        raise NotAConversation(f"{where} is not valid JSON: {mistake}", hint=_SHAPES)
    try:
        return text_value(text)
    except Refused as error:
        raise NotAConversation(f"{where}: {error}", hint=_SHAPES) from None


def _given(value: object, where: str) -> Given:
    if isinstance(value, list):
        return value, {}
    if isinstance(value, dict):
        metadata = value.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise NotAConversation(f"{where}: metadata is not an object", hint=_SHAPES)
        if value.keys() <= {"messages", "metadata"} and isinstance(value.get("messages"), list):
            return value["messages"], metadata
        if value.keys() <= {"instruction", "input", "output", "metadata"} and value.keys() >= {
            "instruction",
            "output",
        }:
            parts = (value["instruction"], value.get("input"))
            asked = "\n\n".join(part for part in parts if isinstance(part, str) and part.strip())
            return list(collect.pair(asked, value["output"])), metadata
    raise NotAConversation(f"{where} is no conversation", hint=_SHAPES)
