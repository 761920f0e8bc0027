"""One JSON value at a time out of a window: read strictly, or passed over where it is broken.

Python's parser does the reading; what it lets through and should not (depth, keys written twice,
halves of characters) is refused here, and its mistakes are put in words.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from runner.chat.personal_data import PERSONAL, SECRETS, redacted
from runner.chat.text_window import CHUNK_BYTES, SURROGATE, Window, length

MAX_DEPTH = 64
MAX_TEXT_PARTS = 1_000_000
"""A JSON text inside JSON is read when it has no more brackets that open, and commas."""
SHOWN_MAX = 40
"""Characters of a text that an error quotes."""
NOTHING_AFTER_COMMA = "a comma with nothing after it"

_SKIP_DEPTH = 10_000
_LONGEST_CUT = 16
"""The parser can stop this far before the cut: `-Infinit` and `\\ud83d\\ude0` are shorter."""
_MARK = re.compile(r'["\[\]{},]')
_NESTED_MARK = re.compile(r'["\[\]{}]')
_SEARCHED_FOR_SECRETS = 1000
_STRING_OR_MARK = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.DOTALL)
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_REST_OF_STRING = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


class Refused(ValueError):
    """Why there is no value; `at` is where the syntax is wrong, counted from the value's start."""

    def __init__(self, reason: str, at: int | None = None, *, cut: bool = False) -> None:
        super().__init__(reason)
        self.at = at
        self.cut = cut


def value(window: Window) -> Any:
    """The value that starts here; where it is refused, `at` stays."""
    while True:
        text, start = window.text, window.at
        if (end := _end_of_parts(window)) is not None:
            raise _refused_within(window, end, too_many(window))
        try:
            value, end = _decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            if len(text) - start > window.max_characters:
                end = start + window.max_characters
                raise _refused_within(window, end, too_long(window)) from None
            if not isinstance(error, json.JSONDecodeError):
                raise Refused(_reason(error)) from None
            if window.ended or not _may_be_cut(error, len(text)):
                raise _refused(window, error, cut=window.ended and _is_cut(error, text)) from None
        else:
            if end - start > window.max_characters:
                raise too_long(window)
            if window.ended or text[end - 1] in '}]"' or end + _LONGEST_CUT <= len(text):
                _check_within(window, value, end)
                window.at = end
                return value
        window.more()


def element(window: Window) -> Any:
    """The list element that starts here; a number that the file's end could cut is none."""
    found = value(window)
    if window.text[window.at - 1] not in '}]"' and not window.character():
        raise Refused(not_json(window, "the file ends inside a value", window.at), cut=True)
    return found


def text_value(text: str) -> Any:
    """What a JSON text says that stands inside of JSON; raises Refused where it is none."""
    if _parts(text, MAX_TEXT_PARTS) > MAX_TEXT_PARTS:
        raise Refused(f"has more than {MAX_TEXT_PARTS:,} parts")
    try:
        value = _decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise Refused(_reason(error)) from None
    _check(value, escapes_surrogates="\\u" in text)
    return value


def line_value(window: Window, line: str, number: int, column: int) -> Any:
    """The value of a line that starts at this place and was taken from the window."""
    if window.undecodable and (wrong := SURROGATE.search(line)):
        raise Refused(window.not_text(wrong[0], number, column + wrong.start()))
    if _parts(line, window.max_parts) > window.max_parts:
        raise too_many(window)
    try:
        value = _decoder.decode(line)
    except json.JSONDecodeError as error:
        what = "the line ends inside a value" if _is_cut(error, line) else _mistake(error)
        raise Refused(_not_json_at(what, number, column + error.pos)) from None
    except (ValueError, RecursionError) as error:
        raise Refused(_reason(error)) from None
    _check(value, any(escape in line for escape in window.surrogate_escapes))
    return value


