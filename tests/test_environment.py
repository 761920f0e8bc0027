"""Versions and the GPU: kept with each fact, shown as drift, and counted where a recipe says so."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from runner import cli
from runner.engine import environment, facts
from runner.engine.workspace import Workspace
from tests.workspaces import DATA_RECIPE, apply, causes, make, planned, ran, states

COUNTED = DATA_RECIPE.replace(
    "    eval_fraction: 0.2", "    eval_fraction: 0.2\n    rerun_on: [env]"
)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each library says it is; those that are not named are not installed."""
    found = {"rensa": "1.0", "pyarrow": "20.0"}
    monkeypatch.setattr(environment, "_version", found.get)
    return found


def env_of(root: Path, stage: str) -> dict[str, str]:
    (made,) = (made for made in facts.every(Workspace(root)) if made.stage == stage)
    return made.env


def plan_text(recipe: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(["plan", str(recipe)]) == 0
    return capsys.readouterr().out


def test_a_fact_has_the_versions_of_the_libraries_that_its_stage_uses(tmp_path: Path) -> None:
    apply(make(tmp_path))
    python = platform.python_version()
    assert env_of(tmp_path, "split") == {"python": python, "rensa": metadata.version("rensa")}
    assert env_of(tmp_path, "window") == {"python": python}


def test_a_library_that_is_not_installed_has_no_version(
    tmp_path: Path, versions: dict[str, str]
) -> None:
    del versions["rensa"]
    apply(make(tmp_path))
    assert "rensa" not in env_of(tmp_path, "split")
    assert env_of(tmp_path, "ingest")["pyarrow"] == "20.0"


def test_a_stage_that_computes_on_the_gpu_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "gpu", lambda: "NVIDIA H200")
    model = DATA_RECIPE.replace("name: small", "name: small\nbase_model: ./base")
    recipe = make(tmp_path, model + "  - stage: tokenize\n  - stage: train\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    found = {name: environment.of(one.step) for name, one in planned(recipe).items()}
    assert found["train"]["gpu"] == "NVIDIA H200"
    assert "gpu" not in found["tokenize"]


def test_the_name_of_a_gpu_is_read_from_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "NVIDIA", tmp_path)
    monkeypatch.setattr(environment.sys, "platform", "linux")
    environment.gpu.cache_clear()
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        text = f"Model: \t\t NVIDIA A100\nIRQ: {number}\n"
        (tmp_path / str(number) / "information").write_text(text)
    try:
        assert environment.gpu() == "NVIDIA A100, NVIDIA A100"
    finally:
        environment.gpu.cache_clear()


def test_other_versions_are_shown_and_run_nothing(
    tmp_path: Path, versions: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    versions["rensa"] = "2.0"
    assert set(states(recipe).values()) == {"skip"}
    assert plan_text(recipe, capsys) == (
        "nothing to do\n"
        "split was made with others: rensa 1.0 → 2.0 (`rerun_on: [env]` would make it count)\n"
    )
    assert cli.main(["plan", str(recipe), "--json"]) == 0
    drift = {one["stage"]: one["drift"] for one in json.loads(capsys.readouterr().out)}
    assert drift == {"ingest": {}, "window": {}, "split": {"rensa": ["1.0", "2.0"]}}


def test_a_library_that_is_gone_is_drift_too(
    tmp_path: Path, versions: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    del versions["rensa"]
    assert "rensa 1.0 → none" in plan_text(recipe, capsys)


def test_the_same_versions_are_no_drift(
    tmp_path: Path, versions: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make(tmp_path, COUNTED)
    apply(recipe)
    assert plan_text(recipe, capsys) == "nothing to do\n"


def test_a_recipe_may_have_other_versions_run_the_stage_again(
    tmp_path: Path, versions: dict[str, str]
) -> None:
    recipe = make(tmp_path, COUNTED)
    apply(recipe)
    versions["rensa"] = "2.0"
    versions["pyarrow"] = "21.0"  # of ingest, which does not ask for it
    assert states(recipe) == {"ingest": "skip", "window": "skip", "split": "run"}
    (cause,) = planned(recipe)["split"].causes
    assert (cause.reason, cause.text) == ("environment", "rensa 1.0 → 2.0")
    assert (cause.old, cause.new) == ({"rensa": "1.0"}, {"rensa": "2.0"})
    log: list[dict[str, Any]] = []
    apply(recipe, log.append)
    assert ran(log) == ["split"]
    assert set(states(recipe).values()) == {"skip"}
    versions["rensa"] = "1.0"
    assert set(states(recipe).values()) == {"skip"}, "it is known with that version"


def test_where_the_old_versions_are_not_known_it_says_less(
    tmp_path: Path, versions: dict[str, str]
) -> None:
    recipe = make(tmp_path, COUNTED)
    apply(recipe)
    for path in (tmp_path / "artifacts" / "store" / "facts").rglob("*.json"):
        path.unlink()
    versions["rensa"] = "2.0"
    assert causes(recipe, "split") == ["library versions or the GPU are others"]


def test_asking_for_it_is_what_changed_when_it_is_new(
    tmp_path: Path, versions: dict[str, str]
) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    recipe.write_text(COUNTED)
    assert causes(recipe, "split") == ["`rerun_on: [env]` was added"]
    apply(recipe)
    lockfile = recipe.with_suffix(".lock")
    assert '"env": ' in lockfile.read_text()
    for path in (tmp_path / "artifacts" / "store" / "facts").rglob("*.json"):
        path.unlink()
    recipe.write_text(DATA_RECIPE)
    assert causes(recipe, "split") == ["`rerun_on: [env]` was taken out"]


def test_what_was_not_written_down_has_not_changed() -> None:
    assert environment.changes({}, {"python": "3.11"}) == {}
    changed = environment.changes({"a": "1", "b": "1"}, {"a": "2", "c": "1"})
    assert changed == {"a": ("1", "2"), "b": ("1", "none"), "c": ("none", "1")}
