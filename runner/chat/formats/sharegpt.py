"""ShareGPT: `{"conversations": [{"from", "value"}, …]}`, with `system` and `tools` beside the list.

`tools` may be the JSON text of a list; a `function_call` is the JSON text of `{"name",
"arguments"}`, and its answer an `observation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runner.chat.conversation import Content
from runner.chat.formats import turns
from runner.chat.formats.reading import Options


def claims(record: Mapping[str, Any]) -> bool:
    return _name(record) is not None and not turns.is_preference(record)


def each(record: Mapping[str, Any], options: Options) -> Iterator[Content]:
    name = _name(record)
    assert name is not None, "is claimed"
    yield turns.conversation(record, name)


def _name(record: Mapping[str, Any]) -> str | None:
    without = [name for name in turns.LISTS[1:] if turns.has_no_turns(record, name)]
    return turns.list_with(record, "from", "value") or next(iter(without), None)
