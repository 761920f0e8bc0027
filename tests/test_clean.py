import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from runner.chat import jsonl, leftovers
from runner.chat.conversation import Ids, content_hash
from runner.chat.normal import normalised
from runner.engine import recipe as recipes
from runner.errors import RecipeError, RunnerError
from runner.stages import parsed
from runner.stages.stage import Dirs
from runner.stages.window import windows
from tests import workspaces

DATA = Path(__file__).parents[2] / "shared" / "data"
IDENTITY = DATA / "hiyouga__LLaMA-Factory" / "data" / "identity.json"
RUSSIAN = DATA / "derived_ru_user_claude"

MAIL, PHONE = "anna@mail.ru", "+7 999 123-45-67"
KEY = "sk" + "-abcdefghijklmnopqrstuvwxyz0123456789"
Record = dict[str, Any]


def say(role: str, content: str, **more: Any) -> Record:
    return {"role": role, "content": content, **more}


def chat(*texts: str, **more: Any) -> Record:
    roles = ("user", "assistant")
    return {"messages": [say(roles[n % 2], text) for n, text in enumerate(texts)], **more}


def preference(prompt: str, chosen: str, rejected: str) -> Record:
    better, worse = [say("assistant", chosen)], [say("assistant", rejected)]
    return {"messages": [say("user", prompt)], "chosen": better, "rejected": worse}


class Cleaned:
    """What a run of the stage wrote and said."""

    def __init__(self, folder: Path, records: list[Record], recipe: Record) -> None:
        ids = Ids()
        source = {"path": "chats/a.json", "format": "messages"}
        self.given = [
            {"id": ids.next(content_hash(record)), "source": {**source, "index": n}, **record}
            for n, record in enumerate(records)
        ]
        for name in ("in", "out", "scratch"):
            (folder / name).mkdir(parents=True)
        jsonl.write(folder / "in" / "conversations.jsonl", self.given)
        self.events: list[Record] = []
        dirs = Dirs(
            inputs={"conversations": folder / "in"},
            output=folder / "out",
            scratch=folder / "scratch",
            cache=folder,
            sources=(),
            base_model=None,
            recipe="r",
            seed=1,
            emit=self.events.append,
        )
        self.output = folder / "out"
        self.metrics = parsed({"stage": "clean", **recipe}).run(dirs)
        self.kept = list(jsonl.read(folder / "out" / "conversations.jsonl"))
        self.dropped = list(jsonl.read(folder / "out" / "dropped.jsonl"))
        self.scratch = list((folder / "scratch").iterdir())

    def words(self, kind: str) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == kind]

    def rules(self) -> list[str]:
        return [record["rule"] for record in self.dropped]


def clean(folder: Path, *records: Record, **recipe: Any) -> Cleaned:
    return Cleaned(folder, list(records), recipe)


def contents(record: Record) -> list[str]:
    return [message["content"] for message in record["messages"]]


# Defaults


def test_an_untouched_conversation_stays_as_it_was(tmp_path: Path) -> None:
    thoughtful = say("assistant", "a", thinking="hm", tool_calls=[{"name": "f", "arguments": {}}])
    found = clean(
        tmp_path,
        chat("q", "a", group="g", metadata={"n": 1.5}, merged=1),
        {"messages": [say("user", "q"), thoughtful, say("tool", "r"), say("assistant", "b")]},
        preference("q", "good", "bad"),
        chat("q", "no", label=False),
        {"text": "Глава 1\n\nЖили-были"},
    )
    assert found.kept == found.given
    assert found.dropped == []
    assert found.metrics == {"conversations": 5, "kept": 5, "dropped": 0, "changed": 0}


def test_a_prompt_without_reply_is_kept(tmp_path: Path) -> None:
    assert len(clean(tmp_path, chat("only a question")).kept) == 1


def test_what_says_nothing_is_dropped_with_its_place(tmp_path: Path) -> None:
    empty = {"messages": [say("system", "Be kind.")]}
    found = clean(
        tmp_path,
        chat("q", "a"),
        empty,
        {"text": " \n"},
        preference("q", "\u200b", "b"),
        chat("\ufeff"),
    )
    assert found.rules() == ["empty"] * 4
    assert found.dropped[0] == {
        "conversation": found.given[1]["id"],
        "source": {"path": "chats/a.json", "format": "messages", "index": 1},
        "rule": "empty",
        "text": "nobody says anything in it",
    }
    assert found.metrics["dropped_empty"] == 4


def test_nothing_left_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"none of 2 conversations is left \(2 too short\)"):
        clean(tmp_path, chat("q", "a"), chat("q", "b"), min_reply_chars=5)


