"""The importance matrix: measured on the model's own texts, named as the GGUF file names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from runner.errors import PreconditionError
from runner.model import gguf, gguf_header, imatrix, importance, load
from runner.model.importance import Importance
from tests import tiny_models
from tests.test_gguf import SHAPES, write_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def unquantised(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unquantised") / "tiny.gguf"
    gguf.convert(tiny_base, path, gguf.stored_dtype(tiny_base), name="tiny")
    return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough rows to train on, and others that are held out."""
    rows = [tiny_models.row(f"c{n}", 100, [(50, 100, 1.0)]) for n in range(20)]
    held_out = [tiny_models.row(f"h{n}", 100, [(50, 100, 1.0)]) for n in range(5)]
    return tiny_models.token_files(tmp_path_factory.mktemp("tokens"), rows, held_out)


def collected(model: Path, unquantised: Path, tokens: Path | None, output: Path) -> Importance:
    imatrix.collect(
        model=model, unquantised=unquantised, tokens=tokens, output=output, emit=lambda _event: None
    )
    found = importance.read(output)
    assert found is not None
    return found


def test_every_linear_layer_is_found_by_its_name_in_the_gguf_file(
    tiny_base: Path, unquantised: Path, tokens: Path, tmp_path: Path
) -> None:
    found = collected(tiny_base, unquantised, tokens, tmp_path / "x.safetensors")
    tensors = gguf_header.read(unquantised).tensors
    wide = {one.name: one.shape[0] for one in tensors if one.name.startswith("blk.")}
    wide = {name: width for name, width in wide.items() if "norm" not in name}
    assert {name: len(matrix) for name, matrix in found.matrices.items()} == wide


def test_a_layers_importance_is_the_mean_square_of_what_goes_into_it(
    tiny_base: Path, unquantised: Path, tokens: Path, tmp_path: Path
) -> None:
    found = collected(tiny_base, unquantised, tokens, tmp_path / "x.safetensors")
    model = load.causal_lm(tiny_base, dtype="float32", device="cpu").model
    rows = [tiny_models.row(f"c{n}", 100, []).input_ids.tolist() for n in range(20)]
    with torch.no_grad():
        inputs = model.layers[0].input_layernorm(model.embed_tokens(torch.tensor(rows)))
    expected = inputs.square().mean((0, 1)).numpy()
    for name in ("attn_q", "attn_k", "attn_v"):
        measured = found.matrices[f"blk.0.{name}.weight"]
        np.testing.assert_allclose(measured, expected, rtol=1e-4)


def test_training_rows_are_read_and_no_held_out_ones(
    tiny_base: Path, unquantised: Path, tokens: Path, tmp_path: Path
) -> None:
    with_eval = collected(tiny_base, unquantised, tokens, tmp_path / "x.safetensors")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "train.arrow").write_bytes((tokens / "train.arrow").read_bytes())
    collected(tiny_base, unquantised, tmp_path / "only", tmp_path / "y.safetensors")
    assert with_eval.dataset == "training rows of the recipe"
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_without_rows_of_its_own_neutral_texts_are_read(
    tiny_base: Path, unquantised: Path, tmp_path: Path
) -> None:
    found = collected(tiny_base, unquantised, None, tmp_path / "x.safetensors")
    assert found.dataset == "neutral texts"
    few = tiny_models.token_files(tmp_path / "few", tiny_models.conversations(3))
    found = collected(tiny_base, unquantised, few, tmp_path / "y.safetensors")
    assert found.dataset == "training rows of the recipe and neutral texts"


def test_no_more_is_read_than_is_useful(tmp_path: Path) -> None:
    many = [tiny_models.row(f"c{n}", 3000, []) for n in range(12)]
    path = tiny_models.token_files(tmp_path, many) / "train.arrow"
    rows = imatrix._bounded(imatrix._own(path))
    assert [len(row) for row in rows] == [imatrix.ROW_TOKENS] * 8


def test_a_layer_whose_columns_were_reordered_is_left_out(
    tiny_base: Path, unquantised: Path, tokens: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(unquantised.read_bytes())
    name = "blk.1.ffn_down.weight"
    tensor = next(one for one in gguf_header.read(other).tensors if one.name == name)
    weights = np.memmap(other, np.uint16, "r+", tensor.offset, tuple(reversed(tensor.shape)))
    assert tensor.type == gguf_header.TensorType.BF16
    weights[:] = weights[:, ::-1].copy()
    weights.flush()
    found = collected(tiny_base, other, tokens, tmp_path / "x.safetensors")
    assert len(found.matrices) == 13
    assert name not in found.matrices


def test_where_no_layer_is_found_that_is_said_and_nothing_is_weighed(
    tiny_base: Path, tokens: Path, tmp_path: Path
) -> None:
    another = tmp_path / "another.gguf"
    write_model(another, SHAPES["qwen3"])
    events: list[dict[str, object]] = []
    output = tmp_path / "x.safetensors"
    imatrix.collect(
        model=tiny_base, unquantised=another, tokens=tokens, output=output, emit=events.append
    )
    assert any("no layer of the model was found" in str(event.get("text")) for event in events)
    assert importance.read(output) is None


def test_inputs_that_were_always_zero_still_count_a_little(tmp_path: Path) -> None:
    floored = imatrix._floored(np.array([0, 2], np.float32))
    assert floored.tolist() == [pytest.approx(1e-6), 2]
    assert imatrix._floored(np.zeros(2, np.float32)).min() > 0


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    matrices = {"b": np.arange(3, dtype=np.float32), "a": np.ones(2, np.float32)}
    importance.write(Importance(matrices, "", "ж", 3), tmp_path / ".importance.safetensors")
    found = importance.read(tmp_path / ".importance.safetensors")
    assert found is not None
    assert (found.file, found.dataset, found.chunks) == ("importance.safetensors", "ж", 3)
    assert {name: matrix.tolist() for name, matrix in found.matrices.items()} == {
        name: matrix.tolist() for name, matrix in matrices.items()
    }


def test_a_damaged_importance_matrix_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(PreconditionError, match=r"x\.safetensors: no importance matrix"):
        importance.read(tmp_path / "x.safetensors")
