"""How conversations are cleaned: what is done to each, and what becomes of it.

Most decisions are about one conversation alone, or about what stood before it, so that cleaning
streams: of texts that have passed only hashes stay in memory. What depends on later ones waits in a
file meanwhile. A step takes a record and gives it back, changed perhaps, or a `Fault` for which it
is dropped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from runner.chat import jsonl, languages, leftovers, normal, personal_data, rules, statistics
from runner.chat.conversation import Ids, Message, content_hash, replies, tidy
from runner.errors import RunnerError

Record = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """Why something is left out: the rule, and a sentence that quotes nothing private."""

    rule: str
    text: str
    found: tuple[str, ...] = ()
    """What a report counts."""


@dataclass(frozen=True)
class Kept:
    id: str
    """In the input."""
    record: Record
    changed: bool


@dataclass(frozen=True)
class Dropped:
    id: str
    source: Mapping[str, Any]
    rule: str
    text: str

    def record(self) -> Record:
        source = dict(self.source)
        return {"conversation": self.id, "source": source, "rule": self.rule, "text": self.text}


Outcome = Kept | Dropped
Step = Callable[[Record], Record | Fault]
Judge = Callable[[str, Record], Fault | None]


@dataclass
class Tally:
    """Adds up what was found, and where each kind of find stood first."""

    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    finds: dict[str, Counter[str]] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    latest: dict[str, str] = field(default_factory=dict)
    """The last conversation with each kind of find, so that none counts twice."""
    unused: dict[str, set[str]] = field(default_factory=dict)
    """What the recipe names (`replacements`, `instructions`) and was found nowhere so far."""

    def report(self, what: str, record: Record, kinds: Iterable[str]) -> None:
        """A conversation in which something of these kinds was found and stays."""
        self.counts[f"with_{what}"] += self.latest.get(what) != record["id"]
        self.latest[what] = record["id"]
        self.finds.setdefault(what, Counter()).update(kinds)
        self.first.setdefault(what, place(record))

    def metrics(self, templates: int) -> dict[str, float | int | str]:
        """The numbers; of single rules and kinds only those that occurred."""
        counts = self.counts
        always = ("conversations", "kept", "dropped", "changed")
        said = (*always, *(["exact_duplicates"] if self.dropped["exact_duplicate"] else []))
        rest = {name: counts[name] for name in sorted(counts) if name not in said}
        return {
            **{name: counts[name] for name in always},
            **{f"dropped_{rule}": count for rule, count in sorted(self.dropped.items())},
            **rest,
            **({"templates": templates} if templates else {}),
        }

    def warnings(self, numbers: statistics.Statistics, share: float) -> Iterator[str]:
        for what, advice in _ADVICE.items():
            if what in self.finds:
                kinds, first = listed(self.finds[what]), self.first[what]
                share_of = f"{self.counts[f'with_{what}']:,} of {self.counts['conversations']:,}"
                yield (
                    f"{spaced(what)} in {share_of} conversations ({kinds}), "
                    f"first in {first}; {advice}"
                )
        for what, advice in _UNUSED.items():
            if names := sorted(self.unused.get(what, ())):
                more = " and others" if len(names) > KINDS_SHOWN else ""
                yield advice.format(" or ".join(map(_named, names[:KINDS_SHOWN])) + more)
        for where, stretch, count in numbers.templates(share)[:TEMPLATES_SHOWN]:
            yield (
                f"{count:,} of {self.counts['kept']:,} conversations have a reply that {where} "
                f"with {stretch!r}; a model learns to repeat that: more variety, or "
                "templates.max_copies"
            )


TEMPLATES_SHOWN = 5
KINDS_SHOWN = 6
RULES_SHOWN = 3
_ADVICE = {
    "placeholders": "`replacements:` fills them in, `placeholders: drop` learns no such reply",
    "refusals": "`refusals: drop` learns no such reply",
    "secrets": "`secrets: redact` writes over them, `drop` leaves the conversations out",
    "personal_data": "`personal_data: redact` writes over it, `drop` leaves the conversations out",
    "control_marks": "they stay text, and are never read as control tokens",
}
_UNUSED = {
    "replacements": "there is nothing to fill in for {} of `replacements:`; letter case matters",
    "instructions": "no first user message that is kept begins with {} of `instructions:`; "
    "letter case matters",
}
NAMED_MAX = 60
"""Characters of a recipe's text that a message shows."""


