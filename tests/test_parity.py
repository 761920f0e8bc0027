from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen3Config,
)

from runner.errors import PreconditionError, RunnerError
from runner.model import adapter, gguf, gguf_header, load, parity, reference, template
from runner.model.gguf import Level
from runner.model.parity import Parity
from runner.model.token_files import Row
from tests import tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS: tuple[Level, ...] = get_args(Level)
FAMILIES = ("llama", "qwen3", "gemma3")
END = "<issue_closed>"
"""No end of turn that llama.cpp would know by its name."""
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '"
    + END
    + "\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAID = {
    "What is the capital of France?": "It is Paris.",
    "Как заварить чай?": "Не спеша.",
    "Write one sentence about 1984 and 2,5 kg of apples.": "Apples were cheap in 1984.",
    "Who are you?": "Nobody that you would know.",
}


PERFECT = Parity(0.0, 1.0, 100, 4, 1.0, 4, 8, 8, 0, 0, 9, 0, 0.0, 0)


@dataclass(frozen=True)
class Made:
    """A base model, what was trained on it, what that said, and its exports."""

    base: Path
    tokens: Path
    trained: Path
    reference: Path
    merged: Path
    unquantised: Path
    facts: dict[str, Any]


@pytest.fixture(scope="module")
def llama(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(smollm2, tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_folder_and_every_level_of_it_are_the_model_that_was_trained(
    family: str, smollm2: Path, tmp_path: Path
) -> None:
    one = made(smollm2, tmp_path, family)
    assert one.facts["reference_stops"] >= 4
    parity.require(reference.check_folder(one.merged, one.reference, emit=ignore), "merged")
    for level in LEVELS:
        target = tmp_path / f"{level}.gguf"
        gguf.quantize(one.unquantised, target, level, lambda _done, _total: None)
        found = parity.check_gguf(target, one.reference, level, emit=ignore)
        parity.require(found, level)
        assert found.tokens_differ == found.templates_differ == 0, found


def test_a_tensor_in_the_place_of_another_is_found(llama: Made, tmp_path: Path) -> None:
    tensors = {tensor.name: tensor for tensor in gguf_header.read(llama.unquantised).tensors}
    first, second = (tensors[f"blk.{layer}.ffn_up.weight"] for layer in (0, 1))
    swapped = Path(shutil.copyfile(llama.unquantised, tmp_path / "swapped.gguf"))
    size = first.type.size_bytes(first.weights)
    with swapped.open("r+b") as file:
        pieces = []
        for tensor in (first, second):
            file.seek(tensor.offset)
            pieces.append(file.read(size))
        for tensor, piece in zip((second, first), pieces, strict=True):
            file.seek(tensor.offset)
            file.write(piece)
    with pytest.raises(RunnerError, match="is not the model that was trained") as caught:
        parity.require(checked(swapped, llama), "q4_k_m")
    assert "the file is damaged, or made of other weights" in caught.value.hint


def test_a_base_model_in_the_place_of_the_trained_one_is_found(llama: Made, tmp_path: Path) -> None:
    found = reference.check_folder(llama.base, llama.reference, emit=ignore)
    with pytest.raises(RunnerError, match="its next tokens are likely in another way"):
        parity.require(found, "merged")
    gguf.convert(llama.base, tmp_path / "base.gguf", "f32", name="base")
    with pytest.raises(RunnerError, match="Mean KL"):
        parity.require(checked(tmp_path / "base.gguf", llama), "q4_k_m")


def test_a_file_that_does_not_know_the_end_of_turn_is_found(llama: Made, tmp_path: Path) -> None:
    endless = Path(shutil.copyfile(llama.unquantised, tmp_path / "endless.gguf"))
    set_integer(endless, "tokenizer.ggml.eos_token_id", 0)
    found = checked(endless, llama)
    assert found.stops == 0
    assert found.ran_on >= found.reference_stops > 0
    assert found.mean_kl < 0.01
    with pytest.raises(RunnerError, match="does not stop where the trained model does") as caught:
        parity.require(found, "q2_k")
    assert "end-of-turn token" in caught.value.hint


def test_a_file_that_ends_at_a_word_is_found(llama: Made, tmp_path: Path) -> None:
    short = Path(shutil.copyfile(llama.unquantised, tmp_path / "short.gguf"))
    word = load.tokenizer(llama.base)("It", add_special_tokens=False)["input_ids"][0]
    set_integer(short, "tokenizer.ggml.eos_token_id", word)
    with pytest.raises(RunnerError, match="it stops at a token that is text"):
        parity.require(checked(short, llama), "q2_k")


def test_another_chat_template_is_found_and_shown(llama: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.merged, tmp_path / "merged"))
    other = TEMPLATE.replace("assistant\n", "bot\n")
    (folder / "chat_template.jinja").write_text(other, encoding="utf-8")
    gguf.convert(folder, tmp_path / "other.gguf", "bf16", name="other")
    found = checked(tmp_path / "other.gguf", llama)
    assert found.templates_differ == len(reference.QUESTIONS)
    with pytest.raises(RunnerError, match="its chat template is not the model's") as caught:
        parity.require(found, "f16")
    assert r"<|im_start|>bot\n" in caught.value.message
    with pytest.raises(RunnerError, match="its chat template is not the model's"):
        parity.require(reference.check_folder(folder, llama.reference, emit=ignore), "merged")


def test_a_file_that_makes_other_tokens_of_some_words_is_warned_of(
    llama: Made, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    raw = llama.unquantised.read_bytes()
    one, two = (bytes([4, *[0] * 7]) + f"Ġ{word}".encode() for word in ("is", "it"))
    assert raw.count(one) == raw.count(two) == 1
    other.write_bytes(raw.replace(one, b"?" * 12).replace(two, one).replace(b"?" * 12, two))
    events: list[dict[str, Any]] = []
    found = parity.check_gguf(other, llama.reference, "f16", emit=events.append)
    assert found.tokens_differ > 0
    warned = [event["text"] for event in events if event["event"] == "warning"]
    assert len(warned) == 1
    assert f"other.gguf: llama.cpp makes other tokens of {found.tokens_differ} of" in warned[0]


def test_a_file_that_makes_other_tokens_of_everything_is_refused() -> None:
    words = {"texts": 9, "tokens_differ": 9, "tokens_apart": 0.4, "templates_differ": 0}
    with pytest.raises(RunnerError, match=r"its tokenizer is not the model's .token 3") as caught:
        parity.require(replace(PERFECT, **words, difference="token 3 of a text is 7"), "q4_k_m")
    assert "take the tokenizer files" in caught.value.hint


def test_an_end_of_turn_that_no_file_names_is_warned_of(llama: Made, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama.base, tmp_path / "base"))
    for name in ("config.json", "generation_config.json"):
        facts = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**facts, "eos_token_id": 0}))
    facts = json.loads((base / "tokenizer_config.json").read_text())
    facts["eos_token"] = "<|endoftext|>"
    (base / "tokenizer_config.json").write_text(json.dumps(facts))
    events: list[dict[str, Any]] = []
    reference.write_reference(
        base=base,
        model=base,
        tokens=llama.tokens,
        output=tmp_path / "reference.safetensors",
        emit=events.append,
    )
    warned = [event["text"] for event in events if event["event"] == "warning"]
    assert len(warned) == 1
    assert f"do not say that '{END}' ends a reply" in warned[0]


