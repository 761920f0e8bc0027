from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.chat import files, intake
from runner.chat.conversation import Conversation
from runner.chat.intake import NotAConversation, Place
from runner.collect import collect, place_of
from runner.errors import PreconditionError, RecipeError, RunnerError
from tests.workspaces import DATA_RECIPE, apply, make, rows, run

LEFT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def said(path: Path) -> dict[str, Any]:
    """The one conversation that ingest finds in the file."""
    (found,) = files.read(path.name, io.BytesIO(path.read_bytes()))
    assert isinstance(found, Conversation)
    return found.content.record()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ingested(root: Path) -> list[dict[str, Any]]:
    return rows(root / "artifacts" / "small" / "ingest" / "conversations.jsonl")


def test_a_question_and_its_reply_are_written_in_the_users_shape(tmp_path: Path) -> None:
    path = collect(tmp_path, user="q", reply="a", metadata={"provider": "p", "timestamp": "t"})
    assert json.loads(path.read_text()) == {
        "instruction": "q",
        "input": "",
        "output": "a",
        "metadata": {"provider": "p", "timestamp": "t"},
    }


@pytest.mark.parametrize(
    "messages",
    [
        LEFT,
        [{"role": "system", "content": "s"}, *LEFT],
        [*LEFT, {"role": "user", "content": "q2"}, {"role": "assistant", "content": " Ъ\n\u2028 "}],
        [LEFT[0], {"role": "assistant", "content": "a", "weight": 0}],
        [LEFT[0], {"role": "assistant", "content": "a", "thinking": "hm"}],
        [
            LEFT[0],
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "f", "arguments": {"x": [1, None, "2"]}}],
            },
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "a"},
        ],
        [{"role": "user", "content": '{"a": 1}'}, {"role": "assistant", "content": "\x1b[31m\r\t"}],
    ],
)
def test_ingest_reads_back_what_was_given(
    tmp_path: Path, messages: Sequence[Mapping[str, Any]]
) -> None:
    metadata = {"provider": "p", "mode": "m", "timestamp": "t", "version": 2, "tags": ["x", {}]}
    found = said(collect(tmp_path, messages, metadata=metadata))
    assert found == {"messages": list(messages), "metadata": metadata}


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(st.lists(TEXTS.filter(str.strip), min_size=2, max_size=6), st.booleans())
def test_any_text_is_read_back_as_it_was(texts: list[str], with_system: bool) -> None:
    said = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]
    if with_system:
        said.insert(0, {"role": "system", "content": texts[0]})
    data = intake.as_bytes(Place(Path()), said, {"x": texts[0]})
    (found,) = files.read("new.json", data)
    assert isinstance(found, Conversation)
    assert found.content.record()["messages"] == said
    assert found.content.metadata["x"] == texts[0]


def test_the_time_is_added_where_the_metadata_has_none(tmp_path: Path) -> None:
    before = time.strftime("%Y-%m-%dT%H:%M", time.gmtime())
    stamp = said(collect(tmp_path, LEFT))["metadata"]["timestamp"]
    assert stamp[:16] >= before
    assert stamp.endswith("+00:00")


