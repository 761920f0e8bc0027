"""From messages to token ids, with the exact tokens of each reply that carry loss.

The chat template is rendered once per pattern of roles with a marker in place of each content, and
cut at the markers into literals (what the template writes) and slots (where contents go). Literals
are encoded with control tokens, contents without, so `<|im_start|>` typed by a person stays text,
and the loss is taken from the same cuts, never by searching text. The price: the template is also
rendered with the real contents, to prove that cutting and joining gives the very same text.
A reply is what the model writes after its generation prompt: its content, and its end of turn.

A template is a program by somebody else. It runs in jinja's sandbox, with limits on its time, its
memory and what it writes, so that none can hang or flood the machine.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import jinja2
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from runner.errors import RunnerError

if sys.platform != "win32":
    import resource

Message = Mapping[str, str]
Ids = tuple[int, ...]
Array = npt.NDArray[np.int32]
Trim = Literal["keep", "newlines", "space"]

BATCH_CHARS = 4_000_000
"""Characters of different contents that go through the Rust tokenizer in one call."""
_STEPS_AT_AN_END = 32

RENDER_S = 1.0
"""Seconds of computing that one rendering may take."""
RENDER_CHARS = 4_000_000
"""Characters that a template may write beside the contents."""
RENDER_BYTES = 2**28
"""Memory that one rendering may take, beside what the contents need."""


class Refused(RunnerError):
    """The template cannot say these messages; others may be fine."""


@dataclass(frozen=True)
class Reply:
    """Tokens `start` to `stop` (half open) of one assistant message: all the model has to write."""

    start: int
    stop: int


@dataclass(frozen=True)
class Encoding:
    """The ids of a conversation, and one `Reply` per assistant message, in order."""

    ids: list[int]
    replies: tuple[Reply, ...]
    system_folded: bool = False
    """The template knows no system message, so its text stands before the first user message."""


def encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Encoding:
    """One conversation; many are faster through `encode_all`."""
    return encoder(tokenizer).encode_together([messages])[0]


def encode_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Iterable[Sequence[Message]]
) -> Iterator[Encoding]:
    """Each conversation in order, many at a time through all threads of the Rust tokenizer."""
    own = encoder(tokenizer)
    batch: list[Sequence[Message]] = []
    chars = 0
    for messages in conversations:
        batch.append(messages)
        chars += sum(len(message["content"]) for message in messages)
        if chars >= BATCH_CHARS:
            yield from own.encode_together(batch)
            batch, chars = [], 0
    yield from own.encode_together(batch)


def prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The ids to generate a reply from: they end where the assistant's turn is open."""
    own = encoder(tokenizer)
    plan = own.plan(messages, opened=True)
    return own.joined(plan, own.tokenised(plan.texts)).ids


