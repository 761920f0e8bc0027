"""Open Assistant: trees of messages, or their messages one a record with the id of their parent.

A tree is `{"message_tree_id", "prompt": {"text", "role", "rank", "replies": […]}}`. Of each message
with several answers the best ranked is taken (the newest where there is no rank, else the first),
or with `branches: all` every way from the first message to a last one. Deleted messages are left
out with all that answers them; synthetic ones, which a model wrote, are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.chat.conversation import Content, Message
from runner.chat.formats.reading import (
    Nothing,
    Options,
    Unreadable,
    list_of,
    object_of,
    role_of,
    shortened,
    text_of,
)
from runner.chat.json_parser import quoted
from runner.chat.json_values import Value

_IDS = ("message_id", "user_message_id")
_PARENTS = ("parent_id", "parent_message_id")


@dataclass
class _Node:
    record: Mapping[str, Any]
    item: Value
    said: Message
    answers: list[_Node] = field(default_factory=list)

    @property
    def is_deleted(self) -> bool:
        return bool(self.record.get("deleted"))


def claims(record: Mapping[str, Any]) -> bool:
    return _is_tree(record) or _is_message(record)


def whole(records: Sequence[Value], options: Options) -> Iterator[tuple[Value, Content | str]]:
    """The trees of a file, then the trees that its single messages make."""
    for item in records:
        if _is_tree(item.value):
            try:
                yield from _conversations(_tree(item), options)
            except Unreadable as error:
                yield item, str(error)
    yield from _forest([item for item in records if not _is_tree(item.value)], options)


def _is_tree(record: Mapping[str, Any]) -> bool:
    prompt = record.get("prompt")
    return isinstance(prompt, dict) and ("message_tree_id" in record or "replies" in prompt)


def _is_message(record: Mapping[str, Any]) -> bool:
    return {"text", "role"} <= record.keys() and any(name in record for name in _PARENTS)


def _node(raw: object, item: Value) -> _Node:
    record = object_of(raw, "a message of the tree")
    id = _id(record, _IDS)
    what = f"message {shortened(id)}" if id else "a message without an id"
    said = Message(role_of(record.get("role"), what), text_of(record.get("text"), what))
    return _Node(record, item, said)


def _id(record: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if isinstance(value := record.get(name), str | int):
            return str(value)
    return ""


def _tree(item: Value) -> _Node:
    """The first message of a tree record, with all that answer it."""
    root = _node(item.value["prompt"], item)
    waiting = [root]
    while waiting:
        node = waiting.pop()
        what = f"replies of message {shortened(_id(node.record, _IDS))}"
        node.answers = [_node(reply, item) for reply in list_of(node.record.get("replies"), what)]
        waiting += node.answers
    return root


def _forest(records: Sequence[Value], options: Options) -> Iterator[tuple[Value, Content | str]]:
    nodes: dict[str, _Node] = {}
    for item in records:
        name = _id(item.value, _IDS)
        try:
            if not name or name in nodes:
                same = f"has the id {quoted(name)} of another message before it"
                raise Unreadable(same if name else f"has no id; it would be in {_IDS[0]!r}")
            nodes[name] = _node(item.value, item)
        except Unreadable as error:
            yield item, str(error)
    roots: list[_Node] = []
    lost: list[tuple[_Node, str]] = []
    for node in nodes.values():
        above = next(node.record[name] for name in _PARENTS if name in node.record)
        parent = _id({"parent": above}, ["parent"])
        if above is None:
            roots.append(node)
        elif parent in nodes:
            nodes[parent].answers.append(node)
        else:
            missing = f"answers the message {quoted(above)}, which is missing"
            lost.append((node, missing))
    circling = dict.fromkeys(nodes)
    for root in roots:
        for below in _below(root):
            del circling[_id(below.record, _IDS)]
        yield from _conversations(root, options)
    for orphan, reason in lost:
        for below in _below(orphan):
            del circling[_id(below.record, _IDS)]
            yield below.item, reason if below is orphan else "answers a message that is left out"
    for name in circling:
        yield nodes[name].item, "answers a message that answers it"


def _below(root: _Node) -> Iterator[_Node]:
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += reversed(node.answers)


def _conversations(root: _Node, options: Options) -> Iterator[tuple[Value, Content | str]]:
    if root.is_deleted:
        yield root.item, Nothing("its first message is deleted")
        return
    group = _id(root.item.value, ("message_tree_id",)) or _id(root.record, _IDS)
    lang = root.record.get("lang")
    for said in _ways(root) if options.branches == "all" else [_best(root)]:
        metadata = {"lang": lang} if isinstance(lang, str) else {}
        yield root.item, Content(tuple(said), group=group, metadata=metadata)


def _ways(root: _Node) -> Iterator[list[Message]]:
    """Every way from the first message to one that nobody answered."""
    way: list[Message] = []
    waiting = [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        way[depth:] = [node.said]
        answers = [answer for answer in node.answers if not answer.is_deleted]
        if not answers:
            yield list(way)
        waiting += [(answer, depth + 1) for answer in reversed(answers)]


def _best(root: _Node) -> list[Message]:
    way: list[Message] = []
    node: _Node | None = root
    while node is not None:
        way.append(node.said)
        node = _best_of([answer for answer in node.answers if not answer.is_deleted])
    return way


def _best_of(answers: list[_Node]) -> _Node | None:
    """The answer of the lowest rank; of answers without rank the newest; else the first."""
    ranked = [answer for answer in answers if isinstance(answer.record.get("rank"), int)]
    if ranked:
        return min(ranked, key=lambda answer: answer.record["rank"])
    return max(answers, key=_date, default=None)


def _date(node: _Node) -> str:
    date = node.record.get("created_date")
    return date if isinstance(date, str) else ""
