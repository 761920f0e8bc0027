from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from runner.engine import events, reports
from runner.engine.recipe import Step

STEP: dict[str, Any] = {
    "event": "metrics",
    "stage": "train",
    "step": 300,
    "steps": 900,
    "epoch": 1.5,
    "loss": 2.25,
    "learning_rate": 2e-4,
    "grad_norm": 0.5,
    "tokens": 90_000,
    "tokens_per_second": 1234.0,
    "trained_tokens_per_second": 600.0,
    "memory_bytes": 3_400_000_000,
    "seconds_left": 75.0,
}
EVAL: dict[str, Any] = {"event": "metrics", "stage": "train", "step": 300, "eval_loss": 2.5}


def step(report: list[str]) -> Step:
    entry = {"stage": "train", "report": report}
    return Step("train", "train", 2, entry, {}, {}, (), True, 1, True, False)


def logged(folder: Path, report: list[str], *added: dict[str, Any]) -> Path:
    """The run's folder after these events."""
    readers = reports.Reports(folder, [step(report)])
    with events.Log(folder / "events.jsonl", readers) as log:
        for event in added:
            log.add(event)
        log.add({"event": "run_finished", "state": "done"})
    return folder


def records(path: Path) -> list[bytes]:
    """The data of each record, its checksums checked bit by bit."""
    found, data = [], path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert data[8:12] == checksum(data[:8])
        found.append(data[12 : 12 + length])
        assert data[12 + length : 16 + length] == checksum(found[-1])
        data = data[16 + length :]
    return found


def checksum(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def curves(path: Path) -> list[tuple[int, dict[str, float]]]:
    """The scalars of a file, step by step, by a reader of protocol buffers written for this."""
    found = []
    for record in records(path)[1:]:
        fields = dict(_fields(record))
        values = {}
        for _, value in _fields(fields[5]):
            inside = dict(_fields(value))
            values[inside[1].decode()] = struct.unpack("<f", inside[2])[0]
        found.append((fields[2], values))
    return found


def _fields(data: bytes) -> list[tuple[int, Any]]:
    found = []
    place = 0

    def varint() -> int:
        nonlocal place
        number = shift = 0
        while True:
            byte = data[place]
            place += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    while place < len(data):
        key = varint()
        if key & 7 == 0:
            found.append((key >> 3, varint()))
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        found.append((key >> 3, data[place : place + size]))
        place += size
    return found


def test_a_training_has_a_plain_log(tmp_path: Path) -> None:
    saved = {"event": "checkpoint", "stage": "train", "step": 300, "bytes": 1_700_000}
    said = {"event": "verdict", "stage": "train", "text": "eval loss fell"}
    before = {"event": "warning", "stage": "clean", "text": "of another stage"}
    first = {"event": "verdict", "stage": "train", "text": "few conversations"}
    after = {"event": "verdict", "stage": "evaluate", "text": "of another stage"}
    lines = (
        (logged(tmp_path, [], before, first, STEP, EVAL, saved, said, after) / "training.log")
        .read_text()
        .splitlines()
    )
    assert [line.split("  ", 2)[2] for line in lines] == [
        "few conversations",
        "step 300 of 900  epoch 1.50  loss 2.250000  learning rate 2.000e-04  gradient norm 0.5000"
        "  1,234 tokens/s  3.40 GB  1:15 left",
        "step 300  eval loss 2.500000",
        "step 300  checkpoint, 1.7 MB",
        "eval loss fell",
    ]


def test_a_run_that_trains_nothing_has_no_reports(tmp_path: Path) -> None:
    done = {"event": "stage_finished", "stage": "clean", "seconds": 1.0, "metrics": {}}
    logged(tmp_path, ["tensorboard"], done)
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]


def test_tensorboard_gets_every_number_with_its_step(tmp_path: Path) -> None:
    logged(tmp_path, ["tensorboard"], STEP, EVAL)
    (file,) = (tmp_path / "tensorboard" / "train").iterdir()
    assert "tfevents" in file.name
    first, second = curves(file)
    assert first == (300, {name: pytest.approx(STEP[name]) for name in first[1]})
    assert set(first[1]) == set(reports.CURVES) - {"eval_loss"}
    assert second == (300, {"eval_loss": 2.5})


def test_the_file_begins_with_the_version_that_tensorboard_asks_for(tmp_path: Path) -> None:
    logged(tmp_path, ["tensorboard"], STEP)
    (file,) = (tmp_path / "tensorboard" / "train").iterdir()
    assert dict(_fields(records(file)[0]))[3] == b"brain.Event:2"


def test_without_being_asked_for_there_is_no_tensorboard(tmp_path: Path) -> None:
    logged(tmp_path, [], STEP)
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboards_own_reader_agrees(tmp_path: Path) -> None:
    name = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(name)
    logged(tmp_path, ["tensorboard"], STEP, EVAL)
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "train"))
    found.Reload()
    (loss,) = found.Scalars("loss")
    assert (loss.step, loss.value) == (300, 2.25)


def test_a_report_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "training.log").mkdir()
    logged(tmp_path, ["tensorboard"], STEP, EVAL)
    assert len(list(events.read(tmp_path / "events.jsonl"))) == 3
