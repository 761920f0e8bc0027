"""The export stage: each form with a key of its own, and what is made only on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from runner.engine import lock
from runner.engine.recipe import compile
from runner.stages.export import _trained
from tests.workspaces import DATA_RECIPE, make, run, states

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = (
    DATA_RECIPE.replace("name: small", "name: small\nbase_model: ./base").replace("0.2", "0.3")
    + """\
  - stage: tokenize
  - stage: train
    max_steps: 2
  - stage: export
    merged: false
    gguf: [q8_0]
"""
)


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A workspace in which the recipe was applied once."""
    root = tmp_path_factory.mktemp("applied")
    path = make(root, RECIPE)
    shutil.copytree(tiny_base, root / "base")
    done = run("apply", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.fixture
def recipe(applied: Path, tmp_path: Path) -> Path:
    """A copy of that workspace."""
    root = next(above for above in applied.parents if (above / "artifacts").exists())
    shutil.copytree(root, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy" / applied.relative_to(root)


def ran(path: Path) -> list[str]:
    """What an apply now runs."""
    done = run("apply", path, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return [event["stage"] for event in events if event["event"] == "stage_finished"]


def links(path: Path) -> set[str]:
    folder = path.parents[1] / "artifacts" / "small" / "export"
    return {link.name for link in folder.iterdir()}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_what_is_made_on_the_way_is_not_kept(recipe: Path) -> None:
    assert "small-q8_0.gguf" in links(recipe)
    assert not links(recipe) & {"merged", "unquantised.gguf"}
    store = recipe.parents[1] / "artifacts" / "store"
    kept = {path.name for path in store.rglob("*") if path.is_file()}
    assert not [name for name in kept if name.startswith(("unquantised", "model-00"))]
    assert "model.safetensors" not in kept


def test_nothing_to_do_is_nothing_to_do(recipe: Path) -> None:
    assert set(states(recipe).values()) == {"skip"}
    assert run("apply", recipe).stdout == "nothing to do: everything is up to date\n"
    assert run("plan", recipe, "--check").returncode == 0
    assert run("verify", recipe).returncode == 0


def test_another_level_makes_that_level_alone(recipe: Path) -> None:
    edit(recipe, "[q8_0]", "[q8_0, iq4_nl]")
    before = links(recipe)
    assert states(recipe)["export/q8_0"] == "skip"
    made = ran(recipe)
    on_the_way = ["export/merged", "export/unquantised", "export/importance"]
    assert made[:4] == [*on_the_way, "export/iq4_nl"]
    assert set(made[4:]) <= {"export/card"}
    assert links(recipe) == before | {"small-iq4_nl.gguf"}
    assert set(states(recipe).values()) == {"skip"}


def test_only_levels_of_few_bits_read_an_importance_matrix() -> None:
    def inputs(settings: str) -> dict[str, dict[str, str]]:
        text = RECIPE.replace("gguf: [q8_0]", settings)
        steps = compile(text.encode(), "x.yaml").steps
        return {step.name: step.inputs for step in steps if step.stage == "export"}

    found = inputs("gguf: [f16, q8_0, q4_k_m, iq4_xs, q2_k]")
    plain = {"unquantised": "export/unquantised", "reference": "export/reference"}
    for level in ("f16", "q8_0", "q4_k_m"):
        assert found[f"export/{level}"] == plain
    for level in ("iq4_xs", "q2_k"):
        assert found[f"export/{level}"] == {**plain, "importance": "export/importance"}
    assert found["export/importance"]["tokens"] == "tokenize"
    assert "export/importance" not in inputs("gguf: [f16, q8_0, q4_k_m]")
    off = inputs("gguf: [q8_0, q2_k]\n    importance: off")
    assert off["export/q2_k"] == plain
    assert "export/importance" not in off


def test_a_level_less_removes_its_file(recipe: Path) -> None:
    edit(recipe, "[q8_0]", "[q8_0, f16]")
    ran(recipe)
    edit(recipe, "[q8_0, f16]", "[f16]")
    assert set(ran(recipe)) <= {"export/card"}
    assert "small-f16.gguf" in links(recipe)
    assert "small-q8_0.gguf" not in links(recipe)
    facts = lock.read(recipe.with_suffix(".lock")).facts
    assert "export/q8_0" not in {fact.stage for fact in facts}


def test_the_merged_model_can_be_kept_later(recipe: Path) -> None:
    edit(recipe, "merged: false", "merged: true")
    assert ran(recipe) == ["export/merged", "export/card"]
    assert "merged" in links(recipe)
    edit(recipe, "[q8_0]", "[q8_0, f16]")
    assert "export/merged" not in ran(recipe)


def test_a_level_outside_of_the_recipe_changes_nothing_else(recipe: Path, tmp_path: Path) -> None:
    locked, before = recipe.with_suffix(".lock").read_bytes(), links(recipe)
    done = run("export", recipe, "--gguf", "q4_0", "--to", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "small-q4_0.gguf"
    assert file.read_bytes()[:4] == b"GGUF"
    assert recipe.with_suffix(".lock").read_bytes() == locked
    assert links(recipe) == before
    assert run("plan", recipe, "--check").returncode == 0
    edit(recipe, "[q8_0]", "[q8_0, q4_0]")
    assert states(recipe)["export/q4_0"] == "skip"


def test_a_model_from_elsewhere_is_quantised(tiny_base: Path, tmp_path: Path) -> None:
    done = run("export", tiny_base, "--gguf", "q8_0", "--gguf", "f16", "--to", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "base-q8_0.gguf",
        "base-f16.gguf",
    }


def test_an_adapter_from_elsewhere_is_merged_onto_its_base(recipe: Path, tmp_path: Path) -> None:
    adapter = recipe.parents[1] / "artifacts" / "small" / "export" / "adapter"
    alone = run("export", adapter, "--gguf", "q8_0", "--to", tmp_path)
    assert alone.returncode == 2
    assert "--base" in alone.stderr
    base = recipe.parents[1] / "base"
    done = run("export", adapter, "--base", base, "--gguf", "q8_0", "--to", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    same = recipe.parents[1] / "artifacts" / "small" / "export" / "small-q8_0.gguf"
    (file,) = (tmp_path / "out").iterdir()
    assert abs(file.stat().st_size - same.stat().st_size) < 100_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to export"),
        (["--gguf", "q4_km"], "did you mean 'q4_k_m'"),
        (["--gguf", "q8_0", "--base", "x"], "leave it out"),
    ],
)
def test_what_cannot_be_exported_is_said(recipe: Path, arguments: list[str], said: str) -> None:
    done = run("export", recipe, *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_one_part_can_be_made_alone(recipe: Path) -> None:
    edit(recipe, "[q8_0]", "[q8_0, f16, q4_0]")
    done = run("apply", recipe, "--only", "export/f16", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(recipe)["export/f16"] == "skip"
    assert states(recipe)["export/q4_0"] == "run"


def test_forcing_the_stage_makes_all_of_it(recipe: Path) -> None:
    done = run("apply", recipe, "--force", "export", "--only", "export", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    finished = {event["stage"] for event in events if event["event"] == "stage_finished"}
    assert {"export/merged", "export/unquantised", "export/q8_0", "export/adapter"} <= finished


def test_ollama_is_told_the_command_where_it_is_not_installed(recipe: Path) -> None:
    edit(recipe, "    gguf: [q8_0]", "    gguf: [q8_0]\n    ollama: true")
    assert "export/modelfile" in ran(recipe)
    done = run("export", recipe, "--ollama", "mine", env={"PATH": "/nowhere"})
    assert done.returncode == 3
    assert "ollama create mine -f" in done.stderr


def test_the_card_tells_the_loss_of_the_step_that_was_kept(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "eval_loss": 2.9},
        {"step": 1, "loss": 9.0},
        {"step": 2, "eval_loss": 19.9},
        {"step": 2, "loss": 9.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _trained(tmp_path) == (2, 2.9, 19.9)


def test_a_stage_that_goes_takes_its_files_with_it(recipe: Path) -> None:
    text = recipe.read_text()
    recipe.write_text(text[: text.index("  - stage: export")].replace("0.3", "0.4"))
    assert ran(recipe)
    assert not (recipe.parents[1] / "artifacts" / "small" / "export").exists()
    assert run("plan", recipe, "--check").returncode == 0


def test_a_plan_says_that_a_release_is_to_be_decided(recipe: Path) -> None:
    edit(recipe, "base_model:", "retrain: {}\nbase_model:")
    planned = run("plan", recipe, "--check")
    assert planned.returncode == 5
    assert "current" in planned.stderr
    done = run("apply", recipe)
    assert "release 1: the first model" in done.stdout
    assert run("plan", recipe, "--check").returncode == 0
    current = recipe.parents[1] / "artifacts" / "small" / "current"
    assert {link.name for link in (current / "export").iterdir()} == links(recipe)
