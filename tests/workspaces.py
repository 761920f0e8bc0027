"""Small workspaces for tests: chats in the users' shape and recipes, on a real disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runner.engine import events, execute, opened, plan

DATA_RECIPE = """\
name: small
stages:
  - stage: ingest
    sources: [chats]
  - stage: window
    mode: conversational
  - stage: split
    eval_fraction: 0.2
"""


def chat(path: Path, *texts: str) -> Path:
    """A chat file: user and assistant in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    messages = [
        {"sender": "Claude", "claudeOutputText": text}
        if index % 2
        else {"sender": "User", "userInput": text}
        for index, text in enumerate(texts)
    ]
    path.write_text(json.dumps(messages, ensure_ascii=False), encoding="utf-8")
    return path


def make(root: Path, recipe: str = DATA_RECIPE, chats: int = 6) -> Path:
    """A workspace with chats of 1 to 6 pairs; the path of its recipe."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "pyproject.toml").touch()
    for number in range(chats):
        texts = [
            f"{'a' if n % 2 else 'q'}{n} of chat {number}" for n in range(2 * (number % 6 + 1))
        ]
        chat(root / "chats" / f"chat-{number}.json", *texts)
    path = root / "recipes" / "small.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(recipe)
    return path


def apply(
    recipe: Path,
    listen: Callable[[events.Event], None] = lambda event: None,
    *,
    overrides: Sequence[str] = (),
    **choice: Any,
) -> tuple[plan.Planned, ...]:
    with opened.at(recipe, overrides=overrides) as current:
        return execute.apply(current, listen, choice=plan.Choice(**choice))


def planned(
    recipe: Path, *, overrides: Sequence[str] = (), **choice: Any
) -> dict[str, plan.Planned]:
    with opened.at(recipe, overrides=overrides) as current:
        return {step.step.name: step for step in current.plan(plan.Choice(**choice))}


def states(recipe: Path, **asked: Any) -> dict[str, str]:
    return {name: step.state for name, step in planned(recipe, **asked).items()}


def causes(recipe: Path, stage: str) -> list[str]:
    return [cause.text for cause in planned(recipe)[stage].causes]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def ran(log: Sequence[events.Event]) -> list[str]:
    return [event["stage"] for event in log if event["event"] == "stage_started"]
