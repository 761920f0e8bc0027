from pathlib import Path

import pytest

from runner.chat.languages import foreign, scripts

DATA = Path(__file__).parents[2] / "shared" / "data"
RU_EN = frozenset({"ru", "en"})

GERMAN = "Das Gericht hat entschieden, dass der Klage stattgegeben wird, weil sie begründet ist."
UKRAINIAN = (
    "Суд вирішив задовольнити позов, оскільки він є обґрунтованим і підтверджується доказами."
)
RUSSIAN = "Суд решил удовлетворить иск, поскольку он обоснован и подтверждается доказательствами."


def test_a_text_in_another_language_is_foreign() -> None:
    assert foreign(GERMAN, RU_EN) == "de"
    assert foreign(UKRAINIAN, RU_EN) == "uk"


def test_a_text_in_a_wanted_language_is_not() -> None:
    assert foreign(RUSSIAN, RU_EN) == ""
    assert foreign(GERMAN, frozenset({"de"})) == ""


@pytest.mark.parametrize("text", ["", "Ja, genau!", "42", "Gut. " * 3, "```\nder die das\n```"])
def test_a_text_too_short_to_tell_passes(text: str) -> None:
    assert foreign(text, RU_EN) == ""


def test_code_and_links_say_nothing_of_the_language() -> None:
    code = "```python\nfür jedes Element in der Liste der Ergebnisse hier oben\n```"
    assert foreign(f"Вот пример.\n{code}\nhttps://beispiel.de/das/ist/ein/langer/pfad", RU_EN) == ""


def test_russian_novels_are_russian() -> None:
    folder = DATA / "JoannaBy__RussianNovels" / "corpus"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data")
    for path in sorted(folder.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        pieces = [text[at : at + 300] for at in range(20_000, 80_000, 300)]
        assert sum(foreign(piece, RU_EN) != "" for piece in pieces) == 0


def test_scripts_are_counted_by_letters() -> None:
    text = "Привет, world! ёж Éa 12 — 漢字 かな Ωμέγα שלום"
    assert scripts(text) == {
        "Latin": 7,
        "Cyrillic": 8,
        "Greek": 5,
        "Hebrew": 4,
        "Kana": 2,
        "Han": 2,
    }
    assert scripts("123 !?") == {}
