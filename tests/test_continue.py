"""Training that goes on from the accepted model, from the recipe to the weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runner.chat import learned
from runner.engine import lineage, lock, opened, recipe, release
from runner.engine.events import Event
from runner.errors import PreconditionError, RunnerError
from runner.model import adapter, continuing, load, lora, packing, token_files
from tests import tiny_models
from tests.test_plan_is_apply import TRAINING, check_that_plan_is_apply
from tests.workspaces import apply, causes, chat, make, planned, ran, states

pytestmark = pytest.mark.usefixtures("one_thread")

CONTINUED = TRAINING.replace(
    "stages:\n", "retrain: {mode: continue, replay_fraction: 0.5}\nstages:\n"
)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a first model, accepted: to be copied."""
    root = tmp_path_factory.mktemp("first")
    tiny_models.folder(root / "base")
    apply(make(root, CONTINUED))
    return root


@pytest.fixture(scope="module")
def second(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after new chats were learned."""
    root = tmp_path_factory.mktemp("second")
    shutil.copytree(first, root, symlinks=True, dirs_exist_ok=True)
    path = root / "recipes" / "small.yaml"
    add(path)
    assert states(path)["train"] == "maybe"
    apply(path)
    return root


@pytest.fixture
def grown(second: Path, tmp_path: Path) -> Path:
    """The recipe of a copy of that."""
    shutil.copytree(second, tmp_path, symlinks=True, dirs_exist_ok=True)
    return tmp_path / "recipes" / "small.yaml"


@pytest.fixture
def path(first: Path, tmp_path: Path) -> Path:
    """The recipe of a copy of that workspace."""
    shutil.copytree(first, tmp_path, symlinks=True, dirs_exist_ok=True)
    return tmp_path / "recipes" / "small.yaml"


def locked(path: Path) -> lock.Lock:
    return lock.read(lock.path_of(path))


def model(path: Path) -> str:
    fact = locked(path).of_stage("train")
    assert fact is not None
    return fact.output


def folder(path: Path, stage: str = "train") -> Path:
    return (path.parents[1] / "artifacts" / "small" / stage).resolve()


def add(path: Path, name: str = "new", *more: str) -> None:
    """Chats that fall to training, whatever their names."""
    for number in range(3):
        texts = (f"question {number} of {name}", f"answer {number} of {name}", *more)
        chat(path.parents[1] / "chats" / f"{name}-{number}.json", *texts)


# The key


def test_the_first_model_has_no_parent_and_is_the_first_release(path: Path) -> None:
    fact, current = locked(path).of_stage("train"), locked(path).release
    assert fact is not None
    assert current is not None
    assert "parent" not in fact.parts
    assert (current.number, current.outputs) == (1, {"train": fact.output})


def test_with_nothing_new_nothing_runs(path: Path) -> None:
    log: list[Event] = []
    apply(path, log.append)
    assert log == []
    assert set(states(path).values()) == {"skip"}


def test_new_data_is_learned_by_the_accepted_model(first: Path, grown: Path) -> None:
    before = model(first / "recipes" / "small.yaml")
    fact = locked(grown).of_stage("train")
    assert fact is not None
    assert fact.parts["parent"] == before
    assert fact.parts["replay"] == 0.5
    assert fact.output != before


def test_the_chain_of_models_is_in_the_lockfile(first: Path, grown: Path) -> None:
    models = [model(first / "recipes" / "small.yaml"), model(grown)]
    found = locked(grown).releases
    assert [one.outputs["train"] for one in found] == models
    assert [one.models["train"].get("parent") for one in found] == [None, models[0]]


def test_another_setting_says_what_it_continues_from(path: Path) -> None:
    path.write_text(path.read_text().replace("0.0001", "0.0002"))
    assert "it continues from release 1" in causes(path, "train")
    assert states(path)["train"] == "run"


def test_another_rank_is_trained_anew_and_plan_says_why(grown: Path) -> None:
    path = grown
    path.write_text(path.read_text().replace("rank: 2", "rank: 4"))
    found = causes(path, "train")
    assert "it is trained anew: lora is another one than in release 2" in found
    check_that_plan_is_apply(path)
    fact = locked(path).of_stage("train")
    assert fact is not None
    assert "parent" not in fact.parts


def test_mode_anew_trains_without_a_parent(grown: Path) -> None:
    path = grown
    path.write_text(path.read_text().replace("mode: continue, ", ""))
    assert causes(path, "train") == ["it is trained anew"]
    check_that_plan_is_apply(path)


def test_another_replay_fraction_alone_runs_nothing(grown: Path) -> None:
    path = grown
    path.write_text(path.read_text().replace("replay_fraction: 0.5", "replay_fraction: 0.1"))
    assert set(states(path).values()) == {"skip"}


def test_a_parent_that_is_gone_blocks_the_training(path: Path) -> None:
    shutil.rmtree(folder(path))
    add(path)
    with pytest.raises(PreconditionError, match=r"continues from the model .* not in the store"):
        apply(path)


def test_a_damaged_parent_is_not_gone_on_from(path: Path) -> None:
    weights = folder(path) / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    add(path)
    with pytest.raises(PreconditionError, match="the training that is continued is damaged"):
        apply(path)


def test_with_nothing_to_learn_the_model_stays_as_it_is(path: Path) -> None:
    before = model(path)
    path.write_text(path.read_text().replace("0.0001", "0.0002"))
    log: list[Event] = []
    states = check_that_plan_is_apply(path)
    assert states["train"] == "run"
    assert model(path) == before
    (path.parents[1] / "chats" / "chat-0.json").unlink()
    apply(path, log.append)
    said = " ".join(event["text"] for event in log if event["event"] == "verdict")
    assert "nothing is new to the model, so it stays as it is" in said
    assert "only a training anew forgets" in said
    assert model(path) == before


def test_after_a_rollback_it_continues_from_that_model(first: Path, grown: Path) -> None:
    path, before = grown, model(first / "recipes" / "small.yaml")
    with opened.at(path) as current:
        release.rollback(current)
    assert set(states(path).values()) == {"skip"}
    add(path, "third")
    apply(path)
    fact = locked(path).of_stage("train")
    assert fact is not None
    assert fact.parts["parent"] == before


# What was learned


def test_a_model_lists_all_conversations_that_it_has_met(first: Path, grown: Path) -> None:
    before = first / "recipes" / "small.yaml"
    for path in (before, grown):
        chains = (folder(path, "split") / "chains.jsonl").read_text().splitlines()
        found = learned.read(folder(path))
        assert found is not None
        assert found.all == {json.loads(line)["conversation"] for line in chains}
        assert learned.count_new(folder(path, "split"), folder(path)) == 0
    assert learned.count_new(folder(grown, "split"), folder(before)) == 3


def test_a_run_that_has_nothing_to_do_loads_neither_pydantic_nor_yaml(path: Path) -> None:
    apply(path)  # and so compiled by the code as it is now
    code = (
        "import sys; from pathlib import Path; from runner.engine import execute, opened\n"
        f"with opened.at(Path({str(path)!r})) as current:\n"
        "    execute.apply(current, print)\n"
        "print([name for name in ('pydantic', 'yaml', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# The weights


def files(work: Path, rows: Sequence[token_files.Row], name: str = "tokens") -> Path:
    return tiny_models.token_files(work / name, rows, tiny_models.conversations(3, "eval"))


def continued(base: Path, tokens: Path, work: Path, parent: Path, **more: Any) -> dict[str, Any]:
    return tiny_models.trained(base, tokens, work, parent=parent, **{"replay": 0.0, **more})


@pytest.fixture(scope="module")
def taught(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was taught twelve conversations."""
    work = tmp_path_factory.mktemp("taught")
    tiny_models.trained(base, files(work, tiny_models.conversations(12)), work)
    return work / "output"


MORE = [*tiny_models.conversations(12), *tiny_models.conversations(4, "new")]


def test_only_new_conversations_are_trained_where_nothing_is_replayed(
    base: Path, taught: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    tokens = files(tmp_path, MORE)
    done = continued(base, tokens, tmp_path, taught, events=events, epochs=1)
    length = sum(len(row.input_ids) for row in tiny_models.conversations(4, "new"))
    assert done["tokens"] == length
    said = [event["text"] for event in events if event["event"] == "verdict"]
    assert said[0] == "it goes on from the model before: 4 new conversations, 0 of 12 again"


def test_the_share_to_replay_is_the_same_each_time_and_about_as_large_as_asked(
    tmp_path: Path, taught: Path
) -> None:
    ids = [f"{number:016x}" for number in range(2000)]
    found = learned.replayed(ids, 0.1, {"seed": 1})
    assert found == learned.replayed(ids, 0.1, {"seed": 1})
    assert found != learned.replayed(ids, 0.1, {"seed": 2})
    assert found < learned.replayed(ids, 0.2, {"seed": 1})
    assert 150 < len(found) < 250


def test_all_of_the_old_is_seen_again_with_a_share_of_1(
    base: Path, taught: Path, tmp_path: Path
) -> None:
    done = continued(base, files(tmp_path, MORE), tmp_path, taught, replay=1.0, epochs=1)
    assert done["tokens"] == sum(len(row.input_ids) for row in MORE)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dora": True},
        {"rslora": True},
        {"modules_to_save": ("embed_tokens",)},
        {"method": "full"},
    ],
    ids=str,
)
def test_training_starts_from_the_weights_of_the_parent(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    tokens = files(tmp_path, tiny_models.conversations(12))
    before = tiny_models.trained(base, tokens, one, epochs=3, **settings)
    again = files(tmp_path, MORE, "more")
    # A rate that changes nothing, so that what was taken over is what is written.
    after = continued(
        base, again, tmp_path / "two", one / "output", learning_rate=1e-30, **settings
    )
    kept = before["eval_loss"]
    assert after["eval_loss_before"] == pytest.approx(kept, rel=2e-3)
    name = "model" if settings.get("method") == "full" else "adapter_model"
    weights = [
        load_file(work / "output" / f"{name}.safetensors") for work in (one, tmp_path / "two")
    ]
    assert weights[0].keys() == weights[1].keys()
    for tensor in weights[0]:
        assert torch.equal(weights[0][tensor], weights[1][tensor]), tensor


def test_a_continued_training_learns_what_is_new(base: Path, taught: Path, tmp_path: Path) -> None:
    tokens = tiny_models.token_files(tmp_path / "tokens", MORE, tiny_models.conversations(4, "new"))
    done = continued(base, tokens, tmp_path, taught, epochs=10)
    assert done["eval_loss"] < done["eval_loss_before"]


def test_a_training_that_was_stopped_goes_on_to_the_same_bytes(
    base: Path, taught: Path, tmp_path: Path
) -> None:
    tokens = files(tmp_path, MORE)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings: dict[str, Any] = {"replay": 0.5, "epochs": 4, "every_steps": 1}
    continued(base, tokens, whole, taught, **settings)

    def die(event: Event) -> None:
        if event["event"] == "checkpoint" and event["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        continued(base, tokens, parts, taught, emit=die, **settings)
    steps: list[Event] = []
    continued(base, tokens, parts, taught, events=steps, **settings)
    assert next(event["step"] for event in steps if "loss" in event) == 4
    for name in ("adapter_model.safetensors", "conversations.txt"):
        assert (whole / "output" / name).read_bytes() == (parts / "output" / name).read_bytes()


def test_an_adapter_of_another_shape_is_refused(base: Path, taught: Path, tmp_path: Path) -> None:
    tokens = files(tmp_path, MORE)
    with pytest.raises(RunnerError, match="has another shape than this training: r"):
        continued(base, tokens, tmp_path, taught, rank=8)


def test_a_model_of_another_base_is_refused(taught: Path, tmp_path: Path) -> None:
    other = tiny_models.folder(tmp_path / "other", "qwen3")
    with pytest.raises(RunnerError, match="was trained on a LlamaForCausalLM"):
        continued(other, files(tmp_path, MORE), tmp_path, taught)


def test_rows_that_are_chosen_are_packed_anew(tmp_path: Path, taught: Path) -> None:
    tokens = files(tmp_path, MORE)
    rows = token_files.read(tokens / "train.arrow")
    held_out = token_files.read(tokens / "eval.arrow")
    packing.write(tokens, rows.lengths, rows.conversations, 64)
    found = continuing.chosen(tokens, rows, held_out, parent=taught, replay=0.0, seed=1)
    assert found.packs is not None
    lengths = [len(row.input_ids) for row in found.rows]
    totals: dict[int, int] = {}
    for pack, length in zip(found.packs, lengths, strict=True):
        totals[pack] = totals.get(pack, 0) + length
    assert len(found.packs) == len(found.rows) == 4
    assert max(totals.values()) <= 64
    assert len(totals) < 4


def test_the_rows_of_a_conversation_stay_together(tmp_path: Path, taught: Path) -> None:
    rows = [tiny_models.row("new0", 20, [(6, 20, 1.0)]), tiny_models.row("new0", 14, [(6, 14, 1)])]
    tokens = files(tmp_path, [*tiny_models.conversations(12), *rows])
    every = token_files.read(tokens / "train.arrow")
    held_out = token_files.read(tokens / "eval.arrow")
    found = continuing.chosen(tokens, every, held_out, parent=taught, replay=0.0, seed=1)
    assert found.rows.conversations == ["new0", "new0"]
    assert [len(row.input_ids) for row in found.rows] == [20, 14]


def test_the_adapter_that_is_taken_over_is_the_one_on_the_disk(
    base: Path, taught: Path, tmp_path: Path
) -> None:
    plain = load.causal_lm(base, dtype="float32", device="cpu")
    fresh = lora.attach(plain, rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    lora.take(fresh, taught)
    lora.write(fresh, tmp_path)
    for name in (lora.WEIGHTS_FILE, lora.CONFIG_FILE):
        assert (tmp_path / name).read_bytes() == (taught / name).read_bytes()
    assert adapter.is_adapter(tmp_path)


# The rule by itself


def test_no_other_stage_than_train_has_a_parent(path: Path) -> None:
    with opened.at(path) as current:
        retrain = current.compiled.retrain
        for step in current.compiled.steps:
            if step.kind != "train":
                assert lineage.parent(step, {}, locked(path), retrain) == ({}, "")


def test_without_retrain_there_is_no_parent() -> None:
    compiled = recipe.compile(TRAINING.encode(), "r.yaml")
    assert lineage.parent(compiled.step("train"), {}, lock.Lock(), compiled.retrain) == ({}, "")


def test_a_plan_knows_what_the_training_goes_on_from(path: Path) -> None:
    path.write_text(path.read_text().replace("0.0001", "0.0002"))
    assert planned(path)["train"].parent == model(path)
    log: list[Event] = []
    apply(path, log.append)
    assert ran(log) == ["train"]
