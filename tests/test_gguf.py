from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import gguf as gguf_package
import numpy as np
import pytest

from runner.errors import PreconditionError, RunnerError
from runner.model import gguf, gguf_header
from runner.model.gguf import Level
from runner.model.gguf_header import TensorType

LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Shape:
    """A model with the tensors of a real one, but few rows in each: the quantiser asks for the
    names, the width of the rows and the metadata alone."""

    architecture: str
    layers: int
    width: int
    feed_forward: int
    heads: int = 4
    heads_kv: int = 2
    experts: int = 0
    tied: bool = True
    fused: bool = False
    extra: tuple[tuple[str, tuple[int, ...]], ...] = ()
    seed: int = 0


SHAPES = {
    "llama": Shape("llama", 9, 256, 512, tied=False),
    "llama-narrow": Shape("llama", 9, 96, 160, heads=3, heads_kv=3, tied=False),
    "smollm2": Shape("llama", 6, 64, 256, heads=4, heads_kv=1),
    "llama-70b": Shape("llama", 80, 256, 32, heads=8, heads_kv=1),
    "qwen3": Shape("qwen3", 5, 256, 352),
    "gemma3": Shape("gemma3", 7, 160, 256, heads=4, heads_kv=1),
    "gemma3n": Shape(
        "gemma3n",
        4,
        256,
        256,
        extra=(
            ("per_layer_token_embd.weight", (4 * 64, 48)),
            ("per_layer_model_proj.weight", (256, 4 * 64)),
            ("per_layer_proj_norm.weight", (64,)),
            ("altup_proj.weight", (256, 256, 3)),
            ("blk.0.laurel_l.weight", (256, 64)),
            ("blk.0.inp_gate.weight", (256, 64)),
            ("blk.1.proj.weight", (64, 256)),
        ),
    ),
    "mixtral": Shape("llama", 6, 256, 256, experts=8, tied=False),
    "qwen3moe": Shape("qwen3moe", 6, 256, 64, experts=16, tied=False),
    "phi2": Shape("phi2", 8, 256, 288, heads_kv=4, tied=False, fused=True),
}


def test_tensors_get_the_bytes_recorded_from_llama_cpp(tmp_path: Path) -> None:
    recorded = json.loads((Path(__file__).parent / "data/gguf_sha256.json").read_text())
    assert {
        f"{name} {level}": _sha256(_quantized(tmp_path, SHAPES[name], level))
        for name in SHAPES
        for level in LEVELS
    } == recorded


@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_file_is_the_one_llama_cpp_writes(name: str, tmp_path: Path) -> None:
    quantize_by_llama_cpp = _reference()
    for level in LEVELS:
        ours = _quantized(tmp_path, SHAPES[name], level)
        theirs = tmp_path / "theirs.gguf"
        quantize_by_llama_cpp(tmp_path / "source.gguf", theirs, level)
        assert ours.read_bytes() == theirs.read_bytes(), level


def test_a_converted_model_quantises_as_llama_cpp_does(converted: Path, tmp_path: Path) -> None:
    quantize_by_llama_cpp = _reference()
    levels: tuple[Level, ...] = ("q8_0", "q4_k_m")
    for level in levels:
        gguf.quantize(converted, tmp_path / "ours.gguf", level, _ignore)
        quantize_by_llama_cpp(converted, tmp_path / "theirs.gguf", level)
        assert _sha256(tmp_path / "ours.gguf") == _sha256(tmp_path / "theirs.gguf"), level


def test_a_converted_model_carries_its_name_and_its_chat_template(converted: Path) -> None:
    header = gguf_header.read(converted)
    assert header.text("general.architecture") == "llama"
    assert header.text("general.name") == "my style"
    assert "<|im_start|>" in (header.text("tokenizer.chat_template") or "")
    assert header.integer("general.file_type") == 1


