"""The readers of chat exports: on real files where there are any, else on the documented shapes."""

import copy
import html
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.chat import formats
from runner.chat.conversation import Conversation, Rejected
from runner.chat.formats import exports, tree
from runner.chat.formats.reading import Options
from runner.chat.formats.tree import Node
from runner.chat.json_values import Value

SHARED = Path(__file__).parents[2] / "shared" / "data"
IMPORTER = "yetanotherchris__openwebui-importer"
SESSIONS = "d-kimuson__claude-code-viewer/mock-global-claude-dir/projects/sample-project"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared test data")

Found = tuple[list[Conversation], list[Rejected]]


def read(records: list[Any], **options: Any) -> Found:
    items = [Value(record, index) for index, record in enumerate(records)]
    found = list(formats.read("f", items, "auto", Options(**options)))
    return (
        [item for item in found if isinstance(item, Conversation)],
        [item for item in found if isinstance(item, Rejected)],
    )


def records(path: str) -> list[Any]:
    text = (SHARED / path).read_text(encoding="utf-8-sig")
    if path.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    whole = json.loads(text)
    return whole if isinstance(whole, list) else [whole]


def read_file(path: str, **options: Any) -> Found:
    return read(records(path), **options)


def texts(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def said(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages]


# Branches


def test_the_leaves_of_a_tree_are_in_its_order_and_cycles_have_one() -> None:
    assert tree.leaves({"a": None, "c": "a", "b": "a"}) == ["c", "b"]
    assert tree.leaves({"a": "b", "b": "a"}) == ["b"]
    assert tree.leaves({"a": "b", "b": "a", "c": "a", "d": "d"}) == ["c", "d"]


def test_a_path_ends_at_a_missing_parent_and_where_a_cycle_closes() -> None:
    assert tree.path({"b": "not here", "c": "b"}, "c") == ["b", "c"]
    assert tree.path({"a": "b", "b": "a", "c": "b"}, "c") == ["a", "b", "c"]


def test_the_newest_branch_ends_in_the_latest_text() -> None:
    nodes = {
        "question": Node(None, time=1),
        "second": Node("question", time=3),
        "first": Node("question", time=2),
        "stub": Node("question", speaks=False, time=9),
    }
    assert tree.branches(nodes, "newest") == [["question", "second"]]
    assert tree.branches(nodes, "newest", "first") == [["question", "first"]]
    assert tree.branches(nodes, "newest", "not here") == [["question", "second"]]


def test_a_text_without_a_time_is_as_old_as_what_it_answers() -> None:
    nodes = {
        "old": Node(None, time=1),
        "answer": Node("old"),
        "new": Node(None, time=2),
        "answer to new": Node("new"),
        "older": Node("old", time=0.5),
    }
    assert tree.branches(nodes, "newest") == [["new", "answer to new"]]


def test_a_branch_that_only_repeats_the_beginning_of_another_is_none() -> None:
    nodes = {
        "a": Node(None),
        "stub": Node("a", speaks=False),
        "b": Node("a"),
        "c": Node("b"),
        "d": Node("b"),
        "hidden": Node("d", speaks=False),
    }
    assert tree.branches(nodes, "all") == [["a", "b", "c"], ["a", "b", "d"]]


def test_trees_part_a_forest_by_its_roots() -> None:
    nodes = {"a": Node(None), "x": Node("gone"), "b": Node("a"), "y": Node("x"), "z": Node("z")}
    assert [list(part) for part in tree.trees(nodes)] == [["a", "b"], ["x", "y"], ["z"]]


# Times


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1750537483.5, 1750537483.5),
        ("1750537483.5", 1750537483.5),
        (1744577557127, 1744577557.127),
        ("2024-01-01T00:00:00Z", 1704067200.0),
        ("2024-01-01T01:00:00+01:00", 1704067200.0),
        ("2024-01-01T00:00:00", 1704067200.0),
        ("yesterday", None),
        ("nan", None),
        ("inf", None),
        (10**400, None),
        (True, None),
        (None, None),
        ([], None),
    ],
)
def test_times_are_numbers_texts_or_dates(value: object, expected: float | None) -> None:
    assert exports.seconds(value) == expected


def test_a_time_no_calendar_has_is_no_metadata() -> None:
    assert exports.about("", 1e300) == {}
    assert exports.about("t", 0) == {"title": "t", "created_at": "1970-01-01T00:00:00+00:00"}


# Claude.ai


def claude(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"uuid": "c", "name": "", "chat_messages": list(messages), **more}


def say(sender: str, text: str, at: int, **more: Any) -> dict[str, Any]:
    return {"sender": sender, "text": text, "created_at": f"2025-01-01T00:00:{at:02}Z", **more}


@needs_data
def test_claude_shells_without_text_are_reported() -> None:
    chats, rejected = read_file(f"{IMPORTER}/examples/claude_example.json")
    assert [len(chat.messages) for chat in chats] == [10]
    reasons = [item.reason for item in rejected]
    assert reasons.count("every message is empty") == 82
    assert reasons.count("has no message") == 2
    assert len(chats) + len(rejected) == 85


@needs_data
def test_claude_messages_are_kept_as_they_are() -> None:
    (chat,), _ = read_file(f"{IMPORTER}/examples/claude_example.json")
    raw = records(f"{IMPORTER}/examples/claude_example.json")[chat.source.index]
    assert said(chat) == [message["text"] for message in raw["chat_messages"]]
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 5


@needs_data
def test_claude_thinking_stands_beside_the_reply() -> None:
    (chat,), _ = read_file(f"{IMPORTER}/examples/claude_thinking_example.json")
    assert texts(chat) == [
        ("user", "Can you greet me?"),
        ("assistant", "Hello there! It's great to hear from you."),
    ]
    assert chat.messages[1].thinking.startswith("The user asked for a greeting.")
    assert chat.content.metadata == {
        "title": "Thinking Demo",
        "created_at": "2025-01-01T00:00:00Z",
    }


@needs_data
def test_claude_tools_stand_beside_the_reply() -> None:
    (chat,), _ = read_file("noo-bass__context-carry/tests/fixtures/claude-web/conversations.json")
    assert [message.role for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1].tool_calls == (
        {"name": "create_artifact", "arguments": {"title": "Async Example", "type": "code"}},
    )


@needs_data
def test_claude_exports_of_2024_have_text_alone() -> None:
    (chat,), _ = read_file("simonw__claude-to-sqlite/tests/example.json")
    assert said(chat)[0] == "Turn this into a bash command"
    assert chat.content.metadata["title"] == "Bash Command for OpenAI API"


