"""Proves that an export is the model that was trained: its next tokens, its replies and its ends.

The trained model is asked once (`reference`): what it holds likely at some places of the held-out
conversations, how it replies, and where it ends. Each export is then asked the same, a GGUF file by
llama.cpp as the people who get it will open it. Both models read the same ids; that llama.cpp makes
these ids of the same text, and the same prompt by the chat template in the file, is a comparison of
its own. No torch here: a process that quantises and checks starts at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from runner import disk
from runner.errors import PreconditionError, RunnerError
from runner.model.llama import Llama

Emit = Callable[[dict[str, Any]], None]
Metrics = dict[str, float | int | str]
REPLY_TOKENS = 64
LIKELIEST = 1000
"""Next tokens at a place whose probabilities are compared one by one; the others are compared as
one. They hold more than 0.97 of it all."""

SAME_BEST_NATS = 0.05
"""A choice that the reference holds nearly as likely as its own best is the same choice."""
SURE = 0.5
"""How likely the end has to be for the reference, to count as a place where it ends."""


@dataclass(frozen=True)
class Limits:
    """What a level may lose."""

    mean_kl: float
    """Nats."""
    top1: float
    stops: float
    """The share of the reference's ends."""


# Measured by `python -m tests.benchmarks.parity`, 4 to 12 steps of LoRA on the quickstart, about
# 125 places, mean KL (share of the same likeliest tokens):
#
#             SmolLM2-135M    Gemma-3-270M
#    merged   0.0088 (0.969)  0.0003 (0.992)
#    f16      0.0088 (0.969)  0.0003 (0.992)
#    q8_0     0.0130 (0.911)  0.0179 (0.886)
#    q6_k     0.0170 (0.919)  0.0375 (0.821)
#    q5_k_m   0.1183 (0.839)  0.0489 (0.829)
#    q5_k_s   -               0.0530 (0.870)
#    q4_k_m   0.0848 (0.815)  0.1098 (0.764)
#    q4_k_s   -               0.0833 (0.829)
#    q4_0     0.3164 (0.710)  1.3074 (0.309)
#    iq4_xs   0.2373 (0.677)  -
#    q3_k_m   0.1805 (0.742)  -
#    q2_k     0.4727 (0.573)  -
#
# (the worst of two runs; the bases were 4-bit GGUF files). A limit is about four times the worst,
# twice for q4_0, and a guess from its neighbours for a level without a figure, or with one alone:
# smaller models lose more than larger ones, and few are smaller than these. The coarse levels would
# let a weak adapter go unmerged; that is for `merged` to find, which they are all made of.
# fmt: off
LIMITS: Mapping[str, Limits] = {
    "merged": Limits(0.05, 0.9, 0.8),
    "f32": Limits(0.05, 0.9, 0.8),
    "f16": Limits(0.05, 0.9, 0.8),
    "bf16": Limits(0.05, 0.9, 0.8),
    "q8_0": Limits(0.08, 0.75, 0.8),
    "q6_k": Limits(0.15, 0.65, 0.8),
    "q5_k_m": Limits(0.5, 0.6, 0.5),
    "q5_k_s": Limits(0.5, 0.6, 0.5),
    "q5_1": Limits(0.5, 0.6, 0.5),
    "q5_0": Limits(0.5, 0.6, 0.5),
    "q4_k_m": Limits(0.6, 0.5, 0.5),
    "q4_k_s": Limits(0.6, 0.5, 0.5),
    "iq4_xs": Limits(1.3, 0.4, 0.5),
    "iq4_nl": Limits(1.3, 0.4, 0.5),
    "q4_1": Limits(1.3, 0.4, 0.5),
    "q4_0": Limits(2.6, 0.15, 0.25),
    "q3_k_l": Limits(2.0, 0.3, 0.25),
    "q3_k_m": Limits(2.0, 0.3, 0.25),
    "q3_k_s": Limits(2.6, 0.2, 0.25),
    "q2_k": Limits(3.0, 0.15, 0.25),
}
# fmt: on


