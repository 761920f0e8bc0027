"""How sources are looked at while files are still being put there."""

import os
import time
from pathlib import Path

import pytest

from runner.engine import look, opened, workspace
from runner.engine.look import Growing, Vanished
from runner.sources import SourceFile
from runner.watch import scan
from runner.watch.arrivals import Arrivals, network
from tests.watching import becomes
from tests.workspaces import DATA_RECIPE, apply, chat, make


def looked(recipe: Path, growing: Growing) -> dict[str, SourceFile]:
    with opened.at(recipe) as current:
        step = current.compiled.step("ingest")
        fact = current.world().lock.of_stage("ingest")
        before = fact.parts["sources"] if fact else None
        root, memory = current.workspace.root, current.state
        found = look.files(step, root, memory, growing=growing, before=before)
        return {file.name: file for file in found}


def test_a_file_that_has_just_changed_is_not_there_yet(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    chat(tmp_path / "chats" / "new.json", "q", "a")
    assert "chats/new.json" not in looked(recipe, Growing(settle_s=600))
    assert "chats/new.json" in looked(recipe, Growing())


def test_a_copied_old_date_does_not_make_a_file_ready(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    new = chat(tmp_path / "chats" / "new.json", "q", "a")
    os.utime(new, (1e9, 1e9))
    assert "chats/new.json" not in looked(recipe, Growing(settle_s=600))


def test_a_date_in_the_future_does_not_keep_a_file_away(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    new = chat(tmp_path / "chats" / "new.json", "q", "a")
    os.utime(new, (time.time() + 86400, time.time() + 86400))
    time.sleep(0.6)
    assert "chats/new.json" in looked(recipe, Growing(settle_s=0.5))


def test_a_known_file_that_is_being_written_keeps_its_hash(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    before = looked(recipe, Growing())
    chat(tmp_path / "chats" / "chat-0.json", "half a file")
    assert looked(recipe, Growing(settle_s=600)) == before


def test_a_held_file_is_not_looked_at(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    held = str(tmp_path / "chats" / "chat-0.json")
    assert "chats/chat-0.json" not in looked(recipe, Growing(held=frozenset([held])))


def test_a_fifth_of_the_sources_may_go(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=10)
    apply(recipe)
    (tmp_path / "chats" / "chat-0.json").unlink()
    (tmp_path / "chats" / "chat-1.json").unlink()
    assert len(looked(recipe, Growing(gone_max=0.2))) == 8


def test_more_than_a_fifth_at_once_is_an_error(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=10)
    apply(recipe)
    for number in range(3):
        (tmp_path / "chats" / f"chat-{number}.json").unlink()
    with pytest.raises(Vanished, match="3 of the 10 source files of ingest are gone"):
        looked(recipe, Growing(gone_max=0.2))


def test_files_that_only_have_other_names_are_not_gone(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=10)
    apply(recipe)
    for number in range(5):
        path = tmp_path / "chats" / f"chat-{number}.json"
        path.rename(path.with_name(f"other-{number}.json"))
    assert len(looked(recipe, Growing(gone_max=0.2))) == 10


def test_sources_that_the_recipe_names_no_more_are_not_gone(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    chat(tmp_path / "more" / "one.json", "q", "a")
    recipe.write_text(DATA_RECIPE.replace("[chats]", "[more]"))
    assert list(looked(recipe, Growing(gone_max=0.2))) == ["more/one.json"]


def test_a_scan_is_the_same_until_something_changes(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with opened.at(recipe) as current:
        compiled = current.compiled
    first = scan.of(tmp_path, compiled, 0)
    assert scan.of(tmp_path, compiled, 0).is_as(first)
    chat(tmp_path / "chats" / "new.json", "q", "a")
    (tmp_path / "chats" / "chat-0.json").unlink()
    now = scan.of(tmp_path, compiled, 0)
    assert not now.is_as(first)
    assert now.changed_since(first) == 2


def test_a_scan_names_a_source_that_is_missing(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with opened.at(recipe) as current:
        compiled = current.compiled
    (tmp_path / "chats").rename(tmp_path / "away")
    [missing] = scan.of(tmp_path, compiled, 0).missing
    assert "is not there" in missing


def test_links_that_lead_out_are_all_named_at_once(tmp_path: Path) -> None:
    root = tmp_path / "space"
    make(root)
    outside = chat(tmp_path / "outside.json", "q", "a")
    for name in ("one.json", "two.json"):
        (root / "chats" / name).symlink_to(outside)
    with pytest.raises(workspace.LinksOut) as raised:
        workspace.matching(root, "chats")
    assert sorted(Path(path).name for path in raised.value.paths) == ["one.json", "two.json"]


def test_a_change_is_marked(tmp_path: Path) -> None:
    arrivals = Arrivals([(str(tmp_path), True)], tmp_path / "artifacts")
    try:
        assert not arrivals.why_polling
        (tmp_path / "a").mkdir()
        assert becomes(lambda: arrivals.marks.taken() is not None)
    finally:
        arrivals.close()


def test_reading_and_temporary_names_are_not_marked(tmp_path: Path) -> None:
    path = chat(tmp_path / "one.json", "q", "a")
    (tmp_path / "artifacts").mkdir()
    arrivals = Arrivals([(str(tmp_path), True)], tmp_path / "artifacts")
    try:
        path.read_bytes()
        (tmp_path / ".hidden").touch()
        (tmp_path / "new.json.part").touch()
        (tmp_path / "artifacts" / "state").touch()
        time.sleep(0.5)
        assert arrivals.marks.taken() is None
    finally:
        arrivals.close()


def test_folders_of_another_machine_are_told_by_their_file_system(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\n"
        "host:/x /mnt/my\\040share nfs4 rw 0 0\n"
        "x /mnt/ssh fuse.sshfs rw 0 0\n"
    )
    kinds = [network(path, mounts) for path in ("/mnt/my share/a", "/mnt/ssh", "/mnt", "/home/x")]
    assert kinds == ["nfs4", "fuse.sshfs", None, None]


def test_what_was_taken_is_known_from_the_output_where_the_state_is_lost(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=10)
    apply(recipe)
    (tmp_path / "artifacts" / "state.db").unlink()
    for number in range(3):
        (tmp_path / "chats" / f"chat-{number}.json").unlink()
    with pytest.raises(Vanished, match="3 of the 10 source files of ingest are gone"):
        looked(recipe, Growing(gone_max=0.2))


def test_a_folder_that_is_gone_with_the_state_is_an_error(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    (tmp_path / "artifacts" / "state.db").unlink()
    (tmp_path / "chats").rename(tmp_path / "away")
    with pytest.raises(Vanished, match="6 of the 6"):
        looked(recipe, Growing(gone_max=0.2))


def test_files_that_are_not_settled_yet_are_not_gone_with_the_state(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=10)
    apply(recipe)
    (tmp_path / "artifacts" / "state.db").unlink()
    time.sleep(0.6)
    for number in range(5):
        (tmp_path / "chats" / f"chat-{number}.json").touch()
    assert len(looked(recipe, Growing(settle_s=0.5, gone_max=0.2))) == 5


@pytest.mark.parametrize("source", ["chats", "chats/*.json", "chats/**"])
def test_the_folder_of_a_workspace_may_have_wildcards_in_its_name(
    tmp_path: Path, source: str
) -> None:
    root = tmp_path / "chats [old] * .what?" / ".hidden"
    recipe = make(root, DATA_RECIPE.replace("[chats]", f"['{source}']"))
    with opened.at(recipe) as current:
        step, space = current.compiled.step("ingest"), current.workspace
        assert len(look.files(step, space.root, current.state)) == 6
        watched = {folder for folder, _, _, _ in scan.folders(root, recipe, current.compiled)}
    assert watched == {str(root), str(root / "chats"), str(root / "recipes")}
