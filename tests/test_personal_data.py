import itertools
import json
import random
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.chat.personal_data import (
    PERSONAL,
    SECRETS,
    found,
    in_value,
    redacted,
    redacted_value,
)

ALL = SECRETS | PERSONAL
# Put together here, so that no scanner of this repository takes them for real ones.
TOKEN = "abcdefghij" + "KLMNOPQRST" + "0123456789"
JWT = ".".join(["ey" + "JhbGciOiJIUzI1NiJ9", "ey" + "JzdWIiOiIxMjM0NTY3ODkwIn0", TOKEN])
BLOCK = "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIEow\nabc+/=\n-----END RSA PRIVATE" + " KEY-----"
SECRET_SAMPLES = {
    "key": [
        "AK" + "IAIOSFODNN7EXAMPLE",
        "aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "gh" + "p_" + TOKEN + "abcdef",
        "github" + "_pat_" + TOKEN,
        "gl" + "pat-" + TOKEN,
        "sk" + "-" + TOKEN + TOKEN,
        "sk" + "-proj-" + TOKEN,
        "sk" + "-ant-api03-" + TOKEN,
        "sk" + "_live_" + TOKEN,
        "xo" + "xb-" + TOKEN,
        "https://hooks.slack.com/services/" + "T00000000/B00000000/" + TOKEN,
        "AI" + "za" + (TOKEN + TOKEN)[:35],
        "h" + "f_" + TOKEN + "abcd",
        "np" + "m_" + TOKEN + "abcdef",
        "123456789" + ":AA" + (TOKEN + TOKEN)[:33],
        "https://api.telegram.org/bot" + "123456789" + ":AA" + (TOKEN + TOKEN)[:33] + "/getMe",
        JWT,
        "Authorization: Bearer " + TOKEN,
        BLOCK,
        BLOCK.replace("RSA ", ""),
        BLOCK.replace("\n", "\\n"),
    ],
    "password": [
        "postgres://user:hunter2@db.host:5432/x",
        "https://me:p%40ss@example.com/",
        "redis://:hunter2@localhost",
    ],
    "email": [
        "anna.k+x@mail.ru",
        "иван@почта.рф",
        "<a_b@sub.domain.co.uk>",
        "пишите на a@b.io.",
        "mailto:info@firma.de",
    ],
    "phone": [
        "+7 (999) 123-45-67",
        "+7 999 123 45 67",
        "+79991234567",
        "8 (999) 123-45-67",
        "8-999-123-45-67",
        "89991234567",
        "8(495)1234567",
        "8 495 123-45-67",
        "тел.:8\u00a0999\u00a0123\u00a045\u00a067",
        "+7 999 123–45–67",
        "+49 30 901820",
        "+44 20 7946 0958",
        "+1 (415) 555-2671",
        "(415) 555-2671",
        "415-555-2671",
        "+380 44 123 45 67",
        "+14155552671",
    ],
    "card": [
        "4111 1111 1111 1111",
        "4111111111111111",
        "5555-5555-5555-4444",
        "378282246310005",
        "2200 0000 0000 0004",
        "№ 2 4111111111111111",
        "4111 1111 1111 1111 12/26",
    ],
    "iban": [
        "DE89 3704 0044 0532 0130 00",
        "DE89370400440532013000",
        "GB82WEST12345698765432 and more",
        "AND FR14 2004 1010 0505 0001 3M02 606",
    ],
}


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in SECRET_SAMPLES.items() for text in texts]
)
def test_each_kind_is_found_once_among_words(kind: str, text: str) -> None:
    assert [one.kind for one in found(f"Вот: {text} и всё.")] == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com and git@github.com:owner/name.git",
        "a @ b, @name, x@y, decorators like @property.setter",
        "8.9123456789 and 3.14159265358979 and 12345678901",
        "2022-10-11 10:20:30, 12.10.2024, 192.168.100.200, 10:45:12",
        "ИНН 7707083893, КПП 773601001, ОГРН 1027700132195",
        "дело № А40-123456/2024, ст. 309, 310 ГК РФ, сумма 8 912 345,67 руб.",
        "+100 000 000 рублей, 5 000 000 000",
        "4111 1111 1111 1112 and 1234567890123456",
        "DE89 3704 0044 0532 0130 01",
        "sk-learn-is-a-very-long-package-name, task-0123456789012345678901",
        "amqp://guest:guest@localhost, db://user:${DB_PASS}@host, db://user:****@host",
        "http://localhost:8080/path and https://host/a:b@c",
        "uuid 4f9a8912-3456-4789-8123-456789012345",
        "1723456789123 ms, 0x89991234567, v8.9.1",
        "the key is under the mat; hf_hub_download(repo_id)",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert redacted(text, ALL) == text


