import json
from pathlib import Path

import pytest

from runner.engine import recipe
from runner.errors import RecipeError
from runner.stages.schema import STAGES, Recipe, json_schema

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("[!p]*.yaml"))  # presets are there to be extended


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe.compile(text.encode(), "r.yaml")
    return caught.value.message.split("\n")


def in_stage(setting: str, stage: str = "train") -> str:
    return f"name: x\nbase_model: a/b\nstages:\n  - stage: {stage}\n    {setting}\n"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_right_and_names_its_schema(path: Path) -> None:
    data = path.read_bytes()
    assert recipe.compile(data, path.name).steps
    first = data.decode().split("\n")[0]
    assert first == f"{recipe.MODELINE}../schemas/recipe.schema.json"


def test_the_committed_schema_is_the_one_of_the_classes() -> None:
    committed = json.loads((ROOT / "schemas" / "recipe.schema.json").read_text())
    assert committed == json_schema(), "run `runner schema --write schemas/recipe.schema.json`"


def test_editors_ask_for_stages_where_no_other_recipe_gives_them() -> None:
    schema = json_schema()
    assert schema["required"] == ["name"]
    assert schema["anyOf"] == [{"required": ["stages"]}, {"required": ["extends"]}]


def test_every_setting_has_a_sentence_for_editors() -> None:
    schema = json_schema()
    for name, definition in [("Recipe", schema), *schema["$defs"].items()]:
        for setting, described in definition["properties"].items():
            if setting != "stage":
                assert described.get("description"), f"{name}.{setting} has no docstring"


def test_all_mistakes_are_reported_at_once_with_their_lines() -> None:
    found = problems(
        "name: x\n"
        "bas_model: a/b\n"
        "stages:\n"
        "  - stage: ingest\n"
        "    source: [a]\n"
        "  - stage: windw\n"
        "  - stage: split\n"
        "    eval_fraction: 1.5\n"
    )
    assert found == [
        "r.yaml:2: no setting named 'bas_model' in the recipe; did you mean 'base_model'?",
        "r.yaml:4: ingest needs `sources:`",
        "r.yaml:5: no setting named 'source' in ingest; did you mean 'sources'?",
        "r.yaml:6: no stage named 'windw'; did you mean 'window'?; stages are "
        "ingest, clean, window, split, tokenize, train, evaluate, export",
        "r.yaml:8: eval_fraction in split must be less than 1, not 1.5",
    ]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "min_interval: 6 hours",
            "retrain.min_interval cannot be '6 hours'; write 90s, 30min, 6h or 1d",
        ),
        ("at: 22-6", "retrain.at cannot be '22-6'; write 22:00-06:00"),
        (
            "notify: {webhook: example.org}",
            "retrain.notify.webhook cannot be 'example.org'; write a URL that begins with https://",
        ),
    ],
)
def test_a_value_of_another_shape_is_told_what_to_write(setting: str, sentence: str) -> None:
    found = problems(
        f"name: x\nretrain: {{{setting}}}\nstages:\n  - {{stage: ingest, sources: [a]}}\n"
    )
    assert [problem.partition(": ")[2] for problem in found] == [sentence]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("learning_rate: fast", "learning_rate in train must be a number, not 'fast'"),
        ("learning_rate: '1e-4'", "learning_rate in train must be a number, not '1e-4'"),
        ("epochs: 0", "epochs in train must be greater than 0, not 0"),
        ("batch_size: 1.5", "batch_size in train must be a whole number, not 1.5"),
        (
            "method: qlra",
            "method in train must be 'lora', 'qlora' or 'full', not 'qlra'; did you mean 'qlora'?",
        ),
        ("lora: {rnk: 3}", "no setting named 'rnk' in lora in train; did you mean 'rank'?"),
        ("max_token: 9", "no setting named 'max_token' in train; did you mean 'max_steps'?"),
        (
            "{method: full, lora: {rank: 3}}",
            "train has lora settings but method is full; delete one of the two",
        ),
    ],
)
def test_a_wrong_value_gets_a_sentence(setting: str, sentence: str) -> None:
    text = in_stage(setting)
    if setting.startswith("{"):
        text = f"name: x\nstages:\n  - {{stage: train, {setting[1:]}\n"
    assert any(problem.endswith(sentence) for problem in problems(text)), problems(text)


