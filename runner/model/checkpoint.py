"""Checkpoints that are whole or not there: staged, hashed, synced, renamed; verified before use.

step-000120/
    weights.safetensors       what is trained, by parameter name
    manifest.json             step, eval loss, hashes; written last
    resume/                   only in the last two: what it takes to go on exactly
        state.safetensors     optimizer and random state
        state.json
        manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runner import disk
from runner.errors import InterruptedRun, PreconditionError, RunnerError

Emit = Callable[[dict[str, Any]], None]
Result = TypeVar("Result")

RESUMABLE = 2
"""How many of the newest checkpoints hold optimizer state: one, and one to fall back to."""


class DamagedCheckpoint(RunnerError):
    """Its files are not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint; `eval_loss` is None where none was measured."""

    path: Path
    step: int
    eval_loss: float | None


def save(
    scratch: Path,
    *,
    step: int,
    eval_loss: float | None,
    weights: Mapping[str, Tensor],
    state_tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Checkpoint:
    """Publishes a checkpoint that training can go on from; on any error there is none.

    Raises PreconditionError where the disk is too full for it, before or while it is written.
    """
    final = scratch / f"step-{step:06}"
    staged = scratch / f".{final.name}.{os.getpid()}.tmp"
    needed = sum(tensor.nbytes for tensor in (*weights.values(), *state_tensors.values()))
    scratch.mkdir(parents=True, exist_ok=True)
    disk.check_room(scratch, needed)
    try:
        (staged / "resume").mkdir(parents=True)
        save_file(dict(weights), staged / "weights.safetensors")
        save_file(dict(state_tensors), staged / "resume" / "state.safetensors")
        (staged / "resume" / "state.json").write_text(json.dumps(state), encoding="utf-8")
        _seal(staged / "resume", {"step": step})
        _seal(staged, {"step": step, "eval_loss": eval_loss})
        staged.rename(final)
        disk.sync_folder(scratch)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)  # first, so that what is free is told right
        raise disk.full(error, scratch, needed) or _unwritable(scratch, error) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Checkpoint(final, step, eval_loss)


def published(scratch: Path) -> tuple[list[Checkpoint], list[Path]]:
    """The checkpoints of a training, oldest first, and the folders that are not whole."""
    whole: list[Checkpoint] = []
    damaged: list[Path] = []
    for path in sorted(scratch.glob("step-*"), key=_step_of):
        try:
            manifest = _verified(path)
        except DamagedCheckpoint:
            damaged.append(path)
        else:
            whole.append(Checkpoint(path, manifest["step"], manifest["eval_loss"]))
    return whole, damaged


def clear_staged(scratch: Path) -> None:
    """Removes what a killed process was still writing."""
    for path in scratch.glob(".step-*.tmp"):
        shutil.rmtree(path)


def can_resume(checkpoint: Checkpoint) -> bool:
    """Whether it holds optimizer state, whole or not."""
    return (checkpoint.path / "resume").is_dir()


def weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    _verified(checkpoint.path)
    return load_file(checkpoint.path / "weights.safetensors")


def state_of(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer and random state as tensors, and the rest."""
    folder = checkpoint.path / "resume"
    _verified(folder)
    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return load_file(folder / "state.safetensors"), state


def latest(
    scratch: Path, training: str, emit: Emit
) -> tuple[list[Checkpoint], tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None]:
    """The checkpoints up to the newest that can be gone on from, and what is in that one.

    That is its weights, its state as tensors, and the rest of its state, whose `training` has to
    be the one that is asked for. Damaged checkpoints are removed, with a warning.
    """
    clear_staged(scratch)
    whole, damaged = published(scratch)
    for path in damaged:
        _give_up(path, emit)
    while whole:
        newest = whole[-1]
        if can_resume(newest):
            try:
                tensors, state = state_of(newest)
                if state["training"] != training:
                    raise RunnerError(
                        f"{scratch} holds checkpoints of a training with other settings or data",
                        hint="restore them, or delete the folder to start anew",
                    )
                return whole, (weights_of(newest), tensors, state)
            except DamagedCheckpoint:
                _give_up(newest.path, emit)
        else:
            remove(newest.path)
        whole.pop()
    return [], None


class Unwritable(PreconditionError):
    """The disk does not take it for another reason than that it is full."""


