"""What `runner gc` found, for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runner.engine import words
from runner.engine.gc import Found, Why

KEPT: dict[Why, str] = {
    "needed": "named by a lockfile or a link",
    "young": "made or used in the last two weeks",
    "trained": "trained models: name one by its hash to let it go",
    "unknown": "of unknown origin: name one by its hash to let it go",
}


def record(found: Sequence[Found], *, deleted: bool) -> dict[str, Any]:
    return {
        "deleted": deleted,
        "bytes": sum(one.bytes for one in found if one.goes),
        "found": [
            {"path": str(one.path), "what": one.what, "bytes": one.bytes, "why": one.why}
            for one in found
        ],
    }


def text(found: Sequence[Found], *, deleted: bool) -> str:
    """What goes, one a line with its size; what stays, as sums."""
    lines = [f"{words.size(one.bytes):>9}  {one.what}" for one in found if one.goes]
    total = words.size(sum(one.bytes for one in found if one.goes))
    for why, reason in KEPT.items():
        stays = [one for one in found if one.why == why]
        if stays:
            lines.append(f"{words.size(sum(s.bytes for s in stays)):>9}  stays: {reason}")
        if why in ("trained", "unknown"):
            lines += [f"{words.size(one.bytes):>13}  {one.what}" for one in stays]
    if deleted:
        lines.append(f"deleted {total}")
    elif any(one.goes for one in found):
        lines.append(f"{total} may go; `runner gc --delete` deletes it")
    else:
        lines.append("nothing to delete")
    return "\n".join(map(words.escaped, lines))
