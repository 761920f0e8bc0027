"""Which tokens of a tokenizer steer the model, and the tokenizer that makes none of them."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HTML = re.compile(
    r"</?(a|b|blockquote|caption|code|em|h[1-6]|i|li|ol|p|pre|s|strong|sub|sup|table|tbody|td|"
    r"tfoot|th|thead|tr|u|ul)>"
)


def of(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> dict[int, str]:
    """The text of each control token, by its id."""
    return {
        id: token.content
        for id, token in tokenizer.added_tokens_decoder.items()
        if token.special or _is_marker(token.content, chat_template)
    }


def without(backend: Tokenizer, control: frozenset[str]) -> tuple[Tokenizer, bool]:
    """The tokenizer as it reads contents: no control tokens, and no space put before a text.

    The second value tells whether the original puts one there.
    """
    spec: dict[str, Any] = json.loads(backend.to_str())
    spec |= {"truncation": None, "padding": None, "post_processor": None}
    vocab = spec["model"].get("vocab")
    kept = []
    for token in spec["added_tokens"]:
        if token["content"] in control:
            continue
        if isinstance(vocab, dict):
            # A token outside the vocabulary would be given another id; inside, it keeps its own.
            vocab.setdefault(token["content"], token["id"])
            kept.append(token)
        elif backend.model.token_to_id(token["content"]) == token["id"]:
            kept.append(token)
    spec["added_tokens"] = kept
    prefixes = False
    for step in _steps(spec["pre_tokenizer"]):
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            step["prepend_scheme"] = "never"
            prefixes = True
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            step["add_prefix_space"] = False
            prefixes = True
    normalizers = _steps(spec["normalizer"])
    others = [step for step in normalizers if step["type"] != "Prepend"]
    if len(others) < len(normalizers):
        spec["normalizer"] = {"type": "Sequence", "normalizers": others}
        prefixes = True
    return Tokenizer.from_str(json.dumps(spec)), prefixes


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("normalizers") or [part]
    return list(inner)


def _is_marker(content: str, chat_template: str) -> bool:
    """Whether an added token that is not special steers the model, as `<think>` does.

    Runs of white space, HTML tags (Gemma has both) and added words are text: without them, a
    pretrained model would be trained on spellings that it has never seen.
    """
    if content.isspace() or _HTML.fullmatch(content):
        return False
    return bool(_MARKER.fullmatch(content)) or content in chat_template
