"""How large a model is, and what is made of it, from the headers of its files alone.

For what a run will write, before it runs. Imports nothing heavy, and never fails: of a model that
cannot be read nothing is known here, and the run says what is wrong with it. A model of
safetensors and one of GGUF are described alike, in the words of GGUF.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from runner.errors import PreconditionError
from runner.model import gguf_header, source
from runner.model.gguf_header import TensorType

Level = Literal["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]

_HEADER_BYTES_MAX = 100_000_000  # safetensors refuses more
_NAMED_BYTES = 180
"""What the header of a safetensors file says of one tensor: name, type, shape, place."""
_VOCABULARY_SHARE = 0.5
"""Vocabulary in a GGUF to tokenizer.json: 0.50 for SmolLM2 (49,152 tokens, 48,900 merges)."""

# What transformers calls it, and what GGUF does.
_NAMES = {
    "embed_tokens": "token_embd",
    "embed_tokens_per_layer": "per_layer_token_embd",
    "wte": "token_embd",
    "lm_head": "output",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_EMBEDDINGS = frozenset({"token_embd", "per_layer_token_embd"})
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blk)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
# As in lora.py, which imports torch.
_TOWER = re.compile(r"vision|audio|image|multi_modal")
_LEFT_ALONE = re.compile(r"altup")
# As in gguf.py: what is too small or too sensitive to be quantised.
_KEPT = re.compile(r"gate_inp|altup|laurel|per_layer_model_proj|conv|time_mix|indexer")

_TYPES: dict[Level, TensorType] = {
    "f16": TensorType.F16,
    "bf16": TensorType.BF16,
    "q8_0": TensorType.Q8_0,
    "q6_k": TensorType.Q6_K,
    "q5_k_m": TensorType.Q5_K,
    "q4_k_m": TensorType.Q4_K,
    "q4_0": TensorType.Q4_0,
}
_SUBSTITUTES = {
    TensorType.Q4_K: TensorType.Q5_0,
    TensorType.Q5_K: TensorType.Q5_1,
    TensorType.Q6_K: TensorType.Q8_0,
}


@dataclass(frozen=True)
class Tensor:
    """`shape` has the width of a row first; the experts of a layer are one tensor."""

    name: str
    shape: tuple[int, ...]

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def layer(self) -> int:
        """Its layer; -1 where it belongs to none."""
        found = re.match(r"blk\.(\d+)\.", self.name)
        return int(found[1]) if found else -1

    @property
    def role(self) -> str:
        """The name without the layer and without what it ends in: "attn_q"."""
        return re.sub(r"^blk\.\d+\.|\.weight$", "", self.name)

    @property
    def in_tower(self) -> bool:
        """Whether it sees or hears: it is not trained, and no GGUF of a text model has it."""
        return bool(_TOWER.search(self.name))


@dataclass(frozen=True)
class Weights:
    """A model's tensors, and what lies beside them."""

    tensors: tuple[Tensor, ...]
    stored_bytes: int
    """Of one weight, as the model is stored; a GGUF counts as what it is converted to."""
    beside_bytes: int
    """Of tokenizer, chat template and settings."""
    vocabulary_bytes: int
    """Of the same in a GGUF."""
    is_gguf: bool = False

    def folder_bytes(self, each: int | None = None) -> int:
        """The whole model as safetensors, at `each` bytes a weight or as it is stored."""
        of_weights = _safetensors_bytes(self.tensors, each or self.stored_bytes)
        return of_weights + self.beside_bytes

    def trained_bytes(self) -> int:
        """All that `method: full` trains, in float32."""
        return _safetensors_bytes([t for t in self.tensors if not t.in_tower], 4)

    def adapter_bytes(self, rank: int, target_modules: Sequence[str] | str) -> int:
        """An adapter in float32: for each layer two matrices, (rank, in) and (out, rank)."""
        named = {_NAMES.get(name.rpartition(".")[2], name) for name in target_modules}
        every = target_modules == "all-linear"
        chosen = [t for t in self.tensors if (_is_linear(t) if every else t.role in named)]
        halves = [Tensor(t.name, (rank, side)) for t in chosen for side in t.shape[:2]]
        return _safetensors_bytes(halves, 4)

    def gguf_bytes(self, level: Level) -> int:
        """A GGUF file of the model at a level; bf16 is what the others are quantised from."""
        of_weights = sum(
            gguf_header.padded(type.size_bytes(tensor.weights), 32) + 80
            for tensor, type in self.gguf_types(level)
        )
        return of_weights + self.vocabulary_bytes

    def gguf_types(self, level: Level) -> Iterator[tuple[Tensor, TensorType]]:
        """How each tensor is stored at a level.

        The rules of `gguf.tensor_types` for models of common shapes: those for mixtures of eight
        experts and for 70B models, which change a thousandth of the size, are left out.
        """
        default = _TYPES[level]
        layers = max((tensor.layer for tensor in self.tensors), default=0) + 1
        tied = all(tensor.role != "output" for tensor in self.tensors)
        for tensor in self.tensors:
            if tensor.in_tower:
                continue
            wanted = default
            if len(tensor.shape) < 2 or "norm" in tensor.role:
                wanted = TensorType.F32
            elif default in (TensorType.F16, TensorType.BF16):
                pass
            elif _KEPT.search(tensor.role):
                wanted = TensorType.BF16
            elif tensor.role == "output" or (tied and tensor.role in _EMBEDDINGS):
                wanted = TensorType.Q8_0 if level == "q8_0" else TensorType.Q6_K
            elif level in ("q4_k_m", "q5_k_m") and (
                tensor.role.startswith(("attn_v", "attn_qkv", "ffn_down"))
                and _gets_more_bits(tensor.layer, layers)
            ):
                wanted = TensorType.Q6_K
            yield tensor, _fitting(tensor, wanted)


