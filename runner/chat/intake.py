"""Writes one new conversation as one file into a source folder, whole or not at all.

The file has the users' shape: `{"instruction", "input", "output", "metadata"}` for one exchange,
`{"messages", "metadata"}` for all else; `ingest` reads both, and keeps the metadata. It is written
under a hidden name, synced and then linked to its own, which no other file has: whoever is killed
meanwhile leaves nothing that a run would read, and nothing that is there is ever replaced.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from runner import disk
from runner.errors import PreconditionError, RecipeError

BYTES_MAX = 8 << 20
"""Of the file that one conversation makes."""
ROLES = ("system", "user", "assistant", "tool")
FORMATS = ("auto", "instruct", "messages")
"""Of `ingest`, those that read what is written here."""

_KEYS = ("role", "content", "weight", "thinking", "tool_calls")
_ENDINGS = (".json", ".jsonl")
_DEPTH_MAX = 16
_LARGEST = 1 << 63
_ATTEMPTS = 10


class NotAConversation(RecipeError, ValueError):
    """What was given cannot be learned from: it is empty, no text, too large, …"""


@dataclass(frozen=True)
class Place:
    """A folder in which `ingest` finds new files, and how they must be named and written for it."""

    folder: Path
    ending: str = ".json"
    format: Literal["auto", "instruct", "messages"] = "auto"


def place(root: Path, sources: Sequence[str], format: str) -> Place:
    """Where a new file is read, of an ingest's `sources:`: the first folder, or that of a glob."""
    if format not in FORMATS:
        raise RecipeError(
            f"the ingest stage reads `format: {format}`, and new conversations are written as"
            " instruct or messages",
            hint="leave `format:` out, or add a second ingest stage above for new conversations",
        )
    for source in sources:
        if ".." in Path(source).parts and not Path(source).is_absolute():
            continue
        path = root / source
        if path.is_dir():
            return Place(path, format=format)  # type: ignore[arg-type]  # looked up above
        if found := _before_glob(root, source):
            return Place(*found, format=format)  # type: ignore[arg-type]
    raise RecipeError(
        "no source of the recipe is a folder that takes new files"
        + (f": {', '.join(map(repr, sources[:3]))}" if sources else ""),
        hint="name an existing folder first in `sources:` of the ingest stage",
    )