def counted(path: Path, tally: Tally, emit: Callable[[dict[str, Any]], None]) -> Iterator[Record]:
    """The conversations of the file, counted, with an event now and then."""
    with path.open("rb") as lines:
        total = sum(1 for _ in lines)
    for done, record in enumerate(jsonl.read(path)):
        if done % 1000 == 0:
            emit({"event": "progress", "done": done, "total": total, "unit": "conversations"})
        tally.counts["conversations"] += 1
        yield record


def judged(records: Iterable[Record], steps: Sequence[Step]) -> Iterator[Outcome]:
    """Each conversation after all steps, or why it was dropped."""
    for record in records:
        now = after(record, steps)
        if isinstance(now, Fault):
            yield Dropped(record["id"], record["source"], now.rule, now.text)
        else:
            yield Kept(record["id"], now, now != record)


def after(record: Record, steps: Sequence[Step]) -> Record | Fault:
    for step in steps:
        found = step(record)
        if isinstance(found, Fault):
            return found
        record = found
    return record


def repeats(outcomes: Iterable[Outcome], *, drop: bool, tally: Tally) -> Iterator[Outcome]:
    """Counts what says the same as an earlier conversation, and drops it where that is asked."""
    seen: dict[str, str] = {}
    for outcome in outcomes:
        if isinstance(outcome, Kept):
            first = seen.setdefault(hash_of(outcome), outcome.id)
            if first != outcome.id:
                tally.counts["exact_duplicates"] += 1
                if drop:
                    text = f"it says the same as conversation {first}"
                    yield dropped(outcome, Fault("exact_duplicate", text))
                    continue
        yield outcome


def without_grown(outcomes: Iterable[Outcome], scratch: Path) -> Iterator[Outcome]:
    """Drops what is word for word the beginning of another conversation, as an export made earlier
    has it: each of its windows is one of the longer conversation too.
    """
    prefixes = array("Q")  # of each conversation the hashes of its first message, first two, …
    ends = array("Q")
    whole: dict[int, int] = {}
    places: list[tuple[str, str]] = []
    waiting = scratch / "whole.jsonl"
    for outcome in passing(outcomes, waiting):
        if isinstance(outcome, Kept) and _may_grow(outcome.record):
            prefixes.extend(_prefixes(outcome.record["messages"]))
            if replies(outcome.record["messages"]):
                whole[prefixes[-1]] = len(ends)
            ends.append(len(prefixes))
            places.append((outcome.id, place(outcome.record)))
    longest: dict[int, tuple[int, int]] = {}  # the shorter → messages of the longest, which it is
    start = 0
    for number, end in enumerate(ends):
        for prefix in prefixes[start : end - 1]:
            shorter = whole.get(prefix)
            if shorter is not None and longest.get(shorter, (0, 0))[0] < end - start:
                longest[shorter] = (end - start, number)
        start = end
    said = {places[n][0]: places[longer] for n, (_, longer) in longest.items()}
    for outcome in passed(waiting):
        if isinstance(outcome, Kept) and outcome.id in said:
            id, where = said[outcome.id]
            text = f"it is the beginning of conversation {id}, which goes on ({where})"
            outcome = dropped(outcome, Fault("grown", text))
        yield outcome


_sorted = json.JSONEncoder(sort_keys=True, check_circular=False)


def _may_grow(record: Record) -> bool:
    return bool(record.get("messages")) and "chosen" not in record and "label" not in record


