"""Measures the tuned model beside its base: eval loss, the recipe's rules, and what was kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from runner.chat import jsonl, rules
from runner.chat.conversation import replies
from runner.errors import RunnerError
from runner.stages.rule import RuleSettings
from runner.stages.stage import Dirs, Metrics, Sizes, Stage, Written, base_made

if TYPE_CHECKING:
    from runner.model.measure import Measured

Share = Annotated[float, Field(ge=0, le=1)]


class Rule(RuleSettings):
    """Something that a reply of the tuned model should show."""

    min_share: Share = 0.0
    """Stop the run when fewer of the tuned model's replies keep it."""


class Evaluate(Stage):
    """Compare the tuned model with its base on conversations that were kept out of training."""

    stage: Literal["evaluate"]
    rules: tuple[Rule, ...] = ()
    """What replies should show; measured on both models' replies to held-out prompts."""
    prompts: Annotated[int, Field(ge=0)] = 24
    """How many held-out first messages both models answer."""
    reply_tokens: Annotated[int, Field(ge=1, le=4096)] = 160
    """The longest reply, in tokens."""
    retention: tuple[str, ...] = ()
    """Files of general text whose loss shows what was forgotten; else a neutral English one."""
    max_forgetting: Annotated[float, Field(ge=0)] = 0.1
    """Warn when the loss on that text has risen by more than this share."""

    outside_key = (*Stage.outside_key, "retention")
    libraries = ("torch", "transformers", "peft")
    uses_gpu = True
    reads = ("model", "split", "conversations", "tokens")
    writes = "report"
    uses_base_model = True
    own_process = True
    shows: ClassVar[Mapping[str, str]] = {"replies": "replies.jsonl"}

    def source_patterns(self) -> tuple[str, ...]:
        return self.retention

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        """Each prompt with its two replies, at most eight bytes a token."""
        replies = self.prompts * (2 * 8 * self.reply_tokens + 4096)
        return Written("report", 16_384 + replies), *base_made(sizes)

    def run(self, dirs: Dirs) -> Metrics:
        from runner.model import load, measure

        asked = held_out(dirs.inputs["split"], dirs.inputs["conversations"], self.prompts)
        if self.rules and not asked:
            raise RunnerError(
                "evaluate: there is no held-out prompt to judge the rules on",
                hint="raise eval_fraction in split or prompts here, or delete the rules",
            )
        base, tuned = measure.both(
            base=load.base_folder(dirs.base, dirs.cache),
            model=dirs.inputs["model"],
            eval_tokens=dirs.inputs["tokens"] / "eval.arrow",
            asked=list(asked.values()),
            reply_tokens=self.reply_tokens,
            texts=[Path(source.path) for source in dirs.sources] or [measure.NEUTRAL_ENGLISH],
            emit=dirs.emit,
        )
        report = judged(base, tuned, self.rules)
        said = zip(asked.items(), base.replies, tuned.replies, strict=True)
        jsonl.write(
            dirs.output / "replies.jsonl",
            (
                {"conversation": id, "messages": question, "base": b, "tuned": t}
                for (id, question), b, t in said
            ),
        )
        (dirs.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        for text in verdicts(report, self.max_forgetting):
            dirs.emit({"event": "verdict", "text": text})
        fail_broken(report, self.rules)
        return flat(report)

    def rows(self, artifact: Path, view: str) -> Iterator[str]:
        if view:
            yield from super().rows(artifact, view)
        else:
            yield json.dumps(json.loads((artifact / "report.json").read_text()))


def held_out(split: Path, conversations: Path, most: int) -> dict[str, list[dict[str, str]]]:
    """The messages up to the first question of each eval conversation, by id, at most `most`."""
    wanted = {c["conversation"] for c in jsonl.read(split / "chains.jsonl") if c["split"] == "eval"}
    asked: dict[str, list[dict[str, str]]] = {}
    for conversation in jsonl.read(conversations / "conversations.jsonl"):
        if conversation["id"] in wanted and len(asked) < most:
            messages = conversation["messages"]
            first_question = replies(messages)[0][0]
            system = [m for m in messages[:first_question] if m["role"] == "system"]
            asked[conversation["id"]] = [*system, messages[first_question]]
    return asked


def judged(base: Measured, tuned: Measured, wanted: Sequence[Rule]) -> dict[str, Any]:
    """For base and tuned: eval loss, loss on general text, share of replies that keep a rule."""
    report: dict[str, Any] = {
        "prompts": len(tuned.replies),
        "forgetting": round(tuned.retention_loss / base.retention_loss - 1, 6),
    }
    for side, found in (("base", base), ("tuned", tuned)):
        report[side] = {
            "eval_loss": found.eval_loss,
            "retention_loss": found.retention_loss,
            "ended_replies": found.ended_replies,
            "rules": {rule.name: rules.share(found.replies, rule.plain()) for rule in wanted},
        }
    return report


def verdicts(report: Mapping[str, Any], max_forgetting: float) -> Iterator[str]:
    """The report in words."""
    base, tuned = report["base"], report["tuned"]
    if tuned["eval_loss"] is not None:
        learned = "learned" if tuned["eval_loss"] < base["eval_loss"] else "did not learn"
        yield (
            f"the model {learned}: eval loss {base['eval_loss']:.3f} before, "
            f"{tuned['eval_loss']:.3f} after"
        )
    for name, after in tuned["rules"].items():
        yield f"{name}: in {base['rules'][name]:.0%} of replies before, {after:.0%} after"
    change = report["forgetting"]
    words = f"loss on general text {base['retention_loss']:.3f} → {tuned['retention_loss']:.3f}"
    if change > max_forgetting:
        yield f"it forgot: {words} ({change:+.1%}); try a lower learning_rate or fewer epochs"
    else:
        yield f"it kept what it knew: {words} ({change:+.1%})"


def fail_broken(report: Mapping[str, Any], wanted: Sequence[Rule]) -> None:
    """Raises for the first rule that too few of the tuned model's replies keep."""
    for rule in wanted:
        found = report["tuned"]["rules"][rule.name]
        if found < rule.min_share:
            raise RunnerError(
                f"evaluate: {rule.name!r} is in {found:.0%} of the tuned model's replies, "
                f"the recipe asks for {rule.min_share:.0%}",
                hint="more data, more epochs or a higher learning_rate; or a lower min_share",
            )


def flat(report: Mapping[str, Any]) -> Metrics:
    """The report's numbers with one name each, for events and tables."""
    metrics: Metrics = {"prompts": report["prompts"], "forgetting": report["forgetting"]}
    for side in ("base", "tuned"):
        for name in ("eval_loss", "retention_loss"):
            if report[side][name] is not None:
                metrics[f"{side}_{name}"] = round(report[side][name], 4)
        for rule, share in report[side]["rules"].items():
            metrics[f"{side}_{rule}"] = round(share, 4)
    return metrics
