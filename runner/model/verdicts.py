"""What the numbers of a training say, in words: how it went, what looks wrong, what would help."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from runner.model.recovery import Part, named

SPIKE = 3.0
"""A loss so many times the median of the steps before it is worth a look."""
SPIKE_STEPS = 20
"""How many steps before it that is."""
_SPIKE_STEPS_MIN = 8

# What users were told, and what their own trainings bore out.
CONVERSATIONS_MIN = 1000
CONVERSATIONS_GOOD = (3000, 5000)
CONVERSATIONS_BEST = 10_000

Curve = Sequence[Mapping[str, float]]


def before(conversations: int) -> Iterator[str]:
    """What can be said of the data before the training."""
    if conversations < CONVERSATIONS_MIN:
        low, high = CONVERSATIONS_GOOD
        noun = "conversation is" if conversations == 1 else "conversations are"
        yield (
            f"{conversations:,} {noun} few to learn from: {CONVERSATIONS_MIN:,} are the least for a"
            f" dependable result, {low:,} to {high:,} are good, {CONVERSATIONS_BEST:,} and more"
            " the best"
        )


def after(curve: Curve, kept: int, steps: int, patience: int | None) -> Iterator[str]:
    """What can be said of a training that has ended, whose weights of step `kept` were kept."""
    last = int(curve[-1]["step"]) if curve else 0
    if patience is not None and last < steps and is_stuck(curve, patience):
        noun = "evaluation" if patience == 1 else "evaluations"
        yield f"stopped early at step {last}: eval loss had not fallen for {patience} {noun}"
    if words := of_eval_loss(curve, kept):
        yield words


def is_stuck(curve: Curve, patience: int) -> bool:
    """Whether the last `patience` evaluations have brought nothing better than one before them.

    The one before the training does not count: a first rise is part of many good trainings.
    """
    losses = [p["eval_loss"] for p in curve if "eval_loss" in p and p["step"] > 0]
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def of_eval_loss(curve: Curve, kept: int) -> str:
    """What the eval loss says about the training; empty where there is none."""
    evals = [(int(point["step"]), point["eval_loss"]) for point in curve if "eval_loss" in point]
    if len(evals) < 2:
        return ""
    (_, before), (last, after) = evals[0], evals[-1]
    best = dict(evals)[kept]
    early, late = _mean_loss(curve, 0, kept), _mean_loss(curve, kept, last)
    if best >= before:
        return (
            f"eval loss did not fall: {before:.3f} before, {best:.3f} at best (step {kept}); "
            "the data may be too little or too different, or the learning rate too high"
        )
    if after > 1.01 * best and late is not None and early is not None and late < early:
        return (
            f"overfitting: eval loss rose from {best:.3f} (step {kept}) to {after:.3f} (step "
            f"{last}) while training loss fell from {early:.3f} to {late:.3f}; step {kept} was "
            "kept; fewer epochs or more data would help"
        )
    words = f"eval loss fell from {before:.3f} to {best:.3f}; step {kept} was kept"
    if kept == last and len(evals) > 2 and evals[-2][1] - after > 0.01 * after:
        return f"{words}; it was still falling at the end, more epochs may help"
    return words


def of_spike(curve: Curve, step: int, parts: Sequence[Part]) -> str:
    """A warning where the loss of this step is far above that of the steps before it, else empty.

    Far: more than three times their median, and further above it than they lie apart. The
    conversations with the highest loss are named first.
    """
    losses = [point["loss"] for point in curve if "loss" in point][-SPIKE_STEPS:]
    loss = sum(part.loss for part in parts)
    if len(losses) < _SPIKE_STEPS_MIN:
        return ""
    median = statistics.median(losses)
    if loss <= SPIKE * median or loss - median <= max(losses) - min(losses):
        return ""
    worst = sorted(parts, key=lambda part: -part.loss / part.weight if part.weight else 0.0)
    names = named([name for part in worst for name in part.conversations])
    return (
        f"step {step}: the loss is {loss:.3f}, {loss / median:.1f} times the median of the last"
        f" {len(losses)} steps ({median:.3f}); conversations: {names}; look at them with"
        " `runner preview`, or take a lower learning_rate"
    )


def _mean_loss(curve: Curve, after: int, until: int) -> float | None:
    losses = [p["loss"] for p in curve if "loss" in p and after < p["step"] <= until]
    return sum(losses) / len(losses) if losses else None
