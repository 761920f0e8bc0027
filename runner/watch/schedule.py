"""When to start: after files have been quiet, after a failure, and when `retrain:` allows it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Pace:
    """How long is waited for what, in seconds."""

    settle_s: float = 2.0
    """A file is ready when it did not change for so long."""
    quiet_s: float = 5.0
    """A run starts when nothing arrived for so long,"""
    longest_s: float = 60.0
    """or so long after the first file."""
    rescan_s: float = 300.0
    poll_s: float = 30.0
    """Between scans where the system does not tell of changes, or a source is missing."""
    retry_s: float = 30.0
    """After a failure; twice as long after each further one of the same input,"""
    retry_max_s: float = 1800.0
    """and never longer."""
    tick_s: float = 0.5
    heartbeat_s: float = 600.0


class Batch(NamedTuple):
    """Files that came together: when the first and the last of them did."""

    first: float
    last: float

    def extended(self, first: float, last: float) -> Batch:
        return Batch(min(self.first, first), max(self.last, last))

    def is_due(self, now: float, pace: Pace) -> bool:
        quiet = max(pace.quiet_s, pace.settle_s)
        return now >= min(self.last + quiet, self.first + pace.longest_s)


def retry_after(failures: int, pace: Pace) -> float:
    """Seconds to wait after so many failures with the same input."""
    return min(pace.retry_s * 2.0 ** min(failures - 1, 30), pace.retry_max_s)


class Wait(NamedTuple):
    """Why no training starts now, and until when; None where only new data can change it."""

    text: str
    until: float | None


@dataclass(frozen=True)
class Conditions:
    """What `retrain:` says of the time of a training."""

    min_new_conversations: int = 1
    min_interval_s: float = 0.0
    at: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> Conditions:
        if settings is None:
            return cls()
        return cls(
            settings["min_new_conversations"],
            seconds(settings["min_interval"]),
            settings["at"],
        )

    def wait(self, new: int | None, last_started: float | None, now: float) -> Wait | None:
        """What keeps a training from starting now; nothing where it may.

        `new` is the number of conversations since the last training; None where they are not what
        it is about. Times are in seconds since 1970.
        """
        if new is not None and new < self.min_new_conversations:
            least = self.min_new_conversations
            text = f"{new:,} of at least {least:,} new conversations are there"
            return Wait(text, None)
        # A start in the future is of a clock that was ahead; that it was not so long ago is all
        # that could be said of it.
        if last_started is not None and last_started <= now < last_started + self.min_interval_s:
            until = opening(self.at, last_started + self.min_interval_s)
            return Wait(f"the last training started {_clock(last_started)}", until)
        if self.at is not None and opening(self.at, now) > now:
            return Wait(f"a training starts at {self.at} only", opening(self.at, now))
        return None


def seconds(duration: str) -> float:
    """`30min` and the like, as recipes say it."""
    unit = duration.lstrip("0123456789")
    return int(duration.removesuffix(unit)) * float(UNITS_S[unit])


def opening(hours: str | None, now: float) -> float:
    """The next moment, from now on, within these hours of local time; 22:00-06:00, say.

    Hours that end when they begin are all day.
    """
    if hours is None:
        return now
    first, last = (60 * int(text[:2]) + int(text[3:]) for text in hours.split("-"))
    there = time.localtime(now)
    minute = 60 * there.tm_hour + there.tm_min
    inside = first <= minute < last if first < last else minute >= first or minute < last
    if inside or first == last:
        return now
    later = there.tm_mday + (minute > first)
    # mktime finds the moment by the calendar, also where a night is an hour longer or shorter.
    date = (there.tm_year, there.tm_mon, later, first // 60, first % 60, 0, 0, 0, -1)
    return time.mktime(date)


def _clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
