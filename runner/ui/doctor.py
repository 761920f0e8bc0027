"""What this machine has, what it lacks and what to do about it; and whether a recipe fits on it.

Asks the system and not torch, which takes seconds and may not be installed. Only whether CUDA and
bitsandbytes work is asked of themselves, in a child process, where they are installed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runner.engine import opened, words
from runner.engine.opened import Opened
from runner.errors import PreconditionError, RecipeError, RunnerError
from runner.model import families, memory, source
from runner.model.memory import Advice, Device, Estimate, Model, Precision, Training

if TYPE_CHECKING:
    from runner.stages.train import Train

State = Literal["ok", "note", "lack"]

_EXTRAS = ("data", "train", "export", "chat")
_ASK_TORCH = """\
import json
import torch
found = {"cuda": torch.cuda.is_available(), "version": torch.version.cuda, "four_bit": ""}
if found["cuda"]:
    found["memory"] = torch.cuda.get_device_properties(0).total_memory
    found["name"] = torch.cuda.get_device_name(0)
try:
    from bitsandbytes import functional
    device = "cuda" if found["cuda"] else "cpu"
    functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
except Exception as error:
    found["four_bit"] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(found))
"""
_CHILD_S = 120
_WATCHES_ENOUGH = 65_536
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Gpu:
    """A card, as its driver names it; `capability` is its generation, 8.9 say."""

    name: str
    memory: int | None
    free: int | None = None
    capability: float | None = None


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `lack` when a run needs it and it is not there."""

    name: str
    state: State
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Machine:
    """What memory there is to train in, and on what."""

    gpus: tuple[Gpu, ...]
    ram: int | None
    ram_free: int | None

    @property
    def device(self) -> Device:
        if self.gpus:
            return "cuda"
        apple = sys.platform == "darwin" and platform.machine() == "arm64"
        return "mps" if apple else "cpu"

    @property
    def memory(self) -> int | None:
        """Of the device that a training takes: the first GPU, else the computer's."""
        return self.gpus[0].memory if self.gpus else self.ram


@dataclass(frozen=True)
class Fit:
    """A train stage and the memory it needs; without `advice` where the model is not known."""

    stage: str
    training: Training
    available: int | None
    advice: Advice | None = None
    problem: str = ""

    @property
    def fits(self) -> bool | None:
        if self.advice is None or self.available is None:
            return None
        return self.advice.micro_batch > 0


def shown(
    recipe: Path | None,
    *,
    workspace: Path | None,
    overrides: Sequence[str],
    asked_memory: str | None,
    as_json: bool,
) -> int:
    """Prints what is found; the exit code, 3 where something does not fit or is missing.

    With `asked_memory`, a size like 8GB, the question is of another machine, and nothing but the
    training's memory is looked at.
    """
    room = size_of(asked_memory) if asked_memory is not None else None
    if room is not None and recipe is None:
        raise RecipeError("--memory is asked of a recipe", hint="runner doctor RECIPE --memory 8GB")
    found = machine()
    fitted: tuple[Fit, ...] = ()
    missing: tuple[Check, ...] = ()
    disks: list[dict[str, Any]] = []
    if recipe is not None:
        with opened.at(recipe, workspace, overrides) as current:
            fitted, missing = fits(current, found, room), base_model(current)
            if room is None:
                missing, disks = (*needed_packages(current), *missing), rooms(current)
    checked = (*checks(found), *missing) if room is None else missing
    if as_json:
        print(json.dumps(record(found, checked, fitted, disks), ensure_ascii=False))
    else:
        print(text(checked, fitted, disks))
    return exit_code(checked, fitted, disks)


def machine() -> Machine:
    """What the system says, in a moment."""
    ram, free = memory.computers()
    return Machine(_gpus(), ram, free)


def checks(found: Machine) -> tuple[Check, ...]:
    """Everything about the machine, each with what to do where it lacks something."""
    asked = _asked_torch() if _version("torch") else None
    return (
        _python(),
        *_packages(),
        _gpu(found, asked),
        *_libraries(found, asked),
        _memory(found),
        _disk(Path.cwd()),
        *_watching(),
    )


