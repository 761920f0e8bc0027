"""Which type each tensor of a GGUF file gets at each level: llama.cpp's own rules.

Needs names and shapes alone, and nothing heavy: for files that are written, and for models of which
only the size is asked. Source: ggml-org/llama.cpp, src/llama-quant.cpp (`llama_tensor_get_type`),
October 2026. Falcon's own rules are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from runner.errors import RunnerError
from runner.model.gguf_header import TensorType

# fmt: off
Level = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_k_m", "q5_k_s", "q5_0", "q4_1", "q4_k_m",
    "q4_k_s", "q4_0", "iq4_nl", "q3_k_l", "iq4_xs", "q3_k_m", "q3_k_s", "q2_k",
]
"""From the largest files to the smallest."""
# fmt: on

# llama_ftype of llama.h, and the type that most tensors get
FILE_TYPES: Mapping[Level, tuple[int, TensorType]] = {
    "f32": (0, TensorType.F32),
    "f16": (1, TensorType.F16),
    "bf16": (32, TensorType.BF16),
    "q8_0": (7, TensorType.Q8_0),
    "q6_k": (18, TensorType.Q6_K),
    "q5_1": (9, TensorType.Q5_1),
    "q5_k_m": (17, TensorType.Q5_K),
    "q5_k_s": (16, TensorType.Q5_K),
    "q5_0": (8, TensorType.Q5_0),
    "q4_1": (3, TensorType.Q4_1),
    "q4_k_m": (15, TensorType.Q4_K),
    "q4_k_s": (14, TensorType.Q4_K),
    "q4_0": (2, TensorType.Q4_0),
    "iq4_nl": (25, TensorType.IQ4_NL),
    "q3_k_l": (13, TensorType.Q3_K),
    "iq4_xs": (30, TensorType.IQ4_XS),
    "q3_k_m": (12, TensorType.Q3_K),
    "q3_k_s": (11, TensorType.Q3_K),
    "q2_k": (10, TensorType.Q2_K),
}
WITH_IMPORTANCE: frozenset[Level] = frozenset(
    ("iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
)
"""Levels that are quantised with an importance matrix: by `tests/benchmarks/imatrix.py` their mean
KL, 0.3 to 1 nats, falls by 33 to 46 %. Of a model whose base was on a 4-bit grid already, q4_k_m
came out worse with one (0.056 after 0.043 on the quickstart), so the finer levels go without."""
UNQUANTISED = (TensorType.F32, TensorType.F16, TensorType.BF16)


class Named(Protocol):
    """A tensor: its name in a GGUF file, and its shape, the width of a row first."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Traits:
    """What the choice of a type asks a model for, beside its tensors."""

    layers: int
    experts: int = 0
    heads_per_value: int = 0
    is_70b: bool = False


def chosen(
    tensors: Iterable[Named], level: Level, model: Traits, *, importance: bool = False
) -> Mapping[str, TensorType | None]:
    """The type of each tensor; None where it stays as it is stored. `importance` says whether
    there is an importance matrix: llama.cpp's `has_imatrix`."""
    _, default = FILE_TYPES[level]
    ordered = sorted(tensors, key=place)
    if default in UNQUANTISED:
        return {tensor.name: default if _may_change(tensor) else None for tensor in ordered}
    tied = all(tensor.name != "output.weight" for tensor in ordered)
    values = sum(_is_value(tensor.name) for tensor in ordered)
    value = down = 0  # llama.cpp counts tensors of a kind, in its own order, to know the layer
    types: dict[str, TensorType | None] = {}
    for tensor in ordered:
        name, wanted = tensor.name, default
        if not _may_change(tensor):
            types[name] = None
            continue
        if name == "output.weight" or (tied and name in _EMBEDDINGS):
            fits = tensor.shape[0] % default.block == 0
            wanted = TensorType.Q6_K if fits and default != TensorType.Q8_0 else TensorType.Q8_0
        elif _is_value(name):
            wanted = _of_value(level, default, model, value, values)
            value += 1
        elif "attn_k.weight" in name:
            wanted = TensorType.Q8_0 if model.experts == 8 else default
        elif "attn_output.weight" in name:
            wanted = _of_attention_output(level, default, model)
        elif "ffn_down" in name:
            layer = _layer(name) if model.experts > 1 else down
            wanted = _of_down(level, default, layer, model.layers, importance)
            down += 1
        types[name] = _fitting(tensor, wanted)
    return types


