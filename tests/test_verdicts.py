from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner.errors import InterruptedRun
from runner.model import checkpoint, verdicts
from runner.model.recovery import Part
from tests import tiny_models
from tests.test_sft import assert_same_bits, eval_losses, stop_at

pytestmark = pytest.mark.usefixtures("one_thread")


UNSTABLE: dict[str, Any] = {
    "epochs": 8,
    "learning_rate": 0.08,
    "schedule": "constant",
    "every_steps": 1,
}


def curve(*losses: float) -> list[dict[str, float]]:
    """Evaluations after steps 0, 10, 20 and so on."""
    return [{"step": 10 * place, "eval_loss": loss} for place, loss in enumerate(losses)]


def texts(events: list[dict[str, Any]], kind: str) -> list[str]:
    return [event["text"] for event in events if event["event"] == kind]


def test_a_training_is_stuck_after_so_many_evaluations_without_a_better_one() -> None:
    assert not verdicts.is_stuck(curve(3, 2.0, 2.5, 2.4), 3)
    assert verdicts.is_stuck(curve(3, 2.0, 2.5, 2.4, 2.2), 3)
    assert not verdicts.is_stuck(curve(3, 2.0, 2.5, 2.4, 1.9), 3)
    assert not verdicts.is_stuck(curve(3, 2.0, 2.5, 2.4, 1.9, 2.0, 2.1), 3)
    assert verdicts.is_stuck(curve(3, 2.0, 2.0), 1)


def test_the_loss_before_the_training_stops_nothing() -> None:
    assert not verdicts.is_stuck(curve(1.0, 2.0, 1.9, 1.8, 1.7), 3)


def test_without_evaluations_no_training_is_stuck() -> None:
    assert not verdicts.is_stuck([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}], 1)


def test_a_stuck_training_stops_early_and_says_so(base: Path, files: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    found = tiny_models.trained(base, files, tmp_path, events=events, early_stopping=3, **UNSTABLE)
    evals = eval_losses(tmp_path)
    last = max(evals)
    assert last == found["steps"] < 24
    assert found["kept_step"] == last - 3 == min(evals, key=lambda step: evals[step])
    assert f"stopped early at step {last}: eval loss had not fallen for 3 evaluations" in texts(
        events, "verdict"
    )


def test_up_to_the_stop_it_is_the_training_without_one(
    base: Path, files: Path, tmp_path: Path
) -> None:
    for name, patience in (("short", 3), ("long", None)):
        tiny_models.trained(base, files, tmp_path / name, early_stopping=patience, **UNSTABLE)
    short, long = (
        (tmp_path / name / "output" / "metrics.jsonl").read_text() for name in ("short", "long")
    )
    assert long.startswith(short)
    assert len(long) > len(short)


@pytest.mark.parametrize("before_the_stop", [0, 1, 2])
def test_a_training_cut_before_its_early_stop_ends_in_the_same_bytes(
    base: Path, files: Path, tmp_path: Path, before_the_stop: int
) -> None:
    whole = tiny_models.trained(base, files, tmp_path / "whole", early_stopping=3, **UNSTABLE)
    cut = stop_at(int(whole["steps"]) - before_the_stop)
    if before_the_stop:
        with pytest.raises(InterruptedRun):
            tiny_models.trained(
                base, files, tmp_path / "cut", emit=cut, early_stopping=3, **UNSTABLE
            )
    else:  # there is nothing left to go on with
        tiny_models.trained(base, files, tmp_path / "cut", emit=cut, early_stopping=3, **UNSTABLE)
    events: list[dict[str, Any]] = []
    tiny_models.trained(base, files, tmp_path / "cut", events=events, early_stopping=3, **UNSTABLE)
    assert len([e for e in events if "loss" in e]) == before_the_stop
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    kept, _ = checkpoint.published(tmp_path / "cut" / "scratch")
    assert kept[-1].step == whole["steps"]


def test_a_training_that_ends_at_its_last_step_was_not_stopped() -> None:
    ended = curve(3.0, 2.0, 2.1, 2.2, 2.3)
    assert "stopped early" not in " ".join(verdicts.after(ended, 10, 40, 3))
    assert "stopped early at step 40" in " ".join(verdicts.after(ended, 10, 90, 3))


def losses(*values: float) -> list[dict[str, float]]:
    return [{"step": place, "loss": loss} for place, loss in enumerate(values, start=1)]


STEADY = [2.0 + 0.1 * (place % 3) for place in range(30)]


def test_a_spike_is_named_with_its_step_and_conversations() -> None:
    parts = [Part(1.0, 0.5, ("a", "b")), Part(6.0, 0.5, ("c",))]
    assert verdicts.of_spike(losses(*STEADY), 31, parts) == (
        "step 31: the loss is 7.000, 3.3 times the median of the last 20 steps (2.100); "
        "conversations: c, a, b; look at them with `runner preview`, or take a lower learning_rate"
    )


@pytest.mark.parametrize(
    ("before", "loss"),
    [
        (STEADY, 6.0),  # less than three times
        ([0.1, 2.9] * 15, 4.4),  # no further away than the others lie apart
        (STEADY[:5], 50.0),  # too early to say
    ],
)
def test_what_is_no_spike_is_not_named(before: list[float], loss: float) -> None:
    assert verdicts.of_spike(losses(*before), 31, [Part(loss, 1.0, ("a",))]) == ""


def test_a_row_unlike_the_others_is_warned_about_by_name(base: Path, tmp_path: Path) -> None:
    rows = [tiny_models.row(f"plain {i}", 30, [(10, 30, 1.0)]) for i in range(30)]
    odd = tiny_models.row("odd", 30, [(10, 30, 1.0)])
    for row in rows:
        row.input_ids[:] = [97 + place % 2 for place in range(30)]
    odd.input_ids[:] = [150 + 7 * place % 90 for place in range(30)]
    files = tiny_models.token_files(tmp_path / "tokens", [*rows, odd])
    events: list[dict[str, Any]] = []
    tiny_models.trained(
        base, files, tmp_path, method="full", batch_size=1, epochs=3, every_steps=99, events=events
    )
    said = texts(events, "warning")
    assert said
    assert all("conversations: odd; look" in text for text in said)


def test_few_conversations_are_called_few() -> None:
    assert list(verdicts.before(12)) == [
        "12 conversations are few to learn from: 1,000 are the least for a dependable result, "
        "3,000 to 5,000 are good, 10,000 and more the best"
    ]
    assert not list(verdicts.before(1000))


def test_advice_on_the_data_comes_once_and_before_the_first_step(
    base: Path, files: Path, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    stop = stop_at(3)

    def emit(event: dict[str, Any]) -> None:
        events.append(event)
        stop(event)

    with pytest.raises(InterruptedRun):
        tiny_models.trained(base, files, tmp_path, emit=emit)
    assert events[0]["text"].startswith("12 conversations are few")
    again: list[dict[str, Any]] = []
    tiny_models.trained(base, files, tmp_path, events=again)
    assert not any("are few" in text for text in texts(again, "verdict"))