@needs_data
def test_claude_messages_without_a_sender_say_which() -> None:
    chats, (rejected,) = read_file(f"{IMPORTER}/examples/invalid_unicode.json")
    assert not chats
    assert rejected.reason == "message 0 has role None; roles are system, user, assistant, tool"


def test_claude_messages_are_sorted_and_equal_times_keep_their_order() -> None:
    (chat,), _ = read(
        [
            claude(
                say("human", "late", 2),
                say("human", "q", 1),
                say("assistant", "a", 1),
                {"sender": "assistant", "text": "a, too", "created_at": None},
            )
        ]
    )
    assert said(chat) == ["q", "a\n\na, too", "late"]


def test_claude_dates_are_compared_as_times_and_not_as_texts() -> None:
    first = {"sender": "human", "text": "first", "created_at": "2025-01-01T00:00:22Z"}
    then = {"sender": "assistant", "text": "then", "created_at": "2025-01-01T00:00:22.5Z"}
    (chat,), _ = read([claude(then, first)])
    assert said(chat) == ["first", "then"]


def test_the_sentence_for_blocks_that_are_not_shown_goes_with_its_fence() -> None:
    fence = "```\nThis block is not supported on your current device yet.\n```"
    (chat,), _ = read([claude(say("assistant", f"Let me look.\n\n{fence}\n\nHere it is.", 1))])
    assert said(chat) == ["Let me look.\n\nHere it is."]
    chats, (rejected,) = read([claude(say("assistant", fence, 1))])
    assert not chats
    assert rejected.reason == "every message is empty"


def test_the_text_blocks_of_content_go_before_text() -> None:
    blocks = [
        {"type": "text", "text": "a"},
        {"type": "tool_use", "name": "search", "input": {"q": 1}},
        {"type": "tool_result", "content": [{"type": "text", "text": "not said"}]},
        {"type": "image"},
        5,
        {"type": "text", "text": "b"},
    ]
    (chat,), _ = read([claude(say("assistant", "other", 1, content=blocks))])
    assert said(chat) == ["a\n\nb"]
    assert chat.messages[0].tool_calls == ({"name": "search", "arguments": {"q": 1}},)


def test_what_a_user_pasted_joins_the_text() -> None:
    pasted = [{"file_name": "", "extracted_content": "a long text"}, {"file_name": "x.png"}, 5]
    (chat,), _ = read([claude(say("human", "", 1, attachments=pasted))])
    assert texts(chat) == [("user", "a long text")]
    (chat,), _ = read([claude(say("human", "sum up", 1, attachments=pasted))])
    assert texts(chat) == [("user", "sum up\n\na long text")]


def test_thinking_tags_of_2024_are_thinking() -> None:
    text = "<antThinking>Hm.\nWell.</antThinking>\n\nYes. <antThinking> is a tag"
    (chat,), _ = read([claude(say("assistant", text, 1))])
    assert said(chat) == ["Yes. <antThinking> is a tag"]
    assert chat.messages[0].thinking == "Hm.\nWell."


ROOT = "00000000-0000-4000-8000-000000000000"
EDITED = claude(
    say("human", "q", 1, uuid="q", parent_message_uuid=ROOT),
    say("assistant", "a", 2, uuid="a", parent_message_uuid="q"),
    say("human", "q, edited", 3, uuid="q2", parent_message_uuid=ROOT),
    say("assistant", "a to the edit", 4, uuid="a2", parent_message_uuid="q2"),
    say("human", "more", 5, uuid="q3", parent_message_uuid="a"),
    say("assistant", "and more", 6, uuid="a3", parent_message_uuid="q3"),
)


def test_the_newest_of_claudes_branches_is_read() -> None:
    (chat,), _ = read([EDITED])
    assert said(chat) == ["q", "a", "more", "and more"]
    assert not chat.content.group


def test_all_of_claudes_branches_share_a_group() -> None:
    chats, _ = read([EDITED], branches="all")
    assert [said(chat) for chat in chats] == [
        ["q, edited", "a to the edit"],
        ["q", "a", "more", "and more"],
    ]
    assert {chat.content.group for chat in chats} == {"c"}


def test_a_leaf_that_the_page_shows_goes_before_the_newest() -> None:
    (chat,), _ = read([{**EDITED, "current_leaf_message_uuid": "a2"}])
    assert said(chat) == ["q, edited", "a to the edit"]


def test_messages_of_claude_without_a_parent_follow_one_another() -> None:
    (chat,), _ = read(
        [
            claude(
                say("human", "q", 1, uuid="q"),
                say("assistant", "a", 2, uuid="a"),
                say("human", "more", 3, uuid="q2", parent_message_uuid="a"),
            )
        ]
    )
    assert said(chat) == ["q", "a", "more"]


def test_a_bad_message_on_another_branch_costs_nothing() -> None:
    bad = say("human", "q", 0, uuid="b", parent_message_uuid=ROOT) | {"text": 5}
    (chat,), rejected = read([claude(bad, *EDITED["chat_messages"])])
    assert not rejected
    assert said(chat)[-1] == "and more"
    chats, (reason,) = read([claude(bad)])
    assert not chats
    assert reason.reason == "message 0's text must be a text, not 5"


# Claude Code


def code(type: str, content: Any, n: int, **more: Any) -> dict[str, Any]:
    """Record `n` of a session, by default below record `n - 1`."""
    message = {"role": type, "content": content}
    if "id" in more:
        message["id"] = more.pop("id")
    return {
        "type": type,
        "uuid": f"u{n}",
        "parentUuid": f"u{n - 1}" if n else None,
        "sessionId": "s",
        "timestamp": f"2025-01-01T00:00:{n:02}Z",
        "message": message,
        **more,
    }


@needs_data
@pytest.mark.parametrize(
    ("name", "merged", "calls"),
    [
        ("1af7fc5e-8455-4414-9ccd-011d40f70b2a", 6, 12),
        ("5c0375b4-57a5-4f26-b12d-d022ee4e51b7", 9, 13),
    ],
)
def test_the_parts_of_one_message_in_real_sessions_are_one(
    name: str, merged: int, calls: int
) -> None:
    raw = records(f"{SESSIONS}/{name}.jsonl")
    parts = [r for r in raw if r["type"] == "assistant" and not r["isSidechain"]]
    ids = {record["message"]["id"] for record in parts}
    (chat,), rejected = read(raw)
    assert not rejected
    # The command and its meta record are not the user's words.
    assert [message.role for message in chat.messages] == ["assistant"]
    assert chat.merged == len(ids) - 1 == merged
    assert len(chat.messages[0].tool_calls) == calls


