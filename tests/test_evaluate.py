import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.chat import jsonl, rules
from runner.errors import PreconditionError, RunnerError
from runner.model import load, measure
from runner.model.measure import Kept, Measured
from runner.sources import SourceFile
from runner.stages.evaluate import (
    Evaluate,
    Rule,
    fail_broken,
    fail_forgetful,
    flat,
    forgetting,
    held_out,
    judged,
    verdicts,
)
from runner.stages.stage import Dirs
from tests import tiny_models

STEP = Rule(name="step", pattern=r"^Small step: \S.*\Z", min_share=0.8)


def measured(*replies: str, eval_loss: float | None = 2.0, **retention: float) -> Measured:
    """`retention` are losses by the name of the text, two characters a token."""
    losses = retention or {"English": 3.0}
    kept = {name: Kept(loss, loss / 2 / math.log(2)) for name, loss in losses.items()}
    return Measured(eval_loss, kept, replies, 1.0)


def report(tuned: Measured, **base: float) -> dict[str, Any]:
    return judged(measured("no", "none", **base), tuned, [STEP])


def test_a_rule_is_a_pattern_that_a_reply_shows() -> None:
    assert (
        rules.share(["x\n\nSmall step: do it.", "Small step: a\nmore", ""], STEP.pattern) == 1 / 3
    )


def test_a_pattern_that_never_ends_is_stopped() -> None:
    with pytest.raises(TimeoutError):
        rules.keeps("a" * 5000 + "b", r"(a|aa)+$")


def test_both_models_are_judged_by_the_same_rule() -> None:
    found = report(measured("Small step: go.", "no", eval_loss=1.5, English=3.15))
    assert found["base"]["rules"] == {"step": 0}
    assert found["tuned"]["rules"] == {"step": 0.5}
    assert found["forgetting"] == pytest.approx(0.05)
    assert flat(found)["tuned_step"] == 0.5


def test_the_verdict_is_in_words() -> None:
    found = report(measured("Small step: go.", eval_loss=1.5, English=3.15))
    assert list(verdicts(found, 0.1)) == [
        "the model learned: eval loss 2.000 before, 1.500 after",
        "step: in 0% of replies before, 100% after",
        "it kept what it knew (English): loss on general text 3.000 → 3.150 (+5.0%)",
    ]
    worse = report(measured("no", eval_loss=2.5, English=4.0))
    first, _, last = verdicts(worse, 0.1)
    assert first.startswith("the model did not learn")
    assert last.startswith("it forgot (English): ")


def test_each_language_has_its_verdict() -> None:
    found = report(measured("no", English=3.3, Russian=1.8), English=3.0, Russian=1.5)
    assert list(forgetting(found["retention"], 0.15)) == [
        "it kept what it knew (English): loss on general text 3.000 → 3.300 (+10.0%)",
        "it forgot (Russian): loss on general text 1.500 → 1.800 (+20.0%); "
        "try a lower learning_rate or fewer epochs",
    ]
    assert found["forgetting"] == pytest.approx(0.2)
    assert found["base"]["retention_loss"] == pytest.approx(2.25)


def test_a_language_that_the_base_does_not_know_does_not_count() -> None:
    found = report(measured("no", English=3.3), English=3.0, Russian=5.0)
    assert found["forgetting"] == pytest.approx(0.1)
    assert found["base"]["retention_loss"] == 3.0
    assert list(forgetting(found["retention"], 0.15))[1] == (
        "Russian does not count: the base model does not know it "
        "(3.61 bits per character of general text)"
    )


def test_a_base_that_knows_no_language_is_said_and_has_no_numbers() -> None:
    nothing = Measured(2.0, {}, ("no",), 1.0)
    found = judged(measured("no", English=5.0, Russian=5.0), nothing, [])
    *_, last = verdicts(found, 0.1)
    assert last.startswith("what it forgot is not known: name a text")
    assert "forgetting" not in flat(found)
    fail_forgetful(found, None)
    with pytest.raises(RunnerError, match="fail_above cannot be checked"):
        fail_forgetful(found, 0.1)


def test_more_forgetting_than_the_recipe_allows_fails_the_run() -> None:
    found = report(measured("no", English=3.3, Russian=1.8), English=3.0, Russian=1.5)
    fail_forgetful(found, None)
    fail_forgetful(found, 0.21)
    with pytest.raises(
        RunnerError, match=r"\(Russian\) has risen by 20.0%, the recipe allows 15.0%"
    ) as failed:
        fail_forgetful(found, 0.15)
    assert failed.value.exit_code == 1


def test_too_few_replies_that_keep_a_rule_fail_the_run() -> None:
    with pytest.raises(RunnerError, match="'step' is in 50% of the tuned model's replies"):
        fail_broken(report(measured("Small step: go.", "no")), [STEP])


