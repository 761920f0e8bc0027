"""What turns gradients into new weights: AdamW in four forms, and how fast it goes when.

The state of each form can be taken out as tensors and put back, bit for bit, so that a training
goes on from a checkpoint as if it had never stopped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from runner.errors import PreconditionError

Name = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]

_CONSTANTS = frozenset({"qmap1", "qmap2"})  # the 256 values that 8 bits stand for


def create(
    name: Name,
    trained: Mapping[str, nn.Parameter],
    embeddings: nn.Parameter | None,
    *,
    learning_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), which pulls at matrices only, not at norms and biases.

    `adamw` is torch's. The other forms are those of bitsandbytes: `8bit` keeps its two averages in
    blocks of 8-bit numbers (arXiv:2110.02861), but in float32 for `embeddings` (section 2.3 there)
    and for what has fewer than 4096 weights; `paged` lets them move between GPU and CPU memory
    (arXiv:2305.14314, section 3).
    """
    matrices = [p for p in trained.values() if p.ndim > 1]
    vectors = [p for p in trained.values() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    from bitsandbytes.optim.adamw import AdamW
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    optimizer = AdamW(  # type: ignore[no-untyped-call, unused-ignore]
        groups,
        lr=learning_rate,
        optim_bits=8 if name.endswith("8bit") else 32,
        is_paged=name.startswith("paged"),
    )
    # One of its own: the global one knows parameters by an address that another may have later.
    optimizer.mng = GlobalOptimManager.__new__(GlobalOptimManager)
    optimizer.mng.initialize()
    if embeddings is not None:
        optimizer.mng.pid2config[id(embeddings)] = {"optim_bits": 32}
    return cast(torch.optim.Optimizer, optimizer)


def check(name: Name, device: str) -> str:
    """A warning where the device cannot do all that the name says; PreconditionError for nothing.

    On a CPU bitsandbytes computes each form, and the state in 8 bits is a quarter as large there
    too; only paging means nothing, because there is no other memory to move the state to.
    """
    if name == "adamw" or device == "cuda":
        return ""
    if device != "cpu":
        raise PreconditionError(
            f"optimizer: {name} needs CUDA or a CPU; this run would be on {device}",
            hint="optimizer: adamw",
        )
    if not name.startswith("paged"):
        return ""
    plain = "adamw_8bit" if name.endswith("8bit") else "adamw"
    return (
        f"optimizer: {name} moves its state between GPU and CPU memory, and this training is on a "
        f"CPU: the state just stays where it is, as with {plain}"
    )


def state(optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """All that decides the next step beside weights and gradients: `key name` → tensor.

    Before the first step there is none.
    """
    return {
        f"{key} {name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in trained.items()
        for key, value in optimizer.state[parameter].items()
        if key not in _CONSTANTS
    }


def restore(
    optimizer: torch.optim.Optimizer,
    trained: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Puts back what `state` gave."""
    # What got no gradient has no state.
    trained = {name: p for name, p in trained.items() if f"step {name}" in tensors}
    if isinstance(optimizer, torch.optim.AdamW):
        for name, parameter in trained.items():
            optimizer.state[parameter] = {
                key: tensors[f"{key} {name}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        return
    names = {id(parameter): name for name, parameter in trained.items()}
    for place, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                continue
            with _without_advice():
                # The buffers are bitsandbytes' own, or those that are paged would be no longer.
                cast(Any, optimizer).init_state(group, parameter, place, index)
            own = optimizer.state[parameter]
            for key in own.keys() - _CONSTANTS:
                saved = tensors[f"{key} {names[id(parameter)]}"]
                if isinstance(own[key], Tensor):
                    own[key].copy_(saved)
                else:
                    own[key] = saved.item()


def step(optimizer: torch.optim.Optimizer) -> None:
    """New weights from the gradients, which are gone afterwards."""
    with _without_advice():
        optimizer.step()
    optimizer.zero_grad()


def rate_factor(
    step: int,
    steps: int,
    warmup_fraction: float,
    schedule: Schedule,
    decay_fraction: float = 0.2,
) -> float:
    """What the learning rate is multiplied by in step `step`, counted from 0."""
    warmup = math.ceil(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":  # SGDR (arXiv:1608.03983), equation 5, without restarts
        return (1 - math.cos(math.pi * left)) / 2
    if schedule == "wsd":  # MiniCPM (arXiv:2404.06395), section 4.2; the fall: arXiv:2405.18392, 3
        return min(1.0, (steps - step) / max(1, math.ceil(decay_fraction * steps)))
    return left if schedule == "linear" else 1.0


class _without_advice(warnings.catch_warnings):  # noqa: N801 (a context manager)
    """Without bitsandbytes' warning that a CPU does not page: `check` has said it."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