@needs_data
def test_the_records_and_ids_of_the_first_real_session_are_as_documented() -> None:
    raw = records(f"{SESSIONS}/1af7fc5e-8455-4414-9ccd-011d40f70b2a.jsonl")
    parts = [record for record in raw if record["type"] == "assistant"]
    assert (len(raw), len(parts)) == (29, 15)
    assert len({record["message"]["id"] for record in parts}) == 7


@needs_data
def test_sidechains_are_conversations_of_their_own_when_they_are_asked_for() -> None:
    path = f"{SESSIONS}/5c0375b4-57a5-4f26-b12d-d022ee4e51b7.jsonl"
    assert sum(record["isSidechain"] for record in records(path)) == 22
    chats, _ = read_file(path, sidechains=True)
    assert [[message.role for message in chat.messages] for chat in chats] == [
        ["assistant"],
        ["user", "assistant"],
        ["user", "assistant"],
    ]
    assert [chat.source.index for chat in chats] == [2, 15, 25]


@needs_data
def test_a_file_of_a_sub_agent_says_how_it_is_read() -> None:
    chats, (rejected,) = read_file(f"{SESSIONS}/agent-test-hash-123.jsonl")
    assert not chats
    assert rejected.reason == "is the session of a sub-agent, which `sidechains: true` reads"
    (chat,), _ = read_file(f"{SESSIONS}/agent-test-hash-123.jsonl", sidechains=True)
    assert said(chat) == ["Run the test suite", "I'll run the test suite for you."]


@needs_data
def test_sessions_in_one_file_are_several_conversations() -> None:
    folder = "Sinity__polylogue/tests/fixtures/claude-code"
    chats, rejected = read_file(f"{folder}/claude-normalization-main.jsonl")
    assert not rejected
    assert [texts(chat) for chat in chats] == [
        [
            ("user", "Review the parser."),
            ("assistant", "Running the focused checks.\n\nChecking a foreground failure."),
        ],
        [("user", "An independent session."), ("assistant", "Other reply.")],
    ]
    thinking = "I should inspect the production route before editing."
    assert chats[0].messages[1].thinking == thinking


@needs_data
@pytest.mark.parametrize(
    ("path", "lengths"),
    [
        ("daaain__claude-code-log/test/test_data/representative_messages.jsonl", [7]),
        ("daaain__claude-code-log/test/test_data/session_b.jsonl", [3]),
        ("daaain__claude-code-log/test/test_data/todowrite_examples.jsonl", [4]),
        ("simonw__claude-code-transcripts/tests/sample_session.json", [10]),
        (
            "noo-bass__context-carry/tests/fixtures/claude-code/projects/"
            "-Users-test-myproject/session-001.jsonl",
            [4],
        ),
        ("Sinity__polylogue/tests/fixtures/claude-code/normalization-agent.jsonl", [2]),
        ("Sinity__polylogue/tests/fixtures/origin-capability/claude-code-session.jsonl", [2]),
    ],
)
def test_sessions_are_read_whole(path: str, lengths: list[int]) -> None:
    chats, rejected = read_file(path)
    assert not rejected
    assert [len(chat.messages) for chat in chats] == lengths
    assert [message.role for message in chats[0].messages[:2]] == ["user", "assistant"]


@needs_data
def test_a_summary_of_a_session_is_its_title() -> None:
    (chat,), _ = read_file("daaain__claude-code-log/test/test_data/todowrite_examples.jsonl")
    assert chat.content.metadata == {
        "title": "Feature Implementation with Task Management",
        "created_at": "2025-06-14T10:00:00Z",
    }


def test_equal_blocks_of_one_message_are_said_once() -> None:
    text = {"type": "text", "text": "look"}
    call = {"type": "tool_use", "name": "ls", "input": {}}
    (chat,), _ = read(
        [
            code("user", "q", 0),
            code("assistant", [text], 1, id="m"),
            code("assistant", [text, call], 2, id="m"),
            code("assistant", [{"type": "text", "text": "other"}], 3, id="m"),
        ]
    )
    assert said(chat) == ["q", "look\n\nother"]
    assert [call["name"] for call in chat.messages[1].tool_calls] == ["ls"]


def test_equal_words_in_two_messages_are_said_twice() -> None:
    (chat,), _ = read(
        [
            code("user", "q", 0),
            code("assistant", "ok", 1, id="m"),
            code("user", "q", 2),
            code("assistant", "ok", 3, id="n"),
        ]
    )
    assert said(chat) == ["q", "ok", "q", "ok"]


def test_calls_that_lie_beside_the_branch_belong_to_their_message() -> None:
    def call(name: str) -> list[Any]:
        return [{"type": "tool_use", "name": name, "input": {}}]

    result = [{"type": "tool_result", "content": "x"}]
    (chat,), _ = read(
        [
            code("user", "q", 0),
            code("assistant", [{"type": "text", "text": "look"}], 1, id="m"),
            code("assistant", call("one"), 2, id="m"),
            code("user", result, 3),
            code("assistant", call("two"), 4, id="m", parentUuid="u1"),
            code("user", result, 5),
            code("assistant", "done", 6, parentUuid="u3", id="n"),
        ],
        branches="all",
    )
    assert said(chat) == ["q", "look\n\ndone"]
    assert [call["name"] for call in chat.messages[1].tool_calls] == ["one", "two"]


@pytest.mark.parametrize(
    "record",
    [
        code("user", [{"type": "tool_result", "content": "result"}], 1),
        code("user", "<command-name>/init</command-name>", 1),
        code("user", "<local-command-stdout>x</local-command-stdout>", 1),
        code("user", [{"type": "text", "text": "[Request interrupted by user]"}], 1),
        code("user", "text of a skill", 1, isMeta=True),
        code("user", "This session goes on from …", 1, isCompactSummary=True),
        code("assistant", "API Error: 500", 1, isApiErrorMessage=True),
        code("assistant", "aside", 1, isSidechain=True),
        {"type": "system", "uuid": "u1", "parentUuid": "u0", "sessionId": "s", "content": "x"},
        {"type": "progress", "uuid": "u1", "parentUuid": "u0", "sessionId": "s", "data": {}},
    ],
)
def test_what_the_program_wrote_is_nobodys_word(record: dict[str, Any]) -> None:
    (chat,), rejected = read([code("user", "q", 0), record, code("assistant", "a", 2)])
    assert said(chat)[-1:] == ["a"]
    assert "q" not in said(chat)[1:]
    assert not rejected
    assert "".join(said(chat)) in ("qa", "a")  # what hangs on an aside is a tree of its own


