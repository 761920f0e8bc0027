"""What it costs to have nothing to do, and one new file, beside doit and DVC.

    python tests/benchmarks/engine.py [--files 10000] [--rounds 7] [--without-dvc]

All three look at the same folder of chats through five stages, and are installed as users install
them, into environments that are made for this and thrown away. Those of doit and DVC only copy a
list of names; the runner's own do their work, so what it takes beside them is told apart. Whole
commands in new processes, in turn with one another; medians, with the least and the most.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from ingest import write_chat

REPOSITORY = Path(__file__).parents[2]
STAGES = ("ingest", "clean", "turns", "window", "split")
Thing = TypeVar("Thing")
SETTLES_S = 2.5
"""A file younger than 2 s is hashed again, because it may still change."""

ALONE_RECIPE = """\
name: alone
stages:
  - stage: ingest
    sources: [{chats}]
"""

RECIPE = """\
name: bench
stages:
  - stage: ingest
    sources: [chats]
  - stage: clean
  - stage: window
    name: turns
    mode: conversational
  - stage: window
    input: clean
  - stage: split
    eval_fraction: 0.1
"""

DODO = """\
from pathlib import Path

CHATS = sorted(str(path) for path in Path("chats").glob("*.json"))
STAGES = ("ingest", "clean", "turns", "window", "split")


def list_chats():
    Path("doit/ingest").write_text("\\n".join(CHATS) + "\\n")


def copy(above, own):
    Path(own).write_text(Path(above).read_text())


def task_ingest():
    return {"file_dep": CHATS, "targets": ["doit/ingest"], "actions": [list_chats]}


def task_follow():
    for above, own in zip(STAGES, STAGES[1:]):
        files = f"doit/{above}", f"doit/{own}"
        yield {
            "name": own,
            "file_dep": files[:1],
            "targets": files[1:],
            "actions": [(copy, files)],
        }
"""

MEASURE = """\
import os, sys, time
started = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
wall = time.perf_counter() - started
cpu = usage.ru_utime + usage.ru_stime
print(os.waitstatus_to_exitcode(status), wall, cpu, usage.ru_maxrss, file=sys.stderr)
"""
"""A small process that starts the measured one: Linux counts the memory of the process that starts
another into the peak of that one, and this script's own is more than a bare interpreter's."""


@dataclass(frozen=True)
class Run:
    """What one command took, and what it printed."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    said: str


Command = tuple[str | Path, ...]