def is_prefix_stable(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> bool:
    """Whether each reply has the same tokens before it as if the conversation ended with it.

    Only then can the replies of a conversation be learned in one pass. Templates in the manner of
    Qwen3, which treat the last turn differently from the ones before, are not stable.
    """
    own = encoder(tokenizer)
    return own.is_stable(own.plan(messages))


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The encoder of this tokenizer, built once as long as its template and vocabulary stay."""
    if not tokenizer.chat_template:
        raise RunnerError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat "
            "template",
            hint="take the instruct variant of the model, or put a chat_template.jinja beside its "
            "tokenizer files",
        )
    return _encoder(tokenizer, tokenizer.get_chat_template(), vocabulary=len(tokenizer))


@dataclass(frozen=True)
class _Slot:
    """Where the template puts a content (`part` 0), or its thought (1) and its answer (2)."""

    message: int
    part: int
    left: Trim
    right: Trim
    space: str
    """A space that the template writes right before: words are tokens together with theirs."""


@dataclass(frozen=True)
class _Span:
    """A reply in terms of slots: the tokens of the literals around them that belong to it."""

    first_slot: int
    last_slot: int
    opening: int
    closing: int


@dataclass(frozen=True)
class _Skeleton:
    """A rendering without its contents: literal, slot, literal, …, slot, literal."""

    shape: tuple[str, ...]
    literals: tuple[str, ...]
    slots: tuple[_Slot, ...]
    ids: tuple[Array, ...]
    spans: tuple[_Span, ...]


@dataclass(frozen=True)
class Plan:
    """What to encode of a conversation: literals by the skeleton, and these texts in its slots."""

    skeleton: _Skeleton
    texts: tuple[str, ...]
    system_folded: bool


class Encoder:
    """A tokenizer with its chat template; skeletons and literals are kept as they are met."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise RunnerError(
                f"{type(tokenizer).__name__} has no Rust tokenizer behind it",
                hint="the base model needs a tokenizer.json",
            )
        self._tokenizer = tokenizer
        self._template = _compiled(chat_template)
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._control = {
            id: token.content
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.special or _is_marker(token.content, chat_template)
        }
        self._is_control = np.zeros(max(len(tokenizer), *self._control, 0) + 1, bool)
        self._is_control[list(self._control)] = True
        self._plain, self._prefixes = _without_control(backend, frozenset(self._control.values()))
        self._skeletons: dict[tuple[tuple[str, ...], bool], _Skeleton | str] = {}
        self._literals: dict[tuple[str, bool], Ids] = {}
        self._openings: dict[str, str] = {}
        self._stable: dict[tuple[int, tuple[str, ...]], bool] = {}
        self._closes: bool | None = None

    def encode_together(self, conversations: Sequence[Sequence[Message]]) -> list[Encoding]:
        """Each conversation, in one call of the Rust tokenizer; equal contents are encoded once."""
        plans = [self.plan(messages) for messages in conversations]
        known = self.tokenised(text for plan in plans for text in plan.texts)
        return [self.joined(plan, known) for plan in plans]

    def plan(self, messages: Sequence[Message], *, opened: bool = False) -> Plan:
        """The cuts of a conversation; `opened` ends it with the generation prompt."""
        shown, folded = self._accepted(messages, opened)
        try:
            rendered = self._rendered(shown, opened)
        except jinja2.TemplateError as error:
            raise _refuses(shown, str(error)) from error
        for thoughts in (False, True):
            shape = _shape(shown, thoughts)
            if thoughts and shape == _shape(shown, False):
                break
            skeleton = self._skeleton(shape, opened)
            if isinstance(skeleton, str):
                break
            texts = tuple(_text(shown[slot.message]["content"], slot) for slot in skeleton.slots)
            if _interleaved(skeleton.literals, texts) == rendered:
                return Plan(skeleton, texts, folded)
        raise _rewrites(shown, rendered)

    def tokenised(self, texts: Iterable[str]) -> dict[str, Array]:
        """The ids of each different text, with no control token among them."""
        different = list(dict.fromkeys(texts))
        encoded = self._plain.encode_batch_fast(different, add_special_tokens=False)
        known = {
            text: np.array(found.ids, np.int32)
            for text, found in zip(different, encoded, strict=True)
        }
        for text, ids in known.items():
            if self._is_control[ids].any():
                name = self._control[int(ids[self._is_control[ids]][0])]
                raise RunnerError(
                    f"the tokenizer makes the control token {name!r} out of plain text: "
                    f"{_excerpt(text)}",
                    hint="remove that text from the data, or use another base model",
                )
        return known

    def joined(self, plan: Plan, known: Mapping[str, Array]) -> Encoding:
        """The ids of a planned conversation, from the ids of its texts."""
        ids, replies = self.joined_array(plan, known)
        return Encoding(ids.tolist(), replies, plan.system_folded)

    def joined_array(
        self, plan: Plan, known: Mapping[str, Array]
    ) -> tuple[Array, tuple[Reply, ...]]:
        """`joined` for many: the ids as an array, and the replies."""
        skeleton = plan.skeleton
        pieces = [skeleton.ids[0]]
        starts: list[int] = []
        stops: list[int] = []
        length = len(skeleton.ids[0])
        for text, literal in zip(plan.texts, skeleton.ids[1:], strict=True):
            ids = known[text]
            starts.append(length)
            length += len(ids)
            stops.append(length)
            length += len(literal)
            pieces += (ids, literal)
        replies = tuple(
            Reply(starts[span.first_slot] - span.opening, stops[span.last_slot] + span.closing)
            for span in skeleton.spans
        )
        return np.concatenate(pieces), replies

    def is_stable(self, plan: Plan) -> bool:
        """See `is_prefix_stable`. Steps from reply to reply, and remembers each step.

        Templates look at the first and the last turns, so of a very long conversation only the
        steps at both ends are taken; all of them would take the square of its length.
        """
        shape = plan.skeleton.shape
        ends = [index + 1 for index, name in enumerate(shape) if _is_reply(name)]
        if ends and ends[-1] != len(shape):
            ends.append(len(shape))
        if len(ends) > 2 * _STEPS_AT_AN_END:
            ends = ends[:_STEPS_AT_AN_END] + ends[-_STEPS_AT_AN_END:]
        return all(
            self._steps_stably(shape[:shorter], shape[:longer])
            for shorter, longer in pairwise(ends)
        )

    def _steps_stably(self, shorter: tuple[str, ...], longer: tuple[str, ...]) -> bool:
        key = (len(shorter), longer)
        if key not in self._stable:
            try:
                self._stable[key] = all(self._begins(shorter, longer, pad) for pad in ("", _PAD))
            except jinja2.TemplateError:
                self._stable[key] = False
        return self._stable[key]

    def _begins(self, shorter: tuple[str, ...], longer: tuple[str, ...], pad: str) -> bool:
        """Whether the longer rendering starts as the shorter one, to the end of its last turn."""
        before, places = _split(self._rendered(_marked(shorter, pad), False))
        after, later_places = _split(self._rendered(_marked(longer, pad), False))
        last = len(places)
        if places != later_places[:last] or before[:last] != after[:last]:
            return False
        return self._closing(before[last]) == self._closing(after[last])

    def _closing(self, literal: str) -> Ids:
        """What belongs to the reply that the literal follows: up to its first control token."""
        ids = self._literal(literal, at_start=False)
        return ids[: next((n for n, id in enumerate(ids, 1) if id in self._control), 0)]

    def _accepted(
        self, messages: Sequence[Message], opened: bool
    ) -> tuple[Sequence[Message], bool]:
        """The messages as the template takes them, and whether the system message was folded."""
        skeleton = self._skeleton(_shape(messages, False), opened)
        if isinstance(skeleton, _Skeleton):
            return messages, False
        folded = _folded(messages)
        if folded and isinstance(self._skeleton(_shape(folded, False), opened), _Skeleton):
            return folded, True
        raise _refuses(messages, skeleton)

    def _skeleton(self, shape: tuple[str, ...], opened: bool) -> _Skeleton | str:
        """The rendering of this pattern of roles, or why the template refuses it."""
        key = (shape, opened)
        if key not in self._skeletons:
            try:
                self._skeletons[key] = self._cut(shape, opened)
            except jinja2.TemplateError as error:
                self._skeletons[key] = str(error) or type(error).__name__
        return self._skeletons[key]

    def _cut(self, shape: tuple[str, ...], opened: bool) -> _Skeleton:
        literals, places = _split(self._rendered(_marked(shape, ""), opened))
        _check_places(places, shape)
        padded, padded_places = _split(self._rendered(_marked(shape, _PAD), opened))
        trims = _trims(literals, padded) if padded_places == places else {}
        slots = tuple(
            _Slot(
                message,
                part,
                *trims.get(place, ("keep", "keep")),
                " " if literals[place].endswith(" ") else "",
            )
            for place, (message, part) in enumerate(places)
        )
        literals = [
            literal.removesuffix(slot.space) for literal, slot in zip(literals, slots, strict=False)
        ] + literals[-1:]
        ids: list[Ids] = []
        openings: list[int] = []
        for place, literal in enumerate(literals):
            role = _role(shape[slots[place].message]) if place < len(slots) else ""
            before = _role(shape[slots[place - 1].message]) if place else ""
            header = len(literal)
            if role == "assistant" and before not in ("", "assistant"):
                opening = self._opening(before)
                header = len(opening) if opening and literal.startswith(opening) else header
            elif opened and place == len(slots):
                header -= literal.endswith(" ")
            head = self._literal(literal[:header], at_start=place == 0)
            extra = self._literal(literal[header:], at_start=False) if role else ()
            ids.append(head + extra)
            openings.append(len(extra))
        ids[0] = self._with_one_bos(ids[0])
        spans = self._spans(shape, slots, literals, openings, opened)
        arrays = tuple(np.array(literal, np.int32) for literal in ids)
        return _Skeleton(shape, tuple(literals), slots, arrays, spans)

    def _spans(
        self,
        shape: tuple[str, ...],
        slots: Sequence[_Slot],
        literals: Sequence[str],
        openings: Sequence[int],
        opened: bool,
    ) -> tuple[_Span, ...]:
        spans: list[_Span] = []
        places: dict[int, list[int]] = defaultdict(list)
        for place, slot in enumerate(slots):
            places[slot.message].append(place)
        for index, name in enumerate(shape):
            if not _is_reply(name):
                continue
            own = places[index]
            closing = len(self._closing(literals[own[-1] + 1]))
            if not opened and not (closing and self._closes_turns()):
                raise RunnerError(
                    "the chat template writes no end of turn after a reply, so the model would "
                    "never learn to stop",
                    hint="use a template that closes each reply with a control token, such as "
                    "<|im_end|>",
                )
            spans.append(_Span(own[0], own[-1], openings[own[0]], closing))
        return tuple(spans)

    def _closes_turns(self) -> bool:
        """Whether a control token stands after a last reply, where no next turn can begin with it.

        Earlier replies may end in another one (gpt-oss), and then the template is not stable.
        """
        if self._closes is None:
            literals, _ = _split(self._rendered(_marked(("user", "assistant"), ""), False))
            self._closes = bool(self._closing(literals[-1]))
        return self._closes

    def _opening(self, role: str) -> str:
        """What the template writes between a message of this role and the words of the model.

        What it writes beyond that before a reply, such as the empty thought of Qwen3, the model
        has to write itself.
        """
        if role not in self._openings:
            before = {"tool": ("user", "assistant", "tool")}.get(role, (role,))
            try:
                literals, _ = _split(self._rendered(_marked(before, ""), True))
                self._openings[role] = literals[-1].removesuffix(" ")
            except jinja2.TemplateError:
                self._openings[role] = ""
        return self._openings[role]

    def _literal(self, text: str, *, at_start: bool) -> Ids:
        key = (text, at_start)
        if key not in self._literals:
            # SentencePiece tokenizers write a space before what they take for the start of a text;
            # behind a line break they do not, and a line break is never joined to a control token.
            anchor = self._encoded("\n") if self._prefixes and not at_start and text else []
            anchored = self._encoded("\n" + text) if anchor else []
            apart = bool(anchor) and anchored[: len(anchor)] == anchor
            ids = anchored[len(anchor) :] if apart else self._encoded(text)
            self._literals[key] = tuple(ids)
        return self._literals[key]

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=False, verbose=False
        )
        return ids

    def _with_one_bos(self, ids: Ids) -> Ids:
        bos = self._tokenizer.bos_token_id
        if bos is None:
            return ids
        if ids[:2] == (bos, bos):
            raise RunnerError(
                f"the chat template writes {self._tokenizer.bos_token!r} twice at the start",
                hint="take one of them out of the template",
            )
        if ids[:1] != (bos,) and self._tokenizer.encode("", add_special_tokens=True)[:1] == [bos]:
            return (bos, *ids)
        return ids

    def _rendered(self, messages: Sequence[Message], opened: bool) -> str:
        chars = sum(len(message["content"]) for message in messages)
        with _limited(chars):
            text: str = self._template.render(
                messages=[{"role": m["role"], "content": m["content"]} for m in messages],
                tools=None,
                documents=None,
                add_generation_prompt=opened,
                strftime_now=_fixed_day,
                **self._special_tokens,
            )
        if len(text) - chars > RENDER_CHARS:
            raise _beyond(f"writes {len(text) - chars:,} characters beside the contents")
        return text


