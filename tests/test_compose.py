import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.engine import recipe
from runner.engine.recipe import Compiled
from runner.errors import RecipeError

DATA = """\
name: data
seed: 3
base_model: a/b
stages:
  - stage: ingest
    sources: [chats]
  - stage: window
  - stage: split
    eval_fraction: 0.2
  - stage: tokenize
"""
TRAINING = """\
name: mine
extends: data.yaml
stages:
  - stage: train
    epochs: 2
    lora:
      rank: 8
"""


@dataclass(frozen=True)
class Folder:
    path: Path
    base: str = DATA

    def over(self, base: str) -> "Folder":
        return replace(self, base=base)

    def compiled(self, text: str, *overrides: str) -> Compiled:
        (self.path / "data.yaml").write_text(self.base)
        (self.path / "r.yaml").write_text(text)
        return recipe.compile(text.encode(), str(self.path / "r.yaml"), overrides)

    def problems(self, text: str, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            self.compiled(text, *overrides)
        return caught.value.message.replace(f"{self.path}{os.sep}", "").split("\n")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def names(compiled: Compiled) -> list[str]:
    return list(dict.fromkeys(step.stage for step in compiled.steps))


# What extends does


def test_a_recipe_goes_on_where_its_base_ends(folder: Folder) -> None:
    compiled = folder.compiled(TRAINING)
    assert names(compiled) == ["ingest", "window", "split", "tokenize", "train"]
    assert (compiled.name, compiled.base_model) == ("mine", "a/b")
    assert compiled.step("train").seed == 3


def test_a_recipe_without_stages_takes_those_of_the_base(folder: Folder) -> None:
    compiled = folder.compiled("name: other\nextends: data.yaml\nseed: 4\n")
    assert names(compiled) == ["ingest", "window", "split", "tokenize"]


def test_the_name_is_never_inherited(folder: Folder) -> None:
    assert folder.problems("extends: data.yaml\n") == ["r.yaml:1: the recipe needs `name:`"]


def test_an_entry_of_a_stage_the_base_has_changes_its_settings_where_it_stands(
    folder: Folder,
) -> None:
    base = DATA + TRAINING.partition("stages:\n")[2]
    text = """\
name: mine
extends: data.yaml
stages:
  - {stage: train, epochs: 5, lora: {alpha: 4}}
  - {stage: ingest, sources: [more]}
"""
    compiled = folder.over(base).compiled(text)
    assert names(compiled) == ["ingest", "window", "split", "tokenize", "train"]
    assert compiled.step("ingest").sources == ("more",)
    assert compiled.step("train").settings == {"epochs": 5.0, "lora": {"rank": 8, "alpha": 4.0}}


@pytest.mark.parametrize(
    ("written", "order"),
    [
        ("[clean]", "ingest window clean"),
        ("[ingest, clean]", "ingest clean window"),
        ("[clean, window]", "ingest clean window"),
        ("[a, ingest]", "a ingest window"),
        ("[a, b, window, c, ingest, clean]", "ingest clean a b window c"),
        ("[window, a, b, ingest]", "ingest window a b"),
    ],
)
def test_a_new_stage_goes_after_the_one_written_above_it(
    folder: Folder, written: str, order: str
) -> None:
    entries = {
        "clean": "{stage: clean}",
        "ingest": "{stage: ingest}",
        "window": "{stage: window}",
        **{name: f"{{stage: ingest, name: {name}, sources: [x]}}" for name in "abc"},
    }
    stages = ", ".join(entries[name] for name in written.strip("[]").split(", "))
    base = "stages: [{stage: ingest, sources: [a]}, {stage: window}]"
    text = f"name: x\nextends: data.yaml\nstages: [{stages}]\n"
    found = folder.over(base).compiled(text)
    assert names(found) == order.split()


def test_a_stage_is_found_by_its_own_name(folder: Folder) -> None:
    base = "stages: [{stage: ingest, name: old, sources: [a]}, {stage: ingest, sources: [b]}]"
    text = "name: x\nextends: data.yaml\nstages: [{name: old, sources: [c]}]\n"
    compiled = folder.over(base).compiled(text)
    assert [step.sources for step in compiled.steps] == [("c",), ("b",)]


def test_a_base_may_be_incomplete(folder: Folder) -> None:
    base = "stages:\n  - stage: ingest\n    format: messages\n"
    text = "name: x\nextends: data.yaml\nstages: [{stage: ingest, sources: [a]}]\n"
    assert folder.over(base).compiled(text).steps[0].settings == {"format": "messages"}
    assert folder.over("seed: 9\n").compiled(text + "seed: 2\n").name == "x"


def test_the_base_is_looked_for_from_the_folder_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "team").mkdir()
    (tmp_path / "base.yaml").write_text(DATA)
    text = b"name: x\nextends: ../base.yaml\n"
    assert recipe.compile(text, str(tmp_path / "team" / "r.yaml")).steps
    absolute = f"name: x\nextends: {tmp_path / 'base.yaml'}\n".encode()
    assert recipe.compile(absolute, "elsewhere/r.yaml").steps


