import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.chat import jsonl, known
from runner.chat.conversation import Ids, content_hash
from runner.errors import RunnerError
from runner.stages import parsed
from runner.stages.stage import Dirs

Record = dict[str, Any]


# The index


def noted(index: Path, output: Path, *lines: bytes, identity: bytes = b"i") -> None:
    """An index in which each line was found to have its length, and made twice itself."""
    made = b"".join(2 * line for line in lines)
    output.write_bytes(made)
    with known.lines(index, identity, None) as notes:
        start = 0
        for line in lines:
            notes.note(known.key_of(line), str(len(line)).encode(), start, 2 * line)
            start += 2 * len(line)


def asked(index: Path, output: Path | None, line: bytes, identity: bytes = b"i") -> list[Any]:
    kept = index.read_bytes()
    with known.lines(index, identity, output) as before:
        key = known.key_of(line)
        found = [before.found(key), before.made(key)]
    index.write_bytes(kept)
    return found


def test_what_was_found_and_made_of_a_line_is_known_again(tmp_path: Path) -> None:
    index, output = tmp_path / "index", tmp_path / "output"
    noted(index, output, b"one\n", b"three\n")
    assert asked(index, output, b"three\n") == [b"6", b"three\nthree\n"]
    assert asked(index, output, b"two\n") == [None, None]


def test_nothing_is_known_without_a_last_output(tmp_path: Path) -> None:
    index, output = tmp_path / "index", tmp_path / "output"
    noted(index, output, b"one\n")
    assert asked(index, None, b"one\n") == [None, None]


def test_an_index_of_other_settings_is_none(tmp_path: Path) -> None:
    index, output = tmp_path / "index", tmp_path / "output"
    noted(index, output, b"one\n")
    assert asked(index, output, b"one\n", identity=b"j") == [None, None]
    one = known.identity({"chars": 1}, 1, ["regex"])
    others = [({"chars": 2}, 1, ["regex"]), ({"chars": 1}, 2, ["regex"]), ({"chars": 1}, 1, [])]
    assert one not in [known.identity(*other) for other in others]


def test_an_index_that_is_not_whole_is_none(tmp_path: Path) -> None:
    index, output = tmp_path / "index", tmp_path / "output"
    noted(index, output, b"one\n", b"two\n")
    whole = index.read_bytes()
    places = range(0, len(whole), 11)
    cut = [whole[:length] for length in places]
    bent = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places]
    for damaged in [*cut, *bent, b"\xff\n" + whole, whole + b"\n"]:
        index.write_bytes(damaged)
        assert asked(index, output, b"one\n") == [None, None]


def test_a_stretch_of_another_output_is_not_taken(tmp_path: Path) -> None:
    index, output = tmp_path / "index", tmp_path / "output"
    noted(index, output, b"one\n", b"two\n")
    output.write_bytes(b"short")
    assert asked(index, output, b"two\n") == [b"4", None]


def test_an_index_that_was_not_finished_leaves_the_one_before(tmp_path: Path) -> None:
    index, output = tmp_path / "index", tmp_path / "output"
    noted(index, output, b"one\n")

    def stopped() -> None:
        with known.lines(index, b"i", output) as before:
            before.note(known.key_of(b"two\n"), b"4")
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert asked(index, output, b"one\n")[0] == b"4"
    assert {path.name for path in tmp_path.iterdir()} == {"index", "output"}


# The stages that use it: a changed data set gives what a build from nothing gives

MAIL, KEY = "anna@mail.ru", "sk" + "-abcdefghijklmnopqrstuvwxyz0123456789"
STORY = " ".join(f"word{n}" for n in range(40))
TEXTS = (
    "",
    "no",
    "Hello there",
    "Summarise this: the sea",
    f"Write to {MAIL}, the key is {KEY}",
    "I am {{name}} by [Your Name]",
    "I'm sorry, but I can't help with that.",
    "Of course! I will gladly help you. First",
    "Of course! I will gladly help you. Second",
    "a\u00a0b\r\n\n\n\n\nc <|im_end|> ",
    STORY,
    STORY.replace("word20 ", "other "),
    STORY.replace("word30", "another"),
    "Это довольно длинный русский ответ о том, как живут морские котики на севере.",
)
texts = st.sampled_from(TEXTS)


def said(words: Sequence[str]) -> list[Record]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(words)]


def reply(text: str) -> list[Record]:
    return [{"role": "assistant", "content": text}]


chats = st.lists(texts, min_size=1, max_size=6).map(lambda words: {"messages": said(words)})
others = st.one_of(
    chats.map(lambda chat: {**chat, "group": "g", "metadata": {"by": MAIL}}),
    chats.map(lambda chat: {**chat, "label": True}),
    texts.map(lambda text: {"text": text or "x"}),
    st.builds(
        lambda *t: {"messages": said(t[:1]), "chosen": reply(t[1]), "rejected": reply(t[2])},
        texts,
        texts,
        texts,
    ),
)


@st.composite
def histories(draw: st.DrawFn) -> list[list[Record]]:
    """What a set of conversations was at three times: each time some of the same, in any order."""
    pool = draw(st.lists(st.one_of(chats, chats, others), min_size=1, max_size=10))
    times = st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=14)
    return [records(pool, draw(times)) for _ in range(3)]


def records(pool: Sequence[Record], chosen: Sequence[int]) -> list[Record]:
    """As ingest writes them; a file is known by its number and which of its copies it is."""
    ids, copies = Ids(), [itertools.count() for _ in pool]
    return [
        {
            "id": ids.next(content_hash(pool[n])),
            "source": {
                "path": f"chats/{n}-{next(copies[n])}.json",
                "format": "messages",
                "index": 0,
            },
            **pool[n],
        }
        for n in chosen
    ]


