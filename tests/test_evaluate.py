from pathlib import Path
from typing import Any

import pytest

from runner.chat import jsonl, rules
from runner.errors import PreconditionError, RunnerError
from runner.model import measure
from runner.model.measure import Measured
from runner.stages.evaluate import Rule, fail_broken, flat, held_out, judged, verdicts

STEP = Rule(name="step", pattern=r"^Small step: \S.*\Z", min_share=0.8)


def measured(*replies: str, eval_loss: float | None = 2.0, retention: float = 3.0) -> Measured:
    return Measured(eval_loss, retention, replies, 1.0)


def report(tuned: Measured) -> dict[str, Any]:
    return judged(measured("no", "none"), tuned, [STEP])


def test_a_rule_is_a_pattern_that_a_reply_shows() -> None:
    assert (
        rules.share(["x\n\nSmall step: do it.", "Small step: a\nmore", ""], STEP.pattern) == 1 / 3
    )


def test_a_pattern_that_never_ends_is_stopped() -> None:
    with pytest.raises(TimeoutError):
        rules.keeps("a" * 5000 + "b", r"(a|aa)+$")


def test_both_models_are_judged_by_the_same_rule() -> None:
    found = report(measured("Small step: go.", "no", eval_loss=1.5, retention=3.15))
    assert found["base"]["rules"] == {"step": 0}
    assert found["tuned"]["rules"] == {"step": 0.5}
    assert found["forgetting"] == pytest.approx(0.05)
    assert flat(found)["tuned_step"] == 0.5


def test_the_verdict_is_in_words() -> None:
    found = report(measured("Small step: go.", eval_loss=1.5, retention=3.15))
    assert list(verdicts(found, 0.1)) == [
        "the model learned: eval loss 2.000 before, 1.500 after",
        "step: in 0% of replies before, 100% after",
        "it kept what it knew: loss on general text 3.000 → 3.150 (+5.0%)",
    ]
    worse = report(measured("no", eval_loss=2.5, retention=4.0))
    first, _, last = verdicts(worse, 0.1)
    assert first.startswith("the model did not learn")
    assert last.startswith("it forgot: ")


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
