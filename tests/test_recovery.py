from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runner.errors import InterruptedRun, PreconditionError
from runner.model import batches, load, lora, packing, recovery, score, token_files
from tests import tiny_models
from tests.test_sft import stop_at

EXACT = torch.autocast("cpu", enabled=False)
CPU_WORDS = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 8388608 bytes. Error code 12 (Cannot allocate memory)"
)


pytestmark = pytest.mark.usefixtures("one_thread")


def narrow(monkeypatch: pytest.MonkeyPatch, most: int, error: BaseException) -> None:
    """Lets only passes of at most so many tokens through; larger ones fail after the forward."""
    real = score.summed_nll

    def summed_nll(model: Any, batch: batches.Batch) -> torch.Tensor:
        loss = real(model, batch)
        if batch.input_ids.numel() > most:
            raise error
        return loss

    monkeypatch.setattr(score, "summed_nll", summed_nll)


def warnings(events: list[dict[str, Any]]) -> list[str]:
    return [event["text"] for event in events if event["event"] == "warning"]


def weights(work: Path) -> torch.Tensor:
    tensors = load_file(work / "output" / lora.WEIGHTS_FILE)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def step_gradient(
    base: Path, rows: list[token_files.Row], limits: recovery.Limits, sizes: tuple[int, ...] = ()
) -> tuple[torch.Tensor, recovery.Limits, list[dict[str, Any]]]:
    """The clipped gradient of one step, as `gradients` leaves it."""
    model = load.causal_lm(base, dtype="float32", device="cpu").train()
    trained = dict(model.named_parameters())
    events: list[dict[str, Any]] = []
    _, _, found = recovery.gradients(
        model, trained, rows, sizes, 1, limits, EXACT, 1.0, recovery.Noise(), events.append
    )
    grads = [p.grad.flatten() for p in trained.values() if p.grad is not None]
    return torch.cat(grads), found, events


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(CPU_WORDS),
        RuntimeError("std::bad_alloc"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("micro_batch_size", [None, 6])
def test_a_step_out_of_memory_has_the_gradient_of_an_undisturbed_one(
    error: BaseException,
    micro_batch_size: int | None,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, limits = tiny_models.conversations(6), recovery.Limits(micro_batch_size, 2048)
    expected, _, _ = step_gradient(base, rows, limits)
    narrow(monkeypatch, 60, error)
    found, smaller, events = step_gradient(base, rows, limits)
    assert (found - expected).abs().max() <= 1e-6
    assert smaller != limits
    assert warnings(events)
    assert all(text.startswith("out of memory: ") for text in warnings(events))


def test_a_pack_that_does_not_fit_is_cut_between_its_rows(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, limits = tiny_models.conversations(6), recovery.Limits(1, 2048)
    expected, _, _ = step_gradient(base, rows, limits, (6,))
    narrow(monkeypatch, 60, RuntimeError(CPU_WORDS))
    found, smaller, _ = step_gradient(base, rows, limits, (6,))
    assert (found - expected).abs().max() <= 1e-6
    assert smaller.micro_batch_size is None
    assert smaller.pass_tokens <= 60


def test_other_errors_are_not_taken_for_memory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        step_gradient(base, tiny_models.conversations(2), recovery.Limits(None, 2048))


@pytest.mark.parametrize("setting", ["auto", "off", "on"])
def test_one_row_that_does_not_fit_is_said_once_nothing_more_can_be_done(
    setting: recovery.Recompute, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch, 0, RuntimeError(CPU_WORDS))
    limits = recovery.Limits(None, 2048, recompute=setting)
    with pytest.raises(PreconditionError, match="one example of 27 tokens does not fit") as caught:
        step_gradient(base, tiny_models.conversations(4), limits)
    assert ("gradient_checkpointing: auto" in caught.value.hint) == (setting == "off")


def test_a_training_out_of_memory_goes_on_in_the_same_step(
    base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.trained(base, files, tmp_path / "whole")
    real, calls = score.summed_nll, 0

    def summed_nll(model: Any, batch: batches.Batch) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if torch.is_grad_enabled() and calls > 3 and batch.input_ids.numel() > 40:
            raise RuntimeError(CPU_WORDS)
        return real(model, batch)

    monkeypatch.setattr(score, "summed_nll", summed_nll)
    events: list[dict[str, Any]] = []
    tiny_models.trained(base, files, tmp_path / "narrow", events=events)
    assert [e["step"] for e in events if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert warnings(events)
    assert (weights(tmp_path / "narrow") - weights(tmp_path / "whole")).abs().max() <= 1e-4


def test_a_training_that_goes_on_remembers_what_there_was_memory_for(
    base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch, 60, RuntimeError(CPU_WORDS))
    tiny_models.trained(base, files, tmp_path / "whole")
    with pytest.raises(InterruptedRun):
        tiny_models.trained(base, files, tmp_path / "cut", emit=stop_at(3))
    events: list[dict[str, Any]] = []
    tiny_models.trained(base, files, tmp_path / "cut", events=events)
    assert not warnings(events)
    assert torch.equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_an_evaluation_out_of_memory_measures_fewer_tokens_at_a_time(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load.causal_lm(base, dtype="float32", device="cpu")
    rows, events = tiny_models.conversations(9), []
    expected = score.mean_loss(model, rows)
    narrow(monkeypatch, 60, RuntimeError(CPU_WORDS))
    limits = recovery.Limits(None, 2048)
    found, smaller = recovery.mean_loss(model, rows, limits, EXACT, events.append)
    assert found == pytest.approx(expected, rel=1e-6)
    assert smaller.eval_tokens == 64
    assert warnings(events)[-1] == ("out of memory: eval measures 64 tokens at a time from now on")


def test_a_model_without_room_is_said_in_words() -> None:
    with (
        pytest.raises(PreconditionError, match="out of memory: there is no room for the model"),
        recovery.memory_in_words("the model", "a smaller one"),
    ):
        raise RuntimeError(CPU_WORDS)


@pytest.mark.parametrize("setting", ["on", "off"])
def test_recomputing_activations_changes_nothing(
    setting: recovery.Recompute, base: Path, files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(base, files, tmp_path / "auto", dropout=0.1)
    tiny_models.trained(base, files, tmp_path / "set", dropout=0.1, gradient_checkpointing=setting)
    assert (weights(tmp_path / "auto") - weights(tmp_path / "set")).abs().max() <= 1e-6


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from runner.model import sft
torch.set_num_threads(1)
from tests import tiny_models

base, files, work, room = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
model_made = False

def emit(event):
    global model_made
    if event["event"] == "verdict" and not model_made and room:
        model_made = True  # all is loaded: from here on there are so many bytes more
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    print(json.dumps(event), flush=True)

tiny_models.trained(base, files, work, emit=emit, batch_size=16, max_steps=2, every_steps=2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory")
def test_a_real_limit_on_memory_makes_passes_smaller_and_changes_no_result(tmp_path: Path) -> None:
    # Long rows through wide layers: a pass of all of them holds some 300 MB.
    base = tiny_models.folder(tmp_path / "base", hidden_size=128, intermediate_size=1024)
    rows = [tiny_models.row(f"c{i}", 120, [(60, 120, 1.0)]) for i in range(32)]
    files = tiny_models.token_files(tmp_path / "tokens", rows)

    def run(name: str, room: int) -> list[dict[str, Any]]:
        command = [sys.executable, "-c", LIMITED, base, files, tmp_path / name, str(room)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    assert not warnings(run("wide", 0))
    said = warnings(run("narrow", 25_000_000))
    assert said
    assert all(text.startswith("out of memory: ") for text in said)
    difference = (weights(tmp_path / "wide") - weights(tmp_path / "narrow")).abs().max()
    assert difference <= 1e-4


def test_packed_rows_out_of_memory_train_as_they_would_have(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny_models.token_files(tmp_path / "tokens", tiny_models.conversations(24))
    rows = token_files.read(files / "train.arrow")
    packing.write(files, rows.lengths, rows.conversations, 56)
    tiny_models.trained(base, files, tmp_path / "whole", max_steps=3)
    narrow(monkeypatch, 56, RuntimeError(CPU_WORDS))
    tiny_models.trained(base, files, tmp_path / "narrow", max_steps=3)
    assert (weights(tmp_path / "whole") - weights(tmp_path / "narrow")).abs().max() <= 1e-4