@dataclass(frozen=True)
class Tool:
    """A command, and what tells that it had nothing to do, or did all (from what it printed)."""

    name: str
    command: Command
    was_idle: Callable[[str], bool]
    did_all: Callable[[str], bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without-dvc", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        own = installed_runner(Path(folder) / "own")
        packages = ["doit"] if options.without_dvc else ["doit", "dvc"]
        others = installed(Path(folder) / "others", *packages)
        root = Path(folder) / "workspace"
        make(root, options.files)
        if not options.without_dvc:
            make_dvc(root, others)
        alone: Command = own / "runner", "apply", "alone/alone.yaml"
        tools = [
            Tool("runner apply", (own / "runner", "apply", "bench.yaml"), runner_idle, runner_did),
            Tool("  ingest alone", alone, runner_idle, lambda said: "ingest: done" in said),
            Tool("doit", (others / "doit",), doit_idle, doit_did),
        ]
        if not options.without_dvc:
            tools.append(Tool("dvc repro", (others / "dvc", "repro"), dvc_idle, dvc_did))
        bench = Bench(root, own, tools, options.files)
        print(f"{machine()}\n{options.files:,} files, {len(STAGES)} stages; {versions(others)}")
        bench.prepare()
        for number in range(options.rounds):
            bench.nothing_to_do(number)
            bench.one_new_file(number)
        bench.report()
        opened_after_one_new_file(bench)


class Bench:
    """The same commands, round by round, on one workspace that gets one more file each round."""

    def __init__(self, root: Path, own: Path, tools: Sequence[Tool], files: int) -> None:
        self.root = root
        self.runner = tools[0]
        self._own = own
        self._tools = tools
        self._files = files
        self._idle: dict[str, list[Run]] = {}
        self._busy: dict[str, list[Run]] = {}
        self._beside: list[float] = []

    def prepare(self) -> None:
        """The first run of each tool, which does everything, and one that looks again."""
        took = []
        for tool in self._tools:
            run = measured(self.root, tool.command)
            check(tool.did_all(run.said), "did not run all of its stages", tool.command, run)
            took.append(f"{tool.name.strip()} {run.wall_s:.1f} s")
        print(f"the first time, with everything to do: {', '.join(took)}")
        self.settle()

    def nothing_to_do(self, number: int) -> None:
        simple: list[tuple[str, Command]] = [
            ("python -c pass", (self._own / "python", "-c", "pass")),
            ("runner --help", (self._own / "runner", "--help")),
            ("runner plan", (self._own / "runner", "plan", "bench.yaml")),
        ]
        measures = [partial(self._simple, *one) for one in simple]
        measures += [partial(self._nothing, tool) for tool in self._tools]
        for measure in turned(measures, number):
            measure()

    def one_new_file(self, number: int) -> None:
        self.add_file()
        for tool in turned(self._tools, number):
            run = measured(self.root, tool.command)
            check(tool.did_all(run.said), "did not run all of its stages", tool.command, run)
            self._busy.setdefault(tool.name, []).append(run)
            if tool is self.runner:
                self._beside.append(run.wall_s - in_the_stages(self.root))
        self.settle()

    def add_file(self) -> None:
        write_chat(self.root / "chats" / f"chat-{self._files:06}.json", self._files, turns=8)
        self._files += 1

    def settle(self) -> None:
        """Lets the new file grow old enough to be known by its times."""
        time.sleep(SETTLES_S)
        for tool in self._tools:
            self._nothing(tool, keep=False)

    def report(self) -> None:
        idle, busy = self._idle, self._busy
        table("nothing to do", idle)
        table("after one new file", busy)
        print(f"  {'runner beside its stages':24} {spread(self._beside)}")
        ratio("runner / pass", idle["runner apply"], idle["python -c pass"])
        ratio("runner / doit", idle["runner apply"], idle["doit"])
        ratio("  its ingest, one new file", busy["  ingest alone"], busy["doit"])
        if "dvc repro" in idle:
            ratio("dvc / runner", idle["dvc repro"], idle["runner apply"])
            ratio("  its ingest, one new file", busy["dvc repro"], busy["  ingest alone"])

    def _simple(self, name: str, command: Command) -> None:
        run = measured(self.root, command)
        if name == "runner plan":
            check(run.said.strip() == "nothing to do", "found something to do", command, run)
        self._idle.setdefault(name, []).append(run)

    def _nothing(self, tool: Tool, *, keep: bool = True) -> None:
        run = measured(self.root, tool.command)
        check(tool.was_idle(run.said), "found something to do", tool.command, run)
        if keep:
            self._idle.setdefault(tool.name, []).append(run)


def runner_idle(said: str) -> bool:
    return said.strip() == "nothing to do: everything is up to date"


def runner_did(said: str) -> bool:
    return re.findall(r"^(\w+): done in ", said, re.M) == list(STAGES)


def doit_idle(said: str) -> bool:
    return re.findall(r"^(..) ", said, re.M) == ["--"] * len(STAGES)


def doit_did(said: str) -> bool:
    return re.findall(r"^(..) ", said, re.M) == [". "] * len(STAGES)


def dvc_idle(said: str) -> bool:
    return "Data and pipelines are up to date." in said and "Running" not in said


def dvc_did(said: str) -> bool:
    return re.findall(r"^Running stage '(\w+)'", said, re.M) == list(STAGES)


def in_the_stages(root: Path) -> float:
    """What the stages of the last run took, as the run itself wrote down."""
    logs = (root / "artifacts" / "runs").glob("*-bench/events.jsonl")
    log = max(logs, key=lambda path: path.stat().st_mtime_ns)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    finished = [event for event in events if event["event"] == "stage_finished"]
    assert [event["stage"] for event in finished] == list(STAGES)
    assert finished[0]["metrics"]["files_read"] == 1
    return sum(float(event["seconds"]) for event in finished)


def opened_after_one_new_file(bench: Bench) -> None:
    """Counts the chat files that the runner opens when one is new."""
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-o", os.devnull, "true"]).returncode:
        print("opened files: not counted, there is no strace here, or it may not look")
        return
    bench.add_file()
    log = bench.root / "opened.txt"
    traced: Command = (strace, "-f", "-qq", "-e", "trace=open,openat,openat2", "-o", log)
    command = (*traced, *bench.runner.command)
    run = measured(bench.root, command)
    check(bench.runner.did_all(run.said), "did not run all of its stages", command, run)
    opened = re.findall(r'"(?:[^"]*/)?(chat-\d+\.json)".* = \d+$', log.read_text(), re.M)
    files = f"{len(set(opened))} of {len(list((bench.root / 'chats').iterdir())):,}"
    print(f"after one new file the runner opens {files} data files ({len(opened)} times in all)")


def make(root: Path, count: int) -> None:
    for folder in ("chats", "doit", "dvc", "alone"):
        (root / folder).mkdir(parents=True)
    (root / "pyproject.toml").touch()
    (root / "bench.yaml").write_text(RECIPE)
    # In a workspace of its own, because the store knows what the other recipe's ingest made.
    (root / "alone" / "pyproject.toml").touch()
    (root / "alone" / "alone.yaml").write_text(ALONE_RECIPE.format(chats=root / "chats"))
    (root / "dodo.py").write_text(DODO)
    for number in range(count):
        write_chat(root / "chats" / f"chat-{number:06}.json", number, turns=8)


def make_dvc(root: Path, scripts: Path) -> None:
    lines = ["stages:", "  ingest:", "    cmd: ls chats > dvc/ingest"]
    lines += ["    deps: [chats]", "    outs: [dvc/ingest]"]
    for above, own in pairwise(STAGES):
        lines += [f"  {own}:", f"    cmd: cp dvc/{above} dvc/{own}"]
        lines += [f"    deps: [dvc/{above}]", f"    outs: [dvc/{own}]"]
    (root / "dvc.yaml").write_text("\n".join(lines) + "\n")
    for arguments in (
        ("init", "--no-scm"),
        ("config", "core.analytics", "false"),
        ("config", "core.check_update", "false"),
    ):
        measured(root, (scripts / "dvc", *arguments))


def installed_runner(folder: Path) -> Path:
    """The runner as it is in this tree, installed; the folder of its commands.

    From a copy, so that the build leaves nothing in the tree. Not the editable install of whoever
    develops it: its import hook makes every start of that interpreter, a bare one too, slower.
    """
    copy = folder / "copy"
    copy.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "runner", copy / "runner", ignore=unwanted)
    return installed(folder / "venv", str(copy))


