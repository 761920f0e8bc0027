"""Near duplicates: texts that say almost the same, found without comparing each with each.

A text is the set of its runs of five words. The share of runs that two texts have in common (their
Jaccard similarity) is estimated from 128 minima of hashes (Broder 1997), so that memory holds no
text; only texts that agree in one band of minima are compared (Leskovec et al., Mining of Massive
Data Sets, 3.4), and each such pair is then measured before the two become one group. So banding can
miss a pair that is just similar enough, but never joins two that are not.

Long bands make a few misses the price of time. Measured with 0.8: of the pairs that share 80 % of
their runs and measure as near 99 % are joined, of those that share 85 % 99.7 %, of those that share
90 % all. Texts that share a template and are just not near all meet, and each pair of them that
meets is compared; 20,000 that share 70 % take half a minute at most, 20,000 others three seconds.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from array import array
from binascii import a2b_base64, b2a_base64
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

RUN = 5
"""Words in a run."""
MINIMA = 128
_SEED = 20_177  # of the hash functions; another one would give other estimates, so it stays
_CHARS_AT_ONCE = 100_000
_WORDS_AT_ONCE = 20_000
_RECALL = 0.94
_CROWD = 16
"""Texts in one bucket from which on marks are worth making."""

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
    return grouped(((id, read(text, similarity)) for id, text in texts), similarity)


@dataclass(frozen=True)
class Read:
    """What has to be known of a text: a hash of its words, and where near ones are looked for a
    MinHash of its runs of words.
    """

    digest: bytes
    signature: Any = None

    def plain(self) -> list[str]:
        """As JSON can hold it; for the same version of rensa."""
        parts = [self.digest]
        if self.signature is not None:
            parts.append(self.signature.__getstate__())
        return [b2a_base64(part, newline=False).decode() for part in parts]

    @staticmethod
    def of(plain: Sequence[str]) -> Read:
        digest, *state = map(a2b_base64, plain)
        signature = None
        if state:
            signature = _empty_signature()
            signature.__setstate__(state[0])
        return Read(digest, signature)


def read(text: str, similarity: float) -> Read:
    """What has to be known of a text to find others that are as similar."""
    return Read(*_read(text, signed=similarity < 1))


def grouped(texts: Iterable[tuple[str, Read]], similarity: float) -> dict[str, str]:
    """As `components`, of texts that have been read."""
    ids: list[str] = []
    alike: dict[bytes, int] = {}
    joined = Joined()
    found: list[Any] = []  # a signature of each distinct text, and which text has it
    owners: list[int] = []
    for number, (id, text) in enumerate(texts):
        ids.append(id)
        first = alike.setdefault(text.digest, number)
        joined.join(number, first)
        if first == number and text.signature is not None:
            found.append(text.signature)
            owners.append(number)
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
    crowds = (crowd for band in range(bands) for crowd in _buckets(keys[band::bands], _CROWD))
    marks = _marks(sorted(set().union(*crowds)), signatures)
    least = math.ceil(similarity * MINIMA)
    joined = Joined()
    for band in range(bands):
        for bucket in _buckets(keys[band::bands], 2):
            if len(bucket) < _CROWD:
                yield from _near_in(bucket, signatures, similarity, joined, {})
                continue
            rich = [number for number in bucket if marks[number].bit_count() >= least]
            yield from _near_in(rich, signatures, similarity, joined, marks)


def _buckets(keys: Iterable[int], size: int) -> Iterator[list[int]]:
    """The indices of equal keys, where there are at least `size`."""
    found: dict[int, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        found[key].append(number)
    return (bucket for bucket in found.values() if len(bucket) >= size)


def _near_in(
    bucket: Iterable[int],
    signatures: Sequence[Any],
    similarity: float,
    joined: Joined,
    marks: Mapping[int, int],
) -> Iterator[tuple[int, int]]:
    """Near pairs of one bucket. What is in one group already is not compared again, so that ten
    thousand copies of a template cost ten thousand comparisons and not their square. Where there
    are marks, only those that they leave possible are compared.
    """
    least = math.ceil(similarity * MINIMA)
    groups: dict[int, list[int]] = defaultdict(list)
    for number in bucket:
        groups[joined.first(number)].append(number)
    group_of = {number: group for group in groups.values() for number in group}
    apart = list(group_of)
    while apart:
        waiting = list(group_of[apart.pop()])
        reached = set(waiting)
        if len(waiting) > 1:
            apart = [number for number in apart if number not in reached]
        while waiting and apart:
            one = waiting.pop()
            alike = signatures[one].jaccard
            likely = apart
            if marks:
                mark = marks[one]
                likely = [n for n in apart if (mark & marks[n]).bit_count() >= least]
            before = len(reached)
            for other in likely:
                if other not in reached and alike(signatures[other]) >= similarity:
                    joined.join(one, other)
                    yield one, other
                    reached.update(group_of[other])
                    waiting += group_of[other]
            if len(reached) > before:
                apart = [number for number in apart if number not in reached]


def _marks(numbers: Sequence[int], signatures: Sequence[Any]) -> dict[int, int]:
    """For each of these texts bits by which to bound what two have in common: of `x & y`, at least
    as many are set as x and y have minima in common.

    Of the two bits of a minimum one is set, by its value; none where no other text has this value.
    """
    minima = array("I")
    for number in numbers:
        minima.extend(signatures[number].digest())
    width = MINIMA // 4  # bytes of a mark; each holds four minima
    bits = bytearray(width * len(numbers))
    for place in range(width):
        columns = (_bits(minima[place + n * width :: MINIMA], 2 * n) for n in range(4))
        bits[place::width] = bytes(map(sum, zip(*columns, strict=True)))
    return {
        number: int.from_bytes(bits[n * width : (n + 1) * width])
        for n, number in enumerate(numbers)
    }


def _bits(values: Sequence[int], shift: int) -> list[int]:
    counts = Counter(values)
    return [(1 << shift + value % 2) if counts[value] > 1 else 0 for value in values]


def _bands(similarity: float) -> tuple[int, int]:
    """(minima in a band, bands): the longest bands by which two texts that are just similar enough
    still meet in `_RECALL` of all cases, 1 − (1 − sʳ)ᵇ.
    """
    for rows in range(MINIMA // 4, 1, -1):
        bands = MINIMA // rows
        if 1 - (1 - similarity**rows) ** bands >= _RECALL:
            return rows, bands
    return 1, MINIMA


def _read(text: str, *, signed: bool = True) -> tuple[bytes, Any]:
    """A hash of the text's words, and if `signed` a MinHash of its runs.

    A text is padded, so that a short one has runs as well, and differs in most of them from another
    short one that is not the same.
    """
    ends = [""] * (RUN - 1)
    digest = hashlib.blake2b(digest_size=16)
    signature = _empty_signature() if signed else None
    words = ends
    for piece in chain(_words(text), [ends]):
        digest.update(" ".join(["", *piece]).encode())
        if signature is None:
            continue
        words = [*words, *piece]
        runs = zip(*(words[n:] for n in range(RUN)), strict=False)
        signature.update(list(map(" ".join, runs)))
        words = words[1 - RUN :]
    return digest.digest(), signature


def _empty_signature() -> Any:
    from rensa import RMinHash  # type: ignore[import-untyped,unused-ignore]

    return RMinHash(MINIMA, _SEED)


def _words(text: str) -> Iterator[list[str]]:
    """The words, in pieces, so that those of a long text are never all in memory."""
    plain = unicodedata.normalize("NFC", text).casefold()
    if len(plain) <= _CHARS_AT_ONCE:
        yield _WORD.findall(plain) or plain.encode(errors="replace").decode().split()
        return
    found = (word[0] for word in _WORD.finditer(plain))
    if not (piece := list(islice(found, _WORDS_AT_ONCE))):
        piece = plain.encode(errors="replace").decode().split()
    while piece:
        yield piece
        piece = list(islice(found, _WORDS_AT_ONCE))
