"""Tools that hurt a run, and what must hold of a workspace afterwards.

A run is hurt through its real system calls: strace makes the k-th call of a kind fail or kills the
process before it, a small tmpfs or RLIMIT_FSIZE make writes short. Of the engine's files only what
users see is used: the lockfile, `artifacts/store/<2>/<hash>`, the links, and the exit code.
"""

from __future__ import annotations

import ast
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from runner.engine import store
from tests import workspaces

Item = TypeVar("Item")

FULL = bool(os.environ.get("RUNNER_TORTURE"))
REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 120
DOCUMENTED = frozenset((0, 1, 3, 75))
RUNNER = "tests.torture.warm:runner"
"""What a warm process calls to be `python -m runner`."""

OBJECT = re.compile("[0-9a-f]{64}")

RECIPE = """\
name: small
stages:
  - stage: ingest
    sources: [chats]
  - stage: clean
  - stage: window
    mode: conversational
  - stage: split
    eval_fraction: 0.2
"""

# fmt: off
CHANGING = (
    "write", "pwrite64", "writev", "pwritev", "pwritev2", "copy_file_range", "sendfile", "fsync",
    "fdatasync", "sync_file_range", "rename", "renameat", "renameat2", "unlink", "unlinkat",
    "rmdir", "mkdir", "mkdirat", "symlink", "symlinkat", "link", "linkat", "ftruncate", "truncate",
    "fallocate", "chmod", "fchmod", "fchmodat", "utimensat",
)
# fmt: on
"""The system calls that change what is on a disk."""

OPENING = ("openat", "open", "creat")


def often(sample: int, full: int) -> int:
    """How many times: a sample with the other tests, all with RUNNER_TORTURE=1."""
    return full if FULL else sample


def picked(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, evenly; all of them when tortured in full."""
    if FULL or len(items) <= count:
        return list(items)
    return [items[(2 * n + 1) * len(items) // (2 * count)] for n in range(count)]


# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (minus the signal that killed it) and what it printed."""

    code: int
    out: str
    err: str


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
    }


