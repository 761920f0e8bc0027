"""What memory a training needs, said before it runs, from the model's headers and config alone.

Closed formulas, no torch. The activations are a count of what autograd keeps in the layers of
Llama, Qwen3, Gemma 3 and Gemma-3n as transformers builds them and `lora.py` trains them; tests
compare it with what autograd keeps. The price: a model of another build is estimated as if its
layers were Llama's.

T tokens of a pass, D width, F width inside the MLP, V vocabulary, R rank.
"""

from __future__ import annotations

import bisect
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from runner.errors import PreconditionError
from runner.model import gguf_header, weights
from runner.model.weights import Tensor, Weights

Method = Literal["lora", "qlora", "full"]
Precision = Literal["float32", "bfloat16", "float16"]
Device = Literal["cuda", "mps", "cpu"]
Targets = Sequence[str] | Literal["all-linear"]

PASS_TOKENS: Mapping[Device, int] = {"cpu": 2048, "mps": 4096, "cuda": 16384}
"""As in batches.py, which imports torch: the most tokens of a pass that anything is gained from."""
LEAST_TOKENS = 256
"""A shorter `max_tokens` is not advised: few conversations fit."""
LEAST_RANK = 4

_STATE_BYTES: Mapping[str, float] = {
    "adamw": 8,
    "adamw_8bit": 2 + 2 * 4 / 256,  # bitsandbytes: a scale for each block of 256
    "paged_adamw_8bit": 2 + 2 * 4 / 256,
    "paged_adamw": 8,
}
"""Of an optimizer's state, for one trained weight: the two moments of AdamW."""
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in NF4 with double quantisation: QLoRA (arXiv:2305.14314), section 3."""
_LOGITS_AT_ONCE = 2**24
"""As in score.py: the elements of the logits that exist at one time."""
_CONTEXT: Mapping[Device, int] = {"cuda": 600_000_000, "mps": 400_000_000, "cpu": 600_000_000}
"""Of Python, its libraries, and on a GPU the driver's context and kernels."""
_FACTOR: Mapping[Device, float] = {"cuda": 1.04, "mps": 1.04, "cpu": 1.04}
"""What an allocator loses between blocks, and what is too small to be counted here."""


@dataclass(frozen=True)
class Model:
    """A model's tensors, with the little that they do not say themselves."""

    weights: Weights
    sliding_window: int | None = None
    sliding_layers: int = 0
    """Layers that see no further back than the window; longer rows get a mask there."""
    head_width: int = 64
    softcapped: bool = False
    """Whether its logits are bent by tanh, as Gemma 2's and Gemma-3n's are."""

    @property
    def parameters(self) -> int:
        return sum(tensor.weights for tensor in self.weights.tensors)


@dataclass(frozen=True)
class Training:
    """The settings that decide what memory is needed.

    `micro_batch` rows of at most `max_tokens` go through the model at one time; `recompute` keeps
    only the input of each layer and computes the rest again on the way back (arXiv:1604.06174).
    """

    method: Method = "lora"
    max_tokens: int = 2048
    micro_batch: int = 1
    rank: int = 16
    target_modules: Targets = "all-linear"
    modules_to_save: Sequence[str] = ()
    dropout: float = 0.0
    optimizer: str = "adamw"
    precision: Precision = "bfloat16"
    recompute: bool = False
    device: Device = "cuda"

    @property
    def tokens(self) -> int:
        """Of one pass."""
        return self.micro_batch * self.max_tokens


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for. `host` lie in the computer's memory and not on the GPU."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    """The logits of a few tokens at a time, or what the way back holds for a moment."""
    context: int
    factor: float = 1.0
    host: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """The components by name, as they are shown."""
        names = ("weights", "adapter", "gradients", "optimizer", "activations", "loss", "context")
        return {name: getattr(self, name) for name in names}

    @property
    def allocated(self) -> int:
        """What torch counts on a GPU: all but the context."""
        return round((sum(self.parts.values()) - self.context) * self.factor)

    @property
    def total(self) -> int:
        return self.allocated + self.context


