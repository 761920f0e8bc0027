"""How large a model is, and what is made of it, from the headers of its files alone.

For what a run will write, before it runs. Imports nothing heavy, and never fails: of a model that
cannot be read nothing is known here, and the run says what is wrong with it. A model of
safetensors and one of GGUF are described alike, in the words of GGUF.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from runner.errors import PreconditionError, RunnerError
from runner.model import gguf_header, gguf_types, source
from runner.model.gguf_header import TensorType
from runner.model.gguf_types import Level, Traits

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
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blk)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
# As in lora.py, which imports torch.
_TOWER = re.compile(r"vision|audio|image|multi_modal")
_LEFT_ALONE = re.compile(r"altup")


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
        return _layer_of(self.name)

    @property
    def role(self) -> str:
        """The name without the layer and without what it ends in: "attn_q"."""
        return _role_of(self.name)

    @property
    def in_tower(self) -> bool:
        """Whether it sees or hears: it is not trained, and no GGUF of a text model has it."""
        return _is_in_tower(self.name)


@lru_cache(maxsize=8192)  # an estimate asks hundreds of times for each of a thousand names
def _layer_of(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


@lru_cache(maxsize=8192)
def _role_of(name: str) -> str:
    return re.sub(r"^blk\.\d+\.|\.weight$", "", name)


@lru_cache(maxsize=8192)
def _is_in_tower(name: str) -> bool:
    return bool(_TOWER.search(name))


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
        chosen = self.adapted(target_modules)
        halves = [Tensor(t.name, (rank, side)) for t in chosen for side in t.shape[:2]]
        return _safetensors_bytes(halves, 4)

    def adapted(self, target_modules: Sequence[str] | str) -> list[Tensor]:
        """The linear layers that get an adapter."""
        named = {_NAMES.get(name.rpartition(".")[2], name) for name in target_modules}
        every = target_modules == "all-linear"
        return [t for t in self.tensors if (_is_linear(t) if every else t.role in named)]

    def whole_bytes(self, names: Sequence[str]) -> int:
        """Layers of these names trained whole, in float32; a tied head counts twice, as written."""
        named = {_NAMES.get(name.rpartition(".")[2], name) for name in names}
        tied = all(tensor.role != "output" for tensor in self.tensors)
        if tied and named & {"token_embd", "output"}:
            named |= {"token_embd"}
        chosen = [tensor for tensor in self.tensors if tensor.role in named]
        twice = [tensor for tensor in chosen if tied and tensor.role == "token_embd"]
        return _safetensors_bytes([*chosen, *twice], 4)

    def gguf_bytes(self, level: Level) -> int:
        """A GGUF file of the model at a level; bf16 is what the others are quantised from."""
        of_weights = sum(
            gguf_header.padded(type.size_bytes(tensor.weights), 32) + 80
            for tensor, type in self.gguf_types(level)
        )
        return of_weights + self.vocabulary_bytes

    def gguf_types(self, level: Level) -> Iterator[tuple[Tensor, TensorType]]:
        """How each tensor is stored at a level.

        The rules for mixtures of eight experts and for 70B models, which change a thousandth of
        the size, are left out.
        """
        heard = [tensor for tensor in self.tensors if not tensor.in_tower]
        layers = max((tensor.layer for tensor in heard), default=0) + 1
        rows = {tensor.role: tensor.shape[-1] for tensor in heard}
        heads = rows.get("attn_q", 0) // max(1, rows.get("attn_v", 1))
        try:
            found = gguf_types.chosen(heard, level, Traits(layers, heads_per_value=heads))
        except RunnerError:  # such rows cannot be quantised; the export says so
            found = gguf_types.chosen(heard, "f16", Traits(layers))
        for tensor in heard:
            is_small = len(tensor.shape) < 2 or "norm" in tensor.role
            as_stored = TensorType.F32 if is_small else TensorType.BF16
            wanted = found[tensor.name]  # not by its truth: F32 is 0
            yield tensor, as_stored if wanted is None else wanted


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
    named = [item for shard in source.weight_files(folder) for item in _header(shard)] or list(
        _shapes(config)
    )
    beside = sum(sizes[path] for path in sizes if path.suffix != ".safetensors")
    vocabulary = sizes.get(folder / "tokenizer.json", beside)
    return _of_named(config, named, beside, round(_VOCABULARY_SHARE * vocabulary))


def of_config(config: Mapping[str, Any]) -> Weights | None:
    """The model that a config.json describes, where its weights are not here; None where unknown.

    For decoders built like Llama, Qwen3, Gemma 3 and Gemma-3n, with what these have that sees or
    hears; no tokenizer is counted.
    """
    try:
        return _of_named(config, list(_shapes(config)), 0, 0)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None


def _of_named(
    config: Mapping[str, Any],
    named: Iterable[tuple[str, tuple[int, ...]]],
    beside_bytes: int,
    vocabulary_bytes: int,
) -> Weights:
    text: Mapping[str, Any] = config.get("text_config") or {}
    default = str(config.get("model_type", "")).startswith("gemma")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", default))
    said = {c.get(key) for c in (config, text) for key in ("dtype", "torch_dtype")}
    tensors = _in_gguf_words(iter(named))
    return Weights(
        tensors=tuple(t for t in tensors if not (tied and t.role == "output")),
        stored_bytes=2 if said & {"bfloat16", "float16"} else 4,
        beside_bytes=beside_bytes,
        vocabulary_bytes=vocabulary_bytes,
    )


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


_Shapes = Iterator[tuple[str, tuple[int, ...]]]

_PLAIN = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2"}
    | {"gemma3", "gemma3_text", "gemma3n", "gemma3n_text"}
)
"""`model_type`s whose tensors are known by their config."""
_LEFT_OUT: dict[str, dict[str, int]] = {
    "gemma3": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    }
}
"""What the published configs of a type leave to transformers' defaults."""
_MOBILENET_V5_WEIGHTS = 294_000_000
"""Of what Gemma-3n sees with: timm's mobilenetv5_300m, which its config does not describe."""


