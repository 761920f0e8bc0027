from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from runner.errors import PreconditionError
from runner.model import load, template
from tests.chat_tokenizers import CHATML, tiny


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny(CHATML)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without(folder: Path, target: Path, *names: str) -> Path:
    shutil.copytree(folder, target)
    for name in names:
        (target / name).unlink()
    return target


def test_a_folder_is_the_base_itself(tiny_folder: Path, tmp_path: Path) -> None:
    assert load.base_folder(tiny_folder, tmp_path / "cache") == tiny_folder
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_by_name(tiny_folder: Path, tmp_path: Path, pickle: str) -> None:
    folder = without(tiny_folder, tmp_path / "base", "model.safetensors")
    (folder / pickle).write_bytes(b"x")
    with pytest.raises(PreconditionError, match=f"{pickle}, a pickle"):
        load.base_folder(folder, tmp_path)


@pytest.mark.parametrize(
    ("missing", "said"),
    [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer files")],
)
def test_a_folder_without_a_part_says_which(
    tiny_folder: Path, tmp_path: Path, missing: str, said: str
) -> None:
    with pytest.raises(PreconditionError, match=said):
        load.base_folder(without(tiny_folder, tmp_path / "base", missing), tmp_path)


def test_a_shard_that_is_not_there_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = without(tiny_folder, tmp_path / "base")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PreconditionError, match="model-00002-of-00002"):
        load.base_folder(folder, tmp_path)


def test_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match=r"neither a folder nor a \.gguf"):
        load.base_folder(tmp_path / "nothing", tmp_path)


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(PreconditionError, match=r"broken\.gguf"):
        load.base_folder(broken, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_loading_a_tokenizer_and_a_model_says_nothing(tiny_folder: Path) -> None:
    said = io.StringIO()
    with redirect_stderr(said):
        load.tokenizer(tiny_folder)
        load.causal_lm(tiny_folder, dtype="float32", device="cpu")
    assert said.getvalue() == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_has_the_dtype_that_was_asked_for(tiny_folder: Path, dtype: load.Dtype) -> None:
    model = load.causal_lm(tiny_folder, dtype=dtype, device="cpu")
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}


def test_four_bit_weights_work_on_a_cpu(tiny_folder: Path) -> None:
    model = load.causal_lm(tiny_folder, dtype="float32", four_bit=True, device="cpu")
    projection = model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert projection.dtype == torch.uint8
    assert projection.quant_state.quant_type == "nf4"
    assert projection.quant_state.nested
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()


def test_four_bit_weights_are_refused_on_mps(tiny_folder: Path) -> None:
    with pytest.raises(PreconditionError, match="mps"):
        load.causal_lm(tiny_folder, dtype="float32", four_bit=True, device="mps")


def test_the_device_is_one_that_is_there() -> None:
    assert torch.zeros(1, device=load.device()).item() == 0


def test_a_gguf_becomes_a_folder_of_plain_bfloat16(smollm2: Path) -> None:
    names = {path.name for path in smollm2.iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert load.base_folder(smollm2, smollm2.parent) == smollm2


def test_a_gguf_is_converted_once(smollm2: Path, smollm2_gguf: Path) -> None:
    before = (smollm2 / "model.safetensors").stat().st_mtime_ns
    assert load.base_folder(smollm2_gguf, smollm2.parent) == smollm2
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == before


def test_the_tokenizer_of_the_gguf_is_the_one_of_the_model(smollm2: Path) -> None:
    tokenizer = load.tokenizer(smollm2)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert {1, 2} <= set(tokenizer.all_special_ids)
    assert tokenizer.model_max_length == 8192
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    russian = "Съешь же ещё этих мягких французских булок, да выпей чаю"
    assert tokenizer.decode(tokenizer.encode(russian)) == russian
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_digits_are_split_from_the_spaces_before_them(smollm2: Path) -> None:
    # transformers 5.23 knows nothing of `tokenizer.ggml.pre: smollm` and joins them otherwise.
    tokenizer = load.tokenizer(smollm2)
    assert tokenizer.tokenize("a  2024") == ["a", "ĠĠ", "2", "0", "2", "4"]


def test_the_tokenizer_agrees_with_llama_cpp(smollm2: Path, smollm2_gguf: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    said = io.StringIO()
    with redirect_stderr(said):
        reference = llama_cpp.Llama(str(smollm2_gguf), vocab_only=True, verbose=False)
    tokenizer = load.tokenizer(smollm2)
    texts = [
        "x = 10 ** 3  # 1,000\n\n    return  12.5%\t\t7",
        "В 2024 году   1-е место: ½ и ²; ёжик №5…",
        "'s 're I'll <|im_start|>user\n  42<|im_end|>\n",
        "日本語 123 emoji 🙂🏽 e\u0301",
    ]
    for text in texts:
        expected = reference.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer.encode(text, add_special_tokens=False) == expected
    reference.close()


def test_the_converted_model_knows_the_capital_of_france(smollm2: Path) -> None:
    tokenizer = load.tokenizer(smollm2)
    model = load.causal_lm(smollm2, dtype="bfloat16", device="cpu")
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = torch.tensor([template.prompt(tokenizer, asked)])
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False
    )
    text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."


def test_no_code_of_a_repository_is_run(tiny_folder: Path, tmp_path: Path) -> None:
    folder = without(tiny_folder, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert load.causal_lm(folder, dtype="float32", device="cpu").config.model_type == "llama"
    assert not any("evil" in name for name in sys.modules)


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("config.json", "[]")]
)
def test_damaged_files_are_one_sentence(
    tmp_path: Path, tiny_folder: Path, name: str, text: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    (broken / name).write_text(text)

    def open_both() -> None:
        load.tokenizer(broken)
        load.causal_lm(broken, dtype="float32", device="cpu")

    with pytest.raises(PreconditionError, match=r"broken cannot be read"):
        open_both()


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["model.safetensors"]}']
)
def test_an_index_that_names_nothing_is_a_sentence(
    tmp_path: Path, tiny_folder: Path, index: str
) -> None:
    folder = without(tiny_folder, tmp_path / "base")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(PreconditionError, match="does not say which weight files there are"):
        load.base_folder(folder, tmp_path)


@pytest.mark.parametrize("name", ["../base/model.safetensors", "/etc/passwd", "..", "a\\b", "", 3])
def test_an_index_that_names_files_elsewhere_is_refused(
    tmp_path: Path, tiny_folder: Path, name: object
) -> None:
    folder = without(tiny_folder, tmp_path / "base")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(PreconditionError, match="which is no file beside it"):
        load.base_folder(folder, tmp_path)


@pytest.mark.parametrize("size", [1 << 40, 1 << 62, 96])
def test_a_size_that_no_model_of_the_weights_has_is_one_sentence(
    tmp_path: Path, tiny_folder: Path, size: int
) -> None:
    folder = without(tiny_folder, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": size}))
    with pytest.raises(PreconditionError, match="base cannot be read"):
        load.causal_lm(folder, dtype="float32", device="cpu")