def test_names_sort_by_time(tmp_path: Path) -> None:
    written = [collect(tmp_path, LEFT).name for _ in range(20)]
    assert written == sorted(written) == names(tmp_path)


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "has no message"),
        ("text", "messages are str, not a list"),
        ({"role": "user"}, "messages are dict, not a list"),
        (["x"], "message 0 is str, not an object"),
        (LEFT[:1], "has no user message with a reply after it"),
        (LEFT[::-1], "has no user message with a reply after it"),
        ([{"role": "robot", "content": "x"}], "message 0 has role 'robot'"),
        ([{"role": "user", "content": "x", "name": "y"}], "message 0 has the key 'name'"),
        ([{"role": "user", "content": 1}], "message 0: content is int, not a text"),
        ([{"role": "user", "content": " \n"}], "message 0: content is empty"),
        ([{"role": "user", "content": "a\0"}], "message 0: content has a NUL character"),
        ([{"role": "user", "content": "\ud800"}], "has half of a surrogate pair"),
        ([{"role": "user", "content": "x", "weight": 0}], "of role user and has weight"),
        ([LEFT[0], {**LEFT[1], "weight": 0.5}], "message 1 has weight 0.5"),
        ([LEFT[0], {**LEFT[1], "tool_calls": [{}]}], "tool_calls is not a list of calls"),
        ([LEFT[0], {"role": "assistant", "content": "x" * (9 << 20)}], "9,437,184 characters"),
        ([LEFT[0], {"role": "assistant", "content": "Ъ" * (5 << 20)}], "a file of 10,485,8"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_with_its_place(
    tmp_path: Path, messages: Any, what: str
) -> None:
    with pytest.raises(ValueError, match=what) as caught:
        collect(tmp_path, messages)
    assert isinstance(caught.value, NotAConversation)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "metadata",
    [{"x": float("nan")}, {"x": b""}, {"x": 1 << 70}, {"x": "\udc00"}, {"": 1}, {1: 2}, ["x"]],
)
def test_metadata_that_json_cannot_keep_is_refused(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(NotAConversation, match="metadata"):
        collect(tmp_path, LEFT, metadata=metadata)


def test_metadata_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {}
    metadata["x"] = metadata
    with pytest.raises(NotAConversation, match="JSON cannot keep"):
        collect(tmp_path, LEFT, metadata=metadata)


def test_a_reply_without_its_question_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAConversation, match="content is NoneType, not a text"):
        collect(tmp_path, reply="a")
    with pytest.raises(NotAConversation, match="user, reply or system beside them"):
        collect(tmp_path, LEFT, user="q")


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="there is no folder"):
        collect(tmp_path / "none", LEFT)


def test_a_folder_that_takes_no_files_is_a_sentence() -> None:
    with pytest.raises(PreconditionError, match="/proc/self: "):
        collect("/proc/self", LEFT)


@pytest.mark.parametrize(
    ("sources", "folder", "ending"),
    [
        (["one.json", "a", "b"], "a", ".json"),
        (["a/*.json"], "a", ".json"),
        (["a/*.jsonl"], "a", ".jsonl"),
        (["a/**/*.json"], "a", ".json"),
        (["a/**"], "a", ".json"),
        (["a/*/x.json", "a/*.txt", "none", "../b", "b/*"], "b", ".json"),
    ],
)
def test_a_new_file_goes_where_the_recipe_finds_it(
    tmp_path: Path, sources: list[str], folder: str, ending: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "one.json").touch()
    assert intake.place(tmp_path, sources, "auto") == Place(tmp_path / folder, ending)


def test_a_recipe_that_reads_no_folder_is_refused(tmp_path: Path) -> None:
    recipe = make(tmp_path, DATA_RECIPE.replace("[chats]", "[chats/chat-0.json]"))
    with pytest.raises(RecipeError, match=r"no source of the recipe is a folder .*chat-0"):
        collect(recipe, LEFT)
    done = run("add", recipe, "--user", "q", "--reply", "a")
    assert (done.returncode, done.stdout) == (2, "")


def test_the_format_that_ingest_is_told_to_read_is_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    place = intake.place(tmp_path, ["a"], "messages")
    assert json.loads(collect(place, LEFT).read_text())["messages"] == LEFT
    with pytest.raises(RecipeError, match="`format: sender`"):
        intake.place(tmp_path, ["a"], "sender")
    with pytest.raises(RecipeError, match="one question, one reply"):
        collect(intake.place(tmp_path, ["a"], "instruct"), [*LEFT, *LEFT])


def test_the_next_apply_reads_what_was_collected_with_its_metadata(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    apply(recipe)
    path = collect(recipe, user="new", reply="reply", metadata={"mode": "m", "timestamp": "t"})
    apply(recipe)
    (found,) = [row for row in ingested(tmp_path) if row["source"]["path"].endswith(path.name)]
    assert [said["content"] for said in found["messages"]] == ["new", "reply"]
    assert found["metadata"] == {"mode": "m", "timestamp": "t"}


def test_a_thousand_from_eight_processes_are_a_thousand_conversations(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=0)
    (tmp_path / "chats").mkdir()
    program = (
        "import sys; from runner.collect import collect\n"
        "for n in range(125): collect(sys.argv[1], user=f'q {sys.argv[2]} {n}', reply='a')"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path / "chats", str(number)])
        for number in range(8)
    ]
    assert [process.wait() for process in running] == [0] * 8
    assert len(names(tmp_path / "chats")) == 1000
    apply(recipe, only=("ingest",))
    asked = {row["messages"][0]["content"] for row in ingested(tmp_path)}
    assert asked == {f"q {number} {n}" for number in range(8) for n in range(125)}
    assert len(ingested(tmp_path)) == 1000


