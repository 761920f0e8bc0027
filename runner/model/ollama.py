"""The Modelfile with which Ollama runs a GGUF file: stop tokens, context, and a prompt template
made from the tokenizer's own, so that the model reads what it was trained on.

Ollama's templates are Go's, not Jinja's: https://docs.ollama.com/template.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from runner.errors import RunnerError
from runner.model import load


def modelfile(model: Path, gguf_name: str, *, num_ctx: int, system: str | None) -> str:
    """The text of a Modelfile beside `gguf_name`, for the model whose tokenizer is in `model`."""
    tokenizer = load.tokenizer(model)
    try:
        frame = _frame(tokenizer)
        template = f'TEMPLATE """{frame.as_go()}"""'
        turn = frame.between_turns
    except _Underivable as reason:
        template = f"# No TEMPLATE: {reason}. Ollama goes by what it finds in the GGUF file."
        turn = ""
    lines = [f"# ollama create NAME -f Modelfile\nFROM ./{gguf_name}", template]
    lines += [f'PARAMETER stop "{token}"' for token in _stop_tokens(model, tokenizer, turn)]
    lines.append(f"PARAMETER num_ctx {num_ctx}")
    if system is not None:
        if '"""' in system:
            raise RunnerError(
                'the system message holds """, which ends a text in a Modelfile',
                hint="write it with other quotation marks",
            )
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Frame:
    """What a chat template writes around the contents of a conversation."""

    opening: str
    """Before the first user message, where there is no system message."""
    before_system: str
    after_system: str
    before_reply: str
    before_new_reply: str
    """What follows `before_reply` where the reply is still to come: Qwen3's empty thought."""
    between_turns: str
    """After a reply, up to the next user message."""

    def around(self, roles: Sequence[str]) -> list[str]:
        """The literals before, between and after the contents of messages in these roles."""
        known = {
            ("system", "user"): self.after_system,
            ("user", "assistant"): self.before_reply,
            ("assistant", "user"): self.between_turns,
        }
        first = self.before_system if roles[0] == "system" else self.opening
        between = [known[pair] for pair in itertools.pairwise(roles)]
        return [first, *between, self.before_reply + self.before_new_reply]

    def as_go(self) -> str:
        # A dash eats the white space before it, so no literal stands before one.
        return (
            "{{- if .System }}"
            f"{self.before_system}{{{{ .System }}}}{self.after_system}"
            f"{{{{ else }}}}{self.opening}{{{{ end }}}}\n"
            "{{- $first := true }}\n"
            "{{- range .Messages }}\n"
            '{{- if eq .Role "user" }}'
            f"{{{{ if not $first }}}}{self.between_turns}{{{{ end }}}}"
            f"{{{{ .Content }}}}{self.before_reply}{{{{ $first = false }}}}\n"
            '{{- else if eq .Role "assistant" }}{{ .Content }}\n'
            "{{- end }}\n"
            f"{{{{- end }}}}{self.before_new_reply}"
        )


class _Underivable(Exception):
    """Why a chat template has no counterpart in a Modelfile."""


def _frame(tokenizer: PreTrainedTokenizerBase) -> _Frame:
    """Reads the literals off renderings of marked contents, then checks longer conversations."""
    source = tokenizer.chat_template
    if not source:
        raise _Underivable("the tokenizer has no chat template")
    if not isinstance(source, str):
        raise _Underivable("the tokenizer has several chat templates")
    if "strftime_now" in source:
        raise _Underivable("the chat template writes today's date")
    opening, before_reply, between_turns, asked = _literals(
        tokenizer, ["user", "assistant", "user"]
    )
    if not asked.startswith(before_reply):
        raise _Underivable("the chat template opens a new reply differently from an old one")
    try:
        before_system, after_system, _ = _literals(tokenizer, ["system", "user"])
    except _Underivable:
        # Training puts the system message before the first user message then, in the same way.
        before_system, after_system = opening, "\n\n"
        rendered_with_system = False
    else:
        rendered_with_system = True
    before_new_reply = asked.removeprefix(before_reply)
    frame = _Frame(
        opening, before_system, after_system, before_reply, before_new_reply, between_turns
    )
    turns = ["user", "assistant", "user", "assistant", "user"]
    for roles in (turns[:1], turns, *([["system", *turns]] if rendered_with_system else [])):
        if _literals(tokenizer, roles) != frame.around(roles):
            raise _Underivable("the chat template writes a message differently by its place")
    if any(mark in "".join(_fields(frame)) for mark in ("{{", "}}", '"""')):
        raise _Underivable("the chat template writes what a Modelfile cannot hold")
    return _without_bos(frame, tokenizer)


def _literals(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[str]:
    """What the template writes before, between and after contents, with the reply still to come."""
    contents = [f"\ue000{index}\ue001" for index in range(len(roles))]  # private use: in no text
    messages = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        raise _Underivable(f"the chat template refuses {', '.join(roles)}") from error
    literals: list[str] = []
    rest = str(rendered)
    for content in contents:
        if rest.count(content) != 1:
            raise _Underivable("the chat template repeats or leaves out a message")
        literal, rest = rest.split(content)
        literals.append(literal)
    return [*literals, rest]


def _without_bos(frame: _Frame, tokenizer: PreTrainedTokenizerBase) -> _Frame:
    """Without the token for the start of the text, where the tokenizer puts one itself: Ollama
    lets it, and two of them spoil the reply."""
    bos = tokenizer.bos_token
    if not isinstance(bos, str) or tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        return frame
    return replace(
        frame,
        opening=frame.opening.removeprefix(bos),
        before_system=frame.before_system.removeprefix(bos),
    )


def _stop_tokens(model: Path, tokenizer: PreTrainedTokenizerBase, turn: str) -> list[str]:
    """What ends a reply: by the generation settings, the tokenizer, and the template."""
    file = model / "generation_config.json"
    ends = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.exists() else None
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    tokens = [tokenizer.decode([id]) for id in ids] + [tokenizer.eos_token]
    tokens += [token for token in tokenizer.all_special_tokens if turn.startswith(token)]
    return list(dict.fromkeys(token for token in tokens if isinstance(token, str) and token))


def _fields(frame: _Frame) -> list[str]:
    return [*frame.around(["system", "user", "assistant", "user"]), frame.opening]
