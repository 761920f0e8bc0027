"""What an apply would do and why, decided from hashes alone; it writes nothing but its cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from runner import disk
from runner.engine import environment, facts, key, lineage, lock, log, look, store
from runner.engine.elsewhere import Elsewhere
from runner.engine.facts import Made
from runner.engine.recipe import Compiled, Step
from runner.engine.state import State
from runner.engine.workspace import Workspace
from runner.errors import DriftError, PreconditionError, RecipeError, RunnerError
from runner.model import source
from runner.sources import SourceFile

Reason = Literal[
    "never run",
    "settings",
    "sources",
    "input",
    "base model",
    "parent",
    "seed",
    "stage version",
    "environment",
    "output missing",
    "forced",
    "upstream runs",
    "not pinned",
    "left out",
    "blocked",
]


class Cause(NamedTuple):
    """Why a stage is in its state: which part of its key changed, from what to what, in words.

    `what` is the setting, input or file that is meant; `old` and `new` are None where there is no
    value, or none that can be shown.
    """

    reason: Reason
    text: str
    what: str = ""
    old: Any = None
    new: Any = None


class Planned(NamedTuple):
    """What will become of a stage.

    `skip`: its output is known and here, or it is left out. `restore`: known, and fetched from the
    remote cache. `run`. `maybe`: a stage above runs, and this one too unless that gives the same
    output as before. `blocked`: it cannot run, and `problem` says what is missing.

    `output` is known for a stage to skip or restore, and foreseen for one that is only rebuilt.
    `problem` also says where `--locked` forbids what would become of it.
    """

    step: Step
    state: Literal["skip", "restore", "run", "maybe", "blocked"]
    causes: tuple[Cause, ...] = ()
    parts: key.Components | None = None
    output: str | None = None
    sources: tuple[SourceFile, ...] = ()
    problem: RunnerError | None = None
    parent: str | None = None
    """The model that a training goes on from: what it makes may then be that model again."""

    @property
    def is_left_out(self) -> bool:
        return any(cause.reason == "left out" for cause in self.causes)


class Chosen(NamedTuple):
    """The stages that may run, and all that these read."""

    run: frozenset[str]
    read: frozenset[str]


class Choice(NamedTuple):
    """What is asked for beside the recipe.

    `only` these stages run, or those from `start` on, and the others stay as they were made last;
    `force` makes a stage run though its output is known; `locked` allows no other output than the
    lockfile's; `paranoid` reads every file again instead of trusting times and names; `growing`
    says how to look at sources that files are still being put into.
    """

    only: tuple[str, ...] = ()
    start: str | None = None
    force: tuple[str, ...] = ()
    locked: bool = False
    paranoid: bool = False
    growing: look.Growing | None = None

    def stages(self, compiled: Compiled) -> Chosen:
        """The stages that are asked for; raises RecipeError for a name that there is none of."""
        run = names(compiled, self.only) or {step.name for step in compiled.steps}
        if self.start is not None:
            run = names(compiled, (self.start,))
            for step in compiled.steps:
                if run & set(step.inputs.values()):
                    run.add(step.name)
        for step in reversed(compiled.steps):  # parts are made for the parts that read them
            if step.name in run:
                run |= {n for n in step.inputs.values() if compiled.step(n).stage == step.stage}
        for name in self.force:
            if not names(compiled, (name,)) <= run:
                option = "--only" if self.only else "--from"
                raise RecipeError(
                    f"--force {name}: {option} leaves this stage out",
                    hint=f"name it with {option} too, or leave --force out",
                )
        read = {n for step in compiled.steps if step.name in run for n in step.inputs.values()}
        return Chosen(frozenset(run), frozenset(read))


EVERYTHING = Choice()


def names(compiled: Compiled, asked: Iterable[str]) -> set[str]:
    """The steps that are meant by names of steps or of stages."""
    return {step.name for name in asked for step in compiled.named(name)}


class World(NamedTuple):
    """What a plan is made from: the known facts, the files as they are now, and what is asked."""

    workspace: Workspace
    state: State
    lock: lock.Lock
    elsewhere: Elsewhere
    base_model: str | None
    """The identity of the base model's files; None as long as a hub model has no pin."""
    base_problem: PreconditionError | None = None
    choice: Choice = EVERYTHING
    chosen: Chosen | None = None
    """The stages that are asked for; None for all."""
    retrain: Mapping[str, Any] | None = None
    """What the recipe says of training again, where it does."""
    steps: tuple[Step, ...] = ()
    """All of the recipe, to see who reads what is not kept."""