@dataclass(frozen=True)
class Text:
    """Ids that the models read, and after how many of them the next token is compared."""

    ids: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Chat:
    """A conversation with an open reply: as a text, and as ids, by the model's own template."""

    messages: tuple[Mapping[str, str], ...]
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Golden:
    """What reference and exports are asked."""

    texts: tuple[Text, ...]
    prompts: tuple[tuple[int, ...], ...]
    chats: tuple[Chat, ...]
    plains: tuple[tuple[str, tuple[int, ...]], ...]
    """Texts and their ids; control tokens stand in them."""
    control: frozenset[int]
    begin: str
    """The text of the token that some programs put before everything."""


@dataclass(frozen=True)
class Reply:
    """A greedy reply, with the id that ended it."""

    ids: tuple[int, ...]
    ended: bool


@dataclass(frozen=True)
class Reference:
    """What the trained model said; a row of `likeliest` is one place of the texts, in order.

    P places, K likeliest tokens.
    """

    golden: Golden
    likeliest: npt.NDArray[np.int32]  # (P, K), best first
    logprobs: npt.NDArray[np.float32]  # (P, K)
    rest: npt.NDArray[np.float32]  # (P,): how likely all others are
    replies: tuple[Reply, ...]
    ends: frozenset[int]
    """Ids that end a reply, as the model's files say."""
    turn_ends: frozenset[int]
    """The id that the chat template puts behind a reply, and that training teaches."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """The number format in which it was asked."""
    device: str


@dataclass(frozen=True)
class Parity:
    """How much of the trained model there is in an export."""

    mean_kl: float
    """Of reference to export, in nats, over the partition of the reference's likeliest tokens and
    the others."""
    top1: float
    """The share of places with the same likeliest token."""
    positions: int
    same_replies: int
    """Greedy replies that are the same to the last token; rounding alone may part them."""
    same_reply_tokens: float
    """How far the replies are the same, as a share of the reference's tokens."""
    replies: int
    stops: int
    """Of the places where the reference ends its reply, those where the export does."""
    reference_stops: int
    ran_on: int
    """Times that the export wrote the end token and went on: it never stops."""
    cut_short: int
    """Replies that were ended by a token that is text."""
    texts: int
    tokens_differ: int
    """Texts that the export splits into other tokens than the model was trained on."""
    tokens_apart: float
    """The share of their tokens that are others."""
    templates_differ: int
    """Chats that the export's template puts in other words, or behind other control tokens."""
    difference: str = ""
    """The first of these differences, in words."""

    def record(self) -> dict[str, float | int | str]:
        """Plain data, for reports."""
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def check_gguf(gguf: Path, reference: Path, level: str, *, emit: Emit) -> Parity:
    """A GGUF file, opened by llama.cpp, beside the reference; `level` is named in the events."""
    wanted = read(reference)
    asked = wanted.golden
    longest = [len(prompt) + REPLY_TOKENS for prompt in asked.prompts]
    longest += [len(text.ids) for text in asked.texts]
    places = [text.ids[:place] for text in asked.texts for place in text.places]
    replies: dict[int, Reply] = {}
    seen: dict[int, Seen] = {}
    questions = [(ids, True, number) for number, ids in enumerate(asked.prompts)]
    questions += [(ids, False, number) for number, ids in enumerate(places)]
    with Llama(gguf, context=max(longest) + 64) as llama:
        words = words_of(
            asked, llama.tokenised, lambda chat: llama.opened([dict(m) for m in chat.messages])
        )
        # In the order of their ids each question begins as the one before it, and llama.cpp reads
        # what is new alone.
        for done, (ids, is_prompt, number) in enumerate(sorted(questions)):
            tell(emit, done, len(questions), level)
            if is_prompt:
                said = llama.continued(ids, max_tokens=REPLY_TOKENS, likeliest=1)
                replies[number] = Reply(said.ids, said.ended)
                continue
            found = llama.continued(ids, max_tokens=1, likeliest=LIKELIEST)
            if not found.likeliest or not all(map(math.isfinite, found.logprobs)):
                raise RunnerError(
                    f"{gguf}: the model gives probabilities that are not numbers",
                    hint="the file is damaged: export again",
                )
            seen[number] = Seen(
                found.likeliest[0],
                np.array(found.likeliest, np.int32),
                np.array(found.logprobs, np.float64),
                found.ended,
            )
    if words.tokens_differ and words.tokens_apart <= MOST_TOKENS_APART:
        warning = (
            f"{gguf.name}: llama.cpp makes other tokens of {words.tokens_differ} of {words.texts} "
            f"texts than the model was trained on ({words.tokens_apart:.1%}): {words.difference}"
        )
        emit({"event": "warning", "text": warning})
    return compared(
        wanted,
        [seen[number] for number in range(len(places))],
        [replies[number] for number in range(len(asked.prompts))],
        stopping=wanted.ends | wanted.turn_ends,
        words=words,
    )