def test_threads_do_not_take_one_anothers_files(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        paths = list(pool.map(lambda n: collect(tmp_path, user=f"q{n}", reply="a"), range(200)))
    assert sorted(path.name for path in paths) == names(tmp_path)
    assert {said(path)["messages"][0]["content"] for path in paths} == {f"q{n}" for n in range(200)}


def test_a_killed_writer_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    program = (
        "import sys; from runner.collect import collect\n"
        "print(flush=True)\n"
        "while True: collect(sys.argv[1], user='q' * 300_000, reply='a')"
    )
    chance = random.Random(0)
    for _ in range(25):
        with subprocess.Popen(
            [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(chance.uniform(0, 0.03))
            writer.send_signal(signal.SIGKILL)
    seen = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(seen) > 10
    for path in seen:
        assert len(said(path)["messages"][0]["content"]) == 300_000
    collect(tmp_path, LEFT)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_reader_never_sees_a_file_that_is_not_whole(tmp_path: Path) -> None:
    done = threading.Event()
    broken: list[str] = []

    def watch() -> None:
        while not done.is_set():
            paths = tmp_path.glob("[!.]*")
            broken.extend(path.name for path in paths if path.stat().st_size < 100_000)

    reader = threading.Thread(target=watch)
    reader.start()
    for _ in range(50):
        collect(tmp_path, user="q" * 100_000, reply="a")
    done.set()
    reader.join()
    assert broken == []


def test_what_is_there_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake.os, "urandom", lambda count: b"\0" * count)
    now = intake._now()
    monkeypatch.setattr(intake, "_now", lambda: now)
    path = collect(tmp_path, user="first", reply="a")
    with pytest.raises(PreconditionError):
        collect(tmp_path, user="second", reply="a")
    assert names(tmp_path) == [path.name]
    assert said(path)["messages"][0]["content"] == "first"


def test_a_program_that_collects_loads_no_more_than_it_needs() -> None:
    program = (
        "import sys; from runner.collect import collect\n"
        "heavy = {'pydantic', 'yaml', 'torch', 'numpy', 'regex', 'rich', 'sqlite3'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_a_place_is_kept_for_many_calls(tmp_path: Path) -> None:
    place = place_of(make(tmp_path))
    assert place == Place(tmp_path / "chats")
    assert collect(place, LEFT).parent == tmp_path / "chats"


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    from tests.workspaces import small_disk

    with small_disk(tmp_path / "mount", "200k"):
        with pytest.raises(PreconditionError, match="the disk is full"):
            collect(tmp_path / "mount", user="q" * 400_000, reply="a")
        assert names(tmp_path / "mount") == []


def test_add_writes_one_conversation(tmp_path: Path) -> None:
    recipe = make(tmp_path)
    pairs = ("--metadata", "provider=p", "--metadata", "version=1=2", "--metadata", "timestamp=t")
    done = run("add", recipe, "--user", "q", "--reply", "a", "--system", "s", *pairs, "--json")
    (path,) = json.loads(done.stdout)["written"]
    assert said(Path(path)) == {
        "messages": [{"role": "system", "content": "s"}, *LEFT],
        "metadata": {"provider": "p", "version": "1=2", "timestamp": "t"},
    }


def test_add_says_where_it_wrote(tmp_path: Path) -> None:
    done = run("add", make(tmp_path), "--user", "q", "--reply", "a", cwd=tmp_path)
    assert done.stdout.startswith("wrote chats/2")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"messages": LEFT}),
        json.dumps(LEFT, indent=2),
        "\ufeff" + json.dumps({"instruction": "q", "input": "", "output": "a", "metadata": {}}),
    ],
)
def test_add_reads_one_conversation_from_a_file(tmp_path: Path, text: str) -> None:
    recipe = make(tmp_path)
    (tmp_path / "new.json").write_text(text)
    done = run("add", recipe, "--from-file", tmp_path / "new.json", "--json")
    (path,) = json.loads(done.stdout)["written"]
    assert said(Path(path))["messages"] == LEFT