def test_a_compiled_recipe_says_what_it_was_made_of(folder: Folder) -> None:
    compiled = folder.compiled(TRAINING, "seed=4", "train.epochs=1")
    assert compiled.extends == "data.yaml"
    assert compiled.extends_sha256 == hashlib.sha256(DATA.encode()).hexdigest()
    assert compiled.overrides == ("seed=4", "train.epochs=1")
    assert Compiled.from_plain(json.loads(json.dumps(compiled.plain()))) == compiled


def test_the_examples_in_the_docs_are_recipes(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    examples = re.findall(r"```yaml\n# recipes/(\S+)\n(.*?)```", text, re.DOTALL)
    for file, example in examples:
        (tmp_path / file).write_text(example)
    found = {
        file: " ".join(names(recipe.compile(example.encode(), str(tmp_path / file))))
        for file, example in examples
        if "extends:" in example
    }
    assert found == {
        "small.yaml": "ingest window split tokenize train export",
        "tidy.yaml": "ingest clean window split tokenize",
    }


# What extends refuses


@pytest.mark.parametrize(
    ("extends", "sentence"),
    [
        ("none.yaml", "r.yaml:2: there is no recipe none.yaml; correct `extends:`"),
        ("folder", "r.yaml:2: folder is a folder; correct `extends:`"),
        ("pipe", "r.yaml:2: pipe is no ordinary file; correct `extends:`"),
        ("loop", "r.yaml:2: loop cannot be read: Too many levels of symbolic links; correct"),
        ("r.yaml", "r.yaml:2: a recipe cannot extend itself; correct `extends:`"),
        ("folder/../r.yaml", "r.yaml:2: a recipe cannot extend itself; correct `extends:`"),
        (
            "empty.yaml",
            "empty.yaml:1: r.yaml:2 extends this file, which has no settings; write some",
        ),
        ("list.yaml", "list.yaml:2: r.yaml:2 extends this file, which has no settings; write some"),
        ("twice.yaml", "twice.yaml:2: 'a' is already on line 1"),
        ("''", "r.yaml:2: extends must not be empty"),
        ("3", "r.yaml:2: extends must be a text, not 3"),
        ("[data.yaml]", "r.yaml:2: extends must be a text, not ['data.yaml']"),
    ],
)
def test_a_base_that_is_none_is_refused_with_the_place(
    folder: Folder, extends: str, sentence: str
) -> None:
    (folder.path / "folder").mkdir()
    (folder.path / "loop").symlink_to("loop")
    os.mkfifo(folder.path / "pipe")
    (folder.path / "empty.yaml").write_text("# nothing\n")
    (folder.path / "list.yaml").write_text("\n- a\n")
    (folder.path / "twice.yaml").write_text("a: 1\na: 2\n")
    found = folder.problems(f"name: x\nextends: {extends}\n")
    assert any(problem.startswith(sentence) for problem in found), found


def test_a_base_has_no_base(folder: Folder) -> None:
    base = "seed: 1\nextends: third.yaml\n"
    assert folder.over(base).problems(TRAINING) == [
        "data.yaml:2: r.yaml:2 extends this recipe, which then cannot extend another; "
        "put all that is shared into one file"
    ]


def test_a_base_has_the_limits_of_every_recipe(folder: Folder) -> None:
    found = folder.over("#" * (1 << 20) + "\n").problems(TRAINING)
    assert found == ["data.yaml:1: the file has 1,048,577 bytes; a recipe has at most 1,048,576"]


def test_one_name_for_two_kinds_of_stage_is_a_mistake(folder: Folder) -> None:
    text = "name: x\nextends: data.yaml\nstages:\n  - name: window\n    stage: clean\n"
    assert folder.problems(text) == [
        "r.yaml:5: window is a stage 'window' at data.yaml:7; give this one a `name:` of its own"
    ]


def test_a_stage_written_twice_is_a_mistake_here_too(folder: Folder) -> None:
    text = "name: x\nextends: data.yaml\nstages:\n  - stage: split\n  - stage: split\n"
    assert folder.problems(text) == [
        "r.yaml:5: a second stage is called 'split'; give it a `name:`"
    ]


# Where mistakes are


def test_every_mistake_is_shown_where_it_was_written(folder: Folder) -> None:
    base = DATA.replace("0.2", "2").replace("[chats]", "[chats]\n    source: x")
    text = TRAINING.replace("rank: 8", "rnk: 8")
    assert folder.over(base).problems(text, "train.epochs=many", "window.mod=x", "sede=3") == [
        "--set sede=3: no stage or setting named 'sede'; did you mean 'seed'?; there are "
        "ingest, window, split, tokenize, train, base_model, seed, retrain",
    ]
    assert folder.over(base).problems(text, "train.epochs=many", "window.mod=x") == [
        "--set train.epochs=many: epochs in train must be a number, not 'many'",
        "--set window.mod=x: no setting named 'mod' in window; did you mean 'mode'?",
        "data.yaml:7: no setting named 'source' in ingest; did you mean 'sources'?",
        "data.yaml:10: eval_fraction in split must be less than 1, not 2",
        "r.yaml:7: no setting named 'rnk' in lora in train; did you mean 'rank'?",
    ]


def test_what_is_missing_is_missed_where_its_owner_was_written(folder: Folder) -> None:
    base = "\nstages:\n  - stage: ingest\n"
    text = "name: x\nextends: data.yaml\nstages: [{stage: ingest}, {stage: train}]\n"
    assert folder.over(base).problems(text) == ["data.yaml:3: ingest needs `sources:`"]


def test_stages_that_do_not_fit_together_are_shown_by_place(folder: Folder) -> None:
    text = "name: x\nextends: data.yaml\nstages:\n  - stage: export\n  - stage: export\n"
    base = DATA.replace("base_model: a/b", "").replace("stage: window", "stage: clean")
    assert folder.over(base).problems(text, "clean.input=new") == [
        "--set clean.input=new: no stage above is called 'new'",
        "data.yaml:8: split needs chains; put a stage window above it",
        "data.yaml:10: tokenize needs a model; add `base_model:` to the recipe",
        "r.yaml:4: export needs a model; add `base_model:` to the recipe",
        "r.yaml:4: export needs model; put a stage train above it",
        "r.yaml:5: a second stage is called 'export'; give it a `name:`",
    ]


@pytest.mark.parametrize(
    ("text", "overrides", "sentence"),
    [
        ("stages: [{stage: window, input: odl}]", [], "r.yaml:3: no stage above is called 'odl'"),
        ("", ["window.input=odl"], "--set window.input=odl: no stage above is called 'odl'"),
        (
            "",
            ["split.input=ingest", "tokenize.input=window"],
            "--set tokenize.input=window: tokenize cannot",
        ),
        ("", ["base_model="], "--set base_model=: tokenize needs a model"),
        ("base_model: null", [], "r.yaml:3: tokenize needs a model"),
        ("stages: [{stage: export}]", [], "r.yaml:3: export needs model"),
        (
            "",
            ["window.sliding_turns=[8]"],
            "--set window.sliding_turns=[8]: window has sliding_turns",
        ),
        ("stages: [{stage: window, sliding_turns: [8]}]", [], "r.yaml:3: window has sliding_turns"),
    ],
)
def test_settings_that_do_not_fit_are_shown_where_they_were_changed(
    folder: Folder, text: str, overrides: list[str], sentence: str
) -> None:
    found = folder.problems(f"name: x\nextends: data.yaml\n{text}\n", *overrides)
    assert any(problem.startswith(sentence) for problem in found), found


def test_settings_that_disagree_within_the_base_are_shown_there(folder: Folder) -> None:
    base = DATA.replace("stage: window", "stage: window\n    sliding_turns: [8]")
    found = folder.over(base).problems(TRAINING, "split.eval_fraction=0.3")
    assert found[0].startswith("data.yaml:7: window has sliding_turns"), found


# What --set does

TRAINED: dict[str, Any] = {"epochs": 2.0, "lora": {"rank": 8}}


@pytest.mark.parametrize(
    ("override", "stage", "expected"),
    [
        ("train.epochs=1", "train", {"epochs": 1.0, "lora": {"rank": 8}}),
        ("train.lora.rank=4", "train", {"epochs": 2.0, "lora": {"rank": 4}}),
        ("train.lora.alpha=4", "train", {"epochs": 2.0, "lora": {"rank": 8, "alpha": 4.0}}),
        ("train.lora={alpha: 4}", "train", {"epochs": 2.0, "lora": {"rank": 8, "alpha": 4.0}}),
        ("train.max_steps=null", "train", TRAINED),
        ("train.learning_rate=2e-5", "train", TRAINED | {"learning_rate": 2e-5}),
        ("train.schedule='linear'", "train", TRAINED | {"schedule": "linear"}),
        ("split.eval_fraction=.25", "split", {"eval_fraction": 0.25}),
    ],
)
def test_set_goes_over_the_recipe(
    folder: Folder, override: str, stage: str, expected: dict[str, Any]
) -> None:
    assert folder.compiled(TRAINING, override).step(stage).settings == expected


def test_the_later_set_wins(folder: Folder) -> None:
    compiled = folder.compiled(TRAINING, "seed=4", "train.epochs=[1]", "train.epochs=7", "seed=5")
    assert compiled.step("train").settings["epochs"] == 7.0
    assert compiled.step("train").seed == 5


def test_set_needs_no_base(folder: Folder) -> None:
    assert folder.compiled(DATA, "base_model=c/d", "window.mode=conversational").base_model == "c/d"


def test_a_stage_whose_name_has_dots_can_be_set(folder: Folder) -> None:
    text = "name: x\nstages:\n  - {stage: ingest, sources: [a]}\n"
    text += "  - {stage: ingest, name: ingest.new, sources: [b]}\n"
    compiled = folder.compiled(text, "ingest.new.format=messages", "ingest.sources=[c]")
    assert [step.sources for step in compiled.steps] == [("c",), ("b",)]
    assert compiled.steps[1].settings == {"format": "messages"}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.epochs", "there is no `=`; write STAGE.SETTING=VALUE"),
        ("", "there is no `=`; write STAGE.SETTING=VALUE"),
        ("name=y", "`name:` is set in the recipe only; change it there"),
        ("extends=y", "`extends:` is set in the recipe only; change it there"),
        ("stages=[]", "`stages:` is set in the recipe only; change it there"),
        ("train.name=y", "`name:` is set in the recipe only; change it there"),
        ("train.stage=y", "`stage:` is set in the recipe only; change it there"),
        ("train=y", "say which setting of train: train.SETTING=VALUE"),
        ("trian.epochs=1", "no stage or setting named 'trian'; did you mean 'train'?; there are"),
        ("epochs=1", "no stage or setting named 'epochs'; there are ingest, window, split"),
        ("=1", "no stage or setting named ''; there are"),
        ("train.=1", "no setting named '' in train"),
        ("train.epoch=1", "no setting named 'epoch' in train; did you mean 'epochs'?"),
        ("train.lora.rnk=1", "no setting named 'rnk' in lora in train; did you mean 'rank'?"),
        ("train.epochs=x", "epochs in train must be a number, not 'x'"),
        ("train.epochs.x=1", "epochs in train must be a number, not {'x': 1}"),
        ("seed.x=1", "seed must be a whole number, not {'x': 1}"),
        ("seed=-1", "seed must be greater than or equal to 0, not -1"),
        ("train.epochs=[1", "the '[' that opens here lacks a ',' or its ']'; complete it"),
        ("train.epochs={a: 1, a: 2}", "'a' is already on line 1; keep one of the two"),
        ("train.epochs=!!python/name:os.system x", "a recipe takes no tag"),
        ("train.epochs=.inf", ".inf is not a finite number"),
        ("train.epochs=*x", "*x repeats something named &x"),
        ("train.epochs=\udcff", "byte 0xed is not UTF-8"),
        ("train.\udcff=1", "no setting has such a name; write STAGE.SETTING=VALUE"),
        ("train.\0=1", "no setting has such a name; write STAGE.SETTING=VALUE"),
        ("train" + ".x" * 40 + "=1", "no setting has such a name; write STAGE.SETTING=VALUE"),
        ("train.epochs=" + "[" * 99, "more than 32 lists and mappings inside each other"),
        ("train.epochs=" + "a" * (1 << 20) + "b", "the file has 1,048,577 bytes"),
    ],
    ids=lambda text: text[:30].encode("unicode_escape").decode(),
)
def test_a_wrong_set_gets_a_sentence_that_quotes_it(
    folder: Folder, override: str, sentence: str
) -> None:
    found = folder.problems(TRAINING, override)
    assert len(found) == 1
    assert re.match(rf"--set {re.escape(override[:12])}", found[0]) or not override.isprintable()
    assert f": {sentence}" in found[0], found
    assert len(found[0]) < 250


