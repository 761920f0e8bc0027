"""Facts: found again by key and output, and passed over when they are not whole."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.engine import facts
from runner.engine.facts import Made
from runner.engine.workspace import Workspace

MADE = Made(
    stage="window",
    output="ab" * 32,
    parts={"kind": "window", "version": 3, "settings": {"mode": "conversational"}},
    rebuilds=True,
    seconds=1.5,
    bytes=12,
    made_at=1_700_000_000.0,
    metrics={"windows": 7},
    env={"python": "3.11"},
)


def path_of(space: Workspace, made: Made) -> Path:
    return space.store / "facts" / made.key[:2] / made.key / f"{made.output}.json"


def test_a_fact_is_found_by_its_key_and_by_its_output(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    facts.write(space, MADE)
    assert facts.of_key(space, MADE.key) == [MADE]
    assert facts.of_output(space, MADE.key, MADE.output) == MADE
    assert list(facts.every(space)) == [MADE]
    assert facts.of_key(space, "0" * 64) == []
    assert facts.of_output(space, MADE.key, "0" * 64) is None


def test_the_newest_of_several_outputs_comes_first(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    for number, when in enumerate((5.0, 9.0, 7.0)):
        facts.write(space, MADE._replace(output=f"{number}" * 64, made_at=when))
    assert [made.made_at for made in facts.of_key(space, MADE.key)] == [9.0, 7.0, 5.0]


def test_a_forgotten_fact_is_gone_and_the_others_of_its_key_are_not(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    other = MADE._replace(output="cd" * 32)
    for made in (MADE, other):
        facts.write(space, made)
    facts.forget(space, MADE)
    facts.forget(space, MADE)
    assert facts.of_key(space, MADE.key) == [other]


def test_the_bytes_of_a_fact_are_one_line_that_gives_it_back() -> None:
    data = facts.as_json(MADE)
    assert data.count(b"\n") == 1
    assert facts.parsed(data) == MADE


@pytest.mark.parametrize(
    "change",
    [
        {"stage": 1},
        {"output": None},
        {"parts": []},
        {"rebuilds": "yes"},
        {"seconds": "1"},
        {"bytes": 1.5},
        {"made_at": math.inf},
        {"seconds": math.nan},
        {"metrics": None},
        {"env": "x"},
        {"more": 1},
    ],
)
def test_what_has_other_fields_or_types_is_no_fact(change: dict[str, Any]) -> None:
    data = json.dumps({**json.loads(facts.as_json(MADE)), **change}).encode()
    with pytest.raises(ValueError, match="this is no fact"):
        facts.parsed(data)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"stage": "a'])
def test_no_bytes_break_the_reading_of_a_fact(data: bytes) -> None:
    with pytest.raises(ValueError, match="this is no fact"):
        facts.parsed(data)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [(b"ab" * 32, b"cd" * 32), (b'"version": 3', b'"version": 4')],
)
def test_a_fact_that_says_other_things_than_its_name_is_passed_over_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], was: bytes, becomes: bytes
) -> None:
    space = Workspace(tmp_path)
    facts.write(space, MADE)
    path = path_of(space, MADE)
    path.write_bytes(path.read_bytes().replace(was, becomes))
    assert facts.of_key(space, MADE.key) == []
    assert list(facts.every(space)) == []
    assert f"{path} is passed over: it does not say what its name does" in capsys.readouterr().err


def test_a_fact_that_is_being_written_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = Workspace(tmp_path)
    facts.write(space, MADE)
    path_of(space, MADE).with_name(f".{'cd' * 25}.123.tmp").write_bytes(b'{"stage')
    assert list(facts.every(space)) == [MADE]
    assert facts.of_key(space, MADE.key) == [MADE]
    assert capsys.readouterr().err == ""


def test_processes_that_write_one_fact_at_once_leave_a_whole_one(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom runner.engine import facts\n"
        "from runner.engine.workspace import Workspace\nmade = facts.parsed(sys.argv[2].encode())\n"
        "for _ in range(40): facts.write(Workspace(Path(sys.argv[1])), made)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), facts.as_json(MADE).decode()]
    children = [subprocess.Popen(command) for _ in range(4)]
    assert [child.wait(50) for child in children] == [0] * 4
    assert list(facts.every(Workspace(tmp_path))) == [MADE]
    assert [path.name for path in path_of(Workspace(tmp_path), MADE).parent.iterdir()] == [
        f"{MADE.output}.json"
    ]
