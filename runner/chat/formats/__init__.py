"""The formats that `ingest` understands, told by a record's shape, never by file name.

A format is one module here and one line in `FORMATS`. Its `claims(record)` says whether a record
(one JSON object) has its shape. Then it has one of two readers: `each(record, options)` gives the
conversations in one record; `whole(records, options)` gives those of all claimed records of a file
together, where a record is no more than a message. Both give messages as the source has them: empty
ones are dropped, and neighbours of one role joined, for all formats in one place, here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from runner.chat.conversation import Content, Conversation, Rejected, Source, tidy
from runner.chat.formats import (
    ai_studio,
    anthropic,
    character,
    chatgpt,
    claude_ai,
    claude_code,
    documents,
    grok,
    instruct,
    lm_studio,
    messages,
    oasst,
    open_webui,
    preferences,
    prompt_completion,
    self_instruct,
    sender,
    sharegpt,
    sillytavern,
    telegram,
    turns,
)
from runner.chat.formats.reading import Nothing, Options, Unreadable
from runner.chat.json_parser import quoted
from runner.chat.json_values import Broken, Value
from runner.chat.personal_data import PERSONAL, SECRETS, redacted

Claims = Callable[[Mapping[str, Any]], bool]
Each = Callable[[Mapping[str, Any], Options], Iterable[Content]]
Whole = Callable[[Sequence[Value], Options], Iterable[tuple[Value, Content | str]]]
"""Each conversation with the record that it starts at, or a record and why it is not read."""


@dataclass(frozen=True)
class Format:
    signs: Set[str]
    """Keys of which a record of this format has at least one: most records need no closer look."""
    claims: Claims
    each: Each | None = None
    whole: Whole | None = None
    yields_to: str = ""
    """The format that is meant where a record fits both and the recipe says nothing."""


FORMATS: dict[str, Format] = {
    "sender": Format({"sender"}, sender.claims, whole=sender.whole),
    "instruct": Format({"instruction", "question", "input"}, instruct.claims, each=instruct.each),
    "messages": Format({*turns.LISTS}, messages.claims, each=messages.each),
    "anthropic": Format({"messages", "type", "request"}, anthropic.claims, each=anthropic.each),
    "character": Format({"example_dialogue"}, character.claims, each=character.each),
    # Alpaca's `text` is its instruction and output once more.
    "documents": Format({"text"}, documents.claims, each=documents.each, yields_to="instruct"),
    "oasst": Format({"prompt", "text"}, oasst.claims, whole=oasst.whole),
    "preferences": Format(
        {*turns.LABELS, *turns.PAIRED}, preferences.claims, each=preferences.each
    ),
    "prompt_completion": Format({"prompt"}, prompt_completion.claims, each=prompt_completion.each),
    "self_instruct": Format({"instances"}, self_instruct.claims, each=self_instruct.each),
    "sharegpt": Format({*turns.LISTS}, sharegpt.claims, each=sharegpt.each),
    "ai_studio": Format({"chunkedPrompt"}, ai_studio.claims, each=ai_studio.each),
    "chatgpt": Format({"mapping"}, chatgpt.claims, each=chatgpt.each),
    "claude_ai": Format({"chat_messages"}, claude_ai.claims, each=claude_ai.each),
    "claude_code": Format({"loglines", "type"}, claude_code.claims, whole=claude_code.whole),
    "grok": Format({"conversations"}, grok.claims, whole=grok.whole),
    "lm_studio": Format({"messages"}, lm_studio.claims, each=lm_studio.each),
    "open_webui": Format({"chat", "history"}, open_webui.claims, each=open_webui.each),
    "sillytavern": Format({"is_user", "user_name"}, sillytavern.claims, whole=sillytavern.whole),
    "telegram": Format({"type", "chats"}, telegram.claims, whole=telegram.whole),
}


UNKNOWN = "no known format"
REASON_MAX = 1000
"""Characters of a reason: it may quote several values."""


def read(
    path: str, items: Iterable[Value | Broken], format: str, options: Options
) -> Iterator[Conversation | Rejected]:
    """Every conversation in the values of one file, and every record that is none, and why.

    `format` is a name in `FORMATS`, or `auto` to tell it by shape. A reason may quote what stands
    in the file, so secrets and personal data in it are written over.
    """
    for found in _read(path, items, format, options):
        if isinstance(found, Rejected):
            clear = redacted(found.reason[: 2 * REASON_MAX], SECRETS | PERSONAL)
            short = clear if len(clear) <= REASON_MAX else f"{clear[:REASON_MAX]}…"
            yield replace(found, reason=short)
        else:
            yield found


def _read(
    path: str, items: Iterable[Value | Broken], format: str, options: Options
) -> Iterator[Conversation | Rejected]:
    together: dict[str, list[Value]] = {}
    for item in items:
        if isinstance(item, Broken):
            yield Rejected(path, item.reason, line=item.line, understood=item.understood)
            continue
        name = _format_of(item.value, format, options)
        if isinstance(name, Unreadable):
            yield item.rejected(path, str(name))
        elif (each := FORMATS[name].each) is not None:
            yield from _contents(path, name, item, each, options)
        else:
            together.setdefault(name, []).append(item)
    for name, records in together.items():
        whole = FORMATS[name].whole
        assert whole is not None, "a format has one of the two readers"
        for item, found in whole(records, options):
            yield _conversation(path, name, item, found)


def _format_of(record: object, format: str, options: Options) -> str | Unreadable:
    if not isinstance(record, dict):
        return Unreadable(f"a record must be a JSON object, this one is {_json_type(record)}")
    seen = documents.named(record, options.text_column)
    fits = [name for name in _possible(frozenset(seen)) if FORMATS[name].claims(seen)]
    if format == "auto":
        fits = [name for name in fits if FORMATS[name].yields_to not in fits]
    else:
        fits = [format] if format in fits else []
    if len(fits) == 1:
        return fits[0]
    if fits:
        return Unreadable(f"fits {' and '.join(fits)}; say which with `format:`")
    keys = ", ".join(quoted(key) for key in list(record)[:6]) or "none"
    wanted = UNKNOWN if format == "auto" else f"not in the format {format!r}"
    return Unreadable(f"{wanted}; its keys are {keys}")


@functools.lru_cache(maxsize=1000)
def _possible(keys: frozenset[str]) -> tuple[str, ...]:
    """The formats of which records with these keys may be."""
    return tuple(name for name, known in FORMATS.items() if not keys.isdisjoint(known.signs))


def _contents(
    path: str, name: str, item: Value, each: Each, options: Options
) -> Iterator[Conversation | Rejected]:
    try:
        for content in each(item.value, options):
            yield _conversation(path, name, item, content)
    except Unreadable as error:
        yield item.rejected(path, str(error))


def _conversation(
    path: str, name: str, item: Value, found: Content | str
) -> Conversation | Rejected:
    if isinstance(found, str):
        return _rejected(path, item, found)
    source = Source(path, name, item.index)
    if found.text:
        return Conversation(source, found)
    said, merged, empty = tidy(found.messages)
    if not said:
        why = "every message is empty" if empty else "has no message"
        return _rejected(path, item, Nothing(why))
    chosen, rejected = tidy(found.chosen)[0], tidy(found.rejected)[0]
    content = replace(found, messages=said, chosen=chosen, rejected=rejected)
    return Conversation(source, content, merged, empty)


def _rejected(path: str, item: Value, reason: str) -> Rejected:
    return replace(item.rejected(path, str(reason)), understood=isinstance(reason, Nothing))


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {str: "a string", bool: "true or false", list: "a list", int: "a number"}
    return names.get(type(value), "a number")
