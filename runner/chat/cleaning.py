"""How conversations are cleaned: what is done to each, and what becomes of it.

First each conversation is looked at by itself: steps repair it, or find a `Fault` for which it is
dropped, and all that the later decisions need is a `Finding`, which holds hashes and counts and no
text. A conversation that was looked at before is known by its line and not looked at again. Then it
is decided from the findings what is dropped because of others, and what stays is written. A step
takes a record and gives it back, changed perhaps, or a `Fault`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from binascii import a2b_base64, b2a_base64
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from runner.chat import (
    known,
    languages,
    leftovers,
    near,
    normal,
    personal_data,
    rules,
    statistics,
)
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
class Finding:
    """What was found of one conversation by itself. Plain data, so that it can be kept as JSON."""

    id: str
    """In the input."""
    source: Mapping[str, Any]
    counts: Mapping[str, int]
    """What was done to it, for the metrics."""
    reported: Mapping[str, Mapping[str, int]]
    """What stays in it and a user should know of: like `secrets`, with how many of each kind."""
    used: Sequence[str]
    """The replacements that it has a place for."""
    fault: tuple[str, str] | None = None
    """Rule and text, where it is dropped; then there is no more to know."""
    changed: bool = False
    """Whether its line is another one now, apart from the id."""
    content: str = ""
    """A hash of what it says, by which repeats are told."""
    written: str = ""
    """The same of what is written, where an instruction has got other words."""
    begins: Sequence[str] = ()
    """The instructions that it begins with."""
    varied: bool = False
    """Whether an instruction has got other words."""
    prefixes: str = ""
    """A hash for each beginning of its messages, by which it is found in others or others in it."""
    answered: bool = False
    """Whether it has a reply to learn from."""
    near: Sequence[str] = ()
    """What `near` has read, where near duplicates are looked for."""
    chars: int = 0
    """Of all that it says."""
    numbers: Sequence[Any] = ()
    """The fields of `statistics.Numbers`."""

    def plain(self) -> bytes:
        return json.dumps(list(vars(self).values()), separators=(",", ":")).encode()

    @staticmethod
    def of(plain: bytes) -> Finding:
        return Finding(*json.loads(plain.decode()))


Step = Callable[[Record], Record | Fault]
Judge = Callable[[str, Record], Fault | None]


@dataclass
class Notes:
    """What the steps note beside the record that they give, of one conversation after the other."""

    counts: Counter[str] = field(default_factory=Counter)
    reported: dict[str, Counter[str]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def report(self, what: str, kinds: Iterable[str]) -> None:
        """Something of these kinds was found and stays."""
        self.reported.setdefault(what, Counter()).update(kinds)

    def clear(self) -> None:
        self.counts.clear()
        self.reported.clear()
        self.used.clear()


@dataclass
class Tally:
    """Adds up what was found, and where each kind of find stood first."""

    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    finds: dict[str, Counter[str]] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    unused: dict[str, set[str]] = field(default_factory=dict)
    """What the recipe names (`replacements`, `instructions`) and was found nowhere so far."""

    def add(self, finding: Finding) -> None:
        self.counts["conversations"] += 1
        self.counts.update(finding.counts)
        for what, kinds in finding.reported.items():
            self.counts[f"with_{what}"] += 1
            self.finds.setdefault(what, Counter()).update(kinds)
            self.first.setdefault(what, place(finding.source))
        if finding.used:
            self.unused["replacements"].difference_update(finding.used)

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


Examine = Callable[[bytes], tuple[Finding, bytes]]
"""What `examined` does, with all but the line given."""


def examined(
    data: bytes,
    *,
    steps: Sequence[Step],
    notes: Notes,
    with_prefixes: bool,
    similarity: float | None,
    instructions: Sequence[tuple[str, Sequence[str]]],
    template_chars: int,
) -> tuple[Finding, bytes]:
    """What is found of the conversation of one line, and what is to be written of it after its id
    where it is changed. The steps note in `notes`.
    """
    record = json.loads(data)
    notes.clear()
    now = after(record, steps)
    found = partial(
        Finding,
        record["id"],
        record["source"],
        dict(notes.counts),
        {what: dict(kinds) for what, kinds in notes.reported.items()},
        sorted(notes.used),
    )
    if isinstance(now, Fault):
        return found((now.rule, now.text)), b""
    is_changed = now != record
    content = content_hash(now) if is_changed else record["id"].partition("~")[0]
    variant = varied(now, content, instructions)
    said = now if variant is None else variant
    is_reworded = said != now
    may_grow = with_prefixes and _may_grow(now)
    texts = "\n".join(statistics.texts(now)) if similarity else ""
    finding = found(
        changed=is_changed or is_reworded,
        content=content,
        written=content_hash(said) if is_reworded else content,
        begins=[text for text, _ in instructions if begun_with(now, text) is not None],
        varied=variant is not None,
        prefixes=_prefixes(now) if may_grow else "",
        answered=may_grow and bool(replies(now["messages"])),
        near=near.read(texts, similarity).plain() if similarity else (),
        chars=len(texts),
        numbers=list(vars(statistics.numbers(said, template_chars)).values()),
    )
    return finding, _after_id(line(said).encode()) if finding.changed else b""


def after(record: Record, steps: Sequence[Step]) -> Record | Fault:
    for step in steps:
        found = step(record)
        if isinstance(found, Fault):
            return found
        record = found
    return record


def findings(
    source: Path,
    before: known.Lines,
    examine: Examine,
    spool: Path,
    emit: Callable[[dict[str, Any]], None],
) -> Iterator[Finding]:
    """What is found of each line of the file, and an event now and then. `spool` gets two lines for
    each: key and finding, and what is to be written of it, where that had to be found anew.
    """
    total = _lines_of(source)
    with spool.open("wb") as out:
        for done, data in enumerate(known.read(source)):
            if done % 1000 == 0:
                emit({"event": "progress", "done": done, "total": total, "unit": "conversations"})
            key, text = known.key_of(data), b""
            plain = before.found(key)
            if plain is None:
                finding, text = examine(data)
                plain = finding.plain()
            else:
                finding = Finding.of(plain)
            out.write(b"%b %b\n%b" % (key, plain, text or b"\n"))
            yield finding


def decided(
    found: Iterable[Finding], *, drop_repeats: bool, similarity: float | None, tally: Tally
) -> dict[int, Fault]:
    """Adds up the findings; which of them, by their numbers, are dropped because of others."""
    faults: dict[int, Fault] = {}
    first: dict[str, str] = {}
    grown = _Grown()
    alike = _Alike()
    for number, finding in enumerate(found):
        tally.add(finding)
        if finding.fault:
            continue
        id = first.setdefault(finding.content, finding.id)
        if id != finding.id:
            tally.counts["exact_duplicates"] += 1
            if drop_repeats:
                faults[number] = Fault("exact_duplicate", f"it says the same as conversation {id}")
                continue
        if drop_repeats and finding.prefixes:
            grown.add(number, finding)
        if similarity:
            alike.add(number, finding)
    faults.update(grown.faults())
    if similarity:
        faults.update(alike.faults(similarity, faults))
    return faults


class _Grown:
    """What is word for word the beginning of another conversation, as an export made earlier has
    it: each of its windows is one of the longer conversation too.
    """

    def __init__(self) -> None:
        self._prefixes = array("Q")  # of each the hashes of its first message, first two, …
        self._ends = array("Q")
        self._whole: dict[int, int] = {}
        self._places: list[tuple[int, str, str]] = []

    def add(self, number: int, finding: Finding) -> None:
        self._prefixes.frombytes(a2b_base64(finding.prefixes))
        if finding.answered:
            self._whole[self._prefixes[-1]] = len(self._ends)
        self._ends.append(len(self._prefixes))
        self._places.append((number, finding.id, place(finding.source)))

    def faults(self) -> Iterator[tuple[int, Fault]]:
        longest: dict[int, tuple[int, int]] = {}  # shorter → messages of the longest, which it is
        start = 0
        for which, end in enumerate(self._ends):
            for prefix in self._prefixes[start : end - 1]:
                shorter = self._whole.get(prefix)
                if shorter is not None and longest.get(shorter, (0, 0))[0] < end - start:
                    longest[shorter] = (end - start, which)
            start = end
        for shorter, (_, longer) in longest.items():
            _, id, where = self._places[longer]
            text = f"it is the beginning of conversation {id}, which goes on ({where})"
            yield self._places[shorter][0], Fault("grown", text)


class _Alike:
    """All but the longest of each group of near duplicates, of equally long ones the first: the
    last export of a chat that has grown holds what the earlier ones hold.
    """

    def __init__(self) -> None:
        self._found: list[tuple[int, str, int, near.Read]] = []

    def add(self, number: int, finding: Finding) -> None:
        read = near.Read.of(finding.near)
        self._found.append((number, finding.id, finding.chars, read))

    def faults(self, similarity: float, others: Container[int]) -> Iterator[tuple[int, Fault]]:
        """Those that are dropped for other reasons are no reason to drop one."""
        found = [one for one in self._found if one[0] not in others]
        first_of = near.grouped(((id, read) for _, id, _, read in found), similarity)
        longest: dict[str, tuple[int, str]] = {}
        for _, id, chars, _ in found:
            if chars > longest.setdefault(first_of[id], (chars, id))[0]:
                longest[first_of[id]] = (chars, id)
        for number, id, _, _ in found:
            stays = longest[first_of[id]][1]
            if stays != id:
                text = (
                    f"it says almost the same as conversation {stays} (similarity {similarity:g})"
                )
                yield number, Fault("near_duplicate", text)


def write(
    source: Path,
    spool: Path,
    faults: Mapping[int, Fault],
    before: known.Lines,
    examine: Examine,
    output: Path,
    numbers: statistics.Statistics,
    max_copies: int | None,
    tally: Tally,
) -> None:
    """Both files at once; an id is the hash of what is said now, with `~2` for a repeat.

    What has a stretch of text that `max_copies` before it have is dropped here.
    """
    ids = Ids()
    size = 0
    with (
        spool.open("rb", buffering=known.READ_BYTES) as rows,
        (output / "conversations.jsonl").open("wb") as kept,
        (output / "dropped.jsonl").open("wb") as dropped,
    ):
        for number, data in enumerate(known.read(source)):
            key, plain = rows.readline()[:-1].split(b" ", 1)
            text = rows.readline()
            finding = Finding.of(plain)
            fault = Fault(*finding.fault) if finding.fault else faults.get(number)
            if fault is None:
                counted = statistics.Numbers(*finding.numbers)
                fault = _copied(counted, max_copies, numbers)
            if fault:
                tally.counts["dropped"] += 1
                tally.dropped[fault.rule] += 1
                dropped.write(line(_dropped(finding, fault)).encode())
                before.note(key, plain)
                continue
            if not finding.changed:
                made, rest = b"", _after_id(data)
            elif text != b"\n":
                made = rest = text
            else:
                made = rest = before.made(key) or examine(data)[1]
            begin = b'{"id":"%b"' % ids.next(finding.written).encode()
            kept.write(begin)
            kept.write(rest)
            before.note(key, plain, size + len(begin), made)
            size += len(begin) + len(rest)
            tally.counts["kept"] += 1
            tally.counts["changed"] += finding.changed
            if finding.varied:
                tally.counts["varied"] += 1
            tally.unused["instructions"].difference_update(finding.begins)
            numbers.add(counted, partial(json.loads, begin + rest))
    spool.unlink()


def _copied(
    counted: statistics.Numbers, max_copies: int | None, numbers: statistics.Statistics
) -> Fault | None:
    """For a stretch that so many before it have; `numbers` has counted them."""
    for place, digest in counted.stretches:
        if max_copies is not None and numbers.count((place, digest)) >= max_copies:
            text = f"a reply {place} as in {max_copies:,} conversations before it"
            return Fault("template", text)
    return None


def _dropped(finding: Finding, fault: Fault) -> Record:
    return {
        "conversation": finding.id,
        "source": finding.source,
        "rule": fault.rule,
        "text": fault.text,
    }


def _after_id(data: bytes) -> bytes:
    """The line of a conversation without the id, with which all of them begin."""
    return data[data.index(b'"', len(b'{"id":"')) + 1 :]


def _lines_of(path: Path) -> int:
    with path.open("rb") as file:
        return sum(data.count(b"\n") for data in iter(partial(file.read, 1 << 20), b""))


_sorted = json.JSONEncoder(sort_keys=True, check_circular=False)


def _may_grow(record: Record) -> bool:
    return bool(record.get("messages")) and "chosen" not in record and "label" not in record


def _prefixes(record: Record) -> str:
    """A hash for each beginning of the messages, with all that belongs to a message."""
    state = hashlib.blake2b(digest_size=8)
    digests: list[bytes] = []
    for message in record["messages"]:
        state.update(_sorted.encode(message).encode())
        digests.append(state.digest())
    return b2a_base64(b"".join(digests), newline=False).decode()


def varied(
    record: Record, content: str, instructions: Sequence[tuple[str, Sequence[str]]]
) -> Record | None:
    """With another wording of the instruction that it begins with, drawn by its content; None where
    it begins with none.
    """
    found = (with_variant(record, content, text, variants) for text, variants in instructions)
    return next((record for record in found if record is not None), None)


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


def fill(record: Record, replacements: Mapping[str, str], notes: Notes) -> Record | Fault:
    unused = set(replacements)
    change = partial(leftovers.filled, replacements=replacements, unused=unused)
    filled = with_texts(record, change)
    notes.used |= replacements.keys() - unused
    return filled


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


def count_marks(record: Record, notes: Notes) -> Record | Fault:
    """Reports what looks like a control token; tokenize encodes it as text."""
    marks = sum(leftovers.control_marks(text) for text in statistics.texts(record))
    if marks:
        notes.report("control_marks", ["mark"] * marks)
    return record


def protect(record: Record, treatments: Mapping[str, str], notes: Notes) -> Record | Fault:
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
            notes.report(what, mine)
        else:
            redact |= kinds
            notes.counts.update(f"redacted_{kind}" for kind in mine)
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
    notes: Notes,
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
    notes.counts["replies_not_learned"] += len(faulty)
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


def reporting(judge: Judge, drop: bool, notes: Notes) -> Judge:
    """The judge itself, or one that only reports what it finds."""
    if drop:
        return judge

    def reported(text: str, record: Record) -> None:
        if fault := judge(text, record):
            notes.report(fault.rule, fault.found)

    return reported


def rule_fault(text: str, record: Record, rule: rules.Rule, forbidden: bool) -> Fault | None:
    try:
        broken = rules.check(rule, text)
    except TimeoutError:
        where = f"conversation {record['id']} ({place(record['source'])})"
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


def place(source: Mapping[str, Any]) -> str:
    return (
        f"{source['path']} record {source['index']}" if "index" in source else str(source["path"])
    )


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
