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
    """Files of general text whose loss shows what was forgotten; else neutral texts in English and
    in Russian, of which those count whose language the base model knows."""
    max_forgetting: Annotated[float, Field(ge=0)] = 0.1
    """Warn when the loss on such a text has risen by more than this share."""
    fail_above: Annotated[float, Field(ge=0)] | None = None
    """Stop the run when the loss on such a text has risen by more than this share."""

    version: ClassVar[int] = 3
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
        """Each prompt with its two replies, at most eight bytes a token, and a loss for each eval
        conversation, which is less than a quarter of what its tokens take."""
        replies = self.prompts * (2 * 8 * self.reply_tokens + 4096)
        return Written("report", 16_384 + replies + sizes.inputs.get("tokens", 0) // 4), *base_made(
            sizes
        )

    def run(self, dirs: Dirs) -> Metrics:
        from runner.model import quickly

        with quickly.importing():
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
            texts={source.name: Path(source.path) for source in dirs.sources},
            emit=dirs.emit,
        )
        report = judged(base, tuned, self.rules) | asked_of(self.rules, self.max_forgetting)
        said = zip(asked.items(), base.replies, tuned.replies, strict=True)
        jsonl.write(
            dirs.output / "replies.jsonl",
            (
                {"conversation": id, "messages": question, "base": b, "tuned": t}
                for (id, question), b, t in said
            ),
        )
        jsonl.write(
            dirs.output / "losses.jsonl",
            (
                {"conversation": id, "nll": nll, "weight": weight}
                for id, (nll, weight) in sorted(tuned.losses.items())
            ),
        )
        (dirs.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        for text in verdicts(report, self.max_forgetting):
            dirs.emit({"event": "verdict", "text": text})
        fail_broken(report, self.rules)
        fail_forgetful(report, self.fail_above)
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
    """For base and tuned: eval loss, loss on general texts, share of replies that keep a rule.

    A text that the tuned model was not measured on is one that does not count.
    """
    retention: dict[str, dict[str, Any]] = {}
    for name, before in base.retention.items():
        after = tuned.retention.get(name)
        retention[name] = {
            "base_loss": before.loss,
            "base_bits_per_character": round(before.bits_per_character, 4),
            "tuned_loss": after.loss if after else None,
            "forgetting": round(after.loss / before.loss - 1, 6) if after else None,
        }
    counted = [
        found["forgetting"] for found in retention.values() if found["tuned_loss"] is not None
    ]
    report: dict[str, Any] = {
        "prompts": len(tuned.replies),
        "forgetting": max(counted, default=None),
        "retention": retention,
    }
    for side, found in (("base", base), ("tuned", tuned)):
        losses = [found.retention[name].loss for name in tuned.retention]
        report[side] = {
            "eval_loss": found.eval_loss,
            "retention_loss": sum(losses) / len(losses) if losses else None,
            "ended_replies": found.ended_replies,
            "rules": {rule.name: rules.share(found.replies, rule.plain()) for rule in wanted},
        }
    return report


def asked_of(wanted: Sequence[Rule], max_forgetting: float) -> dict[str, Any]:
    """What the recipe asks of a model, noted with what was found: for whoever compares two."""
    shares = {rule.name: rule.min_share for rule in wanted}
    return {"max_forgetting": max_forgetting, "min_shares": shares}


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
    yield from forgetting(report["retention"], max_forgetting)


def forgetting(retention: Mapping[str, Mapping[str, Any]], most: float) -> Iterator[str]:
    """What was kept and what was forgotten, in words, for each general text."""
    for name, found in retention.items():
        before, after, change = found["base_loss"], found["tuned_loss"], found["forgetting"]
        if after is None:
            yield (
                f"{name} does not count: the base model does not know it "
                f"({found['base_bits_per_character']:.2f} bits per character of general text)"
            )
            continue
        words = f"loss on general text {before:.3f} → {after:.3f} ({change:+.1%})"
        if change > most:
            yield f"it forgot ({name}): {words}; try a lower learning_rate or fewer epochs"
        else:
            yield f"it kept what it knew ({name}): {words}"
    if all(found["tuned_loss"] is None for found in retention.values()):
        yield (
            "what it forgot is not known: name a text in a language that the base model knows "
            "with `retention`"
        )


def fail_forgetful(report: Mapping[str, Any], most: float | None) -> None:
    """Raises for the general text of which most was forgotten, if that is more than `most`."""
    changes = {
        name: found["forgetting"]
        for name, found in report["retention"].items()
        if found["forgetting"] is not None
    }
    if most is None:
        return
    if not changes:
        raise RunnerError(
            "evaluate: fail_above cannot be checked: the base model knows the language of neither "
            "general text",
            hint="name a text that it knows with `retention`, or delete fail_above",
        )
    name = max(changes, key=lambda name: changes[name])
    if changes[name] > most:
        raise RunnerError(
            f"evaluate: the loss on general text ({name}) has risen by {changes[name]:.1%}, "
            f"the recipe allows {most:.1%}",
            hint="a lower learning_rate, fewer epochs, or method: lora instead of full; or a "
            "higher fail_above",
        )


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
    metrics: Metrics = {"prompts": report["prompts"]}
    if report["forgetting"] is not None:
        metrics["forgetting"] = report["forgetting"]
    for side in ("base", "tuned"):
        for name in ("eval_loss", "retention_loss"):
            if report[side][name] is not None:
                metrics[f"{side}_{name}"] = round(report[side][name], 4)
        for rule, share in report[side]["rules"].items():
            metrics[f"{side}_{rule}"] = round(share, 4)
    return metrics
