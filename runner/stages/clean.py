"""Cleans conversations: repairs texts, leaves out what should not be learned, reports the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from runner.chat import cleaning, known, languages, leftovers, statistics
from runner.stages.rule import RuleSettings
from runner.stages.stage import Dirs, Metrics, Settings, Stage

Chars = Annotated[int, Field(ge=0)]
MaxChars = Annotated[int, Field(ge=1)] | Literal["unlimited"]
Role = Literal["assistant", "user", "system", "any"]


def _share_or_keep(value: Any) -> Any:
    """One sentence for what neither of the two is; pydantic would give one for each."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "keep" or (is_number and 0 < value <= 1):
        return value
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:59]}…"
    meant = f"; {value:g} % is {value / 100:g}" if is_number and 1 < value <= 100 else ""
    raise ValueError(f"must be 'keep', or more than 0 and at most 1, not {shown}{meant}")


Share = Annotated[
    Annotated[float, Field(gt=0, le=1)] | Literal["keep"], BeforeValidator(_share_or_keep)
]


class TextRule(RuleSettings):
    """A rule for texts of one role; a document counts as the assistant's."""

    role: Role = "assistant"
    """Whose texts are judged: each reply by itself, or all texts of another role together."""


class Instruction(Settings):
    """An instruction that many conversations begin with, and other ways to say it."""

    text: Annotated[str, Field(min_length=1)]
    """How the first user message begins."""
    variants: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    """What to begin with instead, drawn by the conversation's hash; list `text` too to keep it."""