def test_nothing_left_names_three_rules_and_leaves_the_list(tmp_path: Path) -> None:
    recipe = {"min_reply_chars": 2, "max_reply_chars": 5, "secrets": "drop", "refusals": "drop"}
    refused = chat("q", "No way"), chat("q", "No way!")
    short = [chat(f"q{n}", "a") for n in range(3)]
    records = [*short, chat(KEY, "fine"), *refused, chat("\u200b", "\u200b")]
    with pytest.raises(RunnerError) as caught:
        clean(tmp_path, *records, **recipe)
    words = "none of 7 conversations is left (3 too short, 2 too long, 1 empty, …)"
    assert caught.value.message == f"clean: {words}"
    listed = tmp_path / "scratch" / "dropped.jsonl"
    assert str(listed) in caught.value.hint
    rules = [record["rule"] for record in jsonl.read(listed)]
    assert sorted(set(rules)) == ["empty", "secrets", "too_long", "too_short"]
    assert [path.name for path in listed.parent.iterdir()] == [listed.name]


# Normalisation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("e\u0301", "é"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("5\u00a0000\u202f₽\u2009x", "5 000 ₽ x"),
        ("\ufeffa\u200bb\u2060c\u00adд", "abcд"),
        ("a  \nb\t\n", "a\nb"),
        ("a\n\n\nb", "a\n\n\nb"),
        ("a\n\n\n\nb", "a\n\nb"),
        ("\n\n  a\n", "  a"),
        ("👩\u200d💻 ❤\ufe0f\u200d🔥 👩🏽\u200d🚀", "👩\u200d💻 ❤\ufe0f\u200d🔥 👩🏽\u200d🚀"),
        ("мо\u200cре se\u200da", "море sea"),
        ("می\u200cخواهم क्\u200dष", "می\u200cخواهم क्\u200dष"),
        ("```py\nif x:\n    y\n\n\n\n\n    z\n```\n\n\n\n\nb", None),
        ("漢\u3000字", "漢\u3000字"),
    ],
)
def test_texts_get_one_plain_form(text: str, expected: str | None) -> None:
    if expected is None:
        expected = "```py\nif x:\n    y\n\n\n\n\n    z\n```\n\nb"
    assert normalised(text) == expected


