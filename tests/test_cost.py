"""What a plan says it will cost, and the disk that has to have room for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runner import disk
from runner.engine import cost, key, opened
from runner.engine.cost import Cost
from runner.errors import PreconditionError
from runner.model import load, source
from runner.stages.stage import Written
from runner.ui import plan as shown_plan
from tests import tiny_models
from tests.test_plan_is_apply import copy_of_trained
from tests.workspaces import DATA_RECIPE, apply, chat, make, planned, ran, small_disk

TRAINING = """\
name: small
base_model: ./base
stages:
  - {stage: ingest, sources: [chats]}
  - {stage: window}
  - {stage: split, eval_fraction: 0.2}
  - {stage: tokenize, max_tokens: 64}
  - stage: train
    max_steps: 76
    batch_size: 1
    lora: {rank: 64}
    checkpoints: {every_steps: 1, keep_best: 76}
"""


def costs(recipe: Path) -> dict[str, Cost]:
    with opened.at(recipe) as current:
        return {one.stage: one for one in cost.of(current, current.plan())}


def shown(recipe: Path) -> str:
    with opened.at(recipe) as current:
        return shown_plan.text(shown_plan.shown(current, opened.plan.EVERYTHING))


def test_a_first_run_reads_all_files_and_has_taken_no_time_yet(tmp_path: Path) -> None:
    found = costs(make(tmp_path))
    assert {name: one.files for name, one in found.items()} == {
        "ingest": 6,
        "window": 0,
        "split": 0,
    }
    assert {one.seconds for one in found.values()} == {None}


def test_what_is_not_made_yet_counts_with_the_size_it_will_have(tmp_path: Path) -> None:
    found = costs(make(tmp_path))
    sources = disk.size(tmp_path / "chats")
    assert found["ingest"].bytes_kept == round(1.25 * sources)
    assert found["window"].bytes_kept == found["ingest"].bytes_kept
    assert found["split"].bytes_kept == 2 * found["ingest"].bytes_kept


def test_only_the_files_that_changed_are_read_and_the_last_time_is_known(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    chat(tmp_path / "chats" / "new.json", "a new", "chat")
    chat(tmp_path / "chats" / "chat-0.json", "other", "words")
    (tmp_path / "chats" / "chat-1.json").unlink()
    found = costs(recipe)
    assert found["ingest"].files == 2
    assert found["ingest"].seconds is not None
    assert "ingest  run: 1 file added: chats/new.json; 1 file removed" in shown(recipe)
    assert "(2 files to read, last time 0." in shown(recipe)


def test_another_setting_reads_all_files(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    recipe.write_text(DATA_RECIPE.replace("[chats]", "[chats]\n    persona: me"))
    assert costs(recipe)["ingest"].files == 6


def test_what_was_made_before_is_as_large_as_last_time(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    size = disk.size((tmp_path / "artifacts" / "small" / "split").resolve())
    recipe.write_text(DATA_RECIPE.replace("0.2", "0.3"))
    assert [(one.stage, one.bytes_kept) for one in costs(recipe).values()] == [("split", size)]


def test_with_nothing_to_do_nothing_is_counted(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    assert costs(recipe) == {}
    assert shown(recipe) == "nothing to do"


def test_json_has_the_cost_of_each_stage(tmp_path: Path) -> None:
    with opened.at(make(tmp_path)) as current:
        record = shown_plan.record(shown_plan.shown(current, opened.plan.EVERYTHING))
    (ingest, *_) = json.loads(json.dumps(record))
    size = round(1.25 * disk.size(tmp_path / "chats"))
    assert ingest["cost"] == {
        "files": 6,
        "seconds": None,
        "bytes": size,
        "bytes_meanwhile": size,
        "written": [
            {"what": "conversations", "bytes": size, "temporary": False, "once": False},
            {
                "what": "conversations, file by file",
                "bytes": size,
                "temporary": True,
                "once": False,
            },
        ],
    }


def test_an_apply_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=0)
    for number in range(60):
        chat(tmp_path / "chats" / f"long-{number}.json", "q" * 20_000, f"a{number}" * 10_000)
    with small_disk(tmp_path / "artifacts", 3_000_000):
        said = r"the disk at .*artifacts has \d\.\d MB free, and this run writes about \d\d\.\d MB"
        with pytest.raises(PreconditionError, match=said) as caught:
            apply(recipe)
        assert caught.value.exit_code == 3
        message = caught.value.message
        for part in ("ingest: conversations ", "window: chains ", "split: split "):
            assert part in message
        assert "`runner gc` shows what may go" in caught.value.hint
        assert not (tmp_path / "artifacts" / "runs").exists()
        assert not (tmp_path / "artifacts" / "store").exists()
        assert not recipe.with_suffix(".lock").exists()
        assert "MB are free at" in shown(recipe)
        assert "too little, and apply will refuse" in shown(recipe)


def test_a_run_that_fills_most_of_the_disk_is_warned_about(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=0)
    for number in range(80):
        chat(tmp_path / "chats" / f"long-{number}.json", "q" * 20_000, f"a{number}" * 10_000)
    with opened.at(recipe) as current:
        (room,) = cost.rooms(current, cost.of(current, current.plan()))
    for size, is_warned in (
        (1.1 * room.needed + disk.MARGIN_BYTES, True),
        (2 * room.needed, False),
    ):
        log: list[dict[str, Any]] = []
        with small_disk(tmp_path / "artifacts", round(size)):
            apply(recipe, log.append)
        texts = [event["text"] for event in log if event["event"] == "warning"]
        assert any("this run writes about" in text for text in texts) == is_warned
        recipe.with_suffix(".lock").unlink()


def test_a_recipe_that_keeps_76_checkpoints_where_60_fit_is_refused(tmp_path: Path) -> None:
    recipe = make(tmp_path, TRAINING)
    tiny_models.folder(tmp_path / "base")
    with opened.at(recipe) as current:
        training = cost.of(current, current.plan())[-1]
    assert training.stage == "train"
    assert [one.what.split(",")[0] for one in training.written] == [
        "adapter",
        "3 checkpoints with optimizer state",
        "73 checkpoints without optimizer state",
    ]
    room = round(training.bytes_meanwhile * 60 / 76)
    with small_disk(tmp_path / "artifacts", room):
        said = shown(recipe)
        (total,) = (line for line in said.splitlines() if line.startswith("in all about"))
        assert "too little, and apply will refuse" in total
        assert "MB more while it runs" in said
        with pytest.raises(PreconditionError, match="free, and this run writes about") as caught:
            apply(recipe)
        assert "73 checkpoints without optimizer state" in caught.value.message
        assert not (tmp_path / "artifacts" / "store").exists()

        recipe.write_text(TRAINING.replace(", keep_best: 76", ""))
        log: list[dict[str, Any]] = []
        apply(recipe, log.append)
        assert "train" in ran(log)
        assert {one.state for one in planned(recipe).values()} == {"skip"}


def test_checkpoints_of_an_interrupted_training_are_not_counted_again(tmp_path: Path) -> None:
    recipe = copy_of_trained(tmp_path)
    recipe.write_text(recipe.read_text().replace("0.0001", "0.0002"))
    before = costs(recipe)["train"]
    parts = planned(recipe)["train"].parts
    assert parts is not None
    left = tmp_path / "artifacts" / "scratch" / key.of(parts)[:32] / "checkpoint"
    left.mkdir(parents=True)
    (left / "weights").write_bytes(bytes(1000))
    after = costs(recipe)["train"]
    assert after.bytes_meanwhile == before.bytes_meanwhile - 1000
    assert after.bytes_kept == before.bytes_kept


def test_a_checkpoint_has_a_size_and_the_disk_room_for_some(tmp_path: Path) -> None:
    recipe = copy_of_trained(tmp_path)
    with opened.at(recipe) as current:
        found = cost.checkpoints_that_fit(current, "train")
    assert found is not None
    each, more = found
    assert 0 < each < 1_000_000
    assert more == pytest.approx(shutil.disk_usage(tmp_path).free / each, rel=0.05)


GGUF = """\
name: small
base_model: {gguf}
stages:
  - {{stage: ingest, sources: [chats]}}
  - {{stage: window}}
  - {{stage: split}}
  - {{stage: tokenize}}
  - {{stage: train}}
  - {{stage: export}}