def require(parity: Parity, level: str) -> None:
    """Raises where an export is not the model that was trained.

    `level` is a GGUF level, or "merged"; one without limits of its own has those of the nearest
    coarser one.
    """
    limits = limits_of(level)
    broken: list[str] = []
    hint = ""
    if not parity.mean_kl <= limits.mean_kl:
        broken.append("its next tokens are likely in another way")
    if parity.top1 < limits.top1:
        broken.append("it would write other tokens")
    if broken:
        hint = (
            "the file is damaged, or made of other weights: export again; if it stays, choose a "
            "finer level (q8_0, say), and report this base model"
        )
    if parity.ran_on or parity.stops < math.floor(parity.reference_stops * limits.stops):
        broken.append("it does not stop where the trained model does")
        hint = hint or (
            "the end-of-turn token of the chat template has to be eos_token in the base model's "
            "tokenizer_config.json, and eos_token_id in its generation_config.json"
        )
    if parity.cut_short:
        broken.append("it stops at a token that is text")
        hint = hint or "correct eos_token_id in the base model's config.json, and export again"
    if parity.templates_differ or parity.tokens_apart > MOST_TOKENS_APART:
        what = "chat template" if parity.templates_differ else "tokenizer"
        broken.append(f"its {what} is not the model's ({parity.difference})")
        hint = hint or (
            "programs would show the model other tokens than it was trained on: take the tokenizer "
            "files and chat_template.jinja that came with the base model"
        )
    if broken:
        raise RunnerError(
            f"{level}: this export is not the model that was trained: {'; '.join(broken)}. "
            f"{_numbers(parity, limits)}",
            hint=hint,
        )


MOST_TOKENS_APART = 0.05
"""The share of tokens that an export may make otherwise of the same text. None is the rule, and
fewer than these are warned of: some tokenizers get a space behind each control token in llama.cpp,
which moves about 2 in 100."""


def limits_of(level: str) -> Limits:
    """The limits of a level, or of the nearest coarser one that has any."""
    if level in LIMITS:
        return LIMITS[level]
    bits = _bits(level)
    coarser = [name for name in LIMITS if name != "merged" and _bits(name) <= bits]
    if coarser:
        return LIMITS[max(coarser, key=_bits)]
    return LIMITS[min((name for name in LIMITS if name != "merged"), key=_bits)]


def _bits(level: str) -> float:
    """Bits of a weight, as the level's name says."""
    digits = "".join(letter for letter in level.partition("_")[0] if letter.isdigit())
    return float(digits or 0)


def _numbers(parity: Parity, limits: Limits) -> str:
    return (
        f"Mean KL {parity.mean_kl:.4g} nats (at most {limits.mean_kl:g}); same likeliest token at "
        f"{parity.top1:.1%} of {parity.positions} places (at least {limits.top1:.0%}); stops "
        f"{parity.stops} of {parity.reference_stops} times (at least "
        f"{math.floor(parity.reference_stops * limits.stops)}), runs on {parity.ran_on} times; "
        f"{parity.same_replies} of {parity.replies} replies are the same, {parity.cut_short} cut "
        f"short; {parity.tokens_differ} of {parity.texts} texts have other tokens "
        f"({parity.tokens_apart:.1%} of them), {parity.templates_differ} another template"
    )


