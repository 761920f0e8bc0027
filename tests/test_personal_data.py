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
        "password: Qwerty123!",
        "password=Qwerty123",
        "Password: hunter2",
        "PASSWORD : hunter2",
        "DB_PASSWORD=s3cr3tPass99",
        "пароль: Qwerty123",
        "Пароль: kotik2015",
        "ПАРОЛЬ: «kotik2015»",
        "pwd: p@ssw",
        "passwd = 'Zx!cv'",
        "**Password:** `hunter2`",
        "https://host.ru/login?password=abc123&user=me",
        "Server=x;Pwd=Qwerty1;Timeout=30",
        '{"password": "Qwerty123"}',
        '{\\"password\\": \\"Qwerty123\\"}',
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
        "тел. 123-45-67",
        "Телефон: 2-34-56",
        "тел.: (495) 123-45-67",
        "тел. 1234567",
        "phone: 555-0123",
        "ТЕЛ. 12 34 56",
    ],
    "account": [
        "40817810099910004312",
        "р/с 40702 810 9 0000 0000001",
        "40817840100000000001",
        "счёт № 42301978000000000012",
        "к/с 30101810400000000225",
    ],
    "snils": [
        "112-233-445 95",
        "СНИЛС 11223344595",
        "СНИЛС: 112 233 445 95",
        "снилс № 112-233-44595",
    ],
    "inn": [
        "ИНН 7707083893",
        "ИНН: 500100732259",
        "ИНН/КПП 7707083893/773601001",
        "ИНН истца 500100732259",
        "инн 7707083893",
    ],
    "passport": [
        "паспорт 45 08 123456",
        "паспорт серии 4508 № 123456",
        "Паспорт гражданина РФ: серия 45 08 номер 123456",
        "паспортные данные: 4508 123456",
        "ПАСПОРТ 4508123456",
        "загранпаспорт 75 № 1234567",
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
        "КПП 773601001, ОГРН 1027700132195, ОГРНИП 304500116000157",
        "ИНН 7707083894, ИНН 500100732258, телефонный 7707083893",
        "УИД 77RS0001-01-2023-000001-23, КБК 18210803010011050110, дело № 2-1234/2023",
        "УИН 18810177230512345678, казначейский счёт 03100643000000017300",
        "112-233-445 96, СНИЛС 11223344596, 000-000-000 00, 123-456-789 01",
        "паспорт выдан 12.10.2004, паспорт сделки № 12040001/1481/1948/9/1, 4508 123456",
        "паспорт транспортного средства 78 УХ 123456 от 2004 года",
        "телефон за 150000 рублей, телефон 15 000 руб., тел. 112, отдел 123-45-67",
        "Айфон 123-45-67, телефон от 12.10.2024, телефон 12-10-2024, тел 10:20:30",
        "password: required, Password: Yes!, пароль: обязателен, password: string;",
        "password: 8-character minimum, Пароль: 12-значный, password: must-be-set",
        "password: <your_password1>, password=${DB_PASS1}, password: {{ pass1 }}, pwd: ****1",
        "password = os.environ['DB_PASS1'], password=hash_password(p1), password=self.pass1",
        "password=request.form.p1(x), PWD=/home/me/dir1, OLDPWD=a1b2c3, /etc/passwd:root:x:0:0",
        "Password: https://host.ru/reset1 and passwd: files systemd; pwd: sha256",
        "password: \u2022\u2022\u2022\u2022\u20221, password: [password], password=%s1",
        "the password is in the safe since 2019; passwords: 12345678",
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


def test_a_password_in_data_is_told_by_its_name() -> None:
    value = {"DB_PASSWORD": "s3cr3tPass99", "password": "required", "pwd": None, "passage": "a1b2"}
    assert list(in_value(value)) == ["password"]
    assert redacted_value(value, ALL) == {**value, "DB_PASSWORD": "[password]"}
    assert redacted_value(value, PERSONAL) == value


def test_only_the_password_itself_is_written_over() -> None:
    text = "(login: anna, Пароль: kotik2015, то есть 8 знаков)."
    assert redacted(text, ALL) == "(login: anna, Пароль: [password], то есть 8 знаков)."


def test_a_name_and_an_address_are_not_found() -> None:
    text = "Иванов Иван Иванович, 101000, г. Москва, ул. Мясницкая, д. 26, кв. 5"
    assert redacted(text, ALL) == text


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
        *("password:", "password: a1", "pwd=1;a=", "пароль", "тел. 1", "тел. 123 ", "телефон"),
        *("ИНН ", "ИНН 1", "СНИЛС 112 ", "паспорт ", "паспорт 12 ", "40817 810 ", "1-", "112-233-"),
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


def test_half_a_surrogate_pair_stays_the_escape_that_it_was() -> None:
    text = r'{"e":"foo\u0040gmail.com","x":"\ud83d"}'
    found = redacted_value(text, PERSONAL)
    assert found == r'{"e": "[email]", "x": "\ud83d"}'
    assert found.encode()