def _prefixes(messages: Sequence[Record]) -> Iterator[int]:
    """A hash for each beginning of the messages, with all that belongs to a message."""
    state = hashlib.blake2b(digest_size=8)
    for message in messages:
        state.update(_sorted.encode(message).encode())
        yield int.from_bytes(state.digest(), "big")


def without_near(
    outcomes: Iterable[Outcome], similarity: float, scratch: Path
) -> Iterator[Outcome]:
    """Drops all but the longest of each group of near duplicates, of equally long ones the first:
    the last export of a chat that has grown holds what the earlier ones hold.
    """
    from runner.chat import near

    waiting = scratch / "judged.jsonl"
    chars: dict[str, int] = {}

    def texts() -> Iterator[tuple[str, str]]:
        for outcome in passing(outcomes, waiting):
            if isinstance(outcome, Kept):
                text = "\n".join(statistics.texts(outcome.record))
                chars[outcome.id] = len(text)
                yield outcome.id, text

    first_of = near.components(texts(), similarity)
    longest: dict[str, str] = {}
    for id, first in first_of.items():
        if chars[id] > chars[longest.setdefault(first, first)]:
            longest[first] = id
    for outcome in passed(waiting):
        stays = longest[first_of[outcome.id]] if outcome.id in first_of else outcome.id
        if isinstance(outcome, Kept) and stays != outcome.id:
            text = f"it says almost the same as conversation {stays} (similarity {similarity:g})"
            outcome = dropped(outcome, Fault("near_duplicate", text))
        yield outcome


def passing(outcomes: Iterable[Outcome], waiting: Path) -> Iterator[Outcome]:
    """The outcomes, which are written to a file meanwhile."""
    waiting.parent.mkdir(parents=True, exist_ok=True)
    with waiting.open("w", encoding="utf-8", newline="\n") as out:
        for outcome in outcomes:
            out.write(line(vars(outcome)))
            yield outcome


def passed(waiting: Path) -> Iterator[Outcome]:
    """The outcomes of the file, which is gone then."""
    for fields in jsonl.read(waiting):
        yield Dropped(**fields) if "rule" in fields else Kept(**fields)
    waiting.unlink()


def without_templates(
    outcomes: Iterable[Outcome], max_copies: int, numbers: statistics.Statistics, chars: int
) -> Iterator[Outcome]:
    """Drops conversations with a stretch that so many before them have; `numbers` has counted."""
    for outcome in outcomes:
        if isinstance(outcome, Kept):
            learned = list(statistics.learned_texts(outcome.record))
            for stretch in statistics.stretches(learned, chars):
                if numbers.count(stretch) >= max_copies:
                    text = f"a reply {stretch[0]} as in {max_copies:,} conversations before it"
                    outcome = dropped(outcome, Fault("template", text))
                    break
        yield outcome


def varied(
    outcomes: Iterable[Outcome],
    instructions: Sequence[tuple[str, Sequence[str]]],
    tally: Tally,
) -> Iterator[Outcome]:
    """Gives the first user message another wording of its instruction, drawn by its content."""
    for outcome in outcomes:
        if isinstance(outcome, Kept):
            unused = tally.unused.get("instructions", set())
            unused -= {text for text in unused if begun_with(outcome.record, text) is not None}
            for text, variants in instructions:
                record = with_variant(outcome.record, hash_of(outcome), text, variants)
                if record is not None:
                    tally.counts["varied"] += 1
                    outcome = Kept(outcome.id, record, outcome.changed or record != outcome.record)
                    break
        yield outcome