def fits(current: Opened, found: Machine, asked_memory: int | None) -> tuple[Fit, ...]:
    """Each train stage of a recipe, on this machine or in `asked_memory` bytes of a GPU."""
    from runner.stages import parsed

    made = []
    for step in current.compiled.steps:
        if step.kind != "train":
            continue
        stage: Any = parsed(step.entry)
        tokens = current.compiled.step(step.inputs["tokens"])
        reading: Any = parsed(tokens.entry)
        device: Device = "cuda" if asked_memory is not None else found.device
        training = training_of(
            stage, reading.max_tokens, device, precision_of(stage.precision, device, found)
        )
        available = asked_memory if asked_memory is not None else found.memory
        try:
            model = _model(current)
        except RunnerError as error:
            problem = f"{error.message}; {error.hint}" if error.hint else error.message
            if base_model(current):
                problem = "the base model is not there"
            made.append(Fit(step.name, training, available, problem=problem))
            continue
        made.append(_fit(step.name, model, stage, training, available))
    return tuple(made)


def lines(current: Opened, stages: Collection[str]) -> Iterator[str]:
    """What each of these train stages needs of memory, and what is done otherwise for its base
    model, a line each; nothing is fetched for it."""
    from runner.stages import parsed

    spec, root = current.compiled.base_model, current.workspace.root
    if not stages or spec is None or source.on_hub(spec, root):
        return
    for fit in fits(current, machine(), None):
        if fit.stage in stages and fit.advice is not None:
            training = replace(fit.training, micro_batch=max(1, fit.advice.micro_batch))
            yield f"{fit.stage}: {memory.line(fit.advice.estimate, training, fit.available)}"
    for step in current.compiled.steps:
        if step.name in stages:
            stage: Any = parsed(step.entry)
            base = source.path_of(spec, root)
            for text in families.choices(base, stage.method, stage.float32_modules):
                yield f"{step.name}: {text}"


def training_of(stage: Train, max_tokens: int, device: Device, precision: Precision) -> Training:
    """What of a train stage's settings decides the memory."""
    rows = stage.micro_batch_size
    return Training(
        method=stage.method,
        max_tokens=max_tokens,
        micro_batch=rows if isinstance(rows, int) else 1,
        rank=stage.lora.rank,
        target_modules=stage.lora.target_modules,
        modules_to_save=stage.lora.modules_to_save,
        dropout=stage.lora.dropout,
        optimizer=stage.optimizer,
        precision=precision,
        recompute=stage.gradient_checkpointing == "on",
        device=device,
    )


def precision_of(
    wanted: Literal["auto", "float32", "bfloat16", "float16"], device: Device, found: Machine
) -> Precision:
    """What `precision: auto` will be, as sft.py decides it with torch."""
    if wanted != "auto":
        return wanted
    if device == "cuda":
        capability = found.gpus[0].capability if found.gpus else None
        return "float16" if capability is not None and capability < 8 else "bfloat16"
    if device == "cpu" and "amx_tile" in _read("/proc/cpuinfo"):
        return "bfloat16"
    return "float32"


def size_of(text: str) -> int:
    """Bytes of `8GB`, `10 GB`, `7.5GiB` or a plain number; RecipeError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise RecipeError(f"--memory {words.shown(text)} is no size", hint="write 8GB, say")
    units = _BINARY if found[3] else _UNITS
    return round(float(found[1]) * units[found[2].upper()])


def exit_code(
    checked: Sequence[Check], fitted: Sequence[Fit], rooms: Sequence[Mapping[str, Any]]
) -> int:
    """0 when nothing is wrong, 3 when something does not fit or is missing."""
    wrong = (
        any(check.state == "lack" for check in checked)
        or any(fit.fits is False for fit in fitted)
        or any(not room["is_enough"] for room in rooms)
    )
    return PreconditionError.exit_code if wrong else 0


def needed_packages(current: Opened) -> tuple[Check, ...]:
    """What the recipe's stages import and this Python does not have."""
    found = []
    for step in current.compiled.steps:
        missing = [name for name in step.libraries if _version(name) is None]
        if missing:
            extra = "train" if step.kind in ("tokenize", "train", "evaluate") else "all"
            text = f"{step.name} needs {', '.join(missing)}"
            found.append(Check("packages", "lack", text, f"pip install 'runner[{extra}]'"))
    return tuple(found)