def whole(compiled: Compiled, world: World) -> tuple[Planned, ...]:
    """The plan of a recipe, stage by stage."""
    plan: dict[str, Planned] = {}
    for step in compiled.steps:
        plan[step.name] = decide(step, plan, world)
    gone = [fact.stage for fact in world.lock.facts if fact.stage not in plan]
    if world.choice.locked and gone and plan:
        last = plan[step.name]
        problem = DriftError(
            f"the lockfile names the stage {gone[0]}, which the recipe does not have",
            hint="apply without --locked, and commit the lockfile",
        )
        plan[step.name] = last._replace(problem=last.problem or problem)
    return tuple(plan.values())


def decide(
    step: Step,
    above: Mapping[str, Planned],
    world: World,
    files: tuple[SourceFile, ...] | None = None,
) -> Planned:
    """What will become of one stage, given what becomes of those above it.

    `files` are its source files, where they have just been looked at.
    """
    if world.chosen is not None and step.name not in world.chosen.run:
        return _left_out(step, world)
    problem = _missing(step, above, world)
    manifest = None
    root, memory, paranoid = world.workspace.root, world.state, world.choice.paranoid
    before = world.lock.of_stage(step.name) if world.choice.growing else None
    taken = before.parts.get("sources") if before else None
    try:
        if files is not None:
            manifest = look.remembered(files, memory)
        elif step.sources:
            manifest, files = look.manifest(
                step,
                root,
                memory,
                paranoid=paranoid,
                growing=world.choice.growing,
                before=taken,
            )
    except PreconditionError as error:
        problem = problem or error
    if problem is not None:
        return Planned(step, "blocked", (Cause("blocked", problem.message),), problem=problem)
    found = _with_parent(_decided(step, above, world, manifest), world)
    if found.state not in ("skip", "restore") and step.sources:
        if files is None:
            # The list is only needed now; what changed since the look at it counts.
            growing = world.choice.growing
            files = look.files(step, root, memory, paranoid=paranoid, growing=growing, before=taken)
            return decide(step, above, world, files)
        found = found._replace(sources=files)
    return found._replace(problem=_forbidden(found, world)) if world.choice.locked else found


def _decided(
    step: Step, above: Mapping[str, Planned], world: World, manifest: str | None
) -> Planned:
    before = world.lock.of_stage(step.name)
    inputs = {kind: above[name].output for kind, name in step.inputs.items()}
    parts = key.components(
        kind=step.kind,
        version=step.version,
        settings=step.settings,
        inputs={kind: output for kind, output in inputs.items() if output is not None},
        sources=manifest,
        base_model=world.base_model if step.uses_base_model else None,
        seed=step.seed,
        env=environment.digest(environment.of(step)) if step.rerun_on_env else None,
    )
    continued, note = lineage.parent(step, parts, world.lock, world.retrain)
    parts |= continued
    changed = why(step, parts, before, world, note)

    unpinned = step.uses_base_model and world.base_model is None
    unknown = {kind: name for kind, name in step.inputs.items() if above[name].output is None}
    if unpinned or unknown:
        causes = list(changed)
        if unpinned:
            text = "the hub decides which commit the base model is"
            causes.append(Cause("not pinned", text, "base_model"))
        if step.name in world.choice.force:
            causes.append(Cause("forced", "--force"))
        names = dict.fromkeys(unknown.values())
        causes += [Cause("upstream runs", f"{name} runs first", name) for name in names]
        # What is only rebuilt may come out as it was; a new training gives a new model.
        certain = any(cause.reason in ("forced", "not pinned") for cause in causes) or any(
            above[name].state == "run"
            and not above[name].step.rebuilds
            and above[name].parent is None
            for name in names
        )
        # With nothing new to learn, the model that is gone on from comes out again.
        goes_on = any(above[name].parent for name in names)
        stays = not certain and (
            goes_on or _is_known_with_inputs_as_before(step, parts, unknown, world)
        )
        parent = parts.get("parent")
        return Planned(step, "maybe" if stays else "run", tuple(causes), parent=parent)

    stage_key = key.of(parts)
    outputs = known_outputs(stage_key, world)
    log.debug("%s: key %s, known outputs %s", step.name, stage_key, outputs)
    if step.name in world.choice.force:
        foreseen = outputs[0] if outputs and step.rebuilds else None
        return Planned(step, "run", (*changed, Cause("forced", "--force")), parts, foreseen)
    for output in outputs:
        if _is_here(stage_key, output, world):
            return Planned(step, "skip", (), parts, output)
    if outputs and step.transient:
        return _made_when_read(Planned(step, "skip", (), parts, outputs[0]), above, world)
    for output in outputs:
        if world.elsewhere.holds(output):
            return _fetched(step, parts, output, world)
    for made in world.elsewhere.of_key(stage_key):
        if made.output not in outputs and world.elsewhere.holds(made.output):
            return _fetched(step, parts, made.output, world)
    if outputs:
        return _made_again(step, parts, outputs[0], world)
    text = "what it made last is not known any more"
    return Planned(step, "run", changed or (Cause("never run", text),), parts)


