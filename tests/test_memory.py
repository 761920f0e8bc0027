from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen3Config,
)

from runner.engine import compose, yaml12
from runner.model import batches, lora, memory, optimizers, score
from runner.model.memory import Training
from runner.stages import parsed
from runner.ui import doctor

ROOT = Path(__file__).parents[1]

LLAMA_1B = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=True,
)
SMOLLM2_135M = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
QWEN3_4B = Qwen3Config(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
QWEN3_8B = Qwen3Config(
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)
# As google/gemma-3-4b-it says it: what transformers has as defaults is left out.
GEMMA3_4B: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
        "model_type": "siglip_vision_model",
    },
}
GEMMA3N_E4B = Gemma3nTextConfig()
REAL: dict[str, Any] = {
    "SmolLM2-135M": SMOLLM2_135M,
    "Llama-1B": LLAMA_1B,
    "Qwen3-4B": QWEN3_4B,
    "Qwen3-8B": QWEN3_8B,
    "Gemma-3-4B": Gemma3Config(**GEMMA3_4B),
    "Gemma-3n-E4B": GEMMA3N_E4B,
}
GB = 10**9


def model(config: Any) -> memory.Model:
    found = memory.of_config(config if isinstance(config, dict) else config.to_dict())
    assert found is not None
    return found


def tiny(family: str, layers: int = 6) -> Any:
    """A config of narrow layers with attention that is full everywhere."""
    shape: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    full = {"layer_types": ["full_attention"] * layers}
    if family == "llama":
        return LlamaConfig(**shape)
    if family == "qwen3":
        return Qwen3Config(**shape)
    if family == "gemma3":
        return Gemma3TextConfig(**shape, **full)
    return Gemma3nTextConfig(
        **shape,
        **full,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * layers,
    )


@pytest.mark.parametrize("name", REAL)
def test_the_weights_of_a_config_are_those_that_transformers_makes(name: str) -> None:
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(REAL[name])
    real = sum(parameter.numel() for parameter in built.parameters())
    assert model(REAL[name]).parameters == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma3n"])
def test_the_weights_of_a_tiny_config_are_counted_exactly(family: str) -> None:
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(tiny(family))
    real = sum(parameter.numel() for parameter in built.parameters())
    assert model(tiny(family)).parameters == real


def test_a_published_config_may_leave_out_the_defaults() -> None:
    assert model(GEMMA3_4B).parameters == pytest.approx(4.3e9, rel=0.01)


def test_nothing_is_said_of_a_kind_that_is_not_known() -> None:
    assert memory.of_config({"model_type": "mamba2", "hidden_size": 64}) is None


@pytest.mark.parametrize("target_modules", ["all-linear", ("q_proj", "v_proj")])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma3n"])
def test_an_adapter_has_the_weights_that_peft_gives_it(family: str, target_modules: Any) -> None:
    built = AutoModelForCausalLM.from_config(tiny(family))
    adapted = lora.attach(built, rank=8, alpha=8, dropout=0.0, target_modules=target_modules)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    said = memory.estimate(model(tiny(family)), Training(rank=8, target_modules=target_modules))
    assert said.adapter == pytest.approx(4 * trained, rel=0.05)
    assert said.optimizer == 2 * said.gradients == 2 * said.adapter  # 16 bytes each, in all