def base_model(current: Opened) -> tuple[Check, ...]:
    """Whether the recipe's base model is here; nothing of one that is, or that is on the hub."""
    spec, root = current.compiled.base_model, current.workspace.root
    wanted = any(step.uses_base_model for step in current.compiled.steps)
    if spec is None or not wanted or source.on_hub(spec, root):
        return ()
    try:
        source.model_files(source.path_of(spec, root))
    except PreconditionError as error:
        return (Check("base model", "lack", error.message, error.hint),)
    return ()


def rooms(current: Opened) -> list[dict[str, Any]]:
    """What a run would write, for each disk; empty where that cannot be known now."""
    from runner.engine.plan import Choice
    from runner.ui import plan

    try:
        shown = plan.shown(current, Choice())
    except (RunnerError, ModuleNotFoundError):
        return []  # a hub model that cannot be reached, or whose client is not installed
    return [
        {
            "place": str(room.place),
            "free": room.free,
            "needed": room.needed,
            "is_enough": room.is_enough,
        }
        for room in shown.rooms
    ]


def record(
    found: Machine,
    checked: Sequence[Check],
    fitted: Sequence[Fit],
    rooms: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """All of it for programs."""
    return {
        "device": found.device,
        "gpus": [asdict(gpu) for gpu in found.gpus],
        "ram": found.ram,
        "checks": [asdict(check) for check in checked],
        "trainings": [_fit_record(fit) for fit in fitted],
        "disks": list(rooms),
    }


def text(
    checked: Sequence[Check], fitted: Sequence[Fit], rooms: Sequence[Mapping[str, Any]]
) -> str:
    """All of it in words, what to do about each lack below it."""
    return "\n".join(map(words.escaped, _lines(checked, fitted, rooms)))


def _lines(
    checked: Sequence[Check], fitted: Sequence[Fit], rooms: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    width = max((len(check.name) for check in checked), default=0)
    for check in checked:
        mark = "!" if check.state == "lack" else " "
        yield f"{mark} {check.name:{width}}  {check.text}"
        if check.advice:
            yield f"  {'':{width}}  → {check.advice}"
    for fit in fitted:
        yield ""
        yield from _fit_lines(fit)
    for room in rooms:
        needed, free = words.size(room["needed"]), words.size(room["free"])
        full = "" if room["is_enough"] else ": too little, and apply will refuse"
        yield f"disk: a run writes about {needed} at {room['place']}; {free} are free{full}"


def _fit_lines(fit: Fit) -> Iterator[str]:
    training = fit.training
    if fit.advice is None:
        yield f"{fit.stage}: what memory it needs is not known: {fit.problem}"
        return
    estimate = fit.advice.estimate
    rows = max(1, fit.advice.micro_batch)
    how = f"{training.method}, {training.precision}, on {_DEVICES[training.device]}"
    again = ", activations computed twice" if fit.training.recompute else ""
    passes = f"{rows} {'row' if rows == 1 else 'rows'} of {training.max_tokens:,} tokens a pass"
    yield f"{fit.stage}: {how}, {passes}{again}"
    for name, count in estimate.parts.items():
        if count:
            yield f"  {name:11} {words.size(count):>9}"
    if estimate.host:
        yield f"  and {words.size(estimate.host)} of optimizer state in the computer's memory"
    spare = f"with {estimate.factor - 1:.0%} for what is lost between"
    yield f"  {'in all':11} {words.size(estimate.total):>9}  {spare}"
    if fit.available is None:
        yield "  how much memory there is here is not known; say --memory 8GB, for example"
    elif fit.fits:
        yield f"  fits in {words.size(fit.available)}"
    else:
        yield f"  does not fit in {words.size(fit.available)}; what helps, each on top of the last:"
        for saving in fit.advice.cheaper:
            end = ", and then it fits" if saving.fits else ""
            yield f"    {saving.setting}: {saving.value} saves {words.size(saving.saves)}{end}"
        if fit.advice.parameters is not None:
            millions = fit.advice.parameters / 1e6
            yield f"    a smaller base model: of about {millions:,.0f} million weights at most"


def _fit_record(fit: Fit) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "stage": fit.stage,
        "available": fit.available,
        "fits": fit.fits,
        "training": asdict(fit.training),
    }
    if fit.advice is None:
        return {**shared, "problem": fit.problem}
    estimate: Estimate = fit.advice.estimate
    return {
        **shared,
        "micro_batch": fit.advice.micro_batch,
        "bytes": {**estimate.parts, "host": estimate.host, "total": estimate.total},
        "cheaper": [
            {"setting": one.setting, "value": one.value, "saves": one.saves, "fits": one.fits}
            for one in fit.advice.cheaper
        ],
        "parameters": fit.advice.parameters,
    }


_DEVICES: Mapping[Device, str] = {"cuda": "a GPU", "mps": "Apple's GPU", "cpu": "the processor"}


def _fit(name: str, model: Model, stage: Train, training: Training, available: int | None) -> Fit:
    """With the micro-batch that the recipe says, or the largest; recomputing only if need be."""
    room = available if available is not None else sys.maxsize
    most = stage.micro_batch_size if stage.micro_batch_size != "auto" else None
    found = memory.advice(model, training, room, most=most)
    if not found.micro_batch and stage.gradient_checkpointing == "auto":
        again = replace(training, recompute=True)
        twice = memory.advice(model, again, room, most=most)
        if twice.micro_batch:
            return Fit(name, again, available, twice)
    return Fit(name, training, available, found)


def _model(current: Opened) -> Model:
    """The recipe's base model by its files, or by the config alone where it is on the hub."""
    spec, root = current.compiled.base_model, current.workspace.root
    if spec is None:
        raise RecipeError("the recipe names no base_model", hint="add `base_model: …`")
    if source.on_hub(spec, root):
        folder = _config_from_hub(spec, current)
    else:
        folder = source.path_of(spec, root)
    found = memory.read(folder)
    if found is None or not found.parameters:
        raise PreconditionError(f"the base model {spec} cannot be read, or its kind is not known")
    return found


def _config_from_hub(spec: str, current: Opened) -> Path:
    """The folder with what there is of a hub model: its config.json, a few kB, at the least."""
    from runner.engine import lock

    commit = lock.read(current.lock_path).commit_of(spec)
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError:
        hint = "pip install 'runner[train]'"
        raise PreconditionError(
            f"{spec} is on the hub, and its client is not here", hint=hint
        ) from None
    try:
        return Path(hf_hub_download(spec, "config.json", revision=commit)).parent
    except Exception as error:  # of its network library too, whichever that is
        first = str(error).strip().split("\n")[0]
        hint = "download it first, or check the name and the network"
        raise PreconditionError(f"{spec} cannot be had from the hub: {first}", hint=hint) from error


def _python() -> Check:
    version = platform.python_version()
    where = f"{platform.system()} {platform.machine()}, {os.cpu_count() or '?'} cores"
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs it from a checkout may have any)
        return Check("Python", "lack", version, "install Python 3.11 or newer")
    return Check("Python", "ok", f"{version}, {where}")


