"""Turns chains into token ids, each with the weight of its loss, as the base model reads text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from runner.stages.stage import Dirs, Metrics, Sizes, Stage, Written, base_made

TOKENS_TO_CONVERSATIONS = 5
"""Bytes of tokens to one byte of conversations, at most. Measured with SmolLM2's tokenizer, windows
of mode instruct and conversational: data/quickstart 2.0 and 2.8, English chats 1.8 to 3.1, Russian
ones 2.4 to 4.6."""


class Tokenize(Stage):
    """Encode the windows with the base model's tokenizer and chat template."""

    stage: Literal["tokenize"]
    max_tokens: Annotated[int, Field(ge=16, le=1_000_000)] = 2048
    """The longest example, in tokens."""
    overflow: Literal["rebase", "drop", "fail"] = "rebase"
    """What to do with a longer one: start anew at a later turn, leave it out, or stop."""
    packing: bool = False
    """Put several short examples into one row of up to max_tokens; attention never crosses between
    them."""

    version: ClassVar[int] = 2
    libraries = ("tokenizers", "transformers")
    reads = ("split", "conversations")
    writes = "tokens"
    uses_base_model = True
    own_process = True
    shows: ClassVar[Mapping[str, str]] = {"dropped": "dropped.jsonl"}

    def writes_bytes(self, sizes: Sizes) -> tuple[Written, ...]:
        read = sizes.inputs.get("conversations")
        known = sizes.previous if read is None else TOKENS_TO_CONVERSATIONS * read
        if known is None:
            return Written("tokens, not known before there are conversations", 0), *base_made(sizes)
        parts = Written("tokens, part by part", known, temporary=True)
        return Written("tokens", known), parts, *base_made(sizes)

    def run(self, dirs: Dirs) -> Metrics:
        from runner.model import quickly

        with quickly.importing():
            from runner.model import load, tokens

        return tokens.write(
            base=load.base_folder(dirs.base, dirs.cache),
            conversations=dirs.inputs["conversations"] / "conversations.jsonl",
            chains=dirs.inputs["split"] / "chains.jsonl",
            output=dirs.output,
            max_tokens=self.max_tokens,
            overflow=self.overflow,
            packed=self.packing,
            scratch=dirs.scratch,
            previous=dirs.previous,
            emit=dirs.emit,
            progress=lambda done, total: dirs.emit(
                {"event": "progress", "done": done, "total": total, "unit": "conversations"}
            ),
        )

    def rows(self, artifact: Path, view: str) -> Iterator[str]:
        from runner.model import token_files

        return super().rows(artifact, view) if view else token_files.json_lines(artifact)