def test_a_number_in_yaml_1_2_is_a_number() -> None:
    text = "name: x\nbase_model: m\nstages: [{stage: ingest, sources: [a]}, {stage: window}, "
    text += "{stage: split}, {stage: tokenize}, {stage: train, learning_rate: 2e-5}]"
    assert recipe.compile(text.encode(), "r").step("train").settings == {"learning_rate": 2e-5}


def test_a_stage_without_what_it_reads_says_what_is_missing() -> None:
    assert problems("name: x\nstages:\n  - stage: window\n") == [
        "r.yaml:3: window needs conversations; put a stage ingest or clean above it"
    ]


def test_a_base_model_is_asked_for_only_where_it_is_used() -> None:
    text = "name: x\nstages:\n  - {stage: ingest, sources: [a]}\n  - stage: window\n"
    assert recipe.compile(text.encode(), "r.yaml").base_model is None
    more = text + "  - stage: split\n  - stage: tokenize\n"
    assert problems(more) == ["r.yaml:6: tokenize needs a model; add `base_model:` to the recipe"]


def test_two_stages_of_one_kind_need_names() -> None:
    text = (
        "name: x\nstages:\n  - {stage: ingest, sources: [a]}\n  - {stage: ingest, sources: [b]}\n"
    )
    assert problems(text) == ["r.yaml:4: a second stage is called 'ingest'; give it a `name:`"]


def test_input_overrides_the_nearest() -> None:
    text = """\
name: x
stages:
  - {stage: ingest, name: old, sources: [a]}
  - {stage: ingest, name: new, sources: [b]}
  - {stage: window, input: old}
"""
    assert recipe.compile(text.encode(), "r").step("window").inputs == {"conversations": "old"}
    wrong = text.replace("input: old", "input: odl")
    assert problems(wrong) == ["r.yaml:5: no stage above is called 'odl'; did you mean 'old'?"]


def test_a_split_is_read_beside_the_conversations_it_was_made_of() -> None:
    text = """\
name: x
base_model: m
stages:
  - {stage: ingest, name: chats, sources: [a]}
  - stage: window
  - stage: split
  - {stage: ingest, name: others, sources: [b]}
  - stage: tokenize
"""
    inputs = recipe.compile(text.encode(), "r").step("tokenize").inputs
    assert inputs == {"split": "split", "conversations": "chats"}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_recipe_says_so(text: str) -> None:
    assert problems(text)[0] == "r.yaml: the recipe is empty"


def test_defaults_stay_out_of_the_key() -> None:
    short = recipe.compile(in_stage("sources: [a]", "ingest").encode(), "r").steps[0]
    long = recipe.compile(in_stage("sources: [a]\n    format: auto", "ingest").encode(), "r").steps[
        0
    ]
    assert short.settings == long.settings == {}


def test_a_compiled_recipe_survives_the_cache() -> None:
    compiled = recipe.compile(RECIPES[0].read_bytes(), "r")
    assert recipe.Compiled.from_plain(json.loads(json.dumps(compiled.plain()))) == compiled


def test_defaults_are_frozen() -> None:
    """A changed default gives another output under an old key: raise the stage's `version`."""
    defaults = {
        kind: {
            "version": stage.version,
            **{
                name: field.get_default(call_default_factory=True)
                for name, field in stage.model_fields.items()
                if not field.is_required() and name not in ("name", "input")
            },
        }
        for kind, stage in STAGES.items()
    }
    text = json.dumps(defaults, indent=1, sort_keys=True, default=lambda v: v.model_dump())
    assert text == (Path(__file__).parent / "golden" / "defaults.json").read_text()


def test_the_recipe_class_has_no_other_fields() -> None:
    fields = ["name", "extends", "base_model", "seed", "retrain", "stages"]
    assert list(Recipe.model_fields) == fields


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("gguf: []\n    ollama: true", "has ollama but no gguf level"),
        ("gguf: []\n    adapter: false\n    merged: false", "would write nothing"),
    ],
)
def test_an_export_that_cannot_be_is_found_at_once(settings: str, sentence: str) -> None:
    assert any(sentence in problem for problem in problems(in_stage(settings, "export")))