@dataclass(frozen=True)
class Seen:
    """What an export holds likely at a place: some ids, which need not be all of the reference's,
    and whether it ended there."""

    best: int
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float64]
    ended: bool


@dataclass(frozen=True)
class _Words:
    """How an export turns text into ids."""

    texts: int
    tokens_differ: int
    tokens_apart: float
    templates_differ: int
    difference: str


def words_of(
    asked: Golden,
    tokenised: Callable[[str], Sequence[int]],
    opened: Callable[[Chat], tuple[str, Sequence[int]]],
) -> _Words:
    different: list[str] = []
    templates: list[str] = []
    tokens = apart = 0
    pairs = [(ids, tuple(tokenised(text))) for text, ids in asked.plains]
    for chat in asked.chats:
        try:
            text, found = opened(chat)
        except RunnerError as error:
            templates.append(f"it refuses {chat.messages[-1]['content']!r}: {error.message}")
            continue
        pairs.append((chat.ids, tuple(found)))
        steering = [[id for id in ids if id in asked.control] for ids in (chat.ids, found)]
        if _bare(text, asked.begin) != _bare(chat.text, asked.begin) or steering[0] != steering[1]:
            templates.append(f"a chat is {text!r} there, {chat.text!r} in the trained model")
    for ours, theirs in pairs:
        tokens += len(ours)
        if ours == theirs:
            continue
        same = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
        apart += max(len(ours), len(theirs)) - sum(block.size for block in same)
        at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
        different.append(
            f"token {at} of a text is {theirs[at : at + 1]} there, {ours[at : at + 1]} in the "
            "trained model"
        )
    return _Words(
        len(asked.plains) + len(asked.chats),
        len(different),
        apart / max(1, tokens),
        len(templates),
        (templates + different + [""])[0],
    )


def _bare(text: str, begin: str) -> str:
    """A text without spaces and without what some programs put before it."""
    return "".join(text.removeprefix(begin).split())


def compared(
    wanted: Reference,
    seen: Sequence[Seen],
    replies: Sequence[Reply],
    *,
    stopping: frozenset[int],
    words: _Words,
) -> Parity:
    """`stopping` are the ids at which an export has to stop."""
    ended = ends_at(wanted, stopping)
    divergence = agreed = 0.0
    for place, own in enumerate(seen):
        divergence += _divergence(
            wanted.likeliest[place], wanted.logprobs[place], float(wanted.rest[place]), own
        )
        near = wanted.likeliest[place][
            wanted.logprobs[place] >= wanted.logprobs[place][0] - SAME_BEST_NATS
        ]
        agreed += own.best in near
    ran_on = sum(own.best in stopping and not own.ended for own in seen)
    ran_on += sum(
        bool(stopping.intersection(reply.ids[: -1 if reply.ended else None])) for reply in replies
    )
    known = stopping | wanted.golden.control | wanted.ends
    pairs = list(zip(wanted.replies, replies, strict=True))
    tokens = sum(len(ours.ids) for ours, _ in pairs)
    return Parity(
        mean_kl=divergence / len(seen),
        top1=agreed / len(seen),
        positions=len(seen),
        same_replies=sum(ours.ids == theirs.ids for ours, theirs in pairs),
        same_reply_tokens=sum(_shared(a.ids, b.ids) for a, b in pairs) / max(1, tokens),
        replies=len(replies),
        stops=sum(ends and own.ended for ends, own in zip(ended, seen, strict=True)),
        reference_stops=sum(ended),
        ran_on=ran_on,
        cut_short=sum(
            reply.ended and bool(reply.ids) and reply.ids[-1] not in known for reply in replies
        ),
        **{field.name: getattr(words, field.name) for field in fields(words)},
    )


