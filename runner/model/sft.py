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
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from runner import disk
from runner.chat import learned
from runner.chat.learned import Learned
from runner.errors import InterruptedRun, PreconditionError, RunnerError
from runner.model import (
    adapter,
    batches,
    checkpoint,
    continuing,
    identity,
    load,
    lora,
    memory,
    optimizers,
    packing,
    recovery,
    score,
    token_files,
    verdicts,
)
from runner.model.checkpoint import Checkpoint
from runner.model.load import Dtype
from runner.model.optimizers import Schedule
from runner.model.recovery import Limits, Noise, Recompute
from runner.model.token_files import Row

Method = Literal["lora", "qlora", "full"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Emit = Callable[[dict[str, Any]], None]
Curve = list[dict[str, float]]

MOST_STEPS_BETWEEN_CHECKPOINTS = 250
"""Where the recipe does not say: once an epoch, but never more than this work to lose."""

_MALLOC_SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}  # glibc's malloc.h


def train(
    *,
    base: Path,
    tokens: Path,
    output: Path,
    scratch: Path,
    parent: Path | None = None,
    replay: float = 0.0,
    method: Method,
    epochs: float,
    max_steps: int | None,
    learning_rate: float,
    schedule: Schedule,
    warmup_fraction: float,
    decay_fraction: float,
    optimizer: optimizers.Name,
    batch_size: int,
    micro_batch_size: int | Literal["auto"],
    gradient_checkpointing: Recompute,
    weight_decay: float,
    max_grad_norm: float,
    precision: Precision,
    float32_modules: tuple[str, ...] | Literal["auto"] = "auto",
    neftune_alpha: float,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: tuple[str, ...] | Literal["all-linear"],
    modules_to_save: tuple[str, ...],
    rslora: bool,
    dora: bool,
    early_stopping: int | None,
    every_steps: int | None,
    keep_best: int,
    seed: int,
    emit: Emit,
) -> dict[str, float | int | str]:
    """Trains on `tokens/train.arrow` and writes the best checkpoint by `tokens/eval.arrow`.

    Where there is `tokens/packs.arrow`, rows of one pack share a sequence, each for itself.

    Ends before its time when `early_stopping` evaluations have brought no better eval loss. Memory
    that runs out makes the passes smaller, and the same step is computed again. A disk that fills
    costs old checkpoints first; then the training stops with PreconditionError, and the newest and
    the best checkpoint stay.

    With `parent`, a model of the same shape, it goes on from that one's weights, on the rows of
    conversations that are new to it and the share `replay` of the others; with nothing new `output`
    is that model again.

    `output` gets an adapter in PEFT's layout or a model in Hugging Face's, `metrics.jsonl`, and
    `conversations.txt`, which says what it has met (`learned`).
    Checkpoints go to `scratch`; what is there already is gone on from, exactly as if there had
    been no stop (bit for bit on a CPU). Raises InterruptedRun after SIGTERM or SIGINT, with a
    checkpoint saved, and RunnerError when the loss or the gradient is not a finite number.
    """
    _use_the_whole_processor()
    every_row, held_out = _rows(tokens)
    if parent is None:
        chosen_rows = continuing.everything(tokens, every_row, held_out)
    else:
        chosen_rows = continuing.chosen(
            tokens, every_row, held_out, parent=parent, replay=replay, seed=seed
        )
        if not chosen_rows.new:
            return _as_before(parent, output, chosen_rows, emit)
    rows, packs = chosen_rows.rows, chosen_rows.packs
    steps = batches.planned(
        rows, batch_size=batch_size, epochs=epochs, max_steps=max_steps, seed=seed, packs=packs
    )
    every = every_steps or min(_steps_of_first_epoch(steps), MOST_STEPS_BETWEEN_CHECKPOINTS)

    known = identity.of(base)  # as it is now, when its weights are read
    if parent is not None:
        identity.check(base, parent, known)
        adapter.check_vocabulary(base, parent)
    device = torch.device(load.device())
    dtype = precision_of(device.type, precision)
    if text := optimizers.check(optimizer, device.type):
        emit({"event": "warning", "text": text})
    asked = Limits(
        None if micro_batch_size == "auto" else micro_batch_size,
        batches.PASS_TOKENS[device.type],
        2.0**16 if dtype == "float16" else 1.0,
        batches.PASS_TOKENS[device.type],
        gradient_checkpointing,
    )
    sizes_of = memory.read(base)
    needs = memory.Training(
        method=method,
        max_tokens=max(len(row.input_ids) for row in rows),
        rank=rank,
        target_modules=target_modules,
        modules_to_save=modules_to_save,
        dropout=dropout,
        optimizer=optimizer,
        precision=dtype,
        device=load.device(),
    )
    limits, recomputes = recovery.fitted(asked, sizes_of, needs, _memory_of(device), emit)
    torch.manual_seed(seed)
    with recovery.memory_in_words("the model", "method: qlora, or a smaller base model"):
        model = (
            _whole(base if parent is None else parent, device)
            if method == "full"
            else lora.attach(
                load.causal_lm(
                    base,
                    dtype=dtype,
                    four_bit=method == "qlora",
                    device=str(device),
                    float32_modules=float32_modules,
                ),
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                target_modules=target_modules,
                modules_to_save=modules_to_save,
                rslora=rslora,
                dora=dora,
            )
        )
        if parent is not None and method != "full":
            lora.take(model, parent)
    if gradient_checkpointing == "on" or (recomputes and recovery.can_recompute(model)):
        recovery.recompute(model)
    score.check_logits(model, rows[0])
    packed = packs is not None and batches.keeps_apart(model, rows)
    if packs is not None and not packed:
        text = "this model cannot keep packed rows apart, so each is a sequence of its own"
        emit({"event": "warning", "text": text})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adamw = optimizers.create(
        optimizer,
        trained,
        _trained_embeddings(model),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
    )
    # Weights in float32 are computed with in `dtype`; an adapter's base is in it already.
    rounds = method == "full" and dtype != "float32"
    mixed = torch.autocast(device.type, getattr(torch, dtype), enabled=rounds)

    training = _fingerprint(
        tokens,
        trained,
        [method, optimizer, learning_rate, schedule, warmup_fraction, decay_fraction],
        [batch_size, weight_decay, max_grad_norm, dtype, neftune_alpha],
        [rank, alpha, dropout, rslora, early_stopping, seed, len(steps)],
        *([[chosen_rows.mark]] if chosen_rows.mark else ()),
        *([float32_modules] if float32_modules != "auto" else ()),
    )
    saved, found = checkpoint.latest(scratch, training, emit)
    curve: Curve = []
    done = seen_tokens = 0
    largest_pass = 0
    if found:
        weights, tensors, state = found
        _set_weights(trained, weights)
        optimizers.restore(adamw, trained, tensors)
        recovery.restore_random([tensors[key] for key in sorted(tensors) if key[:7] == "random "])
        done, seen_tokens, curve = state["step"], state["tokens"], state["curve"]
        limits = _limits_found(model, asked, limits, state)
    else:
        few = verdicts.before(len(set(rows.conversations)))
        for text in [chosen_rows.words()] if parent else few:
            emit({"event": "verdict", "text": text})

    def has_ended() -> bool:
        stuck = early_stopping is not None and verdicts.is_stuck(curve, early_stopping)
        return stuck or done == len(steps)

    def eval_loss() -> float | None:
        """Measures, and adds to the curve; None where there are no eval rows."""
        nonlocal limits
        if not len(held_out):
            return None
        loss, limits = recovery.mean_loss(model, held_out, limits, mixed, emit)
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
            state_tensors=_state_tensors(trained, adamw, device),
            state={
                "step": done,
                "tokens": seen_tokens,
                "curve": curve,
                "loss_scale": limits.loss_scale,
                "limits": _limits_noted(model, asked, limits),
                "training": training,
            },
        )

    with _stop_asked() as stop:
        if not found:
            eval_loss()
        model.train()
        pace = _Pace()
        while not has_ended():
            if stop.is_set() and not done:
                raise _interrupted(0, len(steps))
            step_started = time.monotonic()
            step = steps[done]
            chosen = [rows[index] for index in step.rows]
            rate = learning_rate * optimizers.rate_factor(
                done, len(steps), warmup_fraction, schedule, decay_fraction
            )
            for group in adamw.param_groups:
                group["lr"] = rate
            sizes = [len(rows) for rows in step.sequences] if packed else [1] * len(chosen)
            noise = Noise(neftune_alpha, f"{seed} {done}")
            parts, norm, limits = recovery.gradients(
                model,
                trained,
                chosen,
                sizes,
                done + 1,
                limits,
                mixed,
                max_grad_norm,
                noise,
                emit,
            )
            with recovery.memory_in_words("the optimizer's state", _smaller_state(optimizer)):
                optimizers.step(adamw)
            done += 1
            largest_pass = max(largest_pass, *(part.tokens for part in parts))
            step_tokens = sum(len(row.input_ids) for row in chosen)
            seen_tokens += step_tokens
            pace = pace.after(step_tokens, _with_loss(chosen), time.monotonic() - step_started)
            if text := verdicts.of_spike(curve, done, parts):
                emit({"event": "warning", "text": text})
            measured = {
                "step": done,
                "epoch": round(step.epoch, 4),
                "loss": sum(part.loss for part in parts),
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
                    "trained_tokens_per_second": round(pace.trained_tokens_per_s, 1),
                    "memory_bytes": _memory_bytes(device),
                    "seconds_left": round(pace.step_s * (len(steps) - done), 1),
                }
            )
            due = done % every == 0 or done == len(steps)
            if due or stop.is_set():
                # After a signal there is no time to evaluate; a later checkpoint does.
                write = partial(save, eval_loss() if due else None)
                latest, saved = checkpoint.in_the_room_there_is(write, saved, emit)
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
            if stop.is_set() and not has_ended():
                raise _interrupted(done, len(steps))

    chosen_step = _take_best(trained, saved, done, emit)
    saved = checkpoint.prune(saved, keep_best=keep_best, resumable=1)
    checkpoint.in_the_room_there_is(
        partial(_write, model, method, base, known, output, curve, chosen_rows.learned),
        saved,
        emit,
    )
    for text in verdicts.after(curve, chosen_step, len(steps), early_stopping):
        emit({"event": "verdict", "text": text})
    summary = _summary(curve, chosen_step, trained, seen_tokens, pace, _peak_bytes(device))
    if sizes_of is None or not largest_pass:
        return summary
    needs = replace(needs, recompute=recovery.is_recomputing(model))
    said = memory.estimate(sizes_of, memory.of_tokens(needs, largest_pass))
    emit({"event": "verdict", "text": memory.beside(said, _peak_bytes(device), needs.device)})
    estimated = said.allocated if device.type == "cuda" else said.total
    return {**summary, "estimated_memory_bytes": estimated}


