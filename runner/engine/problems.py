"""Pydantic's findings as sentences with the recipe's line, in the words of its writer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from runner.engine.compose import Composed, Place
from runner.engine.words import did_you_mean, shown
from runner.stages.retrain import WRITTEN
from runner.stages.schema import STAGES, Recipe

Path = tuple[str | int, ...]

WANTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "settings, one `key: value` a line",
    "model_type": "settings, one `key: value` a line",
    "model_attributes_type": "settings, one `key: value` a line",
}


def sentences(error: ValidationError, recipe: Composed) -> list[str]:
    """One `file:line: sentence` for each finding, by place, each said once."""
    found: dict[tuple[Place, str], None] = {}
    for finding in error.errors(include_url=False):
        path = _path(finding["loc"], recipe.data)
        if finding["type"] == "too_short" and finding["input"]:
            continue  # its elements are wrong, which is said of each of them
        found.setdefault(_sentence(finding, path, recipe))
    return [f"{place}: {text}" for place, text in sorted(found)]


def _sentence(finding: Any, path: Path, recipe: Composed) -> tuple[Place, str]:
    kind, context, value = finding["type"], finding.get("ctx", {}), finding["input"]
    where, key = _words_for(path, recipe.data), str(path[-1]) if path else ""
    place = recipe.place(path)
    owner = _words_for(path[:-1], recipe.data)
    if kind == "extra_forbidden":
        near = did_you_mean(key, _fields(path[:-1], recipe.data))
        place = recipe.key_places.get(path, place)
        return place, f"no setting named {shown(key)} in {owner}{near}"
    if kind == "missing":
        hint = " (a list of stages)" if key == "stages" else ""
        return place, f"{owner} needs `{key}:`{hint}"
    if kind == "union_tag_not_found":
        return place, f"an entry of stages must say which: `stage: {'` or `'.join(STAGES)}`"
    if kind == "union_tag_invalid":
        tag = str(context["tag"])
        place = recipe.place((*path, "stage"))
        near = did_you_mean(tag, STAGES)
        return place, f"no stage named {shown(tag)}{near}; stages are {', '.join(STAGES)}"
    if kind in WANTED:
        return place, f"{where} must be {WANTED[kind]}, not {shown(value)}"
    if kind == "literal_error":
        wanted = context["expected"]
        near = did_you_mean(value, _words(wanted)) if isinstance(value, str) else ""
        return place, f"{where} must be {wanted}, not {shown(value)}{near}"
    if kind == "value_error":
        text = str(context["error"])
        # Of settings that do not agree, the text names those that another file may have changed.
        place = recipe.place(path, *((*path, word) for word in re.findall(r"\w+", text)))
        return place, f"{where or owner} {text}"
    if kind == "string_pattern_mismatch" and context["pattern"] in WRITTEN:
        return place, f"{where} cannot be {shown(value)}; {WRITTEN[context['pattern']]}"
    if kind == "string_pattern_mismatch":
        return place, f"{where} may have letters, digits, `.`, `_` and `-` only, not {shown(value)}"
    if kind in ("too_short", "string_too_short"):
        return place, f"{where} must not be empty"
    message = finding["msg"]
    return place, f"{where} {message[0].lower()}{message[1:]}, not {shown(value)}".replace(
        "input should be", "must be"
    )


def _path(location: Sequence[str | int], data: Any) -> Path:
    """The place in the recipe: without the tags that pydantic puts into its own."""
    path: list[str | int] = []
    node: Any = data
    for part in location:
        if (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            node = cast(Any, node)[part]
        elif part != location[-1] or part in STAGES or _is_tag(str(part)):
            continue
        else:
            node = None
        path.append(part)
    return tuple(path)


def _is_tag(part: str) -> bool:
    """Pydantic names the members of a union of plain types like this."""
    return part.startswith(("literal[", "tuple[", "constrained-", "function-")) or part in (
        "int",
        "str",
        "float",
        "bool",
    )


def _words_for(path: Path, data: Any) -> str:
    """How a person names the place: `learning_rate in train`, `sources[0] in ingest`."""
    if not path:
        return "the recipe"
    if path[0] == "stages" and len(path) > 1:
        entry = data["stages"][int(path[1])]
        name = entry.get("name") or entry.get("stage") if isinstance(entry, dict) else None
        owner = str(name) if isinstance(name, str) and name else f"stage {int(path[1]) + 1}"
        inside = _joined(path[2:])
        return f"{inside} in {owner}" if inside else owner
    return _joined(path)


def _joined(path: Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def _fields(path: Path, data: Any) -> list[str]:
    """The settings that the mapping at `path` may have."""
    model: type[BaseModel] = Recipe
    if path[:1] == ("stages",) and len(path) > 1:
        entry = data["stages"][int(path[1])]
        model = STAGES.get(entry.get("stage", ""), model)
        for part in path[2:]:
            if isinstance(part, str):
                model = _settings_of(model, part) or model
    return list(model.model_fields)


def _settings_of(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    annotation = model.model_fields[field].annotation
    found = [annotation, *getattr(annotation, "__args__", ())]
    return next((t for t in found if isinstance(t, type) and issubclass(t, BaseModel)), None)


def _words(expected: str) -> list[str]:
    return [word.strip("' ") for part in expected.split(",") for word in part.split(" or ")]
