"""A training as a log file and as TensorBoard's curves, both read from its events.

runs/<id>/training.log                    every step, evaluation, checkpoint, warning and verdict
runs/<id>/tensorboard/<stage>/events.…    where the stage says `report: [tensorboard]`

TensorBoard's files are written here byte by byte, so the package is needed only to look at them:
`tensorboard --logdir artifacts/runs`. A report that cannot be written never ends a run.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, TextIO

from runner.engine import words
from runner.engine.events import Event
from runner.engine.recipe import Step

CURVES = (
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "epoch",
    "tokens",
    "tokens_per_second",
    "trained_tokens_per_second",
    "memory_bytes",
)
"""The numbers of a metrics event that become curves."""


class Reports:
    """A listener of a run's events; nothing is written before there is something to write."""

    def __init__(self, folder: Path, steps: Iterable[Step]) -> None:
        self._folder = folder
        self._wanted = {
            step.name for step in steps if "tensorboard" in step.entry.get("report", ())
        }
        self._log: TextIO | None = None
        self._curves: dict[str, BinaryIO] = {}
        self._trainings: set[str] = set()
        self._waiting: dict[str, list[str]] = {}  # of stages that may prove to be trainings
        self._broken = False

    def __call__(self, event: Event) -> None:
        if self._broken:
            return
        try:
            self._add(event)
            if event["event"] == "run_finished":
                self.close()
        except OSError:  # a full disk, of which the run itself will tell
            self._broken = True

    def close(self) -> None:
        for file in (self._log, *self._curves.values()):
            if file is not None:
                file.close()
        self._log, self._curves = None, {}

    def _add(self, event: Event) -> None:
        stage = event.get("stage", "")
        if event["event"] == "metrics":
            self._trainings.add(stage)
        if stage and (line := line_of(event)):
            self._waiting.setdefault(stage, []).append(f"{_clock(event)}  {stage}  {line}\n")
        if stage in self._trainings and (lines := self._waiting.pop(stage, [])):
            if self._log is None:
                path = self._folder / "training.log"
                self._log = path.open("a", encoding="utf-8", newline="\n")
            self._log.writelines(lines)
            self._log.flush()
        if event["event"] == "metrics" and stage in self._wanted:
            if stage not in self._curves:
                folder = self._folder / "tensorboard" / stage
                folder.mkdir(parents=True, exist_ok=True)
                self._curves[stage] = (folder / _file_name(event["time"])).open("ab")
                self._curves[stage].write(framed(opening(event["time"])))
            self._curves[stage].write(framed(scalars(event)))
            self._curves[stage].flush()


def line_of(event: Event) -> str:
    """The event as a line of `training.log`, or nothing for one that is not of a training."""
    match event["event"]:
        case "metrics" if "eval_loss" in event:
            return f"step {event['step']}  eval loss {event['eval_loss']:.6f}"
        case "metrics":
            return (
                f"step {event['step']} of {event['steps']}  epoch {event['epoch']:.2f}  "
                f"loss {event['loss']:.6f}  learning rate {event['learning_rate']:.3e}  "
                f"gradient norm {event['grad_norm']:.4f}  {event['tokens_per_second']:,.0f} "
                f"tokens/s  {words.size(event['memory_bytes'])}  "
                f"{words.duration(event['seconds_left'])} left"
            )
        case "checkpoint":
            return f"step {event['step']}  checkpoint, {words.size(event['bytes'])}"
        case "warning":
            return f"warning: {words.escaped(event['text'])}"
        case "verdict":
            return words.escaped(event["text"])
        case "stage_finished":
            return f"done in {words.duration(event['seconds'])}"
    return ""


def _clock(event: Event) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))


def _file_name(started: float) -> str:
    """TensorBoard looks for `tfevents` in the name, and takes the files of a folder by name."""
    return f"events.out.tfevents.{int(started):010}.runner"


# The records of TensorFlow (tensorflow/core/lib/io/record_writer.h): length, its checksum, data,
# its checksum. The data is a message of tensorflow/core/util/event.proto.


def framed(data: bytes) -> bytes:
    """One record."""
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def opening(at: float) -> bytes:
    """The first event of a file: `wall_time` = 1, `file_version` = 3."""
    version = b"brain.Event:2"
    return b"\x09" + struct.pack("<d", at) + b"\x1a" + _varint(len(version)) + version


def scalars(event: Event) -> bytes:
    """The event's numbers: `wall_time` = 1, `step` = 2, `summary` = 5 of tags and floats."""
    summary = b""
    for name in CURVES:
        if name in event:
            tag = name.encode()
            value = b"\x0a" + _varint(len(tag)) + tag + b"\x15" + struct.pack("<f", event[name])
            summary += b"\x0a" + _varint(len(value)) + value
    head = b"\x09" + struct.pack("<d", event["time"]) + b"\x10" + _varint(event["step"])
    return head + b"\x2a" + _varint(len(summary)) + summary


def _varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted as record_writer.h masks it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _table() -> tuple[int, ...]:
    def of(byte: int) -> int:
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        return byte

    return tuple(of(byte) for byte in range(256))


_CRC = _table()