def ends_at(reference: Reference, stopping: frozenset[int]) -> list[bool]:
    """For each place, whether the reference surely ends there."""
    best = zip(reference.likeliest[:, 0].tolist(), reference.logprobs[:, 0].tolist(), strict=True)
    return [id in stopping and logprob > math.log(SURE) for id, logprob in best]


def _shared(ours: Sequence[int], theirs: Sequence[int]) -> int:
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


_LEAST = 1e-7
"""Below it a sum of float32 probabilities is rounding."""


def _divergence(
    ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32], rest: float, seen: Seen
) -> float:
    """KL(reference || export) in nats, over: each id that both list, those that the reference
    alone lists, and all others. Of the second the export says only that each is less likely than
    the last in its list; they are taken to be as likely as that allows, so that what is found is
    never too much."""
    _, ours, theirs = np.intersect1d(ids, seen.ids, assume_unique=True, return_indices=True)
    p, q = np.exp(logprobs.astype(np.float64)), np.exp(seen.logprobs)
    both = p[ours] @ (logprobs[ours].astype(np.float64) - seen.logprobs[theirs])
    unlisted = max(1 - float(q.sum()), _LEAST)
    missing = len(ids) - len(ours)
    q_missing = min(missing * float(q.min()), unlisted) if missing else 0.0
    q_rest = 1 - float(q[theirs].sum()) - q_missing
    p_missing = float(p.sum() - p[ours].sum())
    both += _part(p_missing, q_missing) + _part(rest, q_rest)
    return max(0.0, float(both))


def _part(p: float, q: float) -> float:
    return p * math.log(p / max(q, _LEAST)) if p > _LEAST else 0.0


def read(path: Path) -> Reference:
    """What `write_reference` wrote."""
    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {})["reference"])
            arrays = {name: file.get_tensor(name) for name in ("likeliest", "logprobs", "rest")}
        asked = facts["golden"]
        return Reference(
            Golden(
                tuple(Text(tuple(ids), tuple(places)) for ids, places in asked["texts"]),
                tuple(map(tuple, asked["prompts"])),
                tuple(Chat(tuple(m), text, tuple(ids)) for m, text, ids in asked["chats"]),
                tuple((text, tuple(ids)) for text, ids in asked["plains"]),
                frozenset(asked["control"]),
                asked["begin"],
            ),
            **arrays,
            replies=tuple(Reply(tuple(ids), ended) for ids, ended in facts["replies"]),
            ends=frozenset(facts["ends"]),
            turn_ends=frozenset(facts["turn_ends"]),
            dtype=facts["dtype"],
            device=facts["device"],
        )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise PreconditionError(
            f"{path}: is not what the trained model said ({type(error).__name__}: {error})",
            hint="delete it and run again; it is made of the trained model",
        ) from error


def write(reference: Reference, output: Path) -> None:
    asked = reference.golden
    facts = {
        "golden": {
            "texts": [(text.ids, text.places) for text in asked.texts],
            "prompts": asked.prompts,
            "chats": [(chat.messages, chat.text, chat.ids) for chat in asked.chats],
            "plains": asked.plains,
            "control": sorted(asked.control),
            "begin": asked.begin,
        },
        "replies": [(reply.ids, reply.ended) for reply in reference.replies],
        "ends": sorted(reference.ends),
        "turn_ends": sorted(reference.turn_ends),
        "dtype": reference.dtype,
        "device": reference.device,
    }
    arrays = {name: getattr(reference, name) for name in ("likeliest", "logprobs", "rest")}
    with disk.being_written(output) as unfinished:
        save_file(arrays, unfinished, metadata={"reference": json.dumps(facts)})


def tell(emit: Emit, done: int, total: int, what: str) -> None:
    unit = f"questions to {what}"
    emit({"event": "progress", "done": done, "total": total, "unit": unit})