def write(
    output: Path, outcomes: Iterable[Outcome], numbers: statistics.Statistics, tally: Tally
) -> None:
    """Both files at once; an id is the hash of what is said now, with `~2` for a repeat."""
    ids = Ids()
    with (output / "dropped.jsonl").open("w", encoding="utf-8", newline="\n") as out:

        def kept() -> Iterator[Record]:
            for outcome in outcomes:
                if isinstance(outcome, Dropped):
                    tally.counts["dropped"] += 1
                    tally.dropped[outcome.rule] += 1
                    out.write(line(outcome.record()))
                else:
                    tally.counts["kept"] += 1
                    tally.counts["changed"] += outcome.changed
                    numbers.add(outcome.record)
                    yield {**outcome.record, "id": ids.next(hash_of(outcome))}

        jsonl.write(output / "conversations.jsonl", kept())


def refuse_nothing(tally: Tally, output: Path, scratch: Path) -> None:
    """Raises when no conversation is left; the list of what was dropped outlives the failed run."""
    if tally.counts["kept"]:
        return
    total = tally.counts["conversations"]
    if not tally.dropped:
        raise RunnerError(f"clean: none of {total:,} conversations is left")
    scratch.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(output / "dropped.jsonl", scratch / "dropped.jsonl")
    ranked = sorted(tally.dropped.items(), key=lambda one: (-one[1], one[0]))
    reasons = ", ".join(f"{count:,} {spaced(rule)}" for rule, count in ranked[:RULES_SHOWN])
    more = ", …" if len(ranked) > RULES_SHOWN else ""
    raise RunnerError(
        f"clean: none of {total:,} conversations is left ({reasons}{more})",
        hint="loosen the settings that drop most of them; each is listed with its reason in "
        f"{scratch / 'dropped.jsonl'}",
    )


def normalise(record: Record) -> Record | Fault:
    """Texts in plain form; messages that then say nothing are taken out, as `ingest` does it."""
    record = with_texts(record, normal.normalised)
    for part in ("messages", "chosen", "rejected"):
        messages = [
            Message(
                m["role"],
                m["content"],
                m.get("weight") != 0,
                m.get("thinking", ""),
                tuple(m.get("tool_calls", ())),
            )
            for m in record.get(part, ())
        ]
        if any(message.says_nothing for message in messages):
            tidied, merged, empty = tidy(messages)
            record[part] = [message.record() for message in tidied]
            for name, count in (("merged", merged), ("empty", empty)):
                if count:
                    record[name] = record.get(name, 0) + count
    return record


def fill(record: Record, replacements: Mapping[str, str], tally: Tally) -> Record | Fault:
    unused = tally.unused.setdefault("replacements", set(replacements))
    change = partial(leftovers.filled, replacements=replacements, unused=unused)
    return with_texts(record, change)


def refuse_empty(record: Record) -> Record | Fault:
    """A conversation needs something said, a preference both replies, a document text."""
    if "text" in record:
        return record if record["text"].strip() else Fault("empty", "it has no text")
    for part in ("chosen", "rejected"):
        if part in record and not says_something(record[part]):
            return Fault("empty", f"its {part} reply says nothing")
    if "chosen" not in record and not says_something(record["messages"]):
        return Fault("empty", "nobody says anything in it")
    return record


def says_something(messages: Sequence[Record]) -> bool:
    return any(
        m["content"].strip() or m.get("thinking", "").strip() or m.get("tool_calls")
        for m in messages
        if m["role"] != "system"
    )


def count_marks(record: Record, tally: Tally) -> Record | Fault:
    """Reports what looks like a control token; tokenize encodes it as text."""
    marks = sum(leftovers.control_marks(text) for text in statistics.texts(record))
    if marks:
        tally.report("control_marks", record, ["mark"] * marks)
    return record


