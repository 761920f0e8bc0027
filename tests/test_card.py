from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.model import card

PARITY = {"mean_kl": 0.0312, "top1": 0.912, "stops": 7, "reference_stops": 7, "texts": 9}


def written(**changes: Any) -> str:
    facts: dict[str, Any] = {
        "name": "my style",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_licence": "apache-2.0",
        "method": "lora",
        "steps": 63,
        "conversations": 1234,
        "eval_loss_before": 2.5,
        "eval_loss": 1.75,
        "files": [
            card.File("merged", "merged", 269_000_000),
            card.File("style-q4_k_m.gguf", "q4_k_m", 105_000_000, PARITY),
        ],
        "languages": ["en", "ru"],
    }
    return card.text(**{**facts, **changes})


def front_matter(text: str) -> dict[str, Any]:
    opening, front, _ = text.split("---\n", 2)
    assert opening == ""
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


def test_the_front_matter_is_what_hugging_face_reads() -> None:
    assert front_matter(written()) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "language": ["en", "ru"],
        "tags": ["lora", "gguf"],
    }


def test_the_page_says_what_the_model_was_made_from() -> None:
    body = written().split("---\n", 2)[2]
    assert (
        body
        == """
# my style

[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) \
was fine-tuned: a low-rank adapter (LoRA) was trained on 1,234 conversations; \
the last training took 63 steps. \
The base model's licence is apache-2.0.

Mean loss for each token of held-out replies: 1.75, 2.5 before that training.

| file | form | size | mean KL | same next token | stops |
| --- | --- | ---: | ---: | ---: | ---: |
| merged | merged | 269 MB |  |  |  |
| style-q4\\_k\\_m.gguf | q4\\_k\\_m | 105 MB | 0.0312 | 91.2% | 7 of 7 |

The last three columns compare each form with the model as it was trained: how far its \
probabilities of the next token are from that (0 is the same; below 0.05 it can hardly be told), \
how often the likeliest token is the same, and how many replies end where they should.
"""
    )


def test_what_is_not_known_is_left_out() -> None:
    text = written(
        base_model=None,
        base_licence=None,
        steps=None,
        conversations=None,
        eval_loss_before=None,
        eval_loss=None,
        files=[],
        languages=[],
        method="full",
    )
    assert front_matter(text) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["full-fine-tuning"],
    }
    assert text.endswith("Its base model was fine-tuned: all of its weights were trained.\n")


def test_a_local_base_model_is_named_but_not_linked() -> None:
    text = written(base_model="my-base.gguf")
    assert "base_model" not in front_matter(text)
    assert "\nmy-base.gguf was fine-tuned" in text


def test_a_licence_without_an_identifier_is_another_one_with_a_name() -> None:
    found = front_matter(written(licence="Llama 3.2: Community"))
    assert (found["license"], found["license_name"]) == ("other", "Llama 3.2: Community")


def test_what_the_base_had_lost_is_a_sentence() -> None:
    assert written(lost="the base model was Q4_1").endswith("\n\nThe base model was Q4\\_1.\n")


HOSTILE = [
    'x\n---\nlicense: "mit"',
    "x: [y]",
    '"',
    "\\",
    "<script>alert(1)</script>",
    "![](https://a.example/p.png)",
    "[a](b)",
    "- item",
    "1. item",
    "# heading",
    "a|b",
    "`code`",
    "\u2028license: mit",
    "\x85license: mit\x00\x1b[2J",
    "\ud800",
    "\U000e0041😀",
    "!!python/object:os.system",
    "&a *a",
]


@pytest.mark.parametrize("words", HOSTILE)
def test_what_people_wrote_adds_nothing_to_the_front_matter(words: str) -> None:
    text = written(name=words, base_model=words, licence=words, languages=[words])
    found = front_matter(text)
    expected = {"library_name", "pipeline_tag", "license", "license_name", "tags"}
    assert found.keys() == expected
    if words != "\ud800":
        assert found["license_name"] == words


@pytest.mark.parametrize("words", HOSTILE)
def test_what_people_wrote_stays_text_on_the_page(words: str) -> None:
    text = written(name=words, base_model=words, files=[card.File(words, words, 1)], lost=words)
    body = text.split("---\n", 2)[2]
    assert body.count("\n") == written(lost="x", files=[card.File("a", "b", 1)]).split("---\n", 2)[
        2
    ].count("\n")
    unescaped = body.replace("\\\\", "")
    for mark in "<[`#!|*":
        for place, letter in enumerate(unescaped):
            if letter == mark and unescaped[place - 1] != "\\":
                line = unescaped[unescaped.rfind("\n", 0, place) + 1 :].split("\n")[0]
                assert line.startswith(("# ", "| ")), line
                assert mark in "#|"


def test_the_licence_is_read_from_model_card_config_and_gguf(
    tmp_path: Path, smollm2_gguf: Path
) -> None:
    assert card.licence(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"license": "mit"}))
    assert card.licence(tmp_path) == "mit"
    (tmp_path / "README.md").write_text(
        "---\nlanguage: en\nlicense: 'apache-2.0' # x\n---\nlicense: z"
    )
    assert card.licence(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense:\n- a\n---\n")
    assert card.licence(tmp_path) == "mit"
    assert card.licence(smollm2_gguf) == "apache-2.0"


def test_a_damaged_base_has_no_licence(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert card.licence(tmp_path / "x.gguf") is None
    (tmp_path / "config.json").write_text("[")
    assert card.licence(tmp_path) is None


def test_a_licence_of_ones_own_is_not_called_the_base_models() -> None:
    text = written(licence="mit", author="Ann *")
    assert front_matter(text)["license"] == "mit"
    assert "The base model's licence is apache-2.0." in text
    assert "\nBy Ann \\*.\n" in text
