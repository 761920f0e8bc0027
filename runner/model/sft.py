"""Trains a causal model on weighted tokens: an adapter (lora, qlora) or all of its weights (full).

A loop of our own and not a library's trainer: its checkpoints can be trusted after a kill, it
spends nothing on padding and on logits that carry no loss, and it can be read top to bottom. The
price: one device, one process.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from runner import disk
from runner.errors import InterruptedRun, PreconditionError, RunnerError
from runner.model import adapter, batches, checkpoint, load, lora, packing, score, token_files
from runner.model.checkpoint import Checkpoint
from runner.model.load import Dtype
from runner.model.token_files import Row

Method = Literal["lora", "qlora", "full"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Emit = Callable[[dict[str, Any]], None]
Curve = list[dict[str, float]]
Result = TypeVar("Result")

MOST_STEPS_BETWEEN_CHECKPOINTS = 250
"""Where the recipe does not say: once an epoch, but never more than this work to lose."""

_MALLOC_SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}  # glibc's malloc.h


def train(
    *,
    base: Path,
    tokens: Path,
    output: Path,
    scratch: Path,
    method: Method,
    epochs: float,
    max_steps: int | None,
    learning_rate: float,
    schedule: Schedule,
    warmup_fraction: float,
    batch_size: int,
    micro_batch_size: int | Literal["auto"],
    weight_decay: float,
    max_grad_norm: float,
    precision: Precision,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: tuple[str, ...] | Literal["all-linear"],
    every_steps: int | None,
    keep_best: int,
    seed: int,
    emit: Emit,
) -> dict[str, float | int | str]:
    """Trains on `tokens/train.arrow` and writes the best checkpoint by `tokens/eval.arrow`.

    Where there is `tokens/packs.arrow`, rows of one pack share a sequence, each for itself.

    A disk that fills costs old checkpoints first; then the training stops with PreconditionError,
    and the newest and the best checkpoint stay.

    `output` gets an adapter in PEFT's layout or a model in Hugging Face's, and `metrics.jsonl`.
    Checkpoints go to `scratch`; what is there already is gone on from, exactly as if there had
    been no stop (bit for bit on a CPU). Raises InterruptedRun after SIGTERM or SIGINT, with a
    checkpoint saved, and RunnerError when the loss or the gradient is not a finite number.
    """
    _use_the_whole_processor()
    rows, held_out = _rows(tokens)
    packs = packing.read(tokens)
    steps = batches.planned(
        rows, batch_size=batch_size, epochs=epochs, max_steps=max_steps, seed=seed, packs=packs
    )
    every = every_steps or min(_steps_of_first_epoch(steps), MOST_STEPS_BETWEEN_CHECKPOINTS)

    device = torch.device(load.device())
    dtype = precision_of(device.type, precision)
    torch.manual_seed(seed)
    model = _model(base, method, dtype, device, rank, alpha, dropout, target_modules)
    score.check_logits(model, rows[0])
    packed = packs is not None and batches.isolates(model, rows)
    if packs is not None and not packed:
        text = "this model cannot keep packed rows apart, so each is a sequence of its own"
        emit({"event": "warning", "text": text})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = _optimizer(trained, learning_rate, weight_decay)
    # Weights in float32 are computed with in `dtype`; an adapter's base is in it already.
    rounds = method == "full" and dtype != "float32"
    mixed = torch.autocast(device.type, getattr(torch, dtype), enabled=rounds)

    training = _fingerprint(
        tokens,
        trained,
        [method, learning_rate, schedule, warmup_fraction, batch_size, weight_decay],
        [max_grad_norm, dtype, rank, alpha, dropout, seed, len(steps)],
    )
    saved, found = _latest(scratch, training, emit)
    curve: Curve = []
    done = seen_tokens = 0
    limits = _Limits(
        None if micro_batch_size == "auto" else micro_batch_size,
        batches.PASS_TOKENS[device.type],
        2.0**16 if dtype == "float16" else 1.0,
    )
    if found:
        weights, tensors, state = found
        _restore(trained, optimizer, weights, tensors)
        done, seen_tokens, curve = state["step"], state["tokens"], state["curve"]
        limits = replace(limits, loss_scale=state["loss_scale"])

    def eval_loss() -> float | None:
        """Measures, and adds to the curve; None where there are no eval rows."""
        if not len(held_out):
            return None
        with mixed:
            loss = score.mean_loss(model, held_out)
        if not math.isfinite(loss):
            raise RunnerError(
                f"step {done}: the eval loss is {loss}",
                hint="a lower learning_rate, or precision: float32",
            )
        curve.append({"step": done, "eval_loss": loss})
        emit({"event": "metrics", "step": done, "eval_loss": loss})
        return loss

    def save(eval_loss: float | None) -> Checkpoint:
        return checkpoint.save(
            scratch,
            step=done,
            eval_loss=eval_loss,
            weights=_on_cpu(trained),
            state_tensors=_state_tensors(trained, optimizer, device),
            state={
                "step": done,
                "tokens": seen_tokens,
                "curve": curve,
                "loss_scale": limits.loss_scale,
                "training": training,
            },
        )

    with _stop_asked() as stop:
        if not found:
            eval_loss()
        model.train()
        pace = _Pace()
        while done < len(steps):
            if stop.is_set() and not done:
                raise _interrupted(0, len(steps))
            step_started = time.monotonic()
            step = steps[done]
            chosen = [rows[index] for index in step.rows]
            rate = learning_rate * rate_factor(done, len(steps), warmup_fraction, schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sizes = [len(rows) for rows in step.sequences] if packed else [1] * len(chosen)
            loss, norm, limits = _gradients(
                model, trained, chosen, sizes, done + 1, limits, mixed, max_grad_norm, emit
            )
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            step_tokens = sum(len(row.input_ids) for row in chosen)
            seen_tokens += step_tokens
            pace = pace.after(step_tokens, time.monotonic() - step_started)
            measured = {
                "step": done,
                "epoch": round(step.epoch, 4),
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": seen_tokens,
            }
            curve.append(measured)
            emit(
                {
                    "event": "metrics",
                    **measured,
                    "steps": len(steps),
                    "tokens_per_second": round(pace.tokens_per_s, 1),
                    "memory_bytes": _memory_bytes(device),
                    "seconds_left": round(pace.step_s * (len(steps) - done), 1),
                }
            )
            due = done % every == 0 or done == len(steps)
            if due or stop.is_set():
                # After a signal there is no time to evaluate; a later checkpoint does.
                write = partial(save, eval_loss() if due else None)
                latest, saved = _in_the_room_there_is(write, saved, emit)
                saved = checkpoint.prune(
                    [*saved, latest], keep_best=keep_best, resumable=checkpoint.RESUMABLE
                )
                emit(
                    {
                        "event": "checkpoint",
                        "step": done,
                        "path": str(latest.path),
                        "bytes": disk.size(latest.path),
                        "eval_loss": latest.eval_loss,
                    }
                )
            if stop.is_set() and done < len(steps):
                raise _interrupted(done, len(steps))

    chosen_step = _take_best(trained, saved, done, emit)
    saved = checkpoint.prune(saved, keep_best=keep_best, resumable=1)
    _in_the_room_there_is(partial(_write, model, method, base, output, curve), saved, emit)
    if text := verdict(curve, chosen_step):
        emit({"event": "verdict", "text": text})
    return _summary(curve, chosen_step, trained, seen_tokens, pace)


def precision_of(device: str, precision: Precision = "auto") -> Dtype:
    """The number format to compute in; auto takes bfloat16 where the device multiplies in it."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    # Without AMX (or Arm's equal) bfloat16 on a CPU is emulated, and slower than float32.
    has_bfloat16 = device == "cpu" and torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_bfloat16 else "float32"


