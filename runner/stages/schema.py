"""What a recipe may say: a name, a base model, and the list of stages.

A new stage is a file here and a line in `AnyStage`.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import Field, field_validator

from runner.stages.clean import Clean
from runner.stages.evaluate import Evaluate
from runner.stages.export import Export
from runner.stages.ingest import Ingest
from runner.stages.retrain import Retrain
from runner.stages.split import Split
from runner.stages.stage import NAME, Settings, Stage
from runner.stages.tokenize import Tokenize
from runner.stages.train import Train
from runner.stages.window import Window

AnyStage = Annotated[
    Ingest
    | Clean
    | Window
    | Split
    | Tokenize
    | Train
    | Evaluate
    | Export,
    Field(discriminator="stage"),
]  # fmt: skip

STAGES: dict[str, type[Stage]] = {stage.kind(): stage for stage in get_args(get_args(AnyStage)[0])}

RESERVED_NAMES = (
    *("apply.json", "apply.lock", "cache", "runs", "scratch", "state.damaged", "store", "watch"),
    *("state.db", "state.db-journal", "state.db-shm", "state.db-wal"),
)


class Recipe(Settings):
    """A recipe: what to make a model from, stage by stage."""

    name: Annotated[str, Field(pattern=NAME)]
    """What the model is called; also the folder of its results, `artifacts/<name>`."""
    extends: Annotated[str, Field(min_length=1)] | None = None
    """Another recipe, from this one's folder, whose settings hold where this one says nothing."""
    base_model: Annotated[str, Field(min_length=1)] | None = None
    """The model to start from: folder, .gguf file, package:NAME/FILE, or owner/name of the hub."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    """Where all randomness comes from; the same seed gives the same order and the same start."""
    retrain: Retrain | None = None
    """When `runner watch` trains again, how, and what replaces the current model."""
    stages: Annotated[tuple[AnyStage, ...], Field(min_length=1)]
    """What is done, from top to bottom; a recipe may stop after any stage."""

    @field_validator("name")
    @classmethod
    def _is_not_taken(cls, name: str) -> str:
        if name.lower() in RESERVED_NAMES:
            raise ValueError(f"cannot be {name!r}: artifacts/{name} is the runner's own")
        return name


def json_schema() -> dict[str, Any]:
    """The JSON Schema that editors check and complete recipes with."""
    schema = Recipe.model_json_schema()
    schema["required"].remove("stages")
    schema["anyOf"] = [{"required": ["stages"]}, {"required": ["extends"]}]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "recipe.schema.json",
        **schema,
    }
