from pathlib import Path

import pytest

from runner.chat.languages import CODES, foreign, refuse_unknown, scripts

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


def test_the_known_codes_are_those_of_the_library() -> None:
    langid = pytest.importorskip("py3langid.langid")
    model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    assert frozenset(model.labels) == CODES


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("rus", "did you mean 'ru'?"),
        ("Russian", "did you mean 'ru'?"),
        ("русский", "did you mean 'ru'?"),
        ("eng", "did you mean 'en'?"),
        ("english", "did you mean 'en'?"),
        ("EN", "did you mean 'en'?"),
        ("pt-BR", "did you mean 'pt'?"),
        ("xx", "codes are like 'ru', 'en', 'de' or 'zh'"),
        ("", "codes are like 'ru', 'en', 'de' or 'zh'"),
    ],
)
def test_an_unknown_code_is_refused_with_what_may_be_meant(code: str, advice: str) -> None:
    with pytest.raises(ValueError, match="which is no code of a language") as caught:
        refuse_unknown(code)
    assert str(caught.value).startswith(f"has {code!r}, ")
    assert str(caught.value).endswith(advice)


def test_a_very_long_code_is_cut() -> None:
    with pytest.raises(ValueError, match="no code") as caught:
        refuse_unknown("x" * 10_000)
    assert len(str(caught.value)) < 200


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
