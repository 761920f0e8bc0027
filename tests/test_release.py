"""The gate, the current release, and the way back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from runner.engine import execute, gc, lock, opened, release, store, usage
from runner.engine.events import Event
from runner.engine.lock import Lock, Release
from runner.engine.opened import Opened
from runner.errors import PreconditionError, RecipeError
from runner.model import load, score, token_files
from runner.ui import status
from runner.watch.record import Folder
from tests import tiny_models
from tests.workspaces import apply, chat, git, grow_old, make, ran, run, states

RECIPE = """\
name: small
base_model: ./base
retrain: {max_loss_increase: 0.02}
stages:
  - {stage: ingest, sources: [chats]}
  - {stage: window}
  - {stage: split, eval_fraction: 0.2}
  - {stage: tokenize, max_tokens: 64}
  - {stage: train, epochs: 1, max_steps: 2, learning_rate: 0.0001, lora: {rank: 2, alpha: 4}}
  - {stage: evaluate, prompts: 1, reply_tokens: 4}
"""
TAUGHT = "max_steps: 20, learning_rate: 0.01"


@pytest.fixture
def current(tmp_path: Path) -> Iterator[Opened]:
    """A recipe that nothing was made of yet."""
    with opened.at(make(tmp_path, RECIPE)) as found:
        yield found


def kept(current: Opened, files: Mapping[str, str]) -> str:
    """An artifact in the store; its hash."""
    with store.staging(current.workspace) as staging:
        folder = staging / "output"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return store.publish(current.workspace, folder)


def report(
    current: Opened,
    losses: Mapping[str, float] | None = None,
    *,
    forgetting: float | None = None,
    rules: Mapping[str, float] | None = None,
    weight: float = 10.0,
    **more: Any,
) -> str:
    """A report as evaluate writes it, with a loss per token for each eval conversation."""
    lines = [
        json.dumps({"conversation": id, "nll": loss * weight, "weight": weight}) + "\n"
        for id, loss in ({"a": 2.0, "b": 3.0} if losses is None else losses).items()
    ]
    found = {
        "forgetting": forgetting,
        "max_forgetting": 0.1,
        "min_shares": {},
        "tuned": {"rules": dict(rules or {})},
        **more,
    }
    return kept(current, {"losses.jsonl": "".join(lines), "report.json": json.dumps(found)})


def made(current: Opened, model: str, measured: str | None) -> str:
    """The lockfile as after a run that made such a model and such a report; the model's hash."""
    output = kept(current, {"adapter_model.safetensors": model})
    found = lock.read(current.lock_path)
    inputs = {"train": {"tokens": "1" * 64}, "evaluate": {"model": output}}
    for stage, one in (("train", output), ("evaluate", measured)):
        if one is not None:
            parts = {"kind": stage, "version": 1, "inputs": inputs[stage]}
            names = [step.name for step in current.compiled.steps]
            found = lock.updated(found, lock.Fact(stage, one, parts), names)
    lock.write(current.lock_path, found)
    return output


def considered(current: Opened, model: str, measured: str | None) -> Event:
    """What the gate says of it."""
    made(current, model, measured)
    log: list[Event] = []
    release.consider(current, log.append)
    assert len(log) == 1
    return log[0]


def now(current: Opened) -> Release:
    found = lock.read(current.lock_path).release
    assert found is not None
    return found


def link(current: Opened, stage: str = "train") -> str:
    """The output that the link for people leads to."""
    return (current.links / "current" / stage).resolve().name


# The gate


def test_the_first_model_is_accepted(current: Opened) -> None:
    event = considered(current, "one", report(current))
    assert event == {
        "event": "release",
        "state": "accepted",
        "release": 1,
        "text": "release 1: the first model of small.yaml",
    }


