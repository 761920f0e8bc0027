"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping


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