@lru_cache(maxsize=4)
def _encoder(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    vocabulary: int,
) -> Encoder:
    """`vocabulary`, its size, only tells when tokens were added to it."""
    return Encoder(tokenizer, chat_template)


def _fixed_day(form: str) -> str:
    """The day that Llama's templates fall back to; with today's, no run could be repeated."""
    return datetime(2024, 7, 26).strftime(form)


class _OutOfTime(BaseException):
    """Not an Exception, so that nothing between the alarm and `_limited` takes it for its own."""


@contextmanager
def _limited(chars: int) -> Iterator[None]:
    """Ends a rendering that takes too much time or memory, and names what breaks inside it.

    A timer of the process and not a child: each rendering has to be watched, since a template can
    wait for a certain content, and a child for each would cost more than all of the encoding.
    Python runs signal handlers between its instructions and inside long arithmetic and searches,
    and the one thing that can keep it longer, a large allocation, is what the limit on memory
    forbids. The price: both hold in the main thread alone, where stages run; the timer not on
    Windows, and the limit on memory only on Linux. What counts is the thread's own computing and
    not the time on the wall, so that a busy or sleeping machine breaks nothing.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        with _named():
            yield
        return
    started = time.thread_time()

    def look(*_: object) -> None:
        if time.thread_time() - started > RENDER_S:
            raise _OutOfTime

    before = signal.signal(signal.SIGALRM, look)
    timer = signal.getitimer(signal.ITIMER_REAL)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if sys.platform == "linux":
            most = _address_space() + RENDER_BYTES + 32 * chars
            bounds = [bound for bound in limits if bound != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min([most, *bounds]), limits[1]))
        signal.setitimer(signal.ITIMER_REAL, RENDER_S, RENDER_S / 10)
        with _named():
            yield
    except _OutOfTime:
        raise _beyond(f"takes more than {RENDER_S:g} s for one conversation") from None
    except MemoryError:
        raise _beyond(f"takes more than {RENDER_BYTES // 2**20} MB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, *timer)


@contextmanager
def _named() -> Iterator[None]:
    """Whatever goes wrong inside a template is an error of the template."""
    try:
        yield
    except (jinja2.TemplateError, MemoryError):
        raise
    except Exception as error:
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error


def _address_space() -> int:
    """Bytes of memory that the process has mapped."""
    pages = int(os.pread(_own_memory(), 64, 0).split()[0])
    return pages * resource.getpagesize()


@lru_cache(maxsize=1)
def _own_memory() -> int:
    return os.open("/proc/self/statm", os.O_RDONLY)


def _beyond(what: str) -> RunnerError:
    return RunnerError(
        f"the chat template {what}",
        hint="no honest template does; do not trust this model, or use another template",
    )


def _compiled(chat_template: str) -> jinja2.Template:
    """In jinja's immutable sandbox. Compiling is limited too: it computes what is constant."""
    try:
        with _limited(len(chat_template)):
            template: jinja2.Template = _compile_jinja_template(chat_template)
            return template
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f" at line {line}" if line else ""
        raise RunnerError(
            f"the chat template cannot be read{where}: {error}",
            hint="get the model's tokenizer files again, or put a chat_template.jinja beside them",
        ) from error


