import time
from datetime import datetime

import pytest
from pydantic import ValidationError

from runner.stages.retrain import Retrain
from runner.watch.schedule import Batch, Conditions, Pace, opening, retry_after, seconds

PACE = Pace()


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def clock(when: float) -> str:
    return time.strftime("%d %H:%M", time.localtime(when))


def test_a_batch_is_due_after_five_quiet_seconds() -> None:
    batch = Batch(100, 110)
    assert not batch.is_due(114.9, PACE)
    assert batch.is_due(115, PACE)


def test_a_batch_that_never_gets_quiet_is_due_a_minute_after_its_first_file() -> None:
    assert not Batch(100, 158).is_due(159.9, PACE)
    assert Batch(100, 159).is_due(160, PACE)


def test_a_batch_is_never_due_before_its_last_file_may_have_settled() -> None:
    assert not Batch(100, 100).is_due(101.9, Pace(settle_s=2, quiet_s=0))


def test_failures_are_tried_again_after_30_s_and_at_last_every_half_hour() -> None:
    waits = [retry_after(count, PACE) for count in (1, 2, 3, 6, 7, 8, 10_000)]
    assert waits == [30, 60, 120, 960, 1800, 1800, 1800]


@pytest.mark.parametrize(
    ("text", "expected"), [("90s", 90), ("30min", 1800), ("6h", 21600), ("1d", 86400)]
)
def test_durations_are_as_recipes_say_them(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("hours", "now", "expected"),
    [
        ("22:00-06:00", "2026-03-10 12:00", "10 22:00"),
        ("22:00-06:00", "2026-03-10 23:30", "10 23:30"),
        ("22:00-06:00", "2026-03-10 05:59", "10 05:59"),
        ("22:00-06:00", "2026-03-10 06:00", "10 22:00"),
        ("09:30-17:00", "2026-03-10 08:00", "10 09:30"),
        ("09:30-17:00", "2026-03-10 17:00", "11 09:30"),
        ("09:30-17:00", "2026-03-31 18:00", "01 09:30"),
        ("00:00-00:00", "2026-03-10 18:00", "10 18:00"),
    ],
)
def test_a_training_starts_in_its_hours(hours: str, now: str, expected: str) -> None:
    assert clock(opening(hours, at(now))) == expected


def test_too_few_new_conversations_wait_for_more_and_for_no_time() -> None:
    wait = Conditions(min_new_conversations=10).wait(9, None, 0.0)
    assert wait is not None
    assert wait == ("9 of at least 10 new conversations are there", None)


def test_a_change_that_is_wanted_waits_for_no_conversations() -> None:
    assert Conditions(min_new_conversations=10).wait(None, None, 0.0) is None


def test_the_interval_counts_from_the_start_of_the_last_training() -> None:
    conditions = Conditions(min_interval_s=3600)
    wait = conditions.wait(5, at("2026-03-10 12:00"), at("2026-03-10 12:59"))
    assert wait is not None
    assert wait.until == at("2026-03-10 13:00")
    assert conditions.wait(5, at("2026-03-10 12:00"), at("2026-03-10 13:00")) is None


def test_an_interval_that_ends_outside_the_hours_waits_for_the_hours() -> None:
    conditions = Conditions(min_interval_s=3600, at="22:00-06:00")
    wait = conditions.wait(5, at("2026-03-10 05:30"), at("2026-03-10 05:45"))
    assert wait is not None
    assert wait.until == at("2026-03-10 22:00")


def test_a_recipe_without_retrain_trains_on_one_new_conversation() -> None:
    conditions = Conditions.of(None)
    assert conditions.wait(1, 0.0, 1.0) is None
    assert conditions.wait(0, 0.0, 1.0) is not None


def test_a_clock_that_was_ahead_once_stops_no_training() -> None:
    conditions = Conditions(min_interval_s=3600)
    assert conditions.wait(5, at("2036-03-10 12:00"), at("2026-03-10 12:00")) is None


@pytest.mark.parametrize("written", ["\uff11h", "\u0661d", "1\u0660min"])
def test_a_duration_has_plain_digits(written: str) -> None:
    with pytest.raises(ValidationError):
        Retrain(min_interval=written)


def test_hours_have_plain_digits() -> None:
    with pytest.raises(ValidationError):
        Retrain(at="0\uff11:00-02:00")
