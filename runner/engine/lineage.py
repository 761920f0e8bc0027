"""Which model a training goes on from, where the recipe says `retrain: mode: continue`.

It is a part of the training's key, so it must not change by itself: what is made stays what it is
until something else of the key changes, and only then the current release is gone on from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.engine import key, lock
from runner.engine.recipe import Step

SHAPE = ("method", "lora")
"""Settings that a model and the one that goes on from it have in common."""


def shape(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training's key has to be the same to go on from its model."""
    settings = {name: value for name, value in parts.get("settings", {}).items() if name in SHAPE}
    found = {"base_model": parts.get("base_model"), "settings": settings}
    return {name: value for name, value in found.items() if value}


def parent(
    step: Step, now: key.Components, locked: lock.Lock, retrain: Mapping[str, Any] | None
) -> tuple[dict[str, Any], str]:
    """The parts `parent` and `replay` of the key whose other parts are `now`; and in words, why.

    Inputs that `now` lacks, because they are still to be made, count as they were. The first is
    empty where the training starts from the base model, the second where there is nothing to say.
    """
    if step.kind != "train" or retrain is None or retrain["mode"] != "continue":
        return {}, ""
    before = locked.of_stage(step.name)
    if before is not None:
        then = {k: v for k, v in before.parts.items() if k not in lock.CONTINUED}
        inputs = {**then.get("inputs", {}), **now.get("inputs", {})}
        if then == {**now, "inputs": inputs}:
            return {k: before.parts[k] for k in lock.CONTINUED if k in before.parts}, ""
    release = locked.release
    if release is None:
        return {}, ""
    name = f"release {release.number}"
    model = release.models.get(step.name)
    if model is None:
        return {}, f"it is trained anew: {name} has no model of a stage {step.name}"
    if text := _difference(model, shape(now)):
        return {}, f"it is trained anew: {text} than in {name}"
    parts = {"parent": release.outputs[step.name], "replay": retrain["replay_fraction"]}
    return parts, f"it continues from {name}"


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if then.get("base_model") != now.get("base_model"):
        return "the base model is another one"
    old, new = then.get("settings", {}), now.get("settings", {})
    return next((f"{name} is another one" for name in SHAPE if old.get(name) != new.get(name)), "")