def test_other_records_of_a_session_are_claimed_and_say_nothing() -> None:
    (chat,), rejected = read(
        [
            {"type": "summary", "summary": "of another", "leafUuid": "x"},
            {"type": "file-history-snapshot", "messageId": "m", "snapshot": {}},
            {"type": "queue-operation", "operation": "enqueue", "sessionId": "s", "content": "q"},
            code("user", "q", 0),
            code("assistant", "a", 1),
        ]
    )
    assert said(chat) == ["q", "a"]
    assert not rejected
    assert "title" not in chat.content.metadata


def test_a_session_in_which_nobody_speaks_is_reported() -> None:
    chats, (rejected,) = read([{"type": "summary", "summary": "s", "leafUuid": "x"}])
    assert not chats
    assert rejected.reason == "has no message of a user or of the model"


def test_the_newest_branch_of_a_session_is_read() -> None:
    rewound = [
        code("user", "q", 0),
        code("assistant", "a", 1),
        code("user", "wrong way", 2),
        code("assistant", "as you wish", 3),
        code("user", "right way", 4, parentUuid="u1"),
        code("assistant", "gladly", 5),
    ]
    (chat,), _ = read(rewound)
    assert said(chat) == ["q", "a", "right way", "gladly"]
    chats, _ = read(rewound, branches="all")
    assert [said(chat)[2] for chat in chats] == ["wrong way", "right way"]
    assert {chat.content.group for chat in chats} == {"s"}


def test_a_session_goes_on_over_its_compaction() -> None:
    boundary = {
        "type": "system",
        "subtype": "compact_boundary",
        "uuid": "u2",
        "parentUuid": None,
        "sessionId": "s",
    }
    (chat,), _ = read(
        [
            code("user", "q", 0),
            code("assistant", "a", 1),
            boundary,
            code("user", "Summary: …", 3, isCompactSummary=True),
            code("user", "more", 4),
            code("assistant", "and more", 5),
        ]
    )
    assert said(chat) == ["q", "a", "more", "and more"]


def test_a_message_that_is_no_object_costs_its_record() -> None:
    bare = code("user", "", 1) | {"message": "massive error"}
    (chat,), rejected = read([code("user", "q", 0), bare, code("assistant", "a", 2), 42, [1]])
    assert said(chat) == ["q", "a"]
    assert [(item.index, item.reason) for item in rejected] == [
        (3, "a record must be a JSON object, this one is a number"),
        (4, "a record must be a JSON object, this one is a list"),
        (1, "message must be an object, not 'massive error'"),
    ]


# ChatGPT


def gpt(*messages: tuple[str, str | None, Any], **more: Any) -> dict[str, Any]:
    """A chat of (id, parent, message): the message as an object, or "role: text"."""
    nodes: dict[str, Any] = {}
    for n, (id, parent, message) in enumerate(messages):
        if isinstance(message, str):
            role, text = message.split(": ", 1)
            message = part(role, {"content_type": "text", "parts": [text]}, create_time=n)
        nodes[id] = {"id": id, "parent": parent, "children": [], "message": message}
    return {"id": "g", "title": "t", "mapping": nodes, **more}


def part(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"author": {"role": role}, "content": content, "recipient": "all", **more}


@needs_data
def test_a_real_chatgpt_export_is_read() -> None:
    (chat,), rejected = read_file(f"{IMPORTER}/examples/gpt_example.json")
    assert not rejected
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 5
    assert said(chat)[::2] == [
        "Can you explain how photosynthesis works in simple terms?",
        "Why is sunlight important?",
        "What is an ecosystem",
        "Are ponds sentient?",
        "What about forests?",
    ]
    assert chat.content.metadata == {
        "title": "How photosynthesis works",
        "created_at": "2025-06-21T20:24:42.970556+00:00",
    }


@needs_data
def test_one_chatgpt_chat_as_an_object_is_the_same() -> None:
    whole = records(f"{IMPORTER}/examples/gpt_example.json")
    assert len(whole) == 1
    ((chat,), _), ((alone,), _) = read(whole), read([{**whole[0], "conversation_id": None}])
    assert said(chat) == said(alone)


REGENERATED = gpt(
    ("root", None, None),
    ("q", "root", "user: q"),
    ("a", "q", "assistant: first"),
    ("b", "q", "assistant: second"),
    ("c", "q", "assistant: second"),
    ("stub", "q", "assistant: "),
)


def test_chatgpts_current_node_says_which_branch() -> None:
    (chat,), _ = read([{**REGENERATED, "current_node": "a"}])
    assert said(chat) == ["q", "first"]


@pytest.mark.parametrize("current", [None, "gone", 5])
def test_without_it_the_newest_text_does(current: object) -> None:
    (chat,), _ = read([{**REGENERATED, "current_node": current}])
    assert said(chat) == ["q", "second"]


def test_all_of_chatgpts_branches_are_those_with_different_texts() -> None:
    chats, _ = read([{**REGENERATED, "current_node": "a"}], branches="all")
    assert [said(chat) for chat in chats] == [["q", "first"], ["q", "second"]]
    assert {chat.content.group for chat in chats} == {"g"}


@pytest.mark.parametrize(
    "message",
    [
        None,
        part("system", {"content_type": "text", "parts": ["x"]}),
        part("tool", {"content_type": "text", "parts": ["x"]}),
        part("assistant", {"content_type": "text", "parts": ["x"]}, recipient="python"),
        part("assistant", {"content_type": "code", "text": "x"}),
        part("tool", {"content_type": "execution_output", "text": "x"}),
        part("user", {"content_type": "user_editable_context", "user_profile": "x"}),
        part("assistant", {"content_type": "reasoning_recap", "content": "Thought for 3 s"}),
        part(
            "user",
            {"content_type": "text", "parts": ["x"]},
            metadata={"is_visually_hidden_from_conversation": True},
        ),
        part("assistant", {"content_type": "text", "parts": [""]}),
        part("assistant", {"content_type": "thoughts", "thoughts": []}),
    ],
)
def test_what_chatgpt_does_not_show_is_not_read(message: Any) -> None:
    (chat,), rejected = read(
        [gpt(("q", None, "user: q"), ("x", "q", message), ("a", "x", "assistant: a"))]
    )
    assert texts(chat) == [("user", "q"), ("assistant", "a")]
    assert not rejected