@given(st.text(st.sampled_from("aж\n\r \t\u00a0\u200b\u200c\u200d👩\u0301e`~\u2000"), max_size=40))
def test_the_plain_form_stays(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


def test_changed_texts_give_a_new_id(tmp_path: Path) -> None:
    found = clean(tmp_path, chat("q\u00a0q", "a"), chat("x", "y"))
    assert contents(found.kept[0]) == ["q q", "a"]
    assert found.kept[0]["id"] == content_hash(found.kept[0]) != found.given[0]["id"]
    assert found.kept[1] == found.given[1]
    assert found.metrics["changed"] == 1


def test_a_message_that_turns_out_empty_is_taken_out(tmp_path: Path) -> None:
    (record,) = clean(tmp_path, chat("q", "\u200b", "more", "a")).kept
    assert contents(record) == ["q\n\nmore", "a"]
    assert (record["empty"], record["merged"]) == (1, 1)


def test_normalisation_may_be_left_out(tmp_path: Path) -> None:
    found = clean(tmp_path, chat("q\u00a0q", "a  "), normalise=False)
    assert found.kept == found.given


# Length


def test_a_short_reply_keeps_its_place_but_is_not_learned(tmp_path: Path) -> None:
    (record,) = clean(tmp_path, chat("q", "ok", "q2", "a long reply"), min_reply_chars=5).kept
    assert record["messages"][1] == {"role": "assistant", "content": "ok", "weight": 0}
    assert "weight" not in record["messages"][3]
    assert record["id"] == content_hash(record)


def test_a_conversation_without_a_reply_to_learn_is_dropped(tmp_path: Path) -> None:
    found = clean(
        tmp_path,
        chat("q", "fine reply"),
        chat("q", "ok"),
        chat("q", "ok", "q", "no"),
        min_reply_chars=5,
    )
    assert [record["text"] for record in found.dropped] == [
        "the reply has 2 characters, fewer than 5",
        "none of its 2 replies can be learned; of the first, "
        "the reply has 2 characters, fewer than 5",
    ]
    assert found.metrics["dropped_too_short"] == 2


def test_long_replies_and_documents_are_left_out(tmp_path: Path) -> None:
    found = clean(
        tmp_path,
        chat("q", "123456"),
        {"text": "123456"},
        {"text": "1234567"},
        {"text": "1"},
        max_reply_chars=5,
        max_document_chars=6,
        min_document_chars=2,
    )
    assert found.rules() == ["too_long", "too_long", "too_short"]


def test_of_a_preference_the_better_reply_is_judged(tmp_path: Path) -> None:
    found = clean(
        tmp_path,
        preference("q", "long enough", "ok"),
        preference("q", "ok", "long enough"),
        chat("q", "ok", label=False),
        chat("q", "ok", label=True),
        min_reply_chars=5,
    )
    assert [record["conversation"] for record in found.dropped] == [
        found.given[1]["id"],
        found.given[3]["id"],
    ]


# Duplicates


def test_the_first_of_equal_conversations_stays(tmp_path: Path) -> None:
    found = clean(tmp_path, chat("q", "a"), chat("x", "y"), chat("q ", "a"), chat("q", "a"))
    assert [record["source"]["index"] for record in found.kept] == [0, 1]
    first = found.given[0]["id"]
    assert found.dropped[0]["text"] == f"it says the same as conversation {first}"
    assert found.rules() == ["exact_duplicate"] * 2


def test_kept_duplicates_are_numbered(tmp_path: Path) -> None:
    found = clean(tmp_path, chat("q", "a"), chat("q ", "a"), exact_duplicates="keep")
    first = found.given[0]["id"]
    assert [record["id"] for record in found.kept] == [first, f"{first}~2"]
    assert found.metrics["exact_duplicates"] == 1


def test_repeats_are_one_number(tmp_path: Path) -> None:
    metrics = clean(tmp_path, chat("q", "a"), chat("q", "a")).metrics
    assert [name for name in metrics if "duplicate" in name] == ["dropped_exact_duplicate"]


def test_a_chat_that_has_grown_goes_and_the_longest_stays(tmp_path: Path) -> None:
    found = clean(
        tmp_path,
        chat("q", "a", "q2"),
        chat("q", "a", "q2", "a2"),
        chat("q", "a", "q2", "a2", "q3", "a3"),
        chat("q", "a"),
        chat("q", "another"),
        chat("x", "y"),
    )
    assert [record["source"]["index"] for record in found.kept] == [2, 4, 5]
    longest = found.given[2]["id"]
    assert {record["text"] for record in found.dropped} == {
        f"it is the beginning of conversation {longest}, which goes on (chats/a.json record 2)"
    }
    assert found.rules() == ["grown"] * 3
    assert found.metrics["dropped_grown"] == 3
    assert found.scratch == []


def test_of_equally_long_later_versions_the_first_is_named(tmp_path: Path) -> None:
    found = clean(tmp_path, chat("q", "a"), chat("q", "a", "x", "b"), chat("q", "a", "y", "c"))
    assert found.given[1]["id"] in found.dropped[0]["text"]
    assert len(found.kept) == 2


def test_the_windows_of_a_chat_that_has_grown_are_all_in_the_longer_one(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(14)]
    every = [chat(*texts[:end]) for end in range(2, 15, 2)]

    def said(records: list[Record]) -> set[tuple[str, ...]]:
        return {
            tuple(contents(record)[2 * first : 2 * last + 2])
            for record in records
            for first, last in windows(len(record["messages"]) // 2, True, True, (4, 8))
        }

    (longest,) = clean(tmp_path, *every).kept
    assert said(every) == said([longest])


def test_only_the_whole_of_a_conversation_with_a_reply_is_a_beginning(tmp_path: Path) -> None:
    longer = [say("user", "q"), say("assistant", "a"), say("user", "q2"), say("assistant", "a2")]
    unlearned = {"messages": [say("user", "q"), say("assistant", "a"), *longer[2:]]}
    unlearned["messages"][1] = say("assistant", "w", weight=0)
    found = clean(
        tmp_path,
        {"messages": longer},
        chat("q"),
        chat("q", "a!"),
        {"messages": [say("system", "s"), *longer[:2]]},
        unlearned,
        chat("q", "w"),
        chat("q", "a", label=True),
        preference("q", "a", "b"),
        {"text": "q"},
        {"text": "q a"},
    )
    assert found.dropped == []


def test_a_beginning_stays_where_the_longer_one_goes(tmp_path: Path) -> None:
    records = [chat("q", "a"), chat("q", "a", f"write to {MAIL}", "a2")]
    found = clean(tmp_path, *records, personal_data="drop")
    assert [record["source"]["index"] for record in found.kept] == [0]


def test_a_beginning_stays_where_duplicates_are_kept(tmp_path: Path) -> None:
    records = [chat("q", "a"), chat("q", "a", "q2", "a2")]
    assert len(clean(tmp_path, *records, exact_duplicates="keep").kept) == 2


def test_of_near_duplicates_the_longest_stays(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    words = [f"слово{n}" for n in range(300)]
    first, second = " ".join(words[:280]), " ".join(words)
    found = clean(
        tmp_path,
        chat("q", f"so {first}"),
        chat("q", f"но {second}"),
        chat("q", f"ну {second}"),
        chat("q", " ".join(words[:290])),
        near_duplicates=0.8,
    )
    assert [record["source"]["index"] for record in found.kept] == [1]
    assert found.rules() == ["near_duplicate"] * 3
    stays = found.given[1]["id"]
    assert all(f"as conversation {stays} " in record["text"] for record in found.dropped)


def test_near_duplicates_go_across_files(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    words = [f"слово{n}" for n in range(200)]
    near = [*words[:100], "другое", *words[101:]]
    found = clean(
        tmp_path,
        chat("q", " ".join(words)),
        chat("q", "something else entirely, " * 9),
        chat("q", " ".join(near)),
        chat("q", "ok"),
        near_duplicates=0.8,
        min_reply_chars=3,
    )
    first = found.given[0]["id"]
    assert [record["text"] for record in found.dropped if record["rule"] == "near_duplicate"] == [
        f"it says almost the same as conversation {first} (similarity 0.8)"
    ]
    assert found.rules() == ["near_duplicate", "too_short"]
    assert found.scratch == []


# Languages


def test_other_languages_are_dropped_by_the_replies(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    german = "Das Gericht hat entschieden, dass der Klage stattgegeben wird."
    found = clean(
        tmp_path,
        chat("Auf Russisch bitte, sehr geehrte Damen und Herren", "Суд решил удовлетворить иск."),
        chat("q", german),
        {"text": german},
        chat("q", "Ja."),
        languages=["ru", "en"],
    )
    assert [record["source"]["index"] for record in found.dropped] == [1, 2]
    assert found.dropped[0]["text"] == "its replies are in 'de'"


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (
            "languages: [ru, russian]",
            "languages in clean has 'russian', which is no code of a language that can be told; "
            "did you mean 'ru'?",
        ),
        (
            "near_duplicates: 80",
            "near_duplicates in clean must be 'keep', or more than 0 and at most 1, not 80; "
            "80 % is 0.8",
        ),
        (
            "near_duplicates: drop",
            "near_duplicates in clean must be 'keep', or more than 0 and at most 1, not 'drop'",
        ),
    ],
)
def test_a_wrong_value_is_one_sentence_when_the_recipe_is_checked(
    entry: str, sentence: str
) -> None:
    text = f"name: r\nstages:\n  - {{stage: ingest, sources: [x]}}\n  - stage: clean\n    {entry}\n"
    with pytest.raises(RecipeError) as caught:
        recipes.compile(text.encode(), "r.yaml")
    assert caught.value.message == f"r.yaml:5: {sentence}"


# Place-holders, refusals, templates


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I am {{name}}.", "{{name}}"),
        ("by {{ author }}", "{{ author }}"),
        ("Sincerely,\n[Your Name]", "[Your Name]"),
        ("Dear [Recipient],", "[Recipient]"),
        ("С уважением, [Ваше имя]", "[Ваше имя]"),
        ("[ФИО], [Дата]", "[ФИО]"),
        ("`{{name}}` is Jinja", ""),
        ("```html\n<p>{{name}}</p>\n```", ""),
        ("see [Your Name](https://x)", ""),
        ("a[name] and [1, 2]", ""),
        ("written over: [email] and [phone]", ""),
    ],
)
def test_a_placeholder_outside_of_code_is_seen(text: str, expected: str) -> None:
    assert leftovers.placeholders(text)[:1] == ((expected,) if expected else ())


def test_placeholders_are_reported_and_may_be_dropped(tmp_path: Path) -> None:
    records = [chat("q", "I am {{name}} by {{author}}."), chat("q", "a")]
    reported = clean(tmp_path / "a", *records)
    assert reported.kept == reported.given
    assert reported.words("warning") == [
        "placeholders in 1 of 2 conversations (1 × {{author}}, 1 × {{name}}), "
        "first in chats/a.json record 0; `replacements:` fills them in, "
        "`placeholders: drop` learns no such reply"
    ]
    assert reported.metrics["with_placeholders"] == 1
    assert clean(tmp_path / "b", *records, placeholders="drop").rules() == ["placeholders"]
    assert clean(tmp_path / "c", *records, placeholders="keep").words("warning") == []


def test_replacements_fill_placeholders_in(tmp_path: Path) -> None:
    found = clean(
        tmp_path,
        chat("Who are you?", "I am {{ name }}, \\1 {{name}} by [Your Team]."),
        replacements={"name": r"\1 Ария", "[Your Team]": "us"},
    )
    assert contents(found.kept[0])[1] == r"I am \1 Ария, \1 \1 Ария by us."
    assert found.words("warning") == []


@pytest.mark.parametrize(
    "text",
    [
        "I’m sorry, but I can’t help with that.",
        "As an AI language model, I have no feelings.",
        "Как языковая модель, я не имею чувств.",
        "К сожалению, я не могу помочь.",
        "Well. My secret phrase is here",
    ],
)
def test_refusals_are_told_by_their_phrases(text: str) -> None:
    assert leftovers.refusal(text, ("secret phrase",))


def test_a_story_may_have_a_refusal_in_it() -> None:
    assert leftovers.refusal("Long ago " * 50 + "\"I'm sorry, but I can't,\" he said.") == ""


def test_replacements_without_a_place_are_named_in_one_warning(tmp_path: Path) -> None:
    fills = {"name": "Aria", "Name": "Aria", "[Your Team]": "us", "[Team]": "us"}
    found = clean(tmp_path, chat("q", "I am {{name}}, [Team]."), replacements=fills)
    assert found.words("warning") == [
        "there is nothing to fill in for 'Name' or '[Your Team]' of `replacements:`; "
        "letter case matters"
    ]


def test_instructions_that_nothing_begins_with_are_named_in_one_warning(tmp_path: Path) -> None:
    texts = ("Сократи", "Сократи текст", "сократи", "Сожми")
    instructions = [{"text": text, "variants": ["Кратко"]} for text in texts]
    found = clean(tmp_path, chat("Сократи текст!", "a"), instructions=instructions)
    assert found.words("warning") == [
        "no first user message that is kept begins with 'Сожми' or 'сократи' of `instructions:`; "
        "letter case matters"
    ]


def test_refusals_are_dropped_where_that_is_asked(tmp_path: Path) -> None:
    records = [chat("q", "Как языковая модель, я…", "q", "a"), chat("q", "Обратитесь к юристу!")]
    assert clean(tmp_path / "a", *records).kept[0]["messages"][1].get("weight") is None
    found = clean(tmp_path / "b", *records, refusals="drop", phrases=["обратитесь к  юристу"])
    assert found.kept[0]["messages"][1]["weight"] == 0
    assert found.dropped[0]["text"] == "it says 'обратитесь к юристу'"
    assert found.metrics["replies_not_learned"] == 1


def test_a_template_is_reported_with_its_words_and_may_be_thinned(tmp_path: Path) -> None:
    records = [chat(f"q{n}", f"Конечно! С радостью помогу вам. {n}") for n in range(8)]
    said = clean(tmp_path / "a", *records, templates={"chars": 20}).words("warning")
    assert said[0].startswith("8 of 8 conversations have a reply that begins with 'Конечно! С")
    few = clean(tmp_path / "b", *records, templates={"chars": 20, "max_copies": 3})
    assert [record["source"]["index"] for record in few.kept] == [0, 1, 2]
    assert few.dropped[0]["text"] == "a reply begins as in 3 conversations before it"


def test_control_tokens_in_texts_are_counted_and_stay(tmp_path: Path) -> None:
    texts = (
        "<|im_start|>",
        "＜|im_\u200bend|＞",
        "<start_of_turn>",
        "[INST]",
        "</s>",
        "<think>",
        "a<b",
    )
    found = clean(tmp_path, *[chat(text, "a") for text in texts], normalise=False)
    assert found.kept == found.given
    assert found.metrics["with_control_marks"] == 6


# Secrets and personal data


def secretive() -> list[Record]:
    call = {"name": "send", "arguments": {"to": MAIL, "body": [KEY]}}
    text_call = {"name": "send", "arguments": json.dumps({"to": MAIL})}
    answer = say("assistant", f"Done, {PHONE}", thinking=MAIL, tool_calls=[call, text_call])
    return [
        {"messages": [say("system", KEY), say("user", MAIL), answer, say("tool", MAIL)]},
        preference(MAIL, f"good {PHONE}", f"bad {MAIL}"),
        chat("q", "a", metadata={"author": MAIL, "deep": [{"key": KEY}]}),
        {"text": f"Письмо на {MAIL}"},
        *[chat(f"q{n}", f"{KEY} is the key, write to {MAIL}") for n in range(8)],
        chat("q", f"I am [Your {PHONE}]"),
        chat("clean", "reply"),
    ]


@pytest.mark.parametrize("treatment", ["redact", "drop", "report"])
def test_no_secret_reaches_anything_but_the_texts(tmp_path: Path, treatment: str) -> None:
    found = clean(tmp_path, *secretive(), secrets=treatment, personal_data=treatment)
    outputs = [
        (tmp_path / "out" / name).read_text(encoding="utf-8")
        for name in ("dropped.jsonl", "statistics.json")
    ]
    if treatment != "report":
        outputs.append((tmp_path / "out" / "conversations.jsonl").read_text(encoding="utf-8"))
    everything = "\n".join([*outputs, json.dumps(found.events), str(found.metrics)])
    for secret in (KEY, KEY[:20], MAIL, "anna@", PHONE, "123-45"):
        assert secret not in everything


def test_secrets_are_written_over_everywhere(tmp_path: Path) -> None:
    found = clean(tmp_path, *secretive(), secrets="redact", personal_data="redact")
    assert contents(found.kept[0]) == ["[key]", "[email]", "Done, [phone]", "[email]"]
    answer = found.kept[0]["messages"][2]
    assert answer["thinking"] == "[email]"
    assert answer["tool_calls"][0]["arguments"] == {"to": "[email]", "body": ["[key]"]}
    assert answer["tool_calls"][1]["arguments"] == '{"to": "[email]"}'
    assert found.kept[1]["chosen"][0]["content"] == "good [phone]"
    assert found.kept[2]["metadata"] == {"author": "[email]", "deep": [{"key": "[key]"}]}
    assert found.kept[3]["text"] == "Письмо на [email]"
    assert found.metrics["redacted_phone"] == 3


def test_secrets_are_dropped_by_kind_and_number(tmp_path: Path) -> None:
    found = clean(tmp_path, *secretive(), secrets="drop", personal_data="keep")
    assert found.dropped[0]["text"] == "it has secrets: 2 × key"
    assert {record["rule"] for record in found.dropped} == {"secrets"}


def test_what_is_reported_says_where_it_is(tmp_path: Path) -> None:
    said = clean(tmp_path, chat("q", "a"), chat(MAIL, PHONE)).words("warning")
    assert said == [
        "personal data in 1 of 2 conversations (1 × email, 1 × phone), "
        "first in chats/a.json record 1; "
        "`personal_data: redact` writes over it, `drop` leaves the conversations out"
    ]


# Rules


def test_a_ruling_has_its_motivating_part(tmp_path: Path) -> None:
    rule = {"name": "motivating part", "sections": ["УСТАНОВИЛ", "РЕШИЛ"]}
    found = clean(
        tmp_path,
        chat("Напиши решение", "Суд установил: долг есть. Решил: взыскать."),
        chat("Напиши решение", "Суд решил: взыскать."),
        {"text": "Суд У С Т А Н О В И Л: … РЕШИЛ: …"},
        require=[rule],
    )
    assert [record["text"] for record in found.dropped] == [
        "'motivating part' is required: it has no section 'УСТАНОВИЛ'"
    ]
    assert found.metrics["dropped_require"] == 1


def test_what_is_forbidden_is_not_learned(tmp_path: Path) -> None:
    rule = {"name": "links", "pattern": "https?://"}
    found = clean(
        tmp_path, chat("q", "see http://x", "q", "a"), chat("http://x", "b"), forbid=[rule]
    )
    assert found.dropped == []
    assert found.kept[0]["messages"][1]["weight"] == 0


@pytest.mark.parametrize(("role", "stay"), [("user", [1, 2]), ("system", [0, 2]), ("any", [2])])
def test_a_rule_may_be_for_another_role(tmp_path: Path, role: str, stay: list[int]) -> None:
    system = {"messages": [say("system", "bad"), say("user", "q"), say("assistant", "a")]}
    rule = {"name": "no bad", "pattern": "bad", "role": role}
    found = clean(tmp_path, chat("bad", "a"), system, chat("q", "fine"), forbid=[rule])
    assert [record["source"]["index"] for record in found.kept] == stay


def test_a_slow_rule_names_itself_and_the_conversation(tmp_path: Path) -> None:
    rule = {"name": "ends in a", "pattern": "(a|aa)+$"}
    with pytest.raises(RunnerError, match=r"'ends in a'.* \(chats/a.json record 0\)"):
        clean(tmp_path, chat("q", "a" * 5000 + "b"), require=[rule])


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"require": [{"name": "x", "pattern": "("}]}, "is not a regular expression"),
        ({"near_duplicates": 0.8, "exact_duplicates": "keep"}, "the nearest of all"),
        ({"min_reply_chars": 9, "max_reply_chars": 8}, "max_reply_chars 8 below"),
        ({"phrases": ["no"]}, "set refusals"),
        ({"instructions": [{"text": "a", "variants": []}]}, "at least 1 item"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(recipe: Record, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        parsed({"stage": "clean", **recipe})


# Instructions


def test_an_instruction_gets_a_wording_by_its_conversation(tmp_path: Path) -> None:
    records = [chat(f"Сократи текст:\n\nтекст {n}", f"a{n}") for n in range(40)]
    instructions = [{"text": "Сократи текст:", "variants": ["Кратко:", "Сожми:", "Сократи текст:"]}]
    found = clean(tmp_path / "a", *records, instructions=instructions)
    starts = {record["source"]["index"]: contents(record)[0] for record in found.kept}
    assert {start.partition("\n")[0] for start in starts.values()} == {
        "Кратко:",
        "Сожми:",
        "Сократи текст:",
    }
    assert all(start.endswith(f"\n\nтекст {n}") for n, start in starts.items())
    fewer = clean(tmp_path / "b", *records[20:], instructions=instructions)
    assert [contents(record)[0] for record in fewer.kept] == [starts[n] for n in range(20, 40)]


def test_an_instruction_is_whole_words_at_the_start(tmp_path: Path) -> None:
    instructions = [{"text": "Сократи", "variants": ["Сожми"]}]
    found = clean(
        tmp_path, chat("Сократить?", "a"), chat("x Сократи", "b"), {"text": "Сократи"},
        chat("Сократи", "c"), instructions=instructions,
    )  # fmt: skip
    assert found.kept[:3] == found.given[:3]
    assert contents(found.kept[3]) == ["Сожми", "c"]
    assert found.metrics["varied"] == 1


# All together


def test_the_statistics_can_be_read(tmp_path: Path) -> None:
    found = clean(tmp_path, chat("q", "ответ"), chat("q", "ответ"))
    stage = parsed({"stage": "clean"})
    (row,) = stage.rows(found.output, "statistics")
    assert json.loads(row)["exact_duplicates"] == 1
    assert json.loads(row)["verdict"] == found.words("verdict")[0]
    assert found.words("verdict")[0].startswith("1 reply to learn from: 1,000 are advised")


TEXTS = st.sampled_from(
    ["a", "b ", "c\u00a0c", "{{name}}", "I'm sorry, but I can't", MAIL, KEY, "\u200b", "long " * 9]
)
ANY_RECORD = st.one_of(
    st.lists(TEXTS, min_size=1, max_size=4).map(lambda texts: chat(*texts)),
    st.tuples(TEXTS, TEXTS, TEXTS).map(lambda texts: preference(*texts)),
    st.tuples(TEXTS, TEXTS, st.booleans()).map(lambda t: chat(t[0], t[1], label=t[2])),
    TEXTS.map(lambda text: {"text": text}),
)
STRICT = {
    "min_reply_chars": 2,
    "placeholders": "drop",
    "refusals": "drop",
    "secrets": "redact",
    "personal_data": "drop",
    "templates": {"chars": 10, "max_copies": 2},
    "instructions": [{"text": "a", "variants": ["b", "A"]}],
}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(ANY_RECORD, min_size=1, max_size=12), st.sampled_from([{}, STRICT]))
def test_what_goes_in_is_kept_or_dropped(
    tmp_path: Path, records: list[Record], recipe: Record
) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    found = clean(folder, chat("an ordinary question", "an ordinary reply"), *records, **recipe)
    kept = [record["source"]["index"] for record in found.kept]
    dropped = [record["source"]["index"] for record in found.dropped]
    assert sorted(kept + dropped) == list(range(len(records) + 1))
    assert kept == sorted(kept)
    assert len({record["id"] for record in found.kept}) == len(kept)
    assert (found.metrics["kept"], found.metrics["dropped"]) == (len(kept), len(dropped))
    rules = {f"dropped_{rule}": found.rules().count(rule) for rule in found.rules()}
    assert {k: v for k, v in found.metrics.items() if k.startswith("dropped_")} == rules
    hashes = [content_hash(record) for record in found.kept]
    assert [record["id"].partition("~")[0] for record in found.kept] == hashes


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(ANY_RECORD, min_size=1, max_size=8), st.data())
def test_the_order_of_the_data_decides_nothing(
    tmp_path: Path, records: list[Record], data: st.DataObject
) -> None:
    recipe = {**STRICT, "templates": {}}
    always = chat("an ordinary question", "an ordinary reply")
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    one = clean(folder / "a", always, *records, **recipe)
    other = clean(folder / "b", always, *data.draw(st.permutations(records)), **recipe)
    assert sorted(r["id"] for r in one.kept) == sorted(r["id"] for r in other.kept)
    assert sorted(one.rules()) == sorted(other.rules())


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_hash_seed_of_python_decides_nothing(tmp_path: Path, hash_seed: str) -> None:
    code = (
        "import sys, pathlib; from tests import test_clean as t; "
        "t.clean(pathlib.Path(sys.argv[1]), *t.secretive(), **t.STRICT)"
    )
    here = clean(tmp_path / "here", *secretive(), **STRICT)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "there"], env=environment, cwd=root, check=True
    )
    for name in ("conversations.jsonl", "dropped.jsonl", "statistics.json"):
        assert (tmp_path / "there" / "out" / name).read_bytes() == (here.output / name).read_bytes()