def test_add_reads_json_lines_from_standard_input(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=1)
    lines = [json.dumps({"messages": LEFT, "metadata": {"mode": str(n)}}) for n in range(3)]
    done = subprocess.run(
        [sys.executable, "-m", "runner", "add", recipe, "--from-file", "-", "--json"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
    )
    written = json.loads(done.stdout)["written"]
    assert [said(Path(path))["metadata"]["mode"] for path in written] == ["0", "1", "2"]


def test_of_several_conversations_none_is_written_where_one_is_wrong(tmp_path: Path) -> None:
    recipe = make(tmp_path, chats=1)
    (tmp_path / "new.jsonl").write_text(f"{json.dumps(LEFT)}\n{json.dumps(LEFT[:1])}\n")
    done = run("add", recipe, "--from-file", tmp_path / "new.jsonl")
    assert done.returncode == 2
    assert "conversation 2 of 2: the conversation has no user message with a reply" in done.stderr
    assert names(tmp_path / "chats") == ["chat-0.json"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--user", "q"), "--user and --reply are both needed"),
        (("--user", " ", "--reply", "a"), "message 0: content is empty"),
        (("--user", "q", "--reply", "a", "--metadata", "x"), "'x' is not KEY=VALUE"),
        (("--user", "q", "--from-file", "-"), "--from-file stands alone"),
        (("--user", os.fsdecode(b"\xff"), "--reply", "a"), "half of a surrogate pair"),
    ],
)
def test_add_refuses_in_a_sentence(tmp_path: Path, arguments: tuple[str, ...], what: str) -> None:
    done = run("add", make(tmp_path, chats=1), *arguments)
    assert done.returncode == 2
    assert what in done.stderr
    assert names(tmp_path / "chats") == ["chat-0.json"]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "is not UTF-8 at byte 0"),
        (b'[\n{"role"', "is not valid JSON: .* at line 2, column 8"),
        (b'{"a": 1}', "is no conversation"),
        (b'[{"role": "user", "content": NaN}]', "NaN"),
        (b"[" * 100_000, "nested"),
        (b'{"messages": [], "metadata": 3}', "metadata is not an object"),
    ],
)
def test_a_file_that_holds_no_conversation_is_a_sentence(
    tmp_path: Path, data: bytes, what: str
) -> None:
    from runner.ui import add

    recipe = make(tmp_path, chats=1)
    (tmp_path / "new").write_bytes(data)
    with pytest.raises(RunnerError, match=what):
        add.conversations(
            recipe,
            None,
            (),
            user=None,
            reply=None,
            system=None,
            metadata=(),
            file=str(tmp_path / "new"),
        )


def test_a_folder_above_may_have_wildcards_in_its_name(tmp_path: Path) -> None:
    root = tmp_path / "chats [old]"
    (root / "a").mkdir(parents=True)
    assert intake.place(root, ["a/*.json"], "auto") == Place(root / "a", ".json")


def from_file(recipe: Path, file: Path | str) -> list[Path]:
    from runner.ui import add

    nothing: dict[str, Any] = {"user": None, "reply": None, "system": None, "metadata": ()}
    return add.conversations(recipe, None, (), file=str(file), **nothing)


def test_a_file_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="/dev/zero has more than 67,108,864 bytes"):
        from_file(make(tmp_path, chats=1), "/dev/zero")


def test_a_pipe_that_nobody_writes_to_is_empty(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunnerError, match="pipe is empty"):
        from_file(make(tmp_path, chats=1), tmp_path / "pipe")


def test_a_pipe_is_read_to_its_end_however_slow(tmp_path: Path) -> None:
    out, into = os.pipe()
    said = json.dumps({"messages": LEFT}).encode()

    def write() -> None:
        for part in (said[:9], said[9:]):
            time.sleep(0.2)
            os.write(into, part)
        os.close(into)

    with ThreadPoolExecutor() as pool:
        pool.submit(write)
        assert len(from_file(make(tmp_path, chats=1), f"/dev/fd/{out}")) == 1
    os.close(out)