def test_chatgpts_thoughts_stand_beside_the_reply_that_follows() -> None:
    thoughts = {"content_type": "thoughts", "thoughts": [{"summary": "s", "content": "Hm."}]}
    (chat,), _ = read(
        [
            gpt(
                ("q", None, "user: q"),
                ("t", "q", part("assistant", thoughts)),
                ("a", "t", "assistant: a"),
                ("q2", "a", "user: stop"),
                ("t2", "q2", part("assistant", thoughts)),
            )
        ]
    )
    assert texts(chat) == [("user", "q"), ("assistant", "a"), ("user", "stop")]
    assert chat.messages[1].thinking == "Hm."
    assert not chat.merged


def test_the_words_in_parts_with_pictures_and_speech_are_read() -> None:
    content = {
        "content_type": "multimodal_text",
        "parts": [
            {"content_type": "image_asset_pointer", "asset_pointer": "file-service://x"},
            "What is this?",
            {"content_type": "audio_transcription", "text": "Tell me."},
        ],
    }
    (chat,), _ = read([gpt(("q", None, part("user", content)))])
    assert said(chat) == ["What is this?\n\nTell me."]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\ue203Hello\ue204", "Hello"),
        ("\ue205World\ue206", "World"),
        ("So it is.\ue200cite\ue202turn0search3\ue202turn0search8\ue201", "So it is."),
        ('By \ue200entity\ue202["people", "Ada", 0]\ue201, 1843', "By Ada, 1843"),
        ("See \ue200url\ue202the page\ue202turn0search1\ue201.", "See the page."),
        ("half \ue200cite", "half cite"),
    ],
)
def test_private_marks_go_and_what_they_show_stays(text: str, shown: str) -> None:
    (chat,), _ = read([gpt(("a", None, f"assistant: {text}"))])
    assert said(chat) == [shown]


def test_chatgpts_times_are_numbers_texts_or_missing() -> None:
    first = part("assistant", {"parts": ["old"], "content_type": "text"}, create_time="5.5")
    later = part("assistant", {"parts": ["new"], "content_type": "text"}, create_time=6)
    never = part("assistant", {"parts": ["never"], "content_type": "text"}, create_time=None)
    chat = gpt(("q", None, "user: q"), ("b", "q", later), ("a", "q", first), ("n", "q", never))
    (found,), _ = read([{**chat, "create_time": "1750537482.9"}])
    assert said(found) == ["q", "new"]
    assert found.content.metadata["created_at"] == "2025-06-21T20:24:42.900000+00:00"


def test_nodes_without_a_parent_hang_where_a_node_calls_them_its_child() -> None:
    chat = gpt(("q", None, "user: q"), ("a", None, "assistant: a"))
    chat["mapping"]["q"]["children"] = ["a"]
    (found,), _ = read([chat])
    assert said(found) == ["q", "a"]


def test_the_index_of_a_sharded_export_is_no_chat() -> None:
    chats, (rejected,) = read([{"version": 1, "shards": ["conversations-000.json"]}])
    assert not chats
    assert rejected.reason == "no known format; its keys are 'version', 'shards'"


# Open WebUI


@needs_data
def test_a_real_open_webui_chat_is_read_bare_and_in_a_row() -> None:
    (raw,) = records(f"{IMPORTER}/examples/webui-json.json")
    for record in (raw, {"id": "row", "user_id": "u", "title": "t", "chat": raw}):
        (chat,), rejected = read([record])
        assert not rejected
        assert texts(chat) == [(m["role"], m["content"]) for m in raw["messages"]]
        assert chat.content.metadata["title"] == "🧠 Goldwater Rule Ethics"


@needs_data
def test_folded_reasoning_is_what_the_thinking_was() -> None:
    (ours,), _ = read_file(f"{IMPORTER}/examples/claude_thinking_example.json")
    (theirs,), _ = read_file(f"{IMPORTER}/tests/expected/claude_thinking_output.json")
    assert theirs.messages == ours.messages


def test_folded_tool_calls_stand_beside_the_reply() -> None:
    folded = (
        '<details type="tool_calls" done="true" id="c" name="find" '
        'arguments="&quot;{\\&quot;q\\&quot;: \\&quot;x\\&quot;}&quot;" result="&quot;y&quot;">\n'
        "<summary>Tool Executed</summary>\n</details>"
    )
    thought = (
        '<details type="reasoning" done="true">\n<summary>s</summary>\n&gt; a &lt; b\n</details>'
    )
    messages = {
        "m": {"role": "assistant", "content": f"{thought}\nLet me see.\n{folded}\nIt is x."}
    }
    (chat,), _ = read([{"history": {"messages": messages, "currentId": "m"}}])
    (message,) = chat.messages
    assert message.content == "Let me see.\n\nIt is x."
    assert message.thinking == "a < b"
    assert message.tool_calls == ({"name": "find", "arguments": {"q": "x"}},)


def test_open_webuis_current_branch_is_read_after_its_system_prompt() -> None:
    messages = {
        "q": {"role": "user", "content": "q", "parentId": None, "timestamp": 1},
        "a": {"role": "assistant", "content": "a", "parentId": "q", "timestamp": 2},
        "b": {"role": "assistant", "content": "b", "parentId": "q", "timestamp": 3},
    }
    chat = {"params": {"system": "be kind"}, "history": {"messages": messages, "currentId": "a"}}
    (found,), _ = read([chat])
    assert texts(found) == [("system", "be kind"), ("user", "q"), ("assistant", "a")]
    found_all, _ = read([{"id": "x", "chat": chat}], branches="all")
    assert [said(one)[-1] for one in found_all] == ["a", "b"]
    assert {one.content.group for one in found_all} == {"x"}


# LM Studio


def version(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"type": "singleStep", "role": role, "content": list(parts)}


LM_STUDIO: dict[str, Any] = {
    "name": "A chat",
    "createdAt": 1744577557127,
    "systemPrompt": "be kind",
    "messages": [
        {
            "versions": [version({"type": "text", "text": "q"}, {"type": "file", "name": "x.png"})],
            "currentlySelected": 0,
        },
        {
            "versions": [
                version({"type": "text", "text": "first"}, role="assistant"),
                {
                    "type": "multiStep",
                    "role": "assistant",
                    "steps": [
                        {
                            "type": "contentBlock",
                            "style": {"type": "thinking"},
                            "content": [{"type": "text", "text": "Hm."}],
                        },
                        {
                            "type": "contentBlock",
                            "content": [
                                {"type": "text", "text": "second"},
                                {"type": "toolCallRequest", "name": "f", "parameters": {"x": 1}},
                            ],
                        },
                        {"type": "contentBlock", "content": [{"type": "toolCallResult"}]},
                        {"type": "debugInfoBlock", "debugInfo": "text"},
                    ],
                },
            ],
            "currentlySelected": 1,
        },
    ],
}