def test_each_find_is_written_over_by_its_kind() -> None:
    text = "Пишите a@b.ru или +7 999 123-45-67, карта 4111 1111 1111 1111."
    assert redacted(text, ALL) == "Пишите [email] или [phone], карта [card]."


def test_only_the_asked_kinds_are_written_over() -> None:
    text = "https://u:hunter2@host.ru/ a@b.ru"
    assert redacted(text, SECRETS) == "https://u:[password]@host.ru/ a@b.ru"
    assert redacted(text, PERSONAL) == "https://u:hunter2@host.ru/ [email]"


def test_a_key_block_without_an_end_takes_its_lines_with_it() -> None:
    begin = BLOCK.partition("MII")[0]
    text = f"{begin}{'A' * 64}\n{'B' * 64}\nAnd a sentence."
    assert redacted(text, ALL) == "[key]\nAnd a sentence."


def test_arguments_that_are_json_stay_json() -> None:
    arguments = '{"to":  "a@b.ru", "card": 4111111111111111, "n": 3}'
    assert json.loads(redacted_value(arguments, ALL)) == {"to": "[email]", "card": "[card]", "n": 3}
    assert redacted_value('{"to":  "a@b.ru"}', ALL) == '{"to":  "[email]"}'


def test_an_escape_in_json_hides_nothing() -> None:
    assert redacted_value('["a\\u0040b.ru"]', ALL) == '["[email]"]'


def test_keys_and_numbers_of_data_are_looked_at() -> None:
    value = {"a@b.ru": [89991234567, True, None, 1.5], "x": {"y": "z"}}
    assert sorted(in_value(value)) == ["email", "phone"]
    assert redacted_value(value, ALL) == {"[email]": ["[phone]", True, None, 1.5], "x": {"y": "z"}}


def test_data_nested_without_end_is_text() -> None:
    text = "[" * 5000 + '"a@b.ru"' + "]" * 5000
    assert "a@b.ru" not in redacted_value(text, ALL)


SAMPLES = [text for texts in SECRET_SAMPLES.values() for text in texts]


@given(st.lists(st.sampled_from(SAMPLES) | st.text(string.printable, max_size=20), max_size=8))
def test_nothing_is_found_in_what_was_redacted(parts: list[str]) -> None:
    once = redacted("\n".join(parts), ALL)
    assert redacted(once, ALL) == once


@given(st.text(max_size=200))
def test_finds_lie_in_order_and_apart(text: str) -> None:
    places = [(one.start, one.end) for one in found(text)]
    assert all(start < end for start, end in places)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))


@pytest.mark.parametrize(
    "piece",
    [
        *("1", "1 ", "+1", "+1 ", "a@", "a.a@a.", "DE12", "://:", "a://b:", "eyJ.eyJ.", "bearer "),
        *("eyJaaaaaaaa", "eyJaaaaaaaa.eyJ", "sk-", "8 999 ", "(200) ", "4111 ", "123456789:", "gh"),
        *("aws_secret_key='", "-----BEGIN PRIVATE KEY-----", "a", "-", "-----BEGIN ", " "),
    ],
)
def test_no_text_makes_the_search_slow(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    started = time.monotonic()
    found(text)
    assert time.monotonic() - started < 2


def test_many_finds_are_no_burden() -> None:
    draw = random.Random(1)
    mails = [f"{draw.randrange(10**9)}@mail.ru" for _ in range(5000)]
    assert len(found(" ".join(mails))) == 5000
