"""R14: folders one may not write, odd names, links, and clocks that lie: a message or success."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import workspaces
from tests.torture import faults
from tests.torture.faults import Ended, Scene, Space, Warm

DAY_S = 24 * 60 * 60
A_SENTENCE = (3,)


def _unprivileged() -> list[str]:
    """What to put before a command so that permissions count even for root."""
    if os.geteuid():
        return []
    command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]
    try:
        done = subprocess.run([*command, "true"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the program setpriv, or a user who is not root")
    if done.returncode:
        pytest.skip("needs the right to give up rights, or a user who is not root")
    return command


@contextmanager
def _mode(path: Path, mode: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(before)


def _fresh(scene: Scene) -> Space:
    scene.space.restore(scene.saved)
    return scene.space


def _forbidden(
    scene: Scene, warm: Warm, place: str, mode: int, codes: tuple[int, ...] = A_SENTENCE
) -> Ended:
    """An apply that may not use one place, judged with everything else allowed again."""
    before = _unprivileged()
    space = _fresh(scene)
    path = space.root / place if "*" not in place else next(space.root.glob(place))
    with _mode(path, mode):
        result = faults.run("apply", space.recipe, before=before)
    broken = scene.broken(result, warm, codes)
    faults.must_hold({place: broken} if broken else {}, 1)
    return result


@pytest.mark.parametrize("place", ["artifacts/store", "recipes", "artifacts/small"])
def test_a_folder_that_may_not_be_written_is_named(next_run: Scene, warm: Warm, place: str) -> None:
    assert place in _forbidden(next_run, warm, place, 0o555).err


def test_artifacts_that_may_not_be_written_do_no_damage(next_run: Scene, warm: Warm) -> None:
    result = _forbidden(next_run, warm, "artifacts", 0o555, (0, *A_SENTENCE))
    assert result.code == 0 or "artifacts" in result.err


@pytest.mark.parametrize("place", ["artifacts", "artifacts/store", "recipes", "artifacts/small"])
def test_a_folder_that_may_not_be_entered_is_a_sentence(
    next_run: Scene, warm: Warm, place: str
) -> None:
    codes = (2, 3) if place == "recipes" else A_SENTENCE  # the recipe itself cannot be read
    assert _forbidden(next_run, warm, place, 0, codes).err


def test_a_workspace_that_may_not_be_written_is_a_sentence(first_run: Scene, warm: Warm) -> None:
    assert _forbidden(first_run, warm, "", 0o555).err


@pytest.mark.parametrize("place", ["chats/chat-new.json", "chats"])
def test_a_source_that_may_not_be_read_is_named(next_run: Scene, warm: Warm, place: str) -> None:
    assert place in _forbidden(next_run, warm, place, 0).err


@pytest.mark.parametrize("mode", [0o444, 0])
@pytest.mark.parametrize(
    "place", ["recipes/small.lock", "artifacts/state.db", "artifacts/store/??/*/*.jsonl"]
)
def test_a_file_of_ours_that_may_not_be_written_or_read_does_no_damage(
    next_run: Scene, warm: Warm, place: str, mode: int
) -> None:
    if not list(next_run.saved.glob(place)):
        pytest.skip(f"this engine keeps no {place}")
    _forbidden(next_run, warm, place, mode, (0, *A_SENTENCE))


def test_a_file_where_the_artifacts_belong_is_a_sentence(first_run: Scene, warm: Warm) -> None:
    space = _fresh(first_run)
    space.artifacts.write_text("mine")
    result = faults.run("apply", space.recipe)
    assert faults.clean_ending(result, A_SENTENCE) == []
    assert space.artifacts.read_text() == "mine"
    space.artifacts.unlink()
    assert faults.recovers(space, first_run.after, warm) == []


NAMES = {
    "255 bytes": "x" * 250 + ".json",
    "255 bytes of letters": "é" * 125 + ".json",
    "composed": unicodedata.normalize("NFC", "é.json"),
    "decomposed": unicodedata.normalize("NFD", "é.json"),
    "right to left": "שלום‮.json",
    "emoji": "👩‍🚀.json",
    "new line": "two\nlines.json",
    "spaces": "  a b .json",
    "quotes": "'\"`$(x);&|.json",
    "backslash": "a\\b.json",
    "percent": "%s%d.json",
    "escape": "\x1b[31mred.json",
    "not UTF-8": os.fsdecode(b"\xff\xfe.json"),
    "dash": "-rf.json",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_source_may_have_any_name(tmp_path: Path, warm: Warm, name: str) -> None:
    space = faults.make(tmp_path, chats=2)
    workspaces.chat(space.root / "chats" / name, "a question", "an answer")
    result = warm.runner("apply", space.recipe)
    assert faults.clean_ending(result, [0]) == []
    assert "\x1b" not in result.out + result.err
    after = space.locked() or b""
    assert faults.recovers(space, after, warm) == []
    shutil.rmtree(space.artifacts)
    assert faults.recovers(space, after, warm) == []


@pytest.mark.parametrize(
    "stem",
    ["r" * 250, "r" * 235, "рецепт", "👩‍🚀", "a b", "two\nlines", os.fsdecode(b"\xff")],
    ids=["255 bytes", "240 bytes", "Cyrillic", "emoji", "space", "new line", "not UTF-8"],
)
def test_a_recipe_may_have_any_name_or_is_refused(tmp_path: Path, warm: Warm, stem: str) -> None:
    space = faults.make(tmp_path)
    recipe = space.recipe.rename(space.recipe.with_name(f"{stem}.yaml"))
    result = warm.runner("apply", recipe)
    lock = recipe.with_suffix(".lock")
    assert faults.clean_ending(result, (0, 2, *A_SENTENCE)) == []
    assert lock.exists() == (result.code == 0)
    assert set(recipe.parent.iterdir()) <= {recipe, lock}
    if result.code == 0:
        assert "nothing to do" in warm.runner("apply", recipe).out


def _linked(space: Space, target: Path) -> None:
    shutil.rmtree(space.artifacts, ignore_errors=True)
    space.artifacts.symlink_to(target, target_is_directory=True)


def test_the_artifacts_may_be_elsewhere_through_a_link(
    first_run: Scene, warm: Warm, tmp_path: Path
) -> None:
    space = _fresh(first_run)
    (tmp_path / "elsewhere").mkdir()
    _linked(space, tmp_path / "elsewhere")
    result = warm.runner("apply", space.recipe)
    broken = first_run.broken(result, warm, [0])
    faults.must_hold({"linked": broken} if broken else {}, 1)
    assert space.artifacts.is_symlink()


def test_the_artifacts_may_be_on_another_disk_through_a_link(
    first_run: Scene, warm: Warm, tmp_path: Path
) -> None:
    space = _fresh(first_run)
    with faults.small_disk(tmp_path / "elsewhere", 64 << 20):
        _linked(space, tmp_path / "elsewhere")
        result = warm.runner("apply", space.recipe)
        broken = first_run.broken(result, warm, [0])
        space.artifacts.unlink()
    faults.must_hold({"linked": broken} if broken else {}, 1)


def test_a_link_for_the_artifacts_that_leads_nowhere_is_a_sentence(
    first_run: Scene, warm: Warm, tmp_path: Path
) -> None:
    space = _fresh(first_run)
    _linked(space, tmp_path / "nowhere")
    result = warm.runner("apply", space.recipe)
    assert faults.clean_ending(result, (0, *A_SENTENCE)) == []
    space.artifacts.unlink()
    if result.code:
        assert space.locked() is None
        assert faults.recovers(space, first_run.after, warm) == []


@pytest.mark.parametrize("days", [-1, 1, 3650, -20_000])
def test_sources_of_another_day_give_the_same_outputs(
    next_run: Scene, warm: Warm, days: int
) -> None:
    space = _fresh(next_run)
    then = time.time() + days * DAY_S
    for path in (space.root / "chats").iterdir():
        os.utime(path, (then, then))
    broken = next_run.broken(warm.runner("apply", space.recipe), warm, [0])
    faults.must_hold({f"{days} days": broken} if broken else {}, 1)


@pytest.mark.parametrize("days", [-1, 1])
def test_what_we_wrote_on_another_day_is_still_right(
    next_run: Scene, warm: Warm, days: int
) -> None:
    space = _fresh(next_run)
    then = time.time() + days * DAY_S
    for path in (*space.artifacts.rglob("*"), *space.recipe.parent.iterdir()):
        os.utime(path, (then, then), follow_symlinks=False)
    broken = next_run.broken(warm.runner("apply", space.recipe), warm, [0])
    faults.must_hold({f"{days} days": broken} if broken else {}, 1)


@pytest.mark.parametrize("waited_s", [0, 2.5], ids=["at once", "later"])
def test_other_content_of_equal_size_and_time_is_noticed(
    tmp_path: Path, warm: Warm, waited_s: float
) -> None:
    space = faults.make(tmp_path)
    time.sleep(waited_s)
    assert warm.runner("apply", space.recipe).code == 0
    before = space.locked() or b""
    source = space.root / "chats" / "chat-5.json"
    status = source.stat()
    source.write_text(source.read_text().replace("chat 5", "cats 5"))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source.stat().st_size == status.st_size
    assert warm.runner("apply", space.recipe).code == 0
    edited = space.locked() or b""
    assert edited != before
    shutil.rmtree(space.artifacts)
    assert faults.recovers(space, edited, warm) == []


def test_sources_of_equal_time_and_size_are_not_taken_for_one_another(
    tmp_path: Path, warm: Warm
) -> None:
    space = faults.make(tmp_path, chats=0)
    chats = [
        workspaces.chat(space.root / "chats" / f"{name}.json", f"asked {name}", f"said {name}")
        for name in "abcdef"
    ]
    for path in chats:
        os.utime(path, (1e9, 1e9))
    assert warm.runner("apply", space.recipe).code == 0
    before = space.locked() or b""
    swapped = chats[0].with_name("swapped")
    chats[0].rename(swapped)
    chats[1].rename(chats[0])
    swapped.rename(chats[1])
    assert warm.runner("apply", space.recipe).code == 0
    after = space.locked() or b""
    assert after != before
    shutil.rmtree(space.artifacts)
    assert faults.recovers(space, after, warm) == []