class Templates(Settings):
    """Beginnings and ends that many replies share, which a model would learn to repeat."""

    chars: Annotated[int, Field(ge=10, le=10_000)] = 80
    """How many characters must be the same, at the start or at the end of a reply."""
    share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Warn when more than this share of the conversations has the same one."""
    max_copies: Annotated[int, Field(ge=1)] | Literal["unlimited"] = "unlimited"
    """Keep the first so many conversations with the same one, and drop the others."""


class Clean(Stage):
    """Repair texts and leave out what should not be learned.

    A reply that must not be learned keeps its place, so that later replies have their context, but
    carries no loss (`weight: 0`); a conversation is dropped when no reply is left to learn. Of a
    preference, the better reply is judged.
    """

    stage: Literal["clean"]
    normalise: bool = True
    """One form of letters (NFC), spaces and line ends; nothing invisible, few blank lines."""
    min_reply_chars: Chars = 1
    """Shorter replies are not learned."""
    max_reply_chars: MaxChars = "unlimited"
    """Longer replies are not learned."""
    min_document_chars: Chars = 1
    """Shorter documents are dropped."""
    max_document_chars: MaxChars = "unlimited"
    """Longer documents are dropped."""
    exact_duplicates: Literal["drop", "keep"] = "drop"
    """What becomes of what says the same as an earlier one, or is the beginning of another one."""
    near_duplicates: Share = "keep"
    """Keep the longest of those that have at least this share of word runs in common, like 0.8."""
    languages: tuple[str, ...] = ()
    """Drop conversations whose replies are surely in other languages than these, like [ru, en]."""
    replacements: dict[Annotated[str, Field(min_length=1)], str] = Field(default_factory=dict)
    """What to write for place-holders: `name: Aria` for {{name}}, `"[Your Name]": Aria`."""
    placeholders: Literal["drop", "report", "keep"] = "report"
    """Replies with a place-holder that nobody filled in, like {{name}} or [Your Name]."""
    refusals: Literal["drop", "report", "keep"] = "keep"
    """Replies that refuse or say "As an AI language model", in English or Russian."""
    phrases: tuple[Annotated[str, Field(min_length=2)], ...] = ()
    """Further phrases that count as refusals, anywhere in a reply and in any letter case."""
    templates: Templates = Templates()
    """Beginnings and ends that many replies share."""
    secrets: Literal["redact", "drop", "report", "keep"] = "report"
    """Keys and tokens by their shape, passwords in addresses and after `password:`, `пароль:` and
    the like, anywhere; redact writes [key] and [password] over them."""
    personal_data: Literal["redact", "drop", "report", "keep"] = "report"
    """E-mail addresses; telephone, card, IBAN, Russian account and СНИЛС numbers; ИНН and Russian
    passport numbers behind these words. Names and postal addresses are not found. Redact writes
    [email], [phone], [card], [iban], [account], [snils], [inn] and [passport]."""
    require: tuple[TextRule, ...] = ()
    """Rules to keep: replies that break one are not learned; other roles' texts drop all."""
    forbid: tuple[TextRule, ...] = ()
    """Rules whose pattern or sections must not be there; else as `require`."""
    instructions: tuple[Instruction, ...] = ()
    """Instructions to vary, so that the model learns the task and not one wording of it."""

    version = 2
    libraries = ("py3langid", "regex", "rensa")
    reads = ("conversations",)
    writes = "conversations"
    shows: ClassVar[Mapping[str, str]] = {
        "": "conversations.jsonl",
        "dropped": "dropped.jsonl",
        "statistics": "statistics.json",
    }

    @field_validator("languages")
    @classmethod
    def _can_be_told(cls, wanted: tuple[str, ...]) -> tuple[str, ...]:
        for code in wanted:
            languages.refuse_unknown(code)
        return wanted

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Clean:
        for name in ("reply", "document"):
            most = getattr(self, f"max_{name}_chars")
            least = getattr(self, f"min_{name}_chars")
            if most != "unlimited" and most < least:
                raise ValueError(
                    f"has max_{name}_chars {most} below min_{name}_chars {least}; swap the two"
                )
        if self.near_duplicates != "keep" and self.exact_duplicates == "keep":
            raise ValueError(
                "drops near_duplicates but keeps exact_duplicates, which are the nearest of all"
            )
        if self.phrases and self.refusals == "keep":
            raise ValueError("has phrases but keeps refusals; set refusals to drop or report")
        return self

    def run(self, dirs: Dirs) -> Metrics:
        source = dirs.inputs["conversations"] / "conversations.jsonl"
        instructions = [(i.text.strip(), i.variants) for i in self.instructions]
        repeats_go = self.exact_duplicates == "drop"
        similarity = None if self.near_duplicates == "keep" else self.near_duplicates
        copies = self.templates.max_copies
        tally = cleaning.Tally()
        tally.unused["replacements"] = set(self.replacements)
        tally.unused["instructions"] = {text for text, _ in instructions}
        numbers = statistics.Statistics(self.templates.chars)
        notes = cleaning.Notes()
        examine = partial(
            cleaning.examined,
            steps=self._steps(notes),
            notes=notes,
            with_prefixes=repeats_go,
            similarity=similarity,
            instructions=instructions,
            template_chars=self.templates.chars,
        )
        dirs.scratch.mkdir(parents=True, exist_ok=True)
        spool = dirs.scratch / "found"
        with known.lines(
            known.index_of(dirs.cache, self.kind(), self.name, dirs.recipe),
            known.identity(self.model_dump(mode="json"), self.version, self.libraries),
            dirs.previous / "conversations.jsonl" if dirs.previous else None,
        ) as before:
            found = cleaning.findings(source, before, examine, spool, dirs.emit)
            faults = cleaning.decided(
                found, drop_repeats=repeats_go, similarity=similarity, tally=tally
            )
            cleaning.write(
                source=source,
                spool=spool,
                faults=faults,
                before=before,
                examine=examine,
                output=dirs.output,
                numbers=numbers,
                max_copies=None if copies == "unlimited" else copies,
                tally=tally,
            )
        cleaning.refuse_nothing(tally, dirs.output, dirs.scratch)
        for text in tally.warnings(numbers, self.templates.share):
            dirs.emit({"event": "warning", "text": text})
        summary = numbers.summary()
        said = statistics.verdict(
            *(summary[name] for name in ("replies", "preferences", "documents"))
        )
        dirs.emit({"event": "verdict", "text": said})
        repeated = numbers.templates(self.templates.share)
        report = {
            **summary,
            "exact_duplicates": tally.counts["exact_duplicates"],
            "templates": [
                {"place": where, "text": text, "conversations": count}
                for where, text, count in repeated
            ],
            "verdict": said,
        }
        (dirs.output / "statistics.json").write_text(
            json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )
        return tally.metrics(len(repeated))

    def rows(self, artifact: Path, view: str) -> Iterator[str]:
        if view == "statistics":
            report = json.loads((artifact / "statistics.json").read_text(encoding="utf-8"))
            yield json.dumps(report, ensure_ascii=False)
        else:
            yield from super().rows(artifact, view)

    def _steps(self, notes: cleaning.Notes) -> list[cleaning.Step]:
        """What is done to each conversation, in this order."""
        steps: list[cleaning.Step] = []
        if self.normalise:
            steps.append(cleaning.normalise)
        if self.replacements:
            steps.append(partial(cleaning.fill, replacements=self.replacements, notes=notes))
        steps.append(cleaning.refuse_empty)
        steps.append(partial(cleaning.count_marks, notes=notes))
        if {self.secrets, self.personal_data} != {"keep"}:
            treatments = {"secrets": self.secrets, "personal_data": self.personal_data}
            steps.append(partial(cleaning.protect, treatments=treatments, notes=notes))
        steps.append(
            partial(
                cleaning.judge_replies,
                faults=self._faults(notes),
                document_chars=(self.min_document_chars, self.max_document_chars),
                reply_chars=(self.min_reply_chars, self.max_reply_chars),
                notes=notes,
            )
        )
        steps += [
            partial(cleaning.judge_role, rule=rule.plain(), role=rule.role, forbidden=forbidden)
            for forbidden, wanted in ((False, self.require), (True, self.forbid))
            for rule in wanted
            if rule.role != "assistant"
        ]
        if self.languages:
            steps.append(partial(cleaning.judge_language, wanted=frozenset(self.languages)))
        return steps

    def _faults(self, notes: cleaning.Notes) -> list[cleaning.Judge]:
        """What makes a reply or a document one that is not learned, or is reported."""
        phrases = tuple(leftovers.folded(phrase) for phrase in self.phrases)
        faults: list[cleaning.Judge] = []
        if self.placeholders != "keep":
            faults.append(
                cleaning.reporting(cleaning.placeholder, self.placeholders == "drop", notes)
            )
        if self.refusals != "keep":
            refuses = partial(cleaning.refusal, phrases=phrases)
            faults.append(cleaning.reporting(refuses, self.refusals == "drop", notes))
        faults += [
            partial(cleaning.rule_fault, rule=rule.plain(), forbidden=forbidden)
            for forbidden, wanted in ((False, self.require), (True, self.forbid))
            for rule in wanted
            if rule.role == "assistant"
        ]
        return faults
