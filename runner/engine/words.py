"""What a message says of values: words of users made safe to print, numbers as people read them."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping

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


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3:05`, `2:14:09`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes in decimal units: `812 B`, `3.4 MB`, `1.2 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def metrics(values: Mapping[str, float | int | str]) -> str:
    """`files 12, conversations 340`; sizes in units, and nothing of what there is none of."""
    return ", ".join(_metric(name, value) for name, value in values.items() if value != 0)


def _metric(name: str, value: float | int | str) -> str:
    if name.endswith("_bytes") and not isinstance(value, str):
        return f"{name.removesuffix('_bytes')} {size(value)}"
    words = name.replace("_", " ")
    if isinstance(value, str):
        return f"{words} {value}"
    return f"{words} {value:,}" if isinstance(value, int) else f"{words} {value:,.4g}"


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
