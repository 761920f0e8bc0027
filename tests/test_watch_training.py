"""When a watch trains, and what becomes of a training that a watch does not see the end of."""

import shutil
import signal
import time
from pathlib import Path

import pytest

from tests import tiny_models
from tests.test_plan_is_apply import TRAINING
from tests.watching import Event, Watch, becomes, state
from tests.workspaces import chat, git, make, states

WATCHED = TRAINING.replace("stages:\n", "retrain: {min_new_conversations: 3}\nstages:\n")
LONG = WATCHED.replace("epochs: 1, max_steps: 2", "epochs: 1000, max_steps: 400")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """A workspace whose first training a watch has seen to, and what it said."""
    root = tmp_path_factory.mktemp("first")
    tiny_models.folder(root / "base")
    recipe = make(root, WATCHED.replace("{min_new", "{commit: true, min_new"))
    git(root, "init", "-q", "-b", "main")
    git(root, "config", "user.name", "a")
    git(root, "config", "user.email", "a@b")
    (root / "staged.txt").touch()
    git(root, "add", "staged.txt")
    with Watch(recipe, once=True) as watch:
        assert watch.end(240) == 0
    return root, watch.events


@pytest.fixture
def trained(first: tuple[Path, list[Event]], tmp_path: Path) -> Path:
    """The recipe of a copy of that workspace."""
    ignored = shutil.ignore_patterns(".git")
    shutil.copytree(first[0], tmp_path, symlinks=True, dirs_exist_ok=True, ignore=ignored)
    return tmp_path / "recipes" / "small.yaml"


def test_a_first_training_needs_no_more_than_enough_data(first: tuple[Path, list[Event]]) -> None:
    started = [e["stage"] for e in first[1] if e["event"] == "stage_started"]
    assert started[-1] == "train"
    assert any(e["event"] == "watch" and e["state"] == "done" for e in first[1])


def test_data_is_prepared_at_once_and_a_training_waits_for_enough_of_it(
    trained: Path, tmp_path: Path
) -> None:
    trained.write_text(WATCHED)
    with Watch(trained) as watch:
        assert becomes(lambda: state(tmp_path)["state"] == "idle", 120)
        chat(tmp_path / "chats" / "new-1.json", "a question like no other", "an answer")
        watch.runs("tokenize", 120)
        assert watch.says("waiting", 120)["text"] == (
            "no training yet: 1 of at least 3 new conversations are there"
        )
        assert becomes(lambda: "1 of at least 3" in state(tmp_path)["text"], 120)
        chat(tmp_path / "chats" / "new-2.json", "something else entirely", "well")
        chat(tmp_path / "chats" / "new-3.json", "what of the weather", "rain")
        watch.runs("train", 120)
        watch.says("done", 120)
    assert states(trained)["train"] == "skip"


def test_a_training_outside_its_hours_waits_for_them(trained: Path, tmp_path: Path) -> None:
    hour = time.localtime().tm_hour
    hours = f"{(hour + 2) % 24:02}:00-{(hour + 3) % 24:02}:00"
    text = WATCHED.replace("{min_new", f"{{at: '{hours}', min_new")
    trained.write_text(text.replace("max_steps: 2", "max_steps: 3"))
    with Watch(trained, once=True) as watch:
        assert watch.end(120) == 0
        assert not any(
            e["event"] == "stage_started" and e["stage"] == "train" for e in watch.events
        )
    waits = state(tmp_path)["next"]
    assert 0 < waits["at"] - time.time() <= 2 * 3600
    assert waits["why"] == f"a training starts at {hours} only"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_that_was_under_way_goes_on_at_the_next_start(
    trained: Path, number: int
) -> None:
    every = LONG.replace("max_steps: 400", "max_steps: 400, checkpoints: {every_steps: 5}")
    trained.write_text(every)
    with Watch(trained) as watch:
        watch.until(lambda e: e["event"] == "checkpoint" and e["step"] >= 10, 120)
        code = watch.stop(number)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    trained.write_text(every.replace("min_new_conversations: 3", "at: '03:00-03:01'"))
    with Watch(trained) as watch:
        first = watch.until(lambda e: e["event"] == "metrics" and "step" in e, 120)
        assert first["step"] > 5


def test_a_training_under_way_goes_on_when_the_recipe_changes_and_that_is_said(
    trained: Path, tmp_path: Path
) -> None:
    trained.write_text(LONG)
    with Watch(trained) as watch:
        watch.until(lambda e: e["event"] == "metrics" and "step" in e, 120)
        trained.write_text(LONG.replace("max_steps: 400", "max_steps: 300"))
        said = watch.says("recipe", 60)["text"]
        assert said.startswith("the recipe has changed; the training under way goes on")
        watch.until(lambda e: e["event"] == "metrics" and "step" in e, 60)
        assert state(tmp_path)["state"] == "running"
        assert watch.stop(signal.SIGINT) == 0
        assert any(e.get("state") == "stopping" for e in watch.events)


def test_after_the_training_under_way_the_changed_recipe_is_trained_with(trained: Path) -> None:
    trained.write_text(LONG.replace("max_steps: 400", "max_steps: 60"))
    with Watch(trained, once=True) as watch:
        watch.until(lambda e: e["event"] == "metrics" and "step" in e, 120)
        trained.write_text(LONG.replace("max_steps: 400", "max_steps: 3"))
        watch.says("recipe", 60)
        again = watch.runs("train", 120)
        assert any("max_steps" in cause for cause in again["causes"])
        assert watch.end(120) == 0
    assert states(trained)["train"] == "skip"


def test_an_accepted_model_commits_the_lockfile_and_says_why(
    first: tuple[Path, list[Event]],
) -> None:
    root, _ = first
    said = git(root, "show", "--name-only", "--format=%B", "HEAD")
    assert said.startswith("small: release 1")
    assert "ingest: it has not run yet" in said
    assert said.rstrip().endswith("recipes/small.lock")
    assert git(root, "diff", "--cached", "--name-only") == "staged.txt\n"
