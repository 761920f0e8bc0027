import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.chat import files, jsonl, known, near
from runner.chat.conversation import Conversation, Ids, content_hash
from runner.errors import RunnerError
from runner.stages.split import (
    Member,
    Split,
    belonging,
    content,
    doubts,
    eval_set,
    member,
    refuse_leaks,
    together,
    words,
)
from runner.stages.stage import Dirs

SHARED = Path(__file__).parents[2] / "shared" / "data"

Record = dict[str, Any]


def said(*texts: str) -> list[Record]:
    """User and assistant in turn."""
    return [
        {"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)
    ]


def records(*conversations: Record) -> list[Record]:
    """The conversations as ingest writes them, with ids and sources."""
    ids = Ids()
    return [
        {
            "id": ids.next(content_hash(conversation)),
            "source": {"path": "chats.json", "format": "messages", "index": index},
            **conversation,
        }
        for index, conversation in enumerate(conversations)
    ]


def chats(count: int, start: int = 0) -> list[Record]:
    """Conversations that have nothing to do with one another."""
    return [
        {"messages": said(f"q{n}", f"a{n}", f"r{n}", f"b{n}")} for n in range(start, start + count)
    ]


def members(conversations: list[Record], similarity: float = 0.8) -> list[list[Member]]:
    joined = near.components([(c["id"], words(c)) for c in conversations], similarity)
    return together([member(c) for c in conversations], joined)


def held_out(conversations: list[Record], eval_fraction: float = 0.3) -> set[str]:
    return eval_set(members(conversations), eval_fraction)


def falls_by_itself(conversations: list[Record], eval_fraction: float) -> bool:
    """Whether eval and train have something without being given it by force."""
    heights = [max(one.place for one in group) for group in members(conversations)]
    return min(heights) < eval_fraction <= max(heights)


def split(folder: Path, conversations: list[Record], **settings: float) -> tuple[Any, list[str]]:
    """The metrics of the stage, and its warnings; what it wrote is in `folder / "out"`."""
    inputs = {"chains": folder / "chains", "conversations": folder / "conversations"}
    for path in (*inputs.values(), folder / "out"):
        path.mkdir(exist_ok=True)
    jsonl.write(inputs["conversations"] / "conversations.jsonl", conversations)
    chains = (
        {"conversation": c["id"], "first": index, "weights": {str(index + 1): 1}}
        for c in conversations
        for index in range(0, len(c.get("messages", ())) - 1, 2)
    )
    jsonl.write(inputs["chains"] / "chains.jsonl", chains)
    warnings: list[str] = []
    dirs = Dirs(
        inputs=inputs,
        output=folder / "out",
        scratch=folder,
        cache=folder,
        sources=(),
        base_model=None,
        recipe="r",
        seed=0,
        emit=lambda event: warnings.append(event["text"]),
    )
    return Split(stage="split", **settings).run(dirs), warnings


def sides(folder: Path) -> dict[str, str]:
    return {c["conversation"]: c["split"] for c in jsonl.read(folder / "out" / "chains.jsonl")}


def test_about_the_asked_share_is_held_out() -> None:
    assert 70 < len(held_out(records(*chats(2000)), 0.05)) < 130


def test_a_chat_that_grew_falls_where_it_fell() -> None:
    for first, grown in zip(chats(50), chats(50), strict=True):
        grown["messages"] += said("more", "and more")
        one, other = records(first, grown)
        assert member(one).place == member(other).place
        assert one["id"] != other["id"]


def test_case_and_white_space_do_not_move_a_conversation() -> None:
    one, other = records(
        {"messages": said("Hello  there", "Hi\n")}, {"messages": said("hello there", "hi")}
    )
    assert member(one).place == member(other).place


def test_a_reply_without_loss_counts_for_the_place_all_the_same() -> None:
    plain, unlearned = said("q", "a", "r", "b"), said("q", "a", "r", "b")
    unlearned[1]["weight"] = 0
    one, other = records({"messages": plain}, {"messages": unlearned})
    assert member(one).place == member(other).place


def test_branches_go_by_their_group_alone() -> None:
    one, other = records(
        {"messages": said("q", "a"), "group": "tree"},
        {"messages": said("other", "words"), "group": "tree"},
    )
    assert member(one).place == member(other).place


def test_a_record_without_an_exchange_goes_by_its_content() -> None:
    one, repeat, other = records(*({"messages": said(text)} for text in ("q", "q", "r")))
    assert member(one).place == member(repeat).place != member(other).place


SHORT = st.lists(st.sampled_from("abcd"), min_size=1, max_size=2).map(" ".join)
LONG = st.sampled_from([" ".join(f"w{n}" for n in range(60) if n != left) for left in (9, 50, 60)])
CONVERSATION = st.fixed_dictionaries(
    {"messages": st.lists(SHORT | LONG, min_size=2, max_size=6).map(lambda texts: said(*texts))},
    optional={"group": st.sampled_from(["one", "two", "three"])},
)
SEVERAL = st.lists(CONVERSATION, max_size=12)


@settings(max_examples=150, deadline=None)
@given(SEVERAL, SEVERAL)
def test_more_data_never_turn_train_into_eval(some: list[Record], more: list[Record]) -> None:
    before, after = records(*some), records(*some, *more)
    if some and falls_by_itself(before, 0.5) and falls_by_itself(after, 0.5):
        trained = {c["id"] for c in before} - held_out(before, 0.5)
        assert not trained & held_out(after, 0.5)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 30), st.integers(1, 30))
