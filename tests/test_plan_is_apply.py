"""What plan says, apply does: for every single change of a recipe, its stages and its sources."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from runner.engine import lock, recipe
from runner.engine.events import Event
from runner.errors import RecipeError, RunnerError
from runner.stages.schema import Recipe
from tests.workspaces import apply, chat, make, planned, ran

BASE: dict[str, Any] = {
    "name": "small",
    "seed": 17,
    "stages": [
        {"stage": "ingest", "sources": ["chats"]},
        {
            "stage": "clean",
            "refusals": "report",
            "phrases": ["as requested"],
            "forbid": [{"name": "shouting", "pattern": "[A-Z]{9}"}],
            "templates": {"chars": 10},
        },
        {"stage": "window", "mode": "conversational"},
        {"stage": "split", "eval_fraction": 0.2},
    ],
}
SCHEMA = Recipe.model_json_schema()
TEXTS = ("more", "en", "chats", "ingest", "clean", "window", "text")
"""One of these is right for most settings that are a text."""
MOST = 3
"""Other values that are tried of each setting."""


def resolved(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema itself, or the one that it refers to."""
    name = schema.get("$ref", "").rpartition("/")[2]
    return SCHEMA["$defs"][name] if name else schema


def others(schema: Mapping[str, Any], now: Any) -> Iterator[Any]:
    """Values that a setting of this JSON Schema could have beside the one it has."""
    schema = resolved(schema)
    if "anyOf" in schema:
        for one in schema["anyOf"]:
            yield from others(one, now)
    elif "const" in schema:
        yield schema["const"]
    elif "enum" in schema:
        yield from schema["enum"]
    elif schema.get("type") == "boolean":
        yield from (True, False)
    elif schema.get("type") in ("integer", "number"):
        step = schema.get("multipleOf", 1)
        if schema["type"] == "number":
            step = 0.1
        start = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        yield from (start + step, start + 3 * step, 6, 1)
    elif schema.get("type") == "string":
        yield from TEXTS
    elif schema.get("type") == "array":
        items = list(others(schema["items"], None))
        yield from ([item] for item in items)
        yield items[:2]
        yield []
    elif "properties" in schema:
        required = {
            name: next(iter(others(schema["properties"][name], None)), "x")
            for name in schema.get("required", ())
        }
        before = now if isinstance(now, dict) else required
        for name, inner in schema["properties"].items():
            for value in list(others(inner, before.get(name)))[:MOST]:
                yield {**before, name: value}
    elif schema.get("type") == "object":
        yield from ({"name": "Aria"}, {"name": "Aria", "q1": "Bo"})


def is_right(data: Mapping[str, Any]) -> bool:
    try:
        recipe.compile(json.dumps(data).encode(), "recipe.yaml")
    except RecipeError:
        return False
    return True