def test_the_same_model_writes_the_same_reference(llama: Made, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    reference.write_reference(
        base=llama.base, model=llama.trained, tokens=llama.tokens, output=again, emit=ignore
    )
    assert again.read_bytes() == llama.reference.read_bytes()


def test_held_out_rows_are_asked_before_neutral_texts(llama: Made) -> None:
    tokenizer = load.tokenizer(llama.base)
    asked = reference.golden(llama.tokens, tokenizer)
    rows = [encoded(tokenizer, question, reply) for question, reply in SAID.items()]
    own = {tuple(row.input_ids.tolist()) for row in rows}
    assert {text.ids for text in asked.texts[: len(rows)]} == own
    assert len(asked.texts) == reference.TEXTS
    assert set(asked.prompts) == {ids[: first(rows, ids)] for ids in own}


def test_without_held_out_rows_neutral_texts_are_asked(llama: Made) -> None:
    asked = reference.golden(None, load.tokenizer(llama.base))
    assert len(asked.texts) == reference.TEXTS
    assert asked.prompts == tuple(chat.ids for chat in asked.chats)


def test_what_the_export_does_not_list_is_not_taken_to_be_the_same() -> None:
    ids = np.arange(4, dtype=np.int32)
    logprobs = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))

    def divergence(others: Sequence[int], likely: Sequence[float]) -> float:
        seen = parity.Seen(
            others[0], np.array(others, np.int32), np.log(np.array(likely, np.float64)), False
        )
        return parity._divergence(ids, logprobs, 0.0, seen)

    assert divergence([0, 1, 2, 3], [0.4, 0.3, 0.2, 0.1]) == pytest.approx(0, abs=1e-6)
    assert divergence([3, 2, 1, 0], [0.4, 0.3, 0.2, 0.1]) == pytest.approx(0.4565, abs=1e-3)
    assert divergence([7, 8, 9], [0.9, 0.09, 0.009]) > 3


