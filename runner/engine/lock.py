"""The lockfile beside a recipe: facts, one a line, that git can merge by taking the lines of both.

A line is `- {JSON}`, so the file is a YAML list and needs no YAML parser. A fact says that a stage
with these components (see `key`) gave this output; a pin says which commit a hub model is; a
release says which model was accepted, and is never changed: a later one takes its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from runner import disk
from runner.engine import key
from runner.errors import RecipeError

HEADER = (
    "# Written by runner; commit it. Each line is a fact: this stage, made from this, gave that.\n"
)
HASH = re.compile("[0-9a-f]{64}")
PARTS = ("kind", "version", "settings", "inputs", "sources", "base_model", "seed", "env")
CONTINUED = ("parent", "replay")
"""The parts of a training that goes on from another model."""
FACT_PARTS = frozenset(("stage", "output", *PARTS, *CONTINUED))
RELEASE_PARTS = frozenset(("release", "outputs", "models", "from", "kept_aside"))
_STEP = re.compile(r"[^\W_][\w.-]{0,63}(/[^\W_][\w.-]{0,63})?")
"""A stage, or a part of one; a release makes links of these names."""
CONFLICT_MARKERS = ("<<<<<<<", "=======", ">>>>>>>", "|||||||")


class Fact(NamedTuple):
    """Stage `stage` with `parts` gave `output` (a content hash)."""

    stage: str
    output: str
    parts: dict[str, Any]

    @property
    def key(self) -> str:
        return key.of(self.parts)


class Pin(NamedTuple):
    """The hub model `base_model` is this commit."""

    base_model: str
    commit: str


class Release(NamedTuple):
    """A model that was accepted, with all that was made of it: stage → output.

    `models` holds for each training in it what has to be the same to go on from it, and its parent.
    `origin` is the number of the release that a rollback went back to. One that is `kept_aside` was
    found worse than release `number`, and is none.
    """

    number: int
    outputs: dict[str, str]
    models: dict[str, Any] = {}  # noqa: RUF012 (a tuple's default, never changed)
    origin: int | None = None
    kept_aside: bool = False


class Lock(NamedTuple):
    facts: tuple[Fact, ...] = ()
    pins: tuple[Pin, ...] = ()
    releases: tuple[Release, ...] = ()

    def of_stage(self, name: str) -> Fact | None:
        """The last fact of a stage; after a merge there may be several, all of them true."""
        return next((fact for fact in reversed(self.facts) if fact.stage == name), None)

    @property
    def release(self) -> Release | None:
        """The current one: of two with the highest number, after a merge, always the same."""
        accepted = (one for one in self.releases if not one.kept_aside)
        return max(accepted, default=None, key=lambda r: (r.number, key.canonical(r.outputs)))

    def commit_of(self, base_model: str) -> str | None:
        return next((p.commit for p in reversed(self.pins) if p.base_model == base_model), None)


def path_of(recipe: Path) -> Path:
    return recipe.with_suffix(".lock")


def read(path: Path) -> Lock:
    """The lockfile's facts; none when there is no file. A line that is no fact is an error."""
    try:
        return parsed(path.read_bytes(), str(path))
    except FileNotFoundError:
        return Lock()


