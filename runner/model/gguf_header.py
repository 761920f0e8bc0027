"""The header of a GGUF file: what is in it, checked before any library reads it, and written again.

Metadata stays the bytes it is: nothing is lost in translation, and a vocabulary of 262,144 tokens
costs no time. Only the standard library is needed. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

from runner.errors import PreconditionError


class TensorType(IntEnum):
    """ggml_type of ggml.h: how the weights of a tensor are stored."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41

    @property
    def block(self) -> int:
        """Weights in one block; a row is whole blocks."""
        return _BLOCKS[self][0]

    def size_bytes(self, weights: int) -> int:
        block, block_bytes = _BLOCKS[self]
        return weights // block * block_bytes


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    """As GGUF stores it, the width of a row first; without trailing ones, as ggml counts."""
    type: TensorType
    offset: int
    """Of the data, from the start of the file."""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.type.size_bytes(self.weights)


@dataclass(frozen=True)
class Header:
    metadata: Mapping[str, bytes]
    """Key to its value as stored, type tag included, in the order of the file."""
    tensors: tuple[Tensor, ...]
    alignment: int = 32

    def text(self, key: str) -> str | None:
        """A value that is a string; None where there is none."""
        raw = self.metadata.get(key, b"")
        return raw[12:].decode(errors="replace") if raw[:4] == _tag(_STRING) else None

    def integer(self, key: str) -> int | None:
        """A value that is one whole number; None where there is none."""
        raw = self.metadata.get(key, b"")
        code = _SCALARS.get(int.from_bytes(raw[:4], "little")) if raw else None
        return int(struct.unpack("<" + code, raw[4:])[0]) if code and code in _WHOLE else None

    def first_integer(self, key: str) -> int | None:
        """As `integer`, or the first of a list of whole numbers: a model's first layer."""
        raw = self.metadata.get(key, b"")
        if raw[:4] != _tag(_ARRAY):
            return self.integer(key)
        kind, count = struct.unpack("<IQ", raw[4:16])
        code = _SCALARS.get(kind)
        if not count or code not in _WHOLE:
            return None
        return int(struct.unpack_from("<" + str(code), raw, 16)[0])


def read(path: Path) -> Header:
    """The header of a file that may come from anyone.

    Counts, lengths and nesting are bounded before memory is taken, so a hostile file costs little
    and raises PreconditionError like any damaged one.
    """
    try:
        with path.open("rb") as file:
            return _header(file, os.fstat(file.fileno()).st_size)
    except _Damaged as damage:
        raise PreconditionError(
            f"{path}: not a usable GGUF file: {damage}", hint="download or export it again"
        ) from None
    except OSError as error:
        raise PreconditionError(
            f"{path}: cannot be read: {error.strerror}", hint="give the path of a .gguf file"
        ) from error


def encoded(header: Header) -> bytes:
    """The header as bytes, padded to where the data starts; the data lies in the order of the
    tensors, each padded to the alignment, and their `offset` is not used."""
    counts = len(header.tensors), len(header.metadata)
    parts = [struct.pack("<4sIQQ", _MAGIC, 3, *counts)]
    parts += [_string(key) + raw for key, raw in header.metadata.items()]
    offset = 0
    for tensor in header.tensors:
        dimensions = len(tensor.shape)
        shape = struct.pack(f"<I{dimensions}Q", dimensions, *tensor.shape)
        parts.append(_string(tensor.name) + shape + struct.pack("<IQ", tensor.type, offset))
        offset += padded(tensor.size_bytes, header.alignment)
    data = b"".join(parts)
    return data.ljust(padded(len(data), header.alignment), b"\0")


def uint32(number: int) -> bytes:
    """A number as a metadata value."""
    return struct.pack("<II", _UINT32, number)


def string(text: str) -> bytes:
    """A text as a metadata value."""
    return _tag(_STRING) + _string(text)


def padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


_MAGIC = b"GGUF"
_UINT32, _STRING, _ARRAY = 4, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
_SCALARS |= {10: "Q", 11: "q", 12: "d"}
_WHOLE = frozenset("BbHhIiQq")

# Far above every model there is (Gemma 3: 262,144 tokens, 514,906 merges, 16 MB of metadata).
_COUNT_MAX = 1 << 16
_ITEMS_MAX = 1 << 22
_NAME_BYTES_MAX = 1 << 10
_HEADER_BYTES_MAX = 1 << 27
_WEIGHTS_MAX = 1 << 48

_K = 256
_BLOCKS: Mapping[TensorType, tuple[int, int]] = {  # weights in a block, its bytes
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.Q4_0: (32, 18),
    TensorType.Q4_1: (32, 20),
    TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24),
    TensorType.Q8_0: (32, 34),
    TensorType.Q8_1: (32, 36),
    TensorType.Q2_K: (_K, 84),
    TensorType.Q3_K: (_K, 110),
    TensorType.Q4_K: (_K, 144),
    TensorType.Q5_K: (_K, 176),
    TensorType.Q6_K: (_K, 210),
    TensorType.Q8_K: (_K, 292),
    TensorType.IQ2_XXS: (_K, 66),
    TensorType.IQ2_XS: (_K, 74),
    TensorType.IQ3_XXS: (_K, 98),
    TensorType.IQ1_S: (_K, 50),
    TensorType.IQ4_NL: (32, 18),
    TensorType.IQ3_S: (_K, 110),
    TensorType.IQ2_S: (_K, 82),
    TensorType.IQ4_XS: (_K, 136),
    TensorType.I8: (1, 1),
    TensorType.I16: (1, 2),
    TensorType.I32: (1, 4),
    TensorType.I64: (1, 8),
    TensorType.F64: (1, 8),
    TensorType.IQ1_M: (_K, 56),
    TensorType.BF16: (1, 2),
    TensorType.TQ1_0: (_K, 54),
    TensorType.TQ2_0: (_K, 66),
    TensorType.MXFP4: (32, 17),
    TensorType.NVFP4: (64, 36),
    TensorType.Q1_0: (128, 18),
}


