"""What is said to who looks for a mistake: nothing, unless somebody has loaded `logging`.

Its import is a twentieth of what a run with nothing to do may take.
"""

from __future__ import annotations

import sys


def debug(text: str, *values: object) -> None:
    """A line for `--debug`."""
    if "logging" in sys.modules:
        sys.modules["logging"].getLogger("runner").debug(text, *values)


def warning(text: str) -> None:
    """A line for everybody, to standard error."""
    print(f"runner: warning: {text}", file=sys.stderr)
