import json
from pathlib import Path
from typing import Any

import pytest

from runner.chat import files
from runner.chat.conversation import Conversation, Rejected

SHARED = Path(__file__).parents[2] / "shared" / "data"


def read(value: Any, format: str = "auto") -> tuple[list[Conversation], list[Rejected]]:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    found = list(files.read("f.json", data, format))
    return (
        [item for item in found if isinstance(item, Conversation)],
        [item for item in found if isinstance(item, Rejected)],
    )


def texts(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def test_a_list_of_senders_is_one_chat() -> None:
    (chat,), rejected = read(
        [
            {"sender": "User", "userInput": "hi", "claudeOutputText": ""},
            {"sender": "Claude", "claudeOutputText": "hello", "userInput": None},
        ]
    )
    assert texts(chat) == [("user", "hi"), ("assistant", "hello")]
    assert not rejected


def test_one_bad_message_costs_itself_and_is_reported() -> None:
    (chat,), rejected = read(
        [
            {"sender": "User", "userInput": "hi"},
            {"sender": "Martian", "userInput": "zzz"},
            {"sender": "Claude", "claudeOutputText": 5},
            7,
            {"sender": "Claude", "claudeOutputText": "hello"},
        ]
    )
    assert texts(chat) == [("user", "hi"), ("assistant", "hello")]
    assert sorted(item.index or 0 for item in rejected) == [1, 2, 3]


def test_the_input_of_an_instruction_follows_after_a_blank_line() -> None:
    (first, second), _ = read(
        [
            {"instruction": "sum up", "input": "a text", "output": "short"},
            {"instruction": "greet", "input": "", "output": "hello", "metadata": {}},
        ]
    )
    assert texts(first)[0] == ("user", "sum up\n\na text")
    assert texts(second)[0] == ("user", "greet")


@pytest.mark.parametrize("output", ["", "  ", None, 5])
def test_an_instruction_without_output_is_rejected(output: object) -> None:
    chats, rejected = read({"instruction": "greet", "output": output})
    assert not chats
    assert rejected[0].record() == {
        "path": "f.json",
        "index": 0,
        "reason": "output must be a text that is not empty",
    }


def test_messages_with_parts_and_a_developer_are_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    (chat,), _ = read(
        {
            "messages": [
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": parts},
                {"role": "assistant", "content": "c"},
            ]
        }
    )
    assert texts(chat) == [("system", "be kind"), ("user", "a\n\nb"), ("assistant", "c")]


def test_preferences_are_not_taken_for_good_answers() -> None:
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    (chat,), _ = read({"messages": said, "label": False})
    assert chat.source.format == "preferences"
    assert chat.content.label is False


def test_a_record_of_two_formats_asks_which() -> None:
    both = {
        "instruction": "x",
        "output": "y",
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    }
    chats, rejected = read(both)
    assert not chats
    assert rejected[0].reason == "fits instruct and messages; say which with `format:`"
    (chat,), _ = read(both, "messages")
    assert texts(chat)[0] == ("user", "q")


def test_a_mixed_list_is_read_whole() -> None:
    chats, rejected = read(
        [
            {"sender": "User", "userInput": "hi"},
            {"instruction": "x", "output": "y"},
            {"sender": "Claude", "claudeOutputText": "hello"},
        ]
    )
    assert sorted(len(chat.messages) for chat in chats) == [2, 2]
    assert not rejected


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared test data")
@pytest.mark.parametrize(
    ("path", "conversations"),
    [
        ("derived_ru_user_claude/chats/chat_0001.json", 1),
        ("derived_ru_user_claude/chats/2025/chat_0003.json", 1),
        ("derived_ru_user_claude/edge/bom.json", 1),
        ("derived_ru_user_claude/edge/both_fields.json", 1),
        ("derived_ru_user_claude/edge/consecutive_and_empty.json", 1),
        ("derived_ru_user_claude/instruct/instruct.jsonl", 30),
        ("derived_ru_user_claude/instruct/instruct_list.json", 70),
        ("derived_ru_user_claude/instruct/instruct_single.json", 1),
        ("derived_ru_user_claude/instruct/instruct_with_input.json", 30),
        ("axolotl-ai-cloud__axolotl/tests/fixtures/alpaca/alpaca.json", 2),
        ("oumi-ai__oumi/data/dataset_examples/oumi_format.json", 2),
        ("hiyouga__LLaMA-Factory/data/identity.json", 91),
    ],
)
def test_real_files_are_read_whole(path: str, conversations: int) -> None:
    chats, rejected = read((SHARED / path).read_bytes())
    assert len(chats) == conversations
    assert not rejected


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared test data")
def test_every_real_file_gives_conversations_or_reasons() -> None:
    for path in sorted(SHARED.rglob("*.json*")):
        chats, rejected = read(path.read_bytes())
        assert chats or rejected, path


def test_secrets_and_addresses_in_keys_are_not_repeated() -> None:
    key = "sk-ant-api03-" + "Ab3dEf6hIj" * 9
    _, (rejected,) = read({key: 1, "ann.miller@gmail.com": 2, "beside": 3})
    assert rejected.reason == "no known format; its keys are '[key]', '[email]', 'beside'"


def test_secrets_in_values_are_not_repeated() -> None:
    key = "sk-ant-api03-" + "Ab3dEf6hIj" * 9
    _, (rejected,) = read({"messages": [{"role": key, "content": "x"}]})
    assert rejected.reason == (
        "message 0 has role '[key]'; roles are system, user, assistant, tool"
    )


def test_a_long_key_is_cut() -> None:
    _, (rejected,) = read({"k" * 100_000: 1})
    assert rejected.reason == f"no known format; its keys are '{'k' * 40}'…"


@pytest.mark.parametrize("value", [[[["x" * 1000] * 9] * 9] * 9, {"k" * 1000: {"v" * 1000: [1]}}])
def test_no_reason_is_long(value: object) -> None:
    for record in ({"messages": [{"role": value, "content": "x"}]}, {"messages": value}):
        _, rejected = read({**record, "b" * 9999: 1})
        assert rejected
        assert all(len(item.reason) <= 1001 for item in rejected)