@dataclass(frozen=True)
class Pass:
    """What a training begins with: the tokens of a pass, and whether it computes them again."""

    tokens: int
    recompute: bool
    is_smaller: bool
    """Whether there was not memory for all that was wanted."""


@dataclass(frozen=True)
class Saving:
    """A cheaper setting: what it saves on top of those before it, and whether it then fits."""

    setting: str
    value: str
    saves: int
    training: Training
    fits: bool


@dataclass(frozen=True)
class Advice:
    """The largest micro-batch that fits, 0 where none does, and then what would be cheaper."""

    micro_batch: int
    estimate: Estimate
    """With that micro-batch, or with one row where nothing fits."""
    cheaper: tuple[Saving, ...] = ()
    parameters: int | None = None
    """Where no setting is enough: the size of a base model that would fit with all of them."""


def read(base: Path | None) -> Model | None:
    """The model of a folder or a `.gguf` file; None where it is not there or cannot be read."""
    found = weights.read(base)
    if base is None or found is None:
        return None
    try:
        if base.is_file():
            return _of_gguf(found, base)
        return _model(found, json.loads((base / "config.json").read_bytes()))
    except (OSError, ValueError, PreconditionError):
        return Model(found)


def of_config(config: Mapping[str, Any]) -> Model | None:
    """The model that a config.json describes, where its weights are not here; None if unknown."""
    found = weights.of_config(config)
    return _model(found, config) if found else None


def estimate(model: Model, training: Training) -> Estimate:
    """What the training needs at its peak: in an optimizer step after the first."""
    trained = _trained(model, training)
    state = round(trained * _STATE_BYTES[training.optimizer])
    paged = training.optimizer.startswith("paged") and training.device == "cuda"
    activations, passing = _activations(model, training)
    return Estimate(
        weights=_weights(model, training),
        adapter=0 if training.method == "full" else 4 * trained,
        gradients=4 * trained,
        optimizer=0 if paged else state,
        activations=activations,
        loss=passing,
        context=_CONTEXT[training.device],
        factor=_FACTOR[training.device],
        host=state if paged else 0,
    )