"""


def converted(found: dict[str, Cost]) -> dict[str, int]:
    """The stages that are said to put the base model into the cache, and its bytes."""
    return {name: one.bytes for name, c in found.items() for one in c.written if one.once}


def test_a_gguf_base_model_is_counted_once_and_not_at_all_when_it_is_converted(
    tmp_path: Path, smollm2_gguf: Path, smollm2: Path
) -> None:
    recipe = make(tmp_path, GGUF.format(gguf=smollm2_gguf))
    counted = converted(costs(recipe))
    assert list(counted) == ["tokenize"]
    assert counted["tokenize"] == pytest.approx(disk.size(smollm2), rel=0.001)
    cache = tmp_path / "artifacts" / "cache"
    cache.mkdir(parents=True)
    (cache / smollm2.name).symlink_to(smollm2)
    assert converted(costs(recipe)) == {}
    assert load.base_folder(source.path_of(str(smollm2_gguf), tmp_path), cache).samefile(smollm2)


def test_what_several_stages_name_is_counted_in_the_sum_once(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    made = (
        Cost("one", 0, None, (Written("a", 10), Written("cache", 100, once=True))),
        Cost("two", 0, None, (Written("b", 20), Written("c", 5, temporary=True))),
        Cost("three", 0, None, (Written("c", 7, temporary=True),)),
    )
    with opened.at(recipe) as current:
        (room,) = cost.rooms(current, made)
    assert room.needed == 10 + 100 + 20 + 7


def test_a_store_on_another_disk_has_a_sum_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tmp_path / "work")
    with small_disk(tmp_path / "store", 5_000_000):
        monkeypatch.setenv("RUNNER_STORE", str(tmp_path / "store"))
        made = (
            Cost("one", 0, None, (Written("a", 10), Written("cache", 100, once=True))),
            Cost("two", 0, None, (Written("c", 5, temporary=True),)),
        )
        with opened.at(recipe) as current:
            found = {room.place: room.needed for room in cost.rooms(current, made)}
        assert found == {tmp_path / "store": 10, tmp_path / "work" / "artifacts": 105}
