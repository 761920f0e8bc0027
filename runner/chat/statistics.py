"""What a set of conversations holds, in numbers and in the words of those who trained before."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from runner.chat.conversation import replies
from runner.chat.languages import scripts
from runner.chat.personal_data import PERSONAL, SECRETS, redacted

CHARS_PER_TOKEN = {"Latin": 4.0, "Cyrillic": 2.7, "Han": 1.5, "Kana": 1.5, "Hangul": 1.5}
"""About, for tokenizers with a large vocabulary; other scripts as `OTHER_CHARS_PER_TOKEN`."""
OTHER_CHARS_PER_TOKEN = 2.5
TEMPLATE_COPIES_MIN = 5
"""Fewer conversations with the same beginning are chance."""

Stretch = tuple[str, bytes]
"""`begins` or `ends`, and a hash of the text there."""


class Statistics:
    """Adds up conversations one by one; holds hashes of their texts, never the texts."""

    def __init__(self, template_chars: int) -> None:
        self._template_chars = template_chars
        self._counts: Counter[str] = Counter()
        self._letters: Counter[str] = Counter()
        self._stretches: Counter[Stretch] = Counter()
        self._quotes: dict[Stretch, str] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        learned = list(learned_texts(record))
        said = list(texts(record))
        self._counts["conversations"] += 1
        self._counts["documents"] += "text" in record
        self._counts["preferences"] += "chosen" in record or "label" in record
        self._counts["turns"] += len(record.get("messages", ()))
        judged = "text" in record or "chosen" in record or "label" in record
        self._counts["replies"] += 0 if judged else len(learned)
        self._counts["characters"] += sum(map(len, said))
        for text in said:
            self._letters.update(scripts(text))
        for stretch, text in stretches(learned, self._template_chars).items():
            self._stretches[stretch] += 1
            if self._stretches[stretch] == TEMPLATE_COPIES_MIN:
                self._quotes[stretch] = _quoted(text, stretch[0], self._template_chars)

    def count(self, stretch: Stretch) -> int:
        """How many of the added conversations have this stretch."""
        return self._stretches[stretch]

    def templates(self, share: float) -> list[tuple[str, str, int]]:
        """(`begins` or `ends`, the stretch, conversations), where more than `share` of all have it.

        The most frequent come first; of those that overlap by half, only the first is named.
        """
        least = share * self._counts["conversations"]
        found: list[tuple[str, str, int]] = []
        run = max(1, self._template_chars // 2)
        named: set[str] = set()
        for stretch, count in sorted(self._stretches.items(), key=lambda s: (-s[1], s[0])):
            if count >= TEMPLATE_COPIES_MIN and count > least:
                text = self._quotes[stretch]
                runs = {text[at : at + run] for at in range(max(1, len(text) - run + 1))}
                if named.isdisjoint(runs):
                    found.append((stretch[0], text, count))
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


def texts(record: Mapping[str, Any]) -> Iterator[str]:
    """All that a conversation, a preference or a document says."""
    if "text" in record:
        yield record["text"]
    for part in ("messages", "chosen", "rejected"):
        for message in record.get(part, ()):
            yield message["content"]
            if "thinking" in message:
                yield message["thinking"]


def learned_texts(record: Mapping[str, Any]) -> Iterator[str]:
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
                digest = hashlib.blake2b(part.encode(), digest_size=8).digest()
                found[place, digest] = text
    return found


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