def started(*arguments: str | Path, before: Sequence[str] = (), **more: Any) -> Any:
    """`python -m runner …` as a process of its own, in a session of its own."""
    return subprocess.Popen(
        [*before, sys.executable, "-m", "runner", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=REPOSITORY,
        start_new_session=True,
        text=True,
        errors="replace",
        **more,
    )


def ended(process: Any) -> Ended:
    """What became of a process that ends by itself; one that hangs is killed and so reported."""
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += f"\nstill running after {TIMEOUT_S} s"
    return Ended(process.returncode, out, err)


def run(*arguments: str | Path, before: Sequence[str] = (), **more: Any) -> Ended:
    return ended(started(*arguments, before=before, **more))


class Warm:
    """Runs as forks of one process that has imported everything (see `warm`)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.torture.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            cwd=REPOSITORY,
            text=True,
        )
        self._out = folder / "printed"

    def close(self) -> None:
        self._process.communicate(timeout=TIMEOUT_S)

    def begin(self, call: str, args: Sequence[object], *, learn: bool = False) -> int:
        """Forks; the process id of what waits for `go`."""
        self._say(json.dumps({"call": call, "args": args, "out": str(self._out), "learn": learn}))
        return int(self._answer())

    def go(self) -> None:
        self._say("go")

    def send(self, pid: int, number: signal.Signals) -> None:
        """A signal from outside, to what may have ended."""
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def wait(self, pid: int) -> Ended:
        """What became of it; one that hangs is killed and so reported."""
        hangs = ""
        if not self._ready(TIMEOUT_S):
            os.kill(pid, signal.SIGKILL)
            hangs = f"\nstill running after {TIMEOUT_S} s"
        code = int(self._answer())
        out, err = (
            Path(f"{self._out}.{name}").read_text(encoding="utf-8", errors="replace")
            for name in ("out", "err")
        )
        return Ended(code, out, err + hangs)

    def call(
        self, call: str, *args: object, strace: Sequence[str] = (), learn: bool = False
    ) -> Ended:
        """Runs a function, under strace with these options where there are any."""
        pid = self.begin(call, args, learn=learn)
        try:
            tracer = attached(pid, strace) if strace else None
        finally:
            self.go()
            result = self.wait(pid)
        if tracer is not None:
            tracer.communicate(timeout=TIMEOUT_S)
        return result

    def runner(self, *arguments: str | Path, strace: Sequence[str] = ()) -> Ended:
        return self.call(RUNNER, *map(str, arguments), strace=strace)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _ready(self, timeout_s: float) -> bool:
        return bool(select.select([self._process.stdout], [], [], timeout_s)[0])


def must_hold(broken: Mapping[str, Sequence[str]], tried: int) -> None:
    """Fails with each promise that did not hold, and where it did not."""
    where: dict[str, list[str]] = {}
    for case, found in broken.items():
        for what in found:
            where.setdefault(re.sub(r"pytest-[0-9]+|\b[0-9]{3,}\b", "<n>", what), []).append(case)
    if where:
        text = [f"{len(broken)} of {tried} cases broke a promise"]
        for what, cases in where.items():
            some = "".join(f"\n    {case}" for case in cases[:4])
            text.append(f"  {len(cases)} x {what}{some}")
        pytest.fail("\n".join(text), pytrace=False)


# ---------------------------------------------------------------- system calls


@dataclass(frozen=True)
class Call:
    """The `number`-th system call `name` of a run."""

    name: str
    number: int
    text: str

    def __str__(self) -> str:
        text = re.sub(r"/\S*/space/|\bAT_FDCWD[^,]*, ", "", self.text)
        return f"{self.name} {self.number}: {text[:150]}"


def attached(pid: int, options: Sequence[str]) -> subprocess.Popen[str]:
    """strace, watching the process before it goes on; skips the test where that is forbidden."""
    if shutil.which("strace") is None:
        os.kill(pid, signal.SIGKILL)
        pytest.skip("needs strace")
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True
    )
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    if "attached" not in said:
        os.kill(pid, signal.SIGKILL)
        tracer.kill()
        tracer.communicate()
        pytest.skip(f"needs the right to trace a process: {said.strip()}")
    return tracer


def logging(path: Path, names: Iterable[str]) -> list[str]:
    """The options of strace to write down these calls whole, descriptors as paths."""
    wanted = ",".join(f"?{name}" for name in names)
    return ["-y", "-s", "1000000", "-o", str(path), "-e", f"trace={wanted}"]


def lines_of(log: Path) -> list[tuple[str, str]]:
    """Process id and call of each line, calls that strace cut in two put together again."""
    found = []
    open_calls: dict[str, str] = {}
    for line in log.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        pid, _, text = line.partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            open_calls[pid] = text.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", text):
            text = open_calls.pop(pid, "") + resumed[1]
        if re.match(r"\w+\(", text):
            found.append((pid, text))
    return found


def calls_of(log: Path, below: Sequence[Path]) -> list[Call]:
    """The calls that concern a file below the folders, counted as strace counts for `when=`."""
    counts: Counter[tuple[str, str]] = Counter()
    found = []
    for pid, text in lines_of(log):
        name = text.partition("(")[0]
        counts[pid, name] += 1
        if any(f"{folder}" in text for folder in below):
            found.append(Call(name, counts[pid, name], text))
    return found


def reading(call: Call) -> bool:
    """Whether it opens a file only to read it."""
    return call.name in OPENING and not re.search("O_WRONLY|O_RDWR|O_CREAT", call.text)


def killed_at(call: Call) -> list[str]:
    """The options of strace to kill the process when it is about to make the call."""
    return _inject(call.name, f"signal=KILL:when={call.number}")


def failing_at(call: Call, error: str, *, for_ever: bool = False) -> list[str]:
    """The options of strace to let the call fail, and with `for_ever` all of its kind after it."""
    return _inject(call.name, f"error={error}:when={call.number}{'+' if for_ever else ''}")


def all_failing_from(calls: Sequence[Call], call: Call, error: str) -> list[str]:
    """The options of strace to let every call of these kinds fail from this one on."""
    options = ["-o", os.devnull]
    after = calls[calls.index(call) :]
    first: dict[str, int] = {}
    for later in after:
        first.setdefault(later.name, later.number)
    options += ["-e", f"trace={','.join(first)}"]
    for name, number in first.items():
        options += ["-e", f"inject={name}:error={error}:when={number}+"]
    return options


def _inject(name: str, what: str) -> list[str]:
    return ["-o", os.devnull, "-e", f"trace={name}", "-e", f"inject={name}:{what}"]


# ---------------------------------------------------------------- a workspace and its promises


@dataclass(frozen=True)
class Space:
    """A workspace with the recipe `small`, as users see it."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipes" / "small.yaml"

    @property
    def lock(self) -> Path:
        return self.recipe.with_suffix(".lock")

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def store(self) -> Path:
        return self.artifacts / "store"

    def locked(self) -> bytes | None:
        return self.lock.read_bytes() if self.lock.exists() else None

    def clear(self) -> None:
        """As if the runner had never been here."""
        shutil.rmtree(self.artifacts, ignore_errors=True)
        for path in self.recipe.parent.iterdir():
            if path != self.recipe:
                path.unlink()

    def restore(self, saved: Path) -> None:
        """As it was when it was saved."""
        shutil.rmtree(self.root)
        shutil.copytree(saved, self.root, symlinks=True)


def make(root: Path, chats: int = 6) -> Space:
    root.mkdir(parents=True, exist_ok=True)
    workspaces.make(root, RECIPE, chats)
    return Space(root)


def facts(data: bytes) -> list[dict[str, Any]]:
    """The facts of a lockfile, read by other code than the runner's; an error where it is torn."""
    header, *lines = data.decode("utf-8").split("\n")
    if not header.startswith("# ") or lines.pop() != "":
        raise ValueError("its first or its last line is not whole")
    return [json.loads(line[2:]) for line in lines]


def whole(folder: Path) -> bool:
    """Whether an object is what its name says."""
    return folder.is_dir() and store.content_hash(folder) == folder.name


def torn(space: Space) -> list[str]:
    """What is on the disk and not whole, leaving aside what the next run clears away."""
    objects = [p for p in space.store.glob("??/*") if OBJECT.fullmatch(p.name)]
    found = [f"the object {path} is not what its name says" for path in objects if not whole(path)]
    for link in (space.artifacts / "small").glob("[!.]*"):
        if not link.is_symlink() or not whole(link.resolve()):
            found += [f"the link {link} does not lead to a whole object"]
    data = space.locked()
    if data is not None:
        try:
            facts(data)
        except ValueError as error:
            found.append(f"the lockfile is torn ({error}): {data[-200:]!r}")
    return found


def missing(space: Space, planned: Mapping[str, str]) -> list[str]:
    """Outputs that the lockfile names, that are not there whole, and that `plan` would skip."""
    found = []
    for fact in facts(space.locked() or b"# \n"):
        folder = space.store / fact["output"][:2] / fact["output"]
        if not whole(folder) and planned[fact["stage"]] == "skip":
            found.append(f"{fact['stage']}: {folder} is not whole, and plan would skip it")
    return found


def strays(space: Space) -> list[str]:
    """Temporary files that a successful run must not leave behind."""
    beside = [p for p in space.recipe.parent.iterdir() if p not in (space.recipe, space.lock)]
    staged = list((space.store / "tmp").glob("*"))
    half = [p for p in space.artifacts.rglob("*") if p.name.endswith((".tmp", "-journal"))]
    names = {str(p.relative_to(space.root)) for p in (*beside, *staged, *half)}
    return [
        f"left behind: {re.sub(r'[.-][0-9]+[.]tmp', '.<pid>.tmp', name)}" for name in sorted(names)
    ]


def clean_ending(result: Ended, codes: Iterable[int] = DOCUMENTED) -> list[str]:
    """What is wrong with how a run ended."""
    found = []
    if result.code not in codes:
        found.append(f"exit code {result.code}: {_last(result)}")
    wrong = ("Traceback", "a bug in runner", "Exception ignored", "still running after")
    said = [words for words in wrong if words in result.err or words in result.out]
    return found + [f"it says {words!r}: {_last(result)}" for words in said]


def recovers(space: Space, after: bytes, warm: Warm) -> list[str]:
    """What is wrong with the next run that nobody disturbs, and with what is there after it."""
    result = warm.runner("apply", space.recipe)
    found = [f"next apply: {what}" for what in clean_ending(result, [0])]
    if not found and space.locked() != after:
        found.append("the lockfile after the next apply is not that of an undisturbed run")
    if not found:
        found += [f"after the next apply: {what}" for what in (*torn(space), *strays(space))]
        found += _not_whole(space)
        checked = warm.runner("plan", space.recipe, "--check")
        found += [f"plan after the next apply: {what}" for what in clean_ending(checked, [0])]
    return found


def _not_whole(space: Space) -> list[str]:
    named = facts(space.locked() or b"# \n")
    folders = [space.store / fact["output"][:2] / fact["output"] for fact in named]
    links = [space.artifacts / "small" / fact["stage"] for fact in named]
    found = [f"{folder} is not whole" for folder in folders if not whole(folder)]
    return found + [
        f"the link {link} leads elsewhere"
        for link, folder in zip(links, folders, strict=True)
        if link.resolve() != folder.resolve()
    ]


def _last(result: Ended) -> str:
    return " | ".join(result.err.strip().splitlines()[-3:])[-400:]


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """A workspace with work to do, and what an undisturbed run makes of it."""

    space: Space
    saved: Path
    after: bytes
    versions: tuple[bytes | None, ...]
    calls: tuple[Call, ...]
    log: Path

    def broken(self, result: Ended, warm: Warm, codes: Iterable[int] = DOCUMENTED) -> list[str]:
        """Every promise that does not hold after a run that was hurt in this scene."""
        found = clean_ending(result, codes)
        if self.space.locked() not in self.versions:
            found.append(f"the lockfile is no version of an undisturbed run: {self._now()}")
        hurt = torn(self.space)
        if not hurt:
            hurt = missing(self.space, planned(self.space, warm)) if self._suspect() else []
        found += hurt
        if result.code == 0 and self.space.locked() != self.after:
            found.append("exit code 0, but the lockfile is not that of an undisturbed run")
        return found + recovers(self.space, self.after, warm)

    def _suspect(self) -> bool:
        return bool(_not_whole(self.space))

    def _now(self) -> str:
        data = self.space.locked()
        return "absent" if data is None else repr(data[-300:])


def planned(space: Space, warm: Warm) -> dict[str, str]:
    result = warm.runner("plan", space.recipe, "--json")
    if result.code:
        return defaultdict(str)  # it says of no stage that it would skip it
    return {record["stage"]: record["state"] for record in json.loads(result.out)}


def scene(root: Path, warm: Warm, *, again: bool, chats: int = 6) -> Scene:
    """A first run, or (`again`) one after which a source was added."""
    space = make(root / "space", chats)
    if again:
        assert warm.runner("apply", space.recipe).code == 0
        workspaces.chat(space.root / "chats" / "chat-new.json", "one more", "for the next run")
    saved = root / "saved"
    shutil.copytree(space.root, saved, symlinks=True)
    before = space.locked()
    log = root / "calls"
    result = warm.runner("apply", space.recipe, strace=logging(log, (*CHANGING, *OPENING)))
    assert result.code == 0, result.err
    after = space.locked()
    assert after is not None
    versions = (before, *written_to(space.lock, log))
    assert versions[-1] == after
    return Scene(space, saved, after, versions, tuple(calls_of(log, [space.root])), log)


def written_to(path: Path, log: Path) -> list[bytes]:
    """Each content that was renamed to `path`, in order, as the calls of the log wrote it."""
    wrote: dict[str, bytes] = {}
    found = []
    for _, text in lines_of(log):
        if text.startswith("openat(") and re.search("O_TRUNC|O_EXCL", text):
            wrote[named(text)[0]] = b""
        elif write := re.match(r"write\(\d+<([^>]*)>, (\"(?:[^\"\\]|\\.)*\"), ", text):
            wrote[write[1]] = wrote.get(write[1], b"") + ast.literal_eval("b" + write[2])
        elif (names := renamed(text)) and names[1] == str(path):
            found.append(wrote.pop(names[0]))
    return found


def renamed(text: str) -> tuple[str, str] | None:
    """From and to, when the call is a rename that succeeded."""
    if not re.match(r"rename(at2?)?\(", text) or not text.endswith(" = 0"):
        return None
    first, second = named(text)
    return first, second


def named(text: str) -> list[str]:
    """The paths that a call gives by name, those below a descriptor's folder whole."""
    names = re.findall(r'(?:<([^>]*)>, )?"([^"]*)"', text)
    return [os.path.join(folder, name) for folder, name in names]  # noqa: PTH118


class Durable:
    """Follows a run's calls: which files and folders would not survive a power cut yet.

    A file is dirty from a write to its next fsync, a folder from a new name in it to its own.
    """

    def __init__(self) -> None:
        self.dirty: set[str] = set()

    def below(self, folder: str) -> list[str]:
        return sorted(p for p in self.dirty if p == folder or p.startswith(f"{folder}/"))

    def add(self, call: Call) -> None:
        descriptor = re.match(r"\w+\(\d+<([^>]*)>", call.text)
        if " = -1 " in call.text:
            return
        if moved := renamed(call.text):
            self._move(*moved)
        elif call.name in ("fsync", "fdatasync") and descriptor:
            self.dirty.discard(descriptor[1])
        elif call.name in ("write", "pwrite64", "writev", "pwritev", "ftruncate") and descriptor:
            self.dirty.add(descriptor[1])
        elif call.name.startswith("symlink"):
            self.dirty.add(str(Path(named(call.text)[1]).parent))
        elif "O_CREAT" in call.text or call.name.startswith("mkdir"):
            self.dirty.add(str(Path(named(call.text)[0]).parent))
        elif call.name in ("unlink", "unlinkat", "rmdir"):
            self.dirty -= set(self.below(named(call.text)[0]))

    def _move(self, old: str, new: str) -> None:
        inside = self.below(old)
        self.dirty -= {*inside, *self.below(new)}
        self.dirty |= {new + path.removeprefix(old) for path in inside}
        self.dirty.add(str(Path(new).parent))


# ---------------------------------------------------------------- small disks


@contextmanager
def small_disk(folder: Path, size: int, inodes: int = 0) -> Iterator[None]:
    """A tmpfs of `size` bytes at the folder; skips the test where one may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size},mode=755" + (f",nr_inodes={inodes}" if inodes else "")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the program mount")
    if done.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield
    finally:
        with suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", "-l", str(folder)], check=True)


def grow(folder: Path, size: int = 64 << 20, inodes: int = 0) -> None:
    """Gives a small disk another size."""
    options = f"remount,size={size},nr_inodes={inodes}"
    done = subprocess.run(["mount", "-o", options, str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be made another size: {done.stderr.decode().strip()}")


def timed(space: Space) -> float:
    """Seconds that an apply takes here as a process of its own."""
    begun = time.monotonic()
    assert run("apply", space.recipe).code == 0
    return time.monotonic() - begun
