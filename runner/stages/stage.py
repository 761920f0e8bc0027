"""What every stage has: settings that check themselves, and folders to read from and write to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field

from runner.sources import SourceFile

Event = dict[str, Any]
Metrics = dict[str, float | int | str]
Kind = Literal[
    "conversations",
    "chains",
    "split",
    "tokens",
    "model",
    "report",
    "export",
    "adapter",
    "reference",
    "merged",
    "unquantised",
    "importance",
    "gguf",
    "modelfile",
    "card",
]

NAME = r"^[^\W_][\w.-]{0,63}$"


class Settings(BaseModel):
    """Base of every settings class: unknown keys refused, values never changed, types strict."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class Dirs:
    """All that a stage may touch. `scratch` survives an interrupted run of the same key.

    `previous` is what the stage made last with the same settings, from other inputs: to take over
    what is still right. The output must be what a build from nothing gives. `parent` is the model
    that a training goes on from, on what is new and the share `replay` of what that one learned.
    """

    inputs: Mapping[str, Path]
    output: Path
    scratch: Path
    cache: Path
    sources: tuple[SourceFile, ...]
    base_model: Path | None
    recipe: str
    seed: int
    emit: Callable[[Event], None]
    previous: Path | None = None
    parent: Path | None = None
    replay: float = 0.0

    @property
    def base(self) -> Path:
        assert self.base_model is not None, "the engine gives a base to each stage that uses one"
        return self.base_model


@dataclass(frozen=True)
class Sizes:
    """What is known before a stage runs, in bytes. Kinds not yet made are missing."""

    inputs: Mapping[str, int]
    """Kind → size of the artifact that it reads."""
    sources: int
    """Of the files that it reads from the workspace."""
    previous: int | None
    """Of what it made last."""
    base_model: Path | None
    """The folder or `.gguf` file; None where there is none or it is not downloaded yet."""
    base_converted: bool = False
    """Whether the cache has the safetensors of a `.gguf` base model already."""


@dataclass(frozen=True)
class Written:
    """One thing that a stage writes, in words, and its bytes.

    `temporary` when it goes again before the stage ends; `once` when every stage that needs it
    names it but only the first one writes it. Where the size cannot be known yet, `bytes` is 0
    and `what` says so.
    """

    what: str
    bytes: int
    temporary: bool = False
    once: bool = False


class Stage(Settings):
    """One entry of a recipe. Its fields are its settings; `run` does the work.

    `version` goes into the key: raise it when the same settings and inputs give another output.
    """

    name: str = Field(default="", pattern=NAME)
    """What other stages call this one; only needed when two stages are of one kind."""
    input: str = ""
    """The name of the stage to read from, where the nearest above is not the one."""
    rerun_on: tuple[Literal["env"], ...] = ()
    """env: also run again when library versions or the GPU are others than last time."""

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[Kind, ...]] = ()
    writes: ClassVar[Kind]
    uses_base_model: ClassVar[bool] = False
    uses_seed: ClassVar[bool] = False
    uses_recipe_name: ClassVar[bool] = False
    uses_gpu: ClassVar[bool] = False
    """Computes on the GPU where there is one, and there it may give another output."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions whose version may change the output."""
    own_process: ClassVar[bool] = False
    """Imports torch, so it runs in a child process."""
    rebuilds: ClassVar[bool] = True
    """Gives the same bytes again; a training does not, so its result is kept as a fact."""
    outside_key: ClassVar[tuple[str, ...]] = ("stage", "name", "input", "rerun_on")
    """Settings that do not decide the output, or that the key holds in another form."""
    shows: ClassVar[Mapping[str, str]] = {}
    """For `runner cat`: view → the JSON Lines file in the artifact; "" is the plain view."""

    def units(self, maker: Stage | None, base_model: str | None) -> tuple[Unit, ...]:
        """What it is made of, where its parts have keys and outputs of their own; else nothing.

        `maker` is the stage that makes the first of what it reads; `base_model` is as the recipe
        says.
        """
        return ()

    def run(self, dirs: Dirs) -> Metrics:
        """Does the work, from `dirs.inputs` into `dirs.output`; numbers that sum it up."""
        raise NotImplementedError

    @classmethod
    def kind(cls) -> str:
        """The word by which a recipe names it, from its tag `stage: Literal[…]`."""
        return str(get_args(cls.model_fields["stage"].annotation)[0])

    def source_patterns(self) -> tuple[str, ...]:
        """Files, folders and globs that this stage reads from the workspace."""
        return ()

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        """What this stage will write: for the sum that has to fit on the disk, so rather more."""
        known = sizes.previous or sum(sizes.inputs.values()) + sizes.sources
        return (Written(self.writes, known),)

    def checkpoint_bytes(self, sizes: Sizes) -> int | None:
        """Of one checkpoint to go on from; None where there are none or it is not known yet."""
        return None

    def rows(self, artifact: Path, view: str) -> Iterator[str]:
        """The artifact as JSON lines, without line ends."""
        with (artifact / self.shows[view]).open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield line.rstrip("\n")


class Unit(NamedTuple):
    """A part of a stage. `transient`: not kept, and made when another part needs it. `beside`: the
    parts above that it reads, whatever their kind, each by its name."""

    name: str
    stage: Stage
    transient: bool = False
    beside: tuple[str, ...] = ()


def base_made(sizes: Sizes) -> tuple[Written, ...]:
    """The safetensors that the first stage to open a GGUF base model puts into the cache."""
    from runner.model import weights

    base = weights.read(sizes.base_model)
    if base is None or not base.is_gguf or sizes.base_converted:
        return ()
    return (
        Written("the base model as safetensors, for the cache", base.folder_bytes(), once=True),
    )
