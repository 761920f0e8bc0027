"""What a message quotes: the user's words made safe to print, and what they may have meant."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

SHOWN_MAX = 60
"""Characters of a value that a message shows."""


def shown(value: object) -> str:
    """`value` as a message quotes it: one line, nothing a terminal obeys, at most 60 characters."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, str):
        return _shown_text(value)
    text = escaped(_SHORT.repr(value))
    return text if len(text) <= SHOWN_MAX else text[: SHOWN_MAX - 1] + "…"


def escaped(text: str) -> str:
    """`text` with control, bidirectional and invisible characters written as \\x1b or \\u202e."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that names the nearest known word, or nothing when none is near."""
    by_folded = {k.casefold(): k for k in known}
    near = difflib.get_close_matches(word[:SHOWN_MAX].casefold(), by_folded, n=1)
    return f"; did you mean {shown(by_folded[near[0]])}?" if near else ""


def _shown_text(text: str) -> str:
    quoted = repr(text[:SHOWN_MAX])
    if len(text) <= SHOWN_MAX and len(quoted) <= SHOWN_MAX:
        return quoted
    kept = SHOWN_MAX - 3
    while len(quoted := repr(text[:kept])) >= SHOWN_MAX:
        kept -= 1
    return quoted + "…"


class _Short(reprlib.Repr):
    """Bounded work on values of any size or depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = SHOWN_MAX

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write integers of more than 4,300 digits.
        return repr(value) if value.bit_length() <= 256 else f"<{value.bit_length()}-bit integer>"


_SHORT = _Short()
