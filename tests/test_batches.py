from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Lfm2Config, MambaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from runner.model import batches, load, lora, recovery, score
from runner.model.token_files import Row
from tests import tiny_models
from tests.tiny_models import Family

CPU = torch.device("cpu")
EXACT = torch.autocast("cpu", enabled=False)
every_family = pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])


def weighted() -> list[Row]:
    """Rows of several lengths with several weights."""
    return [
        tiny_models.row("a", 21, [(4, 9, 1.0), (13, 21, 2.5)]),
        tiny_models.row("b", 12, [(6, 12, 0.5)]),
        tiny_models.row("c", 30, [(1, 30, 1.0)]),
        tiny_models.row("a", 17, [(10, 17, 3.0)]),
        tiny_models.row("d", 9, [(8, 9, 1.0)]),
    ]


def opened(folder: Path, method: str) -> nn.Module:
    model = load.causal_lm(folder, dtype="float32", device="cpu")
    if method == "full":
        return model
    adapted = lora.attach(model, rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def step(
    model: nn.Module, rows: Sequence[Row], sizes: Sequence[int], pass_tokens: int = 2048
) -> tuple[float, torch.Tensor]:
    """The loss of a step and its gradient as one vector."""
    model.train()
    model.zero_grad()
    parts = recovery.backward(model, rows, recovery.Limits(None, pass_tokens), EXACT, sizes)
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return sum(part.loss for part in parts), torch.cat(grads)


@pytest.mark.parametrize("method", ["lora", "full"])
@every_family
def test_packed_rows_have_the_loss_and_gradient_of_the_rows_one_by_one(
    family: Family, method: str, tmp_path: Path
) -> None:
    model = opened(tiny_models.folder(tmp_path / "base", family), method)
    rows = weighted()
    expected_loss, expected = step(model, rows, [], pass_tokens=1)
    for sizes in ([5], [2, 3], [1, 3, 1]):
        loss, gradient = step(model, rows, sizes)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert (gradient - expected).norm() / expected.norm() <= 1e-5


@every_family
def test_the_step_loss_of_packs_is_the_weighted_mean(family: Family, tmp_path: Path) -> None:
    model = opened(tiny_models.folder(tmp_path / "base", family), "full")
    rows = weighted()
    loss, _ = step(model, rows, [5])
    total = weight = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor(row.input_ids[None], dtype=torch.long)
            nll = -torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
            nll = nll.gather(1, ids[0, 1:, None])[:, 0]
            total += float((nll * torch.tensor(row.weights[1:])).sum())
            weight += float(row.weights.sum())
    assert loss == pytest.approx(total / weight, rel=1e-5)


@every_family
def test_rows_of_a_pack_change_one_another_where_they_are_not_isolated(
    family: Family, tmp_path: Path
) -> None:
    model = opened(tiny_models.folder(tmp_path / "base", family), "full")
    batch = batches.packed([weighted()], CPU)
    with torch.no_grad():
        alone = sum(score.summed_nll(model, batches.padded([row], CPU)) for row in weighted())
        mixed = score.summed_nll(model, batch)
        with batches.isolated(model, batch):
            apart = score.summed_nll(model, batch)
    assert float(apart) == pytest.approx(float(alone), rel=1e-5)
    assert float(mixed) != pytest.approx(float(alone), rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
@every_family
def test_attention_row_by_row_has_the_loss_and_gradient_of_the_rows_one_by_one(
    family: Family, method: str, tmp_path: Path
) -> None:
    model = opened(tiny_models.folder(tmp_path / "base", family), method)
    rows = weighted()
    expected_loss, expected = step(model, rows, [], pass_tokens=1)
    batches.attend_by_rows(model)
    for sizes in ([5], [2, 3], [1, 3, 1]):
        loss, gradient = step(model, rows, sizes)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert (gradient - expected).norm() / expected.norm() <= 1e-5


def test_attention_row_by_row_is_the_same_where_activations_are_computed_again(
    tmp_path: Path,
) -> None:
    model = opened(tiny_models.folder(tmp_path / "base"), "lora")
    batches.attend_by_rows(model)
    _, kept = step(model, weighted(), [5])
    recovery.recompute(model)
    _, again = step(model, weighted(), [5])
    assert torch.equal(kept, again)


def test_attention_row_by_row_makes_no_mask_but_for_sliding_windows(tmp_path: Path) -> None:
    def masks(family: Family) -> set[bool]:
        model = opened(tiny_models.folder(tmp_path / family, family), "lora")
        assert batches.keeps_apart(model, weighted())
        seen: set[bool] = set()
        for name, module in model.named_modules():
            if name.endswith("self_attn"):
                module.register_forward_pre_hook(
                    lambda _, args, kwargs: seen.add(kwargs["attention_mask"] is not None),
                    with_kwargs=True,
                )
        step(model, weighted(), [5])
        return seen

    assert masks("llama") == {False}
    assert masks("gemma3n") == {False, True}


def test_a_model_that_hides_positions_from_its_attention_keeps_its_mask(tmp_path: Path) -> None:
    model = opened(tiny_models.folder(tmp_path / "base"), "full")
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
            )
    assert batches.keeps_apart(model, weighted())
    config: Any = model.config
    assert config._attn_implementation == "sdpa"


def test_a_pack_with_more_tokens_than_a_pass_is_cut_between_its_rows(tmp_path: Path) -> None:
    rows = weighted()
    pieces = batches.divided(rows, 40)
    assert [[len(row.input_ids) for row in piece] for piece in pieces] == [[21, 12], [30], [17, 9]]
    assert [len(piece) for piece in batches.divided(rows, 1)] == [1] * 5
    model = opened(tiny_models.folder(tmp_path / "base"), "lora")
    _, whole = step(model, rows, [5])
    _, cut = step(model, rows, [5], pass_tokens=40)
    assert (cut - whole).norm() / whole.norm() <= 1e-5


def test_positions_start_anew_with_each_row_and_in_the_padding() -> None:
    rows = [
        tiny_models.row(name, length, [(0, length, 1.0)]) for name, length in (("a", 3), ("b", 2))
    ]
    batch = batches.packed([rows, rows[:1]], CPU)
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert batch.weights.tolist() == [[0, 1, 1, 0, 1], [0, 1, 1, 0, 0]]
    assert batch.conversations == ("a", "b")


def test_rows_that_are_not_packed_have_no_positions_and_so_no_mask() -> None:
    assert batches.padded(weighted(), CPU).positions is None


def planned(rows: Sequence[Row], packs: Sequence[int], **settings: Any) -> list[batches.Step]:
    defaults: dict[str, Any] = {"batch_size": 4, "epochs": 1, "max_steps": None, "seed": 1}
    return batches.planned(rows, packs=packs, **{**defaults, **settings})


def test_a_step_holds_whole_packs_and_counts_replies() -> None:
    rows = tiny_models.conversations(20)
    packs = [index // 3 for index in range(20)]
    steps = planned(rows, packs, batch_size=7)
    assert sorted(row for one in steps for row in one.rows) == list(range(20))
    for one in steps:
        assert sum(rows[row].replies for row in one.rows) <= 7
        for sequence in one.sequences:
            assert len({packs[row] for row in sequence}) == 1
            assert len(sequence) == packs.count(packs[sequence[0]])


def test_a_step_has_one_pack_at_least() -> None:
    steps = planned(tiny_models.conversations(12), [index // 6 for index in range(12)])
    assert [len(one.rows) for one in steps] == [6, 6]


def test_packs_that_share_a_conversation_share_a_step() -> None:
    rows = [tiny_models.row(name, 9, [(5, 9, 1.0)]) for name in "aabbccdd"]
    steps = planned(rows, [0, 1, 1, 2, 3, 3, 4, 4], batch_size=1)
    assert sorted(sorted(one.rows) for one in steps) == [[0, 1, 2, 3], [4, 5], [6, 7]]


def test_the_order_of_packs_is_new_each_epoch_and_the_same_for_a_seed() -> None:
    rows, packs = tiny_models.conversations(40), [index // 2 for index in range(40)]

    def order(seed: int) -> list[int]:
        return [row for one in planned(rows, packs, epochs=2, seed=seed) for row in one.rows]

    assert order(1) == order(1) != order(2)
    assert order(1)[:40] != order(1)[40:]


_SHAPE: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}


def test_attention_keeps_rows_apart(tmp_path: Path) -> None:
    assert batches.isolates(opened(tiny_models.folder(tmp_path / "base"), "full"), weighted())


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(**_SHAPE, state_size=4),
        Lfm2Config(
            **_SHAPE,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
        ),
    ],
    ids=["no positions", "convolution"],
)
def test_a_model_that_carries_a_state_from_row_to_row_is_noticed(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert not batches.keeps_apart(model, weighted())