def pass_over(window: Window, *, in_list: bool) -> bool:
    """Passes over the broken value that starts here, by its brackets and strings.

    In a list up to the comma or bracket behind it. False where its end cannot be told; the
    place is then of no use.
    """
    if window.at > CHUNK_BYTES // 16:  # the parser counts lines from the start for each mistake
        window.forget()
    open_brackets: list[str] = []
    while window.character():
        marks = _NESTED_MARK if open_brackets else _MARK
        found = marks.search(window.text, window.at)
        if found is None:
            window.at = len(window.text)
            continue
        mark, window.at = found[0], found.end()
        if mark == '"':
            _pass_string(window)
        elif mark in "[{":
            open_brackets.append("]" if mark == "[" else "}")
            if len(open_brackets) > _SKIP_DEPTH:
                return False
        elif open_brackets:
            if open_brackets.pop() != mark:
                return False
            if not open_brackets and not in_list:
                return True
        else:
            window.at -= 1
            return in_list and mark in ",]"
    return False


def is_json(line: str) -> bool:
    """Whether the syntax is right, whatever else may be wrong with the value."""
    try:
        _lenient.decode(line)
    except json.JSONDecodeError:
        return False
    except RecursionError:
        return True
    return True


def not_json(window: Window, what: str, position: int) -> str:
    """The reason where the syntax is wrong, with its place."""
    return _not_json_at(what, *window.located(position)[1:])


def too_long(window: Window) -> Refused:
    return Refused(
        f"is longer than {window.max_characters:,} characters, the most for one record; "
        "export it chat by chat"
    )


def too_many(window: Window) -> Refused:
    return Refused(
        f"has more than {window.max_parts:,} lists, objects and elements, the most for one record; "
        "export it chat by chat"
    )


def quoted(value: object) -> str:
    """A value as an error shows it: short, and with secrets and personal data written over."""
    return _quoting.repr(value)