def test_rows_that_fit_no_k_quant_get_llama_cpps_substitutes() -> None:
    def types(width: int, level: Level) -> TensorType:
        tensor = gguf_header.Tensor("blk.1.attn_q.weight", (width, 64), TensorType.F16, 0)
        return gguf.tensor_types(gguf_header.Header({}, (tensor,)), level)[tensor.name]

    assert [types(width, "q4_k_m").name for width in (512, 96, 80)] == ["Q4_K", "Q5_0", "F16"]
    assert [types(width, "q5_k_m").name for width in (512, 96, 80)] == ["Q5_K", "Q5_1", "F16"]
    assert [types(width, "q6_k").name for width in (512, 96, 80)] == ["Q6_K", "Q8_0", "F16"]
    with pytest.raises(RunnerError, match="rows of 80 weights are not whole blocks of 32"):
        types(80, "q8_0")


def test_libgguf_gives_the_same_bytes_as_ggml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gguf._GGML_QUANTIZE is None:
        pytest.skip("this wheel of xllamacpp exports no ggml_quantize_chunk")
    by_ggml = _sha256(_quantized(tmp_path, SHAPES["llama"], "q4_k_m"))
    monkeypatch.setattr(gguf, "_GGML_QUANTIZE", None)
    assert _sha256(_quantized(tmp_path, SHAPES["llama"], "q4_k_m")) == by_ggml


def test_a_tensor_of_many_blocks_is_the_same_as_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = _sha256(_quantized(tmp_path, SHAPES["llama"], "q4_k_m"))
    monkeypatch.setattr(gguf, "_BLOCK_WEIGHTS", 1000)
    assert _sha256(_quantized(tmp_path, SHAPES["llama"], "q4_k_m")) == at_once


def test_the_gguf_package_reads_back_what_was_written(tmp_path: Path) -> None:
    path = _quantized(tmp_path, SHAPES["llama"], "q8_0")
    tensors = {tensor.name: tensor for tensor in gguf_package.GGUFReader(path).tensors}
    weights = gguf_package.dequantize(
        tensors["blk.0.ffn_down.weight"].data, tensors["blk.0.ffn_down.weight"].tensor_type
    )
    sources = gguf_package.GGUFReader(tmp_path / "source.gguf").tensors
    source = next(tensor.data for tensor in sources if tensor.name == "blk.0.ffn_down.weight")
    assert np.abs(weights - source.astype(np.float32)).max() < 0.02


