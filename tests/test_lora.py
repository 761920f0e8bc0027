from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runner.errors import InterruptedRun, RunnerError
from runner.model import adapter, load, lora, score, token_files
from runner.model.load import Dtype
from tests import tiny_models
from tests.test_sft import assert_same_bits, stop_at
from tests.tiny_models import Family

IDS = torch.tensor([[97, 98, 99, 104, 101, 100, 103, 97]])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.folder(tmp_path_factory.mktemp("untied") / "base", tied=False)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found.float()


def assert_merging_keeps_the_logits(base: Path, work: Path) -> None:
    model, is_adapter = adapter.tuned(base, work / "output", dtype="float32", device="cpu")
    assert is_adapter
    adapter.merge(base, work / "output", work / "merged", dtype="float32")
    merged = load.causal_lm(work / "merged", dtype="float32", device="cpu")
    assert (logits(merged) - logits(model)).abs().max() <= 1e-4
    plain = load.causal_lm(base, dtype="float32", device="cpu")
    assert (logits(merged) - logits(plain)).abs().max() > 1e-2


CHOICES: list[dict[str, Any]] = [
    {"rslora": True},
    {"dora": True},
    {"modules_to_save": ("embed_tokens",)},
    {"modules_to_save": ("lm_head",)},
    {"modules_to_save": ("embed_tokens", "lm_head")},
    {"modules_to_save": ("up_proj",)},
    {"dora": True, "rslora": True, "modules_to_save": ("lm_head",)},
]


@pytest.mark.parametrize("settings", CHOICES, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_learned_and_merges_to_the_same_logits(
    settings: dict[str, Any], tied: bool, base: Path, untied: Path, files: Path, tmp_path: Path
) -> None:
    chosen = base if tied else untied
    found = tiny_models.trained(chosen, files, tmp_path, epochs=4, **settings)
    assert found["eval_loss"] < found["eval_loss_before"] - 0.3
    model, _ = adapter.tuned(chosen, tmp_path / "output", dtype="float32", device="cpu")
    measured = score.mean_loss(model, token_files.read(files / "eval.arrow"))
    assert measured == pytest.approx(found["eval_loss"], rel=1e-5)
    assert_merging_keeps_the_logits(chosen, tmp_path)


@pytest.mark.parametrize("settings", CHOICES, ids=str)
def test_a_stopped_training_ends_with_the_bits_of_an_unbroken_one(
    settings: dict[str, Any], base: Path, files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(base, files, tmp_path / "whole", dropout=0.1, **settings)
    with pytest.raises(InterruptedRun):
        tiny_models.trained(base, files, tmp_path / "cut", dropout=0.1, emit=stop_at(3), **settings)
    tiny_models.trained(base, files, tmp_path / "cut", dropout=0.1, **settings)
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_rslora_scales_by_the_root_of_the_rank(base: Path) -> None:
    model = lora.attach(
        load.causal_lm(base, dtype="float32", device="cpu"),
        rank=16,
        alpha=8,
        dropout=0.0,
        target_modules="all-linear",
        rslora=True,
    )
    scales = {m.scaling["default"] for m in model.modules() if isinstance(m, lora.LoraLayer)}
    assert scales == {8 / math.sqrt(16)}


def test_dora_layers_go_pefts_own_way(base: Path) -> None:
    made = {
        dora: lora.attach(
            load.causal_lm(base, dtype="float32", device="cpu"),
            rank=4,
            alpha=8,
            dropout=0.0,
            target_modules="all-linear",
            dora=dora,
        )
        for dora in (False, True)
    }
    for dora, model in made.items():
        layers = [m for m in model.modules() if isinstance(m, lora.LoraLayer)]
        assert all(("forward" in vars(layer)) != dora for layer in layers)
    # An adapter that has not learned anything changes nothing.
    assert (logits(made[True]) - logits(made[False])).abs().max() <= 1e-5


def test_a_tied_head_stays_tied_and_is_the_embeddings(
    base: Path, files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(base, files, tmp_path, modules_to_save=("lm_head",))
    written = load_file(tmp_path / "output" / lora.WEIGHTS_FILE)
    head = written["base_model.model.lm_head.weight"]
    assert torch.equal(head, written["base_model.model.model.embed_tokens.weight"])
    model: Any
    model, _ = adapter.tuned(base, tmp_path / "output", dtype="float32", device="cpu")
    causal: Any = lora.inner(model)
    assert causal.get_input_embeddings().weight is causal.get_output_embeddings().weight


def test_an_untied_head_alone_leaves_the_embeddings_as_they_were(
    untied: Path, files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(untied, files, tmp_path, modules_to_save=("lm_head",))
    adapter.merge(untied, tmp_path / "output", tmp_path / "merged", dtype="float32")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (untied, tmp_path / "merged")
    )
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_layers_trained_whole_stand_among_layers_of_any_precision(
    family: Family, precision: Dtype, method: str, files: Path, tmp_path: Path
) -> None:
    base = tiny_models.folder(tmp_path / "base", family)
    found = tiny_models.trained(
        base,
        files,
        tmp_path,
        method=method,
        precision=precision,
        dora=True,
        modules_to_save=("embed_tokens",),
        epochs=3,
        learning_rate=3e-3,
    )
    assert found["eval_loss"] < found["eval_loss_before"]
    tensors = load_file(tmp_path / "output" / lora.WEIGHTS_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    opened, _ = adapter.tuned(base, tmp_path / "output", dtype=precision, device="cpu")
    assert score.mean_loss(opened, token_files.read(files / "eval.arrow")) > 0


def test_an_unknown_layer_to_save_is_refused_with_the_names_there_are(
    base: Path, files: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunnerError, match=r"modules_to_save: .* no layer named 'embd'") as caught:
        tiny_models.trained(base, files, tmp_path, modules_to_save=("embd",))
    assert "embed_tokens, lm_head, down_proj" in caught.value.hint


def test_a_layer_in_4_bits_is_not_trained_whole(base: Path, files: Path, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="'up_proj' is held in 4 bits"):
        tiny_models.trained(base, files, tmp_path, method="qlora", modules_to_save=("up_proj",))
