"""From messages to token ids, with the exact tokens of each reply that carry loss.

The chat template is rendered once per pattern of roles with a marker in place of each content, and
cut at the markers into literals (what the template writes) and slots (where contents go). Literals
are encoded with control tokens, contents without, so `<|im_start|>` typed by a person stays text,
and the loss is taken from the same cuts, never by searching text. The price: the template is also
rendered with the real contents, to prove that cutting and joining gives the very same text.
A reply is what the model writes after its generation prompt: its content, and its end of turn.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import jinja2
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from runner.errors import RunnerError
from runner.model import control_tokens, cuts, rendering
from runner.model.cuts import Message, Slot

Ids = tuple[int, ...]
Array = npt.NDArray[np.int32]

_STEPS_AT_AN_END = 32


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
    """The ids of a whole conversation."""
    own = encoder(tokenizer)
    plan = own.plan(messages)
    return own.joined(plan, own.tokenised(plan.texts))


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
    slots: tuple[Slot, ...]
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
        self._template = rendering.compiled(chat_template)
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self._control = control_tokens.of(tokenizer, chat_template)
        self._is_control = np.zeros(max(len(tokenizer), *self._control, 0) + 1, bool)
        self._is_control[list(self._control)] = True
        self._plain, self._prefixes = control_tokens.without(
            backend, frozenset(self._control.values())
        )
        self._skeletons: dict[tuple[tuple[str, ...], bool], _Skeleton | str] = {}
        self._literals: dict[tuple[str, bool], Ids] = {}
        self._openings: dict[str, str] = {}
        self._stable: dict[tuple[int, tuple[str, ...]], bool] = {}
        self._closes: bool | None = None

    def plan(self, messages: Sequence[Message], *, opened: bool = False) -> Plan:
        """The cuts of a conversation; `opened` ends it with the generation prompt."""
        shown, folded = self._accepted(messages, opened)
        try:
            rendered = self._rendered(shown, opened)
        except jinja2.TemplateError as error:
            raise _refuses(shown, str(error)) from error
        for thoughts in (False, True):
            shape = cuts.shape(shown, thoughts)
            if thoughts and shape == cuts.shape(shown, False):
                break
            skeleton = self._skeleton(shape, opened)
            if isinstance(skeleton, str):
                break
            texts = tuple(
                cuts.text(shown[slot.message]["content"], slot) for slot in skeleton.slots
            )
            if cuts.interleaved(skeleton.literals, texts) == rendered:
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
        ends = [index + 1 for index, name in enumerate(shape) if cuts.is_reply(name)]
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
                self._stable[key] = all(
                    self._begins(shorter, longer, pad) for pad in ("", cuts.PAD)
                )
            except jinja2.TemplateError:
                self._stable[key] = False
        return self._stable[key]

    def _begins(self, shorter: tuple[str, ...], longer: tuple[str, ...], pad: str) -> bool:
        """Whether the longer rendering starts as the shorter one, to the end of its last turn."""
        before, places = self._at_markers(shorter, pad, opened=False)
        after, later_places = self._at_markers(longer, pad, opened=False)
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
        skeleton = self._skeleton(cuts.shape(messages, False), opened)
        if isinstance(skeleton, _Skeleton):
            return messages, False
        folded = _folded(messages)
        if folded and isinstance(self._skeleton(cuts.shape(folded, False), opened), _Skeleton):
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
        literals, places = self._at_markers(shape, "", opened=opened)
        _check_places(places, shape)
        padded, padded_places = self._at_markers(shape, cuts.PAD, opened=opened)
        trims = cuts.trims(literals, padded) if padded_places == places else {}
        slots = tuple(
            Slot(
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
            role = cuts.role(shape[slots[place].message]) if place < len(slots) else ""
            before = cuts.role(shape[slots[place - 1].message]) if place else ""
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
        slots: Sequence[Slot],
        literals: Sequence[str],
        openings: Sequence[int],
        opened: bool,
    ) -> tuple[_Span, ...]:
        spans: list[_Span] = []
        places: dict[int, list[int]] = defaultdict(list)
        for place, slot in enumerate(slots):
            places[slot.message].append(place)
        for index, name in enumerate(shape):
            if not cuts.is_reply(name):
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
            literals, _ = self._at_markers(("user", "assistant"), "", opened=False)
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
                literals, _ = self._at_markers(before, "", opened=True)
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

    def _at_markers(
        self, shape: tuple[str, ...], pad: str, *, opened: bool
    ) -> tuple[list[str], list[tuple[int, int]]]:
        """A rendering of this shape, cut at its markers."""
        return cuts.at_markers(self._rendered(cuts.marked(shape, pad), opened))

    def _rendered(self, messages: Sequence[Message], opened: bool) -> str:
        return rendering.rendered(
            self._template, messages, opened=opened, special_tokens=self._special_tokens
        )


@lru_cache(maxsize=4)
def _encoder(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    vocabulary: int,
) -> Encoder:
    """`vocabulary`, its size, only tells when tokens were added to it."""
    return Encoder(tokenizer, chat_template)


def _check_places(places: Sequence[tuple[int, int]], shape: tuple[str, ...]) -> None:
    """Each content once; only the thought of an earlier reply may be left out."""
    counts = Counter(places)
    for index, name in enumerate(shape):
        count = counts[(index, 2 if cuts.has_thought(name) else 0)]
        if count != 1:
            raise Refused(
                f"the chat template writes message {index} ({cuts.role(name)}) {count} times",
                hint="remove messages of that role, or use a template that writes each message "
                "once",
            )
    if cuts.has_thought(shape[-1]) and (len(shape) - 1, 1) not in places:
        raise Refused(
            "the chat template drops the thought (<think>…</think>) of a reply that it ends with",
            hint="remove the thoughts from the data, or use a template that keeps them",
        )


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
