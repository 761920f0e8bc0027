"""Rules that a text keeps or breaks, as a recipe states them: to clean data, to judge replies."""

from __future__ import annotations

from collections.abc import Sequence

import regex

from runner.errors import RunnerError

TIMEOUT_S = 1.0
"""For one rule on one text; a pattern that needs longer is a mistake in the pattern."""


def compiled(pattern: str) -> regex.Pattern[str]:
    """The pattern, ^ and $ at line ends; `regex.error` when it is none."""
    return regex.compile(pattern, flags=regex.MULTILINE)


def keeps(text: str, pattern: str) -> bool:
    """Whether the pattern is found in the text; `TimeoutError` when that cannot be decided soon."""
    return compiled(pattern).search(text, timeout=TIMEOUT_S) is not None


def share(texts: Sequence[str], pattern: str) -> float:
    """The share of the texts in which the pattern is found; 0 of none. Raises on a slow one."""
    try:
        return sum(keeps(text, pattern) for text in texts) / max(1, len(texts))
    except TimeoutError:
        raise RunnerError(
            f"the pattern {pattern!r} needs more than {TIMEOUT_S:g} s for one text",
            hint="write it without a repetition inside a repetition, like (a+)+",
        ) from None
