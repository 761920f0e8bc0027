"""Pydantic's findings as sentences with the recipe's line, in the words of its writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from runner.engine.words import did_you_mean, shown
from runner.engine.yaml12 import Document
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


def sentences(error: ValidationError, document: Document, name: str) -> list[str]:
    """One `name:line: sentence` for each finding, by line, each said once."""
    found: dict[tuple[int, str], None] = {}
    for finding in error.errors(include_url=False):
        path = _path(finding["loc"], document.data)
        if finding["type"] == "too_short" and finding["input"]:
            continue  # its elements are wrong, which is said of each of them
        line, text = _sentence(finding, path, document)
        found.setdefault((line, text))
    return [f"{name}:{line}: {text}" for line, text in sorted(found)]


def _sentence(finding: Any, path: Path, document: Document) -> tuple[int, str]:
    kind, context, value = finding["type"], finding.get("ctx", {}), finding["input"]
    where, key = _place(path, document.data), str(path[-1]) if path else ""
    line = _line(path, document.lines)
    owner = _place(path[:-1], document.data)
    if kind == "extra_forbidden":
        near = did_you_mean(key, _fields(path[:-1], document.data))
        line = document.key_lines.get(path, line)
        return line, f"no setting named {shown(key)} in {owner}{near}"
    if kind == "missing":
        hint = " (a list of stages)" if key == "stages" else ""
        return line, f"{owner} needs `{key}:`{hint}"
    if kind == "union_tag_not_found":
        return line, f"an entry of stages must say which: `stage: {'` or `'.join(STAGES)}`"
    if kind == "union_tag_invalid":
        tag = str(context["tag"])
        line = _line((*path, "stage"), document.lines)
        near = did_you_mean(tag, STAGES)
        return line, f"no stage named {shown(tag)}{near}; stages are {', '.join(STAGES)}"
    if kind in WANTED:
        return line, f"{where} must be {WANTED[kind]}, not {shown(value)}"
    if kind == "literal_error":
        wanted = context["expected"]
        near = did_you_mean(value, _words(wanted)) if isinstance(value, str) else ""
        return line, f"{where} must be {wanted}, not {shown(value)}{near}"
    if kind == "value_error":
        return line, f"{where or owner} {context['error']}"
    if kind == "string_pattern_mismatch":
        return line, f"{where} may have letters, digits, `.`, `_` and `-` only, not {shown(value)}"
    if kind in ("too_short", "string_too_short"):
        return line, f"{where} must not be empty"
    message = finding["msg"]
    return line, f"{where} {message[0].lower()}{message[1:]}, not {shown(value)}".replace(
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


def _place(path: Path, data: Any) -> str:
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


def _line(path: Path, lines: Mapping[Path, int]) -> int:
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


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
