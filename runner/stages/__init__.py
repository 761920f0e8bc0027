"""The stages a recipe may list. A new one is a file here and a line in `AnyStage`."""

from __future__ import annotations

import json
from typing import Annotated, Any, get_args

from pydantic import Field, TypeAdapter

from runner.stages.clean import Clean
from runner.stages.evaluate import Evaluate
from runner.stages.export import Export
from runner.stages.ingest import Ingest
from runner.stages.split import Split
from runner.stages.stage import Stage
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


def parsed(entry: dict[str, Any]) -> Stage:
    """The stage that a checked entry of a recipe describes."""
    adapter: TypeAdapter[Any] = TypeAdapter(AnyStage)
    stage: Stage = adapter.validate_json(json.dumps(entry), strict=True)
    return stage
