"""From a recipe file to the plain data that the engine works on, or all of its mistakes at once.

Checking a recipe needs pydantic, which alone takes half of what a run with nothing to do may take.
So the result, a `Compiled`, is plain data that the state database keeps for a recipe's exact bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runner.errors import RecipeError

if TYPE_CHECKING:
    from runner.engine.compose import Composed, Place
    from runner.stages.schema import Recipe
    from runner.stages.stage import Stage

BYTES_MAX = 1 << 20
CURRENT = "current"
"""In the folder of links, what leads to the current release."""
MODELINE = "# yaml-language-server: $schema="


class Step(NamedTuple):
    """A stage, checked, with what the engine must know of it. `inputs`: kind → stage name.

    A stage whose parts have keys of their own is several steps, named STAGE/PART.
    """

    name: str
    kind: str
    version: int
    entry: dict[str, Any]
    """All that the recipe says of it, as the stage class reads it again."""
    settings: dict[str, Any]
    """What goes into the key: values other than the default that decide the output."""
    inputs: dict[str, str]
    sources: tuple[str, ...]
    uses_base_model: bool
    seed: int | None
    own_process: bool
    rebuilds: bool
    libraries: tuple[str, ...] = ()
    uses_gpu: bool = False
    rerun_on_env: bool = False
    transient: bool = False
    """Its output is not kept, and made again when another step needs it."""

    @property
    def stage(self) -> str:
        """The stage of the recipe that it is, or is a part of."""
        return self.name.partition("/")[0]


class Compiled(NamedTuple):
    name: str
    base_model: str | None
    steps: tuple[Step, ...]
    extends: str | None
    """The recipe that this one was written over, as it names it: from its own folder."""
    extends_sha256: str | None
    """Of that file's bytes."""
    overrides: tuple[str, ...]
    """What `--set` said, in order."""
    retrain: dict[str, Any] | None = None
    """All settings of `retrain:`, where the recipe has it."""

    def step(self, name: str) -> Step:
        """The step of that name; raises RecipeError naming those there are."""
        return self.named(name)[0]

    def named(self, name: str) -> tuple[Step, ...]:
        """The step of that name, or all of a stage; raises RecipeError naming those there are."""
        from runner.engine.words import did_you_mean, shown

        if found := tuple(step for step in self.steps if name in (step.name, step.stage)):
            return found
        names = list(dict.fromkeys(step.stage for step in self.steps))
        raise RecipeError(
            f"the recipe has no stage {shown(name)}{did_you_mean(name, names)}",
            hint=f"its stages are {', '.join(names)}",
        )

    def plain(self) -> dict[str, Any]:
        return {**self._asdict(), "steps": [step._asdict() for step in self.steps]}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Compiled:
        lists = ("sources", "libraries")
        steps = tuple(Step(**{**s, **{k: tuple(s[k]) for k in lists}}) for s in data["steps"])
        return cls(**{**data, "steps": steps, "overrides": tuple(data["overrides"])})


class RecipeProblems(RecipeError):
    """All that is wrong with a recipe, one `file:line: what; what to do` each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def read_bytes(path: Path) -> bytes:
    """The recipe's bytes, or a sentence on why there are none."""
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise RecipeError(f"{path} is no ordinary file", hint="name a recipe file")
        with path.open("rb") as file:
            return file.read(BYTES_MAX + 1)  # one more than the loader takes
    except FileNotFoundError:
        hint = "check the path, or make a recipe with `runner init`"
        raise RecipeError(f"there is no recipe {path}", hint=hint) from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder", hint="name the recipe file in it") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error


def compile(data: bytes, name: str, overrides: Sequence[str] = ()) -> Compiled:
    """The recipe in `data`, checked; raises RecipeError with every problem and its line.

    `name` is its path, which that of the recipe it extends starts from. Each of `overrides` is a
    STAGE.SETTING=VALUE of `--set`.
    """
    from runner.engine import compose, yaml12

    written = yaml12.load(data, name=name)
    if written.data is None:
        raise RecipeError(
            f"{name}: the recipe is empty", hint="make one with `runner init`, or see the README"
        )
    composed = compose.whole(written, name, overrides)
    recipe = _checked(composed)
    return Compiled(
        name=recipe.name,
        base_model=recipe.base_model,
        steps=tuple(_steps(recipe, composed)),
        extends=recipe.extends,
        extends_sha256=composed.base_sha256,
        overrides=tuple(overrides),
        retrain=recipe.retrain.model_dump(mode="json") if recipe.retrain else None,
    )


def _checked(composed: Composed) -> Recipe:
    from pydantic import ValidationError

    from runner.engine.problems import sentences
    from runner.stages.schema import Recipe

    try:
        # Through JSON, because only there strict types still take a list where a tuple is wanted.
        return Recipe.model_validate_json(json.dumps(composed.data), strict=True)
    except ValidationError as error:
        raise RecipeProblems(sentences(error, composed)) from None


