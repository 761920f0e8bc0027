from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runner.errors import InterruptedRun
from runner.model import load, lora, neftune, packing, token_files
from tests import tiny_models
from tests.test_sft import assert_same_bits, stop_at

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(work: Path) -> torch.Tensor:
    tensors = load_file(work / "output" / lora.WEIGHTS_FILE)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_noise_is_uniform_and_as_strong_as_the_paper_says(base: Path) -> None:
    model = load.causal_lm(base, dtype="float32", device="cpu")
    row = tiny_models.row("a", 40, [(20, 40, 1.0)])
    ids = torch.tensor(row.input_ids)[None]
    plain = model.get_input_embeddings()(ids)
    with neftune.noise(model, [[row]], 5.0, "1 0"):
        noisy = model.get_input_embeddings()(ids)
    most = 5 / math.sqrt(40 * 32)
    noise = noisy - plain
    assert 0.99 * most < noise.abs().max() <= 1.0001 * most
    assert noise.std().item() == pytest.approx(most / math.sqrt(3), rel=0.05)
    assert torch.equal(model.get_input_embeddings()(ids), plain)


def test_padding_and_neighbours_do_not_change_a_rows_noise(base: Path) -> None:
    model = load.causal_lm(base, dtype="float32", device="cpu")
    short, long = (
        tiny_models.row(name, size, [(4, 9, 1.0)]) for name, size in (("a", 9), ("b", 20))
    )
    embedded = torch.zeros(2, 30, 32)
    padded = neftune._of([[long], [short]], 5.0, "1 0", embedded)
    packed = neftune._of([[short, long]], 5.0, "1 0", embedded[:1])
    assert torch.equal(packed[0, :9], padded[1, :9])
    assert torch.equal(packed[0, 9:29], padded[0, :20])
    assert not padded[1, 9:].any()
    assert model


def test_each_step_has_a_noise_of_its_own() -> None:
    row, embedded = tiny_models.row("a", 9, [(4, 9, 1.0)]), torch.zeros(1, 9, 32)
    first, again, next_step = (
        neftune._of([[row]], 5.0, seed, embedded) for seed in ("1 0", "1 0", "1 1")
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, next_step)


def test_it_changes_the_training_and_not_the_eval_loss_before_it(
    base: Path, files: Path, tmp_path: Path
) -> None:
    plain = tiny_models.trained(base, files, tmp_path / "plain")
    noisy = tiny_models.trained(base, files, tmp_path / "noisy", neftune_alpha=5.0)
    assert noisy["eval_loss_before"] == plain["eval_loss_before"]
    assert not torch.equal(weights(tmp_path / "plain"), weights(tmp_path / "noisy"))


@pytest.mark.parametrize("step", [3, 4])
def test_a_stopped_training_with_noise_ends_with_the_bits_of_an_unbroken_one(
    base: Path, files: Path, tmp_path: Path, step: int
) -> None:
    tiny_models.trained(base, files, tmp_path / "whole", neftune_alpha=5.0)
    with pytest.raises(InterruptedRun):
        tiny_models.trained(base, files, tmp_path / "cut", neftune_alpha=5.0, emit=stop_at(step))
    tiny_models.trained(base, files, tmp_path / "cut", neftune_alpha=5.0)
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_how_a_step_is_divided_does_not_show_in_the_noise(
    base: Path, files: Path, tmp_path: Path
) -> None:
    tiny_models.trained(base, files, tmp_path / "auto", neftune_alpha=5.0)
    tiny_models.trained(base, files, tmp_path / "one", neftune_alpha=5.0, micro_batch_size=1)
    assert (weights(tmp_path / "auto") - weights(tmp_path / "one")).abs().max() <= 1e-4


def test_packed_rows_get_the_noise_of_rows_one_by_one(base: Path, tmp_path: Path) -> None:
    files = tiny_models.token_files(tmp_path / "tokens", tiny_models.conversations(6))
    settings = {"neftune_alpha": 5.0, "batch_size": 99, "epochs": 1, "max_steps": 1}
    tiny_models.trained(base, files, tmp_path / "alone", **settings)
    rows = token_files.read(files / "train.arrow")
    packing.write(files, rows.lengths, rows.conversations, 56)
    tiny_models.trained(base, files, tmp_path / "packed", **settings)
    assert (weights(tmp_path / "alone") - weights(tmp_path / "packed")).abs().max() <= 1e-4