def _unwritable(folder: Path, error: Exception) -> Unwritable:
    return Unwritable(
        f"a checkpoint cannot be written to {folder}: {error}",
        hint="mend that and run the same command again; the checkpoints before this one are kept",
    )


def in_the_room_there_is(
    write: Callable[[], Result], saved: list[Checkpoint], emit: Emit
) -> tuple[Result, list[Checkpoint]]:
    """What `write` gives, and the checkpoints that are still there.

    Where the disk is too full, all checkpoints go that may, and `write` gets a second chance. Where
    that is no help either, it raises InterruptedRun if there is a checkpoint to go on from, else
    PreconditionError; both say how much is needed.
    """
    try:
        return write(), saved
    except Unwritable:
        raise
    except PreconditionError as error:
        before = _bytes_of(saved)
        saved = thinned(saved)
        freed = before - _bytes_of(saved)
        if not freed:
            raise _stopped(error, saved, emit) from error
    kept = " and ".join(one.path.name for one in saved)
    text = f"the disk is full: {freed / 1e6:,.1f} MB of old checkpoints went; kept: {kept}"
    emit({"event": "warning", "text": text})
    try:
        return write(), saved
    except PreconditionError as error:
        raise _stopped(error, saved, emit) from error


def best(checkpoints: list[Checkpoint]) -> Checkpoint:
    """The one with the lowest eval loss, the earliest of equals; the last where none has one."""
    measured = [one for one in checkpoints if one.eval_loss is not None]
    return min(measured, key=_by_loss) if measured else checkpoints[-1]


def prune(checkpoints: list[Checkpoint], *, keep_best: int, resumable: int) -> list[Checkpoint]:
    """Deletes all but the `keep_best` and the `resumable` newest; only those keep their state."""
    measured = sorted((one for one in checkpoints if one.eval_loss is not None), key=_by_loss)
    newest = checkpoints[-resumable:]
    kept = [one for one in checkpoints if one in newest or one in measured[:keep_best]]
    for one in checkpoints:
        if one not in kept:
            remove(one.path)
        elif one not in newest and can_resume(one):
            remove(one.path / "resume")
    return kept


def thinned(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Deletes all that a training can do without: it keeps the best one, and the newest whole."""
    return prune(checkpoints, keep_best=1, resumable=1) if checkpoints else []


def remove(path: Path) -> None:
    """Deletes a folder so that a crash in between leaves no half of it to be taken for whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if path.parent.name.startswith("step-"):
        beside = path.parent.parent / f".{path.parent.name}.{path.name}.tmp"
    path.rename(beside)
    shutil.rmtree(beside)


def _give_up(path: Path, emit: Emit) -> None:
    text = f"the checkpoint {path.name} is damaged; training goes on from the one before"
    emit({"event": "warning", "text": text})
    remove(path)


def _stopped(error: PreconditionError, saved: Sequence[Checkpoint], emit: Emit) -> RunnerError:
    """A pause where there is a checkpoint to go on from."""
    hint = "free some space and run the same command again; the training goes on"
    if not saved:
        return PreconditionError(error.message, hint=f"{hint} from the start")
    emit({"event": "warning", "text": f"the training pauses, its state is saved: {error.message}"})
    return InterruptedRun(error.message, hint=f"{hint} after step {saved[-1].step}")


def _bytes_of(saved: Sequence[Checkpoint]) -> int:
    return sum(disk.size(one.path) for one in saved)


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of the folder's files, durable before it and after it."""
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    for path in files.values():
        disk.sync_file(path)
    manifest = {**facts, "files": {name: _sha256(path) for name, path in files.items()}}
    manifest["seal"] = _seal_of(manifest)
    target = folder / "manifest.json"
    target.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    disk.sync_file(target)
    disk.sync_folder(folder)


def _verified(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, if every file is what it says."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        if manifest.pop("seal") != _seal_of(manifest):
            raise DamagedCheckpoint(f"{folder}: its manifest was changed")
        for name, sha256 in manifest["files"].items():
            if _sha256(folder / name) != sha256:
                raise DamagedCheckpoint(f"{folder}: {name} is not what was saved")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder} is not whole: {error}") from error
    return manifest


def _seal_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_loss(checkpoint: Checkpoint) -> tuple[float, int]:
    assert checkpoint.eval_loss is not None
    return checkpoint.eval_loss, checkpoint.step


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1