def _packages() -> Iterator[Check]:
    """The extras and what is installed of each."""
    for extra in ("", *_EXTRAS):
        wanted = _required(extra)
        if not wanted:
            continue
        versions = {name: _version(name) for name in wanted}
        missing = [name for name, version in versions.items() if version is None]
        old = [
            f"{name} {versions[name]} (needs {wanted[name]})"
            for name in versions
            if versions[name] and not _is_enough(str(versions[name]), wanted[name])
        ]
        there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        title = f"extra {extra}" if extra else "packages"
        advice = f"pip install 'runner[{extra}]'" if extra else "pip install runner"
        state: State = "note" if extra else "lack"
        if missing or old:
            parts = [f"missing: {', '.join(missing)}" if missing else "", *old, there]
            yield Check(title, state, "; ".join(part for part in parts if part), advice)
        else:
            yield Check(title, "ok", there)


def _required(extra: str) -> dict[str, str]:
    """Package → versions that an extra of this project needs, from its own metadata."""
    from importlib import metadata

    try:
        lines = metadata.requires("runner") or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in lines:
        needs, _, marker = line.partition(";")
        named = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if (named[1] if named else "") != extra:
            continue
        package = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^)]*)", needs)
        if package and package[1] != "runner":
            found[package[1]] = package[2].strip()
    return found


