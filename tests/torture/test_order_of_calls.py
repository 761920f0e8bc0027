"""R15: what a power cut could undo: no name is given before what it names is on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.faults import OBJECT, Durable, Scene, named, renamed

STAGES = ("ingest", "clean", "window", "split")


@pytest.fixture(params=["first_run", "next_run"])
def traced(request: pytest.FixtureRequest) -> Scene:
    scene = request.getfixturevalue(request.param)
    assert isinstance(scene, Scene)
    return scene


def _store_but_staging(durable: Durable, scene: Scene) -> list[str]:
    """What is not durable of the store, leaving out what is still being written."""
    staging = scene.space.store / "tmp"
    below = durable.below(str(scene.space.store))
    return [path for path in below if not Path(path).is_relative_to(staging)]


def test_an_object_gets_its_name_when_all_of_it_is_on_the_disk(traced: Scene) -> None:
    durable, wrong, published = Durable(), [], 0
    for call in traced.calls:
        if (names := renamed(call.text)) and OBJECT.fullmatch(Path(names[1]).name):
            published += 1
            wrong += [f"not synced at {call}: {path}" for path in durable.below(names[0])]
        durable.add(call)
    assert wrong == []
    assert published == len(STAGES)


def test_the_lockfile_names_an_output_when_its_name_and_its_fact_are_on_the_disk(
    traced: Scene,
) -> None:
    durable, wrong, replaced = Durable(), [], 0
    for call in traced.calls:
        if (names := renamed(call.text)) and names[1] == str(traced.space.lock):
            replaced += 1
            unsafe = [*durable.below(names[0]), *_store_but_staging(durable, traced)]
            wrong += [f"not synced at {call}: {path}" for path in unsafe]
        durable.add(call)
    assert wrong == []
    assert replaced


def test_a_link_leads_to_an_output_when_the_lockfile_is_on_the_disk(traced: Scene) -> None:
    durable, wrong, linked = Durable(), [], 0
    links = traced.space.artifacts / "small"
    for call in traced.calls:
        names = renamed(call.text)
        if names and names[1] in {f"{links}/{stage}" for stage in STAGES}:
            linked += 1
            unsafe = durable.below(str(traced.space.recipe.parent))
            wrong += [f"not synced at {call}: {path}" for path in unsafe]
        durable.add(call)
    assert wrong == []
    assert linked == len(STAGES)


def test_the_folders_above_the_store_are_on_the_disk_before_the_lockfile_names_an_output(
    traced: Scene,
) -> None:
    space = traced.space
    new: set[str] = set()
    wrong: set[str] = set()
    for call in traced.calls:
        if (names := renamed(call.text)) and names[1] == str(space.lock):
            wrong |= new
        elif call.name.startswith("mkdir") and call.text.endswith(" = 0"):
            path = Path(named(call.text)[0])
            new |= {str(path)} if path == space.store or path in space.store.parents else set()
        elif call.name == "fsync":
            new = {path for path in new if f"<{Path(path).parent}>" not in call.text}
    assert {Path(path).name for path in wrong} == set()