def rate_factor(step: int, steps: int, warmup_fraction: float, schedule: Schedule) -> float:
    """What the learning rate is multiplied by in step `step`, counted from 0."""
    warmup = math.ceil(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":  # SGDR (arXiv:1608.03983), equation 5, without restarts
        return (1 - math.cos(math.pi * left)) / 2
    return left if schedule == "linear" else 1.0


def verdict(curve: Sequence[Mapping[str, float]], kept: int) -> str:
    """What the eval loss says about the training, in words; empty where there is none."""
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


@dataclass(frozen=True)
class _Limits:
    """How a step is cut into passes, and what its loss is multiplied by.

    None of the three changes the gradient but for rounding.
    """

    micro_batch_size: int | None
    pass_tokens: int
    loss_scale: float


@dataclass(frozen=True)
class _Pace:
    """Seconds of a step and tokens per second: means over the last steps, newer ones more."""

    step_s: float = 0.0
    step_tokens: float = 0.0

    def after(self, tokens: int, seconds: float) -> _Pace:
        keep = 0.9 if self.step_s else 0.0
        return _Pace(
            keep * self.step_s + (1 - keep) * seconds,
            keep * self.step_tokens + (1 - keep) * tokens,
        )

    @property
    def tokens_per_s(self) -> float:
        return self.step_tokens / self.step_s if self.step_s else 0.0


def _rows(folder: Path) -> tuple[token_files.Rows, token_files.Rows]:
    rows = token_files.read(folder / "train.arrow")
    held_out = token_files.read(folder / "eval.arrow")
    if not len(rows):
        raise RunnerError(
            f"{folder}: no rows to train on",
            hint="more conversations, or a smaller eval_fraction in split",
        )
    return rows, held_out


def _steps_of_first_epoch(steps: Sequence[batches.Step]) -> int:
    return sum(step.epoch <= 1 for step in steps)


def _model(
    base: Path,
    method: Method,
    dtype: Dtype,
    device: torch.device,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: tuple[str, ...] | Literal["all-linear"],
) -> nn.Module:
    """The model with what is to be trained in float32 and everything else frozen."""
    if method == "full":
        # Updates of a small learning rate are lost in the rounding of bfloat16.
        whole = load.causal_lm(base, dtype="float32", device=str(device))
        lora.freeze_towers(whole)
        return whole
    frozen = load.causal_lm(base, dtype=dtype, four_bit=method == "qlora", device=str(device))
    return lora.attach(
        frozen, rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules
    )


def _optimizer(
    trained: Mapping[str, nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), which pulls at matrices only, not at norms and biases."""
    matrices = [p for p in trained.values() if p.ndim > 1]
    vectors = [p for p in trained.values() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, fused=True
    )


def _gradients(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    rows: Sequence[Row],
    sizes: Sequence[int],
    step: int,
    limits: _Limits,
    mixed: torch.autocast,
    max_grad_norm: float,
    emit: Emit,
) -> tuple[float, float, _Limits]:
    """Leaves the clipped gradient of a step in the parameters; (loss, its norm, new limits).

    Out of memory halves the passes, and a float16 overflow the loss scale; then the same step is
    computed again.
    """
    before = _random_state(next(iter(trained.values())).device)
    while True:
        try:
            losses = _backward(model, rows, limits, mixed, sizes)
        except torch.OutOfMemoryError:
            losses = None
        if losses is None:
            limits = _smaller(model, rows, limits, emit)
        else:
            for parameter in trained.values():
                if parameter.grad is not None and limits.loss_scale != 1:
                    parameter.grad /= limits.loss_scale
            norm = float(nn.utils.clip_grad_norm_(trained.values(), max_grad_norm))
            loss = sum(part for part, _ in losses)
            if math.isfinite(loss) and math.isfinite(norm):
                return loss, norm, limits
            if limits.loss_scale <= 1 or not math.isfinite(loss):
                raise _not_finite(step, losses, loss, norm)
            limits = replace(limits, loss_scale=limits.loss_scale / 2)
        for parameter in trained.values():
            parameter.grad = None
        _restore_random(before)


def _backward(
    model: nn.Module,
    rows: Sequence[Row],
    limits: _Limits,
    mixed: torch.autocast,
    sizes: Sequence[int] = (),
) -> list[tuple[float, tuple[str, ...]]]:
    """Adds up the gradient; each pass's share of the step's loss, and whose it is.

    The loss of a step is sum(weight · nll) / sum(weight) over all of its rows, so the division
    into passes does not show in it. `sizes` are the rows of each pack in turn, where rows are
    packed; a pack with more tokens than a pass is cut between its rows.
    """
    device = next(model.parameters()).device
    total_weight = sum(float(row.weights.sum(dtype="float64")) for row in rows)
    left = iter(rows)
    packs = [list(islice(left, size)) for size in sizes or [1] * len(rows)]
    if limits.micro_batch_size is None:
        packs = [piece for pack in packs for piece in batches.divided(pack, limits.pass_tokens)]
    groups = batches.micro_batches(
        [sum(len(row.input_ids) for row in pack) for pack in packs],
        micro_batch_size=limits.micro_batch_size,
        pass_tokens=limits.pass_tokens,
    )
    losses = []
    for group in groups:
        batch = batches.packed([packs[place] for place in group], device)
        with mixed, batches.isolated(model, batch):
            loss = score.summed_nll(model, batch) / total_weight
        (loss * limits.loss_scale).backward()  # type: ignore[no-untyped-call]
        losses.append((loss.detach(), batch.conversations))
    return [(loss.item(), conversations) for loss, conversations in losses]


def _smaller(model: nn.Module, rows: Sequence[Row], limits: _Limits, emit: Emit) -> _Limits:
    """Half the tokens of a pass; at one row a pass, recomputation instead of kept activations."""
    torch.cuda.empty_cache()
    longest = max(len(row.input_ids) for row in rows)
    causal = lora.inner(model)
    rows_each, pass_tokens = limits.micro_batch_size, limits.pass_tokens
    if rows_each is not None and rows_each > 1:
        smaller = replace(limits, micro_batch_size=rows_each // 2)
        text = f"out of memory: {rows_each // 2} rows at a time from now on"
    elif rows_each is None and pass_tokens > longest:
        smaller = replace(limits, pass_tokens=pass_tokens // 2)
        text = f"out of memory: {pass_tokens // 2} tokens at a time from now on"
    elif not causal.is_activation_checkpointing:
        causal.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        smaller = limits
        text = "out of memory: activations are computed again from now on, not kept"
    else:
        raise PreconditionError(
            f"one example of {longest} tokens does not fit into the memory of the device",
            hint="method: qlora, or a smaller max_tokens in tokenize",
        )
    emit({"event": "warning", "text": text})
    return smaller


def _not_finite(
    step: int, losses: Sequence[tuple[float, tuple[str, ...]]], loss: float, norm: float
) -> RunnerError:
    bad = [part for part in losses if not math.isfinite(part[0])] or losses
    names = list(dict.fromkeys(name for _, conversations in bad for name in conversations))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
    return RunnerError(
        f"step {step}: the {what}; conversations: {', '.join(names[:5])}{more}",
        hint="look at them with `runner preview`; else a lower learning_rate, or precision: "
        "float32. The checkpoints before this step are kept",
    )


def _latest(
    scratch: Path, training: str, emit: Emit
) -> tuple[list[Checkpoint], tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None]:
    """The checkpoints up to the newest that can be gone on from, and what is in that one."""
    checkpoint.clear_staged(scratch)
    whole, damaged = checkpoint.published(scratch)
    for path in damaged:
        _warn_damaged(path, emit)
    while whole:
        newest = whole[-1]
        if checkpoint.can_resume(newest):
            try:
                tensors, state = checkpoint.state_of(newest)
                if state["training"] != training:
                    raise RunnerError(
                        f"{scratch} holds checkpoints of a training with other settings or data",
                        hint="restore them, or delete the folder to start anew",
                    )
                return whole, (checkpoint.weights_of(newest), tensors, state)
            except checkpoint.DamagedCheckpoint:
                _warn_damaged(newest.path, emit)
        else:
            checkpoint.remove(newest.path)
        whole.pop()
    return [], None


def _warn_damaged(path: Path, emit: Emit) -> None:
    text = f"the checkpoint {path.name} is damaged; training goes on from the one before"
    emit({"event": "warning", "text": text})
    checkpoint.remove(path)


def _restore(
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    weights: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    _set_weights(trained, weights)
    for name, parameter in trained.items():
        optimizer.state[parameter] = {
            key: tensors[f"{key} {name}"].to(parameter.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    _restore_random([tensors[key] for key in sorted(tensors) if key.startswith("random ")])


def _state_tensors(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW, device: torch.device
) -> dict[str, Tensor]:
    """Everything beside the weights that decides the next step, by name."""
    tensors = {
        f"{key} {name}": tensor
        for name, parameter in trained.items()
        for key, tensor in optimizer.state[parameter].items()
    }
    for place, state in enumerate(_random_state(device)):
        tensors[f"random {place}"] = state
    return _on_cpu(tensors)


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU and, if it computes there, of the GPU."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if device.type == "cuda" else states


def _restore_random(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def _set_weights(trained: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _take_best(
    trained: Mapping[str, nn.Parameter], saved: list[Checkpoint], done: int, emit: Emit
) -> int:
    """Puts the best checkpoint's weights into the model; its step."""
    left = list(saved)
    while left:
        best = checkpoint.best(left)
        if best.step == done:
            return done
        try:
            _set_weights(trained, checkpoint.weights_of(best))
        except checkpoint.DamagedCheckpoint:
            text = f"the best checkpoint, {best.path.name}, is damaged; the next best was taken"
            emit({"event": "warning", "text": text})
            left.remove(best)
        else:
            return best.step
    return done


def _in_the_room_there_is(
    write: Callable[[], Result], saved: list[Checkpoint], emit: Emit
) -> tuple[Result, list[Checkpoint]]:
    """What `write` gives, and the checkpoints that are still there.

    Where the disk is too full, all checkpoints go that may, and `write` gets a second chance.
    """
    try:
        return write(), saved
    except PreconditionError as error:
        before = _bytes_of(saved)
        saved = checkpoint.thinned(saved)
        freed = before - _bytes_of(saved)
        if not freed:
            raise _stopped(error, saved) from error
    kept = " and ".join(one.path.name for one in saved)
    text = f"the disk is full: {freed / 1e6:,.1f} MB of old checkpoints went; kept: {kept}"
    emit({"event": "warning", "text": text})
    try:
        return write(), saved
    except PreconditionError as error:
        raise _stopped(error, saved) from error


def _stopped(error: PreconditionError, saved: Sequence[Checkpoint]) -> PreconditionError:
    start = f"after step {saved[-1].step}" if saved else "from the start"
    return PreconditionError(
        error.message,
        hint=f"free some space and run the same command again; the training goes on {start}",
    )


def _bytes_of(saved: Sequence[Checkpoint]) -> int:
    return sum(disk.size(one.path) for one in saved)


def _write(model: nn.Module, method: Method, base: Path, output: Path, curve: Curve) -> None:
    """Writes the model and its curve whole, or nothing; PreconditionError on a full disk."""
    needed = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    output.mkdir(parents=True, exist_ok=True)
    try:
        if method == "full":
            adapter.write_model(lora.inner(model), base, output, dtype=adapter.stored_dtype(base))
        else:
            disk.check_room(output, needed)
            lora.write(model, output)
        # Without times, so that the same training gives the same artifact.
        lines = "".join(json.dumps(point) + "\n" for point in curve)
        (output / "metrics.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    except PreconditionError:
        disk.remove(output)
        raise
    except (OSError, SafetensorError) as error:
        disk.remove(output)
        raise disk.full(error, output, needed) or error from error


def _summary(
    curve: Curve,
    kept: int,
    trained: Mapping[str, nn.Parameter],
    seen_tokens: int,
    pace: _Pace,
) -> dict[str, float | int | str]:
    evals = {int(point["step"]): point["eval_loss"] for point in curve if "eval_loss" in point}
    losses = [point["loss"] for point in curve if "loss" in point]
    summary: dict[str, float | int | str] = {
        "steps": len(losses),
        "kept_step": kept,
        "loss": round(losses[-1], 6),
        "tokens": seen_tokens,
        "trained_parameters": sum(parameter.numel() for parameter in trained.values()),
        "tokens_per_second": round(pace.tokens_per_s, 1),
    }
    if evals:
        summary |= {"eval_loss_before": round(evals[0], 6), "eval_loss": round(evals[kept], 6)}
    return summary


def _mean_loss(curve: Sequence[Mapping[str, float]], after: int, until: int) -> float | None:
    losses = [p["loss"] for p in curve if "loss" in p and after < p["step"] <= until]
    return sum(losses) / len(losses) if losses else None


def _fingerprint(
    folder: Path, trained: Mapping[str, nn.Parameter], *settings: Sequence[object]
) -> str:
    """Names a training by what decides its weights, so that no other one's are gone on from."""
    facts: list[object] = [*settings]
    names = ("train.arrow", "eval.arrow", packing.FILE)
    for path in (folder / name for name in names if (folder / name).exists()):
        with path.open("rb") as file:
            facts.append(hashlib.file_digest(file, "sha256").hexdigest())
    facts.append([(name, list(parameter.shape)) for name, parameter in trained.items()])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _memory_bytes(device: torch.device) -> int:
    """The most that was in use on the GPU, or what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _use_the_whole_processor() -> None:
    """All threads, and memory that is kept: both are settings of the process."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    if platform.libc_ver()[0] == "glibc":
        # Large tensors are else given back to the system after each use, and the page faults of
        # taking them anew cost a fifth of a training step on a CPU.
        for parameter, value in _MALLOC_SETTINGS.values():
            ctypes.CDLL(None).mallopt(parameter, value)


@contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """Set by SIGTERM and SIGINT, which otherwise do nothing until the block is left."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {
        number: signal.signal(number, lambda *_: asked.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _interrupted(step: int, steps: int) -> InterruptedRun:
    return InterruptedRun(
        f"training stopped after step {step} of {steps}; the state is saved",
        hint="run the same command again to go on",
    )
