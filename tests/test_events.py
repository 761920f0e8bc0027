"""The log of a run on a disk that takes no more."""

from pathlib import Path

from runner.engine import events
from tests.workspaces import grow, small_disk

PAGE = 4096


def fill(mount: Path) -> None:
    """Leaves no byte free."""
    with (mount / "ballast").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError:
            pass


def test_a_line_for_which_there_is_no_room_is_dropped_and_told_of_once(tmp_path: Path) -> None:
    told: list[events.Event] = []
    with small_disk(tmp_path, "64k"), events.Log(tmp_path / "events.jsonl", told.append) as log:
        log.add({"event": "run_started"})
        fill(tmp_path)
        for number in range(50):
            log.add({"event": "progress", "done": number, "text": "x" * 1000})
    said = [event["text"] for event in told if event["event"] == "warning"]
    assert said == [
        f"{tmp_path / 'events.jsonl'} cannot be written"
        " ([Errno 28] No space left on device); lines of it will be missing"
    ]


def test_who_listens_hears_of_everything_on_a_full_disk(tmp_path: Path) -> None:
    told: list[events.Event] = []
    with small_disk(tmp_path, "64k"), events.Log(tmp_path / "events.jsonl", told.append) as log:
        fill(tmp_path)
        for number in range(50):
            log.add({"event": "progress", "done": number})
    assert [event["done"] for event in told if event["event"] == "progress"] == list(range(50))


def test_a_log_goes_on_in_whole_lines_when_there_is_room_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with small_disk(tmp_path, "64k"):
        with events.Log(path) as log:
            log.add({"event": "run_started"})
            fill(tmp_path)
            for number in range(50):  # two fit into the page that the file has, and a half
                log.add({"event": "progress", "done": number, "text": "ы" * 777})
            grow(tmp_path)
            log.add({"event": "run_finished"})
        kinds = [event["event"] for event in events.read(path)]
    assert kinds == ["run_started", "progress", "progress", "warning", "run_finished"]