def of_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every setting of every stage, with other values."""
    for index, stage in enumerate(BASE["stages"]):
        properties = SCHEMA["$defs"][stage["stage"].capitalize()]["properties"]
        for name, schema in properties.items():
            if name == "stage":
                continue
            if name in stage:
                data = deepcopy(BASE)
                del data["stages"][index][name]
                if is_right(data):
                    yield f"{stage['stage']}.{name} taken out", data
            limit = MOST * max(1, len(resolved(schema).get("properties", ())))
            found = 0
            now = stage.get(name, schema.get("default"))
            for value in others(schema, now):
                data = deepcopy(BASE)
                data["stages"][index][name] = value
                if found < limit and value != now and is_right(data):
                    found += 1
                    yield f"{stage['stage']}.{name}={json.dumps(value)}", data
            assert found or name == "input", f"no other value found for {stage['stage']}.{name}"


def of_recipe() -> Iterator[tuple[str, dict[str, Any]]]:
    """The name, the seed, and stages that come, go, or are called something else."""
    yield "another name", {**BASE, "name": "other"}
    yield "another seed", {**BASE, "seed": 18}
    stages = BASE["stages"]
    for index, stage in enumerate(stages):
        without = stages[:index] + stages[index + 1 :]
        if is_right({**BASE, "stages": without}):
            yield f"without {stage['stage']}", {**BASE, "stages": without}
        named = [*stages[:index], {**stage, "name": "renamed"}, *stages[index + 1 :]]
        yield f"{stage['stage']} renamed", {**BASE, "stages": named}
        if stage["stage"] != "ingest":
            twice = [*stages[: index + 1], {**stage, "name": "again"}, *stages[index + 1 :]]
            yield f"{stage['stage']} twice", {**BASE, "stages": twice}
    more = {"stage": "ingest", "name": "more", "sources": ["more"]}
    yield "another ingest", {**BASE, "stages": [stages[0], more, *stages[1:]]}
    other = {"stage": "clean", "name": "other", "normalise": False}
    yield "another clean", {**BASE, "stages": [*stages[:2], other, *stages[2:]]}
    end = {"stage": "window", "name": "end"}
    yield "another window at the end", {**BASE, "stages": [*stages, end]}


CHANGES = dict([*of_settings(), *of_recipe()])


def edited(root: Path) -> None:
    chat(root / "chats" / "chat-0.json", "other", "words")


def written_anew(root: Path) -> None:
    path = root / "chats" / "chat-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))


def grown(root: Path) -> None:
    chat(root / "chats" / "chat-1.json", *[f"{'qa'[n % 2]}{n} of chat 1" for n in range(12)])


def added(root: Path) -> None:
    chat(root / "chats" / "new.json", "new question", "new answer")


def added_twice(root: Path) -> None:
    shutil.copy(root / "chats" / "chat-0.json", root / "chats" / "same.json")


def removed(root: Path) -> None:
    (root / "chats" / "chat-2.json").unlink()


def renamed(root: Path) -> None:
    (root / "chats" / "chat-2.json").rename(root / "chats" / "z.json")


def touched(root: Path) -> None:
    os.utime(root / "chats" / "chat-0.json")


def emptied(root: Path) -> None:
    (root / "chats" / "chat-3.json").write_text("")


def output_gone(root: Path) -> None:
    shutil.rmtree((root / "artifacts" / "small" / "window").resolve())


def lockfile_gone(root: Path) -> None:
    (root / "recipes" / "small.lock").unlink()


def state_gone(root: Path) -> None:
    (root / "artifacts" / "state.db").unlink()


SOURCES: tuple[Callable[[Path], None], ...] = (
    edited,
    written_anew,
    grown,
    added,
    added_twice,
    removed,
    renamed,
    touched,
    emptied,
    output_gone,
    lockfile_gone,
    state_gone,
)


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the recipe has been applied."""
    root = tmp_path_factory.mktemp("applied")
    path = make(root, json.dumps(BASE))
    chat(root / "chats" / "refusing.json", "q", "As an AI language model, I cannot.", "q2", "a2")
    chat(root / "more" / "chat.json", "more", "of it")
    apply(path)
    return root


def check_that_plan_is_apply(path: Path) -> dict[str, str]:
    """The states that were planned, after all that they foretell has been seen to happen."""
    before = lock.read(lock.path_of(path))
    foretold = planned(path)
    states = {name: one.state for name, one in foretold.items()}
    for name, one in foretold.items():
        assert (one.state == "skip") == (not one.causes), name
    log: list[Event] = []
    failed = None
    try:
        apply(path, log.append)
    except RunnerError as error:
        failed = next((e for e in log if e["event"] == "error"), {"message": str(error)})
    started = ran(log)
    if "blocked" in states.values():
        assert failed
        assert log == []
        return states
    if failed:  # as its data is now; the stages below the one that failed were not tried
        assert states[started[-1]] in ("run", "maybe"), failed
        states = dict(list(states.items())[: list(states).index(started[-1]) + 1])
    after = lock.read(lock.path_of(path))
    for name, state in states.items():
        if state == "maybe" and name not in started:
            assert after.of_stage(name) == before.of_stage(name), f"{name} was skipped"
        elif state != "maybe":
            assert (state == "run") == (name in started), f"{name} was to {state}"
    assert started == [name for name in states if name in started], "in the order of the recipe"
    if not failed:
        assert {one.state for one in planned(path).values()} == {"skip"}
        again: list[Event] = []
        apply(path, again.append)
        assert again == []
        assert [fact.stage for fact in after.facts] == list(states)
    return states


@pytest.mark.parametrize("change", CHANGES)
def test_plan_is_apply_for_a_change_of_the_recipe(
    change: str, applied: Path, tmp_path: Path
) -> None:
    shutil.copytree(applied, tmp_path, symlinks=True, dirs_exist_ok=True)
    path = tmp_path / "recipes" / "small.yaml"
    path.write_text(json.dumps(CHANGES[change]))
    check_that_plan_is_apply(path)


