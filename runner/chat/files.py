"""What is in one source file: conversations, documents, and records that could not be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from runner.chat import formats
from runner.chat.conversation import Conversation, Rejected
from runner.chat.formats.reading import Options
from runner.chat.json_values import values


def read(
    name: str, data: BinaryIO | bytes, format: str = "auto", options: Options | None = None
) -> Iterator[Conversation | Rejected]:
    """Every conversation and document in a file, in order; `name` is what records call it."""
    whole = data if isinstance(data, bytes) else data.read()
    yield from formats.read(name, values(whole), format, options or Options())
