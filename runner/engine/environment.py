"""What a stage runs on: versions of the libraries that can change its output, and the GPU.

It is kept with each fact and shown as drift; it decides nothing, unless a recipe says `rerun_on`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from runner.engine import key

if TYPE_CHECKING:
    from runner.engine.recipe import Step

NVIDIA = Path("/proc/driver/nvidia/gpus")


def of(step: Step) -> dict[str, str]:
    """The environment of a stage: Python, its libraries, and the GPU where it uses one."""
    found = {name: version for name in step.libraries if (version := _version(name))}
    found["python"] = ".".join(map(str, sys.version_info[:3]))
    if step.uses_gpu:
        found["gpu"] = gpu()
    return dict(sorted(found.items()))


def digest(env: Mapping[str, str]) -> str:
    return key.of_files(env.items())


def changes(then: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What differs: name → then, now; nothing where it was not written down then."""
    names = sorted(then.keys() | now.keys()) if then else []
    both = {name: (then.get(name, "none"), now.get(name, "none")) for name in names}
    return {name: (was, is_now) for name, (was, is_now) in both.items() if was != is_now}


@cache
def gpu() -> str:
    """The name of the GPU, without asking the libraries that take seconds to load."""
    if sys.platform == "darwin" and os.uname().machine == "arm64":
        return "Apple"
    names: list[str] = []
    try:
        for info in sorted(NVIDIA.glob("*/information")):
            lines = info.read_text(errors="replace").splitlines()
            names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    except OSError:
        pass
    return ", ".join(names) or "none"


@cache
def _version(name: str) -> str | None:
    from importlib import metadata  # a tenth of what a run with nothing to do may take

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