def protect(record: Record, treatments: Mapping[str, str], tally: Tally) -> Record | Fault:
    """Redacts, reports or drops for secrets and personal data, wherever they stand."""
    found = list(personal_data.in_value(private_texts(record)))
    redact: set[personal_data.Kind] = set()
    for what, kinds in (
        ("secrets", personal_data.SECRETS),
        ("personal_data", personal_data.PERSONAL),
    ):
        mine = [kind for kind in found if kind in kinds]
        if not mine or treatments[what] == "keep":
            continue
        if treatments[what] == "drop":
            return Fault(what, f"it has {spaced(what)}: {listed(Counter(mine))}")
        if treatments[what] == "report":
            tally.report(what, record, mine)
        else:
            redact |= kinds
            tally.counts.update(f"redacted_{kind}" for kind in mine)
    if not redact:
        return record
    private = {part: record[part] for part in PRIVATE if part in record}
    return {**record, **personal_data.redacted_value(private, frozenset(redact))}


PRIVATE = ("messages", "text", "chosen", "rejected", "tools", "metadata")
"""All of a record that comes from people: not its id, its place, its group."""


def private_texts(record: Record) -> list[Any]:
    """The values of these parts in which something may stand: not the words that all records have,
    such as the names of roles.
    """
    found: list[Any] = []
    for part in PRIVATE:
        if part in ("messages", "chosen", "rejected"):
            for message in record.get(part, ()):
                found += [value for name, value in message.items() if name != "role"]
        elif part in record:
            found.append(record[part])
    return found


def judge_replies(
    record: Record,
    faults: Sequence[Judge],
    reply_chars: tuple[int, int | str],
    document_chars: tuple[int, int | str],
    tally: Tally,
) -> Record | Fault:
    """Takes the loss from replies with a fault; a fault where none is left to learn.

    The worse reply of a preference is not judged, and no conversation that is labelled as bad.
    """

    def fault_of(text: str) -> Fault | None:
        what, (least, most) = (
            ("document", document_chars)
            if "text" in record
            else (
                "reply",
                reply_chars,
            )
        )
        found = length_fault(text, what, least, most)
        return found or next((f for judge in faults if (f := judge(text, record))), None)

    if "text" in record or "chosen" in record:
        found = (fault_of(text) for text in statistics.learned_texts(record))
        return next((fault for fault in found if fault), record)
    if record.get("label") is False:
        return record
    exchanges = [reply for _, reply in replies(record["messages"])]
    faulty = {
        reply: fault
        for reply in exchanges
        if (fault := fault_of(record["messages"][reply]["content"]))
    }
    if "label" in record and exchanges and exchanges[-1] in faulty:
        return faulty[exchanges[-1]]
    if not faulty:
        return record
    if len(faulty) == len(exchanges):
        fault = faulty[exchanges[0]]
        if len(exchanges) == 1:
            return fault
        return Fault(
            fault.rule,
            f"none of its {len(exchanges)} replies can be learned; of the first, {fault.text}",
        )
    tally.counts["replies_not_learned"] += len(faulty)
    messages = [
        {"role": m["role"], "content": m["content"], "weight": 0, **m} if at in faulty else m
        for at, m in enumerate(record["messages"])
    ]
    return {**record, "messages": messages}


def length_fault(text: str, what: str, least: int, most: int | str) -> Fault | None:
    chars = len(text.strip())
    if chars < least:
        return Fault("too_short", f"the {what} has {chars:,} characters, fewer than {least:,}")
    if isinstance(most, int) and chars > most:
        return Fault("too_long", f"the {what} has {chars:,} characters, more than {most:,}")
    return None


def placeholder(text: str, record: Record) -> Fault | None:
    found = tuple(map(quoted, leftovers.placeholders(text)))
    return Fault("placeholders", f"it has the place-holder {found[0]}", found) if found else None


def refusal(text: str, record: Record, phrases: Sequence[str]) -> Fault | None:
    found = leftovers.refusal(text, phrases)
    return Fault("refusals", f"it says {found!r}", (found,)) if found else None


def reporting(judge: Judge, drop: bool, tally: Tally) -> Judge:
    """The judge itself, or one that only reports what it finds."""
    if drop:
        return judge

    def reported(text: str, record: Record) -> None:
        if fault := judge(text, record):
            tally.report(fault.rule, record, fault.found)

    return reported


