"""One more form of a model, outside of an apply: of a recipe's, or of a folder from elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from runner import disk
from runner.engine import execute, lock, opened, plan, store
from runner.engine.events import Event
from runner.engine.opened import Opened
from runner.engine.recipe import CURRENT
from runner.engine.words import did_you_mean, shown
from runner.errors import PreconditionError, RecipeError, RunnerError
from runner.model import source, weights
from runner.model.gguf_types import WITH_IMPORTANCE, Level
from runner.stages.export import ADAPTER_CONFIG, PARITY

Listener = Callable[[Event], None]


def check_levels(levels: Sequence[str]) -> None:
    """Raises RecipeError for a level that there is none of."""
    known = get_args(Level)
    for level in levels:
        if level not in known:
            raise RecipeError(
                f"--gguf {shown(level)}: there is no such level{did_you_mean(level, known)}",
                hint=f"levels are {', '.join(known)}",
            )


class Exported(NamedTuple):
    """A file, and how near it is to the model as it was trained."""

    path: Path
    parity: Mapping[str, Any]


def of_recipe(
    path: Path, root: Path | None, levels: Sequence[str], to: Path, listen: Listener
) -> list[Exported]:
    """GGUF files of what the recipe trained last, written into `to`.

    They are known afterwards like any output, but the recipe, its lockfile and its links stay as
    they are. Raises where that model is not the one that was accepted.
    """
    with opened.at(path, root) as current:
        stage = _stage(current)
        _refuse_kept_aside(current)
    overrides = [f"{stage}.gguf=[{', '.join(levels)}]"]
    only = tuple(f"{stage}/{level}" for level in levels)
    with opened.at(path, root, overrides) as current:
        choice = plan.Choice(only=only)
        aside = current._replace(aside=True)
        execute.apply(aside, listen, choice=choice)
        made = {one.step.name: one.output for one in aside.plan(choice)}
        written = []
        for name in only:
            folder = store.path_of(current.workspace, made[name] or "")
            (file,) = folder.glob("*.gguf")
            parity = json.loads((folder / PARITY).read_bytes())
            written.append(Exported(_copied(file, to / file.name), parity))
        return written


def of_folder(
    model: Path, base: str | None, levels: Sequence[str], to: Path, listen: Listener
) -> list[Exported]:
    """GGUF files of a model or an adapter that was trained elsewhere, written into `to`.

    `model` is a folder of safetensors, an adapter's folder, or a `.gguf` file; `base` names the
    model that an adapter was trained on, as a recipe's `base_model` does. Each file is measured
    against the model before it gets its name.
    """
    _refuse_no_model(model, base)
    from runner.model import quickly

    with quickly.importing():
        from runner.model import adapter, card, export, gguf, imatrix, importance, load, parity
        from runner.model import reference as asked

    disk.make_folder(to)
    name = model.resolve().stem if model.is_file() else model.resolve().name

    def tell(event: Event) -> None:
        listen({"stage": name, **event})

    with tempfile.TemporaryDirectory(dir=to, prefix=".export-") as made:
        work = Path(made)
        whole = load.base_folder(model, work) if not adapter.is_adapter(model) else None
        under = whole or load.base_folder(_base(model, base), work)
        if sizes := weights.read(under):
            merged = sizes.folder_bytes(2) if whole is None else 0
            files = sum(sizes.gguf_bytes(cast("Level", level)) for level in ("bf16", *levels))
            disk.check_room(to, merged + files)
        export.say_what_was_lost(_base(model, base) if whole is None else model, tell)
        reference = work / "reference"
        asked.write_reference(
            base=under, model=whole or model, tokens=None, output=reference, emit=tell
        )
        if whole is None:
            whole = work / "merged"
            adapter.merge(under, model, whole, dtype="bfloat16")
            parity.require(asked.check_folder(whole, reference, emit=tell), "merged")
        unquantised = work / "unquantised.gguf"
        about = gguf.About(licence=card.licence(model if base is None else under))
        export.unquantised(whole, unquantised, name=name, about=about)
        measured = work / "importance.safetensors"
        if WITH_IMPORTANCE & {*levels}:
            imatrix.collect(
                model=whole, unquantised=unquantised, tokens=None, output=measured, emit=tell
            )
        written = []
        for level in levels:
            file = work / f"{name}-{level}.gguf"
            matrix = importance.read(measured) if level in WITH_IMPORTANCE else None
            gguf.quantize(
                unquantised, file, cast("Level", level), lambda _done, _total: None, matrix
            )
            found = parity.check_gguf(file, reference, level, emit=tell)
            parity.require(found, level)
            target = to / file.name
            file.replace(target)
            disk.sync_folder(to)
            written.append(Exported(target, found.record()))
        return written


def to_ollama(path: Path, root: Path | None, name: str) -> str:
    """Registers the exported model with Ollama; what to say of it."""
    with opened.at(path, root) as current:
        has_release = current.compiled.retrain and lock.read(current.lock_path).release
        place = current.links / CURRENT if has_release else current.links
        folder = place / _stage(current)
        command = ["ollama", "create", name, "-f", str(folder / "Modelfile")]
        if not (folder / "Modelfile").is_file():
            raise PreconditionError(
                f"there is no Modelfile in {folder}",
                hint=f"write `ollama: true` into the export stage, and run `runner apply {path}`",
            )
    if name.startswith("-") or not name:
        raise RecipeError(f"--ollama {shown(name)} is no name", hint="give a name, my-style, say")
    if shutil.which("ollama") is None:
        raise PreconditionError(
            "ollama is not installed here", hint=f"where it is: {' '.join(command)}"
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RunnerError(
            f"ollama create ended with exit code {done.returncode}",
            hint="\n  ".join(["it said last:", *said[-3:]]),
        )
    return f"ollama run {name}"


def _stage(current: Opened) -> str:
    """The name of the last export stage."""
    stages = [step.stage for step in current.compiled.steps if step.kind.startswith("export/")]
    if not stages:
        raise PreconditionError(
            f"{current.path} has no stage export", hint="add `- stage: export` to it"
        )
    trainings = [step.name for step in current.compiled.steps if step.kind == "train"]
    locked = lock.read(current.lock_path)
    if not all(locked.of_stage(name) for name in trainings):
        raise PreconditionError(
            f"{current.path} has trained nothing yet", hint=f"run `runner apply {current.path}`"
        )
    return stages[-1]


def _refuse_kept_aside(current: Opened) -> None:
    """With `retrain:`, what was made last may be what the gate refused."""
    locked = lock.read(current.lock_path)
    if current.compiled.retrain is None or locked.release is None:
        return
    for step in current.compiled.steps:
        fact = locked.of_stage(step.name)
        accepted = locked.release.outputs.get(step.name)
        if step.kind == "train" and fact is not None and accepted not in (None, fact.output):
            place = current.links / CURRENT
            raise RunnerError(
                f"what {current.path} trained last is not the current model, release"
                f" {locked.release.number}",
                hint=f"`runner promote {current.path}` makes it that; or export the current one"
                f" from its folder in {place}",
            )


def _refuse_no_model(model: Path, base: str | None) -> None:
    """Before anything heavy is loaded."""
    if not model.exists():
        raise PreconditionError(f"there is no {model}", hint="check the path")
    is_adapter = (model / ADAPTER_CONFIG).is_file()
    if model.is_dir() and not is_adapter and not (model / "config.json").is_file():
        raise PreconditionError(
            f"{model} holds no model: neither config.json nor {ADAPTER_CONFIG}",
            hint="give the folder of a model or an adapter, a .gguf file, or a recipe",
        )
    if model.is_file() and model.suffix.lower() != ".gguf":
        raise PreconditionError(
            f"{model} is neither a model nor a recipe", hint="give a folder, .gguf or .yaml"
        )
    if is_adapter:
        _base(model, base)
    elif base is not None:
        raise RecipeError(f"{model} is no adapter", hint="leave --base out")


def _base(model: Path, base: str | None) -> Path:
    """The base model of an adapter that was trained elsewhere."""
    if base is None:
        try:
            named = json.loads((model / ADAPTER_CONFIG).read_bytes())["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            named = None
        said = f" ({shown(named)}, it says)" if named else ""
        raise RecipeError(
            f"{model} is an adapter, and nothing says where its base model is{said}",
            hint="add --base with the folder or .gguf file of the model it was trained on",
        )
    if source.on_hub(base, Path()):
        return source.downloaded(base, source.latest_commit(base))
    return source.path_of(base, Path())


def _copied(file: Path, target: Path) -> Path:
    disk.make_folder(target.parent)
    disk.check_room(target.parent, file.stat().st_size)
    with disk.being_written(target) as beside:
        shutil.copyfile(file, beside)
    return target