def test_progress_ends_with_every_byte_of_the_source(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    write_model(tmp_path / "source.gguf", SHAPES["qwen3"])
    gguf.quantize(
        tmp_path / "source.gguf",
        tmp_path / "out.gguf",
        "q6_k",
        lambda done, total: heard.append((done, total)),
    )
    assert heard == sorted(heard)
    assert heard[-1][0] == heard[-1][1] > 0


def test_a_quantised_source_is_refused(tmp_path: Path) -> None:
    once = _quantized(tmp_path, SHAPES["qwen3"], "q4_0")
    with pytest.raises(RunnerError, match="is Q6_K already") as caught:
        gguf.quantize(once, tmp_path / "twice.gguf", "q8_0", _ignore)
    assert caught.value.hint == "start from an f32, bf16 or f16 file"


def test_weights_that_are_not_numbers_are_named_and_leave_no_file(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    write_model(source, SHAPES["qwen3"])
    header = gguf_header.read(source)
    broken = next(tensor for tensor in header.tensors if tensor.name == "blk.2.ffn_up.weight")
    with source.open("r+b") as file:
        file.seek(broken.offset)
        file.write(np.array([np.nan], np.float16).tobytes())
    with pytest.raises(RunnerError, match=r"blk\.2\.ffn_up\.weight holds NaN or infinity"):
        gguf.quantize(source, tmp_path / "out.gguf", "q8_0", _ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(PreconditionError, match=r"no model\*\.safetensors"):
        gguf.convert(tmp_path, tmp_path / "out.gguf", "f16", name="x")


def test_a_folder_with_python_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "modeling_x.py").write_text("raise SystemExit")
    with pytest.raises(RunnerError, match=r"holds Python code \(modeling_x\.py\)"):
        gguf.convert(tmp_path, tmp_path / "out.gguf", "f16", name="x")


def test_a_failed_conversion_says_what_the_converter_said_last(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(RunnerError, match="cannot be converted") as caught:
        gguf.convert(tmp_path, tmp_path / "out.gguf", "f16", name="x")
    assert "NoSuchModel" in caught.value.hint
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(["BF16"], "bf16"), (["F16"], "f16"), (["BF16", "F32"], "f32"), (["F32"], "f32")],
)
def test_the_stored_dtype_loses_nothing(stored: list[str], expected: str, tmp_path: Path) -> None:
    for index, dtype in enumerate(stored):
        entry = {"w": {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}
        head = json.dumps(entry).encode()
        shard = tmp_path / f"model-{index:05}.safetensors"
        shard.write_bytes(len(head).to_bytes(8, "little") + head)
    assert gguf.stored_dtype(tmp_path) == expected


@pytest.fixture(scope="session")
def converted(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as an f16 GGUF."""
    path = tmp_path_factory.mktemp("converted") / "smollm2.gguf"
    gguf.convert(smollm2, path, "f16", name="my style")
    return path


def _ignore(_done: int, _total: int) -> None:
    pass


def _quantized(folder: Path, shape: Shape, level: Level) -> Path:
    write_model(folder / "source.gguf", shape)
    gguf.quantize(folder / "source.gguf", folder / "ours.gguf", level, _ignore)
    return folder / "ours.gguf"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_model(path: Path, shape: Shape) -> None:
    """An f16 GGUF by the gguf package; norms and the like are float32, as converters leave them."""
    writer = gguf_package.GGUFWriter(path, shape.architecture)
    writer.add_name("tiny")
    writer.add_block_count(shape.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_sliding_window(32)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(min(2, shape.experts))
    writer.add_expert_feed_forward_length(shape.feed_forward)
    writer.add_file_type(gguf_package.LlamaFileType.MOSTLY_F16)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ж", ""])
    writer.add_quantization_version(gguf_package.GGML_QUANT_VERSION)
    random = np.random.RandomState(shape.seed)  # its stream is the same for ever
    for name, (row, *rows) in _tensors(shape):
        size = (row, *(min(count, 8) for count in rows))
        weights = random.standard_normal(tuple(reversed(size))).astype(np.float32) * 0.05
        small = len(size) == 1 or "norm" in name
        writer.add_tensor(name, weights if small else weights.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes, the width of a row first."""
    width, ff = shape.width, shape.feed_forward
    head = width // shape.heads
    yield "token_embd.weight", (width, 48)
    yield "output_norm.weight", (width,)
    if not shape.tied:
        yield "output.weight", (width, 48)
    yield from shape.extra
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (width,)
        if shape.fused:
            yield block + "attn_qkv.weight", (width, width + 2 * head * shape.heads_kv)
            yield block + "attn_qkv.bias", (width + 2 * head * shape.heads_kv,)
        else:
            yield block + "attn_q.weight", (width, width)
            yield block + "attn_k.weight", (width, head * shape.heads_kv)
            yield block + "attn_v.weight", (width, head * shape.heads_kv)
        yield block + "attn_output.weight", (width, width)
        if shape.experts:
            yield block + "ffn_gate_inp.weight", (width, shape.experts)
            yield block + "ffn_gate_exps.weight", (width, ff, shape.experts)
            yield block + "ffn_up_exps.weight", (width, ff, shape.experts)
            yield block + "ffn_down_exps.weight", (ff, width, shape.experts)
        else:
            yield block + "ffn_gate.weight", (width, ff)
            yield block + "ffn_up.weight", (width, ff)
            yield block + "ffn_down.weight", (ff, width)


def _reference() -> Callable[[Path, Path, Level], None]:
    """llama.cpp's own quantiser, where llama-cpp-python was built."""
    llama_cpp = pytest.importorskip("llama_cpp")

    def quantize(source: Path, output: Path, level: Level) -> None:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = gguf._FILE_TYPES[level][0]
        params.nthread = 2
        names = os.fsencode(source), os.fsencode(output)
        assert llama_cpp.llama_model_quantize(*names, ctypes.byref(params)) == 0

    return quantize