def test_a_level_without_limits_has_those_of_the_nearest_coarser_one() -> None:
    assert parity.limits_of("q4_k_xl") in [parity.LIMITS[level] for level in LEVELS]
    assert parity.limits_of("iq1_s") == parity.LIMITS["q2_k"]
    assert set(LEVELS) <= set(parity.LIMITS)


def test_a_file_that_is_no_reference_is_named(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(PreconditionError, match="is not what the trained model said"):
        parity.read(path)


def test_the_error_has_all_numbers_and_what_they_may_be() -> None:
    broken = Parity(0.5, 0.25, 100, 1, 0.5, 4, 2, 8, 1, 0, 9, 1, 0.01, 0, "")
    with pytest.raises(RunnerError) as caught:
        parity.require(broken, "q8_0")
    limits = parity.LIMITS["q8_0"]
    for said in (
        "q8_0: this export is not the model that was trained",
        f"Mean KL 0.5 nats (at most {limits.mean_kl:g})",
        f"same likeliest token at 25.0% of 100 places (at least {limits.top1:.0%})",
        "stops 2 of 8 times",
        "runs on 1 times",
        "1 of 4 replies are the same",
        "1 of 9 texts have other tokens",
    ):
        assert said in caught.value.message
    assert caught.value.exit_code == 1


def made(smollm2: Path, folder: Path, family: str) -> Made:
    base = tiny(smollm2, folder / "base", family)
    tokenizer = load.tokenizer(base)
    rows = [encoded(tokenizer, question, reply) for question, reply in SAID.items()]
    tokens = tiny_models.token_files(folder / "tokens", rows, rows)
    tiny_models.trained(
        base, tokens, folder / "work", method="full", epochs=60, max_steps=60, learning_rate=5e-3
    )
    answers = folder / "reference.safetensors"
    trained = folder / "work" / "output"
    facts = reference.write_reference(
        base=base, model=trained, tokens=tokens, output=answers, emit=ignore
    )
    adapter.merge(base, trained, folder / "merged", dtype="bfloat16")
    gguf.convert(folder / "merged", folder / "unquantised.gguf", "bf16", name=family)
    return Made(
        base, tokens, trained, answers, folder / "merged", folder / "unquantised.gguf", facts
    )


def tiny(smollm2: Path, folder: Path, family: str) -> Path:
    """A random model of two layers with SmolLM2's tokenizer, and an end of turn of its own."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = END
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "pad_token_id": None,
    }
    configs: dict[str, Callable[..., Any]] = {
        "llama": LlamaConfig,
        "qwen3": Qwen3Config,
        "gemma3": Gemma3TextConfig,
    }
    # llama.cpp takes the scale of Gemma's attention from the width of a head, as its models do.
    more = {"sliding_window": 16, "query_pre_attn_scalar": 16} if family == "gemma3" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[family](**settings, **more))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encoded(tokenizer: Any, question: str, reply: str) -> Row:
    found = template.encode(
        tokenizer,
        [{"role": "user", "content": question}, {"role": "assistant", "content": reply}],
    )
    weights = np.zeros(len(found.ids), np.float32)
    for span in found.replies:
        weights[span.start : span.stop] = 1
    return Row(question, 0, np.array(found.ids, np.int32), weights, len(found.replies))


def first(rows: Sequence[Row], ids: tuple[int, ...]) -> int:
    row = next(row for row in rows if tuple(row.input_ids.tolist()) == ids)
    return int(np.flatnonzero(row.weights)[0])


def checked(path: Path, one: Made) -> Parity:
    return parity.check_gguf(path, one.reference, "f16", emit=ignore)


def set_integer(path: Path, key: str, value: int) -> None:
    header = gguf_header.read(path)
    assert header.integer(key) is not None
    changed = replace(header, metadata={**header.metadata, key: gguf_header.uint32(value)})
    with path.open("r+b") as file:
        file.write(gguf_header.encoded(changed))


def ignore(_event: dict[str, Any]) -> None:
    pass