def test_a_better_model_takes_the_place_of_the_current_one(current: Opened) -> None:
    considered(current, "one", report(current))
    event = considered(current, "two", report(current, {"a": 1.9, "b": 2.9}))
    assert (event["state"], event["release"]) == ("accepted", 2)
    assert event["text"] == (
        "release 2 takes the place of release 1: eval loss 2.500 → 2.400 (-4.0%) on the same 2"
        " conversations"
    )


def test_a_model_with_a_higher_loss_is_kept_aside(current: Opened) -> None:
    considered(current, "one", report(current))
    event = considered(current, "two", report(current, {"a": 2.1, "b": 3.1}))
    assert (event["state"], event["release"]) == ("kept aside", 1)
    assert event["text"] == (
        "the new model is kept aside, release 1 stays: eval loss 2.500 → 2.600 (+4.0%) on the same"
        f" 2 conversations, 2.0% more are allowed (`runner promote {current.path}` takes it all"
        " the same)"
    )


def test_a_loss_that_is_higher_by_no_more_than_allowed_is_accepted(current: Opened) -> None:
    considered(current, "one", report(current, {"a": 2.0}))
    assert considered(current, "two", report(current, {"a": 2.03}))["state"] == "accepted"


def test_only_conversations_that_both_have_measured_are_compared(current: Opened) -> None:
    considered(current, "one", report(current, {"a": 2.0, "gone": 0.1}))
    event = considered(current, "two", report(current, {"a": 2.0, "hard": 9.0}))
    assert "eval loss 2.000 → 2.000 (+0.0%) on the same 1 conversation" in event["text"]


def test_conversations_that_were_cut_differently_are_not_compared(current: Opened) -> None:
    considered(current, "one", report(current, {"a": 2.0}, weight=10))
    event = considered(current, "two", report(current, {"a": 9.0}, weight=20))
    assert event["state"] == "accepted"
    assert event["text"].endswith("no eval conversation was measured with both models")


def test_a_model_that_forgot_too_much_is_kept_aside(current: Opened) -> None:
    considered(current, "one", report(current, forgetting=0.01))
    event = considered(current, "two", report(current, {"a": 1.0, "b": 1.0}, forgetting=0.12))
    assert event["state"] == "kept aside"
    assert (
        "its loss on general text is +12.0% of the base model's, the current model +1.0%; 10.0%"
        " are allowed" in event["text"]
    )


def test_a_model_that_forgot_less_than_the_current_one_is_accepted(current: Opened) -> None:
    considered(current, "one", report(current, forgetting=0.2))
    assert considered(current, "two", report(current, forgetting=0.15))["state"] == "accepted"


def test_a_rule_that_is_kept_no_more_keeps_the_model_aside(current: Opened) -> None:
    considered(current, "one", report(current, rules={"polite": 0.9, "rare": 0.2}))
    event = considered(current, "two", report(current, rules={"polite": 0.4, "rare": 0.0}))
    assert event["state"] == "kept aside"
    assert "polite: in 90% of replies before, 40% now" in event["text"]
    assert "rare" not in event["text"]


def test_a_recipe_without_evaluate_accepts_and_says_that_nothing_was_measured(
    tmp_path: Path,
) -> None:
    text = RECIPE.replace("  - {stage: evaluate, prompts: 1, reply_tokens: 4}\n", "")
    with opened.at(make(tmp_path, text)) as current:
        considered(current, "one", None)
        event = considered(current, "two", None)
    assert event["state"] == "accepted"
    assert event["text"].endswith("nothing was measured, because the recipe has no evaluate stage")


def test_a_report_that_is_gone_is_no_reason_to_refuse(current: Opened) -> None:
    first = report(current)
    considered(current, "one", first)
    shutil.rmtree(store.path_of(current.workspace, first))
    event = considered(current, "two", report(current, {"a": 9.0}))
    assert event["state"] == "accepted"
    assert "its measurements cannot be compared" in event["text"]


