"""What `runner watch` takes, loses and costs.

    python -m tests.benchmarks.watch [burst] [kills] [ways] [idle] [latency]

burst    20,000 files at once: how many runs, and whether each file was taken exactly once
kills    20,000 files arriving while the watch is killed 50 times, at random moments
ways     1,000 files that arrive in eight ways, of which none may be read half
idle     processor time and memory with 10,000 files and nothing to do
latency  from the arrival of a file to the start of the apply
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.watching import Watch, state
from tests.workspaces import chat, make

RECIPE = """\
name: small
stages:
  - stage: ingest
    sources: [chats]
"""
DEFAULTS = {
    "settle_s": 2.0,
    "quiet_s": 5.0,
    "longest_s": 60.0,
    "poll_s": 30.0,
    "retry_s": 30.0,
    "retry_max_s": 1800.0,
    "tick_s": 0.5,
}
QUICK = {"settle_s": 0.3, "quiet_s": 0.5, "longest_s": 3.0}
LINES = 20
"""Of a file in `ways`: a file that is read half has fewer."""


def taken(root: Path) -> Counter[str]:
    path = root / "artifacts" / "small" / "ingest" / "conversations.jsonl"
    with path.open() as lines:
        return Counter(json.loads(line)["source"]["path"] for line in lines)


def runs(watch: Watch) -> int:
    return sum(e["event"] == "stage_started" for e in watch.events)


def settled(watch: Watch, root: Path, wanted: Callable[[], bool], timeout: float = 300) -> float:
    """Waits until it is so and nothing is left to do; the seconds that took."""
    started = time.monotonic()
    while time.monotonic() < started + timeout:
        watch.is_silent(0.2)
        found = state(root) if (root / "artifacts/watch/small.json").exists() else {}
        if found.get("state") == "idle" and wanted():
            return time.monotonic() - started
    raise SystemExit(f"not settled: {found}")


def write_burst(folder: Path, first: int, count: int) -> None:
    for number in range(first, first + count):
        chat(folder / f"{number % 40}" / f"{number}.json", f"question {number}", f"answer {number}")


def burst(root: Path, count: int = 20_000) -> None:
    recipe = make(root, RECIPE)
    with Watch(recipe, **DEFAULTS) as watch:
        settled(watch, root, lambda: True)
        watch.events.clear()
        began = time.monotonic()
        write_burst(root / "chats", 0, count)
        wrote = time.monotonic() - began
        settled(watch, root, lambda: len(taken(root)) == count + 6)
        found = taken(root)
        print(
            f"burst: {count:,} files written in {wrote:.1f} s; {len(found) - 6:,} taken,"
            f" {sum(n > 1 for n in found.values())} twice, in {runs(watch)} runs,"
            f" {time.monotonic() - began:.1f} s after the first",
            flush=True,
        )


def kills(root: Path, count: int = 20_000, times: int = 50) -> None:
    recipe = make(root, RECIPE)
    chance = random.Random(17)
    portion = count // times
    seen: Counter[str] = Counter()
    for number in range(times):
        writer = threading.Thread(
            target=write_burst, args=(root / "chats", number * portion, portion)
        )
        with Watch(recipe, **QUICK) as watch:
            writer.start()
            watch.is_silent(chance.uniform(0.2, 4.0))
            where = [e["event"] for e in watch.events]
            seen[where[-1] if where else "before it said anything"] += 1
            watch.process.kill()
        writer.join()
    with Watch(recipe, once=True, **QUICK) as watch:
        code = watch.end(300)
    found = taken(root)
    print(
        f"kills: {times} kill -9 (last event before: {dict(seen)}); then exit {code},"
        f" {len(found) - 6:,} of {count:,} taken, {sum(n > 1 for n in found.values())} twice",
        flush=True,
    )


def text(number: int) -> str:
    lines = []
    for line in range(LINES):
        pair = (("user", f"q{line} of {number}"), ("assistant", f"a{line} of {number}"))
        messages = [{"role": role, "content": said} for role, said in pair]
        lines.append(json.dumps({"messages": messages}) + "\n")
    return "".join(lines)


def arrive(folder: Path, away: Path, number: int) -> None:
    """One file, in one of eight ways."""
    path, whole = folder / f"{number}.jsonl", text(number)
    elsewhere = away / f"{number}.jsonl"
    way = number % 8
    if way == 0:  # slow
        with path.open("w") as file:
            for part in range(0, len(whole), len(whole) // 8):
                file.write(whole[part : part + len(whole) // 8])
                file.flush()
                time.sleep(0.12)
    elif way == 1:  # copied
        path.write_text(whole)
    elif way == 2:  # renamed in
        elsewhere.write_text(whole)
        elsewhere.rename(path)
    elif way == 3:
        elsewhere.write_text(whole)
        path.hardlink_to(elsewhere)
    elif way == 4:
        elsewhere.write_text(whole)
        path.symlink_to(elsewhere)
    elif way == 5:  # written, then replaced as editors do
        path.write_text(text(number + 1_000_000))
        beside = folder / f".{number}.swp"
        beside.write_text(whole)
        time.sleep(0.05)
        beside.replace(path)
    elif way == 6:  # deleted before it is whole
        path.write_text(whole[: len(whole) // 2])
        time.sleep(0.05)
        path.unlink()
    else:  # the same content as another
        path.write_text(text(number - 6))


def ways(root: Path, count: int = 1_000) -> None:
    recipe = make(root, RECIPE)
    away = root / "away"
    away.mkdir()
    half: set[str] = set()
    with Watch(recipe, **{**DEFAULTS, "quiet_s": 2.0, "longest_s": 6.0}) as watch:
        settled(watch, root, lambda: True)
        watch.events.clear()
        groups = [range(start, count, 8) for start in range(8)]
        threads = [
            threading.Thread(
                target=lambda group=group: [arrive(root / "chats", away, n) for n in group]
            )
            for group in groups
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            watch.is_silent(0.3)
            half |= read_half(root)
        settled(watch, root, lambda: len(taken(root)) == count - count // 8 + 6)
        half |= read_half(root)
        rejected = (root / "artifacts/small/ingest/rejected.jsonl").read_text()
        print(
            f"ways: {count:,} files, {count // 8} of them deleted midway: {len(taken(root)) - 6:,}"
            f" taken in {runs(watch)} runs, {len(half)} ever read half,"
            f" {len(rejected.splitlines())} records rejected",
            flush=True,
        )


def read_half(root: Path) -> set[str]:
    return {
        name for name, lines in taken(root).items() if name.endswith(".jsonl") and lines != LINES
    }


def cpu_s(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(process: int, which: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1000


def idle(root: Path, count: int = 10_000, seconds: float = 90) -> None:
    recipe = make(root, RECIPE)
    write_burst(root / "chats", 0, count)
    for name, often in (("with events", False), ("scanned every 30 s", True)):
        with Watch(recipe, **{**DEFAULTS, "rescan_s": 30.0 if often else 300.0}) as watch:
            settled(watch, root, lambda: True)
            time.sleep(3)
            pid = watch.process.pid
            before = cpu_s(pid)
            time.sleep(seconds)
            share = (cpu_s(pid) - before) / seconds
            print(
                f"idle {name}, {count:,} files: {share:.2%} of a core,"
                f" {memory_mb(pid, 'VmRSS'):.0f} MB now, {memory_mb(pid, 'VmHWM'):.0f} MB at most",
                flush=True,
            )


def latency(root: Path, times: int = 8) -> None:
    recipe = make(root, RECIPE)
    found = []
    with Watch(recipe, **DEFAULTS) as watch:
        settled(watch, root, lambda: True)
        for number in range(times):
            arrived = time.time()
            chat(root / "chats" / f"new-{number}.json", f"hello {number}", "there")
            started = watch.until(lambda e: e["event"] == "run")["started"]
            found.append(started - arrived)
            settled(watch, root, lambda n=number: f"chats/new-{n}.json" in taken(root))
    print(
        f"latency: {statistics.median(found):.2f} s, at most {max(found):.2f} s, of"
        f" {times} arrivals (settle 2 s, quiet 5 s)",
        flush=True,
    )


def main() -> None:
    everything = {one.__name__: one for one in (burst, kills, ways, idle, latency)}
    for name in sys.argv[1:] or everything:
        with tempfile.TemporaryDirectory() as folder:
            everything[name](Path(folder) / "space")


if __name__ == "__main__":
    main()
