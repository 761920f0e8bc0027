"""Rules that a text keeps or breaks, as a recipe states them: to clean data, to judge replies.

Patterns are the user's own, so they are bounded three ways: a pattern that would need much memory
to compile is refused, a text is searched for `TIMEOUT_S` at most, and in its first `MAX_CHARS`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import regex

from runner.errors import RunnerError

TIMEOUT_S = 1.0
"""For one rule on one text; a pattern that needs longer is a mistake in the pattern."""
MAX_CHARS = 1_000_000
"""So much of a text is searched by a pattern; a longer one is judged by its beginning."""
MAX_UNROLLED = 20_000
"""Items that counted repetitions may unroll to: a{1000} is 1000, (a{1000}){1000} a million."""

Unlimited = Literal["unlimited"]


@dataclass(frozen=True)
class Rule:
    """What a text must show; all that is set must hold."""

    name: str
    pattern: str = ""
    min_count: int = 1
    """How often the pattern must be found at least."""
    max_count: int | Unlimited = "unlimited"
    sections: tuple[str, ...] = ()
    """Headings or phrases that must all be there, as whole words, in any letter case."""
    in_order: bool = False
    """Whether the sections must stand in the given order."""
    min_chars: int = 0
    max_chars: int | Unlimited = "unlimited"


class UnusablePatternError(ValueError):
    """A pattern that cannot be used; the message says why, to follow the setting's name."""


def check(rule: Rule, text: str) -> str:
    """Why `text` breaks the rule, as the end of a sentence; empty when it keeps it.

    `TimeoutError` when the pattern cannot decide soon. Nothing of the text itself is quoted.
    """
    return (
        _length_fault(rule, len(text.strip()))
        or _section_fault(rule, text)
        or _count_fault(rule, text)
    )


def compiled(pattern: str) -> regex.Pattern[str]:
    """The pattern, ^ and $ at line ends; `regex.error` when it is none."""
    return regex.compile(pattern, flags=regex.MULTILINE)


def refuse_unsafe(pattern: str) -> None:
    """Raises `UnusablePatternError` for what is no pattern, or one that needs too much memory."""
    if _unrolled(pattern) > MAX_UNROLLED:
        raise UnusablePatternError(
            f"repeats too much: its counted repetitions give more than {MAX_UNROLLED:,} items; "
            "write * or + instead of a large {count}"
        )
    if _CALLS_ITSELF.search(pattern):
        raise UnusablePatternError("calls itself with (?R), (?1) or (?&name), which is not allowed")
    try:
        compiled(pattern)
    except RecursionError:
        raise UnusablePatternError("has too many groups inside one another") from None
    except regex.error as error:
        raise UnusablePatternError(f"is not a regular expression: {error}") from error


def keeps(text: str, pattern: str) -> bool:
    """Whether the pattern is found in the text; `TimeoutError` when that cannot be decided soon."""
    return compiled(pattern).search(text[:MAX_CHARS], timeout=TIMEOUT_S) is not None


def share(texts: Sequence[str], rule: Rule | str) -> float:
    """The share of the texts that keep the rule, or show the pattern; 0 of none.

    Raises on a slow pattern.
    """
    wanted = Rule(rule, pattern=rule) if isinstance(rule, str) else rule
    try:
        return sum(not check(wanted, text) for text in texts) / max(1, len(texts))
    except TimeoutError:
        raise too_slow(wanted, "one text") from None


def too_slow(rule: Rule, where: str) -> RunnerError:
    """The error for a pattern that ran out of time; `where` names the text."""
    named = "" if rule.name == rule.pattern else f"the rule {rule.name!r}: "
    return RunnerError(
        f"{named}the pattern {rule.pattern!r} needs more than {TIMEOUT_S:g} s for {where}",
        hint="write it without a repetition inside a repetition, like (a+)+",
    )


def _length_fault(rule: Rule, chars: int) -> str:
    if chars < rule.min_chars:
        return f"it has {chars:,} characters, fewer than {rule.min_chars:,}"
    if rule.max_chars != "unlimited" and chars > rule.max_chars:
        return f"it has {chars:,} characters, more than {rule.max_chars:,}"
    return ""


def _count_fault(rule: Rule, text: str) -> str:
    if not rule.pattern:
        return ""
    if rule.min_count == 1 and rule.max_count == "unlimited":
        return "" if keeps(text, rule.pattern) else "its pattern is not found"
    enough = rule.min_count if rule.max_count == "unlimited" else rule.max_count + 1
    count = _count(compiled(rule.pattern), text[:MAX_CHARS], enough)
    if count < rule.min_count:
        return f"its pattern is found {count} times, fewer than {rule.min_count}"
    if rule.max_count != "unlimited" and count > rule.max_count:
        return f"its pattern is found more than {rule.max_count} times"
    return ""


def _count(pattern: regex.Pattern[str], text: str, enough: int) -> int:
    """How often the pattern is found, counted up to `enough`, within the time of one text."""
    ends = time.monotonic() + TIMEOUT_S
    count = 0
    for _ in pattern.finditer(text, timeout=TIMEOUT_S) if enough else ():
        count += 1
        if count >= enough:
            break
        if time.monotonic() > ends:
            raise TimeoutError
    return count


def _section_fault(rule: Rule, text: str) -> str:
    folded = _folded(text) if rule.sections else ""
    position = 0
    for section in rule.sections:
        found = _section(section).search(folded, position)
        if found is None:
            elsewhere = position and _section(section).search(folded)
            before = " after the sections before it" if elsewhere else ""
            return f"it has no section {section!r}{before}"
        if rule.in_order:
            position = found.end()
    return ""


@functools.lru_cache(maxsize=1000)
def _section(section: str) -> regex.Pattern[str]:
    """The heading as whole words in a folded text."""
    words = _folded(section)
    start = r"(?<!\w)" if words[:1].isalnum() else ""
    end = r"(?!\w)" if words[-1:].isalnum() else ""
    return regex.compile(start + regex.escape(words, literal_spaces=True) + end)


def _folded(text: str) -> str:
    """Without letter case, ё as е, one space for white space, `у с т а н о в и л :` as one word."""
    text = _LETTER_SPACED.sub(lambda found: "".join(found[0].split()), text.casefold())
    return " ".join(text.replace("ё", "е").split())


_LETTER_SPACED = regex.compile(r"(?<!\w)[^\W\d_](?:[ \t\u00a0][^\W\d_]){3,}(?!\w)(?:[ \t\u00a0]:)?")
_CALLS_ITSELF = regex.compile(r"(?<!\\)\((?:\?(?:R|[+-]?\d+|&\w+|P>\w+)\))")
_COUNTED = regex.compile(r"\{(\d*)(?:(,)(\d*))?\}")


def _unrolled(pattern: str) -> int:
    """About how many items the pattern has when its counted repetitions are written out."""
    open_groups: list[int] = []
    total = last = position = 0
    while position < len(pattern):
        letter = pattern[position]
        counted = _COUNTED.match(pattern, position) if letter == "{" else None
        if counted:
            numbers = [int(number[:9]) for number in (counted[1], counted[3]) if number]
            total += last * (max(numbers, default=1) - 1)
            last *= max(numbers, default=1)
            position = counted.end()
            continue
        if letter == "(":
            open_groups.append(total)
            total = last = 0
        elif letter == ")" and open_groups:
            last = max(1, total)
            total = open_groups.pop() + last
        else:
            total += (last := 1)
        position += 2 if letter == "\\" else 1
    return total