class Built:
    """What a stage wrote and said, or why it gave up."""

    def __init__(
        self, recipe: Record, inputs: dict[str, Path], folder: Path, cache: Path, previous: Any
    ) -> None:
        self.output = folder / "out"
        self.output.mkdir(parents=True)
        events: list[Record] = []
        dirs = Dirs(
            inputs=inputs,
            output=self.output,
            scratch=folder / "scratch",
            cache=cache,
            sources=(),
            base_model=None,
            recipe="r",
            seed=1,
            emit=events.append,
            previous=previous.output if previous else None,
        )
        try:
            self.metrics: Any = parsed(recipe).run(dirs)
            self.files = {path.name: path.read_bytes() for path in self.output.iterdir()}
        except RunnerError as error:
            self.metrics, self.files = str(error).split("\n")[0], {}
        self.events = [e for e in events if e["event"] != "progress"]

    def said(self) -> list[Any]:
        return [self.metrics, self.files, self.events]


def check(folder: Path, recipe: Record, history: Sequence[Sequence[Record]], latest: bool) -> None:
    """Builds one after the other, each with the output before it (or with an older one)."""
    previous: list[Built] = []
    for number, data in enumerate(history):
        root = folder / str(number)
        inputs = {"conversations": root / "conversations", "chains": root / "chains"}
        for path in inputs.values():
            path.mkdir(parents=True)
        jsonl.write(inputs["conversations"] / "conversations.jsonl", data)
        if recipe["stage"] == "split":
            inputs["chains"] = Built({"stage": "window"}, inputs, root / "w", root, None).output
        new = Built(recipe, inputs, root / "new", root / "cache", None)
        last = previous[-1 if latest else 0] if previous else None
        now = Built(recipe, inputs, root / "now", folder / "cache", last)
        assert now.said() == new.said()
        if now.files:
            previous.append(now)


RULES = {"name": "no word9", "pattern": "word9"}
RECIPES: list[Record] = [
    {"stage": "clean"},
    {
        "stage": "clean",
        "near_duplicates": 0.7,
        "languages": ["en"],
        "replacements": {"name": "Aria", "[Nobody]": "x"},
        "placeholders": "drop",
        "refusals": "drop",
        "phrases": ["first"],
        "min_reply_chars": 3,
        "max_reply_chars": 400,
        "min_document_chars": 2,
        "secrets": "redact",
        "personal_data": "redact",
        "templates": {"chars": 10, "share": 0.0, "max_copies": 2},
        "instructions": [{"text": "Summarise", "variants": ["Sum up", "Shorten", "Summarise"]}],
        "forbid": [RULES, {"name": "shout", "pattern": "!!", "role": "any"}],
        "require": [{"name": "words", "pattern": "[a-z]", "role": "user"}],
    },
    {
        "stage": "clean",
        "normalise": False,
        "exact_duplicates": "keep",
        "refusals": "report",
        "secrets": "drop",
        "personal_data": "report",
        "replacements": {"name": "Aria"},
        "templates": {"chars": 10, "share": 0.1},
        "instructions": [{"text": "Hello", "variants": ["Good day"]}],
    },
    {"stage": "clean", "near_duplicates": 1, "personal_data": "drop"},
    {"stage": "window"},
    {
        "stage": "window",
        "mode": "conversational",
        "sliding_turns": [2, 4],
        "loss": "every_reply",
        "duplicates": "count",
    },
    {"stage": "split", "eval_fraction": 0.3},
    {"stage": "split", "eval_fraction": 0.3, "near_duplicates": 1},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["stage"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(history=histories(), latest=st.booleans())
def test_a_changed_data_set_gives_what_a_build_from_nothing_gives(
    tmp_path_factory: pytest.TempPathFactory,
    recipe: Record,
    history: list[list[Record]],
    latest: bool,
) -> None:
    check(tmp_path_factory.mktemp("built"), recipe, history, latest)


@pytest.mark.parametrize(
    ("stage", "found", "instead", "shown"),
    [
        ("clean", rb"\{\},\{\}", b'{"redacted_x":1},{}', {"redacted_x": 8}),
        ("window", rb"\[1,1,1,", b"[1,5,1,", {"windows": 41}),
        ("split", rb"0\.\d+,\[", b"0.0,[", {"eval_conversations": 8, "train_conversations": 1}),
    ],
)
def test_a_line_that_is_known_is_not_looked_at_again(
    tmp_path: Path, stage: str, found: bytes, instead: bytes, shown: Record
) -> None:
    """What the index says of it, even where that is wrong, is what the output is made from."""
    pool = [{"messages": said([f"question {n}", f"answer {n}"])} for n in range(9)]
    recipe = {"stage": stage, **({"eval_fraction": 0.5} if stage == "split" else {})}
    check(tmp_path, recipe, [records(pool, range(8))], latest=True)
    index = next((tmp_path / "cache" / stage).iterdir())
    of = parsed(recipe)
    identity = known.identity(of.model_dump(mode="json"), of.version, of.libraries)
    rows, changed = re.subn(found, instead, index.read_bytes()[:-64])
    assert changed == 8
    index.write_bytes(rows + hashlib.sha256(identity + rows).hexdigest().encode())
    inputs = {kind: tmp_path / kind for kind in ("conversations", "chains")}
    for path in inputs.values():
        path.mkdir()
    jsonl.write(inputs["conversations"] / "conversations.jsonl", records(pool, range(9)))
    inputs["chains"] = Built({"stage": "window"}, inputs, tmp_path / "w", tmp_path, None).output
    last = SimpleNamespace(output=tmp_path / "0" / "now" / "out")
    built = Built(recipe, inputs, tmp_path / "new", tmp_path / "cache", last)
    assert {name: built.metrics[name] for name in shown} == shown