def test_all_wrong_sets_are_reported_at_once(folder: Folder) -> None:
    assert len(folder.problems(TRAINING, "name=y", "trian.x=1", "train.epochs=[")) == 3


@pytest.mark.parametrize("stages", ["", "stages: 3", "stages: {train: 1}", "stages: []"])
def test_set_does_not_hide_that_the_stages_are_wrong(folder: Folder, stages: str) -> None:
    assert "stages" in folder.problems(f"name: x\n{stages}\n", "train.epochs=1")[0]


# Every way to write one recipe


Setting = tuple[tuple[str, ...], Any]
WHOLE: list[tuple[str, dict[str, Any], list[Setting]]] = [
    ("ingest", {"stage": "ingest"}, [(("sources",), ["a", "b"]), (("format",), "messages")]),
    (
        "in.gest",
        {"stage": "ingest", "name": "in.gest"},
        [(("sources",), ["c"]), (("max_bad_fraction",), 0.25)],
    ),
    (
        "clean",
        {"stage": "clean"},
        [(("min_reply_chars",), 4), (("replacements", "name"), "A"), (("replacements", "x"), "B")],
    ),
    ("window", {"stage": "window"}, [(("mode",), "conversational"), (("sliding_turns",), [4])]),
    ("split", {"stage": "split"}, [(("eval_fraction",), 0.5)]),
    ("tokenize", {"stage": "tokenize"}, [(("max_tokens",), 512)]),
    (
        "teach",
        {"stage": "train", "name": "teach"},
        [
            (("epochs",), 2.5),
            (("lora", "rank"), 8),
            (("lora", "target_modules"), ["q_proj"]),
            (("checkpoints", "keep_best"), 1),
        ],
    ),
]
WORDS: list[Setting] = [(("base_model",), "a/b"), (("seed",), 5)]