def test_lm_studios_selected_versions_are_read() -> None:
    (chat,), rejected = read([LM_STUDIO])
    assert not rejected
    assert texts(chat) == [("system", "be kind"), ("user", "q"), ("assistant", "second")]
    assert chat.messages[2].thinking == "Hm."
    assert chat.messages[2].tool_calls == ({"name": "f", "arguments": {"x": 1}},)
    assert chat.content.metadata["title"] == "A chat"


def test_all_of_lm_studios_versions_are_branches() -> None:
    chats, _ = read([LM_STUDIO], branches="all")
    assert [said(chat)[-1] for chat in chats] == ["first", "second"]
    assert len({chat.content.group for chat in chats}) == 1


def test_a_version_that_is_not_there_is_said() -> None:
    broken = copy.deepcopy(LM_STUDIO)
    broken["messages"][1]["currentlySelected"] = 7
    _, (rejected,) = read([broken])
    assert rejected.reason == "message 1 has 2 versions, and number 7 selected"


# SillyTavern

TAVERN: list[dict[str, Any]] = [
    {
        "user_name": "Ann",
        "character_name": "Seraphina",
        "create_date": "2025-1-5 @10h 00m 00s 000ms",
        "chat_metadata": {},
    },
    {"name": "Seraphina", "is_user": False, "is_system": False, "mes": "*smiles* Welcome."},
    {"name": "Ann", "is_user": True, "is_system": False, "mes": "Hi."},
    {"name": "System", "is_user": False, "is_system": True, "mes": "help"},
    {
        "name": "Seraphina",
        "is_user": False,
        "mes": "Two.",
        "swipes": ["One.", "Two."],
        "swipe_id": 1,
        "extra": {"reasoning": "Hm."},
    },
]


def test_the_character_speaks_first() -> None:
    (chat,), rejected = read(TAVERN)
    assert not rejected
    assert texts(chat) == [
        ("assistant", "*smiles* Welcome."),
        ("user", "Hi."),
        ("assistant", "Two."),
    ]
    assert chat.messages[2].thinking == "Hm."
    assert chat.content.metadata == {"title": "Seraphina"}
    assert chat.source.format == "sillytavern"


def test_other_swipes_are_branches() -> None:
    chats, _ = read(TAVERN, branches="all")
    assert [said(chat)[-1] for chat in chats] == ["One.", "Two."]
    assert len({chat.content.group for chat in chats}) == 1


def test_a_message_of_chub_is_an_object() -> None:
    (chat,), _ = read([TAVERN[0], {"name": "x", "is_user": True, "mes": {"message": "Hi."}}])
    assert texts(chat) == [("user", "Hi.")]


def test_each_header_begins_a_chat_and_a_bad_message_costs_itself() -> None:
    bad = {"name": "x", "is_user": True, "mes": 5}
    chats, rejected = read([*TAVERN[:3], bad, *TAVERN[:2], TAVERN[0]])
    assert [len(chat.messages) for chat in chats] == [2, 1]
    assert [(item.index, item.reason) for item in rejected] == [
        (3, "mes must be a text, not 5"),
        (6, "has no message"),
    ]


# Telegram


def telegram(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "Alice", "type": "personal_chat", "id": 1, "messages": list(messages), **more}


def wrote(who: int, text: Any, at: int = 0, **more: Any) -> dict[str, Any]:
    name = {1: "Alice", 2: "Bob", 3: "Carol"}[who]
    return {
        "id": at,
        "type": "message",
        "date": "2024-01-15T10:30:00",
        "date_unixtime": str(1705315800 + at),
        "from": name,
        "from_id": f"user{who}",
        "text": text,
        **more,
    }


PERSONAL = "mdemyanov__tg-parser/tests/fixtures/personal_chat.json"


@needs_data
def test_a_long_silence_begins_a_new_conversation() -> None:
    chats, rejected = read_file(PERSONAL, persona="Bob")
    assert not rejected
    assert [texts(chat) for chat in chats] == [
        [("user", "Hello!"), ("assistant", "Hi there!"), ("user", "Check this important message")],
        [("assistant", "Got it!")],
    ]
    assert chats[1].content.metadata == {"title": "Test User", "created_at": "2024-01-16T09:00:00"}


@needs_data
def test_who_exported_a_chat_is_asked_where_it_does_not_tell() -> None:
    chats, (rejected,) = read_file(PERSONAL)
    assert not chats
    assert rejected.reason == (
        "does not tell who exported it; say whose messages are the replies with `persona:`; "
        "here are Alice, Bob"
    )


@pytest.mark.parametrize("silence", [6 * 3600, 6 * 3600 + 1])
def test_six_hours_are_no_long_silence(silence: int) -> None:
    chats, _ = read([telegram(wrote(1, "a"), wrote(2, "b", silence))])
    assert len(chats) == (1 if silence == 6 * 3600 else 2)


def test_in_a_personal_chat_the_replies_are_those_of_who_exported_it() -> None:
    (chat,), _ = read([telegram(wrote(1, "hi"), wrote(2, "hello"))])
    assert texts(chat) == [("user", "hi"), ("assistant", "hello")]
    (chat,), _ = read([telegram(wrote(1, "hi"), wrote(2, "hello"))], persona="Alice")
    assert texts(chat) == [("assistant", "hi"), ("user", "hello")]


def test_old_exports_have_ids_that_are_numbers() -> None:
    (chat,), _ = read([telegram(wrote(1, "hi", from_id=1), wrote(2, "hello", from_id=2))])
    assert texts(chat) == [("user", "hi"), ("assistant", "hello")]


def test_a_group_asks_for_a_persona() -> None:
    group = telegram(wrote(1, "a"), wrote(2, "b"), wrote(3, "c"), type="private_group", id=9)
    chats, (rejected,) = read([group])
    assert not chats
    assert "`persona:`; here are Alice, Bob, Carol" in rejected.reason
    (chat,), _ = read([group], persona="Carol")
    assert texts(chat) == [("user", "a\n\nb"), ("assistant", "c")]
    _, (rejected,) = read([group], persona="Dan")
    assert rejected.reason == "nobody here is 'Dan', the `persona`; here are Alice, Bob, Carol"


