"""The stages, one file each, named as a recipe names them; `schema.py` lists them all."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.stages.stage import Stage


def parsed(entry: dict[str, Any]) -> Stage:
    """The stage that a checked entry of a recipe describes; only its own file is imported."""
    from runner.stages.stage import Stage

    kind = entry["stage"]
    module = importlib.import_module(f"runner.stages.{kind}")
    known = (value for value in vars(module).values() if isinstance(value, type))
    (found,) = (v for v in known if issubclass(v, Stage) and v is not Stage and v.kind() == kind)
    return found.model_validate_json(json.dumps(entry), strict=True)
