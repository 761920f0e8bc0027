"""The model card: a README.md that says what a model was made from, as Hugging Face shows it."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from runner.errors import PreconditionError
from runner.model import gguf_header

Method = Literal["lora", "qlora", "full"]


@dataclass(frozen=True)
class File:
    """One file, or folder, of the export."""

    name: str
    form: str
    """What it is: "q4_k_m", "merged", "adapter"."""
    size_bytes: int
    parity: Mapping[str, float | int | str] = field(default_factory=dict)
    """How near it is to the trained model, each number by its name; empty where not measured."""


def text(
    *,
    name: str,
    base_model: str | None,
    base_licence: str | None,
    method: Method,
    steps: int | None,
    conversations: int | None,
    eval_loss_before: float | None,
    eval_loss: float | None,
    files: Sequence[File],
    languages: Sequence[str] = (),
    author: str | None = None,
    licence: str | None = None,
    lost: str | None = None,
) -> str:
    """The card as Markdown with YAML front matter.

    `base_model` is `organisation/name` as on Hugging Face, or a bare name; `languages` are codes
    such as "en"; `licence` is the one that this model is given on under, where that is not the
    base's; `lost` is a sentence on what the base had lost before. Losses are means for each token
    of replies held out of the training. What people wrote stays text: nothing in it can add a line
    to the front matter, a link or a tag to the page.
    """
    forms = {file.form for file in files}
    parts = [
        _front_matter(base_model, licence or base_licence, method, forms, languages),
        f"# {_plain(name)}",
        "" if author is None else f"By {_plain(author)}.",
        _origin(base_model, base_licence, method, steps, conversations),
        _losses(eval_loss_before, eval_loss),
        _table(files),
        _sentence(lost),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def licence(base: Path) -> str | None:
    """The licence of a base model, as its GGUF header, model card or config names it; else None."""
    if base.is_file():
        try:
            return gguf_header.read(base).text("general.license")
        except PreconditionError:
            return None
    return _front_matter_value(base / "README.md", "license") or _config_value(base, "license")


def _front_matter(
    base_model: str | None,
    licence: str | None,
    method: Method,
    forms: set[str],
    languages: Sequence[str],
) -> str:
    quantised = forms - {"adapter", "merged"}
    library = "transformers" if "merged" in forms else "gguf" if quantised else "peft"
    lines = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if base_model is not None and _HUB_NAME.fullmatch(base_model):
        lines.append(f"base_model: {_yaml(base_model)}")
        relation = "adapter" if forms == {"adapter"} else "finetune"
        lines.append(f"base_model_relation: {relation}")
    if licence is not None:
        known = bool(_IDENTIFIER.fullmatch(licence))
        lines.append(f"license: {_yaml(licence if known else 'other')}")
        if not known:
            lines.append(f"license_name: {_yaml(licence)}")
    codes = [code for code in languages if _LANGUAGE.fullmatch(code)]
    if codes:
        lines += ["language:", *(f"- {_yaml(code)}" for code in codes)]
    tags = ["full-fine-tuning" if method == "full" else str(method)]
    if quantised:
        tags.append("gguf")
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


_METHODS: Mapping[Method, str] = {
    "lora": "a low-rank adapter (LoRA)",
    "qlora": "a low-rank adapter over 4-bit weights (QLoRA)",
    "full": "all of its weights",
}


def _origin(
    base_model: str | None,
    licence: str | None,
    method: Method,
    steps: int | None,
    conversations: int | None,
) -> str:
    base = "Its base model" if base_model is None else _linked(base_model)
    sentence = f"{base} was fine-tuned: {_METHODS[method]} was trained"
    if method == "full":
        sentence = f"{base} was fine-tuned: {_METHODS[method]} were trained"
    if conversations is not None:
        sentence += f" on {conversations:,} conversation{'s' if conversations != 1 else ''}"
    if steps is not None:
        sentence += f"; the last training took {steps:,} step{'s' if steps != 1 else ''}"
    said = "" if licence is None else f" The base model's licence is {_plain(licence)}."
    return f"{sentence}.{said}"


def _losses(before: float | None, after: float | None) -> str:
    if after is None:
        return ""
    compared = "" if before is None else f", {before:.4g} before that training"
    return f"Mean loss for each token of held-out replies: {after:.4g}{compared}."


def _table(files: Sequence[File]) -> str:
    if not files:
        return ""
    head = ["file", "form", "size", "mean KL", "same next token", "stops"]
    rows = [
        [_plain(file.name), _plain(file.form), _size(file.size_bytes), *_measured(file.parity)]
        for file in files
    ]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    note = (
        "\n\nThe last three columns compare each form with the model as it was trained: how far "
        "its probabilities of the next token are from that (0 is the same; below 0.05 it can "
        "hardly be told), how often the likeliest token is the same, and how many replies end "
        "where they should."
    )
    has_any = any(file.parity for file in files)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + (note if has_any else "")


def _measured(parity: Mapping[str, float | int | str]) -> list[str]:
    """The cells of one form; empty where it was not measured."""
    kl, top1 = parity.get("mean_kl"), parity.get("top1")
    stops, of = parity.get("stops"), parity.get("reference_stops")
    return [
        f"{kl:.3g}" if isinstance(kl, int | float) else "",
        f"{top1:.1%}" if isinstance(top1, int | float) else "",
        f"{stops} of {of}" if isinstance(stops, int) and isinstance(of, int) and of else "",
    ]


def _size(size_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= size:
            return f"{size_bytes / size:.3g} {unit}"
    return f"{size_bytes} bytes"


def _sentence(words: str | None) -> str:
    if not words:
        return ""
    said = _plain(words[0].upper() + words[1:])
    return said if said.endswith(".") else f"{said}."


def _linked(base_model: str) -> str:
    if _HUB_NAME.fullmatch(base_model):
        return f"[{_plain(base_model)}](https://huggingface.co/{base_model})"
    return _plain(base_model)


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.-]{0,40}")
_LANGUAGE = re.compile(r"[a-z]{2,3}")
# In file names and numbers these two mean nothing to Markdown.
_MARKS = frozenset(string.punctuation) - frozenset("-.,'\"/:%()")


def _plain(words: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line."""
    shown = "".join(letter if letter.isprintable() else " " for letter in words)
    escaped = "".join(f"\\{letter}" if letter in _MARKS else letter for letter in shown)
    # At the start of a line these make a list, a heading or a rule.
    return re.sub(r"^(\s*)([-.:]|\d+[.)])", r"\1\\\2", " ".join(escaped.split()))


def _yaml(words: str) -> str:
    """A quoted scalar of YAML, whatever is in it."""
    quoted = json.dumps(words, ensure_ascii=False)
    return "".join(
        letter if letter.isprintable() else _ESCAPED.format(ord(letter)) for letter in quoted
    )


_ESCAPED = "\\U{:08x}"


def _front_matter_value(path: Path, key: str) -> str | None:
    """A single word of a model card's front matter; lists and blocks are left alone."""
    try:
        words = path.read_text(encoding="utf-8", errors="replace")[:65536]
    except OSError:
        return None
    front = re.match(r"---\r?\n(.*?)\r?\n---", words, re.DOTALL)
    found = front and re.search(
        rf"""^{key}:[ \t]*(["']?)([\w.+-]{{1,60}})\1[ \t]*(?:#.*)?\r?$""", front[1], re.MULTILINE
    )
    return found[2] if found else None


def _config_value(folder: Path, key: str) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    said = config.get(key) if isinstance(config, dict) else None
    return said if isinstance(said, str) and said else None