_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HTML = re.compile(
    r"</?(a|b|blockquote|caption|code|em|h[1-6]|i|li|ol|p|pre|s|strong|sub|sup|table|tbody|td|"
    r"tfoot|th|thead|tr|u|ul)>"
)


def _is_marker(content: str, chat_template: str) -> bool:
    """Whether an added token that is not special steers the model, as `<think>` does.

    Runs of white space, HTML tags (Gemma has both) and added words are text: without them, a
    pretrained model would be trained on spellings that it has never seen.
    """
    if content.isspace() or _HTML.fullmatch(content):
        return False
    return bool(_MARKER.fullmatch(content)) or content in chat_template


def _without_control(backend: Tokenizer, control: frozenset[str]) -> tuple[Tokenizer, bool]:
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


_SENTINEL = re.compile(r"Qz7(\d+)y([012])Zq")
_PAD = "\n \n"
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_THINKS = "+thought"


def _shape(messages: Sequence[Message], thoughts: bool) -> tuple[str, ...]:
    """What a skeleton depends on: the roles, and where asked for, which replies begin with a
    thought, because templates that know thoughts move or drop them."""
    if not thoughts:
        return tuple([message["role"] for message in messages])
    return tuple(
        message["role"] + _THINKS
        if message["role"] == "assistant" and _THOUGHT.fullmatch(message["content"])
        else message["role"]
        for message in messages
    )


