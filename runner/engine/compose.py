"""A recipe from its parts: the base that it extends, the recipe itself, and `--set` over both.

Each part changes those before it: mappings key by key, stages by name, all else as a whole. Every
value keeps the place where it was written, so that a mistake is shown where it can be mended.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from runner.engine import yaml12
from runner.engine.recipe import RecipeProblems, read_bytes
from runner.engine.words import SHOWN_MAX, did_you_mean, escaped, shown
from runner.errors import RecipeError
from runner.stages.schema import Recipe

FILE_ONLY = ("name", "extends", "stages")
"""What a recipe says of itself, and `--set` does not change."""


class Place(NamedTuple):
    """Where a value was written: a file and its line, or `--set …` and 0."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Composed:
    """What the parts say together, with the place of each value and of each key by path."""

    data: Any
    places: dict[yaml12.Path, Place]
    key_places: dict[yaml12.Path, Place]
    base_sha256: str | None

    def place(self, path: yaml12.Path, *causes: yaml12.Path) -> Place:
        """Where the value at `path`, or the nearest around it, was written.

        One of `causes` that another file wrote goes before it: that is the change that was wrong.
        """
        while path not in self.places:
            path = path[:-1]
        own = self.places[path]
        found = (self.places.get(cause, own) for cause in causes)
        return next((place for place in found if place.file != own.file), own)


def whole(written: yaml12.Document, name: str, overrides: Sequence[str]) -> Composed:
    """The recipe `written` in the file `name`, over its base and under `overrides` in their order.

    Raises RecipeProblems for parts that do not fit; whether the whole is right is not checked.
    """
    tree, sha256 = _tree(written, name), None
    if isinstance(tree.value, dict):
        extends = tree.value.get("extends")
        if extends and isinstance(extends.value, str) and extends.value:
            base, sha256 = _base(extends, name)
            tree = _extended(base, tree)
        stages = tree.value.get("stages")
        if stages and stages.value and isinstance(stages.value, list):  # else the check says so
            tree = _overridden(tree, overrides)
    places: dict[yaml12.Path, Place] = {}
    key_places: dict[yaml12.Path, Place] = {}
    return Composed(_plain(tree, (), places, key_places), places, key_places, sha256)


@dataclass(frozen=True, slots=True)
class _Node:
    """A value and the places where it and its key were written."""

    value: Any  # a scalar, list[_Node] or dict[str, _Node]
    place: Place
    key_place: Place


def _tree(document: yaml12.Document, file: str, *, has_lines: bool = True) -> _Node:
    def node(data: Any, path: yaml12.Path) -> _Node:
        line = document.lines[path] if has_lines else 0
        key_line = document.key_lines.get(path, line) if has_lines else 0
        if isinstance(data, list):
            data = [node(item, (*path, index)) for index, item in enumerate(data)]
        elif isinstance(data, dict):
            data = {key: node(item, (*path, key)) for key, item in data.items()}
        return _Node(data, Place(file, line), Place(file, key_line))

    return node(document.data, ())


def _plain(
    node: _Node,
    path: yaml12.Path,
    places: dict[yaml12.Path, Place],
    key_places: dict[yaml12.Path, Place],
) -> Any:
    places[path], key_places[path] = node.place, node.key_place
    if isinstance(node.value, list):
        return [_plain(n, (*path, i), places, key_places) for i, n in enumerate(node.value)]
    if isinstance(node.value, dict):
        return {k: _plain(n, (*path, k), places, key_places) for k, n in node.value.items()}
    return node.value


def _merged(under: _Node, over: _Node) -> _Node:
    """`over`, and what only `under` says; a mapping that is in both keeps its place."""
    if not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    both = dict(under.value)
    for key, node in over.value.items():
        both[key] = _merged(both[key], node) if key in both else node
    return replace(under, value=both)


def _by_name(stages: Sequence[_Node]) -> dict[str, int]:
    """The first stage of each name; one that says neither `name:` nor `stage:` is left out."""
    found: dict[str, int] = {}
    for index, stage in enumerate(stages):
        if name := _name(stage):
            found.setdefault(name, index)
    return found


def _name(stage: _Node) -> str:
    said = [stage.value.get(k) for k in ("name", "stage")] if isinstance(stage.value, dict) else []
    return next((node.value for node in said if node and isinstance(node.value, str)), "")


# The base


def _base(extends: _Node, name: str) -> tuple[_Node, str]:
    """The recipe that the one in the file `name` extends, and the hash of its bytes."""
    path = Path(name).parent / extends.value
    try:
        data = read_bytes(path)
    except RecipeError as error:
        raise _problem(extends.place, f"{error.message}; correct `extends:`") from None
    if os.path.realpath(path) == os.path.realpath(name):
        raise _problem(extends.place, "a recipe cannot extend itself; correct `extends:`")
    base = _tree(yaml12.load(data, name=str(path)), str(path))
    if not isinstance(base.value, dict):
        sentence = f"{extends.place} extends this file, which has no settings; write some"
        raise _problem(base.place, sentence)
    if third := base.value.get("extends"):
        sentence = f"{extends.place} extends this recipe, which then cannot extend another"
        raise _problem(third.key_place, f"{sentence}; put all that is shared into one file")
    return base, hashlib.sha256(data).hexdigest()


