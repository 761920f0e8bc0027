"""In which language a text is written, and in which scripts."""

from __future__ import annotations

import functools
import re
from typing import Any

from runner.chat.leftovers import without_code

LETTERS_MIN = 20
"""A text with fewer letters cannot be told."""
CHARS_MAX = 4000
"""So much of a text is looked at."""
WANTED_MAX = 0.1
FOREIGN_MIN = 0.5
"""A text is foreign when one other language is this probable, and all wanted ones are not."""
SHOWN_MAX = 40
"""Characters of a wrong code that a message shows."""
_CODES = """
    ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext
    fa fi fo fr fuv fy ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja
    jv ka kab kik kk km kn ko ku ky la lb lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no
    nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se si sk sl sn so sq sr st sv sw ta te tg th tk
    tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu zxx
"""
CODES = frozenset(_CODES.split())
"""The languages that py3langid tells, here so that a recipe is checked without loading it."""


def foreign(text: str, wanted: frozenset[str]) -> str:
    """The language of `text` when it is surely none of `wanted`; empty when it may be one.

    Codes of ISO 639; needs py3langid. A text too short to tell is foreign to none.
    """
    prose = _LINK.sub(" ", without_code(text))[:CHARS_MAX]
    if sum(map(len, _LETTERS.findall(prose))) < LETTERS_MIN:
        return ""
    ranked: list[tuple[str, float]] = _identifier().rank(prose)
    first, probability = ranked[0]
    is_wanted = sum(share for language, share in ranked if language in wanted) > WANTED_MAX
    return "" if is_wanted or probability < FOREIGN_MIN else first


def refuse_unknown(code: str) -> None:
    """Raises ValueError, with the code that may be meant, for one that no text can get."""
    if code in CODES:
        return
    plain = code.strip().casefold()
    meant = _MEANT.get(plain, re.split("[-_]", plain)[0])
    advice = (
        f"did you mean {meant!r}?" if meant in CODES else "codes are like 'ru', 'en', 'de' or 'zh'"
    )
    shown = repr(code) if len(code) <= SHOWN_MAX else f"{code[:SHOWN_MAX]!r}…"
    raise ValueError(f"has {shown}, which is no code of a language that can be told; {advice}")


def scripts(text: str) -> dict[str, int]:
    """How many letters of each script the text has; scripts that it lacks are left out."""
    searched = {**_SCRIPTS, **_RARER_SCRIPTS} if _RARER.search(text) else _SCRIPTS
    counts = {name: sum(map(len, runs.findall(text))) for name, runs in searched.items()}
    return {name: count for name, count in counts.items() if count}


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


_LETTERS = re.compile(r"[^\W\d_]+")
_MEANT = {
    word: code
    for code, words in {
        "ar": "ara arabic",
        "be": "bel belarusian by",
        "cs": "ces cze czech cz",
        "de": "deu ger german deutsch немецкий",
        "el": "ell gre greek gr",
        "en": "eng english английский",
        "es": "spa spanish español испанский",
        "fr": "fra fre french français французский",
        "he": "heb hebrew iw",
        "hi": "hin hindi",
        "it": "ita italian italiano итальянский",
        "ja": "jpn japanese jp японский",
        "ka": "kat geo georgian",
        "kk": "kaz kazakh kz казахский",
        "ko": "kor korean kr",
        "nl": "nld dut dutch",
        "no": "nor norwegian nb nob",
        "pl": "pol polish польский",
        "pt": "por portuguese",
        "ro": "ron rum romanian",
        "ru": "rus russian русский",
        "sv": "swe swedish",
        "tr": "tur turkish турецкий",
        "uk": "ukr ukrainian ua украинский",
        "vi": "vie vietnamese",
        "zh": "zho chi chinese cn китайский",
    }.items()
    for word in words.split(" ")
}
_LINK = re.compile(r"https?://\S+")
_SCRIPTS = {
    "Latin": re.compile("[A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff]+"),
    "Cyrillic": re.compile("[\u0400-\u052f]+"),
}
_RARER_SCRIPTS = {
    "Greek": re.compile("[\u0370-\u03ff\u1f00-\u1fff]+"),
    "Armenian": re.compile("[\u0530-\u058f]+"),
    "Hebrew": re.compile("[\u0590-\u05ff]+"),
    "Arabic": re.compile("[\u0600-\u06ff\u0750-\u077f]+"),
    "Devanagari": re.compile("[\u0900-\u097f]+"),
    "Thai": re.compile("[\u0e00-\u0e7f]+"),
    "Georgian": re.compile("[\u10a0-\u10ff]+"),
    "Kana": re.compile("[\u3040-\u30ff]+"),
    "Han": re.compile("[\u3400-\u4dbf\u4e00-\u9fff]+"),
    "Hangul": re.compile("[\uac00-\ud7af]+"),
}
_RARER = re.compile("[\u0370-\u03ff\u0530-\u1dff\u1f00-\u1fff\u3040-\ud7af]")