def _of_value(
    level: Level, default: TensorType, model: Traits, index: int, values: int
) -> TensorType:
    shared = model.heads_per_value >= 4
    wanted = default
    if level == "q2_k":
        wanted = TensorType.Q4_K if shared else TensorType.Q3_K
    elif level == "q3_k_m":
        wanted = TensorType.Q5_K if index < 2 else TensorType.Q4_K
    elif level == "q3_k_l" or (level in _IQ4 and shared) or (level == "q4_k_s" and index < 4):
        wanted = TensorType.Q5_K
    elif level in _MIXED and _gets_more_bits(index, values):
        wanted = TensorType.Q6_K
    if model.is_70b and wanted in (TensorType.Q3_K, TensorType.Q4_K):
        wanted = TensorType.Q5_K
    return TensorType.Q8_0 if model.experts == 8 else wanted


def _of_attention_output(level: Level, default: TensorType, model: Traits) -> TensorType:
    if model.experts == 8:
        small = {"q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", *_IQ4}
        return TensorType.Q5_K if level in small else default
    more = {"q2_k": TensorType.Q3_K, "q3_k_m": TensorType.Q4_K, "q3_k_l": TensorType.Q5_K}
    return more.get(level, default)


def _of_down(
    level: Level, default: TensorType, layer: int, layers: int, importance: bool
) -> TensorType:
    if level == "q2_k":
        return TensorType.Q3_K
    if level == "q3_k_m":
        return TensorType.Q5_K if layer < layers // 16 else TensorType.Q4_K
    first = layer < layers // 8
    if level == "q3_k_l" or (first and (level == "q4_k_s" or (level in _IQ4 and not importance))):
        return TensorType.Q5_K
    if first and importance and level in _OFFSET:
        return _OFFSET[level]
    if level in _MIXED and _gets_more_bits(layer, layers):
        return TensorType.Q6_K
    return default


_MIXED = frozenset({"q4_k_m", "q5_k_m"})
_IQ4 = ("iq4_nl", "iq4_xs")
# Without a matrix these do worse in the first layers' ffn_down, with one better (llama.cpp).
_OFFSET: Mapping[Level, TensorType] = {"q4_0": TensorType.Q4_1, "q5_0": TensorType.Q5_1}
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
    # of what sees and hears
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
_SUBSTITUTES = {
    TensorType.Q2_K: TensorType.Q4_0,
    TensorType.Q3_K: TensorType.Q4_0,
    TensorType.IQ4_XS: TensorType.IQ4_NL,
    TensorType.Q4_K: TensorType.Q5_0,
    TensorType.Q5_K: TensorType.Q5_1,
    TensorType.Q6_K: TensorType.Q8_0,
}


def _may_change(tensor: Named) -> bool:
    name = tensor.name
    if len(tensor.shape) < 2 or not name.endswith("weight") or name in _POSITIONS:
        return False
    return not any(part in name for part in _KEPT)


def _fitting(tensor: Named, wanted: TensorType) -> TensorType:
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


def _is_value(name: str) -> bool:
    return any(f"attn_{part}.weight" in name for part in ("v", "qkv", "kv_b"))


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def place(tensor: Named) -> tuple[int, bytes]:
    """llama.cpp's order: what belongs to no layer first, then layer by layer, by name."""
    return _layer(tensor.name), tensor.name.encode()
