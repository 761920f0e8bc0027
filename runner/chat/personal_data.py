"""Secrets and personal data in texts: found by shape and checksum, and written over.

Own patterns, because the kept libraries do other things: detect-secrets reports lines of source
code without the place of the secret in them, and phonenumbers is 2.6 MB of numbering plans for a
search that runs on every text. All patterns are bounded, so that no text makes them slow.
What is found is never returned as text, only as kind and place: it must reach no log.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "key", "password", "email", "iban", "account", "card", "snils", "inn", "passport", "phone"
]

SECRETS: frozenset[Kind] = frozenset({"key", "password"})
PERSONAL: frozenset[Kind] = frozenset(
    {"email", "iban", "account", "card", "snils", "inn", "passport", "phone"}
)

MAX_DEPTH = 64
"""JSON inside a text is looked into when it is nested no deeper."""
PASSWORD_MAX = 100
"""A longer word after `password:` is something else."""


@dataclass(frozen=True)
class Found:
    """Something found in a text: its kind and where it stands."""

    kind: Kind
    start: int
    end: int


def found(text: str) -> list[Found]:
    """What the text holds, by place and without overlaps; secrets come before personal data."""
    taken: list[Found] = []
    for detector in _possible(text):
        for one in detector.search(text):
            place = bisect.bisect(taken, one.start, key=lambda other: other.start)
            before_is_clear = place == 0 or taken[place - 1].end <= one.start
            if before_is_clear and (place == len(taken) or one.end <= taken[place].start):
                taken.insert(place, one)
    return taken


def _possible(text: str) -> list[_Detector]:
    """The detectors that could find something, in their order: for most texts there are none."""
    places = {place for hint, place in _HINTS if hint in text}
    if "_" in text:
        places |= {place for hint, place in _UNDERSCORE_HINTS if hint in text}
    if first := _TWO_DIGITS.search(text):
        places |= {place for hint, place in _DIGIT_HINTS if hint in text}
        if _SOME_DIGITS.search(text, first.start()):
            places |= _HINTLESS
    return [_DETECTORS[place] for place in sorted(places)] if places else []


def redacted(text: str, kinds: Iterable[Kind]) -> str:
    """The text with each find of these kinds as its kind in brackets, like `[email]`."""
    kinds = frozenset(kinds)
    parts: list[str] = []
    position = 0
    for one in found(text):
        if one.kind in kinds:
            parts += text[position : one.start], f"[{one.kind}]"
            position = one.end
    return "".join(parts) + text[position:] if parts else text


def in_value(value: Any) -> Iterator[Kind]:
    """The kind of each find in the texts of JSON data, its keys and long numbers included."""
    if isinstance(value, str):
        parsed = _parsed(value)
        if parsed is None:
            yield from (one.kind for one in found(value))
        else:
            yield from in_value(parsed)
    elif _is_long_number(value):
        yield from (one.kind for one in found(str(value)))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from in_value(key)
            if _is_named_password(key, inner):
                yield "password"
            else:
                yield from in_value(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from in_value(inner)


def redacted_value(value: Any, kinds: frozenset[Kind]) -> Any:
    """JSON data with all its texts redacted; text that is JSON itself stays valid JSON."""
    if isinstance(value, str):
        return _redacted_text(value, kinds)
    if _is_long_number(value):
        text = redacted(str(value), kinds)
        return value if text == str(value) else text
    if isinstance(value, dict):
        return {
            redacted_value(key, kinds): "[password]"
            if "password" in kinds and _is_named_password(key, inner)
            else redacted_value(inner, kinds)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [redacted_value(inner, kinds) for inner in value]
    return value


def _redacted_text(text: str, kinds: frozenset[Kind]) -> str:
    """Redacted as it stands where that leaves JSON valid; else, or if escapes hid a find, anew."""
    before = _parsed(text)
    text = redacted(text, kinds)
    if before is None:
        return text
    after = _parsed(text)
    inner = redacted_value(before if after is None else after, kinds)
    if after is not None and inner == after:
        return text
    written = json.dumps(inner, ensure_ascii=False)
    # Half of a surrogate pair can only stand in a file as the escape that it was.
    return json.dumps(inner) if _SURROGATE.search(written) else written


def _parsed(text: str) -> Any:
    """The object or list that a text of tool arguments holds; None when it is another text."""
    if text[:1] not in ("{", "["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    return None if level else value


def _is_named_password(key: Any, value: Any) -> bool:
    """Whether data says `"password": "…"`, which as a text would be found too."""
    if not isinstance(key, str) or not isinstance(value, str) or len(value) > PASSWORD_MAX:
        return False
    is_one_word = not any(map(str.isspace, value))
    return is_one_word and bool(_PASSWORD_NAME.search(key) and _written_password(value))


def _is_long_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 10**9 < value < 10**20


Span = tuple[int, int]


@dataclass(frozen=True)
class _Detector:
    kind: Kind
    pattern: re.Pattern[str]
    """Its group 1, where it has one, is what is written over; else all of the match."""
    hints: tuple[str, ...] = ()
    """One of these is in each text that the pattern can match."""
    part: Callable[[str], Span | None] = lambda candidate: (0, len(candidate))
    """The part of a candidate that is meant; None where its checksum or its digits are wrong."""
    digits: bool = False
    """Matches hold two digits in a row, so that the hints are looked for in few texts."""

    def search(self, text: str) -> Iterator[Found]:
        group = min(1, self.pattern.groups)
        for match in self.pattern.finditer(text):
            if part := self.part(match[group]):
                start = match.start(group)
                yield Found(self.kind, start + part[0], start + part[1])


def _card(candidate: str) -> Span | None:
    """Whole groups of digits that are a payment card: issuer, length, and Luhn's checksum."""
    groups = [group.span() for group in _DIGITS.finditer(candidate)]
    for first in range(len(groups)):
        for last in range(len(groups) - 1, first - 1, -1):
            start, end = groups[first][0], groups[last][1]
            digits = "".join(candidate[slice(*group)] for group in groups[first : last + 1])
            if len(digits) < 13:
                break
            if _ISSUER.fullmatch(digits) and _luhn(digits):
                return start, end
    return None


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    doubled = (int(d) * (1 + place % 2) for place, d in enumerate(reversed(digits)))
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def _iban(candidate: str) -> Span | None:
    """The account number that stands at the start: its country's length, mod 97 (ISO 13616)."""
    wanted = _IBAN_LENGTHS.get(candidate[:2], 0)
    compact, end = "", 0
    while len(compact) < wanted and end < len(candidate):
        compact += candidate[end].strip()
        end += 1
    if not wanted or len(compact) < wanted or candidate[end : end + 1].isalnum():
        return None
    number = "".join(str(int(letter, 36)) for letter in compact[4:] + compact[:4])
    return (0, end) if int(number) % 97 == 1 else None