def test_the_losses_of_conversations_add_up_to_the_eval_loss(base: Path, files: Path) -> None:
    rows = token_files.read(files / "train.arrow")
    model = load.causal_lm(base, dtype="float32", device="cpu")
    losses = score.conversation_losses(model, rows)
    assert list(losses) == list(dict.fromkeys(rows.conversations))
    assert score.mean_of(losses) == pytest.approx(score.mean_loss(model, rows), rel=1e-6)
    one = rows[3]
    alone = score.mean_loss(model, [one])
    assert losses[one.conversation][0] == pytest.approx(alone * losses[one.conversation][1])
    assert score.mean_of({}) is None


# Once, and only what is whole


def test_each_model_is_judged_once(current: Opened) -> None:
    considered(current, "one", report(current))
    considered(current, "two", report(current, {"a": 9.0, "b": 9.0}))
    before = current.lock_path.read_bytes()
    log: list[Event] = []
    assert release.is_settled(current)
    assert release.consider(current, log.append) is None
    assert log == []
    assert current.lock_path.read_bytes() == before


def test_a_model_kept_aside_is_judged_again_with_another_report(current: Opened) -> None:
    considered(current, "one", report(current))
    considered(current, "two", report(current, {"a": 9.0, "b": 9.0}))
    assert considered(current, "two", report(current, {"a": 1.0, "b": 1.0}))["state"] == "accepted"


def test_the_model_of_the_release_with_another_report_is_a_release(current: Opened) -> None:
    considered(current, "one", report(current))
    event = considered(current, "one", report(current, {"a": 9.0, "b": 9.0}))
    assert event["text"] == "release 2: the model of release 1, with what was made anew"


def test_what_is_half_made_is_not_judged(current: Opened) -> None:
    considered(current, "one", report(current))
    made(current, "two", None)  # its report is still that of another model
    assert release.consider(current, print) is None
    assert now(current).number == 1


def test_without_retrain_there_are_no_releases(tmp_path: Path) -> None:
    text = RECIPE.replace("retrain: {max_loss_increase: 0.02}\n", "")
    with opened.at(make(tmp_path, text)) as current:
        made(current, "one", report(current))
        assert release.consider(current, print) is None
        assert lock.read(current.lock_path).releases == ()
        with pytest.raises(RecipeError, match="has no `retrain:`"):
            execute.promote(current, print)


@pytest.mark.parametrize("command", ["promote", "rollback"])
def test_without_retrain_no_lock_is_waited_for(tmp_path: Path, command: str) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    with FileLock(tmp_path / "artifacts" / "apply.lock"):
        done = run(command, recipe, timeout=60)
    assert done.returncode == 2
    assert "has no `retrain:`" in done.stderr


def test_locked_decides_nothing_and_still_makes_the_link(current: Opened) -> None:
    considered(current, "one", report(current))
    made(current, "two", report(current, {"a": 1.0}))
    (current.links / "current").unlink()
    before = current.lock_path.read_bytes()
    assert release.consider(current, print, decides=False) is None
    assert current.lock_path.read_bytes() == before
    assert link(current) == now(current).outputs["train"]


# promote and rollback


def test_promote_takes_a_model_that_was_kept_aside_and_says_what_is_against_it(
    current: Opened,
) -> None:
    considered(current, "one", report(current))
    considered(current, "two", report(current, {"a": 9.0, "b": 9.0}))
    verdict = release.promote(current)
    assert verdict.text.startswith(
        "release 2 takes the place of release 1, although eval loss 2.500 → 9.000 (+260.0%)"
    )
    assert link(current) == now(current).outputs["train"]
    assert release.is_settled(current)


def test_promote_of_the_current_model_does_nothing(current: Opened) -> None:
    considered(current, "one", report(current))
    assert release.promote(current).text == "release 1 is what was made last already"


def test_promote_needs_a_model(current: Opened) -> None:
    with pytest.raises(PreconditionError, match="nothing was trained yet"):
        release.promote(current)


