"""Imports torch, transformers and peft in two thirds of the time that they take by themselves."""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

_LISTING = "transformers.utils.import_utils"
_NOT_USED = ("boto3",)
"""What accelerate imports where it is installed, for a cloud that nothing here trains in."""
_BLOCK = 2**24


@contextmanager
def importing() -> Iterator[None]:
    """For a process of its own: imports only what a training uses, and searches no modules for
    garbage, now or later."""
    was_enabled = gc.isenabled()
    gc.disable()
    listed_once = _ListedOnce()
    sys.meta_path.insert(0, listed_once)
    hidden = [name for name in _NOT_USED if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(hidden))  # looked for, and not found
    try:
        bitsandbytes()
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        sys.meta_path.remove(listed_once)
        gc.freeze()
        if was_enabled:
            gc.enable()


def bitsandbytes() -> None:
    """Imports bitsandbytes without torch's compiler, which its 0.50 loads for all of its kernels.

    On CUDA and on a CPU it has kernels of its own, so that nothing is ever compiled. It has to come
    before peft, which imports it.
    """
    import torch

    # On a CPU it recommends a package that downloads kernels.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    whole: Any = torch
    compile, whole.compile = whole.compile, _as_it_is
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        pass  # who needs it will say so
    finally:
        whole.compile = compile


def read_ahead(base: Path) -> None:
    """Has the system read a model's weights while the libraries are imported."""
    paths = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
    threading.Thread(target=_read, args=(paths,), daemon=True).start()


def _read(paths: Sequence[Path]) -> None:
    block = bytearray(_BLOCK)
    for path in paths:
        with suppress(OSError), path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def _as_it_is(function: Callable[..., Any] | None = None, **_: object) -> Any:
    """In the place of `torch.compile`."""
    return function if function is not None else _as_it_is


class _ListedOnce(importlib.abc.MetaPathFinder):
    """transformers 5.23 reads the files of all its models twice to list their classes; so, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _LISTING:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            found: Any = module
            if hasattr(found, "create_import_structure_from_path"):
                listed = cache(found.create_import_structure_from_path)
                found.create_import_structure_from_path = listed

        loader.exec_module = executed
        return spec
