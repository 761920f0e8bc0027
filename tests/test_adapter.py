from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file

from runner.errors import PreconditionError, RunnerError
from runner.model import adapter, identity, load, lora, merging, score, token_files
from tests import chat_tokenizers, tiny_models
from tests.tiny_models import Family

IDS = torch.tensor([[97, 98, 99, 104, 101, 100, 103, 97]])


pytestmark = pytest.mark.usefixtures("one_thread")


def saved_adapter(base: Path, folder: Path) -> Path:
    """An adapter that changes the model, in PEFT's layout."""
    model = load.causal_lm(base, dtype="float32", device="cpu")
    adapted = lora.attach(model, rank=4, alpha=8, dropout=0.1, target_modules="all-linear")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder.mkdir()
    lora.write(adapted, folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_model_is_the_base_with_its_adapter(
    family: Family, tied: bool, tmp_path: Path
) -> None:
    base = tiny_models.folder(tmp_path / "base", family, tied=tied)
    trained = saved_adapter(base, tmp_path / "adapter")
    adapter.merge(base, trained, tmp_path / "merged", dtype="float32")
    merged = logits(load.causal_lm(tmp_path / "merged", dtype="float32", device="cpu"))
    model, is_adapter = adapter.tuned(base, trained, dtype="float32", device="cpu")
    assert is_adapter
    assert (merged - logits(model)).abs().max() <= 1e-4
    plain = logits(load.causal_lm(base, dtype="float32", device="cpu"))
    assert (merged - plain).abs().max() > 1e-2


def test_one_load_measures_base_and_tuned(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    model: Any
    trained = saved_adapter(base, tmp_path / "adapter")
    model, _ = adapter.tuned(base, trained, dtype="float32", device="cpu")
    rows = tiny_models.conversations(3)
    plain = load.causal_lm(base, dtype="float32", device="cpu")
    with model.disable_adapter():
        assert score.mean_loss(model, rows) == pytest.approx(score.mean_loss(plain, rows))
    assert score.mean_loss(model, rows) != pytest.approx(score.mean_loss(plain, rows), rel=1e-3)


def test_tokenizer_and_template_leave_as_they_came(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 258, "temperature": 0.6}\n')
    adapter.merge(
        base, saved_adapter(base, tmp_path / "adapter"), tmp_path / "merged", dtype="float32"
    )
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()


def test_merging_rounds_to_the_asked_format_once(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    trained = saved_adapter(base, tmp_path / "adapter")
    for dtype in ("float32", "bfloat16"):
        adapter.merge(base, trained, tmp_path / dtype, dtype=dtype)
    exact = load_file(tmp_path / "float32" / "model.safetensors")
    rounded = load_file(tmp_path / "bfloat16" / "model.safetensors")
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        assert torch.equal(tensor.bfloat16(), rounded[name]), name
    config = json.loads((tmp_path / "bfloat16" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert adapter.stored_dtype(tmp_path / "bfloat16") == "bfloat16"


def test_a_full_model_is_written_as_it_is(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    trained = tiny_models.folder(tmp_path / "trained", "llama")
    for path in trained.glob("tokenizer*"):
        path.unlink()
    adapter.merge(base, trained, tmp_path / "merged", dtype="float32")
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("trained", "merged"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert adapter.tuned(base, trained, dtype="float32", device="cpu")[1] is False
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_model_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    other = tiny_models.folder(tmp_path / "other", vocab_size=300)
    with pytest.raises(RunnerError, match=r"was trained on 300 tokens, the base model .* has 269"):
        adapter.merge(base, other, tmp_path / "merged", dtype="float32")
    assert not (tmp_path / "merged").exists()


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base", vocab_size=200, eos_token_id=3)
    with pytest.raises(RunnerError, match="the tokenizer knows 269 tokens, the model 200"):
        adapter.check_vocabulary(base, base)


def noted(base: Path, folder: Path) -> Path:
    """An adapter with the note that a training leaves beside it."""
    saved_adapter(base, folder)
    identity.write(identity.of(base), folder)
    return folder


def edited(base: Path, folder: Path, name: str, edit: Callable[[Any], None]) -> Path:
    """A copy of a base model with something else in one of its JSON files."""
    shutil.copytree(base, folder)
    value = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(value)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def refused(model: Path, base: Path) -> str:
    """The one sentence with which measuring and merging refuse; nothing is written."""
    with pytest.raises(RunnerError) as measuring:
        adapter.tuned(base, model, dtype="float32", device="cpu")
    merged = model.parent / "refused"
    with pytest.raises(RunnerError) as merging:
        adapter.merge(base, model, merged, dtype="float32")
    assert measuring.value.message == merging.value.message
    assert not merged.exists()
    return merging.value.message


def test_an_adapter_opens_on_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    trained = noted(base, tmp_path / "adapter")
    moved = shutil.copytree(base, tmp_path / "moved")
    adapter.merge(moved, trained, tmp_path / "merged", dtype="float32")
    assert not (tmp_path / "merged" / identity.FILE).exists()


@pytest.mark.parametrize(
    ("family", "shape", "said"),
    [
        ("qwen3", {}, "a LlamaForCausalLM, the base model {} is a Qwen3ForCausalLM"),
        ("llama", {"hidden_size": 64}, "a hidden size of 32, the base model {} has 64"),
        ("llama", {"num_hidden_layers": 3}, "2 layers, the base model {} has 3"),
        ("llama", {"vocab_size": 300}, "269 tokens, the base model {} has 300"),
        ("llama", {"intermediate_size": 96}, "other weights than the base model {} has now"),
    ],
)
def test_an_adapter_of_another_base_is_refused_in_a_sentence_that_names_both(
    family: Family, shape: dict[str, int], said: str, tmp_path: Path
) -> None:
    trained = noted(tiny_models.folder(tmp_path / "base"), tmp_path / "adapter")
    other = tiny_models.folder(tmp_path / "other", family, **shape)
    sentence = refused(trained, other)
    assert sentence.startswith(f"{trained} was trained on")
    assert said.format(other) in sentence


def test_a_base_with_other_words_under_the_same_ids_is_refused(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    trained = noted(base, tmp_path / "adapter")

    def swap(tokenizer: dict[str, Any]) -> None:
        words = tokenizer["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]

    other = edited(base, tmp_path / "other", "tokenizer.json", swap)
    assert "another vocabulary" in refused(trained, other)


def test_a_base_with_another_chat_template_is_refused(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    trained = noted(base, tmp_path / "adapter")
    other = shutil.copytree(base, tmp_path / "other")
    (other / "chat_template.jinja").write_text(chat_tokenizers.LLAMA3, encoding="utf-8")
    assert "another chat template" in refused(trained, other)


def test_a_base_whose_weights_have_changed_since_is_refused(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    trained = noted(base, tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    with torch.no_grad():
        for tensor in weights.values():
            tensor += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert "other weights" in refused(trained, base)


def test_a_base_in_several_files_is_the_same_base(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base", tied=False)
    model = load.causal_lm(base, dtype="float32", device="cpu")
    sharded = shutil.copytree(base, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert identity.of(sharded) == identity.of(base)


def test_a_whole_model_is_refused_beside_another_base_too(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    other = tiny_models.folder(tmp_path / "other", "qwen3")
    with pytest.raises(RunnerError, match=r"has the architecture llama, the base model .* qwen3"):
        adapter.merge(other, base, tmp_path / "merged", dtype="float32")


def test_a_note_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    trained = noted(base, tmp_path / "adapter")
    (trained / identity.FILE).write_text("{}")
    with pytest.raises(RunnerError, match=r"base\.json does not say which base model"):
        adapter.tuned(base, trained, dtype="float32", device="cpu")


def test_layers_of_an_adapter_without_a_place_are_refused_where_there_is_no_note(
    tmp_path: Path,
) -> None:
    base = tiny_models.folder(tmp_path / "base")
    deep = tiny_models.folder(tmp_path / "deep", num_hidden_layers=3)
    trained = saved_adapter(deep, tmp_path / "adapter")
    with pytest.raises(RunnerError, match=r"the base model has no layer model\.layers\.2"):
        adapter.merge(base, trained, tmp_path / "merged", dtype="float32")


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Path, dict[str, str]]:
    """A base model, what was written from it, and the hashes of the tokenizer's files."""
    base = tiny_models.folder(tmp_path / "base")
    model = load.causal_lm(base, dtype="float32", device="cpu")
    adapter.write_model(model, base, tmp_path / "written", dtype="float32")
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in adapter.tokenizer_files(base)
    }
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= hashes.keys()
    adapter.check_untouched(base, tmp_path / "written", hashes)
    return base, tmp_path / "written", hashes


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("where", ["base", "written"])
def test_a_tokenizer_that_is_another_afterwards_is_refused(
    where: str, name: str, written: tuple[Path, Path, dict[str, str]]
) -> None:
    base, output, hashes = written
    changed = base if where == "base" else output
    (changed / name).write_text("other")
    with pytest.raises(RunnerError, match=rf"{where}/{name} is not what .*: sha256 .*… then, .*…"):
        adapter.check_untouched(base, output, hashes)


def test_a_tokenizer_file_that_is_missing_afterwards_is_refused(
    written: tuple[Path, Path, dict[str, str]],
) -> None:
    base, output, hashes = written
    (output / "tokenizer.json").unlink()
    with pytest.raises(RunnerError, match=r"tokenizer\.json .* \(no such file\) now"):
        adapter.check_untouched(base, output, hashes)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    wide = tiny_models.folder(tmp_path / "wide", intermediate_size=96)
    trained = saved_adapter(wide, tmp_path / "adapter")
    with pytest.raises(RunnerError, match="does not fit the base model"):
        adapter.tuned(base, trained, dtype="float32", device="cpu")


def test_an_adapter_trained_over_4_bits_merges_onto_the_full_weights(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    files = tiny_models.token_files(tmp_path / "tokens", tiny_models.conversations(8))
    tiny_models.trained(base, files, tmp_path, method="qlora")
    adapter.merge(base, tmp_path / "output", tmp_path / "merged", dtype="float32")
    merged = load.causal_lm(tmp_path / "merged", dtype="float32", device="cpu")
    model, _ = adapter.tuned(base, tmp_path / "output", dtype="float32", device="cpu")
    rows = token_files.read(files / "train.arrow")
    assert score.mean_loss(merged, rows) == pytest.approx(score.mean_loss(model, rows), rel=1e-4)
    shutil.rmtree(tmp_path / "merged")


def test_text_loss_is_the_mean_over_tokens_of_all_texts(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    model, tokenizer = load.causal_lm(base, dtype="float32", device="cpu"), load.tokenizer(base)
    texts = ["the first piece of text", "x", "another, a longer one that is cut"]
    nll, count = 0.0, 0
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"][:20])[None]
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
        nll -= logs.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    assert score.text_loss(model, tokenizer, texts, 20) == pytest.approx(nll / count, rel=1e-5)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma3n"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merging_tensor_by_tensor_gives_what_the_opened_model_gives(
    family: Family, dtype: load.Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_models.folder(tmp_path / "base", family)
    trained = saved_adapter(base, tmp_path / "adapter")
    adapter.merge(base, trained, tmp_path / "one", dtype=dtype)
    monkeypatch.setattr(merging, "planned", lambda base, adapter, dtype: None)
    adapter.merge(base, trained, tmp_path / "whole", dtype=dtype)
    one, whole = (tmp_path / name / "model.safetensors" for name in ("one", "whole"))
    assert one.read_bytes() == whole.read_bytes()


def test_a_merged_model_is_cut_into_files_of_the_size_asked_for(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base", tied=False)
    trained = saved_adapter(base, tmp_path / "adapter")
    adapter.merge(base, trained, tmp_path / "one", dtype="float32")
    adapter.merge(base, trained, tmp_path / "many", dtype="float32", max_shard_bytes=40_000)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert max(path.stat().st_size for path in shards) < 42_000
    many = logits(load.causal_lm(tmp_path / "many", dtype="float32", device="cpu"))
    one = logits(load.causal_lm(tmp_path / "one", dtype="float32", device="cpu"))
    assert torch.equal(many, one)


def test_a_base_in_several_files_merges_to_the_same_model(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base", tied=False)
    trained = saved_adapter(base, tmp_path / "adapter")
    sharded = shutil.copytree(base, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    model = load.causal_lm(base, dtype="float32", device="cpu")
    model.save_pretrained(sharded, max_shard_size="20KB")
    adapter.merge(base, trained, tmp_path / "one", dtype="float32")
    adapter.merge(sharded, trained, tmp_path / "other", dtype="float32")
    one, other = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


MEASURED = """
import resource, sys
from pathlib import Path
import torch
from runner.model import merging
root = Path(sys.argv[1])

def merge(base, adapter, output):
    output.mkdir()
    tensors = merging.planned(base, adapter, torch.bfloat16)
    merging.write(tensors, output, max_shard_bytes=32 << 20)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

merge(root / "little", root / "little-adapter", root / "warm")
before = peak()
merge(root / "large", root / "large-adapter", root / "merged")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="counts memory as Unix does")
def test_a_large_model_merges_in_the_memory_of_one_of_its_files(tmp_path: Path) -> None:
    for name, width, layers in (("little", 8, 1), ("large", 1024, 8)):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}-adapter").mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (tmp_path / f"{name}-adapter" / "adapter_config.json").write_text(json.dumps(config))
        parts = {}
        for layer in range(layers):
            rows = {f"l{layer}.w{n}": torch.randn(4 * width, width).bfloat16() for n in range(4)}
            weights = {f"{place}.weight": rows[place] for place in rows}
            save_file(weights, tmp_path / name / f"model-{layer}.safetensors")
            for place in rows:
                key = f"base_model.model.{place}.lora"
                parts[f"{key}_A.weight"] = torch.randn(2, width)
                parts[f"{key}_B.weight"] = torch.randn(4 * width, 2)
        save_file(parts, tmp_path / f"{name}-adapter" / lora.WEIGHTS_FILE)
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    a_file = (tmp_path / "large" / "model-0.safetensors").stat().st_size
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == 8
    assert int(done.stdout) < 2 * a_file
    shutil.rmtree(tmp_path / "large")
    shutil.rmtree(tmp_path / "merged")


def four_bit(base: Path, folder: Path) -> Path:
    """The base as bitsandbytes keeps it in 4 bits."""
    model = load.causal_lm(base, dtype="float32", four_bit=True, device="cpu")
    model.save_pretrained(folder)
    for path in adapter.tokenizer_files(base):
        shutil.copy(path, folder)
    return folder


def test_a_base_in_4_bits_is_taken_for_what_those_stand_for(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    trained = saved_adapter(base, tmp_path / "adapter")
    adapter.merge(four_bit(base, tmp_path / "small"), trained, tmp_path / "one", dtype="float32")
    held = load.causal_lm(base, dtype="float32", four_bit=True, device="cpu")
    plain = load.causal_lm(base, dtype="float32", device="cpu")
    with torch.no_grad():
        for name, layer in held.named_modules():
            if isinstance(layer, Linear4bit):
                stands_for = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                plain.get_submodule(name).weight.copy_(stands_for)  # type: ignore[operator,union-attr]
    merged = load.causal_lm(tmp_path / "one", dtype="float32", device="cpu")
    assert (logits(merged) - logits(lora.opened(plain, trained))).abs().max() <= 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "one" / "config.json").read_text())


def test_nothing_is_merged_onto_quantised_weights_of_another_kind(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    trained = saved_adapter(base, tmp_path / "adapter")

    def quantised(config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}

    other = edited(base, tmp_path / "other", "config.json", quantised)
    with pytest.raises(RunnerError, match=r"weights are quantised \(gptq\)") as caught:
        adapter.merge(other, trained, tmp_path / "merged", dtype="float32")
    assert "the unquantised model" in caught.value.hint
    assert not (tmp_path / "merged").exists()


def test_damaged_safetensors_are_refused_and_nothing_else(tmp_path: Path) -> None:
    base = tiny_models.folder(tmp_path / "base")
    path = base / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    chance = random.Random(5)
    refused = 0
    for _ in range(2000):
        mutated = bytearray(whole[: 8 + length])
        for _ in range(chance.randint(1, 3)):
            mutated[chance.randrange(len(mutated))] = chance.choice(b'0{}[]",:9\xff\0')
        path.write_bytes(bytes(mutated) + whole[8 + length :])
        try:
            merging.stored(base)
        except PreconditionError:
            refused += 1
    assert refused > 1500


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ([], "its header is not a table"),
        ({"w": {}}, "'w' is not described"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "'w' has the shape"),
        ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "'w' has the shape"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "takes 4 bytes, not 8"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "is not where the tensor"),
        ({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, "holds F8_E4M3"),
        ({}, "bytes, its header describes"),
    ],
)
def test_a_safetensors_header_has_to_describe_its_file(
    header: object, said: str, tmp_path: Path
) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(PreconditionError, match=said):
        merging.stored(tmp_path)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"w": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PreconditionError, match="which is no file beside it"):
        merging.stored(tmp_path)