def precision_of(device: str, precision: Precision = "auto") -> Dtype:
    """The number format to compute in; auto takes bfloat16 where the device multiplies in it."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    # Without AMX (or Arm's equal) bfloat16 on a CPU is emulated, and slower than float32.
    has_bfloat16 = device == "cpu" and torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_bfloat16 else "float32"


@dataclass(frozen=True)
class _Pace:
    """Seconds of a step and tokens per second: means over the last steps, newer ones more."""

    step_s: float = 0.0
    step_tokens: float = 0.0
    step_trained_tokens: float = 0.0

    def after(self, tokens: int, trained_tokens: int, seconds: float) -> _Pace:
        keep = 0.9 if self.step_s else 0.0
        return _Pace(
            keep * self.step_s + (1 - keep) * seconds,
            keep * self.step_tokens + (1 - keep) * tokens,
            keep * self.step_trained_tokens + (1 - keep) * trained_tokens,
        )

    @property
    def tokens_per_s(self) -> float:
        return self.step_tokens / self.step_s if self.step_s else 0.0

    @property
    def trained_tokens_per_s(self) -> float:
        """Of those that carry loss."""
        return self.step_trained_tokens / self.step_s if self.step_s else 0.0


def _rows(folder: Path) -> tuple[token_files.Rows, token_files.Rows]:
    rows = token_files.read(folder / "train.arrow")
    held_out = token_files.read(folder / "eval.arrow")
    if not len(rows):
        raise RunnerError(
            f"{folder}: no rows to train on",
            hint="more conversations, or a smaller eval_fraction in split",
        )
    return rows, held_out


def _as_before(
    parent: Path, output: Path, found: continuing.Chosen, emit: Emit
) -> dict[str, float | int | str]:
    """The parent again, because there is nothing to teach it."""
    texts = ["nothing is new to the model, so it stays as it is"]
    for text in (*texts, found.forgets()) if found.gone else texts:
        emit({"event": "verdict", "text": text})
    continuing.copy(parent, output)
    return {"steps": 0, "new_conversations": 0}


def _steps_of_first_epoch(steps: Sequence[batches.Step]) -> int:
    return sum(step.epoch <= 1 for step in steps)


def _with_loss(rows: Sequence[Row]) -> int:
    return sum(int((row.weights != 0).sum()) for row in rows)


def _whole(base: Path, device: torch.device) -> nn.Module:
    """The model in float32, to be trained but for the towers."""
    # Updates of a small learning rate are lost in the rounding of bfloat16.
    model = load.causal_lm(base, dtype="float32", device=str(device))
    lora.freeze_towers(model)
    return model


def _trained_embeddings(model: nn.Module) -> nn.Parameter | None:
    embeddings: Any = lora.inner(model).get_input_embeddings()
    weight: nn.Parameter = embeddings.weight
    return weight if weight.requires_grad else None


def _smaller_state(name: optimizers.Name) -> str:
    return "method: lora, or a smaller lora.rank" if "8bit" in name else "optimizer: adamw_8bit"


def _limits_noted(model: nn.Module, asked: Limits, limits: Limits) -> dict[str, Any]:
    """What there was memory for, so that a training that goes on need not find out again."""
    return {
        "asked": _sizes(asked),
        "found": _sizes(limits),
        "recomputes": recovery.is_recomputing(model),
    }


def _limits_found(
    model: nn.Module, asked: Limits, fitted: Limits, state: Mapping[str, Any]
) -> Limits:
    """The limits of a checkpoint, where the recipe and the device still ask for the same; else
    those that fit now."""
    noted, limits = state["limits"], replace(fitted, loss_scale=state["loss_scale"])
    if noted["asked"] != _sizes(asked):
        return limits
    if noted["recomputes"] and asked.recompute == "auto" and not recovery.is_recomputing(model):
        recovery.recompute(model)
    micro_batch_size, pass_tokens, eval_tokens = noted["found"]
    return replace(
        limits,
        micro_batch_size=micro_batch_size,
        pass_tokens=pass_tokens,
        eval_tokens=eval_tokens,
    )


def _sizes(limits: Limits) -> list[int | None]:
    return [limits.micro_batch_size, limits.pass_tokens, limits.eval_tokens]


def _state_tensors(
    trained: Mapping[str, nn.Parameter], adamw: torch.optim.Optimizer, device: torch.device
) -> dict[str, Tensor]:
    """Everything beside the weights that decides the next step, by name."""
    tensors = optimizers.state(adamw, trained)
    for place, state in enumerate(recovery.random_state(device)):
        tensors[f"random {place}"] = state
    return _on_cpu(tensors)


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


def _write(
    model: nn.Module,
    method: Method,
    base: Path,
    known: identity.Identity,
    output: Path,
    curve: Curve,
    met: Learned,
) -> None:
    """Writes the model, its curve and what it has met: all, or nothing where the disk is full."""
    needed = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    output.mkdir(parents=True, exist_ok=True)
    try:
        if method == "full":
            adapter.write_model(lora.inner(model), base, output, dtype=adapter.stored_dtype(base))
        else:
            disk.check_room(output, needed)
            lora.write(model, output)
            identity.write(known, output)
        # Without times, so that the same training gives the same artifact.
        lines = "".join(json.dumps(point) + "\n" for point in curve)
        (output / "metrics.jsonl").write_text(lines, encoding="utf-8", newline="\n")
        learned.write(output, met)
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
    peak_bytes: int,
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
        "trained_tokens_per_second": round(pace.trained_tokens_per_s, 1),
        "peak_memory_bytes": peak_bytes,
    }
    if evals:
        summary |= {"eval_loss_before": round(evals[0], 6), "eval_loss": round(evals[kept], 6)}
    return summary


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


def _memory_of(device: torch.device) -> int | None:
    """All that there is: what happens to be free would divide the same training otherwise."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory.computers()[0]


def _memory_bytes(device: torch.device) -> int:
    """The most that was in use on the GPU, or what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _peak_bytes(device: torch.device) -> int:
    """The most that this process has held: of the GPU's memory, or of the computer's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    process = psutil.Process()
    if sys.platform == "win32":
        return int(process.memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return max(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        int(process.memory_info().rss),
    )


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