def advice(model: Model, training: Training, available: int, *, most: int | None = None) -> Advice:
    """The largest micro-batch for `available` bytes; where nothing fits, what to change, in order.

    At most `most` rows, else as many as anything is gained from. What is advised costs ever more:
    time, then long rows, the precision of what is frozen and of the optimizer's state, what can be
    learned, and at last the size of the base model.
    """

    def needed(rows: int) -> int:
        return estimate(model, replace(training, micro_batch=rows)).total

    most = most or max(1, PASS_TOKENS[training.device] // training.max_tokens)
    rows = bisect.bisect_right(range(1, most + 1), available, key=needed)
    chosen = replace(training, micro_batch=max(1, rows))
    if rows:
        return Advice(rows, estimate(model, chosen))
    found = []
    now = chosen
    for setting, value, cheaper in _cheaper(chosen):
        before, now = estimate(model, now).total, cheaper(now)
        after = estimate(model, now).total
        if after < before:
            found.append(Saving(setting, value, before - after, now, after <= available))
        if after <= available:
            return Advice(0, estimate(model, chosen), tuple(found))
    room = available - _CONTEXT[training.device]
    share = room / (estimate(model, now).total - _CONTEXT[training.device])
    size = max(0, round(model.parameters * share))
    return Advice(0, estimate(model, chosen), tuple(found), parameters=size)


def first_pass(
    model: Model, training: Training, available: int, *, most: int, may_recompute: bool
) -> Pass:
    """As many tokens of a pass as fit in `available` bytes: `most`, or whole rows of
    `training.max_tokens`. Activations are computed again only where one row does not fit else."""
    rows = max(1, most // training.max_tokens)
    found = advice(model, training, available, most=rows)
    if not found.micro_batch and may_recompute and not training.recompute:
        training = replace(training, recompute=True)
        found = advice(model, training, available, most=rows)
    is_smaller = found.micro_batch < rows
    tokens = max(1, found.micro_batch) * training.max_tokens if is_smaller else most
    return Pass(tokens, training.recompute, is_smaller)


def of_tokens(training: Training, tokens: int) -> Training:
    """The training with passes of so many tokens, in rows that are not longer than its own."""
    rows = max(1, round(tokens / training.max_tokens))
    return replace(training, micro_batch=rows, max_tokens=max(1, tokens // rows))


def line(estimate: Estimate, training: Training, available: int | None = None) -> str:
    """One line for a plan: the sum, its large parts, and whether it fits."""
    where = "of GPU memory" if training.device == "cuda" else "of memory"
    parts = sorted(estimate.parts.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {_size(count)}" for name, count in parts[:3] if count)
    rows = "1 row" if training.micro_batch == 1 else f"{training.micro_batch} rows"
    words = (
        f"about {_size(estimate.total)} {where} with {rows} of {training.max_tokens:,} tokens"
        f" a pass ({shown})"
    )
    if available is None:
        return words
    verdict = "fits in" if estimate.total <= available else "does not fit in"
    return f"{words}: {verdict} {_size(available)}"


def beside(estimate: Estimate, measured: int, device: Device) -> str:
    """The measured peak and the estimate, for the end of a run.

    `measured` is the event's `memory_bytes`: on a GPU what torch allocated, else the process.
    """
    said = estimate.allocated if device == "cuda" else estimate.total
    off = said / measured - 1
    return f"peak memory {_size(measured)}; {_size(said)} was estimated ({off:+.0%})"


def computers() -> tuple[int | None, int | None]:
    """The computer's memory and what of it is free, as a container allows it."""
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    if "MemTotal" in lines:
        total = int(lines["MemTotal"]) * 1024
        free = int(lines.get("MemAvailable", 0)) * 1024 or None
        limit = _read("/sys/fs/cgroup/memory.max").strip()
        if limit.isdecimal() and int(limit) < total:
            used = _read("/sys/fs/cgroup/memory.current").strip()
            total = int(limit)
            free = max(0, total - int(used)) if used.isdecimal() else None
        return total, free
    if sys.platform == "win32":
        return _of_windows()
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (AttributeError, ValueError, OSError):
        return None, None


def _of_gguf(found: Weights, path: Path) -> Model:
    header = gguf_header.read(path)
    kind = header.text("general.architecture") or ""
    window = header.integer(f"{kind}.attention.sliding_window")
    config: dict[str, Any] = {
        "model_type": kind,
        "sliding_window": window,
        "num_hidden_layers": header.integer(f"{kind}.block_count") or 0,
        "head_dim": header.integer(f"{kind}.attention.key_length") or 64,
        "final_logit_softcapping": kind in ("gemma2", "gemma3n"),
    }
    return _model(found, config)


def _model(found: Weights, config: Mapping[str, Any]) -> Model:
    text: Mapping[str, Any] = config.get("text_config") or config
    kind = str(config.get("model_type", ""))
    layers = int(text.get("num_hidden_layers") or 0)
    # The published configs leave it out; transformers' defaults (configuration_gemma3*.py).
    pattern = 5 if kind.startswith("gemma3n") else 6
    types = text.get("layer_types") or [
        "full_attention" if (n + 1) % pattern == 0 else "sliding_attention" for n in range(layers)
    ]
    slides = kind.startswith("gemma") or text.get("use_sliding_window") or kind == "mistral"
    window = text.get("sliding_window") if slides else None
    norms = (t.shape[0] for t in found.tensors if t.role.endswith("q_norm") and not t.in_tower)
    heads = int(text.get("num_attention_heads") or 32)
    said = int(text.get("head_dim") or int(text.get("hidden_size", 64)) // heads)
    return Model(
        found,
        sliding_window=int(window) if window else None,
        sliding_layers=sum(one == "sliding_attention" for one in types) if window else 0,
        head_width=next(norms, said),
        softcapped=bool(text.get("final_logit_softcapping")),
    )


def _trained(model: Model, training: Training) -> int:
    """How many weights are trained."""
    if training.method == "full":
        return sum(t.weights for t in model.weights.tensors if not t.in_tower)
    chosen = model.weights.adapted(training.target_modules)
    whole = model.weights.adapted(training.modules_to_save) if training.modules_to_save else []
    halves = sum(training.rank * (t.shape[0] + t.shape[1]) for t in chosen)
    return halves + sum(tensor.weights for tensor in whole)


def _weights(model: Model, training: Training) -> int:
    """Of the base model as it is held; what `full` trains is in float32."""
    if training.method == "full":
        return 4 * model.parameters
    plain = _bytes_of(training.precision)
    careful = _is_gemma3n(model) and (training.method == "qlora" or training.precision == "float16")
    total = 0.0
    for tensor in model.weights.tensors:
        if careful and _stays_in_float32(model, tensor):
            total += 4 * tensor.weights
        elif training.method == "qlora" and _is_quantised(tensor):
            total += _NF4_BYTES * tensor.weights
        else:
            total += plain * tensor.weights
    return round(total)


def _is_gemma3n(model: Model) -> bool:
    return any("altup" in tensor.name for tensor in model.weights.tensors)


def _stays_in_float32(model: Model, tensor: Tensor) -> bool:
    """As families.py says of Gemma-3n: AltUp and the head, which may be the embeddings too."""
    return "altup" in tensor.name or tensor.role == _head_role(model)


def _head_role(model: Model) -> str:
    untied = any(tensor.role == "output" for tensor in model.weights.tensors)
    return "output" if untied else "token_embd"


def _is_quantised(tensor: Tensor) -> bool:
    """Whether bitsandbytes holds it in 4 bits: every linear layer but the head, towers too."""
    if len(tensor.shape) != 2 or not tensor.name.endswith(".weight"):
        return False
    role = tensor.role
    return role != "output" and "embd" not in role and "embedding." not in role


def _activations(model: Model, training: Training) -> tuple[int, int]:
    """What a pass keeps for the way back, and the most that its two peaks need beside that."""
    layers = _layers(model)
    tokens = training.tokens
    width = _width(model)
    wide = _bytes_of(training.precision)
    residual = 4 if training.method == "full" else wide
    streams = _streams(model)
    targets = {tensor.role for tensor in model.weights.adapted(training.target_modules)}
    kept = [_kept_of_layer(model, training, layer, targets) for layer in layers]
    largest = max(kept, default=0)
    last = tokens * width * (4 + residual)  # the last norm and its result
    if streams > 1:
        # Unembedding makes all streams one: each is projected and scaled to the first one's size.
        last += tokens * width * residual * (6 if training.method == "full" else 3) * streams
    if training.recompute:
        beside = _beside_width(layers)
        inputs = tokens * residual * (streams * width + beside)
        saved = inputs * len(layers) + last
    else:
        saved = sum(kept) + last
    copies, loss = _casts(model, training, layers), _loss(model, training)
    going_back = _going_back(model, training, layers)
    if not training.recompute:
        return saved + copies, max(loss, going_back)
    # Copies are there until the way back begins, where each layer makes its own again.
    return saved, max(copies, loss, going_back + largest)


def _kept_of_layer(
    model: Model, training: Training, layer: Sequence[Tensor], adapted: Collection[str]
) -> int:
    """Bytes that autograd keeps of one layer for a pass; `adapted` are roles with an adapter."""
    sides = {tensor.role: tensor.shape for tensor in layer}
    tokens, width = training.tokens, _width(model)
    wide = _bytes_of(training.precision)
    is_full = training.method == "full"
    queries = sides["attn_output"][0] if "attn_output" in sides else width
    keys = sides["attn_k"][1] if "attn_k" in sides else 0
    if "attn_qkv" in sides:
        keys = (sides["attn_qkv"][1] - queries) // 2
    inner = sides["ffn_down"][0] if "ffn_down" in sides else 4 * width
    gated = "ffn_gate" in sides
    targets: Collection[str] = () if is_full else adapted
    per_token = _norms(layer, queries, keys, trained=is_full)
    # Rotated queries and keys, values, and the result, which is also the next layer's input.
    masked = _masked_share(model, training)
    expanded = masked if model.head_width <= 256 else 1
    per_token += wide * (2 * queries + 2 * round(expanded * queries + (1 - expanded) * keys))
    # The MLP: gate, its activation, the other side, and their product.
    per_token += wide * inner * ((2 if gated else 1) + 1)
    learns_down = is_full or "ffn_down" in targets
    per_token += wide * inner * learns_down
    inputs = {
        "attn_q": width,
        "attn_k": width,
        "attn_v": width,
        "attn_qkv": width,
        "ffn_gate": width,
        "ffn_up": width,
        "ffn_gate_up": width,
    }
    if is_full and wide == 2:  # autocast makes a copy for each layer that reads it
        per_token += 2 * sum(inputs[role] for role in sides if role in inputs)
    elif is_full:
        per_token += 2 * wide * width
    elif training.dropout:
        mask = 1 if training.device == "cuda" else wide
        per_token += sum((wide + mask) * t.shape[0] for t in layer if t.role in targets)
        per_token -= wide * inner * learns_down
    else:
        for shared in (("attn_q", "attn_k", "attn_v", "attn_qkv"), ("ffn_gate", "ffn_up")):
            per_token += wide * width * any(role in targets for role in shared)
    per_token += wide * training.rank * sum(t.role in targets for t in layer)
    if _streams(model) > 1:
        per_token += _kept_of_altup(model, training, layer, keys)
    return tokens * (per_token + round(masked * wide * training.max_tokens))


def _kept_of_altup(model: Model, training: Training, layer: Sequence[Tensor], keys: int) -> int:
    """Gemma-3n beside what Gemma 3 has, for one token: AltUp (arXiv:2301.13310), its second norm,
    the norm of values, and the gate of the embeddings of the layer."""
    wide, width = _bytes_of(training.precision), _width(model)
    careful = training.method == "qlora" or training.precision == "float16"
    mixing = 4 if careful or training.method == "full" else wide
    beside = next((t.shape[1] for t in layer if t.role.endswith("input_gate")), 0)
    norms = 8 if training.method == "full" else 4
    return 2 * _streams(model) * mixing * width + norms * (width + keys) + 5 * wide * beside


def _norms(layer: Sequence[Tensor], queries: int, keys: int, *, trained: bool) -> int:
    """For one token. RMSNorm computes in float32 and keeps that; a trained one its result too."""
    total = 0
    for tensor in layer:
        if "norm" not in tensor.role or len(tensor.shape) != 1:
            continue
        volume = tensor.shape[0]
        if tensor.role.endswith("q_norm"):
            volume = queries
        elif tensor.role.endswith("k_norm"):
            volume = keys
        total += (8 if trained else 4) * volume
    return total


def _casts(model: Model, training: Training, layers: Sequence[Sequence[Tensor]]) -> int:
    """Copies of what is trained, in the precision that is computed in."""
    if training.precision == "float32":
        return 0
    if training.method == "full":
        matrices = [t for t in model.weights.tensors if len(t.shape) > 1 and not t.in_tower]
        read = [t for t in matrices if "embd" not in t.role or t.role == _head_role(model)]
        return sum(2 * tensor.weights for tensor in read)
    halves = [
        2 * training.rank * (tensor.shape[0] + tensor.shape[1])
        for tensor in model.weights.adapted(training.target_modules)
    ]
    return sum(halves) // (len(layers) if training.recompute and layers else 1)


def _going_back(model: Model, training: Training, layers: Sequence[Sequence[Tensor]]) -> int:
    """The most that one layer holds for a moment on the way back, beside what was kept."""
    wide, width = _bytes_of(training.precision), _width(model)
    inner = max((t.shape[0] for layer in layers for t in layer if t.role == "ffn_down"), default=0)
    total = training.tokens * (3 * wide * inner + 3 * 4 * width)
    matrices = [t for layer in layers for t in layer if len(t.shape) == 2]
    most = max((tensor.weights for tensor in matrices), default=0)
    if training.method == "qlora":
        total += wide * most  # made whole again for its product
    if training.method == "full":
        total += (4 if wide == 4 else 6) * most  # its gradient, before it is added to the others
        embeddings = [t.weights for t in model.weights.tensors if t.role == "token_embd"]
        return max(total, 4 * max(embeddings, default=0))
    return total


def _loss(model: Model, training: Training) -> int:
    """The logits and their gradient, a stretch of tokens at a time (`score.summed_nll`)."""
    wide, width = _bytes_of(training.precision), _width(model)
    heads = [t for t in model.weights.tensors if t.role == _head_role(model)]
    vocabulary = max((tensor.shape[1] for tensor in heads), default=0)
    at_once = min(training.tokens, max(1, _LOGITS_AT_ONCE // max(1, vocabulary)))
    # Logits and probabilities in float32, then the gradient as the head's weights are.
    each = 16 if model.softcapped else 8 + (wide if wide == 2 else 0)
    gathered = training.tokens * width * wide * 2
    if training.method != "full":
        return at_once * vocabulary * each + gathered
    # Computed twice, and then the head's own gradient: in bfloat16 and, with its copy, in float32.
    if wide == 4:
        return at_once * vocabulary * 12 + gathered + 4 * vocabulary * width
    return max(at_once * vocabulary * 14, (at_once + 4 * width) * vocabulary * 2) + gathered


def _layers(model: Model) -> list[list[Tensor]]:
    inside = sorted(
        (t for t in model.weights.tensors if t.layer >= 0 and not t.in_tower),
        key=lambda tensor: tensor.layer,
    )
    return [list(group) for _, group in groupby(inside, key=lambda tensor: tensor.layer)]


def _width(model: Model) -> int:
    return max((t.shape[0] for t in model.weights.tensors if t.role == "token_embd"), default=0)


def _streams(model: Model) -> int:
    """How many copies of the residual stream there are: one, but for Gemma-3n's AltUp."""
    routers = (t for t in model.weights.tensors if "altup" in t.name and "router" in t.name)
    return next((t.shape[1] for t in routers if len(t.shape) == 2), 1)


def _beside_width(layers: Sequence[Sequence[Tensor]]) -> int:
    """Of Gemma-3n's embeddings for each layer."""
    gates = (t.shape[1] for layer in layers for t in layer if t.role.endswith("input_gate"))
    return next(gates, 0)


def _masked_share(model: Model, training: Training) -> float:
    """Of the layers that have a window which rows are longer than.

    These get a mask, and with one transformers repeats keys and values for all heads.
    """
    window = model.sliding_window
    if window is None or training.max_tokens <= window:
        return 0.0
    return model.sliding_layers / max(1, len(_layers(model)))


def _cheaper(training: Training) -> Iterable[tuple[str, str, Callable[[Training], Training]]]:
    """Cheaper settings in order: the setting, its value as a recipe says it, and the change."""
    if not training.recompute:
        yield "gradient_checkpointing", "on", partial(replace, recompute=True)
    tokens = training.max_tokens // 2
    while tokens >= LEAST_TOKENS:
        yield "max_tokens", str(tokens), partial(replace, max_tokens=tokens)
        tokens //= 2
    if training.method != "qlora" and training.device != "mps":
        yield "method", "qlora", partial(replace, method="qlora")
    if training.optimizer in ("adamw", "paged_adamw") and training.device == "cuda":
        name = f"{training.optimizer}_8bit"
        yield "optimizer", name, partial(replace, optimizer=name)
    rank = training.rank // 2
    while rank >= LEAST_RANK:
        yield "lora.rank", str(rank), partial(replace, rank=rank)
        rank //= 2


def _bytes_of(precision: Precision) -> int:
    return 4 if precision == "float32" else 2


def _size(count: float) -> str:
    """As engine/words.py, which is a layer above."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _of_windows() -> tuple[int | None, int | None]:
    import ctypes

    class Status(ctypes.Structure):
        """MEMORYSTATUSEX of sysinfoapi.h: two 32-bit numbers, then seven of 64 bits."""

        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *((name, ctypes.c_uint64) for name in ("total", "free", "c", "d", "e", "f", "g")),
        )

    status = Status()
    status.length = ctypes.sizeof(Status)
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 (mypy knows it on Windows alone)
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None, None
    return int(status.total), int(status.free)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