def test_rollback_goes_back_by_one_and_stays_there(current: Opened) -> None:
    considered(current, "one", report(current))
    first = now(current).outputs
    considered(current, "two", report(current, {"a": 1.0, "b": 1.0}))
    verdict = release.rollback(current)
    assert verdict.text == "release 3 is release 1 again, instead of 2"
    assert now(current).outputs == first
    assert link(current) == first["train"]
    assert release.consider(current, print) is None


def test_two_rollbacks_go_back_twice(current: Opened) -> None:
    models = []
    for name in ("one", "two", "three"):
        considered(current, name, report(current))
        models.append(now(current).outputs)
    release.rollback(current)
    release.rollback(current)
    assert now(current).outputs == models[0]
    with pytest.raises(RecipeError, match="there is no release before this one"):
        release.rollback(current)


def test_rollback_goes_to_the_release_that_is_named(current: Opened) -> None:
    for name in ("one", "two", "three"):
        considered(current, name, report(current))
    assert release.rollback(current, 1).number == 4
    assert now(current).origin == 1
    with pytest.raises(RecipeError, match="there is no release 9 of") as caught:
        release.rollback(current, 9)
    assert caught.value.hint == "there are 1, 2, 3, 4"


def test_status_names_the_current_release_and_where_it_is_from(current: Opened) -> None:
    for name in ("one", "two"):
        considered(current, name, report(current))
    release.rollback(current)
    found = status.record(current)
    assert found["releases"]["current"] == {"number": 3, "from": 1, "outputs": now(current).outputs}
    assert "current: release 3 (release 1 again)" in status.text(found).splitlines()


def test_status_names_what_was_kept_aside_last_and_how_to_take_it(current: Opened) -> None:
    considered(current, "one", report(current))
    considered(current, "two", report(current, {"a": 8.0, "b": 8.0}))
    model = made(current, "three", report(current, {"a": 9.0, "b": 9.0}))
    release.consider(current, lambda event: None)
    assert (
        f"  kept aside last: train {model[:12]}, found worse than release 1;"
        f" `runner promote {current.path}` takes it all the same"
    ) in status.text(status.record(current)).splitlines()
    release.promote(current)
    assert model not in str(status.record(current)["releases"]["kept_aside"])


def test_status_leaves_out_the_folder_that_the_link_leads_to(current: Opened) -> None:
    considered(current, "one", report(current))
    assert any(name.startswith(".current") for name in usage.links(current.workspace)["small"])
    assert ".current" not in status.text(status.record(current))


def test_status_says_that_another_release_is_current_than_the_watch_knows(current: Opened) -> None:
    for name in ("one", "two"):
        considered(current, name, report(current))
    watched = {"path": str(current.path.absolute()), "text": "x", "is_running": True, "release": 2}
    folder = Folder(current.workspace, "small")
    folder.path.mkdir()
    folder.write(watched)
    said = "since then: release 3 (release 1 again), made current beside the watch"
    assert said not in status.text(status.record(current))
    release.rollback(current)
    assert said in status.text(status.record(current))


def test_rollback_refuses_what_is_not_there(current: Opened) -> None:
    considered(current, "one", report(current))
    first = now(current).outputs["train"]
    considered(current, "two", report(current))
    shutil.rmtree(store.path_of(current.workspace, first))
    with pytest.raises(PreconditionError, match="release 1 cannot be had: the output"):
        release.rollback(current)
    assert now(current).number == 2


def test_after_a_rollback_promote_takes_the_last_model_again(current: Opened) -> None:
    considered(current, "one", report(current))
    considered(current, "two", report(current))
    second = now(current).outputs
    release.rollback(current)
    assert release.promote(current).number == 4
    assert now(current).outputs == second


def test_a_model_after_a_rollback_is_judged_against_the_one_gone_back_to(current: Opened) -> None:
    considered(current, "one", report(current))
    considered(current, "two", report(current, {"a": 1.0, "b": 1.0}))
    release.rollback(current)
    event = considered(current, "three", report(current, {"a": 2.0, "b": 3.0}))
    assert event["text"].startswith("release 4 takes the place of release 3: eval loss 2.500")


