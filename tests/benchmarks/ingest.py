"""What one new file of 10,000 costs, and how much memory a very large export takes.

    python tests/benchmarks/ingest.py [--files 10000] [--export-mb 1000] [--stages]

With --stages also what clean, window and split take by themselves, the first time and then.

Whole commands in new processes, in turn with one another; medians, with the least and the most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RECIPE = """\
name: bench
stages:
  - stage: ingest
    sources: [chats]
"""
FURTHER = """\
  - stage: clean
    near_duplicates: 0.8
  - stage: window
  - stage: split
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--export-mb", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stages", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "pyproject.toml").touch()
        (root / "chats").mkdir()
        (root / "bench.yaml").write_text(RECIPE)
        if options.files and not options.stages:
            one_new_file(root, options.files, options.rounds)
        elif options.files:
            (root / "bench.yaml").write_text(RECIPE + FURTHER)
            stage_by_stage(root, options.files, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "pyproject.toml").touch()
        (root / "chats").mkdir()
        (root / "bench.yaml").write_text(RECIPE)
        if options.export_mb:
            large_export(root, options.export_mb)


def one_new_file(root: Path, count: int, rounds: int) -> None:
    for number in range(count):
        write_chat(root / "chats" / f"chat-{number:06}.json", number, turns=8)
    print(f"{count:,} files: reading all of them takes {seconds(lambda: apply(root)):.2f} s")
    time.sleep(3)  # younger files are hashed again, because they may still change
    apply(root)
    times: dict[str, list[float]] = {"python -c pass": [], "nothing to do": [], "one new file": []}
    for number in range(rounds):
        times["python -c pass"].append(seconds(lambda: run("-c", "pass")))
        times["nothing to do"].append(seconds(lambda: apply(root)))
        write_chat(root / "chats" / f"new-{number}.json", count + number, turns=8)
        times["one new file"].append(seconds(lambda: apply(root)))
        time.sleep(2.5)
        apply(root)
    for name, found in times.items():
        print(f"  {name:15} {spread(found)}")
    more = [new - old for new, old in zip(*list(times.values())[1:][::-1], strict=True)]
    print(f"  one new file costs beside looking at all the others {spread(more)}")


def stage_by_stage(root: Path, count: int, rounds: int) -> None:
    for number in range(count):
        write_chat(root / "chats" / f"chat-{number:06}.json", number, turns=8)
    first = by_stage(root)
    times: dict[str, list[float]] = {stage: [] for stage in first}
    for number in range(rounds):
        write_chat(root / "chats" / f"new-{number}.json", count + number, turns=8)
        for stage, took in by_stage(root).items():
            times[stage].append(took)
    for stage, found in times.items():
        print(f"  {stage:8} {first[stage]:.2f} s; one more file of {count:,}: {spread(found)}")


def by_stage(root: Path) -> dict[str, float]:
    """Seconds that each stage of an apply took, by its events."""
    command = [sys.executable, "-m", "runner", "apply", "bench.yaml", "--json"]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return {e["stage"]: e["seconds"] for e in events if e["event"] == "stage_finished"}


def large_export(root: Path, megabytes: int) -> None:
    path = root / "chats" / "conversations.json"
    write_export(path, megabytes * 1_000_000)
    print(f"an export of {path.stat().st_size / 1e6:,.0f} MB, one JSON array")
    command = [sys.executable, "-m", "runner", "apply", "bench.yaml"]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    took = time.perf_counter() - started
    assert child.returncode == 0
    peak = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    print(f"  ingest: {took:.1f} s, peak memory {peak:,.0f} MB, {megabytes / took:.0f} MB/s")


def write_chat(path: Path, number: int, turns: int) -> None:
    messages = [
        {"sender": "Claude", "claudeOutputText": text(number, turn)}
        if turn % 2
        else {"sender": "User", "userInput": f"question {turn} of chat {number}?"}
        for turn in range(turns)
    ]
    path.write_text(json.dumps(messages))


def write_export(path: Path, size: int) -> None:
    """An export as claude.ai gives it: an array of conversations of 2 to 40 messages."""
    number = 0
    with path.open("w") as out:
        out.write("[")
        while out.tell() < size:
            messages = [
                {
                    "uuid": f"{number}-{turn}",
                    "sender": "assistant" if turn % 2 else "human",
                    "text": text(number, turn),
                    "content": [{"type": "text", "text": text(number, turn)}],
                    "created_at": f"2025-01-01T00:{turn:02}:00.000000Z",
                    "attachments": [],
                    "files": [],
                }
                for turn in range(2 + number % 20 * 2)
            ]
            record = {"uuid": f"c{number}", "name": f"chat {number}", "chat_messages": messages}
            out.write(("," if number else "") + json.dumps(record))
            number += 1
        out.write("]")


def text(number: int, turn: int) -> str:
    words = (f"word{(number * 31 + turn * 17 + place) % 9973}" for place in range(60))
    return f"answer {turn} of chat {number}: {' '.join(words)}"


def apply(root: Path) -> None:
    run("-m", "runner", "apply", "bench.yaml", cwd=root)


def run(*arguments: str, cwd: Path | None = None) -> None:
    subprocess.run([sys.executable, *arguments], cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def spread(found: list[float]) -> str:
    return f"{statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})"


if __name__ == "__main__":
    main()
