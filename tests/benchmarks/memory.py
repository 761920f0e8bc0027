"""What trainings take of memory, beside what was said before they ran.

    python -m tests.benchmarks.memory [--cases 24] [--json results.json]

On a GPU 24 cases of random models in the sizes that people train, measured as torch allocates; on a
CPU three small ones, measured as the most that the process held. Each is a training of two steps
through the train stage, in a process of its own. Exit 1 when fewer than 90 % are within 10 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

GOAL_ERROR, GOAL_SHARE = 0.10, 0.9

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "kind": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama-1b": {
        "kind": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen3-4b": {
        "kind": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "gemma3-1b": {
        "kind": "gemma3",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "vocab_size": 262144,
    },
    "gemma3n-e2b": {
        "kind": "gemma3n",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 30,
        "num_kv_shared_layers": 10,
        "vocab_size": 262400,
    },
}


@dataclass(frozen=True)
class Case:
    """A model and the settings of its training."""

    model: str
    method: Literal["lora", "qlora", "full"] = "lora"
    max_tokens: int = 1024
    rows: int = 2
    recompute: Literal["on", "off"] = "off"
    optimizer: str = "adamw"
    rank: int = 16
    dropout: float = 0.0


GPU_CASES = (
    Case("smollm2-135m"),
    Case("smollm2-135m", "full"),
    Case("smollm2-135m", "full", 2048, 4, "on"),
    Case("smollm2-135m", "qlora", 2048, 4),
    Case("smollm2-135m", "lora", 512, 16, dropout=0.05),
    Case("llama-1b"),
    Case("llama-1b", "lora", 2048, 4, "on"),
    Case("llama-1b", "lora", 1024, 2, rank=64),
    Case("llama-1b", "qlora"),
    Case("llama-1b", "qlora", 2048, 4, "on"),
    Case("llama-1b", "full"),
    Case("llama-1b", "full", 1024, 4, "on", "adamw_8bit"),
    Case("qwen3-4b", "lora", 1024, 2),
    Case("qwen3-4b", "lora", 2048, 2, "on"),
    Case("qwen3-4b", "lora", 2048, 4, "on", dropout=0.05),
    Case("qwen3-4b", "qlora", 1024, 1, "on"),
    Case("qwen3-4b", "qlora", 2048, 1),
    Case("qwen3-4b", "full", 1024, 1, "on"),
    Case("gemma3-1b"),
    Case("gemma3-1b", "lora", 2048, 2, "on"),
    Case("gemma3-1b", "qlora", 512, 4),
    Case("gemma3-1b", "full", 512, 4),
    Case("gemma3n-e2b", "qlora", 1024, 1, "on"),
    Case("gemma3n-e2b", "lora", 512, 2),
)
CPU_CASES = (
    Case("smollm2-135m", "lora", 256, 1),
    Case("smollm2-135m", "lora", 256, 4, "on"),
    Case("smollm2-135m", "full", 256, 1),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(Case(**json.loads(options.case)))))
        return 0
    import torch

    cases = (GPU_CASES if torch.cuda.is_available() else CPU_CASES)[: options.cases]
    results = []
    for case in cases:
        results.append(result := in_a_child(case))
        if "error" in result:
            print(f"{case}: {result['error']}", flush=True)
            continue
        off = result["said"] / result["measured"] - 1
        print(
            f"{case.model:13} {case.method:5} {case.rows:2} × {case.max_tokens:5}"
            f" recompute {case.recompute:3} {case.optimizer:10} rank {case.rank:2}:"
            f" said {result['said'] / 1e9:6.2f} GB, was {result['measured'] / 1e9:6.2f} GB"
            f" ({off:+.1%})",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    errors = [abs(one["said"] / one["measured"] - 1) for one in results if "said" in one]
    if not errors:
        return 1
    share = sum(error <= GOAL_ERROR for error in errors) / len(cases)
    mean = statistics.mean(errors)
    print(f"{share:.0%} of {len(cases)} cases within {GOAL_ERROR:.0%}; mean error {mean:.1%}")
    return 0 if share >= GOAL_SHARE else 1


def in_a_child(case: Case) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {**asdict(case), "error": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**asdict(case), **found}


def measured(case: Case) -> dict[str, Any]:
    """The peak of two steps, and what was estimated for them."""
    import torch

    from runner.model import memory, sft
    from runner.stages.stage import Dirs
    from runner.stages.train import Lora, Train
    from runner.ui import doctor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        base = random_model(work / "base", SHAPES[case.model], device)
        tokens = token_files(work / "tokens", case)
        settings: dict[str, Any] = (
            {} if case.method == "full" else {"lora": Lora(rank=case.rank, dropout=case.dropout)}
        )
        stage = Train(
            stage="train",
            method=case.method,
            max_steps=2,
            learning_rate=1e-6,
            batch_size=2 * case.rows,
            micro_batch_size=case.rows,
            gradient_checkpointing=case.recompute,
            optimizer=case.optimizer,
            **settings,
        )
        training = doctor.training_of(stage, case.max_tokens, device, sft.precision_of(device))
        model = memory.read(base)
        assert model is not None
        said = memory.estimate(model, training)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        events: list[dict[str, Any]] = []
        stage.run(
            Dirs(
                inputs={"tokens": tokens},
                output=work / "output",
                scratch=work / "scratch",
                cache=work / "cache",
                sources=(),
                base_model=base,
                recipe="",
                seed=0,
                emit=events.append,
            )
        )
        # What writing the model takes afterwards is another matter, and not the GPU's.
        peak = max(event["memory_bytes"] for event in events if "memory_bytes" in event)
    if device == "cpu":
        return {"said": said.total, "measured": peak, "parts": said.parts}
    return {"said": said.allocated, "measured": peak, "parts": said.parts}


def random_model(path: Path, shape: dict[str, Any], device: str) -> Path:
    """A base model of that shape, made and written on the device and gone from it again."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        Gemma3nTextConfig,
        Gemma3TextConfig,
        LlamaConfig,
        Qwen3Config,
    )

    from tests import chat_tokenizers

    kinds: dict[str, Any] = {
        "llama": LlamaConfig,
        "qwen3": Qwen3Config,
        "gemma3": Gemma3TextConfig,
        "gemma3n": Gemma3nTextConfig,
    }
    settings = {key: value for key, value in shape.items() if key != "kind"}
    config = kinds[shape["kind"]](**settings, tie_word_embeddings=True)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    chat_tokenizers.tiny(chat_tokenizers.CHATML).save_pretrained(path)
    return path


def token_files(path: Path, case: Case) -> Path:
    """Rows as long as they may be, all but a few tokens with loss."""
    from tests import tiny_models

    count = 4 * case.rows
    rows = [
        tiny_models.row(f"c{number}", case.max_tokens, [(8, case.max_tokens, 1.0)])
        for number in range(count)
    ]
    return tiny_models.token_files(path, rows)


if __name__ == "__main__":
    sys.exit(main())