def kept_by_autograd(built: torch.nn.Module, tokens: int, *, mixed: bool) -> int:
    """Bytes of all storages, parameters aside, that one pass keeps for the way back."""
    parameters = {p.untyped_storage().data_ptr() for p in built.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage
        return tensor

    batch = batches.Batch(torch.randint(2, 100, (1, tokens)), torch.ones(1, tokens), ())
    built.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        loss = score.summed_nll(built, batch)
    del loss
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize(
    ("settings", "within"),
    [
        ({"method": "lora"}, 0.03),
        ({"method": "lora", "precision": "float32"}, 0.07),
        ({"method": "lora", "dropout": 0.05}, 0.05),
        ({"method": "lora", "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}, 0.06),
        ({"method": "full", "precision": "float32"}, 0.1),
        ({"method": "full"}, 0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma3n"])
def test_activations_are_what_autograd_keeps(
    family: str, settings: dict[str, Any], within: float
) -> None:
    training = Training(**settings, max_tokens=192, rank=4, device="cpu")
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(tiny(family))
    if training.method == "lora":
        built = built.to(getattr(torch, training.precision))
        built = lora.attach(
            built,
            rank=training.rank,
            alpha=8,
            dropout=training.dropout,
            target_modules=training.target_modules,
        )
    mixed = training.method == "full" and training.precision == "bfloat16"
    kept = kept_by_autograd(built, 192, mixed=mixed)
    assert memory.estimate(model(tiny(family)), training).activations == pytest.approx(
        kept, rel=0.15 if family == "gemma3n" and training.method == "full" else within
    )


def test_four_bits_spare_embeddings_head_and_norms() -> None:
    found = model(QWEN3_8B)
    held = memory.estimate(found, Training(method="qlora")).weights
    outside = [t for t in found.weights.tensors if t.layer < 0 or len(t.shape) < 2]
    whole = sum(tensor.weights for tensor in outside)
    assert held == pytest.approx(2 * whole + 0.516 * (found.parameters - whole), rel=0.001)


def test_what_gemma_3n_is_careful_with_stays_in_float32() -> None:
    found = model(GEMMA3N_E4B)
    by_role = {t.role: t.weights for t in found.weights.tensors if t.layer < 0}
    head, beside = by_role["token_embd"], by_role["per_layer_token_embd"]
    held = memory.estimate(found, Training(method="qlora")).weights
    linear = found.parameters - head - beside
    assert 4 * head + 2 * beside + 0.516 * linear < held < 4 * head + 2 * beside + 0.65 * linear


def test_full_training_needs_sixteen_bytes_a_weight() -> None:
    found = model(LLAMA_1B)
    said = memory.estimate(found, Training(method="full"))
    assert said.weights + said.gradients + said.optimizer == 16 * found.parameters


def test_a_tower_is_held_and_not_trained() -> None:
    seeing, blind = model(GEMMA3_4B), model({**GEMMA3_4B, "vision_config": None})
    both, one = (memory.estimate(found, Training(method="full")) for found in (seeing, blind))
    assert both.gradients == one.gradients
    assert both.weights > one.weights + 4 * 400e6


def test_eight_bit_state_is_a_quarter_and_paged_state_in_the_computer() -> None:
    found = model(LLAMA_1B)
    plain, eight, paged = (
        memory.estimate(found, Training(method="full", optimizer=name))
        for name in ("adamw", "adamw_8bit", "paged_adamw")
    )
    assert eight.optimizer == pytest.approx(plain.optimizer / 4, rel=0.02)
    assert (paged.optimizer, paged.host) == (0, plain.optimizer)


def test_the_numbers_are_those_of_the_training() -> None:
    assert memory.PASS_TOKENS == batches.PASS_TOKENS
    assert memory._LOGITS_AT_ONCE == score._LOGITS_AT_ONCE
    assert set(memory._STATE_BYTES) == set(get_args(optimizers.Name))


def test_recomputing_keeps_little_more_than_the_inputs_of_layers() -> None:
    found = model(QWEN3_4B)
    kept = memory.estimate(found, Training())
    again = memory.estimate(found, Training(recompute=True))
    assert again.activations < kept.activations / 10
    assert again.total < kept.total - 4 * GB


def test_four_billion_weights_in_four_bits_need_less_than_five_gigabytes() -> None:
    training = Training(method="qlora", recompute=True, target_modules=("q_proj", "v_proj"))
    assert memory.estimate(model(QWEN3_4B), training).total < 5 * GB


@pytest.mark.parametrize("room", [4 * GB, 8 * GB, 24 * GB])
def test_the_largest_micro_batch_fits_and_one_row_more_does_not(room: int) -> None:
    found = model(LLAMA_1B)
    training = Training(recompute=True, max_tokens=512)
    rows = memory.advice(found, training, room).micro_batch
    most = memory.PASS_TOKENS["cuda"] // 512
    needed = [
        memory.estimate(found, replace(training, micro_batch=n)).total for n in (rows, rows + 1)
    ]
    assert needed[0] <= room
    assert rows == most or needed[1] > room


def test_where_nothing_fits_cheaper_settings_come_in_order_until_it_does() -> None:
    advice = memory.advice(model(QWEN3_4B), Training(max_tokens=4096), 5 * GB)
    assert advice.micro_batch == 0
    assert [one.setting for one in advice.cheaper] == [
        "gradient_checkpointing",
        *["max_tokens"] * 4,
        "method",
    ]
    assert [one.fits for one in advice.cheaper] == [False] * 5 + [True]
    saved = sum(one.saves for one in advice.cheaper)
    last = memory.estimate(model(QWEN3_4B), advice.cheaper[-1].training)
    assert advice.estimate.total - saved == last.total <= 5 * GB


def test_where_no_setting_is_enough_a_smaller_model_is_named() -> None:
    advice = memory.advice(model(QWEN3_8B), Training(max_tokens=512), 3 * GB)
    assert not any(one.fits for one in advice.cheaper)
    assert advice.parameters is not None
    assert 1e9 < advice.parameters < 4e9


def test_no_recipe_is_told_to_take_what_it_has_already() -> None:
    training = Training(method="qlora", recompute=True, optimizer="adamw_8bit", rank=4)
    advice = memory.advice(model(QWEN3_8B), replace(training, max_tokens=256), GB)
    assert advice.cheaper == ()


def test_rows_longer_than_a_sliding_window_cost_a_mask() -> None:
    found = model(GEMMA3_4B)
    short, long = (
        memory.estimate(found, Training(max_tokens=tokens, micro_batch=2048 // tokens))
        for tokens in (1024, 2048)
    )
    assert found.sliding_layers == 29
    masks = 29 * 2 * 2048 * 2048
    assert short.activations + masks < long.activations < short.activations + 3 * masks


def first(room: int, *, most: int = 2048, may_recompute: bool = True) -> memory.Pass:
    asked = Training(method="lora", max_tokens=512, device="cpu")
    return memory.first_pass(FIRST, asked, room, most=most, may_recompute=may_recompute)


FIRST = model(LLAMA_1B)


def needed(rows: int, *, recompute: bool = False) -> int:
    asked = Training(
        method="lora", max_tokens=512, device="cpu", micro_batch=rows, recompute=recompute
    )
    return memory.estimate(FIRST, asked).total


def test_a_training_begins_with_all_that_is_wanted_where_it_fits() -> None:
    assert first(needed(4), most=2100) == memory.Pass(2100, False, False)


def test_a_training_begins_with_as_many_rows_as_fit() -> None:
    assert first(needed(4) - 1) == memory.Pass(3 * 512, False, True)
    assert first(needed(1)) == memory.Pass(512, False, True)


def test_activations_are_computed_again_only_where_one_row_does_not_fit_else() -> None:
    assert first(needed(1) - 1).recompute
    assert not first(needed(1) - 1, may_recompute=False).recompute
    assert first(needed(2, recompute=True)) == memory.Pass(2 * 512, True, True)


def test_where_nothing_fits_a_training_begins_with_one_row() -> None:
    assert first(1) == memory.Pass(512, True, True)


def test_a_pass_of_other_tokens_has_rows_that_are_no_longer() -> None:
    asked = Training(max_tokens=512)
    for tokens in (1, 300, 512, 2048, 2033):
        of_pass = memory.of_tokens(asked, tokens)
        assert of_pass.max_tokens <= 512
        assert abs(of_pass.tokens - tokens) < 4


def test_a_line_names_the_sum_its_large_parts_and_whether_it_fits() -> None:
    training = Training(method="qlora", recompute=True)
    said = memory.estimate(model(QWEN3_4B), training)
    line = memory.line(said, training, 8 * GB)
    assert line.startswith("about 4.9 GB of GPU memory with 1 row of 2,048 tokens a pass (weights")
    assert line.endswith(": fits in 8.0 GB")
    assert memory.line(said, training, 4 * GB).endswith(": does not fit in 4.0 GB")


def test_a_measured_peak_stands_beside_what_was_said() -> None:
    said = memory.estimate(model(SMOLLM2_135M), Training())
    text = memory.beside(said, round(said.allocated / 1.1), "cuda")
    assert text.startswith("peak memory ")
    assert text.endswith("was estimated (+10%)")


def test_a_gguf_and_its_folder_need_the_same(smollm2: Path, smollm2_gguf: Path) -> None:
    folder, file = memory.read(smollm2), memory.read(smollm2_gguf)
    assert folder is not None
    assert file is not None
    one, other = (memory.estimate(found, Training()).total for found in (folder, file))
    assert one == pytest.approx(other, rel=1e-3)
    assert folder.parameters == model(SMOLLM2_135M).parameters


def test_a_config_without_weights_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B.to_dict()))
    found = memory.read(tmp_path)
    assert found is not None
    assert found.parameters == model(QWEN3_4B).parameters


@pytest.mark.parametrize("gigabytes", [8, 10, 24])
def test_a_preset_fits_its_card_with_the_model_that_it_names(gigabytes: int) -> None:
    path = ROOT / "recipes" / f"preset-{gigabytes}gb.yaml"
    document = yaml12.load(path.read_bytes(), name=path.name)
    stages = {entry["stage"]: entry for entry in document.data["stages"]}
    assert document.data["base_model"] == "Qwen/Qwen3-4B"
    train: Any = parsed(stages["train"])
    training = doctor.training_of(train, stages["tokenize"]["max_tokens"], "cuda", "bfloat16")
    advice = memory.advice(model(QWEN3_4B), training, gigabytes * GB)
    assert advice.micro_batch >= 2


def test_gemma_3n_trains_in_four_bits_on_24_gigabytes() -> None:
    training = Training(method="qlora", recompute=True, optimizer="paged_adamw")
    assert memory.advice(model(GEMMA3N_E4B), training, 24 * GB).micro_batch >= 1


@pytest.mark.parametrize("gigabytes", [8, 10, 24])
def test_a_recipe_of_ones_own_extends_a_preset(gigabytes: int, tmp_path: Path) -> None:
    base = ROOT / "recipes" / f"preset-{gigabytes}gb.yaml"
    (tmp_path / base.name).write_bytes(base.read_bytes())
    own = f"name: my\nextends: {base.name}\nstages:\n  - stage: ingest\n    sources: [chats]\n"
    written = yaml12.load(own.encode(), name="my.yaml")
    composed = compose.whole(written, str(tmp_path / "my.yaml"), ())
    assert composed.data["stages"][0]["sources"] == ["chats"]
    for entry in composed.data["stages"]:
        assert parsed(entry).kind() == entry["stage"]


def test_an_estimate_needs_no_torch() -> None:
    code = (
        "import sys; from runner.model import memory; from runner.ui import doctor;"
        "heavy = {'torch', 'numpy', 'transformers', 'peft'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
