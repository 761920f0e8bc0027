"""What `runner watch` goes by: when it trains again, how, and which models it accepts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from runner.stages.stage import Settings

DURATION = "^[0-9]{1,6}(s|min|h|d)$"
HOURS = "^([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]$"
WEBHOOK = r"^https?://[^\s/]+"
WRITTEN = {
    DURATION: "write 90s, 30min, 6h or 1d",
    HOURS: "write 22:00-06:00",
    WEBHOOK: "write a URL that begins with https://",
}
"""What to write where a value is not as one of these patterns has it."""

Duration = Annotated[str, Field(pattern=DURATION)]
Hours = Annotated[str, Field(pattern=HOURS)]


class Notify(Settings):
    """Who is told when a run has ended."""

    webhook: Annotated[str, Field(pattern=WEBHOOK)] | None = None
    """A URL that gets a POST with a JSON record when a run ends; nothing is sent elsewhere."""
    desktop: bool = False
    """A notice on the desktop, where there is one."""


class Retrain(Settings):
    """When new data is worth a training, how it is trained, and what replaces the current model."""

    min_new_conversations: Annotated[int, Field(ge=1)] = 1
    """Train only when so many conversations are new since the last training."""
    min_interval: Duration = "0s"
    """The least time between the starts of two trainings: 90s, 30min, 6h, 1d."""
    at: Hours | None = None
    """The hours in which a training may start, in local time: 22:00-06:00."""
    mode: Literal["anew", "continue"] = "anew"
    """anew: train the base model on everything; continue: train the current model on what is new,
    and on a share of the rest."""
    replay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """With continue, the share of the conversations learned before that is trained on again."""
    max_loss_increase: Annotated[float, Field(ge=0, le=1)] = 0.02
    """A new model is kept aside when its loss on the same eval conversations is higher than the
    current model's by more than this share."""
    commit: bool = False
    """Commit the lockfile to git after a model was accepted; never pushes."""
    notify: Notify = Notify()
    """Where a word is sent when a run of `runner watch` has ended or failed."""
