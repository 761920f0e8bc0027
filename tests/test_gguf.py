from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import gguf as gguf_package
import numpy as np
import pytest

from runner.errors import PreconditionError, RunnerError
from runner.model import gguf, gguf_header, gguf_types
from runner.model.gguf import Level
from runner.model.gguf_header import TensorType
from runner.model.importance import Importance, Matrix

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
    "qwen2": Shape("qwen2", 20, 256, 256, heads=8, heads_kv=2, tied=False),
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


WITH_IMPORTANCE = ("llama", "llama-narrow", "smollm2", "qwen3moe")

RECORDED = Path(__file__).parent / "golden" / "gguf_hashes.json"
"""Model and level to the hash of the whole file, as llama.cpp wrote it; made again, where
llama-cpp-python is installed, with `python -m tests.test_gguf`."""


def test_tensors_get_the_bytes_recorded_from_llama_cpp(tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text())
    assert {
        f"{name} {level}": _sha256(_quantized(tmp_path, SHAPES[name], level))
        for name in SHAPES
        for level in LEVELS
    } == {key: sha256 for key, sha256 in recorded.items() if not key.endswith("importance")}


def test_with_an_importance_matrix_too_the_bytes_are_those_recorded(tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text())
    assert {
        f"{name} {level} importance": _sha256(_quantized(tmp_path, SHAPES[name], level, True))
        for name in WITH_IMPORTANCE
        for level in LEVELS
    } == {key: sha256 for key, sha256 in recorded.items() if key.endswith("importance")}


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_writes_that_file_with_the_same_importance_matrix(
    name: str, tmp_path: Path
) -> None:
    quantize_by_llama_cpp = _reference()
    for level in LEVELS:
        ours = _quantized(tmp_path, SHAPES[name], level, True)
        theirs = tmp_path / "theirs.gguf"
        quantize_by_llama_cpp(tmp_path / "source.gguf", theirs, level, _importance(SHAPES[name]))
        assert ours.read_bytes() == theirs.read_bytes(), level


def test_an_importance_matrix_changes_the_bytes_of_what_it_names_alone(tmp_path: Path) -> None:
    def data(path: Path) -> dict[str, bytes]:
        tensors = gguf_package.GGUFReader(path).tensors
        return {tensor.name: tensor.data.tobytes() for tensor in tensors}

    plain = data(_quantized(tmp_path, SHAPES["llama"], "q4_k_m"))
    one = {"blk.3.attn_q.weight": np.linspace(0.1, 9, 256, dtype=np.float32)}
    gguf.quantize(
        tmp_path / "source.gguf",
        tmp_path / "out.gguf",
        "q4_k_m",
        _ignore,
        Importance(one, "x", "y", 1),
    )
    now = data(tmp_path / "out.gguf")
    assert [name for name in plain if now[name] != plain[name]] == ["blk.3.attn_q.weight"]


def test_a_file_says_which_importance_matrix_it_was_made_with(tmp_path: Path) -> None:
    header = gguf_header.read(_quantized(tmp_path, SHAPES["qwen3"], "q2_k", True))
    assert header.text("quantize.imatrix.file") == "importance.safetensors"
    assert header.text("quantize.imatrix.dataset") == "ж texts"
    assert header.integer("quantize.imatrix.entries_count") == 7 * 5
    assert header.integer("quantize.imatrix.chunks_count") == 12
    assert list(header.metadata)[-1] == "quantize.imatrix.chunks_count"


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (np.ones(64, np.float32), r"blk\.0\.attn_q\.weight has 64 values, not 256"),
        (np.full(256, np.nan, np.float32), r"blk\.0\.attn_q\.weight holds NaN"),
    ],
)
def test_an_importance_matrix_of_another_model_is_refused(
    matrix: Matrix, said: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "source.gguf", SHAPES["qwen3"])
    wrong = Importance({"blk.0.attn_q.weight": matrix}, "x", "y", 1)
    with pytest.raises(RunnerError, match=said):
        gguf.quantize(tmp_path / "source.gguf", tmp_path / "out", "q4_k_m", _ignore, wrong)
    assert not (tmp_path / "out").exists()


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


