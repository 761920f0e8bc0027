from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
from pathlib import Path

import gguf as gguf_package
import libgguf
import numpy as np
import pytest

from runner.errors import PreconditionError
from runner.model import gguf_header
from runner.model.gguf_header import TensorType


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One tensor, and a value of each kind."""
    path = tmp_path / "model.gguf"
    writer = gguf_package.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(3)
    writer.add_head_count([8, 8, 4])
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ж"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float16))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_says_what_the_file_holds(model: Path) -> None:
    header = gguf_header.read(model)
    assert header.text("general.architecture") == "llama"
    assert header.text("general.name") == "tiny"
    assert header.integer("llama.block_count") == 3
    assert header.integer("llama.rope.freq_base") is None
    assert header.text("llama.block_count") is None
    assert header.integer("no.such.key") is None
    assert header.integer("llama.attention.head_count") is None
    assert header.first_integer("llama.attention.head_count") == 8
    assert header.first_integer("llama.block_count") == 3
    assert header.first_integer("tokenizer.ggml.scores") is None
    embedding, norm = header.tensors
    assert (embedding.name, embedding.shape, embedding.type) == (
        "token_embd.weight",
        (32, 3),
        TensorType.F16,
    )
    assert embedding.offset % 32 == 0
    assert norm.offset + norm.size_bytes == model.stat().st_size


def test_a_header_written_again_is_the_same_bytes(model: Path) -> None:
    header = gguf_header.read(model)
    assert model.read_bytes().startswith(gguf_header.encoded(header))


def test_sizes_agree_with_libgguf() -> None:
    ours = {int(type_): (type_.block, type_.size_bytes(type_.block)) for type_ in TensorType}
    assert ours == {int(type_): size for type_, size in libgguf.GGML_QUANT_SIZES.items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"GGUF", "4 bytes are too few"),
        (b"PK\3\4" + bytes(100), "it does not start with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1; 2 and 3 are known"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors, more than 65536"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "metadata values, more than 65536"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), "bytes in a name, more than 1024"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 9), "the header is cut off"),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 40),
            "a list of 1099511627776 values",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQIQ", 3, 0, 1, 1, b"k", 9, 9, 1, 9, 1),
            "a value of unknown type 9",
        ),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 13), "a value of unknown type 13"),
    ],
)
def test_a_damaged_file_is_refused_with_its_reason(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(PreconditionError) as caught:
        gguf_header.read(path)
    assert caught.value.message.startswith(f"{path}: not a usable GGUF file: ")
    assert message in caught.value.message


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="cannot be read: No such file"):
        gguf_header.read(tmp_path / "none.gguf")
    with pytest.raises(PreconditionError, match="cannot be read: Is a directory"):
        gguf_header.read(tmp_path)


def test_every_cut_is_noticed(model: Path) -> None:
    whole = model.read_bytes()
    for length in range(len(whole)):
        model.write_bytes(whole[:length])
        with pytest.raises(PreconditionError):
            gguf_header.read(model)


def test_mutated_headers_raise_nothing_else_and_take_no_memory(model: Path) -> None:
    whole = model.read_bytes()
    chance = random.Random(17)
    tracemalloc.start()
    for _ in range(4000):
        mutated = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            mutated[chance.randrange(512)] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
        model.write_bytes(mutated)
        with contextlib.suppress(PreconditionError):
            header = gguf_header.read(model)
            for key in header.metadata:
                header.text(key), header.first_integer(key)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 << 20
