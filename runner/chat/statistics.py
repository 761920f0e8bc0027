"""What a set of conversations holds, in numbers and in the words of those who trained before."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.chat.conversation import replies
from runner.chat.languages import scripts
from runner.chat.personal_data import PERSONAL, SECRETS, redacted

CHARS_PER_TOKEN = {"Latin": 4.0, "Cyrillic": 2.7, "Han": 1.5, "Kana": 1.5, "Hangul": 1.5}
"""About, for tokenizers with a large vocabulary; other scripts as `OTHER_CHARS_PER_TOKEN`."""
OTHER_CHARS_PER_TOKEN = 2.5
TEMPLATE_COPIES_MIN = 5
"""Fewer conversations with the same beginning are chance."""

Stretch = tuple[str, str]
"""`begins` or `ends`, and a hash of the text there."""
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Numbers:
    """What is counted of one conversation."""

    counts: Mapping[str, int]
    letters: Mapping[str, int]
    """Of each script."""
    stretches: Sequence[Stretch]


def numbers(record: Record, template_chars: int) -> Numbers:
    said = list(texts(record))
    learned = list(learned_texts(record))
    judged = "text" in record or "chosen" in record or "label" in record
    letters: Counter[str] = Counter()
    for text in said:
        letters.update(_scripts(text))
    return Numbers(
        {
            "conversations": 1,
            "documents": int("text" in record),
            "preferences": int("chosen" in record or "label" in record),
            "turns": len(record.get("messages", ())),
            "replies": 0 if judged else len(learned),
            "characters": sum(map(len, said)),
        },
        letters,
        list(stretches(learned, template_chars)),
    )


class Statistics:
    """Adds up conversations one by one; holds hashes of their texts, never the texts."""

    def __init__(self, template_chars: int) -> None:
        self._template_chars = template_chars
        self._counts: Counter[str] = Counter()
        self._letters: Counter[str] = Counter()
        self._stretches: Counter[Stretch] = Counter()
        self._quotes: dict[Stretch, str] = {}

    def add(self, one: Numbers, record: Callable[[], Record]) -> None:
        """`record` gives the conversation itself, and is asked only for words to quote."""
        _add(self._counts, one.counts)
        _add(self._letters, one.letters)
        for place, digest in one.stretches:
            self._stretches[place, digest] += 1
            if self._stretches[place, digest] == TEMPLATE_COPIES_MIN:
                learned = list(learned_texts(record()))
                text = stretches(learned, self._template_chars)[place, digest]
                self._quotes[place, digest] = _quoted(text, place, self._template_chars)

    def count(self, stretch: Stretch) -> int:
        """How many of the added conversations have this stretch."""
        return self._stretches[stretch]

    def templates(self, share: float) -> list[tuple[str, str, int]]:
        """(`begins` or `ends`, the stretch, conversations), where more than `share` of all have it.

        The most frequent come first; of those that overlap by half, only the first is named.
        """
        least = max(TEMPLATE_COPIES_MIN - 1, share * self._counts["conversations"])
        frequent = [
            (-count, stretch) for stretch, count in self._stretches.items() if count > least
        ]
        found: list[tuple[str, str, int]] = []
        run = max(1, self._template_chars // 2)
        named: set[str] = set()
        for count, stretch in sorted(frequent):
            text = self._quotes[stretch]
            runs = {text[at : at + run] for at in range(max(1, len(text) - run + 1))}
            if named.isdisjoint(runs):
                found.append((stretch[0], text, -count))
            named |= runs
        return found

    def summary(self) -> dict[str, Any]:
        """The numbers, with the share of each script among all letters."""
        names = "conversations documents preferences turns replies characters"
        letters = max(1, self._letters.total())
        return {
            **{name: self._counts[name] for name in names.split(" ")},
            "estimated_tokens": estimated_tokens(self._counts["characters"], self._letters),
            "scripts": {
                name: round(count / letters, 4)
                for name, count in sorted(self._letters.items(), key=lambda s: (-s[1], s[0]))
            },
        }


def texts(record: Record) -> Iterator[str]:
    """All that a conversation, a preference or a document says."""
    if "text" in record:
        yield record["text"]
    for part in ("messages", "chosen", "rejected"):
        for message in record.get(part, ()):
            yield message["content"]
            if "thinking" in message:
                yield message["thinking"]


def learned_texts(record: Record) -> Iterator[str]:
    """The replies that are learned: of a preference the better one, of a document all of it."""
    if "text" in record:
        yield record["text"]
    elif "chosen" in record:
        yield from (m["content"] for m in record["chosen"] if m["role"] == "assistant")
    elif "messages" in record and record.get("label") is not False:
        yield from (
            record["messages"][reply]["content"] for _, reply in replies(record["messages"])
        )


def stretches(learned: list[str], chars: int) -> dict[Stretch, str]:
    """The beginning and the end of each text that is longer than `chars`, each once; its text."""
    found = {}
    for text in learned:
        if len(text) > chars:
            for place, part in (("begins", text[:chars]), ("ends", text[-chars:])):
                digest = hashlib.blake2b(part.encode(), digest_size=8).hexdigest()
                found[place, digest] = text
    return found


def _scripts(text: str) -> Mapping[str, int]:
    """As `languages.scripts`; of plain English text, which is quicker, too."""
    if not text.isascii():
        return scripts(text)
    letters = len(text.encode().translate(None, _NO_LETTERS))
    return {"Latin": letters} if letters else {}


_NO_LETTERS = bytes(byte for byte in range(128) if not chr(byte).isalpha())


def _add(sums: Counter[str], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        sums[name] += count


def _quoted(text: str, place: str, chars: int) -> str:
    """A stretch to show, cut after secrets are written over, since half a key is no longer one."""
    shown = redacted(text, SECRETS | PERSONAL)
    return shown[:chars] if place == "begins" else shown[-chars:]


def estimated_tokens(characters: int, letters: Mapping[str, int]) -> int:
    """About how many tokens a large vocabulary needs; other characters count as the letters do."""
    if not letters:
        return round(characters / CHARS_PER_TOKEN["Latin"])
    tokens = sum(
        count / CHARS_PER_TOKEN.get(name, OTHER_CHARS_PER_TOKEN) for name, count in letters.items()
    )
    return round(tokens * characters / sum(letters.values()))


def verdict(replies: int, preferences: int = 0, documents: int = 0) -> str:
    """What experience says of so many replies; what makes no windows is counted by itself."""
    beside = " and ".join(
        f"{count:,} {what if count > 1 else what[:-1]}"
        for count, what in ((preferences, "preferences"), (documents, "documents"))
        if count
    )
    make = "makes" if preferences + documents == 1 else "make"
    if beside and not replies:
        return f"no replies to learn from, but {beside}, which {make} no windows"
    found = f"{replies:,} {'replies' if replies != 1 else 'reply'} to learn from"
    if beside:
        found += f" (and {beside}, which {make} no windows)"
    if replies < 1000:
        return (
            f"{found}: 1,000 are advised at least, 3,000 to 5,000 are good, 10,000 and more best; "
            "train 3 to 5 epochs, and with so little watch that the eval loss keeps falling"
        )
    if replies < 3000:
        return (
            f"{found}: enough to begin with; 3,000 to 5,000 are good, 10,000 and more best; "
            "train 3 to 5 epochs"
        )
    if replies < 10_000:
        return f"{found}: a good number; 10,000 and more are best; train 3 to 5 epochs"
    return f"{found}: as many as can be wished for; 3 epochs are often enough, 5 the most"
