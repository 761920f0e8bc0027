"""Merging that reads and writes one tensor at a time, so that a model of any size is merged in
little more memory than its largest tensor takes.

Safetensors are read and written here without a library: a header, checked before anything else is
read, and then plain numbers. O outputs of a layer, I inputs, R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runner import disk
from runner.errors import PreconditionError, RunnerError
from runner.model import source

MAX_SHARD_BYTES = 5_000_000_000
"""As Hugging Face's own libraries cut a model."""

_HEADER_BYTES_MAX = 100_000_000  # safetensors refuses more
_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PART = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>A|B|magnitude_vector)(\.weight)?"
)
_WHOLE = re.compile(r"base_model\.model\.(?P<name>.+)")
_NF4_PART = re.compile(
    r"(?P<name>.+)\.(?:absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\.bitsandbytes__(?:nf4|fp4))"
)
_UNUSUAL = (
    *("fan_in_fan_out", "rank_pattern", "alpha_pattern", "target_parameters", "lora_bias"),
    *("trainable_token_indices", "layer_replication", "megatron_config"),
)
"""Settings of PEFT with which an adapter is more than a sum for each layer."""
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: where its bytes are."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """From the start of the file."""

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        data = bytearray(self.size_bytes)
        with self.file.open("rb") as file:
            file.seek(self.start)
            if file.readinto(data) != len(data):
                raise _damaged(self.file, "it was cut off while it was read")
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its shape and type, and what makes it once its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stored(folder: Path) -> Mapping[str, Stored]:
    """All tensors of a model's folder by name, in the order of its files.

    Raises PreconditionError where a header does not describe its file exactly.
    """
    found: dict[str, Stored] = {}
    for path in source.weight_files(folder):
        for name, tensor in _of_file(path).items():
            if name in found:
                raise _damaged(path, f"{name!r} is in {found[name].file.name} too")
            found[name] = tensor
    return found


def planned(base: Path, adapter: Path | None, dtype: torch.dtype) -> Sequence[Planned] | None:
    """The tensors of the model, with the adapter added, in `dtype`; None where the adapter is of a
    kind, or for names, that only the opened model can tell.

    Each sum is in float32, and rounded once. What 4-bit weights stand for is computed first.
    """
    there = stored(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    tensors = {name: _plain(name, tensor) for name, tensor in there.items()}
    if config.get("quantization_config"):
        tensors = _unquantised(base, config["quantization_config"], there)
    changed: Mapping[str, Planned] = {}
    if adapter is not None:
        tied = bool(config.get("tie_word_embeddings"))
        found = _changed(adapter, tensors, tied)
        if found is None:
            return None
        changed = found
    return [_rounded(changed.get(name, tensor), dtype) for name, tensor in tensors.items()]


def write(tensors: Sequence[Planned], output: Path, *, max_shard_bytes: int) -> None:
    """Writes them as Hugging Face does: one file, or several with an index."""
    needed = sum(tensor.size_bytes for tensor in tensors)
    disk.check_room(output, needed)
    shards = _shards(tensors, max_shard_bytes)
    names = [
        "model.safetensors"
        if len(shards) == 1
        else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    try:
        for name, shard in zip(names, shards, strict=True):
            with (output / name).open("wb") as file:
                _write_shard(file, shard)
        if len(shards) > 1:
            places = {t.name: name for name, s in zip(names, shards, strict=True) for t in s}
            index = {"metadata": {"total_size": needed}, "weight_map": dict(sorted(places.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (output / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk.full(error, output, needed) or error from error


def write_config(folder: Path, output: Path, dtype: str) -> None:
    """The config of a model as that of the same model in another number format."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (part is config or {"dtype", "torch_dtype"} & part.keys()):
            for gone in ("torch_dtype", "quantization_config", "_name_or_path"):
                part.pop(gone, None)
            part["dtype"] = dtype
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (output / "config.json").write_text(text, encoding="utf-8")


def _of_file(path: Path) -> dict[str, Stored]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_HEADER_BYTES_MAX, size - 8):
                raise _damaged(path, f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise PreconditionError(
            f"{path}: cannot be read: {error.strerror}", hint="get the model again"
        ) from error
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a table")
    found = {
        name: _entry(path, name, entry, 8 + length)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    expected = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].size_bytes)):
        if tensor.start != expected:
            raise _damaged(path, f"{name!r} is not where the tensor before it ends")
        expected += tensor.size_bytes
    if expected != size:
        raise _damaged(path, f"{size} bytes, its header describes {expected}")
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def _entry(path: Path, name: str, entry: Any, start: int) -> Stored:
    try:
        dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
        first, last = entry["data_offsets"]
        sides = [*shape, first, last]
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"{name!r} is not described") from None
    if dtype is None:
        raise PreconditionError(
            f"{path}: {name} holds {str(entry['dtype'])[:20]} numbers, which cannot be merged",
            hint="take the model in bfloat16, float16 or float32",
        )
    if any(type(side) is not int or not 0 <= side < 1 << 60 for side in sides) or len(sides) > 12:
        raise _damaged(path, f"{name!r} has the shape {str(shape)[:40]}")
    tensor = Stored(path, dtype, tuple(shape), start + first)
    if last - first != tensor.size_bytes:
        raise _damaged(path, f"{name!r} takes {last - first} bytes, not {tensor.size_bytes}")
    return tensor


def _damaged(path: Path, why: str) -> PreconditionError:
    return PreconditionError(
        f"{path}: not a usable safetensors file: {why}", hint="get the model again"
    )