def test_a_full_export_tells_who_exported_it_and_loses_no_chat_for_another() -> None:
    group = telegram(wrote(1, "a"), wrote(2, "b"), type="private_group", id=9)
    empty = telegram(wrote(1, ""), {"type": "service", "action": "phone_call", "text": ""})
    whole = {
        "personal_information": {"user_id": 2},
        "chats": {"about": "…", "list": [group, 5, empty, telegram(wrote(1, "c"))]},
        "left_chats": {"list": [group]},
    }
    chats, rejected = read([whole])
    assert [texts(chat) for chat in chats] == [
        [("user", "a"), ("assistant", "b")],
        [("user", "a"), ("assistant", "b")],
    ]
    assert [item.reason for item in rejected] == [
        "chats.list, chat 1 must be an object, not 5",
        "chats.list, chat 2: has no text message",
        "chats.list, chat 3: has no message of who exported it; here are Alice",
    ]


def test_what_was_passed_on_or_done_is_nobodys_word() -> None:
    (chat,), rejected = read(
        [
            telegram(
                wrote(1, ["look ", {"type": "link", "text": "there"}, "!"]),
                wrote(1, "news", forwarded_from="A paper"),
                wrote(1, "hidden", forwarded_from=None),
                wrote(1, "", photo="x.jpg"),
                wrote(1, "x", type="service"),
                wrote(2, "yes"),
            )
        ]
    )
    assert texts(chat) == [("user", "look there!"), ("assistant", "yes")]
    assert not rejected


def test_a_bad_message_in_a_chat_costs_itself() -> None:
    (chat,), rejected = read([telegram(wrote(1, "a"), wrote(2, 5, 7), 8, wrote(2, "b"))])
    assert said(chat) == ["a", "b"]
    assert [item.reason for item in rejected] == [
        "message 1 (id 7) has text 5, which is no text and no list",
        "message 2 must be an object, not 8",
    ]


def test_an_export_without_chats_says_so() -> None:
    _, (rejected,) = read([{"chats": {"list": []}}])
    assert rejected.reason == "has no chat"


def test_saved_messages_are_no_chat() -> None:
    _, (rejected,) = read([telegram(wrote(1, "milk"), type="saved_messages")])
    assert rejected.reason == "is Saved Messages: notes to oneself are no chat"


# Grok and AI Studio


@needs_data
def test_a_real_grok_export_says_what_another_reader_found() -> None:
    (chat,), rejected = read_file(f"{IMPORTER}/examples/grok_example.json")
    (expected,) = records(f"{IMPORTER}/tests/expected/grok_output.json")
    assert not rejected
    assert texts(chat) == [(m["role"], m["content"]) for m in expected["messages"]]
    assert len(chat.messages) == 10
    assert chat.content.metadata["title"] == expected["title"]
    (theirs,), _ = read([expected])
    assert theirs.messages == chat.messages


def grok(*responses: Any) -> dict[str, Any]:
    return {"conversation": {"conversation_id": "k"}, "responses": list(responses)}


def test_a_bad_grok_conversation_costs_itself() -> None:
    good = grok({"response": {"sender": "human", "message": "q"}})
    chats, rejected = read([{"conversations": [grok({"response": 5}), good, 7, grok()]}])
    assert [said(chat) for chat in chats] == [["q"]]
    assert [item.reason for item in rejected] == [
        "conversation 0: message 0 must be an object, not 5",
        "conversation 2: conversation 2 must be an object, not 7",
        "conversation 3: has no message",
    ]


def test_groks_responses_have_branches_and_dates_of_databases() -> None:
    def response(id: str, parent: str | None, text: str, at: int) -> dict[str, Any]:
        time = {"$date": {"$numberLong": str(1750534101000 + at)}}
        sender = "human" if parent is None else "ASSISTANT"
        return {
            "response": {
                "response_id": id,
                "parent_response_id": parent,
                "sender": sender,
                "message": text,
                "create_time": time,
            }
        }

    chat = grok(
        response("b", "q", "new", 3), response("a", "q", "old", 2), response("q", None, "q", 1)
    )
    (found,), _ = read([{"conversations": [chat]}])
    assert said(found) == ["q", "new"]
    chats, _ = read([{"conversations": [chat]}], branches="all")
    assert [said(one) for one in chats] == [["q", "old"], ["q", "new"]]
    assert {one.content.group for one in chats} == {"k"}


AI_STUDIO: dict[str, Any] = {
    "runSettings": {"model": "models/gemini"},
    "systemInstruction": {"parts": [{"text": "be kind"}]},
    "chunkedPrompt": {
        "chunks": [
            {"role": "user", "text": "q"},
            {"role": "user", "driveImage": {"id": "x"}},
            {"role": "model", "text": "Hm.", "isThought": True},
            {"role": "model", "text": "a", "parts": [{"text": "a"}]},
        ]
    },
}


def test_ai_studios_thoughts_stand_beside_the_reply() -> None:
    (chat,), rejected = read([AI_STUDIO])
    assert not rejected
    assert texts(chat) == [("system", "be kind"), ("user", "q"), ("assistant", "a")]
    assert chat.messages[2].thinking == "Hm."


# All of them


RIGHT = {
    f"{IMPORTER}/examples/claude": "claude_ai",
    f"{IMPORTER}/examples/invalid": "claude_ai",
    f"{IMPORTER}/examples/gpt": "chatgpt",
    f"{IMPORTER}/examples/grok": "grok",
    f"{IMPORTER}/examples/webui": "open_webui",
    f"{IMPORTER}/tests": "open_webui",
    "simonw__claude-to-sqlite": "claude_ai",
    "noo-bass__context-carry/tests/fixtures/claude-web": "claude_ai",
    "noo-bass__context-carry/tests/fixtures/claude-code": "claude_code",
    "simonw__claude-code-transcripts": "claude_code",
    "daaain__claude-code-log": "claude_code",
    "d-kimuson__claude-code-viewer": "claude_code",
    "Sinity__polylogue/tests/fixtures/claude-code": "claude_code",
    "Sinity__polylogue/tests/fixtures/origin-capability/claude-code": "claude_code",
    "mdemyanov__tg-parser": "telegram",
}
OURS = {*RIGHT.values(), "lm_studio", "sillytavern", "ai_studio"}


@needs_data
def test_every_real_record_is_claimed_by_one_format_at_most_and_by_the_right_one() -> None:
    claimed = 0
    for path in sorted(SHARED.rglob("*.json*")):
        name = str(path.relative_to(SHARED))
        right = {format for start, format in RIGHT.items() if name.startswith(start)}
        try:
            found = records(name)
        except ValueError:
            continue
        for record in found:
            fits = {format for format, known in formats.FORMATS.items() if known.claims(record)}
            assert len(fits) <= 1, (name, fits)
            assert fits & OURS == right, (name, fits)
            claimed += len(right)
    assert claimed == 232


