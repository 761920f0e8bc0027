"""A training's checkpoints without the training: saves and prunes as `runner.model.sft` does.

It prints the number of each step once its checkpoint is committed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from runner.errors import RunnerError
from runner.model import checkpoint

KEEP_BEST = 2


def loss(step: int) -> float:
    """Falls and rises, so that the best are not always the newest."""
    return ((step * 7) % 10) / 10


def main(folder: str, steps: int, values: int) -> int:
    """Goes on after the last whole checkpoint up to `steps`; errors end it as in the runner."""
    scratch = Path(folder)
    try:
        checkpoint.clear_staged(scratch)
        saved, damaged = checkpoint.published(scratch)
        if damaged:
            print(f"damaged: {damaged}", file=sys.stderr)
            return 1
        for step in range(saved[-1].step + 1 if saved else 1, steps + 1):
            weights = {f"layer.{n}": torch.full((values,), float(step)) for n in range(2)}
            latest = checkpoint.save(
                scratch,
                step=step,
                eval_loss=loss(step),
                weights=weights,
                state_tensors={"moments": torch.full((2 * values,), -float(step))},
                state={"step": step},
            )
            print(step, flush=True)
            saved = checkpoint.prune(
                [*saved, latest], keep_best=KEEP_BEST, resumable=checkpoint.RESUMABLE
            )
        checkpoint.prune(saved, keep_best=KEEP_BEST, resumable=1)
    except RunnerError as error:
        print(f"runner: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"runner: {error}", file=sys.stderr)
        return 3
    return 0
