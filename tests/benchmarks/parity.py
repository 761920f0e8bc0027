"""How far each GGUF level of a real model is from the model that was trained: what the limits of
`runner.model.parity` are made of.

python -m tests.benchmarks.parity MODEL [MODEL …] [--steps 12] [--levels q8_0 q4_k_m …]

A MODEL is a folder or a GGUF file. Each gets a small LoRA adapter, trained on the conversations in
data/quickstart, with `--template FILE` where it has no chat template of its own. Printed for each
export: mean KL, share of the same likeliest tokens, ends, replies, and the seconds of the check.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from runner.chat import jsonl
from runner.errors import RunnerError
from runner.model import adapter, gguf, load, parity, reference, tokens
from runner.model.gguf import Level
from runner.model.parity import Parity
from tests import tiny_models

CHATS = Path(__file__).parents[2] / "data" / "quickstart" / "chats"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--template", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--levels", nargs="+", default=list(get_args(Level)))
    options = parser.parse_args()
    for model in options.models:
        # Beside the system's folder for such files: some of these gigabytes may be kept there.
        with tempfile.TemporaryDirectory() as folder:
            _measure(model, Path(folder), options.template, options.steps, options.levels)


def _measure(
    model: Path, work: Path, template: Path | None, steps: int, levels: list[Level]
) -> None:
    base = load.base_folder(model, Path(tempfile.gettempdir()) / "runner-test-models")
    if template:
        base = Path(shutil.copytree(base, work / "base"))
        shutil.copyfile(template, base / "chat_template.jinja")
    files = _tokens(base, work)
    started = time.monotonic()
    tiny_models.trained(
        base, files, work / "trained", max_steps=steps, learning_rate=5e-4, batch_size=8, rank=8
    )
    print(f"\n{model.name}: trained in {time.monotonic() - started:.0f} s", flush=True)
    trained = work / "trained" / "output"
    asked = work / "reference.safetensors"
    started = time.monotonic()
    said = reference.write_reference(
        base=base, model=trained, tokens=files, output=asked, emit=_ignore
    )
    print(f"reference in {time.monotonic() - started:.0f} s: {said}\n", flush=True)
    print("level   | mean KL  | top-1 | stops | same replies (tokens) | other tokens | s")
    merged = work / "merged"
    adapter.merge(base, trained, merged, dtype="bfloat16")
    started = time.monotonic()
    found = reference.check_folder(merged, asked, emit=_ignore)
    _print("merged", found, time.monotonic() - started)
    unquantised = work / "unquantised.gguf"
    gguf.convert(merged, unquantised, gguf.stored_dtype(merged), name="measured")
    for level in levels:
        target = work / "level.gguf"
        try:
            gguf.quantize(unquantised, target, level, lambda _done, _total: None)
        except RunnerError as error:
            print(f"{level:7} | {error.message}", flush=True)
            continue
        started = time.monotonic()
        found = parity.check_gguf(target, asked, level, emit=_ignore)
        _print(level, found, time.monotonic() - started)


def _print(level: str, found: Parity, seconds: float) -> None:
    print(
        f"{level:7} | {found.mean_kl:.6f} | {found.top1:.3f} | {found.stops}/"
        f"{found.reference_stops} | {found.same_replies}/{found.replies} "
        f"({found.same_reply_tokens:.2f}) | {found.tokens_differ}/{found.texts} "
        f"{found.templates_differ} | {seconds:.1f}",
        flush=True,
    )
    if found.ran_on or found.cut_short or found.difference:
        print(json.dumps(found.record(), ensure_ascii=False))


def _tokens(base: Path, work: Path) -> Path:
    """The quickstart's conversations, every fifth of them held out."""
    for name in ("tokens", "scratch"):
        (work / name).mkdir()
    records = list(_records())
    jsonl.write(work / "conversations.jsonl", records)
    jsonl.write(
        work / "chains.jsonl",
        (
            {
                "conversation": record["id"],
                "first": 0,
                "weights": {
                    str(place): 1
                    for place, message in enumerate(record["messages"])
                    if message["role"] == "assistant"
                },
                "split": "train" if number % 5 else "eval",
            }
            for number, record in enumerate(records)
        ),
    )
    tokens.write(
        base=base,
        conversations=work / "conversations.jsonl",
        chains=work / "chains.jsonl",
        output=work / "tokens",
        max_tokens=1024,
        overflow="drop",
        progress=lambda _done, _total: None,
    )
    return work / "tokens"


def _records() -> Iterator[dict[str, Any]]:
    for number, path in enumerate(sorted(CHATS.glob("*.json"))):
        messages = [
            {"role": "user", "content": turn["userInput"]}
            if "userInput" in turn
            else {"role": "assistant", "content": turn["claudeOutputText"]}
            for turn in json.loads(path.read_text(encoding="utf-8"))
        ]
        source = {"path": path.name, "format": "sender", "index": 0}
        yield {"id": f"{number:016x}", "source": source, "messages": messages}


def _ignore(_event: dict[str, Any]) -> None:
    pass


if __name__ == "__main__":
    main()