class _Damaged(Exception):
    """What is wrong with a header, in a few words."""


class _Source:
    """Reads forward in a file, and never more than a header may hold."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = min(size, _HEADER_BYTES_MAX)

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise _Damaged("the header is cut off or too long")
        self._left -= count
        data = self._file.read(count)
        if len(data) != count:
            raise _Damaged("the header is cut off")
        return data

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize(code)))[0])

    def count(self, most: int, of_what: str) -> int:
        count = self.number("Q")
        if count > most:
            raise _Damaged(f"{count} {of_what}, more than {most}")
        return count

    def name(self) -> str:
        try:
            return self.take(self.count(_NAME_BYTES_MAX, "bytes in a name")).decode()
        except UnicodeDecodeError:
            raise _Damaged("a name is not UTF-8") from None

    def value(self) -> bytes:
        tag = self.take(4)
        kind = int.from_bytes(tag, "little")
        if kind != _ARRAY:
            return tag + self._single(kind)
        head = self.take(12)
        kind, count = struct.unpack("<IQ", head)
        if count > _ITEMS_MAX:
            raise _Damaged(f"a list of {count} values, more than {_ITEMS_MAX}")
        if kind in _SCALARS:
            return tag + head + self.take(count * struct.calcsize(_SCALARS[kind]))
        return b"".join(itertools.chain((tag, head), (self._single(kind) for _ in range(count))))

    def _single(self, kind: int) -> bytes:
        if kind in _SCALARS:
            return self.take(struct.calcsize(_SCALARS[kind]))
        if kind == _STRING:
            length = self.take(8)
            return length + self.take(int.from_bytes(length, "little"))
        raise _Damaged(f"a value of unknown type {kind}")  # a list in a list among them


def _header(file: BinaryIO, size: int) -> Header:
    source = _Source(file, size)
    if size < 24:
        raise _Damaged(f"{size} bytes are too few")
    if source.take(4) != _MAGIC:
        raise _Damaged("it does not start with GGUF")
    if (version := source.number("I")) not in (2, 3):
        raise _Damaged(f"version {version}; 2 and 3 are known")
    tensor_count = source.count(_COUNT_MAX, "tensors")
    metadata: dict[str, bytes] = {}
    for _ in range(source.count(_COUNT_MAX, "metadata values")):
        key = source.name()
        if key in metadata:
            raise _Damaged(f"{key!r} is there twice")
        metadata[key] = source.value()
    tensors = [_tensor(source) for _ in range(tensor_count)]
    alignment = Header(metadata, ()).integer("general.alignment")
    alignment = 32 if alignment is None else alignment
    if not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise _Damaged(f"an alignment of {alignment}")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise _Damaged("two tensors have one name")
    return Header(
        metadata,
        tuple(_placed(tensors, padded(file.tell(), alignment), alignment, size)),
        alignment,
    )


def _tensor(source: _Source) -> Tensor:
    name = source.name()
    dimensions = source.number("I")
    if not 1 <= dimensions <= 4:
        raise _Damaged(f"{name!r} has {dimensions} dimensions")
    shape = tuple(source.count(_WEIGHTS_MAX, f"weights in {name!r}") for _ in range(dimensions))
    if not 0 < math.prod(shape) <= _WEIGHTS_MAX:
        raise _Damaged(f"{name!r} has the shape {shape}")
    code = source.number("I")
    if code not in set(TensorType):
        raise _Damaged(f"{name!r} has the unknown type {code}")
    if shape[0] % TensorType(code).block != 0:
        raise _Damaged(f"{name!r} has rows of {shape[0]}, not whole blocks")
    ones = sum(1 for _ in itertools.takewhile(lambda length: length == 1, reversed(shape[1:])))
    return Tensor(name, shape[: len(shape) - ones], TensorType(code), source.number("Q"))


def _placed(tensors: Iterable[Tensor], start: int, alignment: int, size: int) -> Iterable[Tensor]:
    """Tensors at their place in the file: one after the other without gaps, as ggml demands too."""
    expected = 0
    for tensor in tensors:
        if tensor.offset != expected:
            raise _Damaged(f"{tensor.name!r} is not where it should be")
        if start + expected + tensor.size_bytes > size:
            raise _Damaged(f"the file ends before the data of {tensor.name!r}")
        yield Tensor(tensor.name, tensor.shape, tensor.type, start + expected)
        expected += padded(tensor.size_bytes, alignment)


def _tag(kind: int) -> bytes:
    return struct.pack("<I", kind)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