def installed(folder: Path, *packages: str) -> Path:
    """A new environment with the packages, compiled; the folder of its commands."""
    venv.create(folder, with_pip=True)
    scripts = folder / "bin"
    pip = str(scripts / "python"), "-m", "pip", "--disable-pip-version-check", "-q", "install"
    subprocess.run([*pip, *packages], check=True, env=environment(), stderr=subprocess.DEVNULL)
    return scripts


def environment() -> dict[str, str]:
    """The user's, without what would have Python start slower or differently."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RUNNER_"))}
    return kept | {"DVC_NO_ANALYTICS": "1"}


def measured(root: Path, command: Command) -> Run:
    """What the command took, without what starts it; ends this script where it fails."""
    words = [str(word) for word in command]
    launcher = [sys.executable, "-I", "-S", "-c", MEASURE, *words]
    done = subprocess.run(
        launcher, cwd=root, env=environment(), capture_output=True, text=True, check=True
    )
    *warnings, figures = done.stderr.splitlines()
    code, wall, cpu, peak = figures.split()
    kilobytes = int(peak) / (1000 if sys.platform == "darwin" else 1)
    run = Run(float(wall), float(cpu), kilobytes / 1000, done.stdout)
    said = "\n".join([done.stdout, *warnings])
    check(code == "0", f"exited {code}", command, Run(0, 0, 0, said))
    return run


def check(held: bool, failure: str, command: Command, run: Run) -> None:
    """A number of a failure must not be in the table."""
    if not held:
        sys.exit(f"{' '.join(map(str, command))} {failure}:\n{run.said[-3000:]}")


def turned(things: Sequence[Thing], by: int) -> list[Thing]:
    """Another one is first each round, so that none always follows the same."""
    by %= len(things)
    return [*things[by:], *things[:by]]


def table(title: str, runs: dict[str, list[Run]]) -> None:
    print(f"{title:26} {'wall s':27} {'CPU s':27} peak MB")
    for name, found in runs.items():
        columns = spread([run.wall_s for run in found]), spread([run.cpu_s for run in found])
        peak = statistics.median(run.peak_mb for run in found)
        print(f"  {name:24} {columns[0]:27} {columns[1]:27} {peak:.1f}")


def spread(found: Sequence[float]) -> str:
    return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def ratio(name: str, one: Sequence[Run], other: Sequence[Run]) -> None:
    figures = [
        f"{statistics.median(mine) / statistics.median(theirs):.2f} in {what},"
        f" {min(mine) / min(theirs):.2f} of the least"
        for what, mine, theirs in (
            ("wall", [run.wall_s for run in one], [run.wall_s for run in other]),
            ("CPU", [run.cpu_s for run in one], [run.cpu_s for run in other]),
        )
    ]
    print(f"{name:26} {'; '.join(figures)}")


def machine() -> str:
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    version = ".".join(map(str, sys.version_info[:3]))
    return f"Python {version}, {os.cpu_count()} cores, load {load}"


def versions(scripts: Path) -> str:
    listed = subprocess.run(
        [scripts / "python", "-m", "pip", "--disable-pip-version-check", "list", "--format=json"],
        check=True,
        capture_output=True,
        env=environment(),
    )
    found = {package["name"]: package["version"] for package in json.loads(listed.stdout)}
    return ", ".join(f"{name} {found[name]}" for name in ("doit", "dvc") if name in found)


if __name__ == "__main__":
    main()