def put(settings: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        settings = settings.setdefault(part, {})
    settings[path[-1]] = value


@st.composite
def ways(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The recipe WHOLE as a base, a recipe over it, and --set texts."""
    base: dict[str, Any] = {"name": "base"}
    own: dict[str, Any] = {"name": "x", "extends": "data.yaml"}
    sets: list[str] = []
    decoys = st.sampled_from([None, 3, "decoy", [], {"decoy": 1}])

    def write(setting: Setting, prefix: str, layers: list[dict[str, Any] | None]) -> None:
        """In one layer; those below it may say anything else."""
        path, value = setting
        there = [n for n, layer in enumerate(layers) if layer is not None]
        chosen = draw(st.sampled_from([*there, len(layers)]))
        for n in there:
            if n < chosen and draw(st.booleans()):
                put(layers[n] or {}, path, draw(decoys))
        if chosen < len(layers):
            layer = layers[chosen]
            assert layer is not None
            put(layer, path, value)
        else:
            name = prefix + ".".join(path)
            if draw(st.booleans()):
                sets.append(f"{name}={json.dumps(draw(decoys))}")
            sets.append(f"{name}={json.dumps(value)}")

    for setting in WORDS:
        write(setting, "", [base, own])
    in_base = draw(st.lists(st.booleans(), min_size=len(WHOLE), max_size=len(WHOLE)))
    for index, (name, head, stage_settings) in enumerate(WHOLE):
        # A new stage is placed by its neighbours.
        near = in_base[max(0, index - 1) : index + 2]
        is_own = not all(near) or draw(st.booleans())
        layers = [dict(head) if in_base[index] else None, dict(head) if is_own else None]
        for setting in stage_settings:
            write(setting, f"{name}.", layers)
        for recipe_data, layer in zip((base, own), layers, strict=True):
            if layer is not None:
                recipe_data.setdefault("stages", []).append(layer)
    return base, own, sets


def whole() -> dict[str, Any]:
    data: dict[str, Any] = {"name": "x", "stages": []}
    for path, value in WORDS:
        put(data, path, value)
    for _, head, stage_settings in WHOLE:
        entry = dict(head)
        for path, value in stage_settings:
            put(entry, path, value)
        data["stages"].append(entry)
    return data


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with TemporaryDirectory() as path:
        yield Path(path)


@given(way=ways())
@settings(max_examples=150, deadline=None)
def test_every_way_to_write_a_recipe_gives_the_same_steps(
    scratch: Path, way: tuple[dict[str, Any], dict[str, Any], list[str]]
) -> None:
    base, own, sets = way
    (scratch / "data.yaml").write_text(json.dumps(base))
    expected = recipe.compile(json.dumps(whole()).encode(), "whole.yaml")
    found = recipe.compile(json.dumps(own).encode(), str(scratch / "r.yaml"), sets)
    assert found.steps == expected.steps
    assert (found.name, found.base_model) == (expected.name, expected.base_model)