def test_more_data_that_are_unrelated_move_nothing(count: int, more: int) -> None:
    before, after = records(*chats(count)), records(*chats(count + more))
    if falls_by_itself(before, 0.3):
        assert held_out(before) == held_out(after) & {c["id"] for c in before}


@settings(max_examples=100, deadline=None)
@given(SEVERAL, st.randoms())
def test_the_order_of_the_data_does_not_matter(some: list[Record], dice: random.Random) -> None:
    ordered = records(*some)
    shuffled = dice.sample(ordered, len(ordered))
    assert held_out(ordered, 0.5) == held_out(shuffled, 0.5)


def test_a_small_set_keeps_one_for_eval_and_one_for_training() -> None:
    assert len(held_out(records(*chats(3)), 0.001)) == 1
    assert len(held_out(records(*chats(2)), 0.99)) == 1
    assert held_out(records(*chats(1)), 0.5) == set()


def test_a_small_set_does_not_give_most_of_itself_to_eval() -> None:
    branches = [{"messages": said("q", f"a{n}"), "group": "g"} for n in range(9)]
    (single,) = records(*chats(1))
    assert held_out([single, *records(*branches)], 0.001) == {single["id"]}


def test_no_eval_is_no_eval(tmp_path: Path) -> None:
    metrics, warnings = split(tmp_path, records(*chats(10)), eval_fraction=0)
    assert metrics == {
        "train_conversations": 10,
        "eval_conversations": 0,
        "train_chains": 20,
        "eval_chains": 0,
    }
    assert warnings == []


def test_repeats_share_a_side() -> None:
    assert content("0123456789abcdef~2") == "0123456789abcdef"
    repeats = records(*chats(20), *chats(20))
    eval_ids = held_out(repeats)
    assert {content(id) for id in eval_ids} == {id for id in eval_ids if "~" not in id}


TEXT = " ".join(f"word{n}" for n in range(60))
EXCHANGE = said("How is it done? " + "x" * 100, "So it is done. " + "y" * 100)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"messages": said("q", TEXT)}, {"messages": said("q", TEXT.replace("word9", "new"))}),
        ({"messages": said("q", "a", "r", "b")}, {"messages": said("q", "a", "s", "c")}),
        (
            {"messages": said("q", "a"), "group": "g"},
            {"messages": said("r", "b"), "group": "g"},
        ),
        (
            {"messages": said("q", "a", "r", "b"), "group": "g"},
            {"messages": said("q", "a", "s", "c")},
        ),
        (
            {"messages": [*said("q", "a"), *EXCHANGE]},
            {"messages": [*said("r", "b"), *EXCHANGE]},
        ),
        (
            {"messages": EXCHANGE},
            {"messages": [*said("r", "b"), *EXCHANGE]},
        ),
    ],
    ids=["near duplicates", "opening", "group", "group and opening", "exchange", "later exchange"],
)
def test_what_belongs_together_stays_together(one: Record, other: Record, tmp_path: Path) -> None:
    data = records(*chats(100), one, other)
    assert len(members(data)) == 101
    split(tmp_path, data, eval_fraction=0.5)
    found = sides(tmp_path)
    assert found[data[-1]["id"]] == found[data[-2]["id"]]

    def parted(chain: Record) -> Record:
        side = "eval" if chain["conversation"] == data[-1]["id"] else "train"
        return {**chain, "split": side}

    wrong = [parted(chain) for chain in jsonl.read(tmp_path / "out" / "chains.jsonl")]
    jsonl.write(tmp_path / "wrong.jsonl", wrong)
    with pytest.raises(
        RunnerError, match=r"chats\.json, record 100\) is in train and .*record 101"
    ):
        refuse_leaks(tmp_path / "wrong.jsonl", *marks(tmp_path, data))


def marks(root: Path, data: list[Record]) -> tuple[list[Member], dict[str, str]]:
    path = root / "conversations" / "conversations.jsonl"
    with known.lines(root / "index", b"", None) as before:
        return belonging(path, [record["id"] for record in data], 0.8, before)


def test_a_conversation_on_both_sides_is_a_leak(tmp_path: Path) -> None:
    data = records(*chats(2))
    split(tmp_path, data, eval_fraction=0.5)
    chains = [
        {**chain, "split": "eval" if n == 1 else "train"}
        for n, chain in enumerate(jsonl.read(tmp_path / "out" / "chains.jsonl"))
    ]
    jsonl.write(tmp_path / "wrong.jsonl", chains)
    with pytest.raises(RunnerError, match="is in train and in eval"):
        refuse_leaks(tmp_path / "wrong.jsonl", *marks(tmp_path, data))