def _with_parent(found: Planned, world: World) -> Planned:
    """A training that runs, with the model that it goes on from, if that can be had."""
    parent = found.parent or (found.parts or {}).get("parent")
    if found.state != "run" or parent is None:
        return found._replace(parent=None)
    if store.holds(world.workspace, parent) or world.elsewhere.holds(parent):
        return found._replace(parent=parent)
    problem = PreconditionError(
        f"{found.step.name} continues from the model {parent[:12]}, which is not in the store",
        hint="put it back from a copy, go back to another release with `runner rollback`, or"
        " train anew with `mode: anew` in retrain",
    )
    return Planned(found.step, "blocked", (Cause("blocked", problem.message),), problem=problem)


def _made_when_read(known: Planned, above: Mapping[str, Planned], world: World) -> Planned:
    """What becomes of a step whose output is not kept: it runs when one that runs reads it."""
    own = known.step.name
    plan = {**above, own: known}
    position = [step.name for step in world.steps].index(own)
    for step in world.steps[position + 1 :]:
        if not plan.keys() >= set(step.inputs.values()):
            continue  # of another stage, and nothing of this one's
        plan[step.name] = decide(step, plan, world)
        if own in step.inputs.values() and plan[step.name].state in ("run", "maybe"):
            text = f"it is not kept, and {step.name} is made from it"
            cause = Cause("output missing", text, "", known.output)
            return known._replace(state="run", causes=(cause,))
    return known


def _is_known_with_inputs_as_before(
    step: Step, parts: key.Components, unknown: Mapping[str, str], world: World
) -> bool:
    """Whether the stage would be known if what runs above it gave what it read last."""
    before = world.lock.of_stage(step.name)
    read = before.parts.get("inputs", {}) if before else {}
    if not unknown.keys() <= read.keys():
        return False
    inputs = {**parts.get("inputs", {}), **{kind: read[kind] for kind in unknown}}
    stage_key = key.of({**parts, "inputs": inputs})
    return any(
        step.transient or _is_here(stage_key, output, world) or world.elsewhere.holds(output)
        for output in known_outputs(stage_key, world)
    )


def known_outputs(stage_key: str, world: World) -> list[str]:
    """All outputs that are known for a key; the lockfile's first, because others share it."""
    locked = [fact.output for fact in world.lock.facts if fact.key == stage_key]
    made = [made.output for made in facts.of_key(world.workspace, stage_key)]
    return list(dict.fromkeys([*locked, *made]))