def _shapes(config: Mapping[str, Any]) -> _Shapes:
    """Name and shape of each tensor, as transformers builds the model of a config."""
    kind = str(config.get("model_type"))
    if kind not in _PLAIN:
        raise ValueError(f"model_type {kind!r} is not known")
    text: Mapping[str, Any] = _LEFT_OUT.get(kind, {}) | dict(config.get("text_config") or config)
    width, vocabulary = int(text["hidden_size"]), int(text["vocab_size"])
    yield "model.embed_tokens.weight", (vocabulary, width)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)
    for layer in range(int(text["num_hidden_layers"])):
        for name, shape in _layer_shapes(kind, text, layer, width):
            yield f"model.layers.{layer}.{name}", shape
    if kind.startswith("gemma3n"):
        yield from _gemma3n_shapes(text, width)
    if kind == "gemma3" and config.get("vision_config"):
        yield from _siglip_shapes(config["vision_config"], width)
    if kind == "gemma3n" and config.get("vision_config"):
        yield "vision_tower.timm_model.weight", (_MOBILENET_V5_WEIGHTS,)
        seen = config["vision_config"]
        yield from _embedder_shapes("embed_vision", seen["hidden_size"], 128, width)
    if kind == "gemma3n" and config.get("audio_config"):
        yield from _conformer_shapes(config["audio_config"])
        heard = config["audio_config"]
        yield from _embedder_shapes("embed_audio", heard["hidden_size"], 128, width)