def _is_enough(version: str, wanted: str) -> bool:
    """Whether a version is what `>=1.2` or `==1.2` asks; unknown signs pass."""
    for sign, number in re.findall(r"(>=|==)\s*([\d.]+)", wanted):
        have, need = (_numbers(one.partition("+")[0]) for one in (version, number))
        if sign == ">=" and have < need:
            return False
        if sign == "==" and have[: len(need)] != need:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _gpu(found: Machine, asked: Mapping[str, Any] | None) -> Check:
    if found.gpus:
        shown = [
            f"{gpu.name}, {words.size(gpu.memory)}" if gpu.memory else gpu.name
            for gpu in found.gpus
        ]
        text = "; ".join(shown)
        if asked is not None and not asked.get("cuda"):
            advice = (
                "install torch for CUDA: pip install torch --index-url "
                "https://download.pytorch.org/whl/cu128"
                if asked.get("version") is None
                else "update the GPU's driver"
            )
            return Check("GPU", "note", f"{text}, which torch cannot use", advice)
        return Check("GPU", "ok", text)
    if found.device == "mps":
        return Check("GPU", "ok", "Apple's, which shares the computer's memory")
    text = "none that is seen here, so everything runs on the processor"
    advice = "models of up to some hundred million weights train well; larger ones take days"
    return Check("GPU", "note", text, advice)


def _libraries(found: Machine, asked: Mapping[str, Any] | None) -> Iterator[Check]:
    """Whether torch and bitsandbytes work, as they say themselves."""
    if asked is None:
        return
    if "error" in asked:
        yield Check("torch", "note", f"does not start: {asked['error']}", "install it again")
        return
    build = f"for CUDA {asked['version']}" if asked["version"] else "for the processor"
    yield Check("torch", "ok", f"works, built {build}")
    if asked["four_bit"]:
        text = f"4 bits do not work: {asked['four_bit']}"
        yield Check("bitsandbytes", "note", text, "pip install -U bitsandbytes; or no qlora")
    else:
        where = "on the GPU" if asked["cuda"] else "on the processor"
        yield Check("bitsandbytes", "ok", f"works in 4 bits {where}")


def _memory(found: Machine) -> Check:
    if found.ram is None:
        return Check("memory", "note", "how much there is is not known")
    free = f", {words.size(found.ram_free)} of it free" if found.ram_free is not None else ""
    return Check("memory", "ok", f"{words.size(found.ram)}{free}")


def _disk(place: Path) -> Check:
    free = shutil.disk_usage(place).free
    text = f"{words.size(free)} free at {place}"
    if free < 10 * 10**9:
        advice = "`runner gc` shows what may go; a model of 4 billion weights takes 8 GB, and more"
        return Check("disk", "note", text, advice)
    return Check("disk", "ok", text)


def _watching() -> Iterator[Check]:
    """How many folders may be watched, on Linux."""
    read = _read("/proc/sys/fs/inotify/max_user_watches").strip()
    if not read.isdecimal():
        return
    queue = _read("/proc/sys/fs/inotify/max_queued_events").strip()
    text = f"{int(read):,} folders, {queue} events at one time"
    if int(read) < _WATCHES_ENOUGH:
        advice = f"sudo sysctl fs.inotify.max_user_watches={_WATCHES_ENOUGH}"
        yield Check("watching", "note", text, advice)
    else:
        yield Check("watching", "ok", text)


def _gpus() -> tuple[Gpu, ...]:
    """NVIDIA's cards by their driver's tool, or by name alone where only the driver is there."""
    fields = "name,memory.total,memory.free,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return _gpus_of_driver()
    return tuple(gpu for line in done.stdout.splitlines() if (gpu := _gpu_of(line)))


def _gpu_of(line: str) -> Gpu | None:
    """`NVIDIA GeForce RTX 4090, 24564, 23028, 8.9`; sizes in MiB."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 4:
        return None
    total, free = (int(part) * 2**20 if part.isdecimal() else None for part in parts[1:3])
    capability = float(parts[3]) if re.fullmatch(r"\d+\.\d+", parts[3]) else None
    return Gpu(parts[0], total, free, capability)


def _gpus_of_driver() -> tuple[Gpu, ...]:
    from runner.engine import environment

    name = environment.gpu()
    if name in ("none", "Apple"):
        return ()
    asked = _asked_torch() if _version("torch") else None
    return (Gpu(name, asked.get("memory") if asked else None),)


def _asked_torch() -> dict[str, Any]:
    """What torch and bitsandbytes say of themselves, in a child that may fail."""
    command = [sys.executable, "-W", "ignore", "-c", _ASK_TORCH]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_S)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error), "cuda": False, "version": None}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        return {"error": last, "cuda": False, "version": None}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
