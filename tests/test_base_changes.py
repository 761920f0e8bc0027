"""A base model that is written to while a training runs."""

from pathlib import Path
from typing import Any

import pytest

from runner.engine import events
from runner.errors import RunnerError
from tests import tiny_models, workspaces

RECIPE = """\
name: r
base_model: base
stages:
  - stage: ingest
    sources: [chats]
  - stage: window
  - stage: split
    eval_fraction: 0
  - stage: tokenize
    max_tokens: 64
  - stage: train
    max_steps: 3
    precision: float32
    lora:
      rank: 2
"""

CHANGED = "the base model changed"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tiny_models.folder(tmp_path / "base")
    return workspaces.make(tmp_path, RECIPE)


def change_at(event_of_training: str, base: Path, log: list[events.Event]) -> Any:
    """A listener that writes to the base model when the training says this for the first time."""
    extra = base / "generation_config.json"

    def listen(event: events.Event) -> None:
        log.append(event)
        if (event["event"], event.get("stage")) == (event_of_training, "train"):
            extra.write_text('{"changed": true}')

    return listen


def test_a_change_before_a_training_has_read_its_base_model_ends_it_at_its_first_step(
    recipe: Path,
) -> None:
    root, log = recipe.parent.parent, []
    with pytest.raises(RunnerError, match=f"{CHANGED} while train ran"):
        workspaces.apply(recipe, change_at("stage_started", root / "base", log))
    assert sum(event["event"] == "metrics" for event in log) == 1
    assert not [path for path in (root / "artifacts" / "scratch").iterdir() if path.is_dir()]


def test_a_change_after_a_training_has_read_its_base_model_costs_nothing(recipe: Path) -> None:
    root, log = recipe.parent.parent, []
    workspaces.apply(recipe, change_at("checkpoint", root / "base", log))
    warned = [event["text"] for event in log if event["event"] == "warning"]
    assert [text for text in warned if CHANGED in text] == [
        "the base model changed after train had read it; train is of the old one"
    ]
    assert log[-1]["state"] == "done"