def _layer_shapes(kind: str, text: Mapping[str, Any], layer: int, width: int) -> _Shapes:
    heads = int(text["num_attention_heads"])
    head = int(text.get("head_dim") or width // heads)
    queries, keys = heads * head, int(text.get("num_key_value_heads") or heads) * head
    inner = text["intermediate_size"]
    inner = int(inner[layer] if isinstance(inner, list) else inner)
    is_gemma, is_gemma3n = kind.startswith("gemma"), kind.startswith("gemma3n")
    has_norms = kind == "qwen3" or kind.startswith("gemma3")
    shares = is_gemma3n and layer >= text["num_hidden_layers"] - text["num_kv_shared_layers"]
    biased = bool(text.get("attention_bias", kind == "qwen2"))
    sides = {"q": (queries, width)} if shares else {"q": (queries, width), "k": (keys, width)}
    if not shares:
        sides["v"] = (keys, width)
    for name, shape in sides.items():
        yield f"self_attn.{name}_proj.weight", shape
        if biased:
            yield f"self_attn.{name}_proj.bias", shape[:1]
        if has_norms and name != "v":
            yield f"self_attn.{name}_norm.weight", (head,)
    yield "self_attn.o_proj.weight", (width, queries)
    if biased and kind != "qwen2":
        yield "self_attn.o_proj.bias", (width,)
    yield "mlp.gate_proj.weight", (inner, width)
    yield "mlp.up_proj.weight", (inner, width)
    yield "mlp.down_proj.weight", (width, inner)
    yield "input_layernorm.weight", (width,)
    yield "post_attention_layernorm.weight", (width,)
    if is_gemma and kind != "gemma":
        yield "pre_feedforward_layernorm.weight", (width,)
        yield "post_feedforward_layernorm.weight", (width,)
    if is_gemma3n:
        copies, narrow = int(text["altup_num_inputs"]), int(text["laurel_rank"])
        beside = int(text["hidden_size_per_layer_input"])
        yield "altup.correct_output_scale", (width,)
        yield "altup.correction_coefs.weight", (copies, copies)
        yield "altup.prediction_coefs.weight", (copies**2, copies)
        yield "altup.modality_router.weight", (copies, width)
        yield "altup.router_norm.weight", (width,)
        yield "laurel.linear_left.weight", (narrow, width)
        yield "laurel.linear_right.weight", (width, narrow)
        yield "laurel.post_laurel_norm.weight", (width,)
        yield "per_layer_input_gate.weight", (beside, width)
        yield "per_layer_projection.weight", (width, beside)
        yield "post_per_layer_input_norm.weight", (width,)


def _gemma3n_shapes(text: Mapping[str, Any], width: int) -> _Shapes:
    beside = int(text["hidden_size_per_layer_input"])
    all_layers = int(text["num_hidden_layers"]) * beside
    rows = int(text["vocab_size_per_layer_input"])
    yield "model.embed_tokens_per_layer.weight", (rows, all_layers)
    yield "model.per_layer_model_projection.weight", (all_layers, width)
    yield "model.per_layer_projection_norm.weight", (beside,)
    for copy in range(int(text["altup_num_inputs"]) - 1):
        yield f"model.altup_projections.{copy}.weight", (width, width)
        yield f"model.altup_unembed_projections.{copy}.weight", (width, width)


def _siglip_shapes(seen: Mapping[str, Any], text_width: int) -> _Shapes:
    """The vision tower of Gemma 3: SigLIP (arXiv:2303.15343)."""
    width, inner = int(seen["hidden_size"]), int(seen["intermediate_size"])
    patch, layers = int(seen["patch_size"]), int(seen["num_hidden_layers"])
    places = (int(seen["image_size"]) // patch) ** 2
    tower = "vision_tower"
    yield f"{tower}.embeddings.patch_embedding.weight", (width, 3, patch, patch)
    yield f"{tower}.embeddings.position_embedding.weight", (places, width)
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{tower}.layers.{layer}.self_attn.{name}.weight", (width, width)
        yield f"{tower}.layers.{layer}.mlp.fc1.weight", (inner, width)
        yield f"{tower}.layers.{layer}.mlp.fc2.weight", (width, inner)
        yield f"{tower}.layers.{layer}.vectors", (9 * width + inner,)  # two norms, and biases
    if seen.get("vision_use_head", True):
        yield f"{tower}.head.linear.weight", (4 * width + 2 * inner, width)
    yield "multi_modal_projector.mm_input_projection_weight", (width, text_width)


def _conformer_shapes(heard: Mapping[str, Any]) -> _Shapes:
    """The audio tower of Gemma-3n: a conformer (arXiv:2303.01037); its small convolutions aside."""
    width, layers = int(heard["hidden_size"]), int(heard["conf_num_hidden_layers"])
    channels = heard["sscp_conv_channel_size"][-1]
    entry = channels * int(heard["input_feat_size"]) // 4  # two convolutions of stride 2
    yield "audio_tower.subsample_conv_projection.input_proj_linear.weight", (width, entry)
    linear = (("q", 1), ("k", 1), ("v", 1), ("pos", 1), ("post", 1), ("start", 2), ("end", 1))
    for layer in range(layers):
        place = f"audio_tower.conformer.{layer}"
        for name, times in linear:
            yield f"{place}.{name}.weight", (times * width, width)
        for name in ("ffw_start", "ffw_end"):
            yield f"{place}.{name}_1.weight", (4 * width, width)
            yield f"{place}.{name}_2.weight", (width, 4 * width)


def _embedder_shapes(name: str, own: int, rows: int, text_width: int) -> _Shapes:
    yield f"{name}.embedding.weight", (rows, int(own))
    yield f"{name}.embedding_projection.weight", (text_width, int(own))


def _is_linear(tensor: Tensor) -> bool:
    """Whether `target_modules: all-linear` gives it an adapter (lora.py looks at the modules)."""
    if tensor.in_tower or _LEFT_ALONE.search(tensor.name) or "norm" in tensor.role:
        return False
    return tensor.layer >= 0 and len(tensor.shape) == 2 and tensor.name.endswith(".weight")


def _safetensors_bytes(tensors: Sequence[Tensor], each: int) -> int:
    return sum(tensor.weights * each + _NAMED_BYTES for tensor in tensors)
