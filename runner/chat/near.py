"""Near duplicates: texts that say almost the same, found without comparing each with each.

A text is the set of its runs of five words. The share of runs that two texts have in common (their
Jaccard similarity) is estimated from 128 minima of hashes (Broder 1997), so that memory holds no
text; only texts that agree in one band of minima are compared (Leskovec et al., Mining of Massive
Data Sets, 3.4), and each such pair is then measured before the two become one group. So banding can
miss a pair in a hundred that are just similar enough, but never joins two that are not.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

RUN = 5
"""Words in a run."""
MINIMA = 128
_SEED = 20_177  # of the hash functions; another one would give other estimates, so it stays
_BATCH = 1000
_RECALL = 0.99

# Scripts without spaces between words: each character is a word of its own.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
# Signs that mean something alone: + = < > and the like, arrows, pictures.
_SIGNS = r"$+<=>^|~\u2190-\u2bff\U0001f000-\U0001faff"
_WORD = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}{_SIGNS}]")


def components(texts: Iterable[tuple[str, str]], similarity: float) -> dict[str, str]:
    """id → the first id (in the given order) of its group of near duplicates; alone: itself.

    `texts` are (id, text). Two texts are near when they share at least `similarity` of their runs
    of words; a group holds what is near to one of it. With 1 only the same words in the same order
    are one group. Case, white space and punctuation do not count. The groups do not depend on the
    order, and a further text can join groups but never parts one.
    """
    ids: list[str] = []
    alike: dict[Hashable, int] = {}
    joined = Joined()
    found: list[Any] = []  # a signature of each distinct text, and which text has it
    owners: list[int] = []
    for batch in _batches(texts):
        words = [_words(text) for _, text in batch]
        signatures = _signatures(words) if similarity < 1 else [None] * len(batch)
        for (id, _), said, signature in zip(batch, words, signatures, strict=True):
            number = len(ids)
            ids.append(id)
            first = alike.setdefault(_digest(said), number)
            joined.join(number, first)
            if first == number:
                found.append(signature)
                owners.append(number)
    if similarity < 1:
        for one, other in _near(found, similarity):
            joined.join(owners[one], owners[other])
    return {id: ids[joined.first(number)] for number, id in enumerate(ids)}


class Joined:
    """Numbers from 0 in groups that can be joined (union-find); a group is known by its lowest."""

    def __init__(self) -> None:
        self._above: list[int] = []

    def first(self, number: int) -> int:
        """The lowest number of its group."""
        above = self._above
        above.extend(range(len(above), number + 1))
        while above[number] != number:
            above[number] = above[above[number]]
            number = above[number]
        return number

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        self._above[high] = low


def _near(signatures: Sequence[Any], similarity: float) -> Iterator[tuple[int, int]]:
    """Pairs of indices that are near; enough of them to connect each group."""
    rows, bands = _bands(similarity)
    keys = array("q")  # of each text the hashes of its bands, so that each digest is read once
    for signature in signatures:
        digest = signature.digest()
        keys.extend(hash(tuple(digest[n * rows : (n + 1) * rows])) for n in range(bands))
    joined = Joined()
    for band in range(bands):
        buckets: dict[int, list[int]] = defaultdict(list)
        for number, key in enumerate(keys[band::bands]):
            buckets[key].append(number)
        for bucket in buckets.values():
            if len(bucket) > 1:
                yield from _near_in(bucket, signatures, similarity, joined)


def _near_in(
    bucket: Sequence[int], signatures: Sequence[Any], similarity: float, joined: Joined
) -> Iterator[tuple[int, int]]:
    """Near pairs of one bucket. What is in one group already is not compared again, so that ten
    thousand copies of a template cost ten thousand comparisons and not their square.
    """
    groups: dict[int, list[int]] = {}
    for number in bucket:
        groups.setdefault(joined.first(number), []).append(number)
    parts: list[list[int]] = []
    for part in groups.values():
        apart = []
        for other in parts:
            pair = _first_near(part, other, signatures, similarity)
            if pair is None:
                apart.append(other)
                continue
            joined.join(*pair)
            yield pair
            part = other + part
        parts = [*apart, part]


def _first_near(
    some: Sequence[int], others: Sequence[int], signatures: Sequence[Any], similarity: float
) -> tuple[int, int] | None:
    for one in some:
        alike = signatures[one].jaccard
        for other in others:
            if alike(signatures[other]) >= similarity:
                return one, other
    return None


def _bands(similarity: float) -> tuple[int, int]:
    """(minima in a band, bands): the longest bands by which two texts that are just similar enough
    still meet in `_RECALL` of all cases, 1 − (1 − sʳ)ᵇ.
    """
    for rows in range(MINIMA // 4, 1, -1):
        bands = MINIMA // rows
        if 1 - (1 - similarity**rows) ** bands >= _RECALL:
            return rows, bands
    return 1, MINIMA


def _signatures(texts: list[list[str]]) -> list[Any]:
    """A MinHash of each text's runs. Texts are padded, so that a short one has runs as well, and
    differs in most of them from another short one that is not the same.
    """
    from rensa import RMinHash  # type: ignore[import-untyped,unused-ignore]

    ends = [""] * (RUN - 1)
    runs: list[list[str]] = []
    for words in texts:
        padded = [*ends, *words, *ends]
        runs.append(list(map(" ".join, zip(*(padded[n:] for n in range(RUN)), strict=False))))
    found: list[Any] = RMinHash.from_token_sets(runs, MINIMA, _SEED)
    return found


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFC", text).casefold()
    return _WORD.findall(plain) or plain.encode(errors="replace").decode().split()


def _digest(words: list[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    items = iter(texts)
    while batch := list(islice(items, _BATCH)):
        yield batch
