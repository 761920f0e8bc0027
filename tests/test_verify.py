"""`runner verify` says what is right and what is not, and touches nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from runner.engine import facts, key, opened, store, verify
from runner.engine.facts import Made
from runner.engine.workspace import Workspace
from runner.stages import window
from tests.workspaces import DATA_RECIPE, apply, chat, make, planned, run, states


def found(recipe: Path, *, rebuild: bool = True) -> dict[str, verify.Checked]:
    with opened.at(recipe) as current:
        return {one.stage: one for one in verify.outputs(current, rebuild=rebuild)}


def found_states(recipe: Path, *, rebuild: bool = True) -> list[str]:
    return [one.state for one in found(recipe, rebuild=rebuild).values()]


def output_of(recipe: Path, stage: str) -> Path:
    output = planned(recipe)[stage].output
    assert output is not None
    return store.path_of(Workspace(recipe.parents[1]), output)


def snapshot(root: Path) -> dict[str, Any]:
    """Every file and link of a workspace but what may be deleted at no cost but time."""
    return {
        path.relative_to(root).as_posix(): str(path.readlink())
        if path.is_symlink()
        else (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if (path.is_file() or path.is_symlink())
        and not path.name.startswith("state.db")
        and not path.is_relative_to(root / "artifacts" / "cache")
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    recipe = make(tmp_path)
    apply(recipe)
    return recipe


def test_data_is_made_again_and_comes_out_as_it_was(recipe: Path) -> None:
    done = run("verify", recipe)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        f"{stage}: its output has its hash, and came out again"
        for stage in ("ingest", "window", "split")
    ]


def test_quick_only_hashes(recipe: Path) -> None:
    done = run("verify", recipe, "--quick")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        f"{stage}: its output is there and has its hash" for stage in ("ingest", "window", "split")
    ]


def test_the_json_has_one_record_for_each_stage(recipe: Path) -> None:
    done = run("verify", recipe, "--quick", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == [
        {
            "stage": stage,
            "output": planned(recipe)[stage].output,
            "state": "whole",
            "text": "its output is there and has its hash",
        }
        for stage in ("ingest", "window", "split")
    ]


def test_of_what_never_ran_there_is_nothing_to_check(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    done = run("verify", recipe)
    assert done.returncode == 3
    assert "the lockfile names no output yet" in done.stderr
    assert done.stdout.splitlines()[0] == "ingest: the lockfile says nothing of it yet"
    assert found_states(recipe) == ["nothing"] * 3


def a_flipped_bit(folder: Path) -> None:
    path = next(folder.glob("*.jsonl"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    times = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def a_missing_file(folder: Path) -> None:
    next(folder.glob("*.jsonl")).unlink()


def an_extra_file(folder: Path) -> None:
    (folder / "extra").touch()


@pytest.mark.parametrize("harm", [a_flipped_bit, a_missing_file, an_extra_file])
@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_damage_is_found(recipe: Path, harm: Callable[[Path], None], quick: tuple[str]) -> None:
    path = output_of(recipe, "window")
    harm(path)
    done = run("verify", recipe, *quick)
    assert done.returncode == 1
    assert f"window: its output is damaged: {path}" in done.stdout.splitlines()
    assert done.stderr == (
        "runner: window: not there, or not what the lockfile says\n"
        f"  `runner apply {recipe} --paranoid` makes again what can be made again\n"
    )
    assert run("apply", recipe, "--paranoid").returncode == 0
    assert run("verify", recipe).returncode == 0


def test_a_missing_output_is_found_and_what_reads_it_is_not_made_again(recipe: Path) -> None:
    shutil.rmtree(output_of(recipe, "ingest"))
    one = found(recipe)
    assert (one["ingest"].state, one["window"].state) == ("missing", "whole")
    assert one["window"].text.endswith("not made again, because what it reads is not whole")
    done = run("verify", recipe, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)[0]["state"] == "missing"
    assert done.stderr == ""


def test_data_that_comes_out_different_is_named_with_its_files(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains, numbers = window.chains, count()

    def other(*given: Any, **settings: Any) -> Iterator[dict[str, Any]]:
        yield from chains(*given, **settings)
        yield {"run": next(numbers)}

    monkeypatch.setattr(window, "chains", other)
    one = found(recipe)
    assert [checked.state for checked in one.values()] == ["rebuilt", "differs", "rebuilt"]
    assert one["window"].text.startswith("made again, it comes out different: chains.jsonl; ")
    assert not one["window"].is_right


def test_what_the_recipe_would_make_otherwise_now_is_only_hashed(recipe: Path) -> None:
    chat(recipe.parents[1] / "chats" / "new.json", "new", "data")
    recipe.write_text(recipe.read_text().replace("0.2", "0.3"))
    one = found(recipe)
    assert [checked.state for checked in one.values()] == ["whole"] * 3
    assert "not made again: 1 file added: chats/new.json" in one["ingest"].text
    assert "eval_fraction 0.2 → 0.3" in one["split"].text
    assert run("verify", recipe).returncode == 0


def test_a_recipe_with_missing_data_is_still_checked(recipe: Path) -> None:
    shutil.rmtree(recipe.parents[1] / "chats")
    assert found_states(recipe) == ["whole"] * 3


def test_it_changes_nothing(recipe: Path) -> None:
    for harm in (lambda path: None, a_flipped_bit):
        harm(output_of(recipe, "window"))
        before = snapshot(recipe.parents[1])
        run("verify", recipe)
        run("verify", recipe, "--quick")
        assert snapshot(recipe.parents[1]) == before
    assert list((recipe.parents[1] / "artifacts" / "store" / "tmp").iterdir()) == []


def test_a_killed_verify_leaves_nothing_that_stays(recipe: Path) -> None:
    before = snapshot(recipe.parents[1])
    for moment in range(4):
        with subprocess.Popen(
            [sys.executable, "-m", "runner", "verify", str(recipe)], stdout=subprocess.DEVNULL
        ) as process:
            time.sleep(0.1 + 0.07 * moment)
            process.kill()
    assert found_states(recipe) == ["rebuilt"] * 3
    assert snapshot(recipe.parents[1]) == before


def test_beside_an_apply_neither_harms_the_other(recipe: Path) -> None:
    command = [sys.executable, "-m", "runner"]
    for number in range(4):
        chat(recipe.parents[1] / "chats" / f"new-{number}.json", "new", f"data {number}")
        with (
            subprocess.Popen([*command, "apply", str(recipe)], stdout=subprocess.DEVNULL) as one,
            subprocess.Popen([*command, "verify", str(recipe)], stdout=subprocess.DEVNULL) as other,
        ):
            pass
        assert (one.returncode, other.returncode) == (0, 0)
    assert set(states(recipe).values()) == {"skip"}
    assert found_states(recipe) == ["rebuilt"] * 3


def test_a_trained_model_is_hashed_and_tokens_are_made_again(
    tmp_path: Path, tiny_base: Path
) -> None:
    text = DATA_RECIPE.replace("name: small", f"name: small\nbase_model: {tiny_base}")
    recipe = make(tmp_path, text + "  - stage: tokenize\n  - stage: train\n")
    apply(recipe, only=("ingest", "window", "split", "tokenize"))
    space, parts = Workspace(tmp_path), planned(recipe)["train"].parts
    assert parts is not None
    with store.staging(space) as staging:
        (staging / "model").mkdir()
        (staging / "model" / "adapter.safetensors").write_bytes(b"as if trained")
        output = store.publish(space, staging / "model")
    facts.write(space, Made("train", output, parts, False, 1.0, 13, time.time(), {}, {}))
    apply(recipe)
    assert facts.of_output(space, key.of(parts), output) is not None
    assert found_states(recipe) == ["rebuilt"] * 4 + ["whole"]
    (store.path_of(space, output) / "adapter.safetensors").write_bytes(b"as if Trained")
    assert found_states(recipe, rebuild=False) == ["whole"] * 4 + ["damaged"]
