from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runner import disk
from runner.errors import InterruptedRun, PreconditionError, RunnerError
from runner.model import (
    batches,
    checkpoint,
    load,
    lora,
    optimizers,
    packing,
    recovery,
    score,
    sft,
    token_files,
    verdicts,
)
from tests import tiny_models
from tests.tiny_models import Family
from tests.workspaces import grow, small_disk

CPU = torch.device("cpu")
EXACT = torch.autocast("cpu", enabled=False)


pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(folder: Path, seed: int = 0) -> Any:
    """The model with an adapter that is not zero."""
    model = load.causal_lm(folder, dtype="float32", device="cpu")
    model = lora.attach(model, rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradient(model: Any, rows: list[token_files.Row], micro_batch_size: int | None = None) -> Any:
    """All gradients of a step as one vector."""
    model.train()
    model.zero_grad()
    recovery.backward(model, rows, recovery.Limits(micro_batch_size, 2048), EXACT)
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads)


def weights(work: Path) -> dict[str, torch.Tensor]:
    return load_file(work / "output" / lora.WEIGHTS_FILE)


def eval_losses(work: Path) -> dict[int, float]:
    """Eval loss by step, of the checkpoints."""
    lines = (work / "output" / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    return {p["step"]: p["eval_loss"] for p in points if "eval_loss" in p and p["step"]}


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def stop_at(step: int) -> Any:
    """An `emit` that sends SIGTERM to this process after a step."""

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "metrics" and event.get("steps") and event["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return emit


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_that_of_the_models_own_forward(family: Family, tied: bool, tmp_path: Path) -> None:
    model = load.causal_lm(
        tiny_models.folder(tmp_path / "base", family, tied=tied), dtype="float32", device="cpu"
    )
    row = tiny_models.row("a", 30, [(5, 12, 0.5), (20, 30, 2.0)])
    batch = batches.padded([row], CPU)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits[0]
    nll = -torch.log_softmax(logits[:-1], -1).gather(1, batch.input_ids[0, 1:, None])[:, 0]
    expected = (nll * batch.weights[0, 1:]).sum().item()
    assert score.summed_nll(model, batch).item() == pytest.approx(expected, rel=1e-5)
    score.check_logits(model, row)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_step_gradient_does_not_depend_on_the_micro_batches(family: Family, tmp_path: Path) -> None:
    model = adapted(tiny_models.folder(tmp_path / "base", family))
    rows = tiny_models.conversations(7)
    whole = gradient(model, rows)
    for size in (1, 2, 3):
        assert (gradient(model, rows, size) - whole).abs().max() <= 1e-6


def test_a_chains_gradient_is_that_of_its_expanding_windows(base: Path) -> None:
    model = adapted(base)
    ends = (10, 17, 26, 38)
    starts = (6, 13, 20, 30)
    chain = tiny_models.row("a", 38, [(s, e, 1.0) for s, e in zip(starts, ends, strict=True)])
    windows = [tiny_models.row("a", e, [(s, e, 1.0)]) for s, e in zip(starts, ends, strict=True)]
    one_pass, separate = gradient(model, [chain]), gradient(model, windows, 1)
    assert (one_pass - separate).norm() / separate.norm() <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padding_carries_no_loss_and_changes_none(family: Family, tmp_path: Path) -> None:
    model = adapted(tiny_models.folder(tmp_path / "base", family))
    short, long = tiny_models.row("a", 9, [(4, 9, 1.0)]), tiny_models.row("b", 33, [(4, 33, 0.0)])
    alone = score.summed_nll(model, batches.padded([short], CPU)).item()
    beside = score.summed_nll(model, batches.padded([short, long], CPU)).item()
    assert beside == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("logits_at_once", [1500, 2**24])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_frozen_head_gives_the_gradient_of_autograd(
    family: Family, logits_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny_models.folder(tmp_path / "base", family, tied=False))
    rows = tiny_models.conversations(3)
    monkeypatch.setattr(score, "_has_frozen_head", lambda causal: False)
    expected = gradient(model, rows)
    monkeypatch.undo()
    monkeypatch.setattr(score, "_LOGITS_AT_ONCE", logits_at_once)
    assert (gradient(model, rows) - expected).abs().max() <= 1e-6


def test_chunked_logits_give_the_same_gradient_in_full_training(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load.causal_lm(base, dtype="float32", device="cpu")
    rows = tiny_models.conversations(3)
    whole = gradient(model, rows)
    monkeypatch.setattr(score, "_LOGITS_AT_ONCE", 1500)
    assert (gradient(model, rows) - whole).abs().max() <= 1e-6


def test_the_quick_adapter_layer_agrees_with_pefts_own(base: Path) -> None:
    quick, plain = adapted(base), adapted(base)
    for module in plain.modules():
        module.__dict__.pop("forward", None)
    rows = tiny_models.conversations(4)
    assert (gradient(quick, rows) - gradient(plain, rows)).abs().max() <= 1e-6


def test_a_step_holds_whole_conversations_and_counts_replies() -> None:
    rows = [
        tiny_models.row(name, 20, [(5, 20, 1.0)] * replies)
        for name, replies in (("a", 3), ("b", 1), ("a", 2), ("c", 9), ("d", 1))
    ]
    steps = batches.planned(rows, batch_size=4, epochs=1, max_steps=None, seed=3)
    replies = [sum(rows[i].replies for i in step.rows) for step in steps]
    names = [{rows[i].conversation for i in step.rows} for step in steps]
    assert sorted(i for step in steps for i in step.rows) == [0, 1, 2, 3, 4]
    assert all(total <= 4 or len(own) == 1 for total, own in zip(replies, names, strict=True))
    assert sum("a" in own for own in names) == 1
    assert steps[-1].epoch == 1


def test_order_is_new_each_epoch_and_the_same_for_a_seed() -> None:
    rows = tiny_models.conversations(20)

    def order(seed: int) -> list[int]:
        steps = batches.planned(rows, batch_size=4, epochs=2, max_steps=None, seed=seed)
        return [i for step in steps for i in step.rows]

    assert order(1) == order(1) != order(2)
    assert order(1)[:20] != order(1)[20:]
    assert sorted(order(1)[:20]) == list(range(20))


def test_epochs_may_be_a_fraction_and_max_steps_wins() -> None:
    rows = tiny_models.conversations(20)

    def count(epochs: float, max_steps: int | None = None) -> int:
        return len(batches.planned(rows, batch_size=4, epochs=epochs, max_steps=max_steps, seed=1))

    assert (count(1), count(0.4), count(2.6), count(1, 12)) == (5, 2, 13, 12)


def test_micro_batches_sort_by_length_and_stay_in_the_budget() -> None:
    lengths = [5, 100, 7, 90, 6, 300]
    groups = batches.micro_batches(lengths, micro_batch_size=None, pass_tokens=200)
    assert groups == [[5], [1, 3], [2, 4, 0]]
    groups = batches.micro_batches(lengths, micro_batch_size=4, pass_tokens=1)
    assert groups == [[5, 1, 3, 2], [4, 0]]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("cosine", [0.5, 1, 1, 0.8536, 0.5, 0.1464]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("wsd", [0.5, 1, 1, 1, 1, 0.5]),
    ],
)
def test_the_rate_rises_in_the_warmup_and_falls_by_the_schedule(
    schedule: optimizers.Schedule, factors: list[float]
) -> None:
    found = [optimizers.rate_factor(step, 6, 0.3, schedule) for step in range(6)]
    assert found == pytest.approx(factors, abs=1e-4)


def test_lora_learns_and_writes_peft_layout(base: Path, files: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    found = tiny_models.trained(base, files, tmp_path, events=events, epochs=6)
    assert found["eval_loss"] < found["eval_loss_before"] - 0.5
    assert found["steps"] == 18
    config = json.loads((tmp_path / "output" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, None)
    assert str(tmp_path) not in (tmp_path / "output" / "adapter_config.json").read_text()
    assert all(name.startswith("base_model.model.model.layers.") for name in weights(tmp_path))
    metrics = [e for e in events if e["event"] == "metrics" and "loss" in e]
    assert [e["step"] for e in metrics] == list(range(1, 19))
    assert metrics[-1]["epoch"] == 6
    assert {"learning_rate", "grad_norm", "tokens_per_second", "memory_bytes"} <= set(metrics[0])
    assert any(e["event"] == "verdict" and "eval loss fell" in e["text"] for e in events)
    json.dumps(events, allow_nan=False)


def test_the_same_training_gives_the_same_bytes(base: Path, files: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        tiny_models.trained(base, files, tmp_path / name)
    for path in (tmp_path / "one" / "output").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "output" / path.name).read_bytes(), path


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("step", [3, 4])
def test_a_stopped_training_ends_with_the_bits_of_an_unbroken_one(
    base: Path, files: Path, tmp_path: Path, dropout: float, step: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    tiny_models.trained(base, files, tmp_path / "whole", dropout=dropout)
    with pytest.raises(InterruptedRun, match=f"after step {step} of 6"):
        tiny_models.trained(base, files, tmp_path / "cut", dropout=dropout, emit=stop_at(step))
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "cut" / "output").exists()
    events: list[dict[str, Any]] = []
    tiny_models.trained(base, files, tmp_path / "cut", dropout=dropout, events=events)
    assert [e["step"] for e in events if "loss" in e] == list(range(step + 1, 7))
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    curves = [
        (tmp_path / name / "output" / "metrics.jsonl").read_text() for name in ("whole", "cut")
    ]
    assert curves[0] == curves[1]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files with two or three rows in a pack."""
    folder = tiny_models.token_files(
        tmp_path_factory.mktemp("packed"),
        tiny_models.conversations(24),
        tiny_models.conversations(3, "eval"),
    )
    rows = token_files.read(folder / "train.arrow")
    packing.write(folder, rows.lengths, rows.conversations, 56)
    return folder


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("step", [3, 4])
def test_a_stopped_training_on_packs_ends_with_the_bits_of_an_unbroken_one(
    base: Path, packed: Path, tmp_path: Path, dropout: float, step: int
) -> None:
    whole = tiny_models.trained(base, packed, tmp_path / "whole", dropout=dropout)
    with pytest.raises(InterruptedRun, match=f"after step {step} of {whole['steps']}"):
        tiny_models.trained(base, packed, tmp_path / "cut", dropout=dropout, emit=stop_at(step))
    tiny_models.trained(base, packed, tmp_path / "cut", dropout=dropout)
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_a_model_that_mixes_packed_rows_trains_on_them_one_by_one_and_says_so(
    base: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.trained(base, packed, tmp_path / "packed")
    monkeypatch.setattr(batches, "isolates", lambda model, rows: False)
    events: list[dict[str, Any]] = []
    tiny_models.trained(base, packed, tmp_path / "alone", events=events)
    assert [e["text"] for e in events if e["event"] == "warning"] == [
        "this model cannot keep packed rows apart, so each is a sequence of its own"
    ]
    together, alone = eval_losses(tmp_path / "packed"), eval_losses(tmp_path / "alone")
    assert together == pytest.approx(alone, rel=1e-4)


def test_other_packs_are_another_training(base: Path, packed: Path, tmp_path: Path) -> None:
    tiny_models.trained(base, packed, tmp_path)
    again = shutil.copytree(packed, tmp_path / "tokens")
    rows = token_files.read(again / "train.arrow")
    packing.write(again, rows.lengths, rows.conversations, 60)
    with pytest.raises(RunnerError, match="other settings or data"):
        tiny_models.trained(base, again, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["weights.safetensors", "manifest.json", "resume/state.safetensors", "resume/state.json"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    base: Path, files: Path, tmp_path: Path, name: str
) -> None:
    tiny_models.trained(base, files, tmp_path / "whole")
    with pytest.raises(InterruptedRun):
        tiny_models.trained(base, files, tmp_path / "cut", emit=stop_at(4))
    flip_a_bit(tmp_path / "cut" / "scratch" / "step-000004" / name)
    events: list[dict[str, Any]] = []
    tiny_models.trained(base, files, tmp_path / "cut", events=events)
    assert [e["step"] for e in events if "loss" in e] == [3, 4, 5, 6]
    assert [e["text"] for e in events if e["event"] == "warning"] == [
        "the checkpoint step-000004 is damaged; training goes on from the one before"
    ]
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_a_half_written_checkpoint_is_not_one(base: Path, files: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        tiny_models.trained(base, files, tmp_path, emit=stop_at(2))
    scratch = tmp_path / "scratch"
    shutil.copytree(scratch / "step-000002", scratch / ".step-000004.99.tmp")
    events: list[dict[str, Any]] = []
    tiny_models.trained(base, files, tmp_path, events=events)
    assert [e["step"] for e in events if "loss" in e] == [3, 4, 5, 6]
    assert not list(scratch.glob(".*"))


def test_a_finished_training_only_writes_its_output_again(
    base: Path, files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(base, files, tmp_path)
    before = weights(tmp_path)
    shutil.rmtree(tmp_path / "output")
    events: list[dict[str, Any]] = []
    tiny_models.trained(base, files, tmp_path, events=events)
    assert [e["event"] for e in events] == ["verdict"]
    after = weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_checkpoints_of_another_training_are_refused(
    base: Path, files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(base, files, tmp_path)
    with pytest.raises(RunnerError, match="other settings or data"):
        tiny_models.trained(base, files, tmp_path, learning_rate=1e-3)


@pytest.mark.parametrize("keep_best", [1, 2])
def test_only_the_best_and_the_last_checkpoint_are_kept(
    base: Path, files: Path, tmp_path: Path, keep_best: int
) -> None:
    seen: list[int] = []

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            seen.append(len(list((tmp_path / "scratch").iterdir())))

    tiny_models.trained(
        base, files, tmp_path, emit=emit, epochs=4, every_steps=1, keep_best=keep_best
    )
    # While training goes on there is one more, to fall back to.
    assert max(seen) <= keep_best + checkpoint.RESUMABLE
    kept, damaged = checkpoint.published(tmp_path / "scratch")
    assert not damaged
    assert len(kept) <= keep_best + 1
    assert kept[-1].step == 12
    assert [one.step for one in kept if checkpoint.can_resume(one)] == [12]
    evals = eval_losses(tmp_path)
    best = sorted(evals, key=lambda step: (evals[step], step))[:keep_best]
    assert set(best) <= {one.step for one in kept}


def test_the_best_checkpoint_is_what_is_written(base: Path, files: Path, tmp_path: Path) -> None:
    found = tiny_models.trained(
        base, files, tmp_path, epochs=8, learning_rate=0.08, schedule="constant", every_steps=1
    )
    evals = eval_losses(tmp_path)
    assert found["kept_step"] == min(evals, key=lambda step: evals[step]) < 24
    model = lora.opened(load.causal_lm(base, dtype="float32", device="cpu"), tmp_path / "output")
    measured = score.mean_loss(model, token_files.read(files / "eval.arrow"))
    assert measured == pytest.approx(evals[found["kept_step"]], rel=1e-5)


def test_without_eval_rows_the_last_checkpoint_is_written(base: Path, tmp_path: Path) -> None:
    files = tiny_models.token_files(tmp_path / "tokens", tiny_models.conversations(8))
    events: list[dict[str, Any]] = []
    found = tiny_models.trained(base, files, tmp_path, events=events)
    assert found["kept_step"] == found["steps"] == 4
    assert "eval_loss" not in found
    said = [event["text"] for event in events if event["event"] == "verdict"]
    assert said[:-1] == [*verdicts.before(8)]


def test_a_loss_that_is_not_finite_stops_with_the_conversation(base: Path, tmp_path: Path) -> None:
    rows = tiny_models.conversations(6)
    bad = tiny_models.row("broken", 20, [(5, 20, 1.0)])
    bad.weights[7] = math.nan
    files = tiny_models.token_files(tmp_path / "tokens", [*rows, bad])
    steps = batches.planned([*rows, bad], batch_size=2, epochs=2, max_steps=None, seed=1)
    step = next(place for place, step in enumerate(steps, start=1) if 6 in step.rows)
    with pytest.raises(RunnerError, match=rf"step {step}: the loss is nan; .*broken"):
        tiny_models.trained(base, files, tmp_path, batch_size=2, every_steps=1)
    assert not (tmp_path / "output").exists()
    kept, damaged = checkpoint.published(tmp_path / "scratch")
    assert [one.step for one in kept] == [one for one in (step - 2, step - 1) if one > 0]
    assert not damaged


def test_a_full_disk_is_said_with_the_bytes_needed_and_costs_no_checkpoint(
    base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] == 2:
            full = usage._replace(free=1000)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: full)

    with pytest.raises(InterruptedRun, match=r"the disk is full: \d+ MB are needed, 0 MB are free"):
        tiny_models.trained(base, files, tmp_path, emit=emit)
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    events: list[dict[str, Any]] = []
    tiny_models.trained(base, files, tmp_path, events=events)
    assert [e["step"] for e in events if "loss" in e] == [3, 4, 5, 6]


# A checkpoint to go on from takes 1.7 MB, one without optimizer state a third of it.
WIDE = {"rank": 128, "every_steps": 1, "epochs": 99}


def test_a_training_of_76_checkpoints_completes_on_a_disk_that_holds_few(
    base: Path, files: Path, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    with small_disk(tmp_path / "small", "9m"):
        tiny_models.trained(base, files, tmp_path / "small", events=events, max_steps=76, **WIDE)
    assert sum(event["event"] == "checkpoint" for event in events) == 76
    assert not [event for event in events if event["event"] == "warning"]


def test_a_full_disk_costs_the_checkpoints_that_training_can_do_without(
    base: Path, files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(base, files, tmp_path / "large", max_steps=9, **WIDE)
    events: list[dict[str, Any]] = []
    left: list[tuple[int, list[int], list[int]]] = []

    def emit(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "warning":
            found, _ = checkpoint.published(tmp_path / "small" / "scratch")
            resumable = [one.step for one in found if checkpoint.can_resume(one)]
            left.append((max(one.step for one in found), [one.step for one in found], resumable))

    with small_disk(tmp_path / "small", "5400k"):
        tiny_models.trained(base, files, tmp_path / "small", emit=emit, max_steps=9, **WIDE)
        assert_same_bits(tmp_path / "large", tmp_path / "small")
        evals = eval_losses(tmp_path / "small")
    assert left
    for newest, steps, resumable in left:
        best = min((s for s in evals if s <= newest), key=lambda step: evals[step])
        assert (steps, resumable) == (sorted({best, newest}), [newest])
    assert any(
        event["event"] == "warning"
        and event["text"].startswith("the disk is full: ")
        and "MB of old checkpoints went; kept: step-00000" in event["text"]
        for event in events
    )


def test_a_training_without_room_stops_and_goes_on_from_its_last_checkpoint(
    base: Path, files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(base, files, tmp_path / "large", max_steps=5, **WIDE)
    with small_disk(tmp_path / "small", "3600k"):
        with pytest.raises(
            InterruptedRun, match="the disk is full: 2 MB are needed, 2 MB are free"
        ) as caught:
            tiny_models.trained(base, files, tmp_path / "small", max_steps=5, **WIDE)
        assert caught.value.hint.endswith("the training goes on after step 1")
        assert [p.name for p in (tmp_path / "small" / "scratch").iterdir()] == ["step-000001"]
        grow(tmp_path / "small")
        events: list[dict[str, Any]] = []
        tiny_models.trained(base, files, tmp_path / "small", events=events, max_steps=5, **WIDE)
        assert [e["step"] for e in events if "loss" in e] == [2, 3, 4, 5]
        assert_same_bits(tmp_path / "large", tmp_path / "small")


def test_a_disk_that_is_full_before_the_first_checkpoint_is_no_pause(
    base: Path, files: Path, tmp_path: Path
) -> None:
    with (
        small_disk(tmp_path / "small", "1m"),
        pytest.raises(PreconditionError, match="the disk is full: 2 MB are needed") as caught,
    ):
        tiny_models.trained(base, files, tmp_path / "small", max_steps=5, **WIDE)
    assert caught.value.hint.endswith("the training goes on from the start")


def test_a_pause_for_want_of_disk_is_in_the_log_with_the_bytes_needed(
    base: Path, files: Path, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    with small_disk(tmp_path / "small", "3600k"), pytest.raises(InterruptedRun):
        tiny_models.trained(base, files, tmp_path / "small", events=events, max_steps=5, **WIDE)
    assert events[-1]["text"].startswith(
        "the training pauses, its state is saved: the disk is full: 2 MB are needed"
    )


def test_the_measured_peak_stands_beside_the_estimate(
    base: Path, files: Path, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    metrics = tiny_models.trained(base, files, tmp_path, events=events)
    assert re.fullmatch(
        r"peak memory .* [GM]B; .* [GM]B was estimated \([+-]\d+%\)", events[-1]["text"]
    )
    assert metrics["estimated_memory_bytes"] > 6e8  # of Python and its libraries alone


def test_passes_begin_as_large_as_the_estimate_says_and_give_the_same(
    base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_models.trained(base, files, tmp_path / "whole")
    said = float(whole["estimated_memory_bytes"])
    for name, less, words in (
        ("fewer", 3_000, "passes of "),
        ("none", said, "activations are computed twice"),
    ):
        room = round(said - less)
        monkeypatch.setattr(sft, "_memory_of", lambda device, room=room: room)
        events: list[dict[str, Any]] = []
        tiny_models.trained(base, files, tmp_path / name, events=events)
        assert any(e.get("text", "").startswith(words) for e in events), (name, events)
        for key, one in weights(tmp_path / "whole").items():
            assert torch.allclose(one, weights(tmp_path / name)[key], atol=1e-4), key


def test_a_disk_that_fills_in_the_middle_of_any_write_damages_nothing(
    base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "MARGIN_BYTES", -100_000)  # else it is seen before
    tiny_models.trained(base, files, tmp_path / "large", every_steps=1)
    in_the_middle = 0
    for size in range(40, 400, 24):
        work = tmp_path / f"{size}k"
        with small_disk(work, f"{size}k"):
            error = None
            try:
                tiny_models.trained(base, files, work, every_steps=1)
            except (PreconditionError, InterruptedRun) as caught:
                error = caught
            if error:
                # A pause, where there is something to go on from.
                saved, _ = checkpoint.published(work / "scratch")
                assert error.exit_code == (75 if saved else 3)
                assert "the disk is full: 0 MB are needed" in error.message
                in_the_middle += error.__cause__.__cause__ is not None  # not by check_room
                assert not (work / "output").exists()
                _, damaged = checkpoint.published(work / "scratch")
                assert not damaged
                grow(work)
                tiny_models.trained(base, files, work, every_steps=1)
            assert_same_bits(tmp_path / "large", work)
    assert in_the_middle >= 5


def test_a_model_without_room_is_written_from_the_checkpoint_by_the_next_run(
    base: Path, files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(base, files, tmp_path / "large")
    filler = tmp_path / "small" / "filler"

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] == 6:
            filler.write_bytes(bytes(shutil.disk_usage(tmp_path / "small").free))

    with small_disk(tmp_path / "small", "3m"):
        with pytest.raises(InterruptedRun, match="the disk is full") as caught:
            tiny_models.trained(base, files, tmp_path / "small", emit=emit)
        assert caught.value.hint.endswith("the training goes on after step 6")
        assert not (tmp_path / "small" / "output").exists()
        filler.unlink()
        events: list[dict[str, Any]] = []
        tiny_models.trained(base, files, tmp_path / "small", events=events)
        assert [event["event"] for event in events] == ["verdict"]
        assert_same_bits(tmp_path / "large", tmp_path / "small")


def test_evaluating_leaves_the_gradient_of_4_bit_layers_as_it_is(tmp_path: Path) -> None:
    # Wide enough for the blocks in which bitsandbytes packs weights for inference.
    folder = tiny_models.folder(tmp_path / "base", hidden_size=128, intermediate_size=128)
    model = load.causal_lm(folder, dtype="bfloat16", four_bit=True, device="cpu")
    model = lora.attach(model, rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    rows = tiny_models.conversations(3)
    before = gradient(model, rows)
    score.mean_loss(model, rows)
    assert torch.equal(gradient(model, rows), before)


def test_qlora_trains_on_a_cpu(base: Path, files: Path, tmp_path: Path) -> None:
    found = tiny_models.trained(base, files, tmp_path, method="qlora", epochs=6)
    assert found["eval_loss"] < found["eval_loss_before"] - 0.5


@pytest.mark.parametrize("tied", [True, False])
def test_full_training_writes_a_model_with_the_bases_tokenizer(
    files: Path, tmp_path: Path, tied: bool
) -> None:
    base = tiny_models.folder(tmp_path / "base", tied=tied)
    found = tiny_models.trained(
        base, files, tmp_path, method="full", epochs=4, learning_rate=3e-3, weight_decay=0.01
    )
    assert found["eval_loss"] < found["eval_loss_before"] - 0.5
    model = load.causal_lm(tmp_path / "output", dtype="float32", device="cpu")
    measured = score.mean_loss(model, token_files.read(files / "eval.arrow"))
    assert measured == pytest.approx(found["eval_loss"], rel=1e-4)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "output" / name).read_bytes() == (base / name).read_bytes()


def test_full_training_in_bfloat16_keeps_its_weights_in_float32(
    base: Path, files: Path, tmp_path: Path
) -> None:
    found = tiny_models.trained(
        base, files, tmp_path, method="full", precision="bfloat16", learning_rate=3e-3, epochs=4
    )
    assert found["eval_loss"] < found["eval_loss_before"] - 0.3
    (last, *_), _ = checkpoint.published(tmp_path / "scratch")
    assert {tensor.dtype for tensor in checkpoint.weights_of(last).values()} == {torch.float32}


def test_an_unknown_target_module_is_refused_with_the_names_there_are(
    base: Path, files: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunnerError, match="no layer named 'q_prj'") as caught:
        tiny_models.trained(base, files, tmp_path, target_modules=("q_prj",))
    assert "q_proj" in caught.value.hint


def test_no_rows_to_train_on_is_an_error(base: Path, tmp_path: Path) -> None:
    files = tiny_models.token_files(tmp_path / "tokens", [])
    with pytest.raises(RunnerError, match="no rows to train on"):
        tiny_models.trained(base, files, tmp_path)


def test_overfitting_is_said_in_words() -> None:
    curve: list[dict[str, float]] = [{"step": 0, "eval_loss": 3.0}]
    for step, (loss, eval_loss) in enumerate([(2.5, 2.4), (2.0, 2.2), (1.0, 2.6)], start=1):
        curve += [{"step": step, "loss": loss}, {"step": step, "eval_loss": eval_loss}]
    assert verdicts.of_eval_loss(curve, 2) == (
        "overfitting: eval loss rose from 2.200 (step 2) to 2.600 (step 3) while training loss "
        "fell from 2.250 to 1.000; step 2 was kept; fewer epochs or more data would help"
    )


def test_smollm2_learns_in_the_precision_of_this_machine(smollm2: Path, tmp_path: Path) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    rows = [
        token_files.Row(f"c{i}", 0, np.arange(100 + i, 140 + i, dtype=np.int32), _last(40, 20), 1)
        for i in range(8)
    ]
    files = tiny_models.token_files(tmp_path / "tokens", rows, rows[:2])
    found = tiny_models.trained(smollm2, files, tmp_path, precision="auto", epochs=2, every_steps=4)
    assert found["eval_loss"] < found["eval_loss_before"] - 1
    torch.set_num_threads(1)


def _last(length: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.repeat(np.array([0, 1], np.float32), [length - count, count])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