def _steps(recipe: Recipe, composed: Composed) -> Iterable[Step]:
    """Each stage with its inputs found; raises all that does not fit together."""
    from runner.engine.words import did_you_mean, shown

    problems: list[tuple[Place, str]] = []

    def problem(index: int, text: str, *causes: tuple[str | int, ...]) -> None:
        problems.append((composed.place(("stages", index), *causes), text))

    above: dict[str, tuple[Stage, dict[str, str]]] = {}
    steps: list[Step] = []
    for index, stage in enumerate(recipe.stages):
        kind = stage.kind()
        own_name = stage.name or kind
        reads = ("stages", index, "input")
        if own_name in above:
            problem(index, f"a second stage is called {shown(own_name)}; give it a `name:`")
            continue
        if own_name == CURRENT:
            problem(index, "a stage cannot be called 'current': that is the accepted model's place")
            continue
        if stage.input and stage.input not in above:
            near = did_you_mean(stage.input, above)
            problem(index, f"no stage above is called {shown(stage.input)}{near}", reads)
            continue
        if stage.uses_base_model and recipe.base_model is None:
            problem(
                index,
                f"{own_name} needs a model; add `base_model:` to the recipe",
                ("base_model",),
            )
        if stage.input and above[stage.input][0].writes not in stage.reads:
            makes = above[stage.input][0].writes
            problem(
                index, f"{own_name} cannot read {shown(stage.input)}, which makes {makes}", reads
            )
            continue
        inputs, missing = _inputs(stage, above)
        for wanted in missing:
            makers = " or ".join(_makers(wanted))
            problem(index, f"{own_name} needs {wanted}; put a stage {makers} above it")
        above[own_name] = stage, inputs
        maker = above[next(iter(inputs.values()))][0] if inputs else None
        units = () if missing else stage.units(maker, recipe.base_model)
        for unit in units:
            read, _ = _inputs(unit.stage, above)
            read |= {part: f"{own_name}/{part}" for part in unit.beside}
            whole_name = f"{own_name}/{unit.name}"
            above[whole_name] = unit.stage, read
            steps.append(_step(whole_name, unit.stage, read, recipe, unit.transient))
        if not units:
            steps.append(_step(own_name, stage, inputs, recipe))
    if problems:
        problems.sort(key=lambda found: found[0])
        raise RecipeProblems([f"{place}: {text}" for place, text in problems])
    return steps


def _step(
    name: str, stage: Stage, inputs: dict[str, str], recipe: Recipe, transient: bool = False
) -> Step:
    settings = stage.model_dump(mode="json", exclude_defaults=True, exclude={*stage.outside_key})
    if stage.uses_recipe_name:
        settings["recipe_name"] = recipe.name
    return Step(
        name=name,
        kind=stage.kind(),
        version=stage.version,
        entry=stage.model_dump(mode="json", exclude_unset=True),
        settings=settings,
        inputs=inputs,
        sources=stage.source_patterns(),
        uses_base_model=stage.uses_base_model,
        seed=recipe.seed if stage.uses_seed else None,
        own_process=stage.own_process,
        rebuilds=stage.rebuilds,
        libraries=stage.libraries,
        uses_gpu=stage.uses_gpu,
        rerun_on_env="env" in stage.rerun_on,
        transient=transient,
    )


def _inputs(
    stage: Stage, above: Mapping[str, tuple[Stage, dict[str, str]]]
) -> tuple[dict[str, str], list[str]]:
    """For each kind that the stage reads, the stage to read from; and the kinds nobody makes.

    The first kind comes from `input:` or the nearest stage above. The others come from the
    stages that it was made from, where these make them, so that a split is never read beside
    conversations that it was not made of; else from the nearest above.
    """
    inputs: dict[str, str] = {}
    missing: list[str] = []
    for kind in stage.reads:
        candidates = [*_lineage(inputs.values(), above), *reversed(list(above))]
        if stage.input and above[stage.input][0].writes == kind:
            candidates.insert(0, stage.input)
        found = next((name for name in candidates if above[name][0].writes == kind), None)
        if found is None:
            missing.append(kind)
        else:
            inputs[kind] = found
    return inputs, missing


def _lineage(names: Iterable[str], above: Mapping[str, tuple[Stage, dict[str, str]]]) -> list[str]:
    """The stages and all that they were made from, nearest first."""
    found: list[str] = []
    level = list(names)
    while level:
        found += level
        level = [parent for name in level for parent in above[name][1].values()]
    return found


def _makers(kind: str) -> list[str]:
    from runner.stages.schema import STAGES

    return [name for name, stage in STAGES.items() if stage.writes == kind]