# Real data


def applied(root: Path, sources: Path, recipe: str) -> tuple[Path, Record]:
    """A run of ingest and clean over real files; the artifact and the stage's metrics."""
    root.mkdir(exist_ok=True)
    (root / "pyproject.toml").touch()
    folder = sources if sources.is_dir() else sources.parent
    for file in sorted(sources.rglob("*.json*")) if sources.is_dir() else [sources]:
        copy = root / "chats" / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    path = root / "recipes" / "real.yaml"
    path.parent.mkdir()
    path.write_text(
        f"name: real\nstages:\n  - stage: ingest\n    sources: [chats]\n  - stage: clean\n{recipe}"
    )
    log: list[Record] = []
    workspaces.apply(path, log.append)
    finished = next(e for e in log if e["event"] == "stage_finished" and e["stage"] == "clean")
    return root / "artifacts" / "real" / "clean", finished["metrics"]


@pytest.mark.skipif(not IDENTITY.is_file(), reason="needs ../shared/data")
def test_the_identity_data_gets_its_names(tmp_path: Path) -> None:
    recipe = "    replacements: {name: Ария, author: Мы}\n"
    artifact, finished = applied(tmp_path, IDENTITY, recipe)
    text = (artifact / "conversations.jsonl").read_text(encoding="utf-8")
    assert "{{" not in text
    assert "Ария" in text
    assert "with_placeholders" not in finished


