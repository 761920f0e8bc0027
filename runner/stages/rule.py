"""How a recipe writes a rule; stages add what they do with one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from runner.chat import rules
from runner.stages.stage import Settings


class RuleSettings(Settings):
    """Something that a text must show: a pattern, sections, a length, or several of them."""

    name: Annotated[str, Field(min_length=1)]
    """What the report calls it."""
    pattern: Annotated[str, Field(max_length=1000)] = ""
    """A regular expression that is found in a text that keeps the rule; ^ and $ match at lines."""
    min_count: Annotated[int, Field(ge=0)] = 1
    """How often the pattern must be found."""
    max_count: Annotated[int, Field(ge=0)] | Literal["unlimited"] = "unlimited"
    """How often the pattern may be found."""
    sections: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Headings or phrases that must all be there, as whole words, in any letter case."""
    in_order: bool = False
    """Whether the sections must stand in this order."""
    min_chars: Annotated[int, Field(ge=0)] = 0
    """The shortest text that keeps the rule, in characters."""
    max_chars: Annotated[int, Field(ge=0)] | Literal["unlimited"] = "unlimited"
    """The longest text that keeps the rule, in characters."""

    @field_validator("pattern")
    @classmethod
    def _is_usable(cls, pattern: str) -> str:
        rules.refuse_unsafe(pattern)
        return pattern

    @model_validator(mode="after")
    def _asks_for_something_possible(self) -> RuleSettings:
        limited = self.min_chars or self.max_chars != "unlimited"
        if not (self.pattern or self.sections or limited):
            raise ValueError("asks for nothing; give a pattern, sections, min_chars or max_chars")
        if not all(section.strip() for section in self.sections):
            raise ValueError("has a section of spaces alone")
        if not self.pattern and {"min_count", "max_count"} & self.model_fields_set:
            raise ValueError("has min_count or max_count but no pattern to count")
        if self.max_count != "unlimited" and self.max_count < self.min_count:
            raise ValueError(
                f"has max_count {self.max_count} below min_count {self.min_count}; "
                "give min_count: 0 where the pattern may be absent"
            )
        if self.max_chars != "unlimited" and self.max_chars < self.min_chars:
            raise ValueError(f"has max_chars {self.max_chars} below min_chars {self.min_chars}")
        return self

    def plain(self) -> rules.Rule:
        """The rule without the settings that say what becomes of it."""
        return rules.Rule(
            name=self.name,
            pattern=self.pattern,
            min_count=self.min_count,
            max_count=self.max_count,
            sections=self.sections,
            in_order=self.in_order,
            min_chars=self.min_chars,
            max_chars=self.max_chars,
        )
