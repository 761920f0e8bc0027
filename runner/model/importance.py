"""The importance matrix of a model: how much each input of a linear layer matters to what it says.

Low-bit quantisers round the weights of a row so that those with large inputs lose least; llama.cpp
calls this an imatrix. No torch here: a process that only quantises starts at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from runner import disk
from runner.errors import PreconditionError

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Importance:
    """The mean square of each input of the linear layers, over some text."""

    matrices: Mapping[str, Matrix]
    """By the tensor's name in a GGUF file; as wide as a row, for experts one after the other."""
    file: str
    """What it is called, as GGUF files made with it say."""
    dataset: str
    """The text that it was measured on, in words."""
    chunks: int
    """Pieces of that text."""


def write(importance: Importance, output: Path) -> None:
    """Writes it as one file of safetensors."""
    said = {"dataset": importance.dataset, "chunks": importance.chunks}
    matrices = {name: importance.matrices[name] for name in sorted(importance.matrices)}
    with disk.being_written(output) as unfinished:
        save_file(matrices, unfinished, metadata={"importance": json.dumps(said)})


def read(path: Path) -> Importance | None:
    """What `write` wrote; None where no layer was measured."""
    try:
        with safe_open(path, framework="np") as file:
            said = json.loads((file.metadata() or {})["importance"])
            matrices = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = Importance(matrices, path.name.lstrip("."), said["dataset"], said["chunks"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise PreconditionError(
            f"{path}: no importance matrix can be read from it: {error}",
            hint="it is made again when it is not there: `runner verify` finds what is damaged",
        ) from error
    return found if matrices else None