def read(base: Path | None) -> Weights | None:
    """The model of a folder or a `.gguf` file; None where it is not there or cannot be read."""
    if base is None:
        return None
    try:
        stats = [(path, path.stat()) for path in source.model_files(base)]
        files = tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
        return _of_gguf(files) if base.is_file() else _of_folder(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, PreconditionError):
        return None


_Files = tuple[tuple[Path, int, int], ...]  # with size and time: read again when one is another


@lru_cache(
    maxsize=4
)  # every stage of a plan asks, and a large vocabulary takes a third of a second
def _of_gguf(files: _Files) -> Weights:
    ((path, _, _),) = files
    header = gguf_header.read(path)
    vocabulary = sum(len(key) + 8 + len(value) for key, value in header.metadata.items())
    return Weights(
        tensors=tuple(Tensor(tensor.name, tensor.shape) for tensor in header.tensors),
        stored_bytes=2,
        beside_bytes=round(vocabulary / _VOCABULARY_SHARE),
        vocabulary_bytes=vocabulary,
        is_gguf=True,
    )


@lru_cache(maxsize=4)
def _of_folder(files: _Files) -> Weights:
    sizes = {path: size for path, size, _ in files}
    folder = next(path.parent for path in sizes if path.name == "config.json")
    config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    text: dict[str, Any] = config.get("text_config") or {}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    said = {c.get(key) for c in (config, text) for key in ("dtype", "torch_dtype")}
    shards = _shards(folder)
    tensors = _in_gguf_words(item for shard in shards for item in _header(shard))
    beside = sum(sizes[path] for path in sizes if path.suffix != ".safetensors")
    vocabulary = sizes.get(folder / "tokenizer.json", beside)
    return Weights(
        tensors=tuple(t for t in tensors if not (tied and t.role == "output")),
        stored_bytes=2 if said & {"bfloat16", "float16"} else 4,
        beside_bytes=beside,
        vocabulary_bytes=round(_VOCABULARY_SHARE * vocabulary),
    )


def _shards(folder: Path) -> list[Path]:
    """The files that hold the weights; others, like an original format, may lie beside them."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        named = set(json.loads(index.read_bytes())["weight_map"].values())
        return sorted(folder / name for name in named)
    return sorted(folder.glob("*.safetensors"))


def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor in a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_HEADER_BYTES_MAX, path.stat().st_size):
            raise ValueError(f"{path}: a header of {length} bytes")
        header = json.loads(file.read(length))
    for name, facts in header.items():
        if name != "__metadata__":
            yield name, tuple(int(side) for side in facts["shape"])


def _in_gguf_words(named: Iterator[tuple[str, tuple[int, ...]]]) -> list[Tensor]:
    """Tensors of safetensors with GGUF's names and order of sides, experts put together."""
    shapes: dict[str, tuple[int, ...]] = {}
    experts: dict[str, int] = {}
    for name, shape in named:
        own = _gguf_name(name)
        shapes[own] = tuple(reversed(shape))
        experts[own] = experts.get(own, 0) + 1
    return [
        Tensor(name, (*shape, experts[name]) if experts[name] > 1 else shape)
        for name, shape in shapes.items()
    ]


def _gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`; towers keep their names."""
    if _TOWER.search(name):
        return name
    place = _LAYER.search(name)
    rest = name[place.end() :] if place else name
    module, _, kind = rest.rpartition(".")
    role = _NAMES.get(module.rpartition(".")[2], module)
    if _EXPERT.search(f".{rest}"):
        role = f"{role}_exps"
    return f"blk.{place[1]}.{role}.{kind}" if place else f"{role}.{kind}"


def _is_linear(tensor: Tensor) -> bool:
    """Whether `target_modules: all-linear` gives it an adapter (lora.py looks at the modules)."""
    if tensor.in_tower or _LEFT_ALONE.search(tensor.name) or "norm" in tensor.role:
        return False
    return tensor.layer >= 0 and len(tensor.shape) == 2 and tensor.name.endswith(".weight")


def _safetensors_bytes(tensors: Sequence[Tensor], each: int) -> int:
    return sum(tensor.weights * each + _NAMED_BYTES for tensor in tensors)


def _gets_more_bits(layer: int, layers: int) -> bool:
    """As in gguf.py: the first and the last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _fitting(tensor: Tensor, wanted: TensorType) -> TensorType:
    """The type, or what takes its place where the rows are not whole blocks of it."""
    width = tensor.shape[0] if tensor.shape else 1
    while width % wanted.block:
        wanted = _SUBSTITUTES.get(wanted, TensorType.F16)
    return wanted
