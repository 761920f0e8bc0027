"""What the trained model says, and whether a merged one says the same; both opened by transformers.

The trained model, base and adapter as training left them, is asked about held-out conversations;
`parity` compares every export with its answers.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from runner.errors import RunnerError
from runner.model import adapter, control_tokens, generate, load, measure, sft, template
from runner.model import token_files as rows_of
from runner.model.load import Dtype
from runner.model.parity import (
    LIKELIEST,
    REPLY_TOKENS,
    Chat,
    Emit,
    Golden,
    Metrics,
    Parity,
    Reference,
    Reply,
    Seen,
    Text,
    compared,
    ends_at,
    read,
    tell,
    words_of,
    write,
)
from runner.model.token_files import Row

# What a level's check may cost a 4B model on a CPU, about two minutes, is what bounds these.
TEXTS = 6
PLACES = 20
"""Compared in each text, beside the ends of replies in it."""
TEXT_TOKENS = 256
PROMPTS = 4
PROMPT_TOKENS = 384
"""The longest prompt that is replied to."""

QUESTIONS = (
    "What is the capital of France?",
    "Как заварить чай?",
    "Write one sentence about 1984 and 2,5 kg of apples.",
)
"""Asked where there is no held-out conversation, and to compare chat templates."""


def write_reference(
    *, base: Path, model: Path, tokens: Path | None, output: Path, emit: Emit
) -> Metrics:
    """Asks the trained model and writes what it says to the file `output`.

    `tokens` is the folder of an output of tokenize; without it, or without a held-out row in it,
    neutral texts are asked. In float32 where that fits into memory: what is measured later is then
    the export's rounding alone.
    """
    tokenizer = load.tokenizer(base)
    asked = golden(tokens, tokenizer)
    device = load.device()
    dtype = precision(base, device)
    tuned, is_adapter = adapter.tuned(base, model, dtype=dtype, device=device)
    tuned.train(False)
    ends = generate.end_ids(tuned, tokenizer)
    turn_ends = _turn_ends(tokenizer, asked.control)
    tell(emit, 0, len(asked.prompts) + len(asked.texts), "the trained model")
    replies = _replies(tuned, asked.prompts, ends | turn_ends)
    # The end of a reply is asked behind the reference's own words, so that an export which
    # puts it in other words is asked the same.
    own = tuple(
        Text((*prompt, *reply.ids), (len(prompt) + len(reply.ids) - 1,))
        for prompt, reply in zip(asked.prompts, replies, strict=True)
        if reply.ended
    )
    asked = replace(asked, texts=asked.texts + own)
    likeliest, logprobs, rest = [], [], []
    for done, text in enumerate(asked.texts, len(asked.prompts)):
        tell(emit, done, len(asked.prompts) + len(asked.texts), "the trained model")
        found = _log_likelihoods(tuned, text)  # (places, V)
        best = found.topk(min(LIKELIEST, found.shape[-1]))
        likeliest.append(best.indices.int().cpu().numpy())
        logprobs.append(best.values.float().cpu().numpy())
        rest.append((1 - best.values.exp().sum(-1)).clamp(min=0).float().cpu().numpy())
    del tuned
    _freed()
    reference = Reference(
        asked,
        np.concatenate(likeliest),
        np.concatenate(logprobs),
        np.concatenate(rest),
        tuple(replies),
        ends,
        turn_ends,
        dtype,
        device,
    )
    if not np.isfinite(reference.logprobs).all():
        raise RunnerError(
            f"{model}: the trained model gives probabilities that are not numbers",
            hint="the training diverged: train again with a lower learning_rate",
        )
    write(reference, output)
    if (unnamed := turn_ends - ends) and asked.chats:
        names = ", ".join(repr(tokenizer.decode([id])) for id in sorted(unnamed))
        said = (
            f"the base model's files do not say that {names} ends a reply, as its chat template "
            "does; some programs will not stop there: name it as eos_token_id in "
            "generation_config.json"
        )
        emit({"event": "warning", "text": said})
    return {
        "positions": len(reference.rest),
        "replies": len(replies),
        "ended_replies": sum(reply.ended for reply in replies),
        "reference_stops": sum(ends_at(reference, ends | turn_ends)),
        "precision": dtype,
        "trained": "adapter" if is_adapter else "model",
    }


def check_folder(folder: Path, reference: Path, *, emit: Emit) -> Parity:
    """A merged model, opened by transformers, beside the reference."""
    wanted = read(reference)
    tokenizer = load.tokenizer(folder)
    device = load.device()
    dtype = wanted.dtype if device == wanted.device else precision(folder, device)
    model = load.causal_lm(folder, dtype=dtype, device=device)
    model.train(False)
    ends = generate.end_ids(model, tokenizer)
    steps = len(wanted.golden.prompts) + len(wanted.golden.texts)
    tell(emit, 0, steps, "the merged model")
    replies = _replies(model, wanted.golden.prompts, wanted.ends | wanted.turn_ends)
    seen: list[Seen] = []
    for done, text in enumerate(wanted.golden.texts, len(wanted.golden.prompts)):
        tell(emit, done, steps, "the merged model")
        found = _log_likelihoods(model, text).cpu()  # (places, V)
        for one in found:
            ids = wanted.likeliest[len(seen)]
            best = int(one.argmax())
            inside = torch.from_numpy(ids.astype(np.int64)).clamp(max=len(one) - 1)
            logprobs = one[inside].numpy().astype(np.float64)
            seen.append(Seen(best, ids, logprobs, best in ends))
    del model
    _freed()

    def opened(chat: Chat) -> tuple[str, Sequence[int]]:
        ids = template.prompt(tokenizer, chat.messages)
        return _decoded(tokenizer, ids), ids

    return compared(
        wanted,
        seen,
        replies,
        stopping=wanted.ends,
        words=words_of(wanted.golden, lambda text: _encoded(tokenizer, text), opened),
    )


def golden(tokens: Path | None, tokenizer: PreTrainedTokenizerBase) -> Golden:
    """What is asked: the same of the same tokens. Held-out rows, the short ones first and of these
    any; where they are too few, neutral texts and questions beside them."""
    chat_template: Any = tokenizer.chat_template
    has_chat = isinstance(chat_template, str) and bool(chat_template)
    control = frozenset(control_tokens.of(tokenizer, chat_template if has_chat else ""))
    turn_ends = _turn_ends(tokenizer, control)
    texts: list[Text] = []
    prompts: list[tuple[int, ...]] = []
    for row in _chosen(tokens):
        trained = np.flatnonzero(row.weights)
        start = int(trained[0]) if len(trained) else len(row.input_ids)
        ids = row.input_ids[:TEXT_TOKENS].tolist()
        inside = trained[trained < len(ids)]
        places = inside if len(inside) else np.arange(len(ids) // 2, len(ids))
        ends = [place for place in inside.tolist() if ids[place] in turn_ends]
        texts.append(Text(tuple(ids), _evenly(places[places > 0], ends)))
        if 0 < start <= PROMPT_TOKENS and len(prompts) < PROMPTS:
            prompts.append(tuple(row.input_ids[:start].tolist()))
    for piece in _neutral(TEXTS - len(texts)):
        ids = list(tokenizer(piece)["input_ids"])[:TEXT_TOKENS]
        texts.append(Text(tuple(ids), _evenly(np.arange(1, len(ids)), ())))
    chats = tuple(_chats(tokenizer)) if has_chat else ()
    prompts += [chat.ids for chat in chats[: PROMPTS - len(prompts)]]
    if not prompts:
        prompts = [text.ids[: max(1, len(text.ids) // 2)] for text in texts[:PROMPTS]]
    # A template that writes the day of today gives other text tomorrow.
    dated = has_chat and "strftime_now" in chat_template
    return Golden(
        tuple(text for text in texts if text.places),
        tuple(prompts),
        () if dated else chats,
        tuple(_plains(tokenizer, texts)),
        control,
        str(tokenizer.bos_token or ""),
    )


def _chosen(tokens: Path | None) -> list[Row]:
    path = tokens / "eval.arrow" if tokens else None
    if not path or not path.is_file():
        return []
    rows = rows_of.read(path)
    lengths = rows.lengths
    names = rows.conversations
    ranked = sorted(
        range(len(rows)),
        key=lambda place: (
            lengths[place] > TEXT_TOKENS,
            hashlib.sha256(f"{names[place]} {place}".encode()).digest(),
        ),
    )
    some: list[Row] = [rows[place] for place in ranked[: 8 * TEXTS]]
    # First those in which the trained replies begin soon; the sort keeps the order otherwise.
    some.sort(key=lambda row: bool(np.flatnonzero(row.weights)[:1] > TEXT_TOKENS // 2))
    return some[:TEXTS]


def _evenly(places: npt.NDArray[np.int64], always: Sequence[int]) -> tuple[int, ...]:
    """At most `PLACES` of them, the first and the last among these; and those in `always`."""
    if len(places) > PLACES:
        places = places[np.linspace(0, len(places) - 1, PLACES).round().astype(int)]
    return tuple(sorted({*places.tolist(), *always}))


def _neutral(most: int) -> list[str]:
    """Paragraphs of the neutral texts, in turn."""
    pieces = [
        [piece.strip() for piece in path.read_text(encoding="utf-8").split("\n\n")]
        for path in measure.NEUTRAL.values()
    ]
    turns = [piece for turn in zip(*pieces, strict=False) for piece in turn if piece]
    return turns[: max(0, most)]


def _chats(tokenizer: PreTrainedTokenizerBase) -> Iterator[Chat]:
    for question in QUESTIONS:
        messages = ({"role": "user", "content": question},)
        try:
            ids = template.prompt(tokenizer, messages)
        except template.Refused:
            continue
        yield Chat(messages, _decoded(tokenizer, ids), tuple(ids))


def _plains(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The texts whose ids the tokenizer itself makes of their text."""
    for text in texts:
        words = _decoded(tokenizer, text.ids)
        if tuple(_encoded(tokenizer, words)) == text.ids:
            yield words, text.ids


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _turn_ends(tokenizer: PreTrainedTokenizerBase, control: frozenset[int]) -> frozenset[int]:
    """The control token that the chat template puts behind a reply."""
    if not tokenizer.chat_template:
        return frozenset()
    messages = [{"role": "user", "content": "Yes?"}, {"role": "assistant", "content": "Yes."}]
    try:
        found = template.encode(tokenizer, messages)
    except template.Refused:
        return frozenset()
    last = {found.ids[reply.stop - 1] for reply in found.replies}
    return frozenset(last & control)


def precision(folder: Path, device: str) -> Dtype:
    """float32, where the weights take no more than 0.6 of the memory in it."""
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[adapter.stored_dtype(folder)]
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if device == "cuda":
        memory = int(torch.cuda.get_device_properties(0).total_memory)
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        memory = 16 << 30
    return "float32" if stored / size * 4 < 0.6 * memory else sft.precision_of(device)


@torch.inference_mode()
def _log_likelihoods(model: nn.Module, text: Text) -> Tensor:
    """(places, V), in float64."""
    device = next(model.parameters()).device
    ids = torch.tensor([text.ids[: text.places[-1]]], device=device)
    kept = torch.tensor(text.places, device=device) - 1
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0]
    return logits.to("cpu", torch.float64).log_softmax(-1)


def _replies(
    model: nn.Module, prompts: Sequence[Sequence[int]], ends: frozenset[int]
) -> list[Reply]:
    said = generate.greedy(model, [list(prompt) for prompt in prompts], ends, REPLY_TOKENS)
    return [Reply(tuple(ids), bool(ids) and ids[-1] in ends) for ids in said]


def _freed() -> None:
    """The weights are gone before llama.cpp comes: both at once may be more than the memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