def add(
    place: Place, messages: Iterable[Mapping[str, Any]], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Writes the conversation, with the time where `metadata` has none; the path of its file."""
    return write(place, as_bytes(place, messages, metadata))


def as_bytes(
    place: Place, messages: Iterable[Mapping[str, Any]], metadata: Mapping[str, Any] | None = None
) -> bytes:
    """What the file will hold; raises NotAConversation."""
    stamped = {"timestamp": _now().isoformat(timespec="seconds"), **_checked_metadata(metadata)}
    record = shaped(checked(messages), stamped, place.format)
    try:
        data = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (ValueError, TypeError, RecursionError) as error:  # arguments of tool calls
        raise NotAConversation(f"the conversation is no JSON: {error}", hint=_PLAIN) from None
    if len(data) > BYTES_MAX:
        raise NotAConversation(
            f"the conversation makes a file of {len(data):,} bytes, more than {BYTES_MAX:,}",
            hint="split it, or put the file into the source folder yourself",
        )
    return data


def write(place: Place, data: bytes) -> Path:
    """Puts the bytes into a file of their own, named by the time; its path."""
    if not place.folder.is_dir():
        raise PreconditionError(f"there is no folder {place.folder}", hint="make it, or correct it")
    try:
        for _ in range(_ATTEMPTS):
            time = _now().strftime("%Y%m%dT%H%M%S.%fZ")
            path = place.folder / f"{time}-{os.urandom(6).hex()}{place.ending}"
            if disk.write_new(path, data):
                return path
    except OSError as error:
        raise disk.full(error, place.folder, len(data)) or PreconditionError(
            f"{place.folder}: {error.strerror or error}", hint="check that you may write there"
        ) from error
    raise PreconditionError(
        f"{place.folder}: each file that was begun there was taken away",
        hint="something else clears that folder; see what",
    )


def checked(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain data; raises NotAConversation naming the one that is wrong."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise NotAConversation(
            f"messages are {type(messages).__name__}, not a list",
            hint='give [{"role": "user", "content": …}, {"role": "assistant", "content": …}]',
        )
    found = [_message(raw, f"message {number}") for number, raw in enumerate(messages)]
    asked = next((n for n, said in enumerate(found) if said["role"] == "user"), len(found))
    if not any(said["role"] == "assistant" and said["content"] for said in found[asked:]):
        what = "no message" if not found else "no user message with a reply after it"
        raise NotAConversation(f"the conversation has {what}", hint="give a question and its reply")
    return found


def shaped(
    messages: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any], format: str
) -> dict[str, Any]:
    """The record in the users' shape."""
    is_pair = [said.keys() for said in messages] == [{"role", "content"}] * 2
    is_pair = is_pair and [said["role"] for said in messages] == ["user", "assistant"]
    if format == "instruct" and not is_pair:
        raise RecipeError(
            "the ingest stage reads `format: instruct`: one question, one reply, no system text",
            hint="leave `format:` out of the recipe to keep whole conversations",
        )
    if is_pair and format != "messages":
        asked, answered = (said["content"] for said in messages)
        return {"instruction": asked, "input": "", "output": answered, "metadata": dict(metadata)}
    return {"messages": list(messages), "metadata": dict(metadata)}


def _message(raw: object, what: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise NotAConversation(f"{what} is {type(raw).__name__}, not an object", hint=_MESSAGE)
    role = raw.get("role")
    if role not in ROLES:
        raise NotAConversation(
            f"{what} has role {repr(role)[:60]}", hint=f"roles are {', '.join(ROLES)}"
        )
    unknown = [key for key in raw if key not in _KEYS]
    if unknown:
        raise NotAConversation(f"{what} has the key {repr(unknown[0])[:60]}", hint=_MESSAGE)
    calls = raw.get("tool_calls")
    says_more = role == "assistant" and (calls or raw.get("thinking"))
    content = raw.get("content")
    if content is None and says_more:
        content = ""
    found = {"role": role, "content": _text(content, f"{what}: content", empty=bool(says_more))}
    weight = raw.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        raise NotAConversation(
            f"{what} has weight {repr(weight)[:60]}", hint="0 leaves a reply out of the loss; or 1"
        )
    if weight == 0:
        found["weight"] = 0
    if raw.get("thinking"):
        found["thinking"] = _text(raw["thinking"], f"{what}: thinking")
    if calls:
        if not isinstance(calls, list | tuple) or not all(map(_is_call, calls)):
            raise NotAConversation(
                f"{what}: tool_calls is not a list of calls",
                hint='give [{"name": "search", "arguments": {…}}]',
            )
        found["tool_calls"] = [_plain(call, f"{what}: tool_calls") for call in calls]
    if role != "assistant" and len(found) > 2:
        raise NotAConversation(
            f"{what} is of role {role} and has {list(found)[2]}", hint="only replies have that"
        )
    return found


def _is_call(call: object) -> bool:
    return isinstance(call, Mapping) and isinstance(call.get("name"), str) and bool(call["name"])


def _text(text: object, what: str, *, empty: bool = False) -> str:
    if not isinstance(text, str):
        raise NotAConversation(f"{what} is {type(text).__name__}, not a text", hint="give a text")
    if not text.strip() and not empty:
        raise NotAConversation(f"{what} is empty", hint="give a text that says something")
    if len(text) > BYTES_MAX:
        raise NotAConversation(
            f"{what} has {len(text):,} characters, more than {BYTES_MAX:,}", hint="split it"
        )
    if "\0" in text:
        raise NotAConversation(f"{what} has a NUL character in it", hint="take it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NotAConversation(
            f"{what} has half of a surrogate pair, which is no character, at {error.start}",
            hint="decode it as UTF-8 before",
        ) from None
    return text


def _checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    if not isinstance(metadata, Mapping | None):
        raise NotAConversation(f"metadata is {type(metadata).__name__}, not a dict", hint=_PLAIN)
    found: dict[str, Any] = _plain(metadata or {}, "metadata")
    return {key: value for key, value in found.items() if value is not None}


def _plain(value: object, what: str, depth: int = 0) -> Any:
    """The value, if JSON keeps it as it is."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, what, empty=True)
    if isinstance(value, int) and abs(value) < _LARGEST:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if depth < _DEPTH_MAX and isinstance(value, list | tuple):
        return [_plain(one, f"{what}[{number}]", depth + 1) for number, one in enumerate(value)]
    if depth < _DEPTH_MAX and isinstance(value, Mapping):
        return {
            _text(key, f"a key in {what}"): _plain(one, f"{what}.{str(key)[:60]}", depth + 1)
            for key, one in value.items()
        }
    raise NotAConversation(f"{what} is {repr(value)[:60]}, which JSON cannot keep", hint=_PLAIN)


_MESSAGE = f"a message has {', '.join(_KEYS)}"
_PLAIN = "texts, numbers, true, false, and lists and dicts of them can be kept"


def _before_glob(root: Path, source: str) -> tuple[Path, str] | None:
    """The folder before a glob, and the ending that the glob finds there."""
    parts = Path(source).parts
    start = next((n for n, part in enumerate(parts) if any(c in part for c in "*?[")), None)
    if start is None:
        return None
    folder, rest = root.joinpath(*parts[:start]), parts[start:]
    while rest[:1] == ("**",):
        rest = rest[1:] or ("*",)
    if len(rest) != 1 or not folder.is_dir():
        return None
    now = _now().strftime("%Y%m%dT%H%M%S.%fZ")
    for ending in _ENDINGS:
        if fnmatchcase(f"{now}-{'0' * 12}{ending}", rest[0]):
            return folder, ending
    return None


def _now() -> datetime:
    return datetime.now(UTC)