def _plain(name: str, tensor: Stored) -> Planned:
    return Planned(name, tensor.dtype, tensor.shape, tensor.read)


def _rounded(tensor: Planned, dtype: torch.dtype) -> Planned:
    if not tensor.dtype.is_floating_point:
        return tensor
    return Planned(tensor.name, dtype, tensor.shape, lambda: tensor.make().to(dtype))


def _changed(
    adapter: Path, tensors: Mapping[str, Planned], tied: bool
) -> Mapping[str, Planned] | None:
    """What takes the place of the base's tensors; None where that cannot be told from names."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA" or any(config.get(key) for key in _UNUSUAL):
        return None
    if config.get("bias", "none") != "none":
        return None
    rank = int(config["r"])
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    parts: dict[str, dict[str, Stored]] = {}
    changed: dict[str, Planned] = {}
    for key, tensor in _of_file(adapter / "adapter_model.safetensors").items():
        if part := _PART.fullmatch(key):
            parts.setdefault(f"{part['layer']}.weight", {})[part["part"]] = tensor
        elif whole := _WHOLE.fullmatch(key):
            changed[whole["name"]] = _plain(whole["name"], tensor)
        else:
            return None
    if tied and (there := [name for name in _VOCABULARY if name in changed]):
        # PEFT writes both; only the embeddings are in most bases.
        if len(there) == 1:
            return None
        if _VOCABULARY[1] not in tensors:
            del changed[_VOCABULARY[1]]
    for name, found in parts.items():
        base = tensors.get(name)
        if base is None or not _fits(found, base.shape, rank) or name in changed:
            return None
        make = partial(_sum, base, found["A"], found["B"], scale, found.get("magnitude_vector"))
        changed[name] = Planned(name, torch.float32, base.shape, make)
    known = all(name in tensors and tensors[name].shape == changed[name].shape for name in changed)
    return changed if known else None


def _fits(parts: Mapping[str, Stored], shape: tuple[int, ...], rank: int) -> bool:
    if not {"A", "B"} <= parts.keys() or len(shape) != 2:
        return False
    outputs, inputs = shape
    lengths = parts.get("magnitude_vector")
    return (
        parts["A"].shape == (rank, inputs)
        and parts["B"].shape == (outputs, rank)
        and (lengths is None or lengths.shape == (outputs,))
    )


def _sum(base: Planned, a: Stored, b: Stored, scale: float, lengths: Stored | None) -> Tensor:
    """W + scale·B·A; for DoRA (arXiv:2402.09353), equation 5, each row at its trained length."""
    whole = base.make().float()  # (O, I), a copy unless the base is in float32, and then our own
    whole += (b.read().float() @ a.read().float()) * scale
    if lengths is not None:
        whole *= (lengths.read().float() / torch.linalg.norm(whole, dim=1))[:, None]
    return whole


def _unquantised(
    base: Path, quantised: Mapping[str, Any], there: Mapping[str, Stored]
) -> dict[str, Planned]:
    """What the weights of a bitsandbytes 4-bit model stand for, as numbers again."""
    method = str(quantised.get("quant_method"))
    if method != "bitsandbytes" or not quantised.get("load_in_4bit"):
        raise RunnerError(
            f"{base}: its weights are quantised ({method[:40]}), and nothing is merged onto those",
            hint="set base_model to the unquantised model that it was made from",
        )
    parts: dict[str, dict[str, Stored]] = {}
    for key, tensor in there.items():
        if found := _NF4_PART.fullmatch(key):
            parts.setdefault(found["name"], {})[key.removeprefix(found["name"] + ".")] = tensor
    tensors: dict[str, Planned] = {}
    for name, tensor in there.items():
        if name in parts:
            tensors[name] = _from_four_bits(base, name, tensor, parts[name])
        elif not _NF4_PART.fullmatch(name):
            tensors[name] = _plain(name, tensor)
    return tensors


def _from_four_bits(base: Path, name: str, packed: Stored, parts: Mapping[str, Stored]) -> Planned:
    try:
        said = next(part for key, part in parts.items() if key.startswith("quant_state."))
        state = json.loads(bytes(said.read().tolist()))
        shape = tuple(int(side) for side in state["shape"])
    except (StopIteration, ValueError, KeyError, TypeError) as error:
        raise RunnerError(
            f"{base}: {name} is held in 4 bits, and what they stand for is not said",
            hint="get the model again, or set base_model to the unquantised one",
        ) from error

    def make() -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        read = {f"{name}.{key}": part.read() for key, part in parts.items()}
        quant_state = QuantState.from_dict(read, device=torch.device("cpu"))
        found: Tensor = dequantize_4bit(packed.read(), quant_state)
        return found.reshape(shape)

    return Planned(name, torch.float32, shape, make)


def _shards(tensors: Sequence[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    """In the order given, each shard as full as may be; a larger tensor has one of its own."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size_bytes
    return shards


def _write_shard(file: BinaryIO, tensors: Sequence[Planned]) -> None:
    """The bytes that the safetensors library writes: wide numbers first, then by name."""
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name.encode()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [place, place + tensor.size_bytes],
        }
        place += tensor.size_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for data in _data(ordered):
        file.write(data.data)


def _data(tensors: Sequence[Planned]) -> Iterator[NDArray[np.uint8]]:
    for tensor in tensors:
        yield tensor.make().contiguous().flatten().view(torch.uint8).numpy()