def _phone(candidate: str) -> Span | None:
    """As many whole groups of digits as a number with a country code has (ITU-T E.164)."""
    count = end = 0
    for group in _DIGITS.finditer(candidate):
        if count + len(group[0]) > 15:
            break
        count += len(group[0])
        end = group.end()
    is_sum = re.sub(r"\D", "", candidate[:end]).endswith("00000")
    return (0, end) if count >= 9 and not is_sum else None


def _russian_phone(candidate: str) -> Span | None:
    return None if _DECIMAL.fullmatch(candidate) else (0, len(candidate))


def _random(candidate: str) -> Span | None:
    """All of it when it has letters and digits, as keys do and long names do not."""
    drawn = candidate[3:]
    looks_random = any(map(str.isdigit, drawn)) and any(map(str.isalpha, drawn))
    return (0, len(candidate)) if looks_random else None


def _password(candidate: str) -> Span | None:
    """Nothing for the words and marks by which an example says that a password stands here."""
    return None if _NO_PASSWORD.fullmatch(candidate) else (0, len(candidate))


def _written_password(candidate: str) -> Span | None:
    """The word after `password:` without what follows it; None for prose, code and place-holders.

    A password is told from the words of a form or a manual (`password: required`) by a digit, or
    by a sign that is no part of such words.
    """
    end = _PASSWORD_END.search(candidate)
    word = candidate[: end.start()] if end else candidate
    drawn = any(map(str.isdigit, word)) or _PASSWORD_SIGN.search(word)
    if len(word) < 4 or not drawn or _NO_PASSWORD.fullmatch(word) or _NO_WRITTEN.search(word):
        return None
    return 0, len(word)


