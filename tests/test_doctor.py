from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.errors import RecipeError
from runner.ui import doctor
from runner.ui.doctor import Check, Gpu, Machine
from tests.test_memory import QWEN3_4B

RECIPE = """\
name: small
base_model: base
stages:
  - stage: ingest
    sources: [chats]
  - stage: window
  - stage: split
  - stage: tokenize
    max_tokens: 1024
  - stage: train
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose base model is the config of Qwen3-4B alone."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(QWEN3_4B.to_dict()))
    path = tmp_path / "recipes" / "small.yaml"
    path.parent.mkdir()
    path.write_text(RECIPE)
    return path


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runner", "doctor", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )


def record(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_training_that_does_not_fit_exits_3_and_says_what_would(recipe: Path) -> None:
    done = run(recipe, "--memory", "8GB")
    assert done.returncode == 3, done.stderr
    lines = done.stdout.splitlines()
    assert "  does not fit in 8.00 GB; what helps, each on top of the last:" in lines
    helping = lines[-1].strip()
    assert helping.startswith("method: qlora saves ")
    assert helping.endswith(", and then it fits")


def test_a_training_that_fits_exits_0_with_the_micro_batch(recipe: Path) -> None:
    done = run(recipe, "--memory", "8GB", "--set", "train.method=qlora")
    assert done.returncode == 0, done.stderr
    assert "train: qlora, bfloat16, on a GPU, " in done.stdout
    assert "rows of 1,024 tokens a pass, activations computed twice" in done.stdout
    assert "  fits in 8.00 GB" in done.stdout.splitlines()


def test_json_has_every_component_in_bytes(recipe: Path) -> None:
    (found,) = record(recipe, "--memory", "24GB")["trainings"]
    parts = {"weights", "adapter", "gradients", "optimizer", "activations", "loss", "context"}
    assert parts < set(found["bytes"])
    assert found["fits"] is True
    assert found["micro_batch"] >= 1
    assert found["training"]["max_tokens"] == 1024


def test_a_micro_batch_of_the_recipe_is_kept(recipe: Path) -> None:
    setting = "train.micro_batch_size=2"
    (found,) = record(recipe, "--memory", "24GB", "--set", setting)["trainings"]
    assert found["micro_batch"] == 2


def test_the_adapters_shape_and_the_longest_row_count(recipe: Path) -> None:
    def needed(*overrides: str) -> int:
        said = [part for override in overrides for part in ("--set", override)]
        (found,) = record(recipe, "--memory", "80GB", *said)["trainings"]
        return int(found["bytes"]["total"])

    one_row = "train.micro_batch_size=1"
    plain = needed(one_row)
    assert needed(one_row, "train.lora.rank=64") > plain
    assert needed(one_row, "tokenize.max_tokens=512") < plain
    assert needed(one_row, "train.optimizer=adamw_8bit") < plain


@pytest.mark.parametrize(
    "arguments",
    [
        ("--memory", "8GB"),
        ("RECIPE", "--memory", "much"),
        ("RECIPE", "--memory", "0"),
        ("nothing",),
    ],
)
def test_a_wrong_question_exits_2(arguments: tuple[str, ...], recipe: Path) -> None:
    said = [str(recipe) if word == "RECIPE" else word for word in arguments]
    assert run(*said).returncode == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("10 gb", 10 * 10**9),
        ("7.5G", 7_500_000_000),
        ("8GiB", 8 * 2**30),
        ("512MiB", 2**29),
        ("123456", 123456),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert doctor.size_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-8GB", "8 apples", "8GBs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no size"):
        doctor.size_of(text)


def test_without_torch_a_recipe_is_still_weighed(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ModuleNotFoundError(name='torch')")
    done = run(recipe, "--memory", "24GB", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


def test_the_machine_is_described_with_what_to_do(tmp_path: Path) -> None:
    # No driver is looked for, and torch is one that does not start.
    (tmp_path / "torch.py").write_text("raise OSError('libcuda is broken')")
    done = run(PYTHONPATH=str(tmp_path), PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert " Python " in done.stdout
    assert " memory " in done.stdout
    assert " disk " in done.stdout


def test_a_card_is_read_from_what_its_driver_prints(tmp_path: Path) -> None:
    said = "NVIDIA GeForce RTX 4090, 24564, 23028, 8.9"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{said}'\n")
    tool.chmod(0o755)
    code = "from runner.ui import doctor; print(doctor.machine().gpus[0])"
    environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    expected = Gpu("NVIDIA GeForce RTX 4090", 24564 * 2**20, 23028 * 2**20, 8.9)
    assert done.stdout.strip() == repr(expected)


def test_a_card_before_ampere_computes_in_float16() -> None:
    old = Machine((Gpu("RTX 2080", 8 * 10**9, None, 7.5),), 16 * 10**9, None)
    new = Machine((Gpu("RTX 3080", 10 * 10**9, None, 8.6),), 16 * 10**9, None)
    assert doctor.precision_of("auto", "cuda", old) == "float16"
    assert doctor.precision_of("auto", "cuda", new) == "bfloat16"
    assert doctor.precision_of("float32", "cuda", new) == "float32"


def test_the_first_gpu_is_what_a_training_takes() -> None:
    found = Machine((Gpu("a", 8), Gpu("b", 24)), 64, None)
    assert (found.device, found.memory) == ("cuda", 8)
    assert Machine((), 64, None).memory == 64


def test_a_lack_makes_the_exit_code_and_a_note_does_not() -> None:
    lack, note = (Check("a", state, "b") for state in ("lack", "note"))
    assert doctor.exit_code([note], [], []) == 0
    assert doctor.exit_code([lack], [], []) == 3
    assert doctor.exit_code([], [], [{"is_enough": False}]) == 3


def test_a_card_that_torch_cannot_use_is_said() -> None:
    found = Machine((Gpu("RTX 4090", 24 * 10**9),), None, None)
    check = doctor._gpu(found, {"cuda": False, "version": None})
    assert check.state == "note"
    assert "which torch cannot use" in check.text
    assert "install torch for CUDA" in check.advice


@pytest.mark.parametrize(
    ("version", "wanted", "enough"),
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.12.1", "==2.13.0", False),
        ("5.23.0", ">=5.23", True),
        ("5.9", ">=5.23", False),
        ("2026.11.15", ">=2024.11", True),
        ("1", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, wanted: str, enough: bool) -> None:
    assert doctor._is_enough(version, wanted) is enough


def test_a_model_of_an_unknown_kind_is_said_and_is_no_failure(recipe: Path) -> None:
    config = {"model_type": "mamba2", "hidden_size": 64}
    (recipe.parents[1] / "base" / "config.json").write_text(json.dumps(config))
    done = run(recipe, "--memory", "8GB")
    assert done.returncode == 0
    assert "what memory it needs is not known" in done.stdout


@pytest.mark.parametrize("more", [(), ("--memory", "8GB")])
def test_a_base_model_that_is_not_there_exits_3(recipe: Path, more: tuple[str, ...]) -> None:
    recipe.write_text(RECIPE.replace("base_model: base", "base_model: package:no-such/x.gguf"))
    done = run(recipe, *more)
    assert done.returncode == 3
    assert done.stdout.count("the package 'no-such' is not installed") == 1


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in doctor.text([Check("GPU", "ok", "a\x1b[31mb")], [], [])
