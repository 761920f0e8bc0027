"""Spaces, line ends and invisible characters of a text in one plain form; its words stay."""

from __future__ import annotations

import re
import unicodedata

import regex

BLANK_LINES_MAX = 2
"""More blank lines than this become one, except in code blocks."""


def normalised(text: str) -> str:
    """The text in NFC, with plain spaces and line ends, and without what cannot be seen.

    Joiners stay where they show: in emoji, and between letters of scripts that need them. The
    ideographic space and marks of direction stay too: they belong to how a text is set.
    """
    if _ODD.search(text):
        text = _LINE_ENDS.sub("\n", text)
        text = _SPACES.sub(" ", text)
        text = _INVISIBLE.sub("", text)
        text = _JOINERS.sub("", text)
    return _tidied_lines(unicodedata.normalize("NFC", text))


_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
_ODD = re.compile(
    "[\r\x0b\x0c\x85\u00a0\u00ad\u1680\u2000-\u200d\u2028\u2029\u202f\u205f\u2060\ufeff]"
)

_NEEDS_JOINERS = (
    r"\p{Arabic}\p{Syriac}\p{Nko}\p{Mongolian}\p{Devanagari}\p{Bengali}\p{Gurmukhi}\p{Gujarati}"
    r"\p{Oriya}\p{Tamil}\p{Telugu}\p{Kannada}\p{Malayalam}\p{Sinhala}\p{Khmer}\p{Myanmar}"
    r"\p{Tibetan}\p{Thai}\p{Lao}"
)
_JOINERS = regex.compile(
    rf"(?<![{_NEEDS_JOINERS}])(?:\u200c"
    r"|(?<![\p{Extended_Pictographic}\p{Emoji_Modifier}\ufe0f])\u200d"
    r"|\u200d(?!\p{Extended_Pictographic}))"
)
_FENCE = re.compile(r" {0,3}(```+|~~~+)")


def _tidied_lines(text: str) -> str:
    """No white space at line ends, no blank lines around the text, few in a row inside it."""
    lines: list[str] = []
    blank = 0
    fence = ""
    for line in text.split("\n"):
        line = line.rstrip(" \t")
        if not line:
            blank += 1
            continue
        if lines:
            lines.extend([""] * (blank if fence or blank <= BLANK_LINES_MAX else 1))
        blank = 0
        if mark := _FENCE.match(line):
            if not fence:
                fence = mark[1]
            elif mark[1].startswith(fence) and line.strip() == mark[1]:
                fence = ""
        lines.append(line)
    return "\n".join(lines)
