"""Reads chats and instruction data; each record becomes a conversation or is reported."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from runner.chat import jsonl
from runner.chat.conversation import Conversation, Rejected, with_ids
from runner.chat.formats import read_file
from runner.errors import PreconditionError, RunnerError
from runner.stages.stage import Dirs, Metrics, SourceFile, Stage


class SourceChanged(RunnerError):
    """A file is not the one that was planned with: the engine plans again with what is there."""


class Ingest(Stage):
    """Read conversations from files."""

    stage: Literal["ingest"]
    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files, folders and globs to read, relative to the workspace."""
    format: Literal["auto", "sender", "instruct", "messages"] = "auto"
    """Read every record as this format instead of telling it by its shape."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Stop when more than this share of all records cannot be read."""

    outside_key = ("sources",)
    writes = "conversations"
    shows: ClassVar[Mapping[str, str]] = {
        "": "conversations.jsonl",
        "rejected": "rejected.jsonl",
    }

    def source_patterns(self) -> tuple[str, ...]:
        return self.sources

    def run(self, dirs: Dirs) -> Metrics:
        rejected: list[Rejected] = []
        read = conversations(dirs.sources, self.format, rejected)
        records = (conversation.record(id) for id, conversation in with_ids(read))
        count = jsonl.write(dirs.output / "conversations.jsonl", records)
        jsonl.write(dirs.output / "rejected.jsonl", (r.record() for r in rejected))
        refuse_bad(count, rejected, self.max_bad_fraction)
        return {"files": len(dirs.sources), "conversations": count, "rejected": len(rejected)}


def conversations(
    sources: Sequence[SourceFile], format: str, rejected: list[Rejected]
) -> Iterator[Conversation]:
    """Conversations by path, then by place in the file; what cannot be read goes to `rejected`."""
    for source in sources:
        try:
            data = source.path.read_bytes()
        except OSError as error:
            raise SourceChanged(
                f"{source.name} cannot be read: {error.strerror}",
                hint="make it readable, run again",
            ) from error
        if hashlib.sha256(data).hexdigest() != source.sha256:
            raise SourceChanged(
                f"{source.name} changed while it was being read",
                hint="run again when nothing writes to it any more",
            )
        for record in read_file(source.name, data, format):
            if isinstance(record, Rejected):
                rejected.append(record)
            else:
                yield record


def refuse_bad(good: int, rejected: Sequence[Rejected], max_bad_fraction: float) -> None:
    """Raises when nothing could be read, or less than the recipe allows."""
    bad = len(rejected)
    first = f"{rejected[0].path} {_place(rejected[0])}{rejected[0].reason}" if rejected else ""
    if good == 0:
        raise PreconditionError(
            f"ingest: no conversation in the sources; first of {bad} rejected: {first}"
            if rejected
            else "ingest: no conversation in the sources",
            hint="a chat is a list of {sender, userInput | claudeOutputText}, "
            "{instruction, output} or {messages}",
        )
    if bad > max_bad_fraction * (good + bad):
        raise RunnerError(
            f"ingest: {bad} of {good + bad} records cannot be read, more than the "
            f"max_bad_fraction of {max_bad_fraction}; the first: {first}",
            hint="mend or move the files, or raise max_bad_fraction",
        )


def _place(rejected: Rejected) -> str:
    if rejected.line is not None:
        return f"line {rejected.line}: "
    return f"record {rejected.index}: " if rejected.index is not None else ""