def _account(candidate: str) -> Span | None:
    """Twenty digits with a currency at the sixth to eighth (Bank of Russia, 809-P)."""
    digits = re.sub(r"\D", "", candidate)
    return (0, len(candidate)) if _CURRENCIES.fullmatch(digits[5:8]) else None


def _snils(candidate: str) -> Span | None:
    """Eleven digits, of which the last two are the checksum of the others."""
    digits = [int(digit) for digit in candidate if digit.isdigit()]
    total = sum(digit * (9 - place) for place, digit in enumerate(digits[:9])) % 101 % 100
    is_given = any(digits[:3]) and total == digits[9] * 10 + digits[10]
    return (0, len(candidate)) if is_given else None


def _inn(candidate: str) -> Span | None:
    """Ten digits with one check digit, or twelve with two."""
    digits = [int(digit) for digit in candidate]
    checked = (9,) if len(digits) == 10 else (10, 11)
    for place in checked:
        weights = _INN_WEIGHTS[len(_INN_WEIGHTS) - place :]
        total = sum(w * d for w, d in zip(weights, digits[:place], strict=True))
        if total % 11 % 10 != digits[place]:
            return None
    return (0, len(candidate)) if any(digits) else None


def _local_phone(candidate: str) -> Span | None:
    """Nothing for a round number in one piece: that is a price."""
    return None if candidate.isdigit() and candidate.endswith("000") else (0, len(candidate))


def _email(candidate: str) -> Span | None:
    """Nothing for what can be nobody's: reserved domains (RFC 2606) and the user of git."""
    name, _, domain = candidate.lower().rpartition("@")
    return None if name == "git" or _RESERVED_DOMAIN.search(domain) else (0, len(candidate))


_SURROGATE = re.compile("[\ud800-\udfff]")
_DIGITS = re.compile(r"\d+", re.ASCII)
_DECIMAL = re.compile(r"\d\.\d+", re.ASCII)
_NO_PASSWORD = re.compile(
    r"(?i:(?:your|my|db|the)?[_-]?(?:password|passwd|pass|pwd|guest|secret|token|пароль))"
    r"|[$%{\[*].*|(?:\*|x|X|\.)+"
)
_PASSWORD_NAME = re.compile(r"(?i:password|passwd|(?<![a-z])pwd|пароль)\d?\Z")
_PASSWORD_END = re.compile(r"[;,&]\w+[=:]|[.,;:)\]}»”*_]+\Z")
_PASSWORD_SIGN = re.compile(r"[@#$%^&*+=~!?](?!\Z)")
_NO_WRITTEN = re.compile(
    r"^(?:[/~<(^:=>]|\./)|://|\[[a-z]+\]|\$\{|\{\{|•|…"
    r"|^[^\W\d]\w*(?:[(\[]|(?:\.[^\W\d]\w*)+(?:[(\[]|$))"  # code: f(x), a[0], a.b
    r"|^\d{1,3}[-–][^\W\d]+$"  # 8-character
    r"|^(?i:sha-?\d+|base-?64|utf-?8|bcrypt\d?|argon2\w*)$"
)
_CURRENCIES = re.compile("810|643|840|978|156|826|756|392|398|933|949|784")
_INN_WEIGHTS = (3, 7, 2, 4, 10, 3, 5, 9, 4, 6, 8)
_RESERVED_DOMAIN = re.compile(
    r"(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid|localhost)$"
)
_ISSUER = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]|2[2-7])\d{14}|220[0-4]\d{12,15}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|5\d\d)\d{12}|35\d{14}|62\d{14,17}"
)
_IBAN_LENGTHS = {
    code: int(length)
    for code, length in re.findall(
        r"([A-Z]{2})(\d+)",
        "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BR29BY28CH21CR22CY28CZ24DE22DK18DO28EE20EG29ES24FI18"
        "FO18FR27GB22GE22GI23GL18GR27GT28HR21HU28IE22IL23IQ23IS26IT27JO30KW30KZ20LB28LC32LI21LT20"
        "LU20LV21LY25MC27MD24ME22MK19MN20MR27MT31MU30NI28NL18NO15OM23PK24PL28PS29PT25QA29RO24RS22"
        "RU33SA24SC31SD18SE24SI19SK24SM27SO23ST25SV28TL23TN24TR26UA29VA22VG24XK20YE30",
    )
}