def why(
    step: Step, now: key.Components, before: lock.Fact | None, world: World, note: str = ""
) -> tuple[Cause, ...]:
    """Every difference between what was run last and what would run now.

    `note` says what the training goes on from, or why from no model.
    """
    if before is None:
        return (Cause("never run", "it has not run yet"),)
    then = before.parts
    causes: list[Cause] = []
    if then["kind"] != now["kind"]:
        text = f"stage {then['kind']} → {now['kind']}"
        causes.append(Cause("settings", text, "stage", then["kind"], now["kind"]))
    elif then["version"] != now["version"]:
        text = "this version of the runner does it differently"
        causes.append(Cause("stage version", text, "version", then["version"], now["version"]))
    old, new = then.get("settings", {}), now.get("settings", {})
    for name in sorted(old.keys() | new.keys()):
        was, now_is = (_setting(settings, name) for settings in (old, new))
        if was != now_is:
            text = f"{name} {was} → {now_is}"
            causes.append(Cause("settings", text, name, old.get(name), new.get(name)))
    if then.get("sources") != now.get("sources"):
        causes.append(_sources_cause(then.get("sources"), now.get("sources"), world))
    for kind, output in now.get("inputs", {}).items():
        read = then.get("inputs", {}).get(kind)
        if read != output:
            text = f"{step.inputs[kind]} gave another output"
            causes.append(Cause("input", text, step.inputs[kind], read, output))
    for kind, read in then.get("inputs", {}).items():
        if kind not in step.inputs:
            causes.append(Cause("input", f"it does not read {kind} any more", kind, read, None))
    if then.get("base_model") != now.get("base_model") and now.get("base_model"):
        text, models = "the base model is another one", (then.get("base_model"), now["base_model"])
        causes.append(Cause("base model", text, "base_model", *models))
    if then.get("parent") != now.get("parent"):
        usual = "it continues from another model" if "parent" in now else "it is trained anew"
        models = (then.get("parent"), now.get("parent"))
        causes.append(Cause("parent", note or usual, "parent", *models))
    if then.get("seed") != now.get("seed"):
        text = f"seed {then.get('seed')} → {now.get('seed')}"
        causes.append(Cause("seed", text, "seed", then.get("seed"), now.get("seed")))
    if then.get("env") != now.get("env"):
        causes.append(_environment_cause(step, now, before, world))
    return tuple(causes)


def base_identity(
    spec: str | None, root: Path, locked: lock.Lock, state: State, *, trust_stat: bool = True
) -> str | None:
    """The hash of the base model's files, `owner/name@commit` for the hub, None if not pinned."""
    if spec is None:
        return None
    if source.on_hub(spec, root):
        commit = locked.commit_of(spec)
        return f"{spec}@{commit}" if commit else None
    path = source.path_of(spec, root)
    files = source.model_files(path)
    hashes = state.hashes((str(file) for file in files), trust_stat=trust_stat)
    return key.of_files((f.name if path.is_dir() else "", hashes[str(f)]) for f in files)


def drift(planned: Planned, world: World) -> dict[str, tuple[str, str]]:
    """Versions and GPU that are others than when the output was made: name → then, now."""
    if planned.parts is None or planned.output is None:
        return {}
    made = facts.of_output(world.workspace, key.of(planned.parts), planned.output)
    return environment.changes(made.env, environment.of(planned.step)) if made else {}


def last_made(step: Step, world: World) -> Made | None:
    """How the stage's last output was made, where the store still knows it."""
    fact = world.lock.of_stage(step.name)
    return facts.of_output(world.workspace, fact.key, fact.output) if fact else None


def _left_out(step: Step, world: World) -> Planned:
    """A stage that is not asked for: it stays as it was made last, and is fetched if it is read."""
    fact = world.lock.of_stage(step.name)
    cause = Cause("left out", "it stays as it was made last")
    if fact is None:
        return Planned(step, "skip", (cause,))
    here = _is_here(fact.key, fact.output, world)
    is_read = world.chosen is not None and step.name in world.chosen.read
    if is_read and not here and world.elsewhere.holds(fact.output):
        return Planned(step, "restore", (cause,), fact.parts, fact.output)
    return Planned(step, "skip", (cause,), fact.parts, fact.output if here else None)


def _missing(step: Step, above: Mapping[str, Planned], world: World) -> PreconditionError | None:
    """What keeps the stage from running, or from being decided."""
    for name in step.inputs.values():
        if above[name].state == "blocked":
            return PreconditionError(f"{name}, which it reads, cannot run")
        if above[name].is_left_out and above[name].output is None:
            fact = world.lock.of_stage(name)
            is_damaged = fact is not None and store.holds(world.workspace, fact.output)
            what = "is damaged" if is_damaged else "has made nothing yet or is not in the store"
            return PreconditionError(
                f"{step.name} reads {name}, which {what}",
                hint="apply once without --only and --from",
            )
    for name in step.inputs.values():
        made_from = (above[name].parts or {}).get("inputs", {}) if above[name].is_left_out else {}
        for other, output in made_from.items():
            beside = step.inputs.get(other)
            if beside != above[name].step.inputs.get(other):
                continue  # another stage of that kind: what clean was made of is no clean one
            if beside and above[beside].output not in (None, output):
                return PreconditionError(
                    f"{step.name} reads {beside} and {name}, but {name} was made from an earlier"
                    f" output of {beside}",
                    hint=f"apply with --from {name}, or without --only and --from",
                )
    return world.base_problem if step.uses_base_model else None


