from pathlib import Path

import pytest

from runner import disk
from runner.engine import words
from runner.ui import preview, progress


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59, "59 s"), (185, "3:05"), (8049, "2:14:09")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(812, "812 B"), (3_400_000, "3.4 MB"), (1_234_000_000, "1.23 GB")]
)
def test_sizes_have_a_unit(count: int, text: str) -> None:
    assert words.size(count) == text


def test_metrics_leave_out_what_there_is_none_of() -> None:
    values = {"files": 1200, "rejected": 0, "eval_loss": 2.34567, "q4_k_m_bytes": 105_453_920}
    assert words.metrics(values) == "files 1,200, eval loss 2.346, q4_k_m 105.5 MB"


def test_a_preview_marks_what_is_learned() -> None:
    shown = [
        {"token": "user\nhi", "id": 1, "weight": 0},
        {"token": "hel", "id": 2, "weight": 1.0},
        {"token": "lo\x1b", "id": 3, "weight": 1.0},
        {"token": "again", "id": 4, "weight": 2.0},
    ]
    assert preview.painted(shown, colour=False) == "user\nhi⟦hello\\x1b⟧⟦again⟧×2"
    assert "\x1b[32mhello" in preview.painted(shown, colour=True)
    assert preview.summary(shown) == "4 tokens, 3 with loss, weights 1 and 2"


def test_a_training_step_is_one_line_with_loss_speed_and_time_left() -> None:
    event = {
        "event": "metrics",
        "stage": "train",
        "step": 3,
        "steps": 90,
        "loss": 1.5,
        "tokens_per_second": 412.3,
        "seconds_left": 185,
    }
    assert progress.line_of(event) == ("train: step 3 of 90, loss 1.500, 412 tokens/s, 3:05 left")


def test_without_a_terminal_there_are_lines_and_of_progress_only_some(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = progress.view(terminal=False)
    view.show({"event": "stage_started", "stage": "tokenize", "causes": ["it has not run yet"]})
    for done in range(100):
        view.show(
            {"event": "progress", "stage": "tokenize", "done": done, "total": 100, "unit": "chats"}
        )
    view.show(
        {"event": "stage_finished", "stage": "tokenize", "seconds": 2, "metrics": {"rows": 1}}
    )
    view.close()
    assert capsys.readouterr().out.splitlines() == [
        "tokenize: runs, because it has not run yet",
        "tokenize: done in 2.0 s (rows 1)",
    ]


def test_ci_gets_lines_even_with_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert isinstance(progress.view(terminal=True), progress.Lines)


def test_the_size_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"45")
    assert disk.size(tmp_path) == 5