def test_a_short_exchange_that_is_shared_joins_nothing() -> None:
    one = {"messages": said("q", "a", "thanks", "you are welcome")}
    other = {"messages": said("r", "b", "thanks", "you are welcome")}
    assert len(members(records(one, other))) == 2


def test_system_messages_make_no_near_duplicates() -> None:
    system = {"role": "system", "content": TEXT}
    one, other = ({"messages": [system, *said(f"q{n}", f"a{n}")]} for n in range(2))
    assert len(members(records(one, other))) == 2


def test_what_is_near_to_something_trained_is_trained() -> None:
    data = records(*chats(40))
    kept = sorted(held_out(data))[0]
    twin = next(c for c in data if c["id"] == kept)
    question, answer = twin["messages"][:2]
    for n in range(50):  # branches of the same opening join; at least one place is above
        more = {"messages": [question, answer, *said(f"n{n}", "x")], "group": f"g{n}"}
        (record,) = records(more)
        if member(record).place >= 0.3:
            assert kept not in held_out([*data, record])
            return
    pytest.fail("no group lies above the fraction")


def test_the_stage_says_what_it_did(tmp_path: Path) -> None:
    data = records(*chats(30), {"messages": said("p", TEXT)}, {"messages": said("p!", TEXT)})
    metrics, warnings = split(tmp_path, data, eval_fraction=0.3)
    assert metrics["train_conversations"] + metrics["eval_conversations"] == 32
    assert metrics["components"] == 31
    assert metrics["near_duplicates"] == 1
    assert {"conversation", "first", "weights", "split"} == set(
        next(jsonl.read(tmp_path / "out" / "chains.jsonl"))
    )
    assert warnings == []


def test_documents_and_preferences_without_chains_are_left_alone(tmp_path: Path) -> None:
    document = {"id": "d", "source": {"path": "f", "format": "text", "index": 0}, "text": "t"}
    metrics, _ = split(tmp_path, [*records(*chats(4)), document])
    assert metrics["train_conversations"] + metrics["eval_conversations"] == 4


def test_few_eval_conversations_are_said_to_be_few(tmp_path: Path) -> None:
    _, warnings = split(tmp_path, records(*chats(10)))
    assert warnings[0].startswith("1 of 10 conversations are kept for eval: its loss will be noisy")


def test_a_set_that_belongs_together_as_a_whole_has_no_eval(tmp_path: Path) -> None:
    data = records(*({"messages": said("hi", "hello", f"q{n}", "a")} for n in range(6)))
    metrics, (warning,) = split(tmp_path, data)
    assert metrics["eval_conversations"] == 0
    assert warning == (
        "no conversation is kept for eval: all 6 belong together, because they "
        "open with the same exchange; add other conversations"
    )


def test_a_share_far_from_the_asked_one_is_explained() -> None:
    group = [{"messages": said(f"q{n}", "a"), "group": "g"} for n in range(300)]
    groups = members(records(*chats(100), *group))
    (warning,) = doubts(groups, {one.id for one in groups[-1]}, 0.05)
    assert warning == (
        "300 of 400 conversations (75.0%) are kept for eval, where 5.0% was asked, because those "
        "that belong together stay on one side; the largest group has 300, which "
        "are branches of one conversation"
    )


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared test data")
@pytest.mark.parametrize(
    "path",
    [
        "hiyouga__LLaMA-Factory/data/identity.json",
        "derived_ru_user_claude/instruct/instruct_list.json",
        "axolotl-ai-cloud__axolotl/tests/fixtures/alpaca/alpaca.json",
    ],
)
def test_real_data_is_split_without_leaks_in_any_order(path: str, tmp_path: Path) -> None:
    found = files.read("f.json", (SHARED / path).read_bytes())
    data = records(*(c.content.record() for c in found if isinstance(c, Conversation)))
    split(tmp_path, data, eval_fraction=0.2)
    first = sides(tmp_path)
    assert 0 < sum(side == "eval" for side in first.values()) <= len(first) / 2
    split(tmp_path, random.Random(0).sample(data, len(data)), eval_fraction=0.2)
    assert sides(tmp_path) == first


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared test data")
def test_real_tool_conversations_with_one_opening_stay_together(tmp_path: Path) -> None:
    path = SHARED / "hiyouga__LLaMA-Factory/data/glaive_toolcall_en_demo.json"
    roles = {"human": "user", "gpt": "assistant", "function_call": "assistant"}
    data = records(
        *(
            {
                "messages": [
                    {"role": roles.get(turn["from"], "tool"), "content": turn["value"]}
                    for turn in record["conversations"]
                ]
            }
            for record in json.loads(path.read_text(encoding="utf-8"))
        )
    )
    metrics, _ = split(tmp_path, data, eval_fraction=0.1)
    assert metrics["components"] < len(data)
    assert 0.05 <= metrics["eval_conversations"] / len(data) <= 0.2