def _forbidden(found: Planned, world: World) -> DriftError | None:
    """What `--locked` says to it: nothing where the lockfile has just this."""
    for fact in world.lock.facts:
        if (fact.stage, fact.parts, fact.output) == (found.step.name, found.parts, found.output):
            return None
    why = "; ".join(cause.text for cause in found.causes) or "the lockfile does not say so"
    return DriftError(
        f"{found.step.name} would give something else than the lockfile says: {why}",
        hint="apply without --locked, and commit the lockfile",
    )


def _fetched(step: Step, parts: key.Components, output: str, world: World) -> Planned:
    cause = Cause("output missing", f"it is in {world.elsewhere.name}", "", output)
    return Planned(step, "restore", (cause,), parts, output)


def _made_again(step: Step, parts: key.Components, output: str, world: World) -> Planned:
    """The output is known but not here, or not whole."""
    path = store.path_of(world.workspace, output)
    if not path.is_dir():
        text = "its output is not in the store"
        if not step.rebuilds:
            text += "; it is trained again and gives a different model"
    elif step.rebuilds:
        text = "its output is damaged"
    else:
        problem = damaged(step.name, path)
        return Planned(step, "blocked", (Cause("blocked", problem.message),), problem=problem)
    foreseen = output if step.rebuilds else None
    return Planned(step, "run", (Cause("output missing", text, "", output),), parts, foreseen)


def damaged(stage: str, path: Path) -> PreconditionError:
    """What to tell about a trained model that is not what was trained any more."""
    return PreconditionError(
        f"the output of {stage} is damaged: {path}",
        hint="put it back from a copy, or delete the folder and apply again to train anew",
    )


def _is_here(stage_key: str, output: str, world: World) -> bool:
    """Whether the output is in the store, and as large as it was; `--paranoid` reads all of it."""
    if world.choice.paranoid or not store.holds(world.workspace, output):
        return world.choice.paranoid and store.is_whole(world.workspace, output)
    made = facts.of_output(world.workspace, stage_key, output)
    return made is None or disk.size(store.path_of(world.workspace, output)) == made.bytes


def _setting(settings: Mapping[str, Any], name: str) -> str:
    return key.canonical(settings[name]) if name in settings else "default"


def _sources_cause(then: str | None, now: str | None, world: World) -> Cause:
    old = world.state.manifest(then) if then else None
    new = world.state.manifest(now) if now else {}
    if old is None or new is None:
        return Cause("sources", "the source files are others", "", then, now)
    added = sorted(new.keys() - old.keys())
    removed = sorted(old.keys() - new.keys())
    edited = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    changes = [
        f"{len(names)} {'file' if len(names) == 1 else 'files'} {what}: {names[0]}"
        + (", …" if len(names) > 1 else "")
        for what, names in (("added", added), ("removed", removed), ("changed", edited))
        if names
    ]
    counts = {"added": len(added), "removed": len(removed), "changed": len(edited)}
    text = "; ".join(changes)
    return Cause("sources", text, "", {"files": len(old)}, {"files": len(new), **counts})


def _environment_cause(step: Step, now: key.Components, before: lock.Fact, world: World) -> Cause:
    """Which versions are others, where it is still known with which ones the last output was."""
    if "env" not in before.parts or "env" not in now:
        text = "`rerun_on: [env]` was " + ("added" if "env" in now else "taken out")
        return Cause("environment", text, "env", before.parts.get("env"), now.get("env"))
    made = facts.of_output(world.workspace, before.key, before.output)
    changes = environment.changes(made.env, environment.of(step)) if made else {}
    if not changes:
        text = "library versions or the GPU are others"
        return Cause("environment", text, "env", before.parts["env"], now["env"])
    text = ", ".join(f"{name} {was} → {is_now}" for name, (was, is_now) in changes.items())
    then, there = ({name: both[n] for name, both in changes.items()} for n in (0, 1))
    return Cause("environment", text, "env", then, there)