def parsed(data: bytes, name: str) -> Lock:
    """The facts and pins in the bytes of a lockfile that messages call `name`."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _no_fact(name, data.count(b"\n", 0, error.start) + 1) from None
    facts: list[Fact] = []
    pins: list[Pin] = []
    releases: list[Release] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.startswith(("#", *CONFLICT_MARKERS)):
            continue
        record = _record(name, number, line)
        if "release" in record:
            release = Release(
                record["release"],
                record["outputs"],
                record.get("models", {}),
                record.get("from"),
                record.get("kept_aside", False),
            )
            if release not in releases:  # both sides of a merge may have it
                releases.append(release)
        elif "commit" in record:
            pins.append(Pin(record["base_model"], record["commit"]))
        else:
            parts = {k: v for k, v in record.items() if k not in ("stage", "output")}
            facts.append(Fact(record["stage"], record["output"], parts))
    return Lock(tuple(facts), tuple(pins), tuple(releases))


def hashes(data: bytes) -> set[str]:
    """Every content hash in the bytes of a lockfile, whatever else is wrong with them."""
    return {match.decode() for match in re.findall(rb"(?=([0-9a-f]{64}))", data)}


def text_of(lock: Lock) -> str:
    """The exact text of the file."""
    pins = ({"base_model": pin.base_model, "commit": pin.commit} for pin in lock.pins)
    facts = ({"stage": f.stage, "output": f.output, **f.parts} for f in lock.facts)
    records = (*pins, *facts, *map(_release, lock.releases))
    return HEADER + "".join(f"- {_line(record)}\n" for record in records)


def write(path: Path, lock: Lock) -> None:
    """Replaces the file whole; leaves it alone when nothing changes."""
    text = text_of(lock).encode()
    if not path.exists() or path.read_bytes() != text:
        disk.write_whole(path, text)


def updated(lock: Lock, fact: Fact, stages: Iterable[str]) -> Lock:
    """The lock with `fact` as the only one of its stage, in the order of the recipe's stages."""
    latest = {known.stage: known for known in lock.facts} | {fact.stage: fact}
    return lock._replace(facts=tuple(latest[name] for name in stages if name in latest))


def _release(release: Release) -> dict[str, Any]:
    record: dict[str, Any] = {"release": release.number, "outputs": release.outputs}
    if release.models:
        record["models"] = release.models
    if release.origin is not None:
        record["from"] = release.origin
    return {**record, "kept_aside": True} if release.kept_aside else record


def _record(name: str, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line.removeprefix("- "))
        if isinstance(record, dict) and any(
            is_one(record) for is_one in (_is_pin, _is_fact, _is_release)
        ):
            key.canonical(record)  # refuses NaN, and what is nested too deep
            return record
    except (ValueError, RecursionError):
        pass
    raise _no_fact(name, number)


def _is_pin(record: dict[str, Any]) -> bool:
    return record.keys() == {"base_model", "commit"} and _all(record.values(), str)


def _is_fact(record: dict[str, Any]) -> bool:
    """Whether every part has its type, and every output is a hash and no path."""
    inputs = record.get("inputs", {})
    texts = (record.get(name, "") for name in ("stage", "kind", "sources", "base_model", "env"))
    return (
        {"stage", "output", "kind", "version"} <= record.keys() <= FACT_PARTS
        and _all(texts, str)
        and _all((record["version"], record.get("seed", 0)), int)
        and isinstance(record.get("settings", {}), dict)
        and isinstance(inputs, dict)
        and _all((record.get("replay", 0),), (int, float))
        and ("parent" in record) == ("replay" in record)
        and _are_hashes(
            (record["output"], *inputs.values(), record.get("parent", record["output"]))
        )
    )


def _is_release(record: dict[str, Any]) -> bool:
    """The same of a release: a whole number from 1 up, and hashes that no path can be made of."""
    outputs, models = record.get("outputs"), record.get("models", {})
    numbers = (record.get("release"), record.get("from", 1))
    return (
        {"release", "outputs"} <= record.keys() <= RELEASE_PARTS
        and all(type(number) is int and number > 0 for number in numbers)
        and isinstance(outputs, dict)
        and bool(outputs)
        and _are_hashes(outputs.values())
        and all(_STEP.fullmatch(name) for name in outputs)
        # The links of parts lie in a folder: behind the link to a whole stage that is the store.
        and not any("/" in name and name.partition("/")[0] in outputs for name in outputs)
        and isinstance(models, dict)
        and models.keys() <= outputs.keys()
        and _all(models.values(), dict)
        and _are_hashes(model["parent"] for model in models.values() if "parent" in model)
        and record.get("kept_aside", True) is True
    )


def _are_hashes(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) and HASH.fullmatch(value) for value in values)


def _all(values: Iterable[object], kind: type | tuple[type, ...]) -> bool:
    return all(isinstance(value, kind) for value in values)


def _no_fact(name: str, number: int) -> RecipeError:
    return RecipeError(
        f"{name}:{number}: this line of the lockfile is no fact",
        hint="take the file from git again, or delete it: then everything is computed anew",
    )


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=True, separators=(", ", ": "))