# The lockfile


def test_the_line_of_a_release_is_frozen() -> None:
    one = Release(3, {"train": "ab" * 32}, {"train": {"base_model": "c"}}, origin=1)
    aside = Release(3, {"train": "cd" * 32}, kept_aside=True)
    assert lock.text_of(Lock(releases=(one, aside))).splitlines()[1:] == [
        f'- {{"release": 3, "outputs": {{"train": "{"ab" * 32}"}},'
        ' "models": {"train": {"base_model": "c"}}, "from": 1}',
        f'- {{"release": 3, "outputs": {{"train": "{"cd" * 32}"}}, "kept_aside": true}}',
    ]


def test_releases_are_read_as_they_were_written(tmp_path: Path) -> None:
    one = Release(1, {"train": "ab" * 32, "export/q4_k_m": "1" * 64}, {"train": {}})
    whole = Lock(releases=(one, Release(1, {"train": "cd" * 32}, kept_aside=True)))
    lock.write(tmp_path / "x.lock", whole)
    assert lock.read(tmp_path / "x.lock") == whole


@pytest.mark.parametrize(
    "more",
    [
        {"release": 0},
        {"release": "1"},
        {"release": True},
        {"outputs": {}},
        {"outputs": {"train": "short"}},
        {"outputs": {"../x": "ab" * 32}},
        {"outputs": {"/x": "ab" * 32}},
        {"outputs": {"export": "ab" * 32, "export/q8_0": "cd" * 32}},
        {"from": 0},
        {"kept_aside": False},
        {"models": {"other": {}}},
        {"models": {"train": {"parent": "x"}}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_line_that_is_no_release_is_refused(more: dict[str, Any]) -> None:
    record = {"release": 1, "outputs": {"train": "ab" * 32}, **more}
    with pytest.raises(RecipeError, match="this line of the lockfile is no fact"):
        lock.parsed(f"- {json.dumps(record)}\n".encode(), "x.lock")


def test_of_two_releases_with_one_number_each_side_of_a_merge_takes_the_same() -> None:
    ours, theirs = (Release(2, {"train": sign * 64}) for sign in "ab")
    first = Release(1, {"train": "f" * 64})
    assert Lock(releases=(first, ours, theirs)).release == theirs
    assert Lock(releases=(theirs, first, ours)).release == theirs


def test_of_two_releases_with_one_number_a_rollback_reaches_the_other(current: Opened) -> None:
    considered(current, "one", report(current))
    considered(current, "two", report(current, {"a": 1.0, "b": 1.0}))
    locked = lock.read(current.lock_path)
    theirs = Release(2, {**now(current).outputs, "train": kept(current, {"x": "theirs"})})
    both = {now(current).outputs["train"], theirs.outputs["train"]}
    lock.write(current.lock_path, locked._replace(releases=(*locked.releases, theirs)))
    (other,) = both - {now(current).outputs["train"]}
    release.rollback(current, 2)
    assert now(current).outputs["train"] == other


def test_releases_of_two_branches_join_without_a_conflict(current: Opened) -> None:
    root = current.workspace.root
    (root / ".gitattributes").write_text("*.lock merge=union\n")
    git(root, "init", "-q", "-b", "main")
    considered(current, "one", report(current))
    git(root, "add", "recipes", ".gitattributes")
    git(root, "commit", "-qm", "x")
    for branch, model in (("other", "ours"), ("main", "theirs")):
        git(root, "checkout", "-q", *(["-b"] if branch == "other" else []), branch)
        considered(current, model, report(current, {"a": 1.0, "b": 1.0}))
        git(root, "commit", "-aqm", branch)
    git(root, "merge", "-q", "other", "-m", "merged")
    assert [one.number for one in lock.read(current.lock_path).releases] == [1, 2, 2]


def test_gc_keeps_what_a_release_names(current: Opened) -> None:
    considered(current, "one", report(current))
    considered(current, "two", report(current))
    older = lock.read(current.lock_path).releases[0].outputs.values()
    grow_old(current.workspace.store)
    why = {one.path.name: one.why for one in gc.find(current.workspace)}
    assert {why[output] for output in older} == {"needed"}


# The link


def test_the_link_leads_to_each_stage_of_the_release(current: Opened) -> None:
    considered(current, "one", report(current))
    first = now(current).outputs
    assert {stage: link(current, stage) for stage in first} == first
    considered(current, "two", report(current, {"a": 9.0}))
    assert {stage: link(current, stage) for stage in first} == first


def test_the_link_is_whole_again_when_an_output_is_back(current: Opened) -> None:
    considered(current, "one", report(current))
    model = store.path_of(current.workspace, now(current).outputs["train"])
    away = model.rename(model.with_name("away"))
    shutil.rmtree(current.links / f"{(current.links / 'current').readlink()}")
    assert not release.is_settled(current)
    release.consider(current, print)
    assert not (current.links / "current" / "train").exists()
    assert release.is_settled(current)
    away.rename(model)
    assert not release.is_settled(current)
    release.consider(current, print)
    assert link(current) == now(current).outputs["train"]


def test_the_link_always_leads_to_a_whole_release(
    current: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    considered(current, "one", report(current))
    seen = []
    replace = Path.replace

    def look(path: Path, target: Path) -> Path:
        seen.append(sorted(path.name for path in (current.links / "current").iterdir()))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", look)
    considered(current, "two", report(current))
    assert seen
    assert all(names == ["evaluate", "train"] for names in seen)


def test_a_folder_of_links_that_was_not_finished_is_finished(current: Opened) -> None:
    considered(current, "one", report(current))
    shutil.rmtree((current.links / "current").resolve())
    assert not release.is_settled(current)
    release.consider(current, print)
    assert link(current) == now(current).outputs["train"]


def test_no_more_than_one_folder_of_links_stays(current: Opened) -> None:
    for name in ("one", "two", "three"):
        considered(current, name, report(current))
    assert len(list(current.links.glob(".current-*"))) == 1


# From the command line


@pytest.mark.usefixtures("one_thread")
def test_a_worse_model_is_kept_aside_by_apply_and_promoted_and_rolled_back(tmp_path: Path) -> None:
    tiny_models.folder(tmp_path / "base")
    path = make(tmp_path, RECIPE.replace("max_steps: 2, learning_rate: 0.0001", TAUGHT))
    log: list[Event] = []
    apply(path, log.append)
    assert [event["state"] for event in log if event["event"] == "release"] == ["accepted"]
    links = tmp_path / "artifacts" / "small"
    first = (links / "current" / "train").resolve()
    assert (first / "conversations.txt").is_file()
    path.write_text(path.read_text().replace(TAUGHT, "max_steps: 2, learning_rate: 0.000001"))
    for number in range(3):
        chat(tmp_path / "chats" / f"new-{number}.json", f"new {number}", f"answer {number}")
    log.clear()
    apply(path, log.append)
    assert "evaluate" in ran(log)
    assert [event["state"] for event in log if event["event"] == "release"] == ["kept aside"]
    second = (links / "train").resolve()
    assert second != first
    assert (links / "current" / "train").resolve() == first
    assert set(states(path).values()) == {"skip"}
    log.clear()
    apply(path, log.append)
    assert log == []

    done = run("promote", path, "--json")
    assert json.loads(done.stdout)["release"] == 2, done.stderr
    assert (links / "current" / "train").resolve() == second
    done = run("rollback", path)
    assert done.stdout == "release 3 is release 1 again, instead of 2\n", done.stderr
    assert (links / "current" / "train").resolve() == first
    apply(path, log.append)
    assert log == []
    assert run("rollback", path, "7").returncode == 2
    with opened.at(path) as current:
        assert execute.promote(current, log.append).number == 4
