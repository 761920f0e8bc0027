from runner.chat.conversation import Content, Ids, Message, content_hash, replies, tidy


def hash_of(*texts: str) -> str:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[n % 2], text) for n, text in enumerate(texts))
    return content_hash(Content(messages).record())


def test_empty_messages_are_dropped_and_neighbours_of_one_role_are_joined() -> None:
    messages = [
        Message("user", "one"),
        Message("assistant", " \n"),
        Message("user", "two"),
        Message("assistant", "three"),
    ]
    kept, merged, empty = tidy(messages)
    assert kept == (Message("user", "one\n\ntwo"), Message("assistant", "three"))
    assert (merged, empty) == (1, 1)


def test_what_a_reply_thought_and_called_is_kept_beside_its_text() -> None:
    call = {"name": "search", "arguments": {}}
    messages = [
        Message("user", "q"),
        Message("assistant", "", thinking="hm"),
        Message("assistant", "", tool_calls=(call,)),
        Message("assistant", "a"),
    ]
    kept, merged, empty = tidy(messages)
    assert kept[1] == Message("assistant", "a", thinking="hm", tool_calls=(call,))
    assert (merged, empty) == (2, 0)


def test_equal_conversations_share_the_hash_but_not_the_id() -> None:
    numbered = Ids()
    said = [hash_of("q", "a"), hash_of("q", "b"), hash_of("q", "a")]
    ids = [numbered.next(content) for content in said]
    assert ids[2] == f"{ids[0]}~2"
    assert len(set(ids)) == 3


def test_the_hash_tells_where_a_message_ends() -> None:
    assert hash_of("ab", "c") != hash_of("a", "bc")


def test_a_reply_belongs_to_the_question_before_it() -> None:
    roles = ["system", "assistant", "user", "tool", "assistant", "user", "user", "assistant"]
    assert replies([{"role": role, "content": "x"} for role in roles]) == [(2, 4), (6, 7)]


def test_the_reply_is_what_is_said_after_the_last_call_of_a_tool() -> None:
    roles = ["user", "assistant", "tool", "assistant", "tool", "assistant", "user", "assistant"]
    assert replies([{"role": role, "content": "x"} for role in roles]) == [(0, 5), (6, 7)]
    said = [{"role": role, "content": "x"} for role in roles[:6]]
    said[5]["weight"] = 0  # type: ignore[assignment]
    assert replies(said) == []


def test_a_reply_without_text_does_not_end_the_exchange() -> None:
    said = [("user", "q"), ("assistant", ""), ("tool", "r"), ("assistant", "a")]
    assert replies([{"role": role, "content": text} for role, text in said]) == [(0, 3)]
