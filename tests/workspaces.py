"""Small workspaces for tests: chats in the users' shape and recipes, on a real disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runner.engine import events, execute, opened, plan

DATA_RECIPE = """\
name: small
stages:
  - stage: ingest
    sources: [chats]
  - stage: window
    mode: conversational
  - stage: split
    eval_fraction: 0.2
"""


def chat(path: Path, *texts: str) -> Path:
    """A chat file: user and assistant in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    messages = [
        {"sender": "Claude", "claudeOutputText": text}
        if index % 2
        else {"sender": "User", "userInput": text}
        for index, text in enumerate(texts)
    ]
    path.write_text(json.dumps(messages, ensure_ascii=False), encoding="utf-8")
    return path


def make(root: Path, recipe: str = DATA_RECIPE, chats: int = 6) -> Path:
    """A workspace with chats of 1 to 6 pairs; the path of its recipe."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "pyproject.toml").touch()
    for number in range(chats):
        texts = [
            f"{'a' if n % 2 else 'q'}{n} of chat {number}" for n in range(2 * (number % 6 + 1))
        ]
        chat(root / "chats" / f"chat-{number}.json", *texts)
    path = root / "recipes" / "small.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(recipe)
    return path


def apply(
    recipe: Path,
    listen: Callable[[events.Event], None] = lambda event: None,
    *,
    overrides: Sequence[str] = (),
    **choice: Any,
) -> tuple[plan.Planned, ...]:
    with opened.at(recipe, overrides=overrides) as current:
        return execute.apply(current, listen, choice=plan.Choice(**choice))


def planned(
    recipe: Path, *, overrides: Sequence[str] = (), **choice: Any
) -> dict[str, plan.Planned]:
    with opened.at(recipe, overrides=overrides) as current:
        return {step.step.name: step for step in current.plan(plan.Choice(**choice))}


def states(recipe: Path, **asked: Any) -> dict[str, str]:
    return {name: step.state for name, step in planned(recipe, **asked).items()}


def causes(recipe: Path, stage: str) -> list[str]:
    return [cause.text for cause in planned(recipe)[stage].causes]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def ran(log: Sequence[events.Event]) -> list[str]:
    return [event["stage"] for event in log if event["event"] == "stage_started"]


def run(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """The command `runner` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "runner", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-qm", "x")


def committed(root: Path) -> Path:
    """An applied recipe in a git repository, committed with its data and its lockfile."""
    recipe = make(root)
    git(root, "init", "-q", "-b", "main")
    (root / ".gitignore").write_text("/artifacts/\n")
    apply(recipe)
    commit(root)
    return recipe


def grow_old(*folders: Path, days: float = 20) -> None:
    """As if nobody had touched the folders, and all in them, for so long."""
    then = time.time() - days * 24 * 3600
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (then, then), follow_symlinks=False)


@contextmanager
def small_disk(mount: Path, size: str | int) -> Iterator[None]:
    """A file system with so much room at `mount`; skips where one may not be mounted."""
    mount.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def grow(mount: Path) -> None:
    """Gives a small disk all the room that a test needs."""
    subprocess.run(["mount", "-o", "remount,size=99m", str(mount)], check=True)
