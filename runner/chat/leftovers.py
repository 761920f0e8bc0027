"""What a data set's maker left in its texts: place-holders, refusals, marks of a chat template."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache

OPENING_CHARS = 300
"""A refusal stands at the start of a reply; later in it, the words may be a story's."""


def placeholders(text: str) -> tuple[str, ...]:
    """The place-holders that nobody filled in, like `{{name}}` or `[Your Name]`, each once.

    Code is not looked at: there, double braces belong to a template language.
    """
    if "{{" not in text and "[" not in text:
        return ()
    return tuple(dict.fromkeys(found[0] for found in _PLACEHOLDER.finditer(without_code(text))))


def filled(text: str, replacements: Mapping[str, str], unused: set[str]) -> str:
    """The text with place-holders replaced; `name` stands for `{{name}}`, `[Name]` for itself.

    All at once, so that no order counts: what was put in is not looked at again. What was there is
    taken out of `unused`.
    """
    names = tuple(sorted(replacements, key=lambda name: (-len(name), name)))

    def value(found: re.Match[str]) -> str:
        name = names[(found.lastindex or 1) - 1]
        unused.discard(name)
        return replacements[name]

    return _any_of(names).sub(value, text)


@lru_cache(maxsize=8)
def _any_of(names: tuple[str, ...]) -> re.Pattern[str]:
    """One group for each name."""
    patterns = (
        re.escape(name) if name[:1] in ("[", "{", "<") else rf"\{{\{{\s*{re.escape(name)}\s*\}}\}}"
        for name in names
    )
    return re.compile("|".join(f"({pattern})" for pattern in patterns))


def refusal(text: str, phrases: Sequence[str] = ()) -> str:
    """The phrase by which a reply refuses or speaks of itself as a model; else empty.

    `phrases` are further ones, folded by `folded`.
    """
    whole = folded(text)
    opening = whole[:OPENING_CHARS]
    return next(
        (p for p in _REFUSALS if p in opening),
        next((p for p in (*_BOILERPLATE, *phrases) if p in whole), ""),
    )


def folded(text: str) -> str:
    """Without letter case, ё as е, straight apostrophes, one space for white space."""
    return " ".join(text.casefold().translate(_FOLDED_LETTERS).split())


def control_marks(text: str) -> int:
    """How many stretches look like a control token of some chat template, disguised ones too."""
    if not _MAYBE_MARK.search(text):
        return 0
    if not text.isascii():
        plain = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))
        text = plain.translate(_LOOK_ALIKES)
    return sum(1 for _ in _MARK.finditer(text))


def without_code(text: str) -> str:
    """The text without code blocks and inline code."""
    if "`" not in text and "~~~" not in text:
        return text
    return _INLINE_CODE.sub(" ", _CODE_BLOCK.sub("\n", text))


def _words(lines: str) -> tuple[str, ...]:
    return tuple(folded(line) for line in lines.strip().split("\n"))


_FOLDED_LETTERS = str.maketrans({"ё": "е", "’": "'", "‘": "'", "ʼ": "'", "`": "'"})
_CODE_BLOCK = re.compile(r"^ {0,3}(```+|~~~+).*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)", re.M | re.S)
_INLINE_CODE = re.compile(r"`[^`\n]{1,500}`")

_BRACKETED = (
    "Your|Insert|Enter|Name|Full Name|First Name|Last Name|Company|Date|Recipient|Sender|Address|"
    "City|State|Phone|Email|Position|Job Title|Title|Link|URL|Author|User|Client|Customer|"
    "Ваш[аеи]?|Вставьте|Введите|Укажите|Имя|Фамилия|ФИО|Ф\\.И\\.О\\.|Дата|Адрес|Город|Телефон|"
    "Название|Компания|Должность|Ссылка|Получатель|Отправитель"
)
_PLACEHOLDER = re.compile(
    r"\{\{\s*[^\W\d][\w .-]{0,40}\}\}"
    rf"|\[(?:{_BRACKETED}|your|insert|ваш[аеи]?)(?:[ '’][^\]\[\n]{{1,40}})?\](?![(\[:])"
)

_MAYBE_MARK = re.compile("[<\\[＜‹〈❮⟨˂﹤［]")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
_LOOK_ALIKES = str.maketrans(
    dict.fromkeys("‹〈〈❮⟨˂", "<") | dict.fromkeys("›〉〉❯⟩˃", ">") | dict.fromkeys("│┃ǀ∣❘｜", "|")
)
_MARK = re.compile(
    r"<\|[^<>|\n]{1,60}\|>|<\|(?:im_start|im_end|eot_id|endoftext)"
    r"|<(?:start|end)_of_(?:turn|image)>|<end_of_utterance>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT)\]|<<?/?SYS>>?"
    r"|</?s>|<(?:bos|eos|pad|unk|mask)>|</?(?:think|tool_call|tool_response)>",
    re.IGNORECASE,
)

_REFUSALS = _words("""
I'm sorry, but I can't
I'm sorry, but I cannot
I am sorry, but I can't
I am sorry, but I cannot
I'm sorry, I can't
I'm sorry, I cannot
I'm sorry, but I'm not able to
I'm sorry, but I am unable to
I'm sorry, but I'm unable to
Sorry, but I can't
Sorry, I can't
I can't assist with that
I cannot assist with that
I can't help with that
I cannot help with that
I can't fulfill that request
I cannot fulfill that request
I cannot fulfill your request
I can't fulfill this request
I cannot fulfill this request
I can't comply with
I cannot comply with
I'm unable to assist
I'm not able to help with
I must decline
Извините, но я не могу
Извините, я не могу
К сожалению, я не могу
Простите, но я не могу
Простите, я не могу
Прошу прощения, но я не могу
Я не могу помочь с этим
Я не могу выполнить эту просьбу
Я не могу выполнить этот запрос
Я не могу выполнить ваш запрос
Я не могу ответить на этот вопрос
""")
_BOILERPLATE = _words("""
As an AI language model
As a large language model
As an AI model
As an AI assistant, I
As an artificial intelligence, I
I am just an AI
I'm just an AI
I'm an AI language model
I am an AI language model
My training data only goes
my knowledge cutoff
Как языковая модель
Как большая языковая модель
Как модель искусственного интеллекта
Как искусственный интеллект, я
Являясь языковой моделью
Будучи языковой моделью
Я всего лишь языковая модель
Я — языковая модель
Я - языковая модель
Я языковая модель
""")