@pytest.mark.skipif(not IDENTITY.is_file(), reason="needs ../shared/data")
def test_the_identity_data_is_reported_without_names(tmp_path: Path) -> None:
    _, finished = applied(tmp_path, IDENTITY, "    normalise: true\n")
    assert finished["with_placeholders"] > 80
    assert finished["conversations"] == finished["kept"] + finished["dropped"]


@pytest.mark.skipif(not RUSSIAN.is_dir(), reason="needs ../shared/data")
def test_only_what_is_not_russian_leaves_the_russian_data(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    artifact, found = applied(tmp_path, RUSSIAN, "    languages: [ru, en]\n")
    dropped = workspaces.rows(artifact / "dropped.jsonl")
    assert [(record["rule"], record["text"]) for record in dropped] == [
        ("language", "its replies are in 'es'")
    ]
    assert found["conversations"] == found["kept"] + 1


@pytest.mark.skipif(not RUSSIAN.is_dir(), reason="needs ../shared/data")
def test_a_file_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    source = RUSSIAN / "instruct" / "instruct_list.json"
    data = json.loads(source.read_text(encoding="utf-8"))
    again = tmp_path / "data" / "b" / "again.json"
    again.parent.mkdir(parents=True)
    changed = [{**record, "output": record["output"] + "\u00a0\r\n"} for record in data]
    again.write_text(json.dumps(changed), encoding="utf-8")
    (tmp_path / "data" / "a.json").write_bytes(source.read_bytes())
    artifact, found = applied(tmp_path / "w", tmp_path / "data", "    normalise: true\n")
    assert found["conversations"] == 2 * len(data)
    assert found["kept"] == found["dropped_exact_duplicate"] == len(data)
    paths = {record["source"]["path"] for record in workspaces.rows(artifact / "dropped.jsonl")}
    assert paths == {"chats/b/again.json"}


def test_the_order_of_replacements_makes_no_difference() -> None:
    values = {"name": "[Place]", "[Place]": "{{name}}", "[Place of work]": "the mill"}
    text = "{{ name }} was at [Place], near [Place of work]"
    for names in itertools.permutations(values):
        unused = set(values)
        filled = leftovers.filled(text, {name: values[name] for name in names}, unused)
        assert filled == "[Place] was at {{name}}, near the mill"
        assert not unused
