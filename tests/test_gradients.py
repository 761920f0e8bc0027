"""The gradient of what is trained (chains, packs, passes) against that of the windows as the user
names them: each a sequence of its own, through the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from runner.chat import jsonl
from runner.model import batches, load, lora, packing, recovery, token_files
from runner.stages.stage import Dirs
from runner.stages.tokenize import Tokenize
from runner.stages.window import Window
from tests import chat_tokenizers, tiny_models
from tests.chat_tokenizers import CHATML, LLAMA3, QWEN3
from tests.tiny_models import Family

Loss = Literal["last_reply", "every_reply"]
Duplicates = Literal["one", "count"]
Method = Literal["lora", "full"]
EXACT = torch.autocast("cpu", enabled=False)
FEW_TOKENS = 150  # of one pass: less than the longest chain has, so that nothing fits beside it


@dataclass(frozen=True)
class Kinds:
    """Which windows a recipe asks for."""

    name: str
    pairs: bool = False
    expanding: bool = False
    sliding_turns: tuple[int, ...] = ()


PAIRS = Kinds("pairs", pairs=True)
EXPANDING = Kinds("expanding", expanding=True)
SLIDING = Kinds("sliding", sliding_turns=(4,))
ALL = Kinds("all", pairs=True, expanding=True, sliding_turns=(4, 6))
KINDS = (PAIRS, EXPANDING, SLIDING, ALL)

CONVERSATIONS = [
    chat_tokenizers.chat("Hi", "Hello there", "And?", "Да", "1, 2", "12 345", "Bye", "Bye-bye"),
    chat_tokenizers.chat("Who?", "Me", "Why?", "Because of it", "Oh", "!", system="Be short."),
    chat_tokenizers.chat("So", "What"),
]

every_family = pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
every_kind = pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: kinds.name)
packed_or_not = pytest.mark.parametrize("packed", [False, True], ids=["rows", "packs"])
every_division = pytest.mark.parametrize(
    "limits",
    [
        recovery.Limits(1, 2048),
        recovery.Limits(3, 2048),
        recovery.Limits(None, FEW_TOKENS),
        recovery.Limits(None, 2048),
    ],
    ids=["1 at a time", "3 at a time", "few tokens", "many tokens"],
)


pytestmark = pytest.mark.usefixtures("one_thread")


class Bench:
    """Tiny models, and the gradients of windows on them, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = cache(self._base)
        self.model = cache(self._model)
        self.separate = cache(self._separate)
        self.tokens = cache(self._tokens)

    def _base(self, family: Family, chat_template: str) -> Path:
        base = tiny_models.folder(self.folder / f"{family}-{hash(chat_template)}", family)
        tokenizer = load.tokenizer(base)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(base)
        return base

    def _model(self, family: Family, method: Method, dtype: torch.dtype) -> Any:
        """With an adapter that is not zero, or with all weights to train."""
        model: Any = load.causal_lm(self.base(family, CHATML), dtype="float32", device="cpu")
        if method == "lora":
            model = lora.attach(model, rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
            torch.manual_seed(0)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        model = model.to(dtype).train()
        if dtype == torch.float64:
            exact_norms(model)
        return model

    def _separate(
        self,
        family: Family,
        method: Method,
        dtype: torch.dtype,
        kinds: Kinds,
        loss: Loss,
        duplicates: Duplicates,
        chat_template: str,
    ) -> Tensor:
        """Of the mean over all learned tokens of all windows, each in a pass of its own."""
        model = self.model(family, method, dtype)
        tokenizer = load.tokenizer(self.base(family, chat_template))
        model.zero_grad()
        total = 0
        for messages in CONVERSATIONS:
            for window in windows(messages, kinds, duplicates):
                ids, learned = read(tokenizer, window, loss)
                own_nll(model, ids, learned).backward()
                total += len(learned)
        return gradient(model) / total

    def _tokens(
        self,
        family: Family,
        kinds: Kinds,
        loss: Loss,
        duplicates: Duplicates,
        packed: bool,
        chat_template: str,
    ) -> Path:
        """What the stages window and tokenize make of the conversations."""
        names = (kinds.name, loss, duplicates, "packed" if packed else "rows", family)
        work = self.folder / f"{'-'.join(names)}-{hash(chat_template)}"
        for folder in ("conversations", "chains", "tokens", "scratch"):
            (work / folder).mkdir(parents=True)
        source = {"path": "f", "format": "messages", "index": 0}
        jsonl.write(
            work / "conversations" / "conversations.jsonl",
            (
                {"id": f"c{number}", "source": source, "messages": messages}
                for number, messages in enumerate(CONVERSATIONS)
            ),
        )
        window = Window(
            stage="window",
            mode="conversational",
            pairs=kinds.pairs,
            expanding=kinds.expanding,
            sliding_turns=kinds.sliding_turns,
            loss=loss,
            duplicates=duplicates,
        )
        base = self.base(family, chat_template)
        inputs = {"conversations": work / "conversations"}
        window.run(dirs(inputs, work / "chains", work / "scratch", base))
        chains = list(jsonl.read(work / "chains" / "chains.jsonl"))
        jsonl.write(
            work / "chains" / "chains.jsonl", ({**chain, "split": "train"} for chain in chains)
        )
        tokenize = Tokenize(stage="tokenize", max_tokens=400, packing=packed)
        inputs = {**inputs, "split": work / "chains"}
        tokenize.run(dirs(inputs, work / "tokens", work / "scratch", base))
        return work / "tokens"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def dirs(inputs: dict[str, Path], output: Path, scratch: Path, base: Path) -> Dirs:
    return Dirs(
        inputs=inputs,
        output=output,
        scratch=scratch,
        cache=scratch,
        sources=(),
        base_model=base,
        recipe="r",
        seed=0,
        emit=lambda event: None,
    )


def windows(
    messages: Sequence[dict[str, str]], kinds: Kinds, duplicates: Duplicates
) -> list[list[dict[str, str]]]:
    """The windows as a user counts them, written out as conversations."""
    system = [message for message in messages if message["role"] == "system"]
    turns = messages[len(system) :]
    count = len(turns)
    spans = [(start, start + 2) for start in range(0, count, 2) if kinds.pairs]
    spans += [(0, stop) for stop in range(2, count + 1, 2) if kinds.expanding]
    for width in kinds.sliding_turns:
        spans += [(start, start + width) for start in range(0, count - width + 1, 2)]
    if duplicates == "one":
        spans = sorted(set(spans))
    return [[*system, *turns[start:stop]] for start, stop in spans]


def read(
    tokenizer: Any, messages: Sequence[dict[str, str]], loss: Loss
) -> tuple[list[int], list[int]]:
    """The ids of a conversation, and the places of those that carry loss."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def rendered(stop: int, *, asked: bool) -> list[int]:
        text: str = tokenizer.apply_chat_template(
            messages[:stop], tokenize=False, add_generation_prompt=asked
        )
        return ids(text if asked else text.rstrip("\n"))  # behind the end of a turn is no loss

    whole = rendered(len(messages), asked=False)
    learned: list[int] = []
    for place, message in enumerate(messages):
        is_last = place == len(messages) - 1
        if message["role"] == "assistant" and (is_last or loss == "every_reply"):
            until = rendered(place + 1, asked=False)
            assert whole[: len(until)] == until, "the template writes a reply otherwise later on"
            learned += range(len(rendered(place, asked=True)), len(until))
    return whole, learned


def exact_norms(model: Any) -> None:
    """Puts norms that compute in float64 in place of transformers', which round to float32."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            kind = type(child).__name__
            if kind.endswith("RMSNorm"):
                scale = child.weight.detach() + (1 if kind.startswith("Gemma3R") else 0)
                eps = child.eps if hasattr(child, "eps") else child.variance_epsilon
                norm = nn.RMSNorm(len(scale), eps=eps)
                norm.weight = nn.Parameter(scale, requires_grad=child.weight.requires_grad)
                setattr(module, name, norm)


def own_nll(model: Any, ids: list[int], learned: list[int]) -> Tensor:
    """The summed loss of a window, by the model's own forward."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    nll = -torch.log_softmax(logits[:-1], -1)[range(len(ids) - 1), ids[1:]]
    return nll[[place - 1 for place in learned]].sum()


def gradient(model: Any) -> Tensor:
    """As one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def trained(model: Any, tokens: Path, limits: recovery.Limits) -> Tensor:
    """The gradient of one step over all rows, as the training takes it."""
    rows = token_files.read(tokens / "train.arrow")
    packs = packing.read(tokens)
    (step,) = batches.planned(rows, batch_size=10**6, epochs=1, max_steps=None, seed=1, packs=packs)
    assert packs is None or max(len(sequence) for sequence in step.sequences) > 1
    model.zero_grad()
    sizes = [len(sequence) for sequence in step.sequences]
    recovery.backward(model, [rows[index] for index in step.rows], limits, EXACT, sizes)
    return gradient(model)


@contextmanager
def by_rows(model: Any) -> Iterator[None]:
    """Packed rows are attended to one by one, as in a training on a CPU."""
    batches.attend_by_rows(model)
    try:
        yield
    finally:
        batches.attend_as_ever(model)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@every_division
@packed_or_not
@every_kind
@every_family
def test_chains_have_the_gradient_of_the_separate_windows(
    family: Family, kinds: Kinds, packed: bool, limits: recovery.Limits, bench: Bench
) -> None:
    made = (kinds, "last_reply", "one")
    tokens = bench.tokens(family, *made, packed, CHATML)
    found = trained(bench.model(family, "lora", torch.float32), tokens, limits)
    expected = bench.separate(family, "lora", torch.float32, *made, CHATML)
    assert difference(found, expected) <= 1e-5


@every_kind
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma3n"])
def test_packs_attended_to_row_by_row_have_the_gradient_of_the_separate_windows(
    family: Family, kinds: Kinds, bench: Bench
) -> None:
    made = (kinds, "last_reply", "one")
    tokens = bench.tokens(family, *made, True, CHATML)
    model = bench.model(family, "lora", torch.float32)
    with by_rows(model):
        found = trained(model, tokens, recovery.Limits(None, 2048))
    expected = bench.separate(family, "lora", torch.float32, *made, CHATML)
    assert difference(found, expected) <= 1e-5


@every_division
@every_kind
@every_family
def test_packs_attended_to_row_by_row_have_the_same_gradient_in_float64(
    family: Family, kinds: Kinds, limits: recovery.Limits, bench: Bench
) -> None:
    made = (kinds, "every_reply", "count")
    tokens = bench.tokens(family, *made, True, CHATML)
    model = bench.model(family, "lora", torch.float64)
    with by_rows(model):
        found = trained(model, tokens, limits)
    expected = bench.separate(family, "lora", torch.float64, *made, CHATML)
    assert difference(found, expected) <= 1e-7


@pytest.mark.parametrize("duplicates", ["one", "count"])
@pytest.mark.parametrize("loss", ["last_reply", "every_reply"])
@packed_or_not
@every_kind
@every_family
def test_the_gradient_is_the_same_in_float64_for_all_options_of_window(
    family: Family, kinds: Kinds, packed: bool, loss: Loss, duplicates: Duplicates, bench: Bench
) -> None:
    made = (kinds, loss, duplicates)
    tokens = bench.tokens(family, *made, packed, CHATML)
    model = bench.model(family, "lora", torch.float64)
    found = trained(model, tokens, recovery.Limits(None, 2048))
    expected = bench.separate(family, "lora", torch.float64, *made, CHATML)
    assert difference(found, expected) <= 1e-7


@every_division
@packed_or_not
@every_family
def test_the_gradient_is_the_same_too_when_all_weights_are_trained(
    family: Family, packed: bool, limits: recovery.Limits, bench: Bench
) -> None:
    made = (ALL, "every_reply", "count")
    tokens = bench.tokens(family, *made, packed, CHATML)
    found = trained(bench.model(family, "full", torch.float64), tokens, limits)
    expected = bench.separate(family, "full", torch.float64, *made, CHATML)
    assert difference(found, expected) <= 1e-7


@packed_or_not
@every_kind
def test_chains_of_gemma_3n_have_the_gradient_of_the_separate_windows(
    kinds: Kinds, packed: bool, bench: Bench
) -> None:
    made = (kinds, "last_reply", "one")
    tokens = bench.tokens("gemma3n", *made, packed, CHATML)
    found = trained(bench.model("gemma3n", "lora", torch.float32), tokens, recovery.Limits(3, 2048))
    expected = bench.separate("gemma3n", "lora", torch.float32, *made, CHATML)
    assert difference(found, expected) <= 1e-5


@pytest.mark.parametrize("chat_template", [QWEN3, LLAMA3], ids=["qwen3", "llama3"])
@packed_or_not
@every_kind
def test_the_gradient_is_the_same_whatever_the_template_does_to_earlier_replies(
    kinds: Kinds, packed: bool, chat_template: str, bench: Bench
) -> None:
    made = (kinds, "last_reply", "one")
    tokens = bench.tokens("llama", *made, packed, chat_template)
    model = bench.model("llama", "lora", torch.float64)
    found = trained(model, tokens, recovery.Limits(None, 2048))
    expected = bench.separate("llama", "lora", torch.float64, *made, chat_template)
    assert difference(found, expected) <= 1e-7


@pytest.mark.parametrize("other", [(ALL, "every_reply", "one"), (ALL, "last_reply", "count")])
def test_other_windows_have_another_gradient(
    other: tuple[Kinds, Loss, Duplicates], bench: Bench
) -> None:
    one = bench.separate("llama", "lora", torch.float64, ALL, "last_reply", "one", CHATML)
    assert difference(bench.separate("llama", "lora", torch.float64, *other, CHATML), one) > 1e-2


def test_a_chain_of_all_expanding_windows_has_the_tokens_of_the_conversation_alone(
    bench: Bench,
) -> None:
    tokens = bench.tokens("llama", EXPANDING, "last_reply", "one", False, CHATML)
    rows = token_files.read(tokens / "train.arrow")
    assert len(rows) == len(CONVERSATIONS)
    tokenizer = load.tokenizer(bench.base("llama", CHATML))
    for row, messages in zip(rows, CONVERSATIONS, strict=True):
        assert row.input_ids.tolist() == read(tokenizer, messages, "last_reply")[0]
