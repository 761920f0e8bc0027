import os
from pathlib import Path

import pytest

from runner import cli
from runner.engine import opened, recipe
from runner.engine.plan import EVERYTHING
from runner.errors import RecipeError
from runner.ui import plan as plans
from runner.ui import status
from tests.workspaces import DATA_RECIPE, apply, make, planned, states


def test_two_recipes_of_one_name_do_not_share_results(tmp_path: Path) -> None:
    first = make(tmp_path)
    apply(first)
    second = first.with_name("other.yaml")
    second.write_text(DATA_RECIPE)
    with pytest.raises(RecipeError, match=r"recipes/small\.yaml is called 'small' too"):
        apply(second)
    first.unlink()
    apply(second)  # renamed
    with pytest.raises(RecipeError, match=r"recipes/other\.yaml is called 'small' too"):
        planned(make(tmp_path))


def test_two_spellings_of_a_recipe_do_not_share_a_lockfile(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    recipe.with_suffix(".yml").write_text(DATA_RECIPE)
    with pytest.raises(RecipeError, match=r"would share the lockfile small\.lock"):
        planned(recipe)


def test_a_recipe_reached_through_a_link_is_the_same_one(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    link = recipe.with_name("linked.yaml")
    link.symlink_to(recipe)
    assert set(states(link).values()) == {"skip"}


def test_a_checked_recipe_is_not_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path)
    planned(path)
    monkeypatch.setattr(recipe, "compile", lambda *_: pytest.fail("compiled again"))
    planned(path)


def test_what_a_recipe_extends_or_sets_is_checked_again_when_it_changes(tmp_path: Path) -> None:
    path = make(tmp_path)
    base = path.with_name("base.yaml")
    base.write_text(DATA_RECIPE)
    path.write_text("name: small\nextends: base.yaml\n")
    apply(path)
    base.write_text(DATA_RECIPE.replace("0.2", "0.3"))
    assert states(path)["split"] == "run"
    base.write_text(DATA_RECIPE)
    assert set(states(path).values()) == {"skip"}
    found = planned(path, overrides=["split.eval_fraction=0.4"])["split"]
    assert [cause.text for cause in found.causes] == ["eval_fraction 0.2 → 0.4"]
    base.unlink()
    with pytest.raises(RecipeError, match=r"base\.yaml"):
        planned(path)


def test_a_setting_from_the_command_line_is_recorded(tmp_path: Path) -> None:
    path = make(tmp_path)
    apply(path, overrides=["split.eval_fraction=0.4"])
    assert '"eval_fraction": 0.4' in path.with_suffix(".lock").read_text()
    assert states(path)["split"] == "run"
    apply(path)
    assert set(states(path, overrides=["split.eval_fraction=0.4"]).values()) == {"skip"}


def test_a_recipe_with_a_very_long_name_is_applied(tmp_path: Path) -> None:
    path = make(tmp_path)
    long = path.with_name("я" * 125 + ".yaml")
    assert len(os.fsencode(long.name)) == 255
    path.rename(long)
    apply(long)
    assert set(states(long).values()) == {"skip"}


def test_the_workspace_may_be_named_with_dots_in_it(tmp_path: Path) -> None:
    path = make(tmp_path)
    apply(path)
    with opened.at(path, path.parent / "..") as current:
        assert {step.state for step in current.plan()} == {"skip"}


def test_without_any_marker_paths_start_above_the_folder_recipes(tmp_path: Path) -> None:
    path = make(tmp_path)
    (tmp_path / "pyproject.toml").unlink()
    apply(path)
    assert (tmp_path / "artifacts" / "small" / "split").is_dir()
    assert not (tmp_path / "recipes" / "artifacts").exists()


def test_results_of_other_settings_are_said_to_be_such(tmp_path: Path) -> None:
    path = make(tmp_path)
    apply(path)
    apply(path, overrides=["split.eval_fraction=0.4"])
    with opened.at(path) as current:
        record = status.record(current)
        assert [stage["is_current"] for stage in record["stages"]] == [True, True, False]
        assert "made with other settings" in status.text(record)
        assert "change to what is known of split" in plans.text(plans.shown(current, EVERYTHING))
    assert cli.main(["plan", str(path), "--check"]) == 5
    said: list[str] = []
    apply(path, lambda event: said.append(event["event"]))
    assert said == ["switched"]
    assert cli.main(["plan", str(path), "--check"]) == 0


def test_a_file_that_is_missing_in_the_store_is_noticed_by_the_sizes(tmp_path: Path) -> None:
    path = make(tmp_path)
    apply(path)
    (tmp_path / "artifacts" / "small" / "split" / "chains.jsonl").unlink()
    assert states(path)["split"] == "run"
    apply(path)
    assert (tmp_path / "artifacts" / "small" / "split" / "chains.jsonl").exists()
