"""`runner status`: what was made last, what takes the space, and what there is room for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runner.engine import opened, store, usage
from runner.engine.workspace import Workspace
from runner.ui import status
from tests.workspaces import DATA_RECIPE, apply, chat, make, planned, run

STAGE = {"stage", "state", "is_current", "causes", "output"}
STAGE |= {"path", "bytes", "made_at", "seconds", "metrics"}
KINDS = {
    "current results",
    "earlier results",
    "facts",
    "being written",
    "checkpoints",
    "cache",
    "logs of runs",
    "other",
}


def said(*arguments: str | Path, **env: str) -> str:
    done = run(*arguments, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def record(recipe: Path) -> dict[str, Any]:
    with opened.at(recipe) as current:
        return status.record(current)


def counted(*folders: Path) -> int:
    """Bytes of all regular files, as `find -type f` counts them."""
    files = [path for folder in folders for path in folder.rglob("*")]
    return sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())


def fill(space: Workspace) -> None:
    """Something of every kind."""
    for path in (
        space.scratch / "key" / "checkpoint" / "state",
        space.cache / "ingest" / "index.json",
        space.cache / "base" / "model.safetensors",
        space.store / "tmp" / "1-1" / "half",
        space.store / "0a" / "no-artifact",
        space.artifacts / "notes.txt",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)


def test_the_shape_of_the_json_stays(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    found = json.loads(said("status", recipe, "--json"))
    assert list(found) == ["stages", "space", "checkpoints", "releases", "watch"]
    assert [stage["stage"] for stage in found["stages"]] == ["ingest", "window", "split"]
    assert all(set(stage) == STAGE for stage in found["stages"])
    assert set(found["space"]) == {"free", "kinds", "recipes"}
    assert set(found["space"]["kinds"]) == KINDS
    assert set(found["space"]["recipes"]["small"]) == {"ingest", "window", "split"}
    assert found["checkpoints"] == {}


def test_before_the_first_apply_there_is_nothing(tmp_path: Path) -> None:
    found = record(make(tmp_path))
    assert {stage["output"] for stage in found["stages"]} == {None}
    assert [stage["bytes"] for stage in found["stages"]] == [0, 0, 0]
    assert found["space"]["kinds"]["current results"] == 0
    assert found["space"]["recipes"] == {}
    assert "space: " in status.text(found)


def test_the_kinds_add_up_to_all_files_there_are(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    chat(tmp_path / "chats" / "new.json", "new", "data")
    apply(recipe)
    space = Workspace(tmp_path)
    fill(space)
    found = usage.of(space)
    assert sum(found.kinds.values()) == counted(space.artifacts)
    assert set(found.kinds) == KINDS
    assert all(found.kinds.values())
    assert found.kinds["checkpoints"] == found.kinds["being written"] == 1000
    assert found.kinds["cache"] == counted(space.cache)
    assert found.kinds["logs of runs"] == counted(space.runs)
    assert found.kinds["facts"] == counted(space.store / "facts")


def test_the_kinds_add_up_with_a_shared_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, shared = tmp_path / "work", tmp_path / "shared"
    root.mkdir()
    recipe = make(root)
    apply(recipe)  # which leaves a store of its own, for nothing
    monkeypatch.setenv("RUNNER_STORE", str(shared))
    apply(recipe)
    space = Workspace(root, shared)
    fill(space)
    found = usage.of(space)
    assert sum(found.kinds.values()) == counted(root / "artifacts", shared)
    assert found.kinds["current results"] == sum(found.recipes["small"].values())


def test_a_recipe_has_the_sizes_of_what_its_links_lead_to(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    other = recipe.with_name("other.yaml")
    other.write_text(DATA_RECIPE.replace("name: small", "name: other").replace("0.2", "0.5"))
    apply(other)
    found = usage.of(Workspace(tmp_path))
    for name in ("small", "other"):
        folder = tmp_path / "artifacts" / name
        sizes = {stage: counted(folder / stage) for stage in ("ingest", "window", "split")}
        assert found.recipes[name] == sizes
    shared = found.recipes["small"]["ingest"] + found.recipes["small"]["window"]
    both = shared + found.recipes["small"]["split"] + found.recipes["other"]["split"]
    assert found.kinds["current results"] == both
    assert found.kinds["earlier results"] == 0


def test_results_that_no_link_leads_to_any_more_are_earlier_ones(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    before = usage.of(Workspace(tmp_path)).kinds["current results"]
    chat(tmp_path / "chats" / "chat-0.json", "another", "answer")
    apply(recipe)
    assert usage.of(Workspace(tmp_path)).kinds["earlier results"] == before
    assert f"earlier results {before / 1000:.1f} kB" in said("status", recipe)


def test_the_lines_name_what_was_made_and_what_would_run(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    recipe.write_text(recipe.read_text().replace("0.2", "0.5"))
    lines = said("status", recipe).splitlines()
    assert lines[0].startswith("ingest  up to date · made 20")
    assert "files 6" in lines[0]
    assert lines[2].startswith("split   would run · made 20")
    assert lines[3].startswith("space: current results ")
    assert lines[3].endswith(" free")
    assert lines[4].startswith("  small: ingest ")


def test_a_fact_that_another_user_wrote_cannot_steer_the_terminal(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    for path in (tmp_path / "artifacts" / "store" / "facts").rglob("*.json"):
        fact = json.loads(path.read_bytes())
        path.write_text(json.dumps({**fact, "metrics": {"a": "\x1b[2J"}}))
    assert "\x1b" not in said("status", recipe)
    assert "a \\x1b[2J" in said("status", recipe)


def test_files_that_come_and_go_meanwhile_are_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    (folder / "new").mkdir(parents=True)
    code = (
        "import os, sys, time\nend = time.time() + 2\nwhile time.time() < end:\n"
        "    os.mkdir(sys.argv[1] + '/a'); open(sys.argv[1] + '/a/b', 'w').close()\n"
        "    os.remove(sys.argv[1] + '/a/b'); os.rmdir(sys.argv[1] + '/a')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)]) as process:
        while process.poll() is None:
            assert usage.measured(folder)[0] == 0
    assert usage.measured(tmp_path / "nothing") == (0, 0.0)


def test_links_are_not_followed_and_not_counted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"12345")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "loop").symlink_to("loop")
    (tmp_path / "a" / "again").symlink_to("file")
    assert usage.measured(tmp_path / "a")[0] == 5
    assert usage.measured(tmp_path / "a" / "file")[0] == 5
    assert usage.measured(tmp_path / "a" / "link")[0] == 0


def test_links_that_lead_nowhere_or_in_circles_are_no_harm(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    folder = tmp_path / "artifacts" / "small"
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("../store/ab/" + "ab" * 32)
    found = usage.links(Workspace(tmp_path))["small"]
    assert found["nowhere"] == "ab" * 32
    assert "loop" not in found
    assert set(usage.of(Workspace(tmp_path)).recipes["small"]) == {"ingest", "window", "split"}


def test_a_training_says_how_many_checkpoints_there_is_room_for(
    tmp_path: Path, tiny_base: Path
) -> None:
    text = DATA_RECIPE.replace("name: small", f"name: small\nbase_model: {tiny_base}")
    recipe = make(tmp_path, text + "  - stage: tokenize\n  - stage: train\n")
    found = json.loads(said("status", recipe, "--json"))
    room = found["checkpoints"]["train"]
    assert set(room) == {"bytes", "more"}
    assert room["bytes"] > 100_000
    free = found["space"]["free"]
    assert room["more"] == pytest.approx(free / room["bytes"], rel=0.05)
    last = said("status", recipe).splitlines()[-1]
    assert last.startswith("train: room for ")
    assert last.endswith(("kB", "MB"))


def test_ten_thousand_files_cost_hardly_more_than_looking_at_them(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    space = Workspace(tmp_path)
    for number in range(2500):
        folder = store.path_of(space, f"{number * 7919 % 256:02x}{number:062x}")
        folder.mkdir(parents=True)
        for name in "abcd":
            (folder / name).touch()
    taken: list[tuple[float, float]] = []
    for _ in range(3):
        started = time.perf_counter()
        for folder, _, names in os.walk(space.artifacts):
            for name in names:
                os.lstat(os.path.join(folder, name))  # noqa: PTH118
        looked = time.perf_counter()
        usage.of(space)
        taken.append((time.perf_counter() - looked, looked - started))
    assert min(one for one, _ in taken) < 4 * min(one for _, one in taken) + 0.05
    assert planned(recipe)["split"].state == "skip"
