from runner.chat.conversation import Conversation, Message, Source, replies, tidy, with_ids


def said(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[n % 2], text) for n, text in enumerate(texts))
    return Conversation(Source("a.json", "sender", 0), messages)


def test_empty_messages_are_dropped_and_neighbours_of_one_role_are_joined() -> None:
    messages = [
        Message("user", "one"),
        Message("assistant", " \n"),
        Message("user", "two"),
        Message("assistant", "three"),
    ]
    assert tidy(messages) == (Message("user", "one\n\ntwo"), Message("assistant", "three"))


def test_equal_conversations_share_the_hash_but_not_the_id() -> None:
    ids = [id for id, _ in with_ids([said("q", "a"), said("q", "b"), said("q", "a")])]
    assert ids[2] == f"{ids[0]}~2"
    assert len(set(ids)) == 3


def test_the_hash_tells_where_a_message_ends() -> None:
    assert said("ab", "c").content_hash != said("a", "bc").content_hash


def test_a_reply_belongs_to_the_question_before_it() -> None:
    roles = ["system", "assistant", "user", "tool", "assistant", "assistant", "user"]
    assert replies([{"role": role, "content": "x"} for role in roles]) == [(2, 4)]