def _key(
    pattern: str,
    *hints: str,
    part: Callable[[str], Span | None] = _Detector.part,
    digits: bool = False,
) -> _Detector:
    return _Detector("key", re.compile(pattern, re.ASCII), hints, part, digits)


_KEY_BLOCK = r"-----{} [A-Z0-9 ]{{0,40}}PRIVATE KEY(?: BLOCK)?-----"
_SPACE = " \u00a0\u2009\u202f.\\-\u2010\u2011\u2013"
_S = f"[{_SPACE}]{{0,2}}"
_DETECTORS = (
    _key(
        _KEY_BLOCK.format("BEGIN")
        + rf"(?:(?:[^-]|-(?!----)){{0,20000}}{_KEY_BLOCK.format('END')}"
        + r"|(?:(?:\s|\\[nr]){1,4}[A-Za-z0-9+/=]{20,200}){0,400})",
        "PRIVATE KEY",
    ),
    _key(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", "AKIA", "ASIA"),
    _key(
        r"(?i:aws_?secret_?(?:access_?)?key)[\"']?\s{0,3}[=:]\s{0,3}[\"']?([A-Za-z0-9/+]{40})\b",
        "ecret",
        "ECRET",
    ),
    _key(r"\bgh[pousr]_[A-Za-z0-9]{36,255}", "ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    _key(r"\bgithub_pat_[A-Za-z0-9_]{22,255}", "github_pat_"),
    _key(r"\bglpat-[A-Za-z0-9_-]{20,100}", "glpat-"),
    _key(r"\bsk-ant-[A-Za-z0-9_-]{20,255}", "sk-ant-"),
    _key(r"\bsk-[A-Za-z0-9_-]{20,255}", "sk-", part=_random),
    _key(r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,255}", "k_live_", "k_test_"),
    _key(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,255}", "xox"),
    _key(r"hooks\.slack\.com/services/([A-Za-z0-9_/]{20,100})", "hooks.slack.com"),
    _key(r"\bAIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])", "AIza"),
    _key(r"\bhf_[A-Za-z0-9]{30,60}\b", "hf_"),
    _key(r"\bnpm_[A-Za-z0-9]{36}\b", "npm_"),
    _key(r"\bpypi-AgE[A-Za-z0-9_-]{50,255}", "pypi-AgE"),
    _key(r"\bAQVN[A-Za-z0-9_-]{35,60}", "AQVN"),
    _key(r"\b(?:bot)?(\d{8,10}:[A-Za-z0-9_-]{35})(?![A-Za-z0-9_-])", ":", digits=True),
    _key(r"\beyJ[\w-]{8,4000}\.eyJ[\w-]{8,8000}\.[\w-]{8,2000}", "eyJ"),
    _key(r"(?i:\bbearer)\s{1,3}([\w.~+/-]{20,4000}={0,2})", "earer", "EARER", part=_random),
    _Detector(
        "password",
        re.compile(
            r"\b[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s/:@\"'<>]{0,100}:([^\s/@\"'<>]{1,200})@",
            re.ASCII,
        ),
        ("://",),
        _password,
    ),
    _Detector(
        "password",
        re.compile(
            r"(?i:password|passwd|(?<![^\W_])pwd|пароль)(?<!/passwd)\d?"
            r"[\"'`*\\]{0,4}[ \t]{0,3}[:=][ \t\"'`*\\]{0,6}"
            rf"([^\s\"'`<>\\]{{4,{PASSWORD_MAX}}}+)(?![^\s\"'`<>\\])"
        ),
        ("assw", "ASSW", "pwd", "PWD", "Pwd", "арол", "АРОЛ"),
        part=_written_password,
    ),
    _Detector(
        "email",
        re.compile(
            r"(?<![\w.%+-])[\w%+-][\w.%+-]{0,63}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])"
        ),
        ("@",),
        _email,
    ),
    _Detector(
        "iban",
        re.compile(r"\b(?=([A-Z]{2}\d{2}(?:[ \u00a0]?[A-Z0-9]){11,45}))", re.ASCII),
        part=_iban,
    ),
    _Detector(
        "account",
        re.compile(r"(?<!\d[.,])(?<![\w-])[2-5](?:[ \u00a0.-]?\d){19}(?![\w-])", re.ASCII),
        part=_account,
    ),
    _Detector(
        "card",
        re.compile(r"(?<!\d[.,])(?<![\w-])\d(?:[ \u00a0-]?\d){12,18}(?![\w-])", re.ASCII),
        part=_card,
    ),
    _Detector(
        "snils",
        re.compile(r"(?<![\w-])\d{3}-\d{3}-\d{3}[ \u00a0-]\d{2}(?![\w-])", re.ASCII),
        part=_snils,
    ),
    _Detector(
        "snils",
        re.compile(
            r"(?i:снилс)(?!\w)[^\d\n]{0,25}"
            r"([0-9]{3}(?:[ \u00a0-]?[0-9]{3}){2}[ \u00a0-]?[0-9]{2})(?!\w)"
        ),
        ("СНИЛС", "снилс", "Снилс"),
        digits=True,
        part=_snils,
    ),
    _Detector(
        "inn",
        re.compile(r"(?<!\w)(?i:инн)(?!\w)[^\d]{0,25}([0-9]{12}|[0-9]{10})(?!\w)"),
        ("ИНН", "инн", "Инн"),
        digits=True,
        part=_inn,
    ),
    _Detector(
        "passport",
        re.compile(
            r"(?:[Пп]аспорт|ПАСПОРТ)[^\d\n]{0,60}("
            r"[0-9]{2}[ \u00a0]?[0-9]{2}[\s,]{0,3}(?:№|N|[Нн]омер)?[\s:]{0,3}[0-9]{6}"
            r"|[0-9]{2}[\s,]{0,3}(?:№|N)?[\s:]{0,3}[0-9]{7})(?!\w)"
        ),
        ("аспорт", "АСПОРТ"),
        digits=True,
    ),
    _Detector(
        "phone",
        re.compile(
            r"(?<!\d[.,])(?<![\w+])(?:\+7|8|7)"
            rf"{_S}\(?[3489]\d{{2}}\)?{_S}\d{{3}}{_S}\d{{2}}{_S}\d{{2}}(?!\w|-\d)",
            re.ASCII,
        ),
        part=_russian_phone,
    ),
    _Detector(
        "phone",
        re.compile(
            rf"(?<![\w+])\+[1-9]\d{{0,14}}+(?:[{_SPACE}()]{{1,3}}+\d{{1,12}}+){{0,6}}", re.ASCII
        ),
        ("+",),
        _phone,
    ),
    _Detector(
        "phone",
        re.compile(
            r"(?<![\w.+-])(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[-.])[2-9]\d{2}[-.]\d{4}(?![\w-])", re.ASCII
        ),
    ),
    _Detector(
        "phone",
        re.compile(
            r"(?<!\w)(?:[Тт]ел(?:ефон(?:а|ы|у)?)?|ТЕЛ(?:ЕФОН)?|[Pp]hone|PHONE|[Tt]el)(?!\w)"
            r"[\s.:№]{1,4}((?:\(?[0-9]{3,5}\)?[ \u00a0-]{1,2})?"
            r"(?:[0-9]{1,3}[-–][0-9]{2}[-–][0-9]{2}|[0-9]{2,3}(?:[ \u00a0][0-9]{2}){2}"
            r"|[0-9]{3}[-–][0-9]{4}|[0-9]{6,7}))(?!\w|[-–./,][0-9])"
        ),
        (
            "тел.",
            "тел:",
            "Тел.",
            "Тел:",
            "ТЕЛ",
            "елефон",
            "phone",
            "Phone",
            "PHONE",
            "tel.",
            "Tel.",
        ),
        part=_local_phone,
        digits=True,
    ),
)
_SOME_DIGITS = re.compile(r"\d(?:\D{0,3}\d){6}", re.ASCII)
_TWO_DIGITS = re.compile(r"\d\d", re.ASCII)
_ALL_HINTS = [(hint, n, one) for n, one in enumerate(_DETECTORS) for hint in one.hints]
_DIGIT_HINTS = [(hint, n) for hint, n, one in _ALL_HINTS if one.digits]
_UNDERSCORE_HINTS = [(hint, n) for hint, n, one in _ALL_HINTS if not one.digits and "_" in hint]
_HINTS = [(hint, n) for hint, n, one in _ALL_HINTS if not one.digits and "_" not in hint]
_HINTLESS = {n for n, detector in enumerate(_DETECTORS) if not detector.hints}
