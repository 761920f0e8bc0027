from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from runner.model import checkpoint, gguf, gguf_header, load, lora, sft, weights
from runner.stages import train
from tests import test_gguf, tiny_models
from tests.tiny_models import Family

# Files that this runner exported from SmolLM2-135M, measured.
SMOLLM2_BYTES: dict[weights.Level, int] = {
    "f16": 270_885_728,
    "q8_0": 144_810_848,
    "q4_k_m": 105_453_920,
}


def safetensors(path: Path, shapes: dict[str, list[int]], **config: Any) -> Path:
    """A model folder whose weights are a header alone."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    header = json.dumps(
        {
            name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
            for name, shape in shapes.items()
        }
    ).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def read(base: Path) -> weights.Weights:
    found = weights.read(base)
    assert found is not None
    return found


@pytest.mark.parametrize("level", SMOLLM2_BYTES)
def test_a_gguf_is_as_large_as_was_said(smollm2: Path, level: weights.Level) -> None:
    assert read(smollm2).gguf_bytes(level) == pytest.approx(SMOLLM2_BYTES[level], rel=1e-3)


def test_a_gguf_and_its_safetensors_are_one_model(smollm2: Path, smollm2_gguf: Path) -> None:
    folder, file = read(smollm2), read(smollm2_gguf)
    names = [{t.name for t in one.tensors if "norm" not in t.name} for one in (folder, file)]
    assert names[0] == names[1]
    assert sorted(t.shape for t in folder.tensors) == sorted(t.shape for t in file.tensors)
    for rank, targets in ((16, "all-linear"), (8, ("q_proj", "v_proj"))):
        assert folder.adapter_bytes(rank, targets) == file.adapter_bytes(rank, targets) > 0
    assert folder.trained_bytes() == file.trained_bytes()
    assert file.folder_bytes() == pytest.approx(folder.folder_bytes(), rel=1e-3)
    assert file.gguf_bytes("q4_k_m") == pytest.approx(folder.gguf_bytes("q4_k_m"), rel=1e-3)
    assert (folder.is_gguf, file.is_gguf) == (False, True)


def test_a_folder_is_as_large_as_was_said(smollm2: Path) -> None:
    real = sum(path.stat().st_size for path in smollm2.iterdir())
    assert read(smollm2).folder_bytes() == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_is_what_peft_makes_of_the_model(
    family: Family, tied: bool, targets: Any, tmp_path: Path
) -> None:
    base = tiny_models.folder(tmp_path / "base", family, tied=tied)
    model = load.causal_lm(base, dtype="bfloat16", device="cpu")
    adapted = lora.attach(model, rank=32, alpha=8, dropout=0.0, target_modules=targets)
    real = [p for p in adapted.parameters() if p.requires_grad]
    expected = sum(p.nbytes for p in real)
    said = read(base).adapter_bytes(32, targets)
    assert said == expected + 180 * len(real)
    lora.write(adapted, tmp_path)
    assert said == pytest.approx((tmp_path / lora.WEIGHTS_FILE).stat().st_size, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_full_training_trains_each_weight_once(family: Family, tied: bool, tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base", family, tied=tied)
    model = load.causal_lm(base, dtype="float32", device="cpu")
    found = read(base)
    assert sum(t.weights for t in found.tensors) == sum(p.numel() for p in model.parameters())
    assert found.stored_bytes == 4


@pytest.mark.parametrize("name", test_gguf.SHAPES)
@pytest.mark.parametrize("level", get_args(weights.Level))
def test_types_at_a_level_are_nearly_llama_cpps(
    name: str, level: weights.Level, tmp_path: Path
) -> None:
    test_gguf.write_model(tmp_path / "source.gguf", test_gguf.SHAPES[name])
    header = gguf_header.read(tmp_path / "source.gguf")
    theirs = gguf.tensor_types(header, level)
    ours = dict(read(tmp_path / "source.gguf").gguf_types(level))
    rare = {"mixtral", "llama-70b"}  # more bits for some small tensors
    if name not in rare:
        # A tensor that is not quantised stays as it is: f16 there, and f32 here, which is more.
        kept = {t.name for t in header.tensors if theirs[t.name] == t.type}
        odd = {t for t in ours if "attn_v" in t.name}  # of as many heads as attn_q in these tests
        assert all(theirs[t.name] == ours[t] for t in ours.keys() - odd if t.name not in kept)
    real = sum(theirs[t.name].size_bytes(t.weights) for t in header.tensors)
    said = sum(type.size_bytes(tensor.weights) for tensor, type in ours.items())
    # Tensors of tests are small and odd; in a real model what differs is a thousandth.
    assert real * 0.85 <= said <= real * 1.03, said / real


def test_experts_of_a_layer_are_one_tensor_and_get_no_adapter(tmp_path: Path) -> None:
    experts = {
        f"model.layers.0.mlp.experts.{n}.{side}_proj.weight": [64, 32]
        for n in range(16)
        for side in ("gate", "up")
    }
    shapes = {"model.layers.0.self_attn.q_proj.weight": [32, 32], **experts}
    found = read(safetensors(tmp_path / "moe", shapes))
    assert {t.name: t.shape for t in found.tensors} == {
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.ffn_gate_exps.weight": (32, 64, 16),
        "blk.0.ffn_up_exps.weight": (32, 64, 16),
    }
    assert found.adapter_bytes(4, "all-linear") == 2 * (4 * 32 * 4 + 180)


def test_what_sees_is_in_the_merged_model_and_in_no_gguf(tmp_path: Path) -> None:
    own = {"language_model.model.layers.0.self_attn.q_proj.weight": [256, 256]}
    tower = {"vision_tower.encoder.layers.0.self_attn.q_proj.weight": [512, 512]}
    plain = read(safetensors(tmp_path / "text", own, dtype="bfloat16"))
    seeing = read(safetensors(tmp_path / "both", own | tower, dtype="bfloat16"))
    assert seeing.trained_bytes() == plain.trained_bytes()
    assert seeing.adapter_bytes(8, "all-linear") == plain.adapter_bytes(8, "all-linear")
    assert seeing.gguf_bytes("q4_k_m") == plain.gguf_bytes("q4_k_m")
    assert seeing.folder_bytes() - plain.folder_bytes() == 2 * 512 * 512 + 180


def test_a_tied_head_that_was_stored_all_the_same_is_not_counted(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": [100, 32], "lm_head.weight": [100, 32]}
    tied = read(safetensors(tmp_path / "tied", shapes, tie_word_embeddings=True))
    assert [tensor.name for tensor in tied.tensors] == ["token_embd.weight"]
    own = read(safetensors(tmp_path / "own", shapes, tie_word_embeddings=False))
    assert len(own.tensors) == 2


def test_the_shards_that_the_index_names_are_read(tmp_path: Path) -> None:
    folder = safetensors(tmp_path / "model", {"model.layers.0.self_attn.q_proj.weight": [8, 8]})
    other = safetensors(tmp_path / "other", {"model.layers.1.self_attn.q_proj.weight": [8, 8]})
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (other / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    (folder / "consolidated.safetensors").write_bytes(b"another layout of the same")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert [tensor.layer for tensor in read(folder).tensors] == [0, 1]


def test_a_model_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    folder = safetensors(tmp_path / "model", {"lm_head.weight": [8, 8]})
    before = read(folder).trained_bytes()
    larger = safetensors(tmp_path / "larger", {"lm_head.weight": [800, 8]})
    (larger / "model.safetensors").replace(folder / "model.safetensors")
    assert read(folder).trained_bytes() > before


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff" * 8,
        b"\x04" + bytes(7) + b"nope",
        b"\x02" + bytes(7) + b"[]",
        b"\x0a" + bytes(7) + b'{"a": "b"}',
        b"\x0c" + bytes(7) + b'{"a": {"b"} ',
    ],
)
def test_of_a_damaged_model_nothing_is_known(damage: bytes, tmp_path: Path) -> None:
    folder = safetensors(tmp_path / "model", {})
    (folder / "model.safetensors").write_bytes(damage)
    assert weights.read(folder) is None
    (tmp_path / "a.gguf").write_bytes(damage)
    assert weights.read(tmp_path / "a.gguf") is None


def test_of_a_model_that_is_not_there_nothing_is_known(tmp_path: Path) -> None:
    assert weights.read(None) is None
    assert weights.read(tmp_path / "nowhere") is None
    (tmp_path / "empty").mkdir()
    assert weights.read(tmp_path / "empty") is None


def test_reading_a_header_needs_nothing_heavy(tmp_path: Path) -> None:
    folder = safetensors(tmp_path / "model", {"model.layers.0.self_attn.q_proj.weight": [256, 256]})
    code = (
        "import sys; from pathlib import Path; from runner.model import weights; "
        f"assert weights.read(Path({str(folder)!r})).gguf_bytes('q4_k_m'); "
        "print([m for m in ('numpy', 'torch', 'safetensors', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_heavier_modules_say_is_said_alike() -> None:
    assert train.RESUMABLE == checkpoint.RESUMABLE
    assert train.LONGEST_INTERVAL == sft.MOST_STEPS_BETWEEN_CHECKPOINTS
    assert weights._TOWER == lora._TOWER