def test_gguf_dump_shows_what_a_file_says_of_itself(described: Path, tmp_path: Path) -> None:
    gguf.quantize(described, tmp_path / "style-iq4_xs.gguf", "iq4_xs", _ignore)
    for path, file_type in ((described, 32), (tmp_path / "style-iq4_xs.gguf", 30)):
        command = [sys.executable, "-P", "-m", "gguf.scripts.gguf_dump", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = {
            key: entry.get("value") for key, entry in json.loads(done.stdout)["metadata"].items()
        }
        general = {key: value for key, value in found.items() if key.startswith("general.")}
        assert general == {
            "general.architecture": "llama",
            "general.type": "model",
            "general.name": 'my style: "ж"',
            "general.author": "A. Person",
            "general.description": "Answers as I do.",
            "general.size_label": general["general.size_label"],
            "general.license": "apache-2.0",
            "general.base_model.count": 1,
            "general.base_model.0.name": "SmolLM2-135M-Instruct",
            "general.base_model.0.organization": "HuggingFaceTB",
            "general.base_model.0.repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
            "general.file_type": file_type,
            "general.quantization_version": 2,
        }
        assert "<|im_start|>" in found["tokenizer.chat_template"]


def test_a_file_says_nothing_that_was_not_told(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "Llama-9-7B-v3-secret").mkdir()
    for path in tiny_base.iterdir():
        shutil.copy(path, tmp_path / "Llama-9-7B-v3-secret")
    (tmp_path / "Llama-9-7B-v3-secret" / "README.md").write_text("---\nauthor: somebody\n---\n")
    gguf.convert(tmp_path / "Llama-9-7B-v3-secret", tmp_path / "x.gguf", "bf16", name="x")
    header = gguf_header.read(tmp_path / "x.gguf")
    said = {key for key in header.metadata if key.startswith("general.")}
    assert said == {
        *("general.architecture", "general.type", "general.name", "general.size_label"),
        *("general.file_type", "general.quantization_version"),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Llama-9-7B-v3-secret", "x.gguf"]


def test_what_a_quantised_base_had_lost_is_said(
    smollm2_gguf: Path, smollm2: Path, tmp_path: Path
) -> None:
    assert gguf.lost(smollm2_gguf) == (
        f"the base model {smollm2_gguf.name} was quantised already (Q4_1, 5 bits a weight): what "
        "that rounded away is missing from every file exported from it, whatever its level"
    )
    write_model(tmp_path / "plain.gguf", SHAPES["qwen3"])
    assert gguf.lost(tmp_path / "plain.gguf") is None
    assert gguf.lost(smollm2) is None
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "(bitsandbytes, 4 bits a weight)" in str(gguf.lost(tmp_path))


@pytest.mark.parametrize(
    "text", ["{", "[]", "\xff", '{"quantization_config": {"bits": "many"}}', "[" * 100_000]
)
def test_a_damaged_config_of_a_base_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(PreconditionError, match=r"config\.json is no config of a model"):
        gguf.lost(tmp_path)


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
    levels: tuple[Level, ...] = ("q4_k_m", "q4_0", "iq4_xs", "q3_k_m", "q2_k")
    ways = [(level, important) for level in levels for important in (False, True)]
    with_ggml = [_sha256(_quantized(tmp_path, SHAPES["llama"], *how)) for how in ways]
    monkeypatch.setattr(gguf, "_GGML_QUANTIZE", None)
    assert [_sha256(_quantized(tmp_path, SHAPES["llama"], *how)) for how in ways] == with_ggml


def test_a_tensor_of_many_blocks_is_the_same_as_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = _sha256(_quantized(tmp_path, SHAPES["mixtral"], "q4_k_m", True))
    monkeypatch.setattr(gguf, "_BLOCK_WEIGHTS", 1000)
    assert _sha256(_quantized(tmp_path, SHAPES["mixtral"], "q4_k_m", True)) == at_once


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


@pytest.fixture(scope="session")
def described(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GGUF that says all it can about itself."""
    path = tmp_path_factory.mktemp("described") / "tiny.gguf"
    about = gguf.About(
        author="A. Person",
        licence="apache-2.0",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        description="Answers as I do.",
    )
    gguf.convert(tiny_base, path, "bf16", name='my style: "ж"', about=about)
    return path


def _ignore(_done: int, _total: int) -> None:
    pass


def _quantized(folder: Path, shape: Shape, level: Level, important: bool = False) -> Path:
    write_model(folder / "source.gguf", shape)
    importance = _importance(shape) if important else None
    gguf.quantize(folder / "source.gguf", folder / "ours.gguf", level, _ignore, importance)
    return folder / "ours.gguf"


def _importance(shape: Shape) -> Importance:
    """A matrix with an entry for each matrix of the layers, one row for each expert."""
    random = np.random.RandomState(7)
    matrices = {}
    for name, (width, *rest) in _tensors(shape):
        if name.startswith("blk.") and rest:
            size = width * math.prod(min(count, 8) for count in rest[1:])
            matrices[name] = random.standard_gamma(0.5, size).astype(np.float32) + 1e-3
    return Importance(matrices, "importance.safetensors", "ж texts", 12)


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


def _reference() -> Callable[..., None]:
    """llama.cpp's own quantiser, where llama-cpp-python was built."""
    llama_cpp = pytest.importorskip("llama_cpp")

    def quantize(
        source: Path, output: Path, level: Level, importance: Importance | None = None
    ) -> None:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = gguf_types.FILE_TYPES[level][0]
        params.nthread = 2
        if importance is not None:
            matrices = [
                llama_cpp.llama_model_imatrix_data(
                    name.encode(),
                    matrix.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
                    matrix.size,
                )
                for name, matrix in importance.matrices.items()
            ]
            ends = llama_cpp.llama_model_imatrix_data()
            params.imatrix = (llama_cpp.llama_model_imatrix_data * (len(matrices) + 1))(
                *matrices, ends
            )
            params.kv_overrides = _overrides(
                llama_cpp,
                {
                    "file": importance.file,
                    "dataset": importance.dataset,
                    "entries_count": len(importance.matrices),
                    "chunks_count": importance.chunks,
                },
            )
        names = os.fsencode(source), os.fsencode(output)
        assert llama_cpp.llama_model_quantize(*names, ctypes.byref(params)) == 0

    return quantize


def _overrides(llama_cpp: Any, facts: dict[str, str | int]) -> Any:
    """What llama.cpp's program for quantising sets beside an importance matrix."""
    entries = (llama_cpp.llama_model_kv_override * (len(facts) + 1))()  # the last one is empty
    for entry, (key, value) in zip(entries, facts.items(), strict=False):
        entry.key = f"quantize.imatrix.{key}".encode()
        if isinstance(value, str):
            entry.tag, entry.value.val_str = 3, value.encode()
        else:
            entry.tag, entry.value.val_i64 = 0, value
    return entries


def record() -> None:
    """Writes the table of hashes anew, from the files that llama.cpp itself writes."""
    quantize_by_llama_cpp = _reference()
    hashes = {}
    with tempfile.TemporaryDirectory() as folder:
        source, theirs = Path(folder) / "source.gguf", Path(folder) / "theirs.gguf"
        for name, shape in SHAPES.items():
            write_model(source, shape)
            for level in LEVELS:
                quantize_by_llama_cpp(source, theirs, level)
                hashes[f"{name} {level}"] = _sha256(theirs)
                if name in WITH_IMPORTANCE:
                    quantize_by_llama_cpp(source, theirs, level, _importance(shape))
                    hashes[f"{name} {level} importance"] = _sha256(theirs)
    RECORDED.write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