def rule_fault(text: str, record: Record, rule: rules.Rule, forbidden: bool) -> Fault | None:
    try:
        broken = rules.check(rule, text)
    except TimeoutError:
        where = f"conversation {record['id']} ({place(record)})"
        raise rules.too_slow(rule, where) from None
    if forbidden:
        return None if broken else Fault("forbid", f"{rule.name!r} is forbidden")
    return Fault("require", f"{rule.name!r} is required: {broken}") if broken else None


def judge_role(record: Record, rule: rules.Rule, role: str, forbidden: bool) -> Record | Fault:
    """Judges all that one role says, or all that is said; a document has no roles but `any`."""
    if "text" in record:
        said = record["text"] if role == "any" else None
    else:
        messages = (*record["messages"], *record.get("chosen", ()))
        said = "\n\n".join(m["content"] for m in messages if role in ("any", m["role"]))
    fault = None if said is None else rule_fault(said, record, rule, forbidden)
    return fault or record


def judge_language(record: Record, wanted: frozenset[str]) -> Record | Fault:
    other = languages.foreign("\n".join(statistics.learned_texts(record)), wanted)
    return Fault("language", f"its replies are in {other!r}") if other else record


def with_texts(record: Record, change: Callable[[str], str]) -> Record:
    """The record with each text changed: contents, thoughts, and a document's text."""
    changed = dict(record)
    if "text" in record:
        changed["text"] = change(record["text"])
    for part in ("messages", "chosen", "rejected"):
        if part in record:
            changed[part] = [
                {k: change(v) if k in ("content", "thinking") else v for k, v in message.items()}
                for message in record[part]
            ]
    return changed


def with_variant(record: Record, content: str, text: str, variants: Sequence[str]) -> Record | None:
    """The record with another wording of `text`; None where no user begins with it."""
    index = begun_with(record, text)
    if index is None:
        return None
    digest = hashlib.sha256(f"variant:{content}:{text}".encode()).digest()
    variant = variants[int.from_bytes(digest[:8], "big") % len(variants)]
    messages = list(record["messages"])
    message = messages[index]
    messages[index] = {**message, "content": variant + message["content"][len(text) :]}
    return {**record, "messages": messages}


def begun_with(record: Record, text: str) -> int | None:
    """The index of the first user message, where it begins with the whole words of `text`."""
    for index, message in enumerate(record.get("messages", ())):
        if message["role"] == "user":
            said = message["content"]
            goes_on = said[len(text) : len(text) + 1].isalnum() and text[-1].isalnum()
            return index if said.startswith(text) and not goes_on else None
    return None


def hash_of(kept: Kept) -> str:
    """What is said, as a hash; for an untouched record the one that its id has."""
    return content_hash(kept.record) if kept.changed else kept.id.partition("~")[0]


def dropped(kept: Kept, fault: Fault) -> Dropped:
    return Dropped(kept.id, kept.record["source"], fault.rule, fault.text)


def place(record: Record) -> str:
    source = record["source"]
    return f"{source['path']} record {source['index']}" if "index" in source else source["path"]


def listed(found: Counter[str]) -> str:
    """The most frequent, like `3 × email, 1 × phone`."""
    ranked = sorted(found.items(), key=lambda one: (-one[1], one[0]))
    more = ", …" if len(ranked) > KINDS_SHOWN else ""
    return ", ".join(f"{count:,} × {kind}" for kind, count in ranked[:KINDS_SHOWN]) + more


def spaced(name: str) -> str:
    """A rule's name as words of a sentence."""
    return name.replace("_", " ")


def _named(text: str) -> str:
    return repr(text) if len(text) <= NAMED_MAX else f"{text[:NAMED_MAX]!r}…"


def quoted(text: str) -> str:
    """A stretch of a text as a message may quote it."""
    return personal_data.redacted(text, personal_data.SECRETS | personal_data.PERSONAL)


def line(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n"
