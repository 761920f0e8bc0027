"""The readers of data sets: what each takes, what it says, and that nothing breaks them."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.chat import formats
from runner.chat.conversation import Conversation, Message, Rejected
from runner.chat.formats import FORMATS, documents
from runner.chat.formats.reading import Options
from runner.chat.json_values import Value

SHARED = Path(__file__).parents[2] / "shared" / "data"
OURS = (
    "anthropic",
    "character",
    "documents",
    "instruct",
    "messages",
    "oasst",
    "preferences",
    "prompt_completion",
    "self_instruct",
    "sharegpt",
)


def read(
    records: Any, format: str = "auto", **options: Any
) -> tuple[list[Conversation], list[Rejected]]:
    records = records if isinstance(records, list) else [records]
    items = [Value(record, index) for index, record in enumerate(records)]
    found = list(formats.read("f.json", items, format, Options(**options)))
    return (
        [item for item in found if isinstance(item, Conversation)],
        [item for item in found if isinstance(item, Rejected)],
    )


def one(record: Any, format: str = "auto", **options: Any) -> Conversation:
    (conversation,), rejected = read(record, format, **options)
    assert not rejected
    return conversation


def reason(record: Any, format: str = "auto", **options: Any) -> str:
    conversations, (rejected,) = read(record, format, **options)
    assert not conversations
    return rejected.reason


def texts(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def spoken(messages: tuple[Message, ...]) -> list[str]:
    return [message.content for message in messages]


def chat(*replies: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, *replies]}


# Instructions


def test_dolly_joins_its_context_and_keeps_its_category() -> None:
    found = one({"instruction": "who", "context": "a text", "response": "he", "category": "qa"})
    assert texts(found) == [("user", "who\n\na text"), ("assistant", "he")]
    assert found.content.metadata == {"category": "qa"}


def test_the_text_of_alpaca_is_not_taken_for_a_document() -> None:
    found = one({"instruction": "x", "input": "", "output": "y", "text": "Below is … x … y"})
    assert found.source.format == "instruct"
    assert texts(found) == [("user", "x"), ("assistant", "y")]


def test_the_text_of_alpaca_is_a_document_where_the_recipe_says_so() -> None:
    record = {"instruction": "x", "output": "y", "text": "Below is … x … y"}
    assert one(record, "documents").content.text == "Below is … x … y"


def test_an_instruction_without_system_counts_no_empty_message() -> None:
    assert one({"instruction": "x", "output": "y"}).empty == 0


def test_history_and_system_come_before_the_instruction() -> None:
    found = one(
        {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]], "input": None}
    )
    assert spoken(found.messages) == ["s", "a", "b", "c", "d"]


def test_input_and_output_alone_are_question_and_answer() -> None:
    assert texts(one({"input": "a", "output": "b"})) == [("user", "a"), ("assistant", "b")]


def test_question_and_response_are_an_instruction_too() -> None:
    found = one({"system_prompt": "s", "question": "a", "response": "b"})
    assert spoken(found.messages) == ["s", "a", "b"]


def test_two_answers_of_one_instruction_are_not_chosen_from() -> None:
    said = reason({"instruction": "x", "output": "y", "response": "z"})
    assert said == "has output and response, which mean the same; keep one of them"


def test_a_class_called_label_does_not_make_an_instruction_a_preference() -> None:
    assert one({"instruction": "x", "output": "y", "label": "sport"}).content.label is None


def test_each_instance_of_a_seed_is_a_conversation_of_one_group() -> None:
    instances = [{"input": "a", "output": "1"}, {"input": "", "output": "2"}]
    seed = {"id": "seed_0", "name": "n", "instruction": "do", "instances": instances}
    found, rejected = read(seed)
    assert [texts(item)[0][1] for item in found] == ["do\n\na", "do"]
    assert {item.content.group for item in found} == {"seed_0"}
    assert not rejected


def test_a_seed_with_a_bad_instance_is_rejected_whole() -> None:
    instances = [{"input": "a", "output": "1"}, {"input": "b", "output": ""}]
    said = reason({"instruction": "do", "instances": instances})
    assert said == "instance 1: output must be a text that is not empty"


def test_a_character_greets_after_its_description() -> None:
    dialogue = [{"role": "user", "content": "who?"}, {"role": "char", "content": "me"}]
    found = one({"name": "A", "context": "elf", "greeting": "hi", "example_dialogue": dialogue})
    assert texts(found) == [
        ("system", "elf"),
        ("assistant", "hi"),
        ("user", "who?"),
        ("assistant", "me"),
    ]


# Prompt and completion


def test_a_prompt_and_its_completion_are_two_messages() -> None:
    assert texts(one({"prompt": "a", "completion": "b"})) == [("user", "a"), ("assistant", "b")]


def test_replies_in_a_prompt_carry_no_loss() -> None:
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    found = one({"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]})
    assert [message.learned for message in found.messages if message.role == "assistant"] == [
        False,
        True,
    ]


def test_a_completion_begins_with_a_reply() -> None:
    completion = [{"role": "user", "content": "d"}]
    said = reason({"prompt": "a", "completion": completion})
    assert said == "completion begins with role 'user', not 'assistant'"


# ShareGPT


def test_a_function_call_is_a_reply_that_calls_a_tool() -> None:
    call = '{"name": "f", "arguments": "{\\"x\\": 1}"}'
    found = one(
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": call},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "b", "extra": 1},
            ],
            "system": "s",
            "tools": '[{"name": "f"}]',
        }
    )
    assert texts(found) == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", ""),
        ("tool", "1"),
        ("assistant", "b"),
    ]
    assert found.messages[2].tool_calls == ({"name": "f", "arguments": {"x": 1}},)
    assert found.content.tools == ({"name": "f"},)


def test_a_function_call_that_is_no_call_names_its_message() -> None:
    said = reason({"conversations": [{"from": "function_call", "value": "f(1)"}]})
    assert said == "message 0 has a tool call without a name: 'f(1)'"


def test_an_empty_turn_is_left_out_and_counted() -> None:
    found = one(
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": ""},
                {"from": "gpt", "value": "b"},
            ]
        }
    )
    assert spoken(found.messages) == ["a", "b"]
    assert found.empty == 1


def test_conversations_of_role_and_content_are_messages() -> None:
    found = one({"conversations": [{"role": "user", "content": "a"}], "id": 5})
    assert found.source.format == "messages"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": []}, "has no message"),
        ({"messages": "hello"}, "messages must be a list, not 'hello'"),
        ({"conversations": 5, "id": "a"}, "conversations must be a list, not 5"),
        (
            {"messages": [{"role": "user", "content": "a"}, 7]},
            "message 1 must be an object, not 7",
        ),
        (
            {"messages": [{"role": "bard", "content": "a"}]},
            "message 0 has role 'bard'; roles are system, user, assistant, tool",
        ),
        (
            {"messages": [{"role": "user", "content": {"a": 1}}]},
            "message 0 has content that is neither a text nor a list of parts",
        ),
        (chat({"role": "assistant", "content": "a", "weight": "no"}), "message 1 has weight 'no'"),
        (
            {**chat({"role": "assistant", "content": "a"}), "tools": "[{"},
            "tools is a text that is not JSON: '[{'",
        ),
    ],
)
def test_what_is_wrong_with_messages_is_said(record: Any, said: str) -> None:
    assert reason(record).startswith(said)


# OpenAI and LLaMA-Factory


def test_calls_of_tools_are_kept_beside_a_null_content() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    found = one(
        chat(
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
            {"role": "assistant", "function_call": {"name": "g", "arguments": "{"}},
        )
    )
    assert found.messages[1].tool_calls == ({"name": "f", "arguments": {"x": 1}},)
    assert found.messages[3].tool_calls == ({"name": "g", "arguments": "{"},)


@pytest.mark.parametrize(
    ("mark", "learned"),
    [
        ({"weight": 0}, False),
        ({"loss_weight": 0.0}, False),
        ({"train": False}, False),
        ({"weight": 1}, True),
        ({"loss_weight": 0.5}, True),
        ({"weight": None, "train": None}, True),
    ],
)
def test_a_weight_of_zero_carries_no_loss(mark: dict[str, Any], learned: bool) -> None:
    assert one(chat({"role": "assistant", "content": "a", **mark})).messages[1].learned is learned


def test_a_reply_with_a_part_that_is_not_trained_carries_no_loss() -> None:
    parts = [{"type": "text", "text": "a", "train": False}, {"type": "text", "text": "b"}]
    assert not one(chat({"role": "assistant", "content": parts})).messages[1].learned


def test_the_weight_of_a_question_changes_nothing() -> None:
    weighed = {"messages": [{"role": "user", "content": "q", "loss_weight": 0.0}]}
    assert one(weighed).content == one(chat()).content


def test_llama_factory_has_text_reasoning_and_calls_under_value() -> None:
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "a"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {}}'},
    ]
    reply = one(chat({"role": "assistant", "content": parts, "loss_weight": 1.0})).messages[1]
    assert reply == Message(
        "assistant", "a", thinking="hm", tool_calls=({"name": "f", "arguments": {}},)
    )


@pytest.mark.parametrize("name", ["thinking", "reasoning_content"])
def test_thinking_is_kept_beside_the_reply(name: str) -> None:
    reply = one(chat({"role": "assistant", "content": "a", name: "hm"})).messages[1]
    assert (reply.content, reply.thinking) == ("a", "hm")


def test_a_think_tag_stays_text() -> None:
    reply = one(chat({"role": "assistant", "content": "<think>hm</think>a"})).messages[1]
    assert reply == Message("assistant", "<think>hm</think>a")


def test_a_refusal_is_a_reply() -> None:
    reply = one(chat({"role": "assistant", "content": None, "refusal": "no"})).messages[1]
    assert reply.content == "no"


def test_marks_of_images_go_where_the_record_has_images() -> None:
    record = {"messages": [{"role": "user", "content": "<image>\nWho?"}], "images": ["1.jpg"]}
    assert spoken(one(record).messages) == ["Who?"]
    assert spoken(one({**record, "images": []}).messages) == ["<image>\nWho?"]


def test_metadata_of_messages_is_kept() -> None:
    assert one({**chat(), "metadata": {"a": 1}}).content.metadata == {"a": 1}


# Anthropic


def test_blocks_of_anthropic_are_text_thinking_calls_and_results() -> None:
    found = one(
        {
            "system": [{"type": "text", "text": "s"}],
            "messages": [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "x"},
                        {"type": "text", "text": "b"},
                        {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "1",
                            "content": [{"type": "text", "text": "r"}],
                        },
                        {"type": "text", "text": "c"},
                    ],
                },
            ],
        }
    )
    assert found.source.format == "anthropic"
    assert texts(found) == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("tool", "r"),
        ("user", "c"),
    ]
    assert found.messages[2].thinking == "hm"
    assert found.messages[2].tool_calls == ({"name": "f", "arguments": {"x": 1}},)


def test_a_request_ends_in_a_beginning_that_carries_no_loss() -> None:
    asked = {"model": "claude-x", "system": "s", **chat({"role": "assistant", "content": "{"})}
    assert [message.learned for message in one(asked).messages] == [True, True, False]


def test_a_data_set_in_anthropics_shape_has_whole_replies() -> None:
    found = one({"system": "s", **chat({"role": "assistant", "content": "a"})})
    assert found.source.format == "anthropic"
    assert found.messages[-1].learned


def test_a_response_goes_on_where_the_request_began_it() -> None:
    asked = {"model": "claude-x", "system": "s", **chat({"role": "assistant", "content": "{"})}
    answered = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": "}"}],
        "stop_reason": "end_turn",
    }
    found = one({"request": asked, "response": answered})
    assert found.messages[-1] == Message("assistant", "{}")


def test_a_response_that_was_cut_off_carries_no_loss() -> None:
    answered = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": "and so"}],
        "stop_reason": "max_tokens",
    }
    assert one(answered).messages == (Message("assistant", "and so", learned=False),)


def test_a_request_without_answer_says_so() -> None:
    failed = {"type": "error", "error": {"type": "overloaded_error"}}
    said = reason({"request": chat(), "response": failed})
    assert said == "the response is an error, so the request has no answer"


def test_plain_messages_say_the_same_as_anthropics() -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    plain = chat({"role": "assistant", "content": parts})
    assert one(plain).source.format == "messages"
    other = one({**plain, "stop_sequences": []})
    assert other.source.format == "anthropic"
    assert other.content == one(plain).content


def test_a_text_that_was_cut_for_its_citations_is_one() -> None:
    parts = [{"type": "text", "text": "It is ", "citations": None}]
    parts.append({"type": "text", "text": "so.", "citations": [{"url": "x"}]})  # type: ignore[dict-item]
    assert one(chat({"role": "assistant", "content": parts})).messages[1].content == "It is so."


# Open Assistant


def tree() -> dict[str, Any]:
    def message(id: str, role: str, text: str, *replies: Any, **more: Any) -> dict[str, Any]:
        return {"message_id": id, "role": role, "text": text, "replies": list(replies), **more}

    worse = message("2", "assistant", "worse", message("5", "prompter", "then?"), rank=1)
    better = message("3", "assistant", "better", rank=0)
    deleted = message("4", "assistant", "gone", message("6", "prompter", "lost"), deleted=True)
    first = message("1", "prompter", "q", worse, better, deleted, lang="en")
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": first}


def flat(**dates: str) -> list[dict[str, Any]]:
    found = [
        {"message_id": "1", "parent_id": None, "role": "prompter", "text": "q"},
        {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "first"},
        {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "second"},
    ]
    return [{**record, "created_date": dates.get(f"_{record['message_id']}")} for record in found]


def test_the_best_ranked_answer_of_a_tree_is_taken() -> None:
    found = one(tree())
    assert texts(found) == [("user", "q"), ("assistant", "better")]
    assert (found.content.group, found.content.metadata) == ("t", {"lang": "en"})


def test_all_branches_of_a_tree_are_one_group_without_what_was_deleted() -> None:
    found, _ = read(tree(), branches="all")
    assert [spoken(item.messages) for item in found] == [["q", "worse", "then?"], ["q", "better"]]
    assert {item.content.group for item in found} == {"t"}


def test_of_answers_without_rank_the_newest_is_taken_or_the_first() -> None:
    assert spoken(one(flat(_2="2023-01-01", _3="2023-01-02")).messages) == ["q", "second"]
    assert spoken(one(flat()).messages) == ["q", "first"]


def test_a_message_that_answers_nothing_is_reported() -> None:
    found, rejected = read(flat()[1:])
    assert not found
    assert [item.index for item in rejected] == [0, 1]
    assert rejected[0].reason == "answers the message '1', which is missing"


def test_messages_that_answer_each_other_are_reported() -> None:
    first, second, _ = flat()
    _, rejected = read([{**first, "parent_id": "2"}, second])
    assert {item.reason for item in rejected} == {"answers a message that answers it"}


def test_a_message_with_the_id_of_another_is_reported() -> None:
    found, (rejected,) = read([*flat(), flat()[2]])
    assert len(found) == 1
    assert rejected.reason == "has the id '3' of another message before it"


# Preferences


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        {
            "prompt": "q",
            "chosen": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "good"},
            ],
            "rejected": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "bad"},
            ],
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "good"},
            ],
        },
        {
            "chosen": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "good"},
            ],
            "rejected": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "bad"},
            ],
        },
        {
            "chosen": "\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: bad",
        },
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {
            "chosen_messages": [
                {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": "good"}]},
            ],
            "rejected_messages": [
                {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": "bad"}]},
            ],
        },
        {"question": "q", "response_j": "good", "response_k": "bad"},
        {"question": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {
            "instruction": "q",
            "input": "",
            "left_answer": "bad",
            "right_answer": "good",
            "result": "right",
        },
        {
            "input": {"messages": [{"role": "user", "content": "q"}]},
            "preferred_output": [{"role": "assistant", "content": "good"}],
            "non_preferred_output": [{"role": "assistant", "content": "bad"}],
        },
    ],
)
def test_every_shape_of_a_preference_says_the_same(record: Any) -> None:
    found = one(record)
    assert found.source.format == "preferences"
    assert found.messages == (Message("user", "q"),)
    assert found.content.chosen == (Message("assistant", "good"),)
    assert found.content.rejected == (Message("assistant", "bad"),)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"prompt": "q", "chosen": "a", "rejected": "a "},
            "chosen and rejected say the same, so neither is the better one",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "rejected is empty"),
        (
            {"prompt": "q", "chosen": 5, "rejected": "a"},
            "chosen must be a text, a message or a list of messages, not 5",
        ),
        ({"prompt": "", "chosen": "b", "rejected": "a"}, "prompt must be a text that is not empty"),
        (
            {"chosen": "b", "rejected": "a"},
            "has no prompt, and chosen and rejected do not begin with the same one",
        ),
        (
            {"prompt": "q", "chosen": "b", "rejected": {"role": "user", "content": "a"}},
            "rejected begins with role 'user'; it must be a reply",
        ),
        (
            {"instruction": "q", "left_answer": "a", "right_answer": "b", "result": "equal"},
            "result is 'equal', so neither answer is the better one",
        ),
        (
            {"prompt": "q", "chosen": [{"role": "assistant", "content": 5}], "rejected": "a"},
            "message 0 of chosen has content that is neither a text nor a list of parts",
        ),
    ],
)
def test_a_preference_that_says_nothing_is_rejected(record: Any, said: str) -> None:
    assert reason(record) == said


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        chat({"role": "assistant", "content": "a"}),
    ],
)
@pytest.mark.parametrize(("name", "value"), [("label", True), ("label", 0), ("kto_tag", False)])
def test_a_label_makes_any_reply_a_preference(record: Any, name: str, value: object) -> None:
    found = one({**record, name: value})
    assert found.source.format == "preferences"
    assert texts(found) == [("user", "q"), ("assistant", "a")]
    assert found.content.label is bool(value)


def test_a_label_needs_a_reply() -> None:
    assert reason({**chat(), "label": True}) == "must end with the reply that label is about"


def test_a_label_in_quotes_is_not_guessed() -> None:
    said = reason({"prompt": "q", "completion": "a", "label": "True"})
    assert said == "label must be true or false, not 'True'"


# Documents


def test_what_stands_beside_a_text_is_metadata() -> None:
    found = one({"text": "a\r\nb", "url": "u"})
    assert (found.content.text, found.content.metadata) == ("a\r\nb", {"url": "u"})


def test_the_text_may_be_in_another_column() -> None:
    record = {"sentence": "a", "level": 1, "output": "b", "input": "c"}
    found = one(record, text_column="sentence", format="documents")
    assert found.content.text == "a"
    assert reason({"text": "a"}, text_column="sentence") == "no known format; its keys are 'text'"
    assert reason({"s": None}, text_column="s") == "s must be a text that is not empty"


def test_a_text_beside_messages_asks_which() -> None:
    both = {"text": "x", **chat({"role": "assistant", "content": "a"})}
    assert reason(both) == "fits messages and documents; say which with `format:`"
    assert one(both, "documents").content.text == "x"
    assert texts(one(both, "messages"))[-1] == ("assistant", "a")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_file_is_one_document_with_its_line_ends(encoding: str) -> None:
    found = documents.document("Мы\r\nне рабы".encode(encoding))
    assert not isinstance(found, str)
    assert found.text == "Мы\r\nне рабы"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        ("не".encode("cp1251"), "is not UTF-8: byte 0 does not fit; save it as UTF-8"),
        (b"\xff\xfea", "is not UTF-16, as its first bytes say: byte 2 does not fit"),
        (b"PK\x00\x01", "is not a text: it has a zero byte"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_text_says_why(data: bytes, said: str) -> None:
    found = documents.document(data)
    assert isinstance(found, str)
    assert found.startswith(said)


# Real files


def records_of(path: str) -> list[Any]:
    text = (SHARED / path).read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return value if isinstance(value, list) else [value]


FACTORY = "hiyouga__LLaMA-Factory/data"
RULM = "IlyaGusev__rulm/self_instruct"
OUMI = "oumi-ai__oumi/data/dataset_examples"
REAL = [
    (f"{RULM}/crowd/examples/honey.jsonl", "preferences", 13, 1),
    (f"{RULM}/crowd/examples/training.json", "", 0, 10),
    (f"{RULM}/data/en_chargen_seed.jsonl", "character", 15, 0),
    (f"{RULM}/data/ru_chargen_seed.jsonl", "character", 15, 0),
    ("LAION-AI__Open-Assistant/backend/test_data/generic/test_generic_data.json", "oasst", 2, 0),
    (
        "LAION-AI__Open-Assistant/backend/test_data/realistic/realistic_seed_data.json",
        "oasst",
        74,
        0,
    ),
    ("Lightning-AI__litgpt/tests/data/_fixtures/dolly.json", "instruct", 12, 0),
    ("Lightning-AI__litgpt/tests/data/_fixtures/longform_train.json", "instruct", 17, 0),
    ("Lightning-AI__litgpt/tests/data/_fixtures/longform_val.json", "instruct", 9, 0),
    ("axolotl-ai-cloud__axolotl/tests/fixtures/alpaca/alpaca.json", "instruct", 2, 0),
    ("axolotl-ai-cloud__axolotl/tests/fixtures/conversation.json", "sharegpt", 1, 0),
    ("derived_ru_user_claude/instruct/instruct.jsonl", "instruct", 30, 0),
    ("derived_ru_user_claude/instruct/instruct_list.json", "instruct", 70, 0),
    ("derived_ru_user_claude/instruct/instruct_single.json", "instruct", 1, 0),
    ("derived_ru_user_claude/instruct/instruct_with_input.json", "instruct", 30, 0),
    (f"{FACTORY}/c4_demo.jsonl", "documents", 300, 0),
    (f"{FACTORY}/dataset_info.json", "", 0, 1),
    (f"{FACTORY}/dpo_en_demo.json", "preferences", 300, 0),
    (f"{FACTORY}/glaive_toolcall_en_demo.json", "sharegpt", 300, 0),
    (f"{FACTORY}/identity.json", "instruct", 91, 0),
    (f"{FACTORY}/kto_en_demo.json", "preferences", 300, 0),
    (f"{FACTORY}/mllm_demo.json", "messages", 6, 0),
    (f"{FACTORY}/v1_dpo_demo.jsonl", "preferences", 10, 0),
    (f"{FACTORY}/v1_multimodal_demo.jsonl", "messages", 24, 0),
    (f"{FACTORY}/v1_sft_demo.jsonl", "messages", 500, 0),
    ("lm-sys__FastChat/data/dummy_conversation.json", "sharegpt", 500, 0),
    ("lm-sys__FastChat/fastchat/llm_judge/data/mt_bench/reference_answer/gpt-4.jsonl", "", 0, 30),
    (f"{OUMI}/alpaca_format.json", "instruct", 2, 0),
    (f"{OUMI}/alpaca_format.jsonl", "instruct", 2, 0),
    (f"{OUMI}/oumi_format.json", "messages", 2, 0),
    (f"{OUMI}/vision_language_dpo_format.jsonl", "preferences", 3, 0),
    (f"{OUMI}/vision_language_oumi_format.jsonl", "messages", 2, 0),
    ("pytorch__torchtune/tests/assets/instruct_tiny.json", "instruct", 2, 0),
    ("pytorch__torchtune/tests/assets/stack_exchange_paired_tiny.json", "preferences", 25, 0),
    ("yizhongw__self-instruct/data/seed_tasks.jsonl", "self_instruct", 175, 0),
]
shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared test data")


@shared
@pytest.mark.parametrize(("path", "format", "read_well", "not_read"), REAL)
def test_real_data_sets_are_read_to_the_last_record(
    path: str, format: str, read_well: int, not_read: int
) -> None:
    found, rejected = read(records_of(path))
    assert (len(found), len(rejected)) == (read_well, not_read)
    assert {item.source.format for item in found} <= {format}


@shared
def test_real_open_assistant_messages_have_one_branch_for_each_leaf() -> None:
    path = "LAION-AI__Open-Assistant/backend/test_data/realistic/realistic_seed_data.json"
    records = records_of(path)
    answered = {record["parent_message_id"] for record in records}
    leaves = [record for record in records if record["user_message_id"] not in answered]
    found, _ = read(records, branches="all")
    assert len(found) == len(leaves)
    assert len({item.content.group for item in found}) == 74


@shared
def test_half_of_the_real_labels_are_good() -> None:
    found, _ = read(records_of(f"{FACTORY}/kto_en_demo.json"))
    labels = [item.content.label for item in found]
    assert (labels.count(True), labels.count(False)) == (150, 150)


@shared
def test_real_tool_calls_all_have_a_name_and_arguments() -> None:
    found, _ = read(records_of(f"{FACTORY}/glaive_toolcall_en_demo.json"))
    calls = [call for item in found for said in item.messages for call in said.tool_calls]
    assert len(calls) == 211
    assert all(isinstance(call["arguments"], dict) for call in calls)


@shared
def test_real_pictures_leave_their_text_alone() -> None:
    found, _ = read(records_of(f"{OUMI}/vision_language_oumi_format.jsonl"))
    assert texts(found[0])[0] == ("user", "What breed is this dog?")
    found, _ = read(records_of(f"{FACTORY}/mllm_demo.json"))
    assert not any("<image>" in text for item in found for _, text in texts(item))


@shared
def test_exports_of_chats_are_no_data_sets() -> None:
    others = ("claude", "polylogue", "openwebui", "telegram", "tg-parser", "context-carry")
    for path in sorted(SHARED.rglob("*.json*")):
        if any(word in str(path).lower() for word in others) and "derived" not in str(path):
            for record in records_of(str(path)):
                fits = [name for name in OURS if FORMATS[name].claims(record)]
                assert not fits, path


# Whatever is wrong


HARMFUL = (
    '{"x": "\\ud83d"}',
    '{"name": "\\ud83d", "arguments": {}}',
    "[" * 900 + "]" * 900,
    '{"name": "f", "arguments": NaN}',
    '[{"name": "f", "x": 1e999}]',
)
"""JSON texts inside JSON that no artifact can hold once they are read."""


@pytest.mark.parametrize("arguments", [*HARMFUL, "[" * 200_000, '{"a": -Infinity}'])
def test_arguments_that_are_no_strict_json_stay_a_text(arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    found = one(
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [call]},
            ]
        }
    )
    assert found.messages[1].tool_calls == ({"name": "f", "arguments": arguments},)


@pytest.mark.parametrize("tools", [*HARMFUL, "[" * 200_000])
def test_tools_that_are_no_strict_json_are_said(tools: str) -> None:
    record = {**chat({"role": "assistant", "content": "b"}), "tools": tools}
    assert "tools is a text that is not JSON" in reason(record)


def damaged(value: Any) -> Iterator[Any]:
    """The value with each of its parts replaced by what does not belong there, or left out."""
    for wrong in (None, 5, True, "x", "", [], {}, [5], {"a": 1}, *HARMFUL):
        yield wrong
    if isinstance(value, dict | list):
        places = list(value) if isinstance(value, dict) else range(len(value))
        for place in places:
            without = copy.copy(value)
            del without[place]
            yield without
            for wrong in damaged(value[place]):
                changed = copy.copy(value)
                changed[place] = wrong
                yield changed


SAMPLES: list[Any] = [
    {
        "instruction": "a",
        "input": "b",
        "output": "c",
        "system": "s",
        "history": [["d", "e"]],
        "metadata": {"f": 1},
    },
    {"instruction": "a", "context": "b", "response": "c", "category": "d"},
    {"id": "s", "name": "n", "instruction": "a", "instances": [{"input": "b", "output": "c"}]},
    {
        "name": "n",
        "context": "a",
        "greeting": "b",
        "example_dialogue": [{"role": "user", "content": "c"}],
    },
    {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
        "label": True,
    },
    {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "b"},
            {"from": "gpt", "value": "c"},
        ],
        "system": "s",
        "tools": '[{"name": "f"}]',
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {
                "role": "assistant",
                "content": None,
                "weight": 1,
                "train": True,
                "refusal": None,
                "reasoning_content": "r",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                "function_call": {"name": "g", "arguments": "{}"},
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "reasoning", "value": "r"},
                    {"type": "tool_call", "value": '{"name": "f", "arguments": {}}'},
                ],
                "loss_weight": 1.0,
            },
        ],
        "tools": [{"type": "function"}],
        "images": ["a.jpg"],
    },
    {
        "request": {
            "model": "claude",
            "max_tokens": 5,
            "system": [{"type": "text", "text": "s"}],
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r"}],
                },
                {"role": "assistant", "content": "p"},
            ],
            "tools": [{"name": "f", "input_schema": {}}],
        },
        "response": {
            "type": "message",
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t"},
                {"type": "text", "text": "a", "citations": []},
                {"type": "tool_use", "id": "1", "name": "f", "input": {}},
            ],
            "stop_reason": "end_turn",
        },
    },
    tree(),
    flat(_1="2023-01-01"),
    {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"},
    {
        "chosen_messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ],
        "rejected_messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "c"},
        ],
    },
    {
        "instruction": "a",
        "input": "b",
        "left_answer": "c",
        "right_answer": "d",
        "result": "left",
    },
    {
        "input": {"messages": [{"role": "user", "content": "a"}]},
        "preferred_output": [{"role": "assistant", "content": "b"}],
        "non_preferred_output": [{"role": "assistant", "content": "c"}],
    },
    {"text": "a", "meta": {"b": 1}},
]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("branches", ["newest", "all"])
def test_a_damaged_record_is_read_or_rejected_with_a_reason(sample: Any, branches: str) -> None:
    assert not read(sample, branches=branches)[1]
    for record in damaged(sample):
        records = record if isinstance(record, list) else [record]
        found, rejected = read(records, branches=branches)
        assert found or rejected or not records
        assert all(item.reason for item in rejected)
        for item in found:
            for message in (*item.messages, *item.content.chosen, *item.content.rejected):
                assert isinstance(message.content, str)
                assert isinstance(message.thinking, str)
            json.dumps(item.record(), ensure_ascii=False, allow_nan=False).encode()