@pytest.mark.parametrize("change", SOURCES, ids=lambda change: change.__name__)
def test_plan_is_apply_for_a_change_of_the_files(
    change: Callable[[Path], None], applied: Path, tmp_path: Path
) -> None:
    shutil.copytree(applied, tmp_path, symlinks=True, dirs_exist_ok=True)
    change(tmp_path)
    states = check_that_plan_is_apply(tmp_path / "recipes" / "small.yaml")
    if change in (touched, state_gone, lockfile_gone):
        assert set(states.values()) == {"skip"}
    elif change is output_gone:
        assert states == {"ingest": "skip", "clean": "skip", "window": "run", "split": "skip"}
    else:
        assert states == {"ingest": "run", "clean": "maybe", "window": "maybe", "split": "maybe"}


@pytest.mark.parametrize("change", ["another name", "another seed", "split renamed"])
def test_what_is_outside_the_key_runs_nothing(change: str, applied: Path, tmp_path: Path) -> None:
    shutil.copytree(applied, tmp_path, symlinks=True, dirs_exist_ok=True)
    path = tmp_path / "recipes" / "small.yaml"
    path.write_text(json.dumps(CHANGES[change]))
    assert set(check_that_plan_is_apply(path).values()) == {"skip"}


def test_going_back_while_the_data_changes_is_no_promise_to_run(
    applied: Path, tmp_path: Path
) -> None:
    shutil.copytree(applied, tmp_path, symlinks=True, dirs_exist_ok=True)
    path = tmp_path / "recipes" / "small.yaml"
    path.write_text(json.dumps(CHANGES["split.eval_fraction=0.1"]))
    apply(path)
    path.write_text(json.dumps(BASE))
    written_anew(tmp_path)
    assert planned(path)["split"].state == "maybe"
    log: list[Event] = []
    apply(path, log.append)
    assert ran(log) == ["ingest"]


# The same with a training

TRAINING = """\
name: small
base_model: ./base
stages:
  - {stage: ingest, sources: [chats]}
  - {stage: window}
  - {stage: split, eval_fraction: 0.2}
  - {stage: tokenize, max_tokens: 64}
  - {stage: train, epochs: 1, max_steps: 2, learning_rate: 0.0001, lora: {rank: 2, alpha: 4}}
"""


@functools.cache
def trained() -> Path:
    """A workspace with a trained model of two layers: made once, to be copied."""
    from tests import tiny_models

    root = Path(tempfile.mkdtemp(prefix="runner-trained-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    tiny_models.folder(root / "base")
    apply(make(root, TRAINING))
    return root


def copy_of_trained(root: Path) -> Path:
    """A copy of that workspace in `root`; the path of its recipe."""
    shutil.copytree(trained(), root, symlinks=True, dirs_exist_ok=True)
    return root / "recipes" / "small.yaml"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("epochs: 1,", "epochs: 1.0, micro_batch_size: 2,"),
        ("name: small", "name: other"),
        ("0.0001", "1e-4"),
        ("name: small\n", "# a comment\nname: small\n"),
        ("max_steps: 2, learning_rate: 0.0001", "learning_rate: 0.0001, max_steps: 2"),
        ("epochs: 1,", "epochs: 1, batch_size: 16,"),
        ("name: small\nbase_model: ./base", "base_model: base\nname: small"),
    ],
)
def test_a_training_does_not_run_again_for_what_is_outside_its_key(
    before: str, after: str, tmp_path: Path
) -> None:
    path = copy_of_trained(tmp_path)
    text = path.read_text().replace(before, after)
    assert text != path.read_text()
    path.write_text(text)
    assert set(check_that_plan_is_apply(path).values()) == {"skip"}


@pytest.mark.parametrize(
    ("before", "after", "runs", "may"),
    [
        ("0.0001", "0.0002", ["train"], []),
        ("name: small", "name: small\nseed: 3", ["train"], []),
        ("max_tokens: 64", "max_tokens: 2000", ["tokenize"], ["train"]),
        ("eval_fraction: 0.2", "eval_fraction: 0.21", ["split"], ["tokenize", "train"]),
    ],
)
def test_plan_is_apply_for_a_training(
    before: str, after: str, runs: list[str], may: list[str], tmp_path: Path
) -> None:
    path = copy_of_trained(tmp_path)
    path.write_text(path.read_text().replace(before, after))
    states = check_that_plan_is_apply(path)
    assert [name for name, state in states.items() if state == "run"] == runs
    assert [name for name, state in states.items() if state == "maybe"] == may
