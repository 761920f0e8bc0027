"""The stages, one file each, named as a recipe names them; `schema.py` lists them all."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.stages.stage import Stage


def parsed(entry: dict[str, Any]) -> Stage:
    """The stage, or part of one, that a checked entry describes; only its own file is imported."""
    from runner.stages.stage import Stage

    kind = entry["stage"]
    module = importlib.import_module(f"runner.stages.{kind.partition('/')[0]}")
    known = (value for value in vars(module).values() if isinstance(value, type))
    tagged = (v for v in known if issubclass(v, Stage) and "stage" in v.model_fields)
    (found,) = (v for v in tagged if v.kind() == kind)
    return found.model_validate_json(json.dumps(entry), strict=True)
