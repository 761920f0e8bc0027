import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread

import pytest
from filelock import FileLock

from tests import workspaces
from tests.watching import Watch, becomes, ingested, state
from tests.workspaces import DATA_RECIPE, chat, make, rows

NOTIFYING = DATA_RECIPE + "retrain:\n  notify: {webhook: 'http://127.0.0.1:PORT/hook?x=1'}\n"


@pytest.fixture(scope="module", autouse=True)
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An applied recipe, made before all tests, so that nothing is waited for when it is used."""
    recipe = make(tmp_path_factory.mktemp("settled"))
    workspaces.apply(recipe)
    return recipe


@contextmanager
def growing(path: Path) -> Iterator[None]:
    """The file is written anew, on and on."""
    ended = Event()

    def write() -> None:
        with path.open("w") as file:
            while not ended.wait(0.02):
                file.write("[")
                file.flush()

    thread = Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def hook() -> Iterator[tuple[int, list[dict[str, object]]]]:
    """A web server on this machine, and what was sent to it."""
    got: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append({"path": self.path, **json.loads(body)})
            self.send_response(302 if "redirect" in self.path else 200)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port, got
        server.shutdown()
        thread.join()


def test_a_file_that_arrives_is_applied(tmp_path: Path) -> None:
    with Watch(make(tmp_path)) as watch:
        watch.says("done")
        chat(tmp_path / "chats" / "new.json", "hello", "there")
        watch.says("done")
        assert "chats/new.json" in ingested(tmp_path)


def test_a_file_in_a_new_folder_is_applied(tmp_path: Path) -> None:
    with Watch(make(tmp_path)) as watch:
        watch.says("done")
        chat(tmp_path / "chats" / "a" / "b" / "new.json", "hello", "there")
        watch.says("done")
        assert "chats/a/b/new.json" in ingested(tmp_path)


def test_an_apply_starts_within_settle_quiet_and_a_second(tmp_path: Path) -> None:
    with Watch(make(tmp_path), settle_s=0.5, quiet_s=1.0, tick_s=0.5) as watch:
        watch.says("done")
        waits = []
        for number in range(5):  # the machine may be busy with something else
            assert becomes(lambda: state(tmp_path)["state"] == "idle")
            arrived = time.time()
            chat(tmp_path / "chats" / f"new-{number}.json", "hello", f"there {number}")
            watch.runs("ingest")
            waits.append([e for e in watch.events if e["event"] == "run"][-1]["started"] - arrived)
            assert waits[-1] >= 1.0
            if waits[-1] <= 0.5 + 1.0 + 1:
                break
            watch.says("done")
        assert min(waits) <= 0.5 + 1.0 + 1


def test_what_arrives_while_a_run_is_going_gives_one_more_run(tmp_path: Path) -> None:
    with Watch(make(tmp_path)) as watch:
        watch.until(lambda e: e["event"] == "run")
        for number in range(5):
            chat(tmp_path / "chats" / f"late-{number}.json", f"hello {number}", "there")
        watch.says("done")
        if len(ingested(tmp_path)) < 11:
            watch.says("done")
        assert becomes(lambda: state(tmp_path)["state"] == "idle")
        assert watch.is_silent(1)
        assert len(ingested(tmp_path)) == 11


def test_a_file_that_is_still_being_written_is_not_read_half(tmp_path: Path) -> None:
    lines = [json.dumps({"messages": [{"role": r, "content": f"{r} {n}"} for r in
             ("user", "assistant")]}) for n in range(30)]  # fmt: skip
    with Watch(make(tmp_path), settle_s=1.0, quiet_s=1.0) as watch:
        watch.says("done")
        with (tmp_path / "chats" / "slow.jsonl").open("w") as file:
            for line in lines:
                file.write(line + "\n")
                file.flush()
                time.sleep(0.05)
                assert not any(e["event"] == "stage_started" for e in watch.events[-1:])
        watch.says("done")
    counts = [e["metrics"]["conversations"] for e in watch.events
              if e["event"] == "stage_finished" and e["stage"] == "ingest"]  # fmt: skip
    assert counts == [6, 36]


def test_a_known_file_that_is_being_written_stays_as_it_was(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with Watch(recipe, longest_s=1.0) as watch:
        watch.says("done")
        before = rows(tmp_path / "artifacts/small/ingest/conversations.jsonl")
        chat(tmp_path / "chats" / "other.json", "another", "one")
        with growing(tmp_path / "chats" / "chat-0.json"):  # longer than is waited for
            watch.says("done")
            now = rows(tmp_path / "artifacts/small/ingest/conversations.jsonl")
            assert [row for row in now if row["source"]["path"] != "chats/other.json"] == before


def test_temporary_names_start_nothing(tmp_path: Path) -> None:
    with Watch(make(tmp_path)) as watch:
        watch.says("done")
        for name in (".hidden.json", "a.json~", "a.json.part", "a.tmp", "a.json.crdownload"):
            chat(tmp_path / "chats" / name, "hello", "there")
        assert watch.is_silent(1.5)
        assert len(ingested(tmp_path)) == 6


def test_a_download_counts_from_the_moment_it_has_its_name(tmp_path: Path) -> None:
    with Watch(make(tmp_path)) as watch:
        watch.says("done")
        part = chat(tmp_path / "chats" / "new.json.crdownload", "hello", "there")
        part.rename(tmp_path / "chats" / "new.json")
        watch.says("done")
        assert "chats/new.json" in ingested(tmp_path)


def test_a_bad_file_is_named_and_stops_nothing(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    (tmp_path / "chats" / "bad.json").write_text('{"cut off": ')
    with Watch(recipe, once=True) as watch:
        assert watch.end() == 0
    [bad] = state(tmp_path)["bad"]
    assert bad["path"] == "chats/bad.json"
    assert len(bad["sha256"]) == 64
    assert len(ingested(tmp_path)) == 6


def test_a_bad_file_that_is_mended_is_not_named_any_more(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    (tmp_path / "chats" / "bad.json").write_text('{"cut off": ')
    with Watch(recipe) as watch:
        watch.says("done")
        chat(tmp_path / "chats" / "bad.json", "hello", "there")
        watch.says("done")
        assert becomes(lambda: state(tmp_path)["bad"] == [])


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_a_link_that_leads_out_is_set_aside_and_the_rest_is_applied(tmp_path: Path) -> None:
    recipe = make(tmp_path / "space")
    outside = chat(tmp_path / "outside.json", "not", "yours")
    (tmp_path / "space" / "chats" / "link.json").symlink_to(outside)
    with Watch(recipe, once=True) as watch:
        assert watch.end() == 0
    assert len(ingested(tmp_path / "space")) == 6
    [aside] = state(tmp_path / "space")["aside"]
    assert "leads out of the workspace" in aside["reason"]


def test_a_source_folder_that_is_gone_is_held_and_not_trained_on(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with Watch(recipe) as watch:
        watch.says("done")
        (tmp_path / "chats").rename(tmp_path / "away")
        assert "6 of the 6 source files" in watch.says("held")["text"]
        assert len(ingested(tmp_path)) == 6
        assert becomes(lambda: state(tmp_path)["state"] == "held")
        (tmp_path / "away").rename(tmp_path / "chats")
        assert becomes(lambda: state(tmp_path)["state"] == "idle")
        chat(tmp_path / "chats" / "new.json", "hello", "there")
        watch.says("done")
        assert len(ingested(tmp_path)) == 7


def test_a_folder_that_is_gone_at_the_start_is_held_too(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    workspaces.apply(recipe)
    shutil.rmtree(tmp_path / "chats")
    (tmp_path / "chats").mkdir()
    with Watch(recipe, once=True) as watch:
        assert watch.end() == 3
    assert state(tmp_path)["last"]["state"] == "held"


def test_deletions_go_on_when_they_are_accepted(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    workspaces.apply(recipe)
    for number in range(3):
        (tmp_path / "chats" / f"chat-{number}.json").unlink()
    with Watch(recipe, once=True, accepts=True) as watch:
        assert watch.end() == 0
    assert len(ingested(tmp_path)) == 3


def test_deletions_can_be_accepted_beside_the_running_watch(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with Watch(recipe, quiet_s=1.0) as watch:  # all three are gone by then
        watch.says("done")
        for number in range(3):
            (tmp_path / "chats" / f"chat-{number}.json").unlink()
        watch.says("held")
        done = workspaces.run("watch", recipe, "--accept-deletions")
        assert done.returncode == 0, done.stderr
        watch.says("done")
        assert len(ingested(tmp_path)) == 3


def test_deletions_can_be_accepted_beside_a_watch_of_two_recipes(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "other")
    other.write_text(DATA_RECIPE.replace("small", "other"))
    with Watch([one, other], quiet_s=1.0) as watch:
        watch.says("done")
        watch.says("done")
        for root in (tmp_path / "one", tmp_path / "other"):
            for number in range(3):
                (root / "chats" / f"chat-{number}.json").unlink()
        watch.says("held")
        watch.says("held")
        done = workspaces.run("watch", one, other, "--accept-deletions")
        assert done.returncode == 0, done.stderr
        watch.says("done")
        watch.says("done")


def test_a_folder_of_records_that_cannot_be_written_does_not_end_the_watch(
    tmp_path: Path,
) -> None:
    recipe = make(tmp_path)
    with Watch(recipe) as watch:
        watch.says("done")
        shutil.rmtree(tmp_path / "artifacts" / "watch")
        (tmp_path / "artifacts" / "watch").touch()
        chat(tmp_path / "chats" / "new.json", "hello", "there")
        watch.says("done")
        assert len(ingested(tmp_path)) == 7


def test_a_folder_of_records_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with Watch(recipe) as watch:
        watch.says("done")
        shutil.rmtree(tmp_path / "artifacts" / "watch")
        chat(tmp_path / "chats" / "new.json", "hello", "there")
        watch.says("done")
        assert becomes(lambda: (tmp_path / "artifacts" / "watch" / "small.json").exists())


def test_a_recipe_that_is_deleted_is_reported_and_found_again(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with Watch(recipe) as watch:
        watch.says("done")
        recipe.rename(tmp_path / "away.yaml")
        assert "small.yaml" in watch.says("recipe")["text"]
        assert becomes(lambda: "the recipe is broken" in state(tmp_path)["text"])
        (tmp_path / "away.yaml").rename(recipe)
        assert becomes(lambda: not state(tmp_path)["recipe_problem"])


def test_a_folder_that_is_renamed_is_not_a_deletion(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with Watch(recipe) as watch:
        watch.says("done")
        (tmp_path / "chats" / "old").mkdir()
        for path in (tmp_path / "chats").glob("*.json"):
            path.rename(tmp_path / "chats" / "old" / path.name)
        watch.says("done")
        assert becomes(lambda: all(p.startswith("chats/old/") for p in ingested(tmp_path)))


def test_a_broken_edit_of_the_recipe_is_reported_and_the_last_good_one_kept(
    tmp_path: Path,
) -> None:
    recipe = make(tmp_path)
    with Watch(recipe) as watch:
        watch.says("done")
        recipe.write_text(DATA_RECIPE + "  - stage: no such thing\n")
        assert "no such thing" in watch.says("recipe")["text"]
        chat(tmp_path / "chats" / "new.json", "hello", "there")
        watch.says("done")
        assert "no such thing" in state(tmp_path)["recipe_problem"]
        recipe.write_text(DATA_RECIPE.replace("0.2", "0.3"))
        assert watch.says("recipe")["text"] == "the recipe is mended, and has changed"
        watch.runs("split")
        watch.says("done")
        assert state(tmp_path)["recipe_problem"] == ""


def test_a_recipe_that_is_mended_as_it_was_is_said(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with Watch(recipe) as watch:
        watch.says("done")
        recipe.write_text("name: small\n")
        watch.says("recipe")
        recipe.write_text(DATA_RECIPE)
        assert watch.says("recipe")["text"] == "the recipe is mended, and is as it was before"


def test_a_run_that_has_not_trained_yet_starts_anew_with_a_changed_recipe(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    workspaces.apply(recipe)
    chat(tmp_path / "chats" / "new.json", "hello", "there")
    other_apply = FileLock(tmp_path / "artifacts" / "apply.lock")
    with other_apply, Watch(recipe, once=True) as watch:
        watch.until(lambda e: e["event"] == "warning")  # it waits for the other one
        recipe.write_text(DATA_RECIPE.replace("0.2", "0.3"))
        assert "starts anew with it" in watch.says("recipe")["text"]
        watch.until(lambda e: e["event"] == "warning")
        other_apply.release()
        assert watch.end() == 0
    assert set(workspaces.states(recipe).values()) == {"skip"}
    assert state(tmp_path)["last"]["state"] == "done"


def test_a_failing_run_is_tried_again_later_and_later(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=1)
    (tmp_path / "chats" / "chat-0.json").write_text('{"cut off": ')
    with Watch(recipe, retry_s=0.3, retry_max_s=8) as watch:
        for _ in range(4):
            watch.says("failed")
        started = [e["started"] for e in watch.events if e["event"] == "run"]
    # Without the first, which may have come before the file had settled.
    gaps = [later - sooner for sooner, later in pairwise(started)][-3:]
    assert all(gap >= 0.3 * 2**place for place, gap in enumerate(gaps))


def test_a_failing_run_is_tried_at_once_with_other_data(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=1)
    (tmp_path / "chats" / "chat-0.json").write_text('{"cut off": ')
    with Watch(recipe, retry_s=100, retry_max_s=100) as watch:
        watch.says("failed")
        chat(tmp_path / "chats" / "chat-0.json", "hello", "there")
        watch.says("done")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_an_idle_watch_cleanly(tmp_path: Path, number: int) -> None:
    with Watch(make(tmp_path)) as watch:
        watch.says("done")
        assert watch.stop(number) == 0
    assert state(tmp_path)["state"] == "stopped"


def test_a_signal_ends_a_watch_in_the_middle_of_a_run(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=400)
    with Watch(recipe) as watch:
        watch.runs("ingest")
        assert watch.stop() == 0
    assert state(tmp_path)["state"] == "stopped"
    with Watch(recipe, once=True) as watch:
        assert watch.end() == 0
    assert len(ingested(tmp_path)) == 400


def test_a_run_ends_with_a_watch_that_is_killed_and_the_next_watch_goes_on(
    tmp_path: Path,
) -> None:
    recipe = make(tmp_path, chats=300)
    for seconds in (0.2, 0.5, 0.8, 1.1):
        with Watch(recipe) as watch:
            time.sleep(seconds)
            watch.process.kill()
    with Watch(recipe, once=True) as watch:
        assert watch.end() == 0
    assert len(ingested(tmp_path)) == 300
    assert workspaces.states(recipe) == dict.fromkeys(("ingest", "window", "split"), "skip")


def test_two_watches_of_one_recipe_refuse_each_other(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with Watch(recipe) as first:
        first.says("done")
        with Watch(recipe) as second:
            assert second.end() == 4
        assert "being watched already by process" in second.events[-1]["text"]
        assert f"`runner status {recipe}` says" in workspaces.run("watch", recipe).stderr


def test_two_recipes_are_watched_together(tmp_path: Path) -> None:
    one = make(tmp_path)
    other = one.with_name("other.yaml")
    other.write_text(DATA_RECIPE.replace("name: small", "name: other"))
    with Watch([one, other]) as watch:
        names = {watch.says("done")["recipe"], watch.says("done")["recipe"]}
        assert names == {"small", "other"}


def test_status_says_what_the_watch_does(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with Watch(recipe) as watch:
        watch.says("done")
        assert becomes(lambda: state(tmp_path)["state"] == "idle")
        said = workspaces.run("status", recipe).stdout
    assert "watch: running · 6 files · everything is up to date" in said


def test_status_of_a_recipe_that_is_broken_still_tells_of_its_watch(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with Watch(recipe) as watch:
        watch.says("done")
        recipe.write_text("name: other\n")
        watch.says("recipe")
        done = workspaces.run("status", recipe)
        as_json = json.loads(workspaces.run("status", recipe, "--json").stdout)
    assert done.stdout.startswith("watch: running · 6 files")
    assert (done.returncode, as_json["exit_code"]) == (2, 2)
    assert "needs `stages:`" in done.stderr
    assert as_json["watch"]["is_running"]


def test_status_says_each_thing_once(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=1)
    (tmp_path / "chats" / "chat-0.json").write_text('{"cut off": ')
    with Watch(recipe) as watch:
        watch.says("failed")
        assert becomes(lambda: state(tmp_path)["state"] == "failed")
    said = workspaces.run("status", recipe).stdout
    assert said.count(state(tmp_path)["last"]["text"]) == 1


def test_status_tells_a_watch_that_was_killed_from_one_that_runs(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with Watch(recipe) as watch:
        watch.says("done")
        watch.process.kill()
        watch.process.wait()
        assert "watch: not running" in workspaces.run("status", recipe).stdout


def test_the_webhook_hears_of_a_run_that_has_ended(
    tmp_path: Path, hook: tuple[int, list[dict[str, object]]]
) -> None:
    port, got = hook
    recipe = make(tmp_path, NOTIFYING.replace("PORT", str(port)))
    with Watch(recipe, once=True) as watch:
        assert watch.end() == 0
    [notice] = got
    assert notice.keys() == {"path", "recipe", "state", "text", "started", "seconds"}
    assert (notice["path"], notice["recipe"], notice["state"]) == ("/hook?x=1", "small", "done")


def test_the_webhook_hears_of_a_failure_once(
    tmp_path: Path, hook: tuple[int, list[dict[str, object]]]
) -> None:
    port, got = hook
    recipe = make(tmp_path, NOTIFYING.replace("PORT", str(port)), chats=1)
    (tmp_path / "chats" / "chat-0.json").write_text('{"cut off": ')
    with Watch(recipe, retry_s=0.2, retry_max_s=0.2) as watch:
        for _ in range(3):
            watch.says("failed")
        assert watch.stop() == 0
    assert [notice["state"] for notice in got] == ["failed"]


def test_a_webhook_that_redirects_is_a_warning_and_is_not_followed(
    tmp_path: Path, hook: tuple[int, list[dict[str, object]]]
) -> None:
    port, got = hook
    recipe = make(tmp_path, NOTIFYING.replace("PORT/hook", f"{port}/redirect"))
    with Watch(recipe) as watch:
        assert "redirects are not followed" in watch.says("warning")["text"]
    assert len(got) == 1


def test_a_webhook_that_is_not_there_is_a_warning(tmp_path: Path) -> None:
    recipe = make(tmp_path, NOTIFYING.replace("PORT", "1"))
    with Watch(recipe) as watch:
        assert "the webhook at 127.0.0.1" in watch.says("warning")["text"]
        assert watch.stop() == 0


def test_once_with_nothing_to_do_ends_with_0(settled: Path) -> None:
    done = workspaces.run("watch", settled, "--once")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_broken_recipe_at_the_start_is_a_mistake(tmp_path: Path) -> None:
    recipe = make(tmp_path, "name: small\n")
    assert workspaces.run("watch", recipe, "--once").returncode == 2


def test_deleting_the_state_database_changes_nothing(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    with Watch(recipe) as watch:
        watch.says("done")
        (tmp_path / "artifacts" / "state.db").unlink()
        chat(tmp_path / "chats" / "new.json", "hello", "there")
        watch.says("done")
        assert len(ingested(tmp_path)) == 7


def test_a_share_that_comes_back_is_listened_to_again(tmp_path: Path) -> None:
    recipe = make(tmp_path, DATA_RECIPE.replace("[chats]", "[chats, share]"))
    with workspaces.small_disk(tmp_path / "share", "1m"):
        chat(tmp_path / "share" / "1.json", "hello", "there")
        with Watch(recipe, quiet_s=0.3) as watch:
            watch.says("done")
            subprocess.run(["umount", "-l", str(tmp_path / "share")], check=True)
            time.sleep(0.5)
            mount = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "share")]
            subprocess.run(mount, check=True)
            chat(tmp_path / "share" / "1.json", "hello", "there")
            chat(tmp_path / "share" / "2.json", "hello again", "there")
            chat(tmp_path / "chats" / "new.json", "a mark", "there")
            watch.says("done")
            chat(tmp_path / "share" / "3.json", "hello once more", "there")
            assert becomes(lambda: "share/3.json" in ingested(tmp_path))


def test_where_the_system_has_no_watches_left_folders_are_scanned_instead(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    for number in range(6):
        chat(tmp_path / "chats" / f"folder-{number}" / "one.json", f"hello {number}", "there")
    few = 'echo 4 > /proc/sys/user/max_inotify_watches && exec "$@"'
    within = ["unshare", "--user", "--map-root-user", "sh", "-c", few, "sh"]
    if not shutil.which("unshare") or subprocess.run([*within, "true"]).returncode:
        pytest.skip("needs the right to make a user namespace")
    time.sleep(1.1)
    with Watch(recipe, within=within) as watch:
        assert "watches no more folders" in watch.says("polling")["text"]
        watch.says("done")
        for number in range(6):
            chat(tmp_path / "chats" / f"folder-{number}" / "two.json", f"bye {number}", "then")
        watch.says("done")
        assert becomes(lambda: len(ingested(tmp_path)) == 18)