def test_the_built_records_are_claimed_by_one_format() -> None:
    built = {
        "lm_studio": [LM_STUDIO],
        "sillytavern": TAVERN,
        "ai_studio": [AI_STUDIO],
        "telegram": [telegram(), {"chats": {"list": []}}],
        "grok": [{"conversations": [grok()]}],
        "chatgpt": [REGENERATED],
        "claude_ai": [EDITED],
        "claude_code": [code("user", "q", 0), {"loglines": []}],
    }
    for name, found in built.items():
        for record in found:
            fits = [format for format, known in formats.FORMATS.items() if known.claims(record)]
            assert fits == [name]


def samples() -> Iterator[Any]:
    """Records to damage, by name; a list is a file whose records are read together."""
    yield pytest.param([LM_STUDIO], id="lm_studio")
    yield pytest.param([AI_STUDIO], id="ai_studio")
    yield pytest.param(TAVERN, id="sillytavern")
    yield pytest.param([EDITED], id="claude_ai branches")
    yield pytest.param([REGENERATED], id="chatgpt branches")
    full = {
        "personal_information": {"user_id": 2},
        "chats": {
            "list": [telegram(wrote(1, ["a", {"type": "bold", "text": "b"}]), wrote(2, "b"))]
        },
    }
    yield pytest.param([full], id="telegram full")
    if not SHARED.exists():
        return
    for name in (
        f"{IMPORTER}/examples/claude_thinking_example.json",
        f"{IMPORTER}/examples/gpt_example.json",
        f"{IMPORTER}/examples/webui-json.json",
        f"{IMPORTER}/tests/expected/claude_thinking_output.json",
        "noo-bass__context-carry/tests/fixtures/claude-web/conversations.json",
        "simonw__claude-to-sqlite/tests/example.json",
        "simonw__claude-code-transcripts/tests/sample_session.json",
        "Sinity__polylogue/tests/fixtures/claude-code/claude-normalization-main.jsonl",
        "daaain__claude-code-log/test/test_data/todowrite_examples.jsonl",
        PERSONAL,
    ):
        yield pytest.param(records(name), id=name.rsplit("/", 1)[1])
    grok_export = copy.deepcopy(records(f"{IMPORTER}/examples/grok_example.json"))
    grok_export[0]["conversations"][0]["responses"][3:] = []
    yield pytest.param(grok_export, id="grok_example.json")


HARMFUL = (
    '{"x": "\\ud83d"}',
    "[" * 200_000,
    "[" * 900 + "]" * 900,
    '{"x": NaN}',
    '{"x": 1e999}',
    json.dumps('{"x": "\\ud83d"}'),
)
"""JSON texts inside JSON that no artifact can hold once they are read."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@pytest.mark.parametrize("sample", list(samples()))
@pytest.mark.parametrize("which", ["newest", "all"])
def test_damage_anywhere_gives_conversations_or_reasons(sample: list[Any], which: str) -> None:
    damaged = copy.deepcopy(sample)
    for container, key in list(places(damaged)):
        whole = container[key]
        for bad in (None, 5, "x", [], {}, True, -1.5, HARMFUL[0], HARMFUL[2], HARMFUL[3]):
            container[key] = bad
            check(read(damaged, branches=which, sidechains=True, persona="Bob"))
        if isinstance(container, dict):
            items = list(container.items())
            del container[key]
            check(read(damaged, branches=which, sidechains=True))
            container.clear()
            container.update(items)
        container[key] = whole
    assert damaged == sample


@pytest.mark.parametrize("bad", HARMFUL)
def test_arguments_in_an_open_webui_chat_that_are_no_json_stay_a_text(bad: str) -> None:
    folded = f'<details type="tool_calls" name="f" arguments="{html.escape(bad)}">x</details>'
    messages = {"1": {"role": "assistant", "content": folded}}
    found = read([{"history": {"messages": messages, "currentId": "1"}}])
    check(found)
    (call,) = found[0][0].messages[0].tool_calls
    assert isinstance(call["arguments"], str)


@pytest.mark.parametrize("bad", HARMFUL)
def test_a_reference_in_a_chatgpt_text_that_is_no_json_is_left_out(bad: str) -> None:
    found = read([gpt(("1", None, f"user: a \ue200entity\ue202{bad}\ue201b"))])
    check(found)
    assert found[0][0].messages[0].content == "a b"


def check(found: Found) -> None:
    chats, rejected = found
    assert chats or rejected
    for chat in chats:
        json.dumps(chat.record(), ensure_ascii=False, allow_nan=False).encode()
        assert chat.messages
        for message in chat.messages:
            assert message.role in ("system", "user", "assistant", "tool")
            assert isinstance(message.content, str)
            assert isinstance(message.thinking, str)
            assert all(isinstance(call["name"], str) for call in message.tool_calls)
        assert all(isinstance(value, str) for value in chat.content.metadata.values())
    assert all(isinstance(item.reason, str) and item.reason for item in rejected)


LONG = 100_000


def long_chat(format: str) -> list[Any]:
    """A chain of messages, each below the one before."""
    turns = [(("user", "assistant")[n % 2], f"{n}", f"{n - 1}") for n in range(LONG)]
    senders = {"user": "human", "assistant": "assistant"}
    if format == "claude_ai":
        keys = ("sender", "text", "uuid", "parent_message_uuid")
        said = [(senders[role], id, id, above) for role, id, above in turns]
        return [claude(*(dict(zip(keys, one, strict=True)) for one in said))]
    if format == "grok":
        keys = ("sender", "message", "response_id", "parent_response_id")
        said = [(senders[role], id, id, above) for role, id, above in turns]
        return [{"conversations": [grok(*(dict(zip(keys, one, strict=True)) for one in said))]}]
    if format == "chatgpt":
        return [gpt(*((id, above, f"{role}: {id}") for role, id, above in turns))]
    if format == "open_webui":
        messages = {
            id: {"role": role, "content": id, "parentId": above} for role, id, above in turns
        }
        return [{"history": {"messages": messages}}]
    if format == "claude_code":
        return [code(role, id, n) for n, (role, id, _) in enumerate(turns)]
    return [telegram(*(wrote(1 + n % 2, f"{n}", n) for n in range(LONG)))]


@pytest.mark.parametrize(
    "format", ["claude_ai", "claude_code", "chatgpt", "grok", "open_webui", "telegram"]
)
def test_a_chat_of_any_length_is_read_in_one_piece_and_soon(format: str) -> None:
    chat = long_chat(format)
    start = time.perf_counter()
    (found,), rejected = read(chat, branches="all")
    assert len(found.messages) == LONG
    assert not rejected
    assert time.perf_counter() - start < 30
