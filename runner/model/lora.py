"""Low-rank adapters over a frozen model, through PEFT, with a faster pass through each layer.

LoRA (Hu et al., 2021, arXiv:2106.09685), section 4.1: y = x Wᵀ + (alpha / R) (x Aᵀ) Bᵀ.
T tokens, I inputs, O outputs of a layer, R rank.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

# On a CPU bitsandbytes, which PEFT imports, recommends a package that downloads kernels.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from runner.model import quickly  # noqa: E402

quickly.bitsandbytes()

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.utils import ModulesToSaveWrapper  # noqa: E402

from runner.errors import RunnerError  # noqa: E402

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

_SCALES = ("r", "lora_alpha", "use_rslora", "use_dora")
_LINEAR_LAYERS = {"Linear", "Linear4bit"}
# Towers for pictures and sound stay as they are: text alone teaches them nothing, and in Gemma-3n
# they produced infinities. Its AltUp layers have to stay in float32, so they get no adapter.
_TOWER = re.compile(r"vision|audio|image|multi_modal")
_LEFT_ALONE = re.compile(rf"{_TOWER.pattern}|altup")


def attach(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: tuple[str, ...] | str,
    modules_to_save: Sequence[str] = (),
    rslora: bool = False,
    dora: bool = False,
) -> PeftModel:
    """Freezes the model and gives its linear layers an adapter in float32 that changes nothing yet.

    `target_modules` are names of layers, or "all-linear": all of them but the output head. Layers
    named in `modules_to_save` are trained whole, in float32, beside the adapter. `rslora` scales by
    alpha / √R (arXiv:2312.03732). `dora` also trains the length of each row of W
    (arXiv:2402.09353), in PEFT's own way, which is slower.
    """
    if target_modules == "all-linear":
        targets = _linear_layers(model)
    else:
        targets = sorted(target_modules)
        _check_present(model, "target_modules", targets, ())
    saved = _to_save(model, modules_to_save)
    targets = [name for name in targets if name not in saved]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type, unused-ignore]
        lora_dropout=dropout,
        target_modules=targets,
        exclude_modules=_towers(model),
        modules_to_save=saved or None,
        ensure_weight_tying=_is_tied(model) and not _VOCABULARY.isdisjoint(saved),
        use_rslora=rslora,
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft 0.21 asks transformers for a property that version 5 renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = get_peft_model(model, config)
    _keep_differentiable(model)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # PEFT leaves out the lengths of DoRA
    # A path of this machine has no place in what is published.
    adapted.peft_config["default"].base_model_name_or_path = None
    _quicken(adapted)
    _convert_between(adapted)
    return adapted


def opened(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the adapter of a folder; `disable_adapter()` gives the base back."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted = PeftModel.from_pretrained(model, str(folder))
    except RuntimeError as error:
        raise RunnerError(
            f"the adapter {folder} does not fit the base model: {str(error).splitlines()[-1]}",
            hint="an adapter fits only the base model that it was trained on",
        ) from error
    _restore_lengths(adapted, folder)
    _quicken(adapted)
    _convert_between(adapted)
    return adapted


def take(model: nn.Module, folder: Path) -> None:
    """Gives a new adapter the weights of the one in a folder; raises where their shapes differ."""
    assert isinstance(model, PeftModel), "a full training has no adapter to go on from"
    then = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    now = model.peft_config["default"].to_dict()
    other = [name for name in _SCALES if then.get(name) != now.get(name)]
    saved = load_file(folder / WEIGHTS_FILE)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    other += [
        name
        for name in sorted(saved.keys() | own.keys())
        if name not in own or name not in saved or saved[name].shape != own[name].shape
    ]
    if other:
        raise RunnerError(
            f"the adapter {folder} has another shape than this training: {other[0]}",
            hint="take the settings of `lora` that it was trained with, or train anew",
        )
    with torch.no_grad():
        for name, tensor in own.items():  # they share their memory with the model's parameters
            tensor.copy_(saved[name])


def write(model: nn.Module, folder: Path) -> None:
    """Writes the adapter in PEFT's layout; the same adapter, the same bytes."""
    assert isinstance(model, PeftModel), "a full training has no adapter to write"
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    for name in [name for name in weights if name.endswith("lm_head.weight")]:
        weights[name] = weights[name].clone()  # PEFT wants a tied head twice
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    ordered = {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.items()
    }
    text = json.dumps(ordered, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def merge(model: PeftModel, dtype: torch.dtype) -> None:
    """Adds the adapter to the weights, in place: each sum in float32, then rounded to `dtype`.

    What was trained whole takes the place of what the base has.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.active_adapters:
                layer: Any = module
                weight = layer.get_base_layer().weight
                delta = layer.get_delta_weight(name).to(weight.device)
                whole = weight.data.float() + delta.float()  # (O, I)
                if name in layer.lora_variant:
                    # DoRA, equation 5: each row at the length that was trained.
                    lengths = layer.lora_magnitude_vector[name].weight.float()  # (O,)
                    whole *= (lengths / torch.linalg.norm(whole, dim=1))[:, None]
                weight.data = whole.to(dtype)
    wrapping: Any = model
    wrapping.unload()
    causal = inner(model)
    if _is_tied(causal):
        causal.tie_weights()


def freeze_towers(model: PreTrainedModel) -> None:
    """Leaves what sees and hears as it is, in a training of all other weights."""
    for name, parameter in model.named_parameters():
        if _TOWER.search(name):
            parameter.requires_grad = False


def inner(model: nn.Module) -> PreTrainedModel:
    """The causal model inside an adapter's wrapping, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


# The layers that PEFT knows how to keep tied.
_VOCABULARY = frozenset({"embed_tokens", "lm_head"})


def _check_present(
    model: PreTrainedModel, setting: str, names: Sequence[str], more: Sequence[str]
) -> None:
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [name for name in names if name.rpartition(".")[2] not in present]
    if missing:
        raise RunnerError(
            f"lora.{setting}: the model has no layer named {missing[0]!r}",
            hint=f"it has {', '.join([*more, *_linear_layers(model)])}",
        )


def _to_save(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """The layers to train whole. Where head and embeddings are one, either name means both."""
    vocabulary = sorted(
        _VOCABULARY & {name.rpartition(".")[2] for name, _ in model.named_modules()}
    )
    _check_present(model, "modules_to_save", names, vocabulary)
    quantised = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    for name in names:
        if name.rpartition(".")[2] in quantised:
            raise RunnerError(
                f"lora.modules_to_save: {name!r} is held in 4 bits, which cannot be trained whole",
                hint="method: lora, or leave it to the adapter",
            )
    if _is_tied(model) and not _VOCABULARY.isdisjoint(names):
        names = ["embed_tokens", *(name for name in names if name not in _VOCABULARY)]
    return sorted(set(names))


def _is_tied(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _restore_lengths(model: PeftModel, folder: Path) -> None:
    """Takes the lengths of DoRA in float32, which PEFT rounds to the precision of the base."""
    layers = [
        (name, cast(Any, module))
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and module.lora_variant
    ]
    saved = load_file(folder / WEIGHTS_FILE) if layers else {}
    for name, layer in layers:
        lengths = layer.lora_magnitude_vector["default"].weight
        lengths.data = saved[f"{name}.lora_magnitude_vector"].to(lengths.device)


def _convert_between(model: PeftModel) -> None:
    """Lets layers that are trained whole, in float32, stand among layers of another precision."""
    causal = inner(model)
    dtype = next((p.dtype for p in causal.parameters() if p.dtype in _HALVES), torch.float32)
    head = causal.get_output_embeddings()  # type: ignore[no-untyped-call]
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and dtype != torch.float32:
            module.register_forward_pre_hook(_in_own_precision)
            if module is not head:  # logits stay exact
                module.register_forward_hook(partial(_in_precision, dtype))


_HALVES = (torch.bfloat16, torch.float16)


def _in_own_precision(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    weight = cast(Any, module).weight
    return tuple(
        arg.to(weight.dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg
        for arg in args
    )


def _in_precision(dtype: torch.dtype, module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output.to(dtype)


def _linear_layers(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head and not _LEFT_ALONE.search(name)
        }
    )


def _towers(model: PreTrainedModel) -> str | None:
    named = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # PEFT warns of an exclusion that excludes nothing.
    found = any(_LEFT_ALONE.search(name) for name in named)
    return rf".*({_LEFT_ALONE.pattern}).*" if found else None


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keeps 4-bit layers on a CPU from packing their weights for inference while they evaluate.

    bitsandbytes 0.50 does not unpack them again, and then trains on without the gradient of
    everything below (nn/modules.py, Linear4bit.forward).
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment, unused-ignore]


def _quicken(model: PeftModel) -> None:
    """Replaces the pass through PEFT's layers, which computes them in float32 in seven steps.

    On a CPU with bfloat16 that is a third of the training's time.
    """
    for module in model.modules():
        if not isinstance(module, LoraLayer) or module.lora_variant:  # DoRA
            continue
        if type(module).__name__ in _LINEAR_LAYERS:
            module.forward = partial(_forward, module)  # type: ignore[method-assign, unused-ignore]


def _forward(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.base_layer(x)
    if layer.disable_adapters:
        return y
    for name in layer.active_adapters:
        y = _LowRankSum.apply(  # type: ignore[no-untyped-call]
            y,
            layer.lora_dropout[name](x),
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
        )
    return y


class _LowRankSum(torch.autograd.Function):
    """y + scale (x Aᵀ) Bᵀ, in place of y and in the precision of x; gradients of A, B in theirs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (T, I)
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)  # (R, I), (O, R)
        narrow = rows @ low_a.t()  # (T, R)
        y.view(-1, y.shape[-1]).addmm_(narrow, low_b.t(), alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(rows, low_a, low_b, narrow)
        ctx.scale, ctx.dtype, ctx.shape = scale, a.dtype, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = upstream
        rows, low_a, low_b, narrow = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])  # (T, O)
        down = (flat @ low_b) * ctx.scale  # (T, R)
        dx = (down @ low_a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        da = (down.t() @ rows).to(ctx.dtype)
        db = (flat.t() @ narrow).to(ctx.dtype) * ctx.scale
        return dy, dx, da, db, None
