"""The windows as data sets for other tools: each one written out, as a conversation of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runner import disk
from runner.chat import jsonl
from runner.chat.shapes import LOSSES, Loss, Shape, shaped
from runner.engine.opened import Opened
from runner.engine.recipe import Step
from runner.errors import PreconditionError, RecipeError, RunnerError
from runner.ui import artifacts

FILES = ("train_dataset.jsonl", "eval_dataset.jsonl")

Lost = Counter[Loss]


def rows(opened: Opened, step: Step, shape: Shape, lost: Lost) -> Iterator[dict[str, Any]]:
    """The windows of a window stage, each as a record of the shape; `lost` grows on the way."""
    if step.kind != "window":
        raise RecipeError(
            f"{step.name} has no windows to show as {shape}",
            hint="--as is for a stage window; `runner export-data` writes what split made",
        )
    return _records((window for _, window in _windows(opened, step)), shape, lost)


def write(opened: Opened, shape: Shape, folder: Path, lost: Lost) -> dict[Path, int]:
    """Writes what the last split made, train and eval; how many records are in each file.

    Both files are complete before the first of them takes its name.
    """
    steps = [step for step in opened.compiled.steps if step.kind == "split"]
    if not steps:
        raise PreconditionError(
            f"{opened.path} has no stage split", hint="add `- stage: split` to it"
        )
    artifacts.current(opened, steps[-1])  # or its error, before there is a folder
    paths = [folder / name for name in FILES]
    folder.mkdir(parents=True, exist_ok=True)
    with disk.being_written(paths[0]) as first, disk.being_written(paths[1]) as second:
        counts = [
            jsonl.write(beside, _records(_side(opened, steps[-1], side), shape, lost))
            for beside, side in ((first, "train"), (second, "eval"))
        ]
    return dict(zip(paths, counts, strict=True))


def words(lost: Mapping[Loss, int]) -> Iterator[str]:
    """What the shape could not say, a sentence each."""
    for loss, count in lost.items():
        yield f"{count} window{'' if count == 1 else 's'}: {LOSSES[loss]}"


def windows(
    chains: Iterable[Mapping[str, Any]],
    conversations: Iterable[Mapping[str, Any]],
    *,
    every_reply: bool,
) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """(chain, window) for each window that the chains were made of; both inputs in one order."""
    from runner.stages.window import parted, stretch

    records = iter(conversations)
    record: Mapping[str, Any] | None = None
    for chain in chains:
        while record is None or record["id"] != chain["conversation"]:
            record = next(records, None)
            if record is None:
                raise RunnerError(
                    f"there are windows of a conversation {chain['conversation']!r} that is not "
                    "among those they were made from",
                    hint="the store is damaged: delete artifacts/store and apply again",
                )
        for last, learned in parted(chain, every_reply):
            yield chain, stretch(record, chain["first"], last, learned)


def _side(opened: Opened, step: Step, side: str) -> Iterator[dict[str, Any]]:
    return (window for chain, window in _windows(opened, step) if chain["split"] == side)


def _windows(opened: Opened, step: Step) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """The windows of a stage window or split, from the very conversations that it was made of."""
    from runner.stages.window import Window

    artifact = artifacts.current(opened, step)
    made = artifacts.fact_of(opened, step.name, artifact.name)
    if step.kind == "split":
        made = artifacts.fact_of(opened, step.inputs["chains"], made.parts["inputs"]["chains"])
    conversations = artifacts.kept(opened, step.name, made.parts["inputs"]["conversations"])
    loss = made.parts.get("settings", {}).get("loss", Window.model_fields["loss"].default)
    return windows(
        jsonl.read(artifact / "chains.jsonl"),
        jsonl.read(conversations / "conversations.jsonl"),
        every_reply=loss == "every_reply",
    )


def _records(
    found: Iterable[Mapping[str, Any]], shape: Shape, lost: Lost
) -> Iterator[dict[str, Any]]:
    for window in found:
        made = shaped(window, shape)
        lost.update(made.lost)
        if made.record is not None:
            yield made.record
