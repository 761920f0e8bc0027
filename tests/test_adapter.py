from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runner.errors import RunnerError
from runner.model import adapter, load, lora, score, token_files
from tests import tiny_models
from tests.tiny_models import Family

IDS = torch.tensor([[97, 98, 99, 104, 101, 100, 103, 97]])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