def _role(name: str) -> str:
    return name.removesuffix(_THINKS)


def _is_reply(name: str) -> bool:
    return _role(name) == "assistant"


def _marked(shape: tuple[str, ...], pad: str) -> list[Message]:
    messages: list[Message] = []
    for index, name in enumerate(shape):
        whole, thought, answer = (f"{pad}Qz7{index}y{part}Zq{pad}" for part in range(3))
        if name.endswith(_THINKS):
            whole = f"<think>\n{thought}\n</think>\n\n{answer}"
        messages.append({"role": _role(name), "content": whole})
    return messages


def _split(rendered: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The literals between the markers, and the (message, part) of each marker."""
    literals: list[str] = []
    places: list[tuple[int, int]] = []
    end = 0
    for found in _SENTINEL.finditer(rendered):
        literals.append(rendered[end : found.start()])
        places.append((int(found[1]), int(found[2])))
        end = found.end()
    literals.append(rendered[end:])
    return literals, places


def _check_places(places: Sequence[tuple[int, int]], shape: tuple[str, ...]) -> None:
    """Each content once; only the thought of an earlier reply may be left out."""
    counts = Counter(places)
    for index, name in enumerate(shape):
        count = counts[(index, 2 if name.endswith(_THINKS) else 0)]
        if count != 1:
            raise Refused(
                f"the chat template writes message {index} ({_role(name)}) {count} times",
                hint="remove messages of that role, or use a template that writes each message "
                "once",
            )
    if shape[-1].endswith(_THINKS) and (len(shape) - 1, 1) not in places:
        raise Refused(
            "the chat template drops the thought (<think>…</think>) of a reply that it ends with",
            hint="remove the thoughts from the data, or use a template that keeps them",
        )


def _trims(literals: Sequence[str], padded: Sequence[str]) -> dict[int, tuple[Trim, Trim]]:
    """Which white space the template takes off each content, seen on contents that are padded."""
    remains: tuple[tuple[Trim, str, str], ...] = (
        ("keep", _PAD, _PAD),
        ("newlines", _PAD.rstrip("\n"), _PAD.lstrip("\n")),
        ("space", "", ""),
    )
    lefts: list[Trim] = []
    rights: list[Trim] = []
    last = len(literals) - 1
    for place, (literal, found) in enumerate(zip(literals, padded, strict=True)):
        fits = [
            (right, left)
            for right, after, _ in (remains if place else remains[2:])
            for left, _, before in (remains if place < last else remains[2:])
            if found == after + literal + before
        ]
        right, left = fits[0] if fits else ("keep", "keep")
        rights.append(right)
        lefts.append(left)
    return {place: (lefts[place], rights[place + 1]) for place in range(last)}


def _text(content: str, slot: _Slot) -> str:
    if slot.part:
        found = _THOUGHT.fullmatch(content)
        assert found, "a shape with thoughts is made from contents that have them"
        content = found[1].strip("\n") if slot.part == 1 else found[2].lstrip("\n")
    if slot.left != "keep":
        content = content.lstrip("\n" if slot.left == "newlines" else None)
    if slot.right != "keep":
        content = content.rstrip("\n" if slot.right == "newlines" else None)
    return slot.space + content if slot.space else content


def _interleaved(literals: Sequence[str], texts: Sequence[str]) -> str:
    parts = [literals[0]]
    for text, literal in zip(texts, literals[1:], strict=True):
        parts.append(text)
        parts.append(literal)
    return "".join(parts)


def _folded(messages: Sequence[Message]) -> list[Message] | None:
    """The system text before the first user message, for templates without a system role."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": text}, *messages[2:]]


def _refuses(messages: Sequence[Message], reason: str) -> Refused:
    roles = ", ".join(message["role"] for message in messages[:8])
    more = ", …" if len(messages) > 8 else ""
    return Refused(
        f"the chat template refuses these messages ({roles}{more}): {reason}",
        hint="most templates want one system message at most, then user and assistant in turn",
    )


def _rewrites(messages: Sequence[Message], rendered: str) -> Refused:
    lost = [n for n, message in enumerate(messages) if message["content"].strip() not in rendered]
    which = f"message {lost[0]} ({messages[lost[0]]['role']}): " if lost else ""
    text = _excerpt(messages[lost[0]]["content"]) if lost else "the text around them changes"
    return Refused(
        f"the chat template drops or rewrites contents: {which}{text}",
        hint="remove what the template reacts to (often <think> or tool tags) from the data, or "
        "use another template",
    )


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}…")
