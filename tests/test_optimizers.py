from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runner.errors import InterruptedRun, PreconditionError
from runner.model import batches, checkpoint, load, lora, optimizers, score, token_files
from tests import tiny_models
from tests.test_sft import assert_same_bits, stop_at, weights

BITSANDBYTES: tuple[optimizers.Name, ...] = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide enough for matrices of 4096 weights, from which on bitsandbytes uses 8 bits.
    return tiny_models.folder(
        tmp_path_factory.mktemp("llama") / "base", hidden_size=64, intermediate_size=128
    )


WIDE: dict[str, Any] = {"rank": 64}


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_each_form_learns(name: optimizers.Name, base: Path, files: Path, tmp_path: Path) -> None:
    found = tiny_models.trained(base, files, tmp_path, optimizer=name, epochs=6, **WIDE)
    assert found["eval_loss"] < found["eval_loss_before"] - 0.3


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_a_stopped_training_ends_with_the_bits_of_an_unbroken_one(
    name: optimizers.Name, method: str, base: Path, files: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"optimizer": name, "method": method, "learning_rate": 3e-3, **WIDE}
    tiny_models.trained(base, files, tmp_path / "whole", **settings)
    with pytest.raises(InterruptedRun):
        tiny_models.trained(base, files, tmp_path / "cut", emit=stop_at(3), **settings)
    tiny_models.trained(base, files, tmp_path / "cut", **settings)
    if method == "lora":
        assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    one, other = (tmp_path / n / "output" for n in ("whole", "cut"))
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path


def test_8_bits_make_the_checkpoint_smaller(base: Path, files: Path, tmp_path: Path) -> None:
    sizes = {}
    for name in ("adamw", "adamw_8bit"):
        tiny_models.trained(base, files, tmp_path / name, optimizer=name, max_steps=2, rank=256)
        (kept,), _ = checkpoint.published(tmp_path / name / "scratch")
        sizes[name] = (kept.path / "resume" / "state.safetensors").stat().st_size
    assert sizes["adamw_8bit"] < 0.3 * sizes["adamw"]


def test_embeddings_keep_their_state_in_float32(base: Path) -> None:
    model = load.causal_lm(base, dtype="float32", device="cpu")
    trained = dict(model.named_parameters())
    optimizer = optimizers.create(
        "adamw_8bit",
        trained,
        model.get_input_embeddings().weight,
        learning_rate=1e-3,
        weight_decay=0.0,
    )
    batch = batches.padded(tiny_models.conversations(2), torch.device("cpu"))
    score.summed_nll(model, batch).backward()  # type: ignore[no-untyped-call]
    optimizers.step(optimizer)
    state = optimizers.state(optimizer, trained)
    assert state["state1 model.embed_tokens.weight"].dtype == torch.float32
    assert state["state1 model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8


def test_paging_on_a_cpu_is_warned_about_once_and_before_the_first_step(
    base: Path, files: Path, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    tiny_models.trained(base, files, tmp_path, optimizer="paged_adamw_8bit", events=events, **WIDE)
    assert events[0]["text"] == (
        "optimizer: paged_adamw_8bit moves its state between GPU and CPU memory, and this training "
        "is on a CPU: the state just stays where it is, as with adamw_8bit"
    )
    assert sum(event["event"] == "warning" for event in events) == 1


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_a_device_that_bitsandbytes_lacks_is_refused_by_the_settings_name(
    name: optimizers.Name,
) -> None:
    with pytest.raises(PreconditionError, match=f"optimizer: {name} needs CUDA or a CPU; .* mps"):
        optimizers.check(name, "mps")


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_what_a_cpu_does_as_named_is_not_warned_about(name: optimizers.Name) -> None:
    assert optimizers.check(name, "cpu") == ""


def test_another_optimizer_is_another_training(base: Path, files: Path, tmp_path: Path) -> None:
    tiny_models.trained(base, files, tmp_path)
    with pytest.raises(Exception, match="other settings or data"):
        tiny_models.trained(base, files, tmp_path, optimizer="adamw_8bit")


def test_by_default_the_weights_are_those_of_a_plain_loop(
    base: Path, files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(base, files, tmp_path)
    rows = token_files.read(files / "train.arrow")
    steps = batches.planned(rows, batch_size=4, epochs=2, max_steps=None, seed=1)
    torch.manual_seed(1)
    model = lora.attach(
        load.causal_lm(base, dtype="float32", device="cpu"),
        rank=4,
        alpha=8,
        dropout=0.0,
        target_modules="all-linear",
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adamw = torch.optim.AdamW(trained.values(), weight_decay=0.0, fused=True)
    model.train()
    for done, step in enumerate(steps):
        chosen = [rows[index] for index in step.rows]
        adamw.param_groups[0]["lr"] = 1e-2 * optimizers.rate_factor(done, 6, 0.1, "cosine")
        longest_first = sorted(chosen, key=lambda row: -len(row.input_ids))
        batch = batches.padded(longest_first, torch.device("cpu"))
        loss = score.summed_nll(model, batch) / sum(
            float(row.weights.sum(dtype="float64")) for row in chosen
        )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        adamw.step()
        adamw.zero_grad()
    (tmp_path / "plain").mkdir()
    lora.write(model, tmp_path / "plain")
    found = weights(tmp_path)
    plain = tmp_path / "plain" / lora.WEIGHTS_FILE
    assert plain.read_bytes() == (tmp_path / "output" / lora.WEIGHTS_FILE).read_bytes()
    assert json.loads((tmp_path / "plain" / lora.CONFIG_FILE).read_text())["r"] == 4
    assert found


def test_wsd_is_constant_and_falls_in_a_line_at_the_end() -> None:
    factors = [optimizers.rate_factor(step, 10, 0.2, "wsd", 0.4) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
