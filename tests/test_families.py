from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Gemma3Config, SiglipVisionConfig
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

from runner.errors import PreconditionError
from runner.model import adapter, families, generate, load, lora, score, token_files
from tests import tiny_models
from tests.tiny_models import Family

FAMILIES: tuple[Family, ...] = ("llama", "qwen3", "gemma3", "smollm2", "gemma3n")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_models.folder(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.token_files(
        tmp_path_factory.mktemp("tokens"),
        tiny_models.conversations(20),
        tiny_models.conversations(3, "eval"),
    )


def losses(work: Path) -> list[float]:
    """The training loss of each step."""
    lines = (work / "output" / "metrics.jsonl").read_text().splitlines()
    return [point["loss"] for line in lines if "loss" in (point := json.loads(line))]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_in_every_method(
    family: Family, method: str, bases: dict[Family, Path], files: Path, tmp_path: Path
) -> None:
    found = tiny_models.trained(bases[family], files, tmp_path, method=method, max_steps=5)
    assert all(math.isfinite(loss) for loss in losses(tmp_path))
    assert found["eval_loss"] < found["eval_loss_before"] - 0.05


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_gemma_3n_learns_in_4_bits(
    precision: load.Dtype, bases: dict[Family, Path], files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(
        bases["gemma3n"], files, tmp_path, method="qlora", precision=precision, max_steps=12
    )
    found = losses(tmp_path)
    assert len(found) == 12
    assert all(math.isfinite(loss) for loss in found)
    assert sum(found[-3:]) < sum(found[:3]) - 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_altup_and_the_head_of_gemma_3n_are_not_quantised(
    dtype: load.Dtype, bases: dict[Family, Path]
) -> None:
    model = load.causal_lm(bases["gemma3n"], dtype=dtype, four_bit=True, device="cpu")
    exact = load_file(bases["gemma3n"] / "model.safetensors")
    for name, parameter in model.named_parameters():
        if "altup" in name or name.startswith(("model.embed_tokens.", "lm_head")):
            assert parameter.dtype == torch.float32, name
            assert torch.equal(parameter, exact[name].to(getattr(torch, dtype)).float()), name
        elif parameter.ndim > 1 and "embed" not in name:
            assert parameter.dtype == torch.uint8, name
    head: Any = model.get_output_embeddings()
    assert type(head) is nn.Linear
    assert head.weight is model.get_input_embeddings().weight


def test_gemma_3n_in_float16_keeps_them_in_float32_without_4_bits_too(
    bases: dict[Family, Path], files: Path, tmp_path: Path
) -> None:
    model = load.causal_lm(bases["gemma3n"], dtype="float16", device="cpu")
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {name for name, _ in model.named_parameters() if "altup" in name} < kept
    assert not any("self_attn" in name or "mlp" in name for name in kept)
    tiny_models.trained(bases["gemma3n"], files, tmp_path, precision="float16", max_steps=4)
    assert all(math.isfinite(loss) for loss in losses(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers(family: Family, bases: dict[Family, Path]) -> None:
    model = load.causal_lm(bases[family], dtype="float32", device="cpu")
    tokenizer = load.tokenizer(bases[family])
    prompts = [[97, 98, 99], list(range(97, 120))]
    found = generate.replies(model, tokenizer, prompts, max_new_tokens=12)
    alone = generate.replies(model, tokenizer, prompts[:1], max_new_tokens=12)
    assert len(found) == 2
    assert found[0] == alone[0]


def test_altup_of_gemma_3n_computes_in_float32(bases: dict[Family, Path]) -> None:
    model: Any = load.causal_lm(bases["gemma3n"], dtype="bfloat16", four_bit=True, device="cpu")
    altup = model.model.layers[0].altup
    seen = []
    altup.prediction_coefs.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    inside = torch.randn(4, 1, 3, 32, dtype=torch.bfloat16)
    assert altup.predict(inside).dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_the_rest_of_gemma_3n_computes_in_the_precision_that_was_asked_for(
    bases: dict[Family, Path],
) -> None:
    model: Any = load.causal_lm(bases["gemma3n"], dtype="bfloat16", four_bit=True, device="cpu")
    seen = []
    model.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda _, args, out: seen.append((args[0].dtype, out.dtype))
    )
    model.train()  # while it evaluates, bitsandbytes packs weights for a kernel with larger blocks
    assert torch.isfinite(model(torch.tensor([[97, 98, 99]])).logits).all()
    assert seen == [(torch.bfloat16, torch.bfloat16)]


def test_what_stays_in_float32_can_be_chosen(bases: dict[Family, Path]) -> None:
    def dtypes(chosen: tuple[str, ...]) -> dict[str, torch.dtype]:
        model = load.causal_lm(
            bases["gemma3n"], dtype="bfloat16", four_bit=True, device="cpu", float32_modules=chosen
        )
        return {name: parameter.dtype for name, parameter in model.named_parameters()}

    name = "model.layers.0.altup.prediction_coefs.weight"
    assert dtypes(())[name] == torch.uint8
    laurel = dtypes(("laurel",))
    assert laurel["model.layers.0.laurel.linear_left.weight"] == torch.float32
    assert laurel[name] == torch.uint8
    assert laurel["model.embed_tokens.weight"] == torch.bfloat16


def test_adapters_of_gemma_3n_are_only_where_they_should_be(
    bases: dict[Family, Path], files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(bases["gemma3n"], files, tmp_path, method="qlora", max_steps=1)
    names = set(load_file(tmp_path / "output" / lora.WEIGHTS_FILE))
    adapted = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in names}
    assert adapted == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("linear_left", "linear_right", "per_layer_input_gate", "per_layer_projection"),
        "per_layer_model_projection",
    }
    assert not any("altup" in name or "lm_head" in name for name in names)


def test_an_adapter_of_gemma_3n_in_4_bits_merges_onto_the_full_weights(
    bases: dict[Family, Path], files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(bases["gemma3n"], files, tmp_path, method="qlora", max_steps=4)
    adapter.merge(bases["gemma3n"], tmp_path / "output", tmp_path / "merged", dtype="float32")
    merged = load.causal_lm(tmp_path / "merged", dtype="float32", device="cpu")
    model, _ = adapter.tuned(bases["gemma3n"], tmp_path / "output", dtype="float32", device="cpu")
    rows = token_files.read(files / "train.arrow")
    assert score.mean_loss(merged, rows) == pytest.approx(score.mean_loss(model, rows), rel=1e-4)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma-3 with a vision tower."""
    folder = tmp_path_factory.mktemp("seeing")
    tiny_models.folder(folder, "gemma3")
    text = json.loads((folder / "config.json").read_text())
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_towers_get_no_adapter(method: str, seeing: Path, files: Path, tmp_path: Path) -> None:
    found = tiny_models.trained(seeing, files, tmp_path, method=method, max_steps=5)
    assert found["eval_loss"] < found["eval_loss_before"] - 0.05
    names = set(load_file(tmp_path / "output" / lora.WEIGHTS_FILE))
    assert names
    assert not any("vision" in name or "multi_modal" in name for name in names)


def test_towers_stay_as_they_are_when_all_else_is_trained(
    seeing: Path, files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(seeing, files, tmp_path, method="full", max_steps=2)
    before = load_file(seeing / "model.safetensors")
    after = load_file(tmp_path / "output" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = torch.equal(tensor, after[name])
        assert same == ("vision" in name or "multi_modal" in name), name


def test_a_model_whose_tower_needs_a_package_says_which(
    bases: dict[Family, Path], tmp_path: Path
) -> None:
    for package in ("timm", "torchvision", "PIL"):
        if _is_installed(package):
            pytest.skip(f"{package} is installed")
    text = json.loads((bases["gemma3n"] / "config.json").read_text())
    whole = {"model_type": "gemma3n", "text_config": text, "vision_config": {}, "audio_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(PreconditionError, match="sees pictures with the help of pillow timm"):
        load.causal_lm(tmp_path, dtype="float32", device="cpu")


def test_a_family_is_known_by_its_config(bases: dict[Family, Path], tmp_path: Path) -> None:
    assert families.of_base(bases["gemma3n"]) is families.GEMMA_3N
    assert families.of_base(bases["gemma3"]) is None
    assert families.of_base(tmp_path) is None
    (tmp_path / "config.json").write_text("[]")
    assert families.of_base(tmp_path) is None


def test_what_is_chosen_for_gemma_3n_is_said_in_words(
    bases: dict[Family, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3n", "vision_config": {}}')
    assert families.choices(tmp_path, "qlora") == (
        "Gemma-3n: altup and lm_head stay in float32, all other linear layers in 4 bits",
        "Gemma-3n: vision and audio towers are frozen and get no adapter",
    )
    assert families.choices(tmp_path, "full") == ("Gemma-3n: vision and audio towers are frozen",)
    assert families.choices(bases["gemma3n"], "lora") == ()
    assert families.choices(bases["llama"], "qlora") == ()


def test_what_a_recipe_keeps_in_float32_itself_is_not_said_as_a_choice(
    bases: dict[Family, Path],
) -> None:
    assert families.choices(bases["gemma3n"], "qlora", ("altup",)) == ()


def test_a_recipe_that_leaves_out_what_gemma_3n_needs_in_float32_is_warned(
    bases: dict[Family, Path],
) -> None:
    def said(*kept: str) -> tuple[str, ...]:
        return families.warnings(
            bases["gemma3n"],
            method="qlora",
            learning_rate=5e-6,
            warmup_fraction=0.1,
            float32_modules=kept,
        )

    (text,) = said("altup")
    assert text.startswith("float32_modules leaves out lm_head")
    assert said("altup", "lm_head", "down_proj") == ()


def test_a_rate_that_is_too_high_for_gemma_3n_is_said_with_one_that_is_not(
    bases: dict[Family, Path],
) -> None:
    def said(**settings: Any) -> tuple[str, ...]:
        usual: dict[str, Any] = {"method": "qlora", "learning_rate": 5e-6, "warmup_fraction": 0.1}
        return families.warnings(bases["gemma3n"], **{**usual, **settings})

    assert said() == ()
    (text,) = said(learning_rate=2e-4)
    assert text.startswith("learning_rate 0.0002 is high for Gemma-3n")
    assert "5e-06 is safe" in text
    (text,) = said(learning_rate=2e-5, warmup_fraction=0.0)
    assert text.startswith("warmup_fraction 0 is short")
    (text,) = said(method="full")
    assert "qlora or lora" in text


def _is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None
