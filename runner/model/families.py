"""What an architecture needs beyond the ordinary, read from a model's config alone.

Imports nothing heavy, so that `plan` can say it before a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runner.errors import PreconditionError
from runner.model import gguf_header


@dataclass(frozen=True)
class Family:
    """Models of one architecture, and where they have to be handled with care."""

    name: str
    float32_modules: tuple[str, ...]
    """Parts of module names: in 4 bits or float16 these stay in float32, and unquantised."""
    towers: str
    """What sees and hears, in words; empty where there is nothing."""
    highest_rate: float
    """A higher learning rate is likely to end in infinities."""
    advised_rate: float
    least_warmup: float


# The AltUp layers mix four copies of the residual stream with coefficients that are clipped at 120
# (config.altup_coef_clip): NF4 leaves nothing of them, and clipping a quantised weight damages it.
GEMMA_3N = Family(
    name="Gemma-3n",
    float32_modules=("altup", "lm_head"),
    towers="vision and audio towers",
    highest_rate=5e-5,
    advised_rate=5e-6,
    least_warmup=0.1,
)
_BY_TYPE = {"gemma3n": GEMMA_3N, "gemma3n_text": GEMMA_3N}


def of(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json; None where nothing is special about it."""
    return _BY_TYPE.get(str(config.get("model_type")))


def of_base(base: Path) -> Family | None:
    """The family of a model's folder or `.gguf` file; None too where it cannot be read."""
    try:
        if base.is_file():
            return _BY_TYPE.get(str(gguf_header.read(base).text("general.architecture")))
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, PreconditionError):
        return None
    return of(config) if isinstance(config, dict) else None


def choices(
    base: Path, method: str, float32_modules: tuple[str, ...] | Literal["auto"] = "auto"
) -> tuple[str, ...]:
    """What is done otherwise for this base model without being asked, in words, for `plan`."""
    family = of_base(base)
    if family is None:
        return ()
    found = []
    if method == "qlora" and float32_modules == "auto":
        kept = " and ".join(family.float32_modules)
        found.append(f"{family.name}: {kept} stay in float32, all other linear layers in 4 bits")
    adapters = "" if method == "full" else " and get no adapter"
    if family.towers and not _is_text_alone(base):
        found.append(f"{family.name}: {family.towers} are frozen{adapters}")
    return tuple(found)


def warnings(
    base: Path,
    *,
    method: str,
    learning_rate: float,
    warmup_fraction: float,
    float32_modules: tuple[str, ...] | Literal["auto"] = "auto",
) -> tuple[str, ...]:
    """Settings of a training that are known to fail with this base model, and what to take."""
    family = of_base(base)
    if family is None:
        return ()
    found = []
    if learning_rate > family.highest_rate:
        found.append(
            f"learning_rate {learning_rate:g} is high for {family.name}, whose training tends to "
            f"end in infinities: {family.advised_rate:g} is safe (with optimizer: paged_adamw and "
            f"warmup_fraction: {family.least_warmup:g}), {family.highest_rate:g} the most to try"
        )
    if warmup_fraction < family.least_warmup and learning_rate > family.advised_rate:
        found.append(
            f"warmup_fraction {warmup_fraction:g} is short for {family.name}; "
            f"{family.least_warmup:g} is gentle"
        )
    missing = (
        []
        if float32_modules == "auto"
        else sorted(name for name in family.float32_modules if name not in float32_modules)
    )
    if method == "qlora" and missing:
        found.append(
            f"float32_modules leaves out {' and '.join(missing)}, of which 4 bits leave nothing in "
            f"{family.name}; auto keeps {' and '.join(family.float32_modules)}"
        )
    if method == "full":
        found.append(
            f"{family.name} is trained in all its weights; qlora or lora keep its most sensitive "
            "layers as they are"
        )
    return tuple(found)


def _is_text_alone(base: Path) -> bool:
    """Whether the model has no towers: its text part alone, or a GGUF, which holds no more."""
    if base.is_file():
        return True
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return not any(f"{sense}_config" in config for sense in ("vision", "audio"))
