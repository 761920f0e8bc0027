from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runner.model import generate, load, template
from tests import tiny_models
from tests.tiny_models import Family

PROMPTS = [[100, 101, 102], [97] * 17, list(range(97, 108)), [120]]


def opened(folder: Path) -> tuple[Any, Any]:
    return load.causal_lm(folder, dtype="float32", device="cpu"), load.tokenizer(folder)


def one_by_one(model: Any, prompt: list[int], count: int, ends: frozenset[int]) -> list[int]:
    """Greedy decoding without cache, padding or batch."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_replies_together_are_those_one_by_one(family: Family, tmp_path: Path) -> None:
    model, tokenizer = opened(tiny_models.folder(tmp_path / "base", family))
    ends = generate.end_ids(model, tokenizer)
    expected = [one_by_one(model, prompt, 12, ends) for prompt in PROMPTS]
    assert generate.greedy(model, PROMPTS, ends, 12) == expected
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    found = generate.replies(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3)
    assert [reply.text for reply in found] == texts


def test_a_reply_stops_at_the_models_end_of_turn(tmp_path: Path) -> None:
    model, tokenizer = opened(tiny_models.folder(tmp_path / "base"))
    written = [one_by_one(model, prompt, 12, frozenset()) for prompt in PROMPTS]
    # What the model writes somewhere inside a reply is made its end of turn.
    which, place = next(
        (which, place)
        for which, ids in enumerate(written)
        for place in range(1, 12)
        if ids[place] not in ids[:place]
    )
    ids = written[which]
    model.generation_config.eos_token_id = [ids[place], 9999]
    assert generate.end_ids(model, tokenizer) == {ids[place], 9999, tokenizer.eos_token_id}
    found = generate.replies(model, tokenizer, PROMPTS, max_new_tokens=12)[which]
    assert found == generate.Generated(tokenizer.decode(ids[:place]), True)
    model.generation_config.eos_token_id = None
    (cut,) = generate.replies(model, tokenizer, PROMPTS[:1], max_new_tokens=1)
    assert not cut.stopped


def test_progress_counts_prompts(tmp_path: Path) -> None:
    model, tokenizer = opened(tiny_models.folder(tmp_path / "base"))
    seen: list[tuple[int, int]] = []
    generate.replies(
        model,
        tokenizer,
        PROMPTS,
        max_new_tokens=2,
        batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 4), (4, 4)]


def test_no_prompts_give_no_replies(tmp_path: Path) -> None:
    model, tokenizer = opened(tiny_models.folder(tmp_path / "base"))
    assert generate.replies(model, tokenizer, [], max_new_tokens=2) == []


def test_smollm2_answers_and_stops(smollm2: Path) -> None:
    model, tokenizer = opened(smollm2)
    prompt = template.prompt(
        tokenizer, [{"role": "user", "content": "What is the capital of France?"}]
    )
    (found,) = generate.replies(model, tokenizer, [prompt], max_new_tokens=40)
    assert "Paris" in found.text
    assert found.stopped
    assert "<|" not in found.text