def _extended(base: _Node, own: _Node) -> _Node:
    """The recipe `own` over its base, whose name is not inherited: results go by it."""
    nameless = replace(base, value={k: v for k, v in base.value.items() if k != "name"})
    value = _merged(nameless, own).value
    under, over = base.value.get("stages"), own.value.get("stages")
    if under and over and isinstance(under.value, list) and isinstance(over.value, list):
        value["stages"] = replace(over, value=_stages(under.value, over.value))
    return replace(own, value=value)


def _stages(base: Sequence[_Node], own: Sequence[_Node]) -> list[_Node]:
    """The base's stages as `own` changes them, and new ones.

    A new one goes after the one written above it. Those at the top go before the first below them
    that the base has, or to the end where it has none.
    """
    known = _by_name(base)
    groups = [[stage] for stage in base]  # each with the new ones after it
    top: list[_Node] = []
    top_at = len(base)
    group = top
    problems: list[str] = []
    for stage in own:
        index = known.pop(_name(stage), None)  # a second one of that name is new, and refused later
        if index is None:
            group.append(stage)
            continue
        if group is top:
            top_at = index
        group = groups[index]
        was, now = group[0].value.get("stage"), stage.value.get("stage")
        if was and now and was.value != now.value:
            sentence = f"{_name(stage)} is a stage {shown(was.value)} at {was.place}"
            problems.append(f"{now.place}: {sentence}; give this one a `name:` of its own")
        group[0] = _merged(group[0], stage)
    if problems:
        raise RecipeProblems(problems)
    groups.insert(top_at, top)
    return [stage for group in groups for stage in group]


# --set


def _overridden(tree: _Node, overrides: Sequence[str]) -> _Node:
    problems: list[str] = []
    for text in overrides:
        try:
            tree = _with_override(tree, text)
        except RecipeProblems as error:
            problems += error.problems
    if problems:
        raise RecipeProblems(problems)
    return tree


def _with_override(tree: _Node, text: str) -> _Node:
    """The tree with `text`, STAGE.SETTING=VALUE or SETTING=VALUE, over it."""
    word = escaped(text)
    place = Place(f"--set {word if len(word) <= SHOWN_MAX else word[: SHOWN_MAX - 1] + '…'}", 0)
    setting, equals, value = text.partition("=")
    stages = tree.value["stages"]
    known = _by_name(stages.value)
    # A name may have dots, so that one stage's can be the beginning of another's.
    stage = max((name for name in known if setting.startswith(f"{name}.")), key=len, default=None)
    keys = (setting[len(stage) + 1 :] if stage else setting).split(".")
    if not equals:
        raise _problem(place, "there is no `=`; write STAGE.SETTING=VALUE")
    if wrong := _not_settable(setting, stage, keys, list(known)):
        raise _problem(place, wrong)
    try:
        document = yaml12.load(value.encode(errors="surrogatepass"), name=place.file)
    except yaml12.YamlProblems as error:
        raise RecipeProblems([f"{place}: {sentence}" for sentence in error.sentences]) from None
    node = _tree(document, place.file, has_lines=False)
    for key in reversed(keys):
        node = _Node({key: node}, place, place)
    if stage is None:
        return _merged(tree, node)
    changed = list(stages.value)
    changed[known[stage]] = _merged(changed[known[stage]], node)
    return replace(tree, value={**tree.value, "stages": replace(stages, value=changed)})


def _not_settable(setting: str, stage: str | None, keys: list[str], names: list[str]) -> str:
    """Why `--set` cannot set this, or nothing; whether a stage has it, the check will say."""
    top = [field for field in Recipe.model_fields if field not in FILE_ONLY]
    if len(keys) > yaml12.DEPTH_MAX or not setting.isprintable():
        return "no setting has such a name; write STAGE.SETTING=VALUE"
    if keys[0] in (("name", "stage") if stage else FILE_ONLY):
        return f"`{keys[0]}:` is set in the recipe only; change it there"
    if setting in names:
        return f"say which setting of {setting}: {setting}.SETTING=VALUE"
    if stage or keys[0] in top:
        return ""
    near = did_you_mean(keys[0], [*names, *top])
    return f"no stage or setting named {shown(keys[0])}{near}; there are {', '.join(names + top)}"


def _problem(place: Place, sentence: str) -> RecipeProblems:
    return RecipeProblems([f"{place}: {sentence}"])