def test_prompts_are_the_first_questions_of_eval_conversations(tmp_path: Path) -> None:
    def say(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    messages = [say("system", "s"), say("user", "q1"), say("assistant", "a1"), say("user", "q2")]
    source = {"path": "f", "format": "messages", "index": 0}
    conversations = [{"id": id, "source": source, "messages": messages} for id in ("a", "b", "c")]
    jsonl.write(tmp_path / "conversations.jsonl", conversations)
    chains = [
        {"conversation": id, "first": 1, "weights": {"2": 1}, "split": side}
        for id, side in (("a", "train"), ("b", "eval"), ("b", "eval"), ("c", "eval"))
    ]
    jsonl.write(tmp_path / "chains.jsonl", chains)
    assert held_out(tmp_path, tmp_path, 5) == {"b": messages[:2], "c": messages[:2]}
    assert list(held_out(tmp_path, tmp_path, 1)) == ["b"]


def test_a_slow_pattern_is_one_sentence() -> None:
    with pytest.raises(RunnerError, match=r"needs more than 1 s for one text"):
        rules.share(["a" * 5000 + "b"], r"(a|aa)+$")


@pytest.mark.parametrize(("data", "reason"), [(b"\n \n", "holds no text"), (b"\xff", "not UTF-8")])
def test_a_retention_file_without_text_is_said(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "r.txt").write_bytes(data)
    with pytest.raises(PreconditionError, match=reason):
        measure._pieces(tmp_path / "r.txt")


@pytest.mark.parametrize("language", ["English", "Russian"])
def test_the_neutral_texts_are_several_hundred_words_in_pieces_that_are_scored_whole(
    language: str,
) -> None:
    pieces = measure._pieces(measure.NEUTRAL[language])
    assert len(pieces) >= 7
    assert sum(len(piece.split()) for piece in pieces) > 500
    assert all(len(piece) < 2 * measure.PIECE_TOKENS for piece in pieces)


def test_smollm2_knows_english_and_no_russian(smollm2: Path) -> None:
    model = load.causal_lm(smollm2, dtype="float32", device="cpu")
    tokenizer = load.tokenizer(smollm2)
    found = {
        name: measure.kept(model, tokenizer, measure._pieces(path)[:2])
        for name, path in measure.NEUTRAL.items()
    }
    assert measure.known(found) == ["English"]
    assert found["Russian"].loss < found["English"].loss


def test_bits_are_counted_by_characters_that_were_scored(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    model, tokenizer = load.causal_lm(base, dtype="float32", device="cpu"), load.tokenizer(base)
    text = "да " * measure.PIECE_TOKENS  # five bytes, and as many tokens, for three characters
    found = measure.kept(model, tokenizer, [text])
    assert found.bits_per_character == pytest.approx(found.loss / math.log(2) * 5 / 3, rel=0.01)


@pytest.fixture
def evaluated(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """Evaluates a base that knows one row of letters and was tuned to another, with recipes of
    any settings; the report and what was said."""
    rows = tiny_models.conversations(12)
    small, large = ([replace(row, input_ids=row.input_ids - by) for row in rows] for by in (33, 65))
    random = tiny_models.folder(tmp_path / "random")
    first = tiny_models.token_files(tmp_path / "first", small)
    before = tmp_path / "before"
    tiny_models.trained(random, first, before, method="full", epochs=15, learning_rate=3e-3)
    base = before / "output"
    tokens = tiny_models.token_files(tmp_path / "tokens", large[2:], large[:2])
    tiny_models.trained(base, tokens, tmp_path, epochs=10)
    letters = [load.tokenizer(base).decode(row.input_ids.tolist()) for row in small]
    text = "\n\n".join(f"{row} {row}" for row in letters)
    (tmp_path / "known.txt").write_text(text, encoding="utf-8")
    for folder in ("split", "conversations", "report"):
        (tmp_path / folder).mkdir()
    jsonl.write(tmp_path / "split" / "chains.jsonl", [])
    jsonl.write(tmp_path / "conversations" / "conversations.jsonl", [])

    def evaluate(*texts: Path, **settings: Any) -> tuple[dict[str, Any], list[str]]:
        events: list[dict[str, Any]] = []
        stage = Evaluate(stage="evaluate", **settings)
        inputs = {name: tmp_path / name for name in ("split", "conversations", "tokens")}
        shutil.rmtree(tmp_path / "report")
        (tmp_path / "report").mkdir()
        stage.run(
            Dirs(
                inputs={**inputs, "model": tmp_path / "output"},
                output=tmp_path / "report",
                scratch=tmp_path,
                cache=tmp_path,
                sources=tuple(SourceFile(str(text), text.name, "") for text in texts),
                base_model=base,
                recipe="r",
                seed=0,
                emit=events.append,
            )
        )
        report = json.loads((tmp_path / "report" / "report.json").read_text())
        return report, [event["text"] for event in events if event["event"] == "verdict"]

    return evaluate


def test_by_default_both_languages_are_measured(
    evaluated: Callable[..., tuple[dict[str, Any], list[str]]],
) -> None:
    report, said = evaluated()
    assert list(report["retention"]) == ["English", "Russian"]
    assert [text.split(":")[0] for text in said[-3:]] == [
        "English does not count",
        "Russian does not count",
        "what it forgot is not known",
    ]


def test_the_recipes_own_texts_count_whatever_the_base_knows(
    evaluated: Callable[..., tuple[dict[str, Any], list[str]]], tmp_path: Path
) -> None:
    own = tmp_path / "own.txt"
    own.write_text("Some text of our own.\n\nAnd more of it.", encoding="utf-8")
    report, said = evaluated(own)
    assert list(report["retention"]) == ["own.txt"]
    assert report["forgetting"] is not None
    assert "(own.txt): loss on general text" in said[-1]


def test_a_run_that_forgot_too_much_fails_after_its_verdict(
    evaluated: Callable[..., tuple[dict[str, Any], list[str]]], tmp_path: Path
) -> None:
    report, said = evaluated(tmp_path / "known.txt")
    assert report["forgetting"] > 0.1
    assert said[-1].startswith("it forgot (known.txt): ")
    evaluated(tmp_path / "known.txt", fail_above=report["forgetting"] * 2)
    with pytest.raises(RunnerError, match=r"\(known.txt\) has risen by"):
        evaluated(tmp_path / "known.txt", fail_above=report["forgetting"] / 2)
