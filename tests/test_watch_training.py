"""When a watch trains, and what becomes of a training that a watch does not see the end of."""

import signal
import time
from pathlib import Path

import pytest

from tests import tiny_models
from tests.test_plan_is_apply import TRAINING
from tests.watching import Watch, becomes, state
from tests.workspaces import chat, git, make, states

WATCHED = TRAINING.replace("stages:\n", "retrain: {min_new_conversations: 3}\nstages:\n")
LONG = WATCHED.replace("epochs: 1, max_steps: 2", "epochs: 1000, max_steps: 400")


def trained(root: Path, recipe: str = WATCHED) -> Path:
    tiny_models.folder(root / "base")
    return make(root, recipe)


def test_data_is_prepared_at_once_and_a_training_waits_for_enough_of_it(tmp_path: Path) -> None:
    recipe = trained(tmp_path)
    with Watch(recipe) as watch:
        watch.runs("train", 120)
        watch.says("done", 120)
        chat(tmp_path / "chats" / "new-1.json", "a question like no other", "an answer")
        watch.runs("tokenize", 120)
        assert watch.says("waiting", 120)["text"] == (
            "no training yet: 1 of at least 3 new conversations are there"
        )
        assert becomes(lambda: "1 of at least 3" in state(tmp_path)["text"])
        chat(tmp_path / "chats" / "new-2.json", "something else entirely", "well")
        chat(tmp_path / "chats" / "new-3.json", "what of the weather", "rain")
        watch.runs("train", 120)
        watch.says("done", 120)
    assert states(recipe)["train"] == "skip"


def test_a_training_outside_its_hours_waits_for_them(tmp_path: Path) -> None:
    hour = time.localtime().tm_hour
    hours = f"{(hour + 2) % 24:02}:00-{(hour + 3) % 24:02}:00"
    recipe = trained(tmp_path, WATCHED.replace("{min_new", f"{{at: '{hours}', min_new"))
    with Watch(recipe, once=True) as watch:
        assert watch.end(120) == 0
        assert not any(
            e["event"] == "stage_started" and e["stage"] == "train" for e in watch.events
        )
    waits = state(tmp_path)["next"]
    assert 0 < waits["at"] - time.time() <= 2 * 3600
    assert waits["why"] == f"a training starts at {hours} only"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_that_was_under_way_goes_on_at_the_next_start(
    tmp_path: Path, number: int
) -> None:
    recipe = trained(
        tmp_path, LONG.replace("max_steps: 400", "max_steps: 400, checkpoints: {every_steps: 5}")
    )
    with Watch(recipe) as watch:
        watch.until(lambda e: e["event"] == "checkpoint" and e["step"] >= 10, 120)
        code = watch.stop(number)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    recipe.write_text(recipe.read_text().replace("min_new_conversations: 3", "at: '03:00-03:01'"))
    with Watch(recipe) as watch:
        first = watch.until(lambda e: e["event"] == "metrics" and "step" in e, 120)
        assert first["step"] > 5


def test_an_accepted_model_commits_the_lockfile_and_says_why(tmp_path: Path) -> None:
    recipe = trained(tmp_path, WATCHED.replace("{min_new", "{commit: true, min_new"))
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "config", "user.name", "a")
    git(tmp_path, "config", "user.email", "a@b")
    (tmp_path / "staged.txt").touch()
    git(tmp_path, "add", "staged.txt")
    with Watch(recipe, once=True) as watch:
        assert watch.end(120) == 0
    said = git(tmp_path, "show", "--name-only", "--format=%B", "HEAD")
    assert said.startswith("small: release 1")
    assert "ingest: it has not run yet" in said
    assert said.rstrip().endswith("recipes/small.lock")
    assert git(tmp_path, "diff", "--cached", "--name-only") == "staged.txt\n"
