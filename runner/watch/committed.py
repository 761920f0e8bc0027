"""The changed lockfile as a commit of its own, where `retrain: commit: true` asks for it.

Nothing is pushed, and what else is staged stays staged. What keeps git from it is a sentence.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from runner.engine import gc

HOOKS_S = 300.0


def lockfile(path: Path, message: str) -> str:
    """Commits the lockfile, where it changed; what went wrong, or nothing."""
    code, said = _git(path, "status", "--porcelain", "--ignored", "--", path.name)
    if code or not said:
        return said if code else ""
    if said.startswith("!!"):
        return f"{path.name} is ignored by git"
    if said.startswith("??"):
        code, said = _git(path, "add", "--intent-to-add", "--", path.name)
        if code:
            return said
    code, said = _git(path, "commit", "--quiet", "--only", "--message", message, "--", path.name)
    return (said or f"git ended with exit code {code}") if code else ""


def _git(path: Path, *arguments: str) -> tuple[int, str]:
    """git's exit code, and the first line of what it says."""
    kept = {name: text for name, text in os.environ.items() if name not in gc.LOCATIONS}
    environment = {**kept, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_EDITOR": "true"}
    command = ["git", "--literal-pathspecs", "-C", str(path.absolute().parent), *arguments]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=HOOKS_S,
        )
    except FileNotFoundError:
        return 1, "git is not installed"
    except subprocess.TimeoutExpired:
        return 1, f"git and its hooks did not end within {HOOKS_S:.0f} s"
    said = (done.stdout or done.stderr).decode(errors="replace").strip()
    return done.returncode, said.partition("\n")[0]