class _Quoting(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxother = self.maxlong = SHOWN_MAX

    def repr_str(self, x: str, level: int) -> str:
        clear = redacted(x[:_SEARCHED_FOR_SECRETS], SECRETS | PERSONAL)
        is_whole = len(clear) <= SHOWN_MAX and len(x) <= _SEARCHED_FOR_SECRETS
        return repr(clear) if is_whole else f"{clear[:SHOWN_MAX]!r}…"


def _parts(text: str, enough: int) -> int:
    """How many brackets open outside of strings, and commas; counted well where over `enough`."""
    if len(text) <= enough:
        return 0
    count = sum(map(text.count, "[{,"))
    if count > enough:
        outside = _STRING.sub("", text)
        count = sum(map(outside.count, "[{,"))
    return count


def _end_of_parts(window: Window) -> int | None:
    """Where the value that starts here has more parts than it may, if that is in memory."""
    text, start = window.text, window.at
    if len(text) - start <= window.max_parts or not window.is_dense():
        return None
    if text[start] not in "[{":
        return None
    count = depth = 0
    for mark in _STRING_OR_MARK.finditer(text, start):
        match mark[0]:
            case "[" | "{":
                depth += 1
                count += 1
                if depth > _SKIP_DEPTH:
                    return None  # the parser stops long before
            case ",":
                count += 1
            case "]" | "}":
                depth -= 1
                if not depth:
                    return None
        if count > window.max_parts:
            return mark.end()
    return None


def _pass_string(window: Window) -> None:
    while window.character():
        window.at += length(_REST_OF_STRING.match(window.text, window.at))
        if window.at == len(window.text):
            continue
        escaped = window.text[window.at] == "\\"  # the character after it is not here yet
        if escaped and window.at + 1 == len(window.text) and not window.more():
            window.at += 1
        elif not escaped:
            window.at += 1
            return


def _refused_within(window: Window, end: int, otherwise: Refused) -> Refused:
    """Why there is no value in the text up to `end`, the same however much is in memory."""
    try:
        _decoder.raw_decode(window.text[:end], window.at)
    except json.JSONDecodeError as error:
        if not _may_be_cut(error, end):
            return _refused(window, error, cut=False)
    except (ValueError, RecursionError) as error:
        return Refused(_reason(error))
    return otherwise


def _refused(window: Window, error: json.JSONDecodeError, *, cut: bool) -> Refused:
    start = window.at
    if window.undecodable and (wrong := SURROGATE.search(error.doc, start, error.pos + 1)):
        return Refused(_not_text(window, wrong), error.pos - start)
    what = "the file ends inside a value" if cut else _mistake(error, start)
    return Refused(not_json(window, what, error.pos), error.pos - start, cut=cut)


def _check_within(window: Window, value: Any, end: int) -> None:
    if window.undecodable and (wrong := SURROGATE.search(window.text, window.at, end)):
        raise Refused(_not_text(window, wrong))
    found = (window.text.find(escape, window.at, end) for escape in window.surrogate_escapes)
    _check(value, any(at >= 0 for at in found))


def _not_text(window: Window, wrong: re.Match[str]) -> str:
    return window.not_text(wrong[0], *window.located(wrong.start())[1:])


def _check(value: Any, escapes_surrogates: bool) -> None:
    """Refuses what Python's parser lets through: depth, and halves of surrogate pairs."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            break
    else:
        raise Refused(f"is nested more than {MAX_DEPTH} levels deep")
    if escapes_surrogates and any(map(SURROGATE.search, _texts(value))):
        raise Refused("has half of a surrogate pair, which is no character")


def _texts(value: Any) -> Iterator[str]:
    """The strings in a value that are not ASCII, keys among them."""
    rest = [value]
    while rest:
        part = rest.pop()
        if isinstance(part, str):
            if not part.isascii():
                yield part
        elif isinstance(part, dict):
            rest.extend(part)
            rest.extend(part.values())
        elif isinstance(part, list):
            rest.extend(part)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((most, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise Refused(f"has the key {quoted(most)} twice in one object")
    return found


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise Refused(f"has the number {reprlib.repr(text)}, which is too large to keep")
    return number


def _constant(word: str) -> NoReturn:
    raise Refused(f"has {word}, which is not JSON")


def _reason(error: ValueError | RecursionError) -> str:
    """Why the parser stopped where the syntax was right."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, RecursionError):
        return f"is nested more than {MAX_DEPTH} levels deep"
    return "has a number with too many digits"


def _may_be_cut(error: json.JSONDecodeError, end: int) -> bool:
    """Whether the mistake could come from the text's going on behind `end`."""
    return error.msg.startswith("Unterminated string") or error.pos + _LONGEST_CUT > end


def _is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the text ends where a value could still go on."""
    if error.msg.startswith("Unterminated string"):
        return True
    if error.pos + _LONGEST_CUT < len(text.rstrip()):
        return False
    rest = text[error.pos :].strip()
    return any(word.startswith(rest) for word in ("true", "false", "null"))


def _mistake(error: json.JSONDecodeError, start: int = 0) -> str:
    """What is wrong, in words; the value starts at `start`."""
    found = error.doc[error.pos : error.pos + 1]
    before = error.doc[max(start, error.pos - CHUNK_BYTES) : error.pos].rstrip()
    if found == "\ufeff":
        return "a byte order mark inside the text"
    if found == "\0":
        return "a NUL byte"
    if error.msg.startswith("Invalid control character"):
        return f"a control character (U+{ord(found):04X}) in a string"
    if (found and found in "}]" and before.endswith(",")) or "trailing comma" in error.msg:
        return NOTHING_AFTER_COMMA
    return error.msg.removesuffix(" at")


def _not_json_at(what: str, line: int, column: int) -> str:
    return f"is not valid JSON: {what} at line {line}, column {column}"


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
_lenient = json.JSONDecoder(parse_int=len)
_quoting = _Quoting()
